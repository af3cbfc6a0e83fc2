"""Elements of the whole symmetry group of a network as differentiable functions of free parameters.

Each group of units is first mixed by a matrix, then scaled. The matrix is a permutation, the assignment of latent scores
through which gradients pass straight to the scores (Theus et al. 2025, arXiv:2506.22712, section 4); a rotation
`exp(K - K^T)`; or an invertible `exp(K)`, whose inverse transposed acts where the units are read. Scales are `exp(e k)` with
the exponents e of each place. All are exact symmetries, and the identity at first.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmc.align.relaxed.soft import mix
from lmc.align.rotations.matching import skew
from lmc.align.weight_matching.gains import assign
from lmc.symmetry.continuous import ContinuousSymmetries
from lmc.symmetry.continuous.places import Occurrence, occurrences
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights

SMALL = 1e-9  # exponents below are none
NOISE = 0.01  # of latent scores, beside the 1 of a unit that stays


@dataclass(frozen=True)
class Freedom:
    """The freedom to learn of the units of one group.

    Attributes:
        kind: "permutation", "orthogonal", "orthogonal fixing 1", "general linear", or "none".
        inverse: occurrences at which a general linear matrix acts by its inverse transposed.
        scales: for each independent scale its exponents by occurrence.
    """

    kind: str = "none"
    inverse: frozenset[str] = frozenset()
    scales: tuple[Mapping[str, float], ...] = ()


def freedoms(
    spec: PermutationSpec, rotated: Mapping[str, bool], symmetries: ContinuousSymmetries, *, permute: bool
) -> dict[str, Freedom]:
    """The freedom to learn of each group of a network whose streams can be rotated as `rotated` says.

    Units that hold others, and units within them that cannot be rotated, keep the order that they have; without `permute`
    all do.
    """
    found = {}
    holders = {parent for group in spec.groups.values() for parent, _ in group.within}
    for name, group in spec.groups.items():
        symmetry = symmetries.kinds.get(group.family)
        scales = () if symmetry is None else _scales(symmetry.scales, spec.buffers)
        kind, inverse = "none", frozenset()
        if name in rotated:
            kind = "orthogonal fixing 1" if rotated[name] else "orthogonal"
            if symmetry is not None and symmetry.mixing == "general linear" and len(symmetry.mixes) == len(scales) == 1:
                kind, inverse = "general linear", frozenset(o for o, e in symmetry.mixes[0].items() if e < 0)
                scales = ()  # they are among the matrices
        elif permute and not group.within and name not in holders:
            kind = "permutation"
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

    Args:
        spec: the symmetries of the architecture.
        free: group -> what may be learned.
        weights: B, as it starts.
        generator: of the noise by which latent scores differ from an order without doubt.

    Attributes:
        parameters: name -> free parameter, by kind: `parameters["permutation"][group]`.
    """

    def __init__(
        self, spec: PermutationSpec, free: Mapping[str, Freedom], weights: Weights, generator: torch.Generator
    ) -> None:
        self.spec, self.free, self.weights = spec, free, weights
        device = next(iter(weights.values())).device
        self.parameters: dict[str, dict[str, Tensor]] = {"permutation": {}, "rotation": {}, "scale": {}}
        self._steps: dict[str, list[_Step]] = {}
        for name, freedom in free.items():
            n = spec.groups[name].size
            if freedom.kind == "permutation":
                noise = NOISE * torch.randn(n, n, generator=generator, dtype=torch.float32)
                self.parameters["permutation"][name] = (torch.eye(n) + noise).to(device).requires_grad_()
            elif freedom.kind != "none":
                self.parameters["rotation"][name] = torch.zeros(n, n, device=device).requires_grad_()
            for k in range(len(freedom.scales)):
                self.parameters["scale"][f"{name} {k}"] = torch.zeros(n, device=device).requires_grad_()
            for place in occurrences(spec, spec.groups[name]):
                if place.tensor in weights and weights[place.tensor].is_floating_point():
                    step = _Step(name, place, tuple(weights[place.tensor].shape), device)
                    self._steps.setdefault(place.tensor, []).append(step)

    def __call__(self) -> Weights:
        """The tensors of B moved, followed by autograd; in float32 at least."""
        return self._moved(torch.promote_types(torch.float32, self._dtype), straight_through=True)

    @torch.no_grad()
    def exact(self) -> Weights:
        """All tensors of B moved, worked out in float64, in the dtypes of B."""
        moved = self._moved(torch.float64, straight_through=False)
        found = {name: moved[name].to(x.dtype) if name in moved else x for name, x in self.weights.items()}
        return found | {second: found[first] for second, first in self.spec.aliases.items()}

    @torch.no_grad()
    def permutations(self) -> dict[str, Tensor]:
        """The index vectors of the groups that are permuted."""
        return {name: assign(scores)[0] for name, scores in self.parameters["permutation"].items()}

    @property
    def _dtype(self) -> torch.dtype:
        return next(x.dtype for x in self.weights.values() if x.is_floating_point())

    def _moved(self, dtype: torch.dtype, *, straight_through: bool) -> Weights:
        matrices: dict[str, tuple[Tensor, Tensor]] = {}
        for name, scores in self.parameters["permutation"].items():
            index = assign(scores.detach())[0].to(scores.device)
            matrix = torch.eye(len(scores), dtype=dtype, device=scores.device)[index]
            matrix = matrix + (scores - scores.detach()) if straight_through else matrix
            matrices[name] = matrix, matrix
        for name, generator in self.parameters["rotation"].items():
            matrices[name] = self._matrix(self.free[name].kind, generator.to(dtype))
        moved = {}
        for name, steps in self._steps.items():
            tensor = self.weights[name].to(dtype)
            for step in steps:
                if step.group in matrices:
                    inverse = step.place.name in self.free[step.group].inverse
                    tensor = mix(tensor, step.place.dims, step.where, matrices[step.group][inverse])
                for k, exponents in enumerate(self.free[step.group].scales):
                    if exponent := exponents.get(step.place.name, 0.0):
                        scale = self.parameters["scale"][f"{step.group} {k}"].to(dtype)
                        tensor = step.scaled(tensor, torch.exp(exponent * scale))
            moved[name] = tensor
        return moved

    def _matrix(self, kind: str, generator: Tensor) -> tuple[Tensor, Tensor]:
        """A matrix and its inverse transposed."""
        if kind == "general linear":
            both = torch.matrix_exp(torch.stack([generator, -generator.T]))
            return both[0], both[1]
        rotation = torch.matrix_exp(skew(generator, kind == "orthogonal fixing 1"))
        return rotation, rotation


class _Step:
    """One place at which a group moves in a tensor."""

    def __init__(self, group: str, place: Occurrence, shape: tuple[int, ...], device: torch.device) -> None:
        self.group, self.place = group, place
        rows = place.rows.ravel()
        self.length = math.prod(shape[d] for d in place.dims)
        every = rows.size == self.length and bool((rows[1:] > rows[:-1]).all())
        self.where = None if every else torch.from_numpy(rows).to(device)

    def scaled(self, tensor: Tensor, scale: Tensor) -> Tensor:
        """The tensor with unit i multiplied by `scale[i]` at this place."""
        factor = scale.repeat_interleave(self.place.rows.shape[1])
        if self.where is not None:
            ones = torch.ones(self.length, dtype=scale.dtype, device=scale.device)
            factor = ones.index_copy(0, self.where, factor)
        along = [tensor.shape[d] for d in self.place.dims]
        first = tuple(range(len(along)))
        front = tensor.movedim(self.place.dims, first)
        return (front * factor.view(*along, *[1] * (tensor.ndim - len(along)))).movedim(first, self.place.dims)


def names_of(free: Mapping[str, Freedom]) -> str:
    """The things that are learned, in words."""
    kinds: dict[str, None] = {}
    for freedom in free.values():
        kinds |= dict.fromkeys([freedom.kind] if freedom.kind != "none" else [])
        kinds |= dict.fromkeys(["scales"] if freedom.scales else [])
    words = {"permutation": "permutations", "orthogonal": "rotations", "orthogonal fixing 1": "rotations"}
    words["general linear"] = "invertible mixings"
    return " and ".join(dict.fromkeys(words.get(kind, kind) for kind in kinds))
