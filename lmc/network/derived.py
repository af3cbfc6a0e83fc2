"""Derived state: what a state dict holds that is no weight, and what to do with it along paths, in merges and in matching.

| state | recognised by | done |
| --- | --- | --- |
| running statistics of batch and instance normalisation | the modules | re-estimated from inputs, see `Recalibrator` |
| spectral normalisation: u, v | `weight_orig`, `weight_u`, `weight_v`; `parametrizations.*.0._u` | weights are averaged at \
spectral norm 1, u and v computed from the average |
| weight normalisation: g, v | `weight_g`, `weight_v`; `parametrizations.*.original0`, `original1` | the weights g v / |v| \
are averaged, and written as v with g = |v| |
| pruning: mask, and weights that it hides | `weight_orig`, `weight_mask` | the weights in use are averaged; the mask of \
an average shows what any of them shows |
| bases of orthogonal parametrizations | `parametrizations.*.0.base` | averaged, with a warning by name where they differ |
| constants kept as buffers: tables of coordinates and frequencies | buffers of the module, or their names | no weights: \
kept where all have the same, else averaged with a warning by name |
| shadows of moving averages, observers of quantisation, codebooks | their names | averaged, with a warning by name |
| counters of batches and steps, index tables, masks | integers and booleans | kept from the first |

Averages are made in coordinates of the weight that is used: `gauged` brings weight sets there without changing what they
compute, and `settled` makes derived tensors fit an average. Neither depends on a module.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lmc.core.context import warn
from lmc.weights import StateDict, Weights

_SVD = 512  # up to this many rows or columns
_STEPS = 100  # of the power iteration beyond

# Tensors that lag behind the weights, or belong to data: averaged, but the average means little.
_LAGGING = (
    (
        "moving averages",
        re.compile(r"(^|\.)(ema|shadow|shadow_params|model_ema|ema_model|module_ema)(\.|_|$)|_ema(\.|$)"),
    ),
    ("observers of quantisation", re.compile(r"(activation_post_process|fake_quant|observer)\.|\.(min_val|max_val)$")),
    ("statistics of a codebook", re.compile(r"\.(embed_avg|cluster_size)$")),
    ("bases of orthogonal parametrizations", re.compile(r"(^|\.)parametrizations\.[^.]+\.\d+\.base$")),
)
# Functions of the architecture alone, known by name where no module says what its buffers are.
_CONSTANT = re.compile(
    r"(^|\.)((\w+_)?coords_table|(original_)?inv_freq|(cos|sin)_cached|freqs_cis|pixel_(mean|std)|masked_bias|attn_mask)$"
)
_ESTIMATED = re.compile(r"(^|\.)running_(mean|var)$")


@dataclass(frozen=True)
class Spectral:
    """Names of a weight that is divided by its spectral norm u'Wv, and of the vectors."""

    weight: str
    u: str
    v: str

    @property
    def derived(self) -> tuple[str, ...]:
        return self.u, self.v

    def gauge(self, weights: Weights) -> Weights:
        """The same function with u'Wv = 1."""
        weight, norm = weights[self.weight], self._norm(weights)
        usable = bool(norm.isfinite()) and float(norm) != 0.0
        return {self.weight: (weight.double() / norm).to(weight.dtype)} if usable else {}

    def settle(self, weights: Weights) -> Weights:
        """Vectors of the largest singular value, unless those there fit a weight of norm 1."""
        weights = {name: weights[name].detach() for name in (self.weight, self.u, self.v)}
        rounding = 64 * torch.finfo(weights[self.weight].dtype).eps
        if abs(float(self._norm(weights)) - 1.0) <= rounding:
            return {}
        matrix = self._matrix(weights)
        u, v = _leading(matrix, weights[self.u].double(), weights[self.v].double())
        return {self.u: u.to(weights[self.u].dtype), self.v: v.to(weights[self.v].dtype)}

    def _norm(self, weights: Weights) -> Tensor:
        return weights[self.u].double() @ self._matrix(weights) @ weights[self.v].double()

    def _matrix(self, weights: Weights) -> Tensor:
        """(len(u), len(v)): torch takes axis 0 as rows, and axis 1 of transposed convolutions."""
        weight, u, v = weights[self.weight].double(), weights[self.u].double(), weights[self.v].double()
        axes = [axis for axis in range(weight.ndim) if weight.shape[axis] == len(u)]
        forms = [weight.movedim(axis, 0).reshape(len(u), -1) for axis in axes]
        return max(forms, key=lambda form: abs(float(u @ form @ v)))  # along another axis u and v mean nothing


@dataclass(frozen=True)
class Normed:
    """Names of the length g and the direction v of a weight g v / |v|."""

    length: str
    direction: str

    @property
    def derived(self) -> tuple[str, ...]:
        return (self.length,)

    def gauge(self, weights: Weights) -> Weights:
        """The same function with g = |v|."""
        length, direction = weights[self.length].double(), weights[self.direction].double()
        weight = length * direction / self._norm(length, direction).clamp_min(torch.finfo(torch.float64).tiny)
        dtype = weights[self.direction].dtype
        return {
            self.direction: weight.to(dtype),
            self.length: self._norm(length, weight).to(weights[self.length].dtype),
        }

    def settle(self, weights: Weights) -> Weights:
        length, direction = weights[self.length], weights[self.direction].double()
        return {self.length: self._norm(length, direction).to(length.dtype)}

    @staticmethod
    def _norm(length: Tensor, direction: Tensor) -> Tensor:
        """The norm over all axes of v along which g has one entry, in the shape of g."""
        if length.ndim == 0:
            return direction.norm()
        axes = [axis for axis in range(direction.ndim) if length.shape[axis] == 1]
        return direction.norm(dim=axes, keepdim=True) if axes else direction.abs()


@dataclass(frozen=True)
class Pruned:
    """Names of a weight of which a mask of zeros and ones hides a share, and of the mask."""

    weight: str
    mask: str

    @property
    def derived(self) -> tuple[str, ...]:
        return (self.mask,)

    def gauge(self, weights: Weights) -> Weights:
        """The same function with zeros where the mask has them."""
        return {self.weight: weights[self.weight] * weights[self.mask].to(weights[self.weight].dtype)}

    def settle(self, weights: Weights) -> Weights:
        weight, mask = weights[self.weight], weights[self.mask]
        return {self.mask: ((mask != 0) | (weight != 0)).to(mask.dtype)}


Derived: TypeAlias = Spectral | Normed | Pruned


def derived_in(weights: Mapping[str, Tensor]) -> list[Derived]:
    """The spectral and weight normalisations and pruned weights in a state dict, known by their names and shapes."""
    return [*_spectral(weights), *_normed(weights), *_pruned(weights)]


def derived_names(weights: Mapping[str, Tensor]) -> frozenset[str]:
    """The tensors that `settled` computes from others: no weights, they take no part in norms, cosines or masks."""
    return frozenset(name for kind in derived_in(weights) for name in kind.derived)


def gauged(weights: Weights) -> StateDict:
    """The same function in coordinates of which averages make sense."""
    found = StateDict(weights, like=weights)
    for kind in derived_in(weights):
        found |= kind.gauge(found)
    return found


def settled(weights: Weights) -> StateDict:
    """An average of gauged weights with derived tensors of its own."""
    found = StateDict(weights, like=weights)
    for kind in derived_in(weights):
        found |= kind.settle(found)
    return found


def constants_in(names: Iterable[str]) -> frozenset[str]:
    """The tensors that are functions of the architecture alone, known by their names."""
    return frozenset(name for name in names if _CONSTANT.search(name))


def warn_of_lagging(
    states: Sequence[Mapping[str, Tensor]],
    buffers: Collection[str] = (),
    same: Callable[[str, int], bool] | None = None,
) -> None:
    """Warn once for each kind of tensors that are averaged although they belong to no average, if they differ.

    Args:
        states: the weight sets, or outlines of them.
        buffers: the names of those that a module keeps as buffers.
        same: whether a tensor of the first weight set is the same in another, given by its place.
    """
    if len(states) < 2:
        return
    same = same or (lambda name, i: torch.equal(states[0][name], states[i][name]))
    known = {kind: [name for name in states[0] if pattern.search(name)] for kind, pattern in _LAGGING}
    told = {*derived_names(states[0]), *(name for names in known.values() for name in names)}
    known["buffers, which no training changes or which belong to one network,"] = [
        name
        for name, tensor in states[0].items()
        if (name in buffers or _CONSTANT.search(name))
        and not (name in told or _ESTIMATED.search(name))
        and (tensor.is_floating_point() or tensor.is_complex())
    ]
    for what, names in known.items():
        differing = [n for n in names if any(n in states[i] and not same(n, i) for i in range(1, len(states)))]
        if differing:
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            warn(
                f"{differing[0]}{more}: {what} are averaged like weights; leave them out, or compute them again from the "
                "result"
            )


def _spectral(weights: Mapping[str, Tensor]) -> Iterator[Spectral]:
    for name in weights:
        if name.endswith("_orig"):
            u, v = f"{name[:-5]}_u", f"{name[:-5]}_v"
        elif name.endswith(".original") and "parametrizations." in name:
            stem = name.removesuffix("original")
            u, v = next(((x, f"{x[:-2]}_v") for x in weights if x.startswith(stem) and x.endswith("._u")), ("", ""))
        else:
            continue
        if u in weights and v in weights and weights[u].ndim == 1 and weights[u].numel() in weights[name].shape:
            if weights[u].numel() * weights[v].numel() == weights[name].numel():
                yield Spectral(name, u, v)


def _normed(weights: Mapping[str, Tensor]) -> Iterator[Normed]:
    for name in weights:
        if name.endswith("_g"):
            other = f"{name[:-2]}_v"
        elif name.endswith(".original0") and "parametrizations." in name:
            other = f"{name[:-1]}1"
        else:
            continue
        if other not in weights or f"{name[:-2]}_u" in weights:
            continue
        length, direction = weights[name].shape, weights[other].shape
        fits = len(length) == len(direction) and all(a in (1, b) for a, b in zip(length, direction, strict=True))
        if weights[name].is_floating_point() and (fits or len(length) == 0) and weights[other].is_floating_point():
            if weights[name].numel() < weights[other].numel():
                yield Normed(name, other)


def _pruned(weights: Mapping[str, Tensor]) -> Iterator[Pruned]:
    for name in weights:
        mask = f"{name[:-5]}_mask"
        if name.endswith("_orig") and mask in weights and weights[mask].shape == weights[name].shape:
            yield Pruned(name, mask)


def _leading(matrix: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of the largest singular value, on the side of the given ones where these have a direction."""
    if min(matrix.shape) <= _SVD:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        new_u, new_v = left[:, 0], right[0]
    else:
        new_u, new_v = u, matrix[matrix.norm(dim=1).argmax()]  # the longest row has a share of it
        for _ in range(_STEPS):
            new_u = torch.nn.functional.normalize(matrix @ new_v, dim=0)
            new_v = torch.nn.functional.normalize(matrix.T @ new_u, dim=0)
    return (-new_u, -new_v) if float(new_u @ u + new_v @ v) < 0.0 else (new_u, new_v)
