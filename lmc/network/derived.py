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
| orthogonal parametrizations: coordinates, base | `parametrizations.*.0.base`, and the module, which says what they mean | \
matrices in use are averaged and replaced by the nearest orthogonal ones; without the module a warning by name |
| constants kept as buffers: tables of coordinates and frequencies | buffers of the module, or their names | no weights: \
kept where all have the same, else averaged with a warning by name |
| shadows of moving averages, observers of quantisation, codebooks | their names | averaged, with a warning by name |
| counters of batches and steps, index tables, masks | integers and booleans | kept from the first |

Averages are made in coordinates of the weight that is used: `gauged` brings weight sets there without changing what they
compute, and `settled` makes derived tensors fit an average. Only orthogonal parametrizations need the module for it.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import _Orthogonal
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from lmc.core.context import warn
from lmc.weights import StateDict, Weights

_SVD = 512  # up to this many rows or columns
_STEPS = 100  # of the power iteration beyond
_SINGULAR = 1e-3

# Tensors that lag behind the weights, or belong to data: averaged, but the average means little.
_LAGGING = (
    (
        "moving averages",
        re.compile(r"(^|\.)(ema|shadow|shadow_params|model_ema|ema_model|module_ema)(\.|_|$)|_ema(\.|$)"),
    ),
    ("observers of quantisation", re.compile(r"(activation_post_process|fake_quant|observer)\.|\.(min_val|max_val)$")),
    ("statistics of a codebook", re.compile(r"\.(embed_avg|cluster_size)$")),
    (
        "bases of orthogonal parametrizations (known from modules; pass models as modules, or model=)",
        re.compile(r"(^|\.)parametrizations\.[^.]+\.\d+\.base$"),
    ),
    (
        "vectors of a spectral normalisation behind another parametrization",
        re.compile(r"(^|\.)parametrizations\.[^.]+\.[1-9]\d*\._[uv]$"),
    ),
)
# Functions of the architecture alone, known by name where no module says what its buffers are.
_CONSTANT = re.compile(
    r"(^|\.)((\w+_)?coords_table|(original_)?inv_freq|(cos|sin)_cached|freqs_cis|pixel_(mean|std)|masked_bias|attn_mask)$"
)
# Names that torch gives to the length of a weight: of "weight", or of the weights of recurrent and attention layers.
_LENGTH = re.compile(r"(^|\.)(\w+_)?weight(_[ih]h_l\d+(_reverse)?)?_g$")
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
        weight, norm = weights[self.weight], self._norm(weights, self._rows(weights))
        usable = bool(norm.isfinite()) and float(norm) != 0.0
        return {self.weight: (weight.double() / norm).to(weight.dtype)} if usable else {}

    def settle(self, weights: Weights, like: Weights) -> Weights:
        """Vectors of the largest singular value, unless those there fit a weight of norm 1."""
        weights = {name: weights[name].detach() for name in (self.weight, self.u, self.v)}
        rounding, axis = 64 * torch.finfo(weights[self.weight].dtype).eps, self._rows(like)
        if abs(float(self._norm(weights, axis)) - 1.0) <= rounding:
            return {}
        matrix = _unfolded(weights[self.weight].double(), axis)
        u, v = _leading(matrix, weights[self.u].double(), weights[self.v].double())
        return {self.u: u.to(weights[self.u].dtype), self.v: v.to(weights[self.v].dtype)}

    def _norm(self, weights: Weights, axis: int) -> Tensor:
        return weights[self.u].double() @ _unfolded(weights[self.weight].double(), axis) @ weights[self.v].double()

    def _rows(self, weights: Weights) -> int:
        """The axis that u runs along: of torch's layers 0, of transposed convolutions 1. Along another u and v mean nothing;
        those of an average mean nothing along any."""
        shape = weights[self.weight].shape
        axes = [axis for axis in range(len(shape)) if shape[axis] == len(weights[self.u])]
        return axes[0] if len(axes) == 1 else max(axes, key=lambda axis: abs(float(self._norm(weights, axis).detach())))


@dataclass(frozen=True)
class Normed:
    """Names of the length g and the direction v of a weight g v / |v|."""

    length: str
    direction: str

    @property
    def derived(self) -> tuple[str, ...]:
        return (self.length,)

    def fits(self, weights: Weights) -> bool:
        """Whether weights are gauged."""
        length, norm = weights[self.length], self._norm(weights[self.length], weights[self.direction].double())
        return torch.allclose(length.double(), norm, rtol=8 * torch.finfo(length.dtype).eps, atol=0.0)

    def gauge(self, weights: Weights) -> Weights:
        """The same function with g = |v|."""
        length, direction = weights[self.length].double(), weights[self.direction].double()
        weight = length * direction / self._norm(length, direction).clamp_min(torch.finfo(torch.float64).tiny)
        dtype = weights[self.direction].dtype
        return {
            self.direction: weight.to(dtype),
            self.length: self._norm(length, weight).to(weights[self.length].dtype),
        }

    def settle(self, weights: Weights, like: Weights) -> Weights:
        if not self.fits(like):
            return {}
        length, direction = weights[self.length], weights[self.direction].double()
        return {self.length: self._norm(length, direction).to(length.dtype)}

    @staticmethod
    def _norm(length: Tensor, direction: Tensor) -> Tensor:
        """The norm over all axes of v along which g has one entry, in the shape of g."""
        if length.ndim == 0:
            return direction.norm()
        axes = [axis for axis in range(direction.ndim) if length.shape[axis] == 1]
        return torch.linalg.vector_norm(direction, dim=axes, keepdim=True) if axes else direction.abs()


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

    def settle(self, weights: Weights, like: Weights) -> Weights:
        weight, mask = weights[self.weight], weights[self.mask]
        return {self.mask: ((mask != 0) | (weight != 0)).to(mask.dtype)}


@dataclass(frozen=True)
class Orthogonal:
    """Names of the coordinates X and the base B of a matrix B exp(X), or with another map of X, of orthonormal rows or columns.

    `module` is what computes it. Weights are gauged where X stands for no turn (its map gives the identity), so that the
    matrix is the first columns of B (of its transpose, where there are more columns than rows).
    """

    coordinates: str
    base: str
    module: nn.Module | None = None

    @property
    def derived(self) -> tuple[str, ...]:
        return (self.base,)

    def gauge(self, weights: Weights) -> Weights:
        """The same matrix with coordinates of no turn."""
        if self.module is None:
            return {}
        coordinates, base = weights[self.coordinates], weights[self.base]
        with torch.no_grad():
            matrix = functional_call(self.module, {"base": base.double()}, (coordinates.double(),))
        tall = matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT
        return {self.coordinates: _no_turn(coordinates), self.base: _completed(tall).to(base.dtype)}

    def settle(self, weights: Weights, like: Weights) -> Weights:
        """The nearest orthogonal base, unless it is one; the matrix may have any completion."""
        base, short = weights[self.base], min(weights[self.coordinates].shape[-2:])
        if not torch.equal(weights[self.coordinates], _no_turn(weights[self.coordinates])):
            return {}
        tall = base[..., :short].double()
        off = tall.mT @ tall - torch.eye(short, dtype=tall.dtype, device=tall.device)
        if float(off.abs().amax()) <= 64 * torch.finfo(base.dtype).eps:
            return {}
        left, values, right = torch.linalg.svd(tall, full_matrices=False)
        if float(values.amin()) < _SINGULAR:
            warn(
                f"{self.base}: the average of orthogonal matrices is nearly singular (smallest singular value "
                f"{float(values.amin()):.1g}); the nearest orthogonal one is little determined by it"
            )
        return {self.base: _completed(left @ right).to(base.dtype)}


Derived: TypeAlias = Spectral | Normed | Pruned | Orthogonal


def derived_in(weights: Mapping[str, Tensor], module: nn.Module | None = None) -> list[Derived]:
    """The parts of a state dict that are written otherwise than they are used, known by names and shapes; orthogonal
    parametrizations by their module, or once they are gauged."""
    if not any(name.endswith(("_orig", "_g")) or "parametrizations." in name for name in weights):
        return []  # the names of all kinds, asked for once: nearly no weights have them
    return [*_plain(weights, module), *_orthogonal(weights, module)]


def derived_names(weights: Mapping[str, Tensor], module: nn.Module | None = None) -> frozenset[str]:
    """The tensors that `settled` computes from others: no weights, they take no part in norms, cosines or masks."""
    return frozenset(name for kind in derived_in(weights, module) for name in kind.derived)


def following(like: Weights) -> frozenset[str]:
    """The tensors that `settled` computes from others in averages of gauged weights, of which `like` is one."""
    kinds = (kind for kind in derived_in(like) if not isinstance(kind, Normed) or kind.fits(like))
    return frozenset(name for kind in kinds for name in kind.derived)


def gauged_as(weights: Weights, like: Weights) -> StateDict:
    """The same function in the form of gauged weights, without a module: what is not gauged there stays as it is."""
    found = StateDict(weights, like=weights)
    for kind in derived_in(weights):
        if not isinstance(kind, Normed) or kind.fits(like):
            found |= kind.gauge(found)
    return found


def written(weights: Mapping[str, Tensor], module: nn.Module) -> frozenset[str]:
    """The tensors that are, once gauged, the weight that is used where no further parametrization follows."""
    return frozenset(kind.direction if isinstance(kind, Normed) else kind.weight for kind in _plain(weights, module))


def _plain(weights: Mapping[str, Tensor], module: nn.Module | None = None) -> "Iterator[Spectral | Normed | Pruned]":
    yield from _spectral(weights)
    yield from (kind for kind in _normed(weights) if module is None or _has_norm(module, kind))
    yield from _pruned(weights)


def gauged(weights: Weights, module: nn.Module | None = None) -> StateDict:
    """The same function in coordinates of which averages make sense; `module` says what orthogonal ones mean."""
    found = StateDict(weights, like=weights)
    for kind in derived_in(weights, module):
        found |= kind.gauge(found)
    return found


def settled(weights: Weights, like: Weights) -> StateDict:
    """An average of gauged weights, of which `like` is one, with derived tensors of its own."""
    found = StateDict(weights, like=weights)
    for kind in derived_in(weights):
        found |= kind.settle(found, like)
    return found


def constants_in(names: Iterable[str]) -> frozenset[str]:
    """The tensors that are functions of the architecture alone, known by their names."""
    return frozenset(name for name in names if _CONSTANT.search(name))


def warn_of_lagging(
    states: Sequence[Mapping[str, Tensor]],
    buffers: Collection[str] = (),
    same: Callable[[str, int], bool] | None = None,
    derived: Collection[str] = (),
) -> None:
    """Warn once for each kind of tensors that are averaged although they belong to no average, if they differ.

    Args:
        states: the weight sets, or outlines of them.
        buffers: the names of those that a module keeps as buffers.
        same: whether a tensor of the first weight set is the same in another, given by its place.
        derived: the names of those that are not averaged like weights (`derived_names`).
    """
    if len(states) < 2:
        return
    same = same or (lambda name, i: torch.equal(states[0][name], states[i][name]))
    derived = frozenset(derived)
    known = {kind: [n for n in states[0] if n not in derived and pattern.search(n)] for kind, pattern in _LAGGING}
    told = {*derived, *(name for names in known.values() for name in names)}
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
            u, v = f"{stem}0._u", f"{stem}0._v"  # behind another parametrization it is not this tensor that is divided
        else:
            continue
        if u in weights and v in weights and weights[u].ndim == 1 and weights[u].numel() in weights[name].shape:
            if weights[u].numel() * weights[v].numel() == weights[name].numel():
                yield Spectral(name, u, v)


def _normed(weights: Mapping[str, Tensor]) -> Iterator[Normed]:
    for name in weights:
        if _LENGTH.search(name):
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


def _has_norm(module: nn.Module, kind: Normed) -> bool:
    """Whether a module normalises a weight that is written like one under a weight normalisation."""
    if "parametrizations." in kind.length:
        return True
    path, _, own = kind.length.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return False
    hooks = [hook for hook in owner._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
    return isinstance(owner, torch.jit.ScriptModule) or any(f"{hook.name}_g" == own for hook in hooks)


def _pruned(weights: Mapping[str, Tensor]) -> Iterator[Pruned]:
    for name in weights:
        mask = f"{name[:-5]}_mask"
        if name.endswith("_orig") and mask in weights and weights[mask].shape == weights[name].shape:
            yield Pruned(name, mask)


def _orthogonal(weights: Mapping[str, Tensor], module: nn.Module | None) -> Iterator[Orthogonal]:
    for name in weights:
        if not (name.endswith(".0.base") and "parametrizations." in name):
            continue
        coordinates = f"{name.removesuffix('.0.base')}.original"
        if coordinates not in weights or weights[name].ndim < 2 or weights[name].is_meta:
            continue
        computes = None if module is None else _parametrization(module, name.removesuffix(".0.base"))
        if computes is not None or torch.equal(weights[coordinates], _no_turn(weights[coordinates])):
            yield Orthogonal(coordinates, name, computes)


def _parametrization(module: nn.Module, path: str) -> nn.Module | None:
    """The first of the parametrizations at a path, if it is an orthogonal one."""
    try:
        found = module.get_submodule(path)
    except AttributeError:
        return None
    return found[0] if isinstance(found, ParametrizationList) and isinstance(found[0], _Orthogonal) else None


def _no_turn(coordinates: Tensor) -> Tensor:
    """Coordinates that all of torch's maps take to the identity."""
    found = torch.zeros_like(coordinates)
    found.diagonal(dim1=-2, dim2=-1).fill_(-1.0)
    return found


def _completed(tall: Tensor) -> Tensor:
    """(..., n, n) orthogonal, whose first k columns are those of an orthonormal (..., n, k)."""
    left, _, right = torch.linalg.svd(tall)
    k = tall.shape[-1]
    return torch.cat([left[..., :k] @ right, left[..., k:]], dim=-1)


def _unfolded(weight: Tensor, axis: int) -> Tensor:
    """(rows along an axis, all else)."""
    return weight.movedim(axis, 0).reshape(weight.shape[axis], -1)


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
