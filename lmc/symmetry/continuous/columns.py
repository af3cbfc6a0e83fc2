"""Changes of the outputs, to first order, when few units are mixed at one occurrence; measured at random weights.

For the generator E_ij at an occurrence that is the inner product of the gradient by its unit i with its unit j. So one
gradient of a random sum of the outputs is a row of the table of all generators at all occurrences of all families.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lmc.core.progress import Budget, tqdm
from lmc.errors import InputError, LmcError
from lmc.symmetry.continuous.places import Move, Occurrence, moved, occurrences
from lmc.symmetry.groups.action import act, random_indices
from lmc.symmetry.groups.symmetries import Symmetries
from lmc.symmetry.proof.certify import relative_error
from lmc.symmetry.proof.probe import Probe, draw, flat
from lmc.symmetry.tracing.outputs import Inputs, OutputSelector
from lmc.weights import Weights
from lmc.weights.state import inexact

UNITS = 10  # of a group that are looked at in each draw
FEWEST = 4  # sums of the outputs in each draw
SMALL = 1_000_000  # entries of a module for which more draws cost nothing
DRAWS_OF_SMALL = 6
ELSEWHERE = 1  # further draws at which finite elements are tried
ELSEWHERE_OF_SMALL = 11
APART = 1000  # between the numbers of these draws and of those that are measured at
MOST = 2**26  # entries of gradients that are held at once
STEP = 1e-6  # of central differences: small, as none may step over the kink of a ReLU
SHORT = 1e-8  # a step over which few kinks lie, where the first did not confirm a gradient
AGREE = 1e-4  # of gradients with differences


@dataclass(eq=False)
class Table:
    """The measurements of one family.

    Attributes:
        names: the occurrences.
        entries: for each draw (R, occurrences, k, k): rows of sums, and generators E_ij.
        reach: for each draw (occurrences,): the size of the gradient times that of the units.
    """

    names: tuple[str, ...]
    entries: list[Tensor] = field(default_factory=list)
    reach: list[Tensor] = field(default_factory=list)

    @property
    def measured(self) -> Tensor:
        return torch.cat(self.entries)

    @property
    def sizes(self) -> Tensor:
        """(occurrences,): how much the outputs may depend on each occurrence."""
        return torch.stack(self.reach).square().sum(0).sqrt()


class Lab:
    """Draws of weights, and what the outputs do there.

    Attributes:
        noise: relative change of the outputs by rounding: under permutations, and where gradients are not to be had, between
            weights close together.
    """

    def __init__(
        self,
        spec: Symmetries,
        model: nn.Module,
        inputs: Inputs,
        outputs: OutputSelector,
        draws: int,
        seed: int,
        clock: Budget,
        progress: bool,
    ) -> None:
        self.spec, self.model, self.inputs, self.seed, self.clock = spec, model, inputs, seed, clock
        self.probe = Probe(model, outputs, or_single=True)
        self.generator = torch.Generator().manual_seed(seed)
        self._by_differences: frozenset[str] = frozenset()
        self._places: dict[str, list[Occurrence]] = {}
        self.weights = self._drawn(0)
        self.reference = self._outputs(self.weights)
        self.noise = relative_error(self.reference, self._outputs(act(spec, random_indices(spec, seed), self.weights)))
        if self.probe.single:  # permutations alone may round nothing
            self.noise = max(self.noise, self._rounding(self.weights))
        self.tables = {
            family: Table(tuple(place.name for place in self.places(names[0])))
            for family, names in spec.families.items()
        }
        self._measure(draws, progress)

    @property
    def _small(self) -> bool:
        return sum(tensor.numel() for tensor in self.weights.values()) < SMALL

    def places(self, group: str) -> list[Occurrence]:
        if group not in self._places:
            found = occurrences(self.spec, self.spec.groups[group])
            self._places[group] = [place for place in found if inexact(self.weights[place.tensor])]
        return self._places[group]

    @property
    def exact(self) -> bool:
        """Whether all derivatives are gradients, and none had to be measured by differences."""
        return not self._by_differences

    def error(self, moves: Sequence[Move]) -> float:
        """The change of the outputs under a finite element, relative to their largest value."""
        return relative_error(self.reference, self._outputs(moved(self.spec, self.weights, moves)))

    def error_elsewhere(self, moves: Sequence[Move]) -> float:
        """The same at the one of several further draws where it is most: what data choose (an expert, a code) may be the same at
        any one of them."""
        worst = 0.0
        for number in range(APART, APART + (ELSEWHERE_OF_SMALL if self._small else ELSEWHERE)):
            weights = self._drawn(number)
            outputs = [self._outputs(each) for each in (weights, moved(self.spec, weights, moves))]
            worst = max(worst, relative_error(*outputs))
        return worst

    def chosen(self, family: str, most: int = UNITS) -> tuple[str, list[int]]:
        """A random group of a family, and a few of its units."""
        names = self.spec.families[family]
        name = names[int(torch.randint(len(names), (), generator=self.generator))]
        order = torch.randperm(self.spec.groups[name].size, generator=self.generator)
        return name, order[:most].tolist()

    def _drawn(self, number: int) -> Weights:
        return {
            name: tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) if inexact(tensor) else tensor
            for name, tensor in draw(self.model, 1 + number, self.seed).items()
        }

    def _outputs(self, weights: Weights) -> list[Tensor]:
        if self.clock.over:
            raise InputError(
                f"budget={self.clock.seconds:g}: too few seconds to find what {type(self.model).__name__} admits beyond "
                "permutations; allow more, or None"
            )
        return self.probe.outputs_of(self.inputs, weights)

    def _measure(self, draws: int, progress: bool) -> None:
        """Draw until each family has more rows than columns."""
        count = flat(self.reference).numel()
        if self._small:
            draws = max(draws, DRAWS_OF_SMALL)
        rows = 0
        for family, names in self.spec.families.items():
            k = min(UNITS, self.spec.groups[names[0]].size)
            each = min(k, k * (k - 1) // 2, k * (k - 1) * (k - 2) // 6 or k)
            rows = max(rows, -(-(len(self.tables[family].names) * 3 // 2 + 6) // each))
        each_draw = min(count, max(FEWEST, -(-rows // draws)))
        numbers = range(1, 1 + max(draws, -(-rows // each_draw)))
        for number in tqdm(numbers, desc="continuous symmetries", disable=not progress):
            self._add(number, each_draw)

    def _add(self, number: int, rows: int) -> None:
        """Measure all families at one draw."""
        weights = self._drawn(number)
        chosen = {family: self.chosen(family) for family in self.tables}
        generator = torch.Generator().manual_seed(self.seed + number)
        factors = torch.randn(rows, flat(self.reference).numel(), generator=generator, dtype=torch.float64)
        factors /= factors.shape[1] ** 0.5
        found: dict[str, Tensor] = {}
        reach: dict[str, Tensor] = {}
        for family, (name, units) in chosen.items():
            found[family] = torch.zeros(rows, len(self.places(name)), len(units), len(units), dtype=torch.float64)
            reach[family] = torch.zeros(len(self.places(name)), dtype=torch.float64)
        names = {place.tensor for name, _ in chosen.values() for place in self.places(name)} - self._by_differences
        try:
            for start, gradients in self.probe.pullbacks(self.inputs, weights, names, factors, MOST):
                for family, (name, units) in chosen.items():
                    for o, place in enumerate(self.places(name)):
                        if place.tensor in gradients:
                            slope = place.units(gradients[place.tensor], units, batch=1)
                            own = place.units(weights[place.tensor], units).to(slope.device)
                            entries = torch.einsum("rix,jx->rij", slope.conj(), own)
                            found[family][start : start + len(slope), o] = entries.real.cpu()
                            reach[family][o] += float(slope.norm() * own.norm()) ** 2
        except LmcError:
            raise
        except Exception:  # noqa: BLE001 (operators without derivatives raise what they like)
            self._by_differences = frozenset(names)
            self.noise = max(self.noise, self._rounding(weights))

        reference: list[Tensor] = []

        def rate(moves: Sequence[Move], short: bool = False) -> Tensor:
            reference.extend([] if reference else self._outputs(weights))
            # The rounding of outputs, and the curvature, weigh as much at the cube root.
            step = max(SHORT, self.noise**0.5) if short else max(STEP, self.noise ** (1 / 3))
            ends = [self._outputs(moved(self.spec, weights, _steps(moves, t))) for t in (step, -step)]
            return factors @ (flat(ends[0], reference) - flat(ends[1], reference)).cpu() / (2 * step)

        if number == 1 and not self._by_differences:
            if self._wrong(chosen, found, rate):
                self.noise = max(self.noise, self._rounding(weights))
                self._by_differences = self._wrong(chosen, found, rate)
        for family, (name, units) in chosen.items():
            for o, place in enumerate(self.places(name)):
                if place.tensor in self._by_differences:
                    for i in range(len(units)):
                        for j in range(len(units)):
                            found[family][:, o, i, j] = rate([Move(place, _unit(len(units), i, j), units)])
                    reach[family][o] = found[family][:, o].square().sum()
        for family, table in self.tables.items():
            table.entries.append(found[family])
            table.reach.append(reach[family].sqrt())

    def _rounding(self, weights: Weights) -> float:
        """The distance of the outputs from a straight line between weights close together: where they are rounded."""
        generator = torch.Generator().manual_seed(self.seed)
        steps = {n: STEP * torch.randn(t.shape, generator=generator).to(t) for n, t in weights.items() if inexact(t)}
        ends = [self._outputs(weights | {n: weights[n] * (1 + sign * s) for n, s in steps.items()}) for sign in (1, -1)]
        middle = self._outputs(weights)
        first, second, between = (flat(outputs, middle) for outputs in (*ends, middle))
        return float((first + second - 2 * between).abs().max())

    def _wrong(
        self,
        chosen: Mapping[str, tuple[str, list[int]]],
        found: Mapping[str, Tensor],
        rate: Callable[[Sequence[Move], bool], Tensor],
    ) -> frozenset[str]:
        """The tensors whose gradients are not what differences say, over two steps: what a module detaches, computes outside
        of torch, ... In a deep network of many ReLUs the longer step crosses kinks."""
        generators = {family: torch.randn(table.shape[1:], generator=self.generator) for family, table in found.items()}
        by_tensor: dict[str, list[tuple[Move, Tensor]]] = {}
        for family, (name, units) in chosen.items():
            for o, place in enumerate(self.places(name)):
                matrix = generators[family][o].double()
                expected = (found[family][:, o] * matrix).sum((1, 2))
                by_tensor.setdefault(place.tensor, []).append((Move(place, matrix, units), expected))

        def off(items: Sequence[tuple[Move, Tensor]]) -> tuple[float, float]:
            moves, expected = [move for move, _ in items], sum(rows for _, rows in items)
            both = [rate(moves, short) for short in (False, True)]
            return min((float((measured - expected).norm()), float(measured.norm())) for measured in both)

        difference, whole = off([item for items in by_tensor.values() for item in items]) if by_tensor else (0.0, 0.0)
        if difference <= AGREE * whole:
            return frozenset()
        each = {tensor: off(items) for tensor, items in by_tensor.items()}
        return frozenset(t for t, (difference, size) in each.items() if difference > AGREE * max(size, AGREE * whole))


def _steps(moves: Sequence[Move], t: float) -> list[Move]:
    return [
        Move(place, torch.eye(len(matrix), dtype=torch.float64) + t * matrix, chosen) for place, matrix, chosen in moves
    ]


def _unit(size: int, i: int, j: int) -> Tensor:
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[i, j] = 1.0
    return matrix
