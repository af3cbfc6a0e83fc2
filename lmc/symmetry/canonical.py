"""`canonical`: of all weights that differ by scales and signs of units one that is always the same.

Gains of normalisations and other single factors of a unit become 1, directions whose length does not matter get length 1,
and what is left of the scales makes the sum of squares of all parameters as small as it can be, so that of each unit the
squares that come in weigh as much as those that go out. That sum is convex in the logarithms of the scales: the minimum is
one, whatever the start. After Pittorino et al. 2022 (arXiv:2202.03038), who normalise what comes in to 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lmc.core.context import own_context, warn
from lmc.errors import InputError, LmcError, SpecError
from lmc.symmetry.continuous.find import continuous_symmetries
from lmc.symmetry.continuous.places import Move, Occurrence, moved, occurrences
from lmc.symmetry.element import Element, Factors, wide_dtype
from lmc.symmetry.groups.kinds import Kind
from lmc.symmetry.proof.certify import relative_error
from lmc.symmetry.proof.probe import Probe
from lmc.symmetry.spec import PermutationSpec, UnboundSpec
from lmc.symmetry.tracing.outputs import Inputs
from lmc.weights import ModelOrWeights, StateDict, Weights, agreeing

SWEEPS = 1000
CONVERGED = 1e-14  # of the logarithms of scales, in a sweep
NEWTON = 50
CHANGED = 1e-9
DEAD = 1e-30  # sums of squares of units that are off

Row = dict[str, float]


@own_context
def canonical(
    spec: PermutationSpec | UnboundSpec, model: nn.Module, weights: ModelOrWeights, *, inputs: Inputs | None = None
) -> StateDict:
    """The weights of the same function whose scales and signs are fixed, so that distances and averages mean something.

    Gains are folded (``|gain| = 1``), and the norms of what comes into a unit and of what goes out are balanced. Weights that
    differ by scales and signs of units have the same canonical form, up to rounding; the order of units, rotations and
    invertible mixings are left as they are. Of a pattern of signs, the entry that is largest in size becomes positive.

    Args:
        spec: the symmetries of the architecture, with its continuous ones: `lmc.permutation_spec(..., continuous=True)`.
        model: the architecture; not touched.
        weights: a module or state dict; not changed. The result has its dtypes.
        inputs: examples on which it is checked that the function stays the same, and with which continuous symmetries are
            found if the spec has none (default: normal random numbers of the shapes that the spec was certified on).

    Raises:
        InputError: a spec without continuous symmetries, and no inputs to find them.
        SpecError: the spec does not fit the weights, or the function would change.
        WeightsError: weights that are not finite, or a value that leaves the range of its dtype.

    Example:
        >>> import lmc, torch
        >>> model, x = lmc.models.mlp(64, [32], 10), torch.randn(2, 64)
        >>> spec = lmc.permutation_spec(model, x, continuous=True)
        >>> a = model.state_dict()
        >>> b = {**a, "fc1.weight": 2 * a["fc1.weight"], "fc1.bias": 2 * a["fc1.bias"], "head.weight": a["head.weight"] / 2}
        >>> lmc.weights.distance(lmc.canonical(spec, model, a), lmc.canonical(spec, model, b)) < 1e-5
        True
    """
    weights = agreeing([weights], ["weights"], model=model)[0]
    spec = known(spec.bind(weights), model, inputs)
    assert spec.continuous is not None
    if not any(kind.scales or kind.signs for kind in spec.continuous.kinds.values()):
        warn(f"{type(model).__name__}: no unit has a scale or a sign of its own; the weights are as they were")
    element = fixing(spec, weights)
    fixed = element.apply(weights)
    if inputs is not None:
        probe = Probe(model, None)
        wide = widened(weights)
        error = relative_error(probe.outputs_of(inputs, wide), probe.outputs_of(inputs, element.apply(wide)))
        if not error <= CHANGED:
            raise SpecError(
                f"fixing the scales changes the outputs by {error:.1e} of their size: the spec's continuous symmetries are "
                "not those of this module"
            )
    return fixed


def fixing(spec: PermutationSpec, weights: Weights) -> Element:
    """The element that brings weights into their canonical form."""
    wide = widened(weights)
    gauges = [_Gauge(spec, name) for name in spec.groups]
    factors: Factors = {name: {} for name in spec.groups}

    def change(gauge: _Gauge, by: Mapping[str, Tensor]) -> None:
        nonlocal wide
        wide = moved(spec, wide, [Move(gauge.places[name], factor) for name, factor in by.items()])
        for name, factor in by.items():
            factors[gauge.name][name] = factors[gauge.name].get(name, 1.0) * factor

    for _ in range(SWEEPS):
        largest = 0.0
        for gauge in gauges:
            for row, logs in gauge.steps(wide):
                if bool(logs.any()):
                    change(gauge, {name: torch.exp(e * logs) for name, e in row.items()})
                    largest = max(largest, float(logs.abs().max()))
        if largest <= CONVERGED:
            break
    for gauge in gauges:
        for pattern in gauge.patterns:
            change(gauge, gauge.flips(wide, pattern))
    return Element(spec, spec.identity().indices, {name: own for name, own in factors.items() if own})


def widened(weights: Weights) -> Weights:
    """Weights in double precision."""
    return {name: tensor.to(wide_dtype(tensor.dtype)) for name, tensor in weights.items()}


def known(spec: PermutationSpec, model: nn.Module, inputs: Inputs | None) -> PermutationSpec:
    """The spec with its continuous symmetries.

    Raises:
        InputError: there are none, and no inputs to find them with.
    """
    if spec.continuous is not None:
        return spec
    missing = InputError(
        "the spec says nothing of scales and signs: make it by lmc.permutation_spec(model, inputs, continuous=True), or pass inputs="
    )
    if inputs is not None:
        return replace(spec, continuous=continuous_symmetries(spec, model, inputs, progress=False))
    if spec.certificate is None:
        raise missing
    generator = torch.Generator().manual_seed(0)
    example = tuple(torch.randn(shape, generator=generator) for shape in spec.certificate.inputs[0])
    try:
        return replace(spec, continuous=continuous_symmetries(spec, model, example, progress=False))
    except LmcError:
        raise missing from None


class _Gauge:
    """The way in which the scales and signs of one group are fixed.

    Attributes:
        lengths: pairs of an occurrence and a scale, by which the length of its units becomes 1.
        balanced: scales by which sums of squares become least; they leave those lengths alone.
        patterns: pairs of an occurrence, the sign of whose largest entry becomes positive, and all that flip with it.
    """

    def __init__(self, spec: PermutationSpec, name: str) -> None:
        self.name, self.buffers = name, spec.buffers
        group = spec.groups[name]
        kind = spec.kind(group.family)
        self.places: dict[str, Occurrence] = {place.name: place for place in occurrences(spec, group)}
        self.units = list(range(group.size))
        inside = [g for g in spec.groups.values() if any(parent == name for parent, _ in g.within)]
        rows = [dict(scale) for scale in kind.scales if not self._implied(scale, spec, inside)]
        self.lengths: list[tuple[str, Row]] = []
        self.balanced: list[Row] = []
        while rows:
            row = rows.pop(0)
            pivot = self._length(spec, row)
            if pivot is None:
                self.balanced.append(row)
                continue
            self.lengths = [(other, _without(scale, row, pivot)) for other, scale in self.lengths]
            rows = [_without(scale, row, pivot) for scale in (*self.balanced, *rows)]
            self.balanced = []
            self.lengths.append((pivot, row))
        self.patterns = self._patterns(spec, kind)

    def _implied(self, scale: Mapping[str, float], spec: PermutationSpec, inside: Sequence[Any]) -> bool:
        """Whether the scale of a whole unit is that of all units inside it."""
        tensors = {self.places[name].tensor for name in scale}
        return any(tensors <= {_tensor(o) for o in row} for g in inside for row in spec.kind(g.family).scales)

    def _length(self, spec: PermutationSpec, row: Row) -> str | None:
        """The occurrence whose length a scale fixes: a gain, if on one side there are single numbers only, or what scales
        without anything else; None where two sides are to be balanced."""
        for sign in (1, -1):
            side = [name for name, e in row.items() if e * sign > 0]
            other = [name for name, e in row.items() if e * sign < 0]
            numbers = all(_entries(spec, self.places[name]) == 1 for name in side)
            own = [name for name in side if self.places[name].tensor not in spec.buffers]
            if own and (numbers or not other):
                return min(own, key=lambda name: ("bias" in name, own.index(name)))
        return None

    def _patterns(self, spec: PermutationSpec, kind: Kind) -> list[tuple[str, frozenset[str]]]:
        rows = [frozenset(pattern) for pattern in kind.signs]
        found: list[tuple[str, frozenset[str]]] = []
        while rows:
            row = rows.pop(0)
            own = [name for name in self.places if name in row and self.places[name].tensor not in spec.buffers]
            if not own:
                continue
            entries = {name: _entries(spec, self.places[name]) for name in own}
            groups = {name: len(spec.tables_by_tensor[self.places[name].tensor]) for name in own}
            pivot = min(own, key=lambda name: ("bias" in name, entries[name] > 1, groups[name], own.index(name)))
            found = [(other, pattern ^ row if pivot in pattern else pattern) for other, pattern in found]
            rows = [pattern for r in rows if (pattern := r ^ row if pivot in r else r)]
            found.append((pivot, row))
        return found

    def squares(self, weights: Weights, name: str) -> Tensor:
        """(n,): the sum of squares of each unit at one occurrence."""
        place = self.places[name]
        return place.units(weights[place.tensor], self.units).abs().square().sum(1)

    def steps(self, weights: Weights) -> Iterator[tuple[Row, Tensor]]:
        """Scales, and the logarithms (n,) by which each has to change."""
        for pivot, row in self.lengths:
            squares = self.squares(weights, pivot)
            yield row, torch.where(squares > DEAD, -0.5 * squares.clamp_min(DEAD).log() / row[pivot], 0.0)
        if self.balanced:
            names = [n for n in self.places if any(n in row for row in self.balanced)]
            names = [n for n in names if self.places[n].tensor not in self.buffers]
            exponents = torch.tensor([[row.get(n, 0.0) for n in names] for row in self.balanced], dtype=torch.float64)
            squares = torch.stack([self.squares(weights, n) for n in names])
            yield from zip(self.balanced, _least(exponents, squares), strict=True)

    def flips(self, weights: Weights, pattern: tuple[str, frozenset[str]]) -> dict[str, Tensor]:
        """For each occurrence of a pattern the sign (n,) of each unit's largest entry at the first."""
        pivot, names = pattern
        units = self.places[pivot].units(weights[self.places[pivot].tensor], self.units)
        units = units.real if units.is_complex() else units
        largest = units.gather(1, units.abs().argmax(1, keepdim=True))[:, 0]
        return dict.fromkeys(names, torch.where(largest < 0, -1.0, 1.0).double())


def _least(exponents: Tensor, squares: Tensor) -> Tensor:
    """(rows, n): logarithms x of the scales that make `sum_o squares_o exp(2 sum_r e_ro x_r)` least, unit by unit, by Newton's
    method; 0 for units of which the sum has no least value, since all that a scale makes larger, or smaller, is zero."""
    total, exponents = squares.sum(0), exponents.to(squares.device)
    sides = [(exponents[:, :, None] * sign).clamp_min(0).mul(squares).sum(1) for sign in (1.0, -1.0)]
    alive = (torch.minimum(*sides) > DEAD).all(0)
    x = torch.zeros(len(exponents), squares.shape[1], dtype=torch.float64, device=squares.device)
    for _ in range(NEWTON):
        terms = squares * torch.exp(2 * exponents.T @ x) / total.clamp_min(DEAD)
        slope = exponents @ terms
        curvature = 2 * torch.einsum("ro,so,on->nrs", exponents, exponents, terms)
        step = torch.linalg.lstsq(curvature, slope.T[:, :, None]).solution[:, :, 0].T
        step = torch.where(alive, step, 0.0).clamp(-1.0, 1.0)
        x = x - step
        if float(step.abs().max()) < 1e-15:
            break
    return x


def _without(row: Row, pivot_row: Row, pivot: str) -> Row:
    """A scale plus as much of another one that it leaves an occurrence alone."""
    share = row.get(pivot, 0.0) / pivot_row[pivot]
    mixed = {
        n: row.get(n, 0.0) - share * pivot_row.get(n, 0.0) for n in (*row, *(n for n in pivot_row if n not in row))
    }
    return {n: e for n, e in mixed.items() if abs(e) > 1e-12}


def _entries(spec: PermutationSpec, place: Occurrence) -> int:
    """The number of entries of each unit."""
    shape = spec.shapes[place.tensor]
    rest = [size for d, size in enumerate(shape) if d not in place.dims]
    return place.rows.shape[1] * int(torch.tensor(rest).prod()) if rest else place.rows.shape[1]


def _tensor(occurrence: str) -> str:
    """The tensor of an occurrence, by its name."""
    return occurrence.partition(" axis ")[0].partition("[")[0]
