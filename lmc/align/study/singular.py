"""The agreement of two networks' singular vectors, which is why matching works (Ito, Yamada and Kumagai 2025, arXiv:2402.04051).

With the singular value decompositions `W = U S V^T` of a layer in two aligned networks,

    |W_a - W_b|² = sum_i s_i² + sum_j t_j² - 2 sum_ij s_i t_j (u_i . u'_j) (v_i . v'_j)

and since the spectra of independently trained networks nearly agree, the last sum is all that alignment can change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.network.derived import gauged
from lmc.weights import ModelOrWeights, Weights, agreeing

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class LayerAlignment:
    """One weight matrix (n_out, n_in times kernel) in both networks.

    Attributes:
        values_a, values_b: (r,) singular values, largest first.
        left, right: (r, r) inner products `u_i . u'_j` and `v_i . v'_j`; each has the signs of its vectors, their product
            has not.
        kept: how many values are at least gamma times the largest, in the network with fewer of them.
        agreement: `sum (u_i . u'_j) (v_i . v'_j)` over the values kept in either network.
    """

    values_a: Tensor
    values_b: Tensor
    left: Tensor
    right: Tensor
    kept: int
    agreement: float

    @property
    def r(self) -> float:
        """`agreement / kept`: 1 for equal layers, about 0 for unrelated ones."""
        return self.agreement / self.kept if self.kept else 0.0


@dataclass(frozen=True, eq=False)
class SingularAlignment(Result):
    """The agreement of singular vectors in every layer of two aligned networks.

    Attributes:
        layers: tensor name -> `LayerAlignment`.
        gamma: only singular values of at least this share of the layer's largest count.
    """

    layers: dict[str, LayerAlignment]
    gamma: float

    @property
    def r(self) -> float:
        """R of the paper: the agreements of all layers, by the number of values kept in all."""
        kept = sum(layer.kept for layer in self.layers.values())
        return sum(layer.agreement for layer in self.layers.values()) / kept if kept else 0.0

    def to_frame(self) -> "pd.DataFrame":
        """A row for each layer: layer, r, kept, and the largest singular value in a and b."""
        pd = require("pandas")

        rows = [
            (name, layer.r, layer.kept, float(layer.values_a[0]), float(layer.values_b[0]))
            for name, layer in self.layers.items()
        ]
        return pd.DataFrame(rows, columns=["layer", "r", "kept", "largest_a", "largest_b"])

    def __repr__(self) -> str:
        return f"SingularAlignment(R = {self.r:.3f} at gamma = {self.gamma:g}, {len(self.layers)} layers)"


@own_context
def singular_alignment(a: ModelOrWeights, b: ModelOrWeights, *, gamma: float = 0.3) -> SingularAlignment:
    """R and what it is made of, for two networks that are aligned already (`b = pi.apply(b)`).

    Every parameter with two axes or more is a matrix whose rows are its first axis (a convolution's columns are
    `(channel, kernel)`), except those with a single row or column. Decomposed in float64; of weights under a weight or
    spectral normalisation those in use are.

    Args:
        a, b: modules or state dicts; neither is changed.
        gamma: in [0, 1]; 0 counts every singular vector, 0.3 those that carry most of the signal.

    Raises:
        InputError: gamma outside [0, 1].
        MismatchError: different architectures.
        WeightsError: not finite.
    """
    if not 0.0 <= gamma <= 1.0:
        raise InputError(f"gamma={gamma}: expected a share between 0 and 1")
    a, b = map(gauged, agreeing([a, b], "ab"))
    theirs = matrices(b)
    return SingularAlignment({name: _layer(x, theirs[name], gamma) for name, x in matrices(a).items()}, gamma)


def matrices(weights: Weights) -> Mapping[str, Tensor]:
    """The weights that are matrices of at least two rows and columns, in float64 (complex128)."""
    flat = {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float64)).flatten(1)
        for name, tensor in weights.items()
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.ndim > 1
    }
    return {name: matrix for name, matrix in flat.items() if min(matrix.shape) > 1}


def _layer(a: Tensor, b: Tensor, gamma: float) -> LayerAlignment:
    (u_a, s_a, v_a), (u_b, s_b, v_b) = (torch.linalg.svd(matrix, full_matrices=False) for matrix in (a, b))
    left, right = u_a.mH @ u_b, (v_b @ v_a.mH).T  # rows of v are the conjugates of singular vectors
    kept_a, kept_b = (int(((s >= gamma * s[0]) & (s > 0)).sum()) for s in (s_a, s_b))
    agreement = float((left[:kept_a, :kept_b] * right[:kept_a, :kept_b]).real.sum())
    return LayerAlignment(s_a, s_b, left, right, min(kept_a, kept_b), agreement)
