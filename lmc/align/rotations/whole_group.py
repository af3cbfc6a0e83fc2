"""Matching modulo the whole group: scales by the canonical form, signs inside the assignment, rotations and invertible mixings
by Procrustes problems and their like, nested in heads.

Coordinate descent on `|A - g(B)|^2` of canonical forms. Of a pair of hidden units the best sign is the larger of the gains;
of a pair of heads the gain is what remains after the best mixings inside them.
"""

import itertools
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmc.align.rotations.procrustes import nearest_invertible, nearest_rotation
from lmc.align.weight_matching.gains import assign
from lmc.core.context import own_context, warn
from lmc.core.progress import Budget, tqdm
from lmc.core.results import Result
from lmc.errors import InputError, SpecError
from lmc.symmetry.canonical import fixing, known, widened
from lmc.symmetry.continuous.places import Occurrence, occurrences
from lmc.symmetry.element import Element, Factors
from lmc.symmetry.groups.group import Group
from lmc.symmetry.spec import PermutationSpec, UnboundSpec
from lmc.symmetry.tracing.outputs import Inputs
from lmc.weights import ModelOrWeights, StateDict, Weights, agreeing

if TYPE_CHECKING:
    import pandas as pd

STEPS = 30  # towards the best invertible matrix
FEW_STEPS = 3  # of each pair of heads, before it is known which are paired
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class GroupMatching(Result):
    """B moved onto A by an element of the whole symmetry group.

    Attributes:
        a: A in its canonical form; computes what A computes.
        weights: B in its canonical form and moved; computes what B computes. Interpolate between these two.
        element: moves B as it is onto A as it is: permutations, signs, scales and mixings together.
        objective: `-|a - weights|^2 / 2` over the parameters, which was maximised.
        info: objective in the canonical forms before anything moved, sweeps, seconds.
    """

    a: Weights
    weights: Weights
    element: Element
    objective: float
    info: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each group and occurrence, as of the element."""
        return self.element.to_frame()

    def __repr__(self) -> str:
        before = self.info["objective_at_identity"]
        return f"GroupMatching({self.element!r}, objective {self.objective:.6g}, {before:.6g} before)"


@own_context
def group_matching(
    spec: PermutationSpec | UnboundSpec,
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    *,
    inputs: Inputs | None = None,
    max_sweeps: int = 100,
    budget: float | None = None,
    progress: bool = True,
) -> GroupMatching:
    """Match B with A modulo permutations, scales, signs, rotations and invertible mixings.

    Both are brought into their canonical forms, which takes scales away. Then coordinate descent makes `|A - g(B)|^2` small:
    assignments of hidden units with the better sign for each pair, Procrustes problems for units that rotate, Gauss-Newton
    steps for those that any invertible matrix mixes, assignments of these for heads. Each group is first matched only
    against what is matched already, outwards from what is fixed; if that ends above where it began, the descent starts from
    B as it is.

    Args:
        spec: the symmetries of the architecture, with its continuous ones: `lmc.permutation_spec(..., continuous=True)`.
        model: the architecture; not touched.
        a, b: modules or state dicts on one device; neither is changed.
        inputs: with which continuous symmetries are found if the spec has none, as in `lmc.canonical`.
        max_sweeps: bound on the passes over all groups.
        budget: seconds after which no further group is visited (default: any).
        progress: show a bar when it takes longer than two seconds.

    Returns:
        The matching; an interrupt ends the search with a warning and returns the best so far.

    Raises:
        InputError: a spec without continuous symmetries, and no inputs to find them; a budget that is no positive number.
        MismatchError: `a` and `b` differ in keys, shapes or device.
        SpecError: the spec does not fit, or has groups more than one level deep.
        WeightsError: NaN or infinity in the weights.
    """
    if max_sweeps < 1:
        raise InputError(f"max_sweeps={max_sweeps}: must be at least 1")
    started, clock = time.perf_counter(), Budget(budget)
    a, b = agreeing([a, b], "ab", model=model)
    spec = known(spec.bind(a), model, inputs)
    from_a, from_b = fixing(spec, a), fixing(spec, b)
    fixed, moving = from_a.apply(widened(a)), from_b.apply(widened(b))
    runs: list[_Descent] = []
    naive = _Descent(spec, fixed, moving)
    with tqdm(unit=" visits", desc="matching modulo the group", disable=not progress) as bar:
        try:
            for outwards in (True, False):
                runs.append(_Descent(spec, fixed, moving))
                runs[-1].run(max_sweeps, outwards, clock, bar)
                if runs[-1].loss <= naive.loss or clock.over:
                    break
        except KeyboardInterrupt:
            warn("matching modulo the group interrupted: the best so far is returned")
    best = min([naive, *runs], key=lambda run: run.loss)
    return GroupMatching(
        StateDict(((n, t.to(a[n].dtype)) for n, t in fixed.items()), like=a),
        StateDict(((n, t.to(b[n].dtype)) for n, t in best.element.apply(moving).items()), like=b),
        from_a.inverse().compose(best.element).compose(from_b),
        -0.5 * best.loss,
        {
            "method": "group_matching",
            "objective_at_identity": -0.5 * naive.loss,
            "objectives": [-0.5 * loss for loss in best.losses],
            "sweeps": best.sweeps,
            "seconds": time.perf_counter() - started,
        },
    )


@dataclass
class _Solved:
    """The best way to bring the units of one group onto those of another: the rest, in squares, up to a constant."""

    rest: float
    index: Tensor
    factors: dict[str, Tensor]


class _Descent:
    """B on its way, and the element that it has come by."""

    def __init__(self, spec: PermutationSpec, a: Weights, b: Weights) -> None:
        self.spec, self.a, self.b = spec, a, b
        self.element = Element.of(spec.identity())
        self.names = [
            name
            for name in spec.shapes
            if name in a
            and name not in spec.buffers
            and name not in spec.aliases
            and (a[name].is_floating_point() or a[name].is_complex())
        ]
        self.loss = self._loss(b)
        self.losses = [self.loss]
        self.sweeps = 0
        self._inside: dict[str, list[Group]] = {}
        for group in spec.groups.values():
            for parent, _ in group.within:
                if len(group.within) > 1 or spec.groups[parent].within:
                    raise SpecError(f"group {group.name!r} is more than one level deep; mixings are matched on one")
                self._inside.setdefault(parent, []).append(group)
        self._places = {name: list(occurrences(spec, group)) for name, group in spec.groups.items()}
        self._blocks = [name for name, group in spec.groups.items() if not group.within]

    def _loss(self, b: Weights) -> float:
        return sum(float((self.a[name] - b[name]).abs().square().sum()) for name in self.names)

    def run(self, max_sweeps: int, outwards: bool, clock: Budget, bar: Any) -> None:
        """Visit all groups until none gains, or the time is over."""
        if outwards:
            for block, tensors in self._outwards():
                if clock.over:
                    return
                self._visit(block, tensors, grow=True)
                bar.update()
        for _ in range(max_sweeps):
            self.sweeps += 1
            before = self.loss
            for block in self._blocks:
                if clock.over:
                    return
                self._visit(block, self.names)
                bar.update()
            if before - self.loss <= _ROUNDING * before:
                break

    def _outwards(self) -> Iterator[tuple[str, set[str]]]:
        """Groups from what is fixed, each with the tensors on which all other groups are matched already."""
        members = {block: {block, *(group.name for group in self._inside.get(block, ()))} for block in self._blocks}
        on = {name: {group for group, _ in self.spec.tables_by_tensor.get(name, ())} for name in self.names}
        matched: set[str] = set()
        left = list(self._blocks)
        while left:
            ready = {
                block: {n for n in self.names if on[n] & members[block] and on[n] <= matched | members[block]}
                for block in left
            }

            def share(block: str, ready: Mapping[str, set[str]] = ready) -> float:
                whole = sum(self.a[n].numel() for n in self.names if on[n] & members[block])
                return sum(self.a[n].numel() for n in ready[block]) / max(1, whole)

            best = max(left, key=share)
            left.remove(best)
            matched |= members[best]
            yield best, ready[best]

    def _visit(self, block: str, tensors: Collection[str], grow: bool = False) -> None:
        """Solve a group, with all that is inside its units, given all others; kept if it is better, or at the start."""
        step = self._nested(block, tensors) if block in self._inside else self._single(block, tensors)
        b = step.apply(self.b)
        loss = self._loss(b)
        if grow or loss < self.loss - _ROUNDING * self.loss:
            self.b, self.loss, self.element = b, loss, step.compose(self.element)
            if not grow:
                self.losses.append(loss)
            else:
                self.losses = [loss]

    def _single(self, name: str, tensors: Collection[str]) -> Element:
        solved = self._solve(name, name, tensors)
        return Element(self.spec, self.spec.identity().indices | {name: solved.index}, {name: solved.factors})

    def _nested(self, block: str, tensors: Collection[str]) -> Element:
        inside = self._inside[block]
        shared = {place.tensor for group in inside for place in self._places[group.name]}
        alone = [place for place in self._places[block] if place.tensor in tensors and place.tensor not in shared]
        n = self.spec.groups[block].size
        gain = torch.zeros(n, n, dtype=torch.float64)
        for place in alone:
            gain += 2 * self._product(place, place, n)
        for ours in inside:
            for yours in (group for group in inside if group.family == ours.family):
                rest = self._solve(ours.name, yours.name, tensors, steps=FEW_STEPS).rest
                gain[ours.within[0][1], yours.within[0][1]] -= rest
        index, _ = assign(gain)
        indices = self.spec.identity().indices | {block: index}
        factors: Factors = {}
        for group in inside:
            source = self.spec.by_place[group.family, ((block, int(index[group.within[0][1]])),)]
            found = self._solve(group.name, source, tensors)
            indices[group.name], factors[source] = found.index, found.factors
        return Element(self.spec, indices, factors)

    def _product(self, mine: Occurrence, theirs: Occurrence, n: int) -> Tensor:
        """(n, n) inner products of A's units with B's, at one occurrence."""
        units = range(n)
        x, y = mine.units(self.a[mine.tensor], units), theirs.units(self.b[theirs.tensor], units)
        return (x.conj() @ y.T).real.cpu().double()

    def _solve(self, ours: str, yours: str, tensors: Collection[str], steps: int = STEPS) -> _Solved:
        group = self.spec.groups[ours]
        kind, n = self.spec.kind(group.family), group.size
        pairs = [
            (mine, theirs)
            for mine, theirs in zip(self._places[ours], self._places[yours], strict=True)
            if mine.tensor in tensors
        ]
        still = torch.arange(n)
        mix = kind.mixes[0] if kind.mixes else {}
        if any(mine.name in mix for mine, _ in pairs):
            return self._mixed(kind.mixing, mix, pairs, n, steps)
        products = {mine.name: self._product(mine, theirs, n) for mine, theirs in pairs}
        if not products:
            return _Solved(0.0, still, {})
        patterns = [
            _odd(chosen)
            for count in range(len(kind.signs) + 1)
            for chosen in itertools.combinations([frozenset(p) for p in kind.signs], count)
        ]
        gains = torch.stack(
            [sum((-p if o in pattern else p for o, p in products.items()), torch.zeros(n, n)) for pattern in patterns]
        )
        gain, which = gains.max(0)
        index, _ = assign(gain)
        chosen = which[still, index]
        factors: dict[str, Tensor] = {}
        for o in {o for pattern in patterns for o in pattern}:
            signs = torch.ones(n, dtype=torch.float64)
            signs[index] = torch.tensor([-1.0 if o in patterns[k] else 1.0 for k in chosen.tolist()]).double()
            factors[o] = signs
        return _Solved(-2 * float(gain[still, index].sum()), index, factors)

    def _mixed(
        self, mixing: str, mix: Mapping[str, int], pairs: list[tuple[Occurrence, Occurrence]], n: int, steps: int
    ) -> _Solved:
        def side(sign: int) -> tuple[Tensor, Tensor]:
            used = [(mine, theirs) for mine, theirs in pairs if mix.get(mine.name) == sign]
            ours = [mine.units(self.a[mine.tensor], range(n)) for mine, _ in used]
            yours = [theirs.units(self.b[theirs.tensor], range(n)) for _, theirs in used]
            empty = torch.zeros(n, 0, dtype=torch.float64)
            return torch.cat(ours, 1) if ours else empty, torch.cat(yours, 1) if yours else empty

        (a, b), (dual_a, dual_b) = side(1), side(-1)
        if mixing == "general linear" and a.shape[1] and dual_a.shape[1]:
            matrix = nearest_invertible(a, b, dual_a, dual_b, steps)
        else:
            matrix = nearest_rotation(a @ b.T + dual_a @ dual_b.T, ones=mixing == "orthogonal fixing 1")
        dual = torch.linalg.inv(matrix).T
        # What is not mixed, such as free biases, is matched by a permutation, which the matrix then takes back.
        gain = sum((self._product(*pair, n) for pair in pairs if pair[0].name not in mix), torch.zeros(n, n))
        index, _ = assign(gain)
        back = torch.argsort(index)
        rest = float((a - matrix @ b).square().sum() + (dual_a - dual @ dual_b).square().sum())
        rest -= sum(float(x.square().sum()) for x in (a, b, dual_a, dual_b))
        rest -= 2 * float(gain[torch.arange(n), index].sum())
        return _Solved(rest, index, {o: (matrix if e > 0 else dual)[back] for o, e in mix.items()})


def _odd(patterns: tuple[frozenset[str], ...]) -> frozenset[str]:
    """The occurrences in an odd number of patterns."""
    found: frozenset[str] = frozenset()
    for pattern in patterns:
        found = found ^ pattern
    return found
