"""Elements of the whole symmetry group of a network as differentiable functions of free parameters.

Each group of units is first mixed by a matrix, then scaled. The matrix is a rotation `exp(K - K^T)`; or an invertible
`exp(K)`, whose inverse transposed acts where the units are read. Scales are `exp(e k)` with the exponents e of each place.
All are exact symmetries, and the identity at first. Permutations stay as they are: gradients that pass straight to latent
scores of hidden units (Theus et al. 2025, arXiv:2506.22712, section 4) exchange units that their activations have paired
well, and cost more than they find while all else is moving.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmc.align.relaxed.soft import mix
from lmc.align.rotations.matching import skew
from lmc.symmetry.continuous import ContinuousSymmetries
from lmc.symmetry.continuous.places import Occurrence, occurrences
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights

SMALL = 1e-9  # exponents below are none


@dataclass(frozen=True)
class Freedom:
    """The freedom to learn of the units of one group.

    Attributes:
        kind: "orthogonal", "orthogonal fixing 1", "general linear", or "none".
        inverse: occurrences at which a general linear matrix acts by its inverse transposed.
        scales: for each independent scale its exponents by occurrence.
    """

    kind: str = "none"
    inverse: frozenset[str] = frozenset()
    scales: tuple[Mapping[str, float], ...] = ()


def freedoms(
    spec: PermutationSpec, rotated: Mapping[str, bool], symmetries: ContinuousSymmetries
) -> dict[str, Freedom]:
    """The freedom to learn of each group of a network whose streams can be rotated as `rotated` says."""
    found = {}
    for name, group in spec.groups.items():
        symmetry = symmetries.kinds.get(group.family)
        scales = () if symmetry is None else _scales(symmetry.scales, spec.buffers)
        kind, inverse = "none", frozenset()
        if name in rotated:
            kind = "orthogonal fixing 1" if rotated[name] else "orthogonal"
            if symmetry is not None and symmetry.mixing == "general linear" and len(symmetry.mixes) == len(scales) == 1:
                kind, inverse = "general linear", frozenset(o for o, e in symmetry.mixes[0].items() if e < 0)
                scales = ()  # they are among the matrices
        found[name] = Freedom(kind, inverse, scales)
    return {name: freedom for name, freedom in found.items() if freedom.kind != "none" or freedom.scales}


def _scales(scales: Sequence[Mapping[str, float]], buffers: Iterable[str]) -> tuple[dict[str, float], ...]:
    """A basis of those combinations of scales that leave running statistics as they are.

    A scale that needs them to follow is none where they are estimated anew, as they are between A and B.
    """
    rows = [dict(scale) for scale in scales]
    fixed = {o for row in rows for o in row if o in buffers or o.partition("[")[0].partition(" axis")[0] in buffers}
    for occurrence in fixed:
        pivot = next((row for row in rows if row.get(occurrence)), None)
        if pivot is not None:
            rows = [_reduced(row, pivot, occurrence) for row in rows if row is not pivot]
    return tuple(row for row in rows if row)


def _reduced(row: Mapping[str, float], pivot: Mapping[str, float], occurrence: str) -> dict[str, float]:
    """The row less as much of the pivot as makes its entry for the occurrence 0."""
    share = row.get(occurrence, 0.0) / pivot[occurrence]
    found = {name: row.get(name, 0.0) - share * pivot.get(name, 0.0) for name in {**row, **pivot}}
    return {name: exponent for name, exponent in found.items() if abs(exponent) > SMALL}


class FreeElement:
    """A learnable element of the group, applied to the weights of B.

    The parameters of groups of one size and kind lie in one tensor, and groups of one family are moved by one product:
    of networks as small as can be learned from in seconds, most of a step would else be calls.

    Args:
        spec: the symmetries of the architecture.
        free: group -> what may be learned.
        weights: B, as it starts.
    """

    def __init__(self, spec: PermutationSpec, free: Mapping[str, Freedom], weights: Weights) -> None:
        self.spec, self.free, self.weights = spec, free, weights
        device = next(iter(weights.values())).device
        matrices: dict[tuple[str, int], list[str]] = {}  # kind and size -> groups
        scales: dict[int, list[tuple[str, int]]] = {}  # size -> groups and which of their scales
        for name, freedom in free.items():
            n = spec.groups[name].size
            if freedom.kind != "none":
                matrices.setdefault((freedom.kind, n), []).append(name)
            if freedom.scales:
                scales.setdefault(n, []).extend((name, k) for k in range(len(freedom.scales)))
        sizes = {key: (len(names), key[1], key[1]) for key, names in matrices.items()}
        self._generators = {key: torch.zeros(size, device=device).requires_grad_() for key, size in sizes.items()}
        self._logarithms = {n: torch.zeros(len(rows), n, device=device).requires_grad_() for n, rows in scales.items()}
        self._steps: dict[str, list[_Step]] = {}
        exponents: dict[int, list[list[float]]] = {}
        for alike in self._alike():
            freedom, n = free[alike[0]], spec.groups[alike[0]].size
            key = (freedom.kind, n)
            every = [list(occurrences(spec, spec.groups[name])) for name in alike]
            for places in zip(*every, strict=True):
                tensor, rows = places[0].tensor, exponents.setdefault(n, [])
                if tensor not in weights or not weights[tensor].is_floating_point():
                    continue
                mixing = scaling = None
                if freedom.kind != "none":
                    of = slice(matrices[key].index(alike[0]), matrices[key].index(alike[-1]) + 1)
                    mixing = _Mixing(key, of, places[0].name in freedom.inverse)
                powers = [
                    [free[g].scales[k].get(place.name, 0.0) if g == name else 0.0 for g, k in scales.get(n, ())]
                    for name, place in zip(alike, places, strict=True)
                ]
                if any(map(any, powers)):
                    scaling = _Scaling(n, slice(len(rows), len(rows) + len(powers)))
                    rows.extend(powers)
                if mixing or scaling:
                    step = _Step(places, weights[tensor], mixing, scaling)
                    self._steps.setdefault(tensor, []).append(step)
        self._exponents = {  # of scales (k) at steps (s): (s, k)
            n: torch.tensor(rows, dtype=torch.float64, device=device) for n, rows in exponents.items() if rows
        }

    @property
    def parameters(self) -> dict[str, list[Tensor]]:
        """The free parameters: of "rotation" tensors (k, n, n) for the k matrices of one kind and size, of "scale" (k, n)."""
        return {"rotation": list(self._generators.values()), "scale": list(self._logarithms.values())}

    def _alike(self) -> list[list[str]]:
        """The groups that move, those of one family together where they move by the same kind of matrix."""
        found: dict[tuple[str, str], list[str]] = {}
        for name, freedom in self.free.items():
            found.setdefault((self.spec.groups[name].family, freedom.kind), []).append(name)
        return list(found.values())

    def __call__(self) -> Weights:
        """The tensors of B moved, followed by autograd; in float32 at least."""
        return self._moved(torch.promote_types(torch.float32, self._dtype))

    @torch.no_grad()
    def exact(self) -> Weights:
        """All tensors of B moved, worked out in float64, in the dtypes of B."""
        moved = self._moved(torch.float64)
        found = {name: moved[name].to(x.dtype) if name in moved else x for name, x in self.weights.items()}
        return found | {second: found[first] for second, first in self.spec.aliases.items()}

    @property
    def _dtype(self) -> torch.dtype:
        return next(x.dtype for x in self.weights.values() if x.is_floating_point())

    def _moved(self, dtype: torch.dtype) -> Weights:
        matrices = {key: _matrices(key[0], generators.to(dtype)) for key, generators in self._generators.items()}
        factors = {
            n: torch.exp(exponents.to(dtype) @ self._logarithms[n].to(dtype))
            for n, exponents in self._exponents.items()
        }
        moved = {}
        for name, steps in self._steps.items():
            tensor = self.weights[name].to(dtype)
            for step in steps:
                if step.mixing is not None:
                    tensor = step.mixed(tensor, matrices[step.mixing.key][step.mixing.inverse][step.mixing.of])
                if step.scaling is not None:
                    tensor = step.scaled(tensor, factors[step.scaling.size][step.scaling.of])
            moved[name] = tensor
        return moved


def _matrices(kind: str, generators: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices (k, n, n) of generators, and their inverses transposed."""
    if kind == "general linear":
        both = torch.matrix_exp(torch.stack([generators, -generators.mT]))
        return both[0], both[1]
    rotations = torch.matrix_exp(skew(generators, kind == "orthogonal fixing 1"))
    return rotations, rotations


class _Mixing(NamedTuple):
    """The place of the matrices of a step: among those of a kind and size, or their inverses transposed."""

    key: tuple[str, int]
    of: slice
    inverse: bool


class _Scaling(NamedTuple):
    """The place of the factors of a step: among those of groups of one size."""

    size: int
    of: slice


class _Step:
    """One place at which groups of a family move in a tensor, each by a matrix of its own, and then by scales.

    Args:
        places: of each group.
        tensor: as it is before anything moves.
        mixing, scaling: where matrices and factors are found; None: none.
    """

    def __init__(
        self, places: Sequence[Occurrence], tensor: Tensor, mixing: _Mixing | None, scaling: _Scaling | None
    ) -> None:
        self.mixing, self.scaling = mixing, scaling
        self.dims = places[0].dims
        rows = np.concatenate([place.rows.ravel() for place in places])
        self.columns = places[0].rows.shape[1]
        self.length = math.prod(tensor.shape[d] for d in self.dims)
        every = rows.size == self.length and bool((rows[1:] > rows[:-1]).all())
        self.where = None if every else torch.from_numpy(rows).to(tensor.device)

    def mixed(self, tensor: Tensor, matrices: Tensor) -> Tensor:
        """The tensor with the units of each group mixed by its matrix (n, n) of several."""
        if len(matrices) == 1:
            return mix(tensor, self.dims, self.where, matrices[0])
        first = tuple(range(len(self.dims)))
        front = tensor.movedim(self.dims, first)
        flat = front.reshape(self.length, -1)
        units = flat if self.where is None else flat.index_select(0, self.where)
        moved = (matrices @ units.reshape(*matrices.shape[:2], -1)).reshape(units.shape)
        flat = moved if self.where is None else flat.index_copy(0, self.where, moved)
        return flat.reshape(front.shape).movedim(first, self.dims)

    def scaled(self, tensor: Tensor, scales: Tensor) -> Tensor:
        """The tensor with unit i of group g multiplied by `scales[g, i]` at this place."""
        factor = scales.flatten().repeat_interleave(self.columns)
        if self.where is not None:
            ones = torch.ones(self.length, dtype=scales.dtype, device=scales.device)
            factor = ones.index_copy(0, self.where, factor)
        along = [tensor.shape[d] for d in self.dims]
        first = tuple(range(len(along)))
        front = tensor.movedim(self.dims, first)
        return (front * factor.view(*along, *[1] * (tensor.ndim - len(along)))).movedim(first, self.dims)


def names_of(free: Mapping[str, Freedom]) -> str:
    """The things that are learned, in words."""
    kinds: dict[str, None] = {}
    for freedom in free.values():
        kinds |= dict.fromkeys([freedom.kind] if freedom.kind != "none" else [])
        kinds |= dict.fromkeys(["scales"] if freedom.scales else [])
    words = {"orthogonal": "rotations", "orthogonal fixing 1": "rotations"}
    words["general linear"] = "invertible mixings"
    return " and ".join(dict.fromkeys(words.get(kind, kind) for kind in kinds))
