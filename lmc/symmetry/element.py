"""`Element`, one element of the whole symmetry group: units scaled, flipped or mixed, then permuted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import CertificateError, SpecError
from lmc.symmetry.continuous.places import Move, Occurrence, moved, occurrences, random_matrix
from lmc.symmetry.groups.action import act, sources
from lmc.symmetry.groups.symmetries import Certificate
from lmc.symmetry.proof.certify import evidence_of, relative_error
from lmc.symmetry.proof.probe import Probe
from lmc.symmetry.spec import Permutation, PermutationSpec
from lmc.symmetry.tracing.outputs import Inputs, OutputSelector
from lmc.weights import ModelOrWeights, StateDict, Weights, as_weights
from lmc.weights.state import narrowed

if TYPE_CHECKING:
    import pandas as pd

Factors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Element(Result):
    """An element of the whole symmetry group of a network: at each occurrence units are scaled or mixed, then permuted.

    A permutation is the special case without factors. Acts by `apply`; `inverse` and `compose` are those of the group.

    Attributes:
        spec: the symmetries of the architecture, with its `continuous` ones.
        indices: group -> (n,) as in `Permutation`: B's unit for each unit of A.
        factors: group -> occurrence (as named in `Kind`) -> what is done there before units move: (n,) factors of the
            units, or (n, n) the matrix that mixes them, new unit i = `sum_j M[i, j]` old unit j; in float64 on the CPU.
            Where nothing is named nothing is done.
        info: how it was found.
    """

    spec: PermutationSpec
    indices: dict[str, Tensor]
    factors: Factors = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", Permutation(self.spec, self.indices).indices)
        checked: Factors = {}
        for group, found in self.factors.items():
            if group not in self.spec.groups:
                raise SpecError(f"factors of {group!r}, which is not a group of the spec")
            places, n = _places(self.spec, group), self.spec.groups[group].size
            for name, factor in found.items():
                if name not in places:
                    raise SpecError(f"group {group!r} has no occurrence {name!r}; it has {', '.join(places)}")
                value = torch.as_tensor(factor).detach().to("cpu", torch.float64)
                if value.shape not in ((n,), (n, n)):
                    raise SpecError(
                        f"group {group!r}, {name}: factors {tuple(value.shape)}, expected {(n,)} or {(n, n)}"
                    )
                checked.setdefault(group, {})[name] = value
        object.__setattr__(self, "factors", checked)

    @classmethod
    def of(cls, permutation: Permutation) -> "Element":
        """A permutation as an element of the whole group."""
        return cls(permutation.spec, permutation.indices)

    @classmethod
    def random(cls, spec: PermutationSpec, seed: int = 0, *, spread: float = 0.5) -> "Element":
        """A random element: a uniformly random permutation, scales and mixings near one, and random signs.

        Args:
            spread: standard deviation of the logarithm of the scales.
        """
        generator = torch.Generator().manual_seed(seed)
        factors: Factors = {}
        parents = {parent for group in spec.groups.values() for parent, _ in group.within}
        for name, group in spec.groups.items():
            kind, own = spec.kind(group.family), factors.setdefault(name, {})
            for scale in kind.scales:
                logs = spread * torch.randn(group.size, generator=generator, dtype=torch.float64)
                _multiply(own, {o: torch.exp(e * logs) for o, e in scale.items()})
            for pattern in kind.signs:
                flips = 1.0 - 2.0 * torch.randint(2, (group.size,), generator=generator, dtype=torch.float64)
                _multiply(own, dict.fromkeys(pattern, flips))
            for mix in kind.mixes if name not in parents else ():
                noise = torch.randn(group.size, group.size, generator=generator, dtype=torch.float64)
                matrix = random_matrix(kind.mixing, noise)
                inverse = torch.linalg.inv(matrix).T
                _multiply(own, {o: matrix if e > 0 else inverse for o, e in mix.items()})
        return cls(spec, spec.random(seed).indices, {name: own for name, own in factors.items() if own})

    @property
    def permutation(self) -> Permutation:
        """The permutation that comes after the factors."""
        return Permutation(self.spec, self.indices)

    @own_context
    def apply(self, model: ModelOrWeights) -> StateDict:
        """The weights of the same function after the element has acted, in the dtypes that they had.

        Raises:
            SpecError: the spec does not fit the weights.
            WeightsError: a value leaves the range of its dtype; the tensor is named.
        """
        weights = as_weights(model)
        self.spec.check(weights)
        return StateDict(self._acted(weights), like=weights)

    def _acted(self, weights: Weights) -> Weights:
        wide = {name: weights[name].to(wide_dtype(weights[name].dtype)) for name in self._touched}
        wide |= {alias: wide[first] for alias, first in self.spec.aliases.items() if first in wide and alias in weights}
        mixed = moved(self.spec, wide, [move for name in self.factors for move in self._moves(name)])
        back = {n: narrowed(mixed[n], t.dtype, n) if n in mixed else t for n, t in weights.items()}
        return act(self.spec, self.indices, back)

    @property
    def _touched(self) -> set[str]:
        return {
            place.tensor
            for group, own in self.factors.items()
            for name, place in _places(self.spec, group).items()
            if name in own
        }

    def _moves(self, group: str, leave: str = "") -> list[Move]:
        places = _places(self.spec, group)
        return [Move(places[name], factor) for name, factor in self.factors[group].items() if name != leave]

    def inverse(self) -> "Element":
        """The element that undoes this one, up to rounding."""
        undone = {g: {o: _inverted(factor) for o, factor in own.items()} for g, own in self.factors.items()}
        back = self.permutation.inverse()
        return Element(self.spec, back.indices, _before(self.spec, back.indices, undone))

    def compose(self, first: "Element | Permutation") -> "Element":
        """`self` after `first`: `e.compose(f).apply(w)` equals `e.apply(f.apply(w))` up to rounding."""
        factors: Factors = {}
        if isinstance(first, Element):
            factors = {group: dict(own) for group, own in first.factors.items()}
        for group, own in _before(self.spec, first.indices, self.factors).items():
            _multiply(factors.setdefault(group, {}), own)
        order = Permutation(self.spec, first.indices)
        return Element(self.spec, self.permutation.compose(order).indices, factors)

    def is_identity(self, tolerance: float = 1e-12) -> bool:
        """Whether no unit moves, and no factor differs from one by more than the tolerance."""
        return self.permutation.is_identity() and all(
            float((factor - (torch.ones(len(factor)) if factor.ndim == 1 else torch.eye(len(factor)))).abs().max())
            <= tolerance
            for own in self.factors.values()
            for factor in own.values()
        )

    @own_context
    def certify(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        weights: ModelOrWeights | None = None,
        outputs: OutputSelector = None,
        tolerance: float = 1e-9,
    ) -> Certificate:
        """Prove on an example, in float64, that the weights after the element compute the same function.

        Args:
            model: gives the architecture, and the weights unless `weights` are given.
            inputs: as in `PermutationSpec.certify`.
            outputs: the outputs that must stay the same, as in `lmc.permutation_spec`.
            tolerance: allowed difference of outputs, relative to their largest value; in a module that computes in float32
                alone at least 1e-5, and the certificate says so.

        Returns:
            The certificate; its power is the change of the outputs where a group acts but at one occurrence.

        Raises:
            CertificateError: the outputs differ by more than `tolerance`, or the module cannot be computed.
            SpecError: the spec does not fit the weights.
        """
        proof = self.permutation.certify(model, inputs, weights=weights, outputs=outputs, tolerance=tolerance)
        if not self.factors:
            return proof
        own = {n: t.to(wide_dtype(t.dtype)) for n, t in as_weights(model if weights is None else weights).items()}
        probe, tolerance = Probe(model, outputs, or_single=True), proof.tolerance
        reference = probe.outputs_of(inputs, own)
        error = relative_error(reference, probe.outputs_of(inputs, self._acted(own)))
        powers = {name: power for evidence in proof.families.values() for name, power in evidence.powers.items()}
        for name, own_factors in self.factors.items():
            if own_factors:
                broken = moved(self.spec, own, self._moves(name, next(iter(own_factors))))
                change = relative_error(reference, probe.outputs_of(inputs, broken))
                powers[name] = max(powers.get(name, 0.0), change)
        families = evidence_of(self.spec, max(error, proof.max_error), powers)
        if not error <= tolerance:
            raise CertificateError(
                f"the weights after the element compute another function: outputs differ by {error:.1e} of their size "
                f"(tolerance {tolerance:.0e})"
            )
        return Certificate(
            max(error, proof.max_error), tolerance, 1, proof.groups, proof.moved, proof.inputs, proof.dtype, families,
            proof.outputs,
        )  # fmt: skip

    def to_frame(self) -> "pd.DataFrame":
        """A row for each group and occurrence: units that move, what is done ("scaled", "mixed"), smallest and largest
        singular value of the factors."""
        rows = []
        for name, index in self.indices.items():
            moving = int((index != torch.arange(len(index))).sum())
            for occurrence, factor in self.factors.get(name, {}).items() or [("", torch.ones(1, dtype=torch.float64))]:
                values = factor.abs() if factor.ndim == 1 else torch.linalg.svdvals(factor)
                done = "" if not occurrence else "scaled" if factor.ndim == 1 else "mixed"
                rows.append((name, occurrence, moving, done, float(values.min()), float(values.max())))
        return require("pandas").DataFrame(rows, columns=["group", "occurrence", "moving", "done", "least", "largest"])

    def __repr__(self) -> str:
        moving = sum(int((index != torch.arange(len(index))).sum()) for index in self.indices.values())
        total = sum(len(index) for index in self.indices.values())
        mixing = sum(any(factor.ndim == 2 for factor in own.values()) for own in self.factors.values())
        return (
            f"Element({len(self.indices)} groups, {moving} of {total} units move, {len(self.factors) - mixing} groups scaled, "
            f"{mixing} mixed)"
        )


def _places(spec: PermutationSpec, group: str) -> Mapping[str, Occurrence]:
    return {place.name: place for place in occurrences(spec, spec.groups[group])}


def _before(spec: PermutationSpec, indices: Mapping[str, Tensor], factors: Factors) -> Factors:
    """Factors to apply before a permutation, so that it is as if `factors` were done after it."""
    source = sources(spec, indices)
    result: Factors = {}
    for group, own in factors.items():
        back = torch.argsort(indices[group])
        for name, factor in own.items():
            placed = factor[back] if factor.ndim == 1 else factor[back][:, back]
            result.setdefault(source[group], {})[name] = placed
    return result


def _multiply(own: dict[str, Tensor], by: Mapping[str, Tensor]) -> None:
    """Do `by` after what is there."""
    for name, factor in by.items():
        before = own.get(name)
        if before is None:
            own[name] = factor
        elif factor.ndim == 1:
            own[name] = factor * before if before.ndim == 1 else factor[:, None] * before
        else:
            own[name] = factor * before if before.ndim == 1 else factor @ before


def _inverted(factor: Tensor) -> Tensor:
    return 1.0 / factor if factor.ndim == 1 else torch.linalg.inv(factor)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of a dtype are scaled and mixed."""
    return torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype
