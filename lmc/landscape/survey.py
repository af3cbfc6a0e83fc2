"""The points of a plane, evaluated from coarse to fine."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmc.batchnorm import Recalibrator
from lmc.errors import InputError
from lmc.landscape.evaluation import Evaluator
from lmc.landscape.grid import Values, coarse_to_fine
from lmc.landscape.live import Live
from lmc.landscape.plane_result import Plane
from lmc.landscape.points import run
from lmc.landscape.scores import Score
from lmc.progress import tqdm
from lmc.weights import Weights

LONG = 10.0  # seconds from which on the cost of a plane is told before it starts

StateAt = Callable[[float, float], Weights]


@dataclass(frozen=True)
class Survey:
    """How the points of one plane are evaluated."""

    evaluator: Evaluator
    prepare: Recalibrator | None
    state_at: StateAt
    x: Values
    y: Values
    progress: bool

    def plane(
        self,
        states: Sequence[Weights],
        places: dict[str, tuple[float, float]],
        axes: tuple[str, str],
        resume: Plane | None,
    ) -> Plane:
        own = list(self.evaluator(states))
        blank = self._blank(own, places, axes)
        if resume is not None:
            _take_over(blank, resume)
        if self.prepare is None:  # the models are their own points
            for (x, y), score in zip(places.values(), own, strict=True):
                row, column = int(np.flatnonzero(self.y == y)[0]), int(np.flatnonzero(self.x == x)[0])
                _note(blank, row, column, score)
        order = [i for i in coarse_to_fine(len(self.y), len(self.x)) if not blank.done.flat[i]]
        if self.progress:
            self._tell(len(order), states[0])
        for i, score in run(self.evaluator, self._states(order), order, "plane", self.progress).items():
            _note(blank, *divmod(i, len(self.x)), score)
        return replace(blank, exact=Live(lambda: (self.evaluator, self.prepare, self.state_at), states))

    def _states(self, order: Sequence[int]) -> Iterator[Weights]:
        for i in order:
            row, column = divmod(i, len(self.x))
            state = self.state_at(float(self.x[column]), float(self.y[row]))
            yield state if self.prepare is None else self.prepare(state)

    def _blank(
        self, own: list[dict[str, Score]], places: dict[str, tuple[float, float]], axes: tuple[str, str]
    ) -> Plane:
        """A plane of which no point is known."""
        shape = (len(self.y), len(self.x))
        measures = {split: list(score.values) for split, score in own[0].items()}
        values = {split: {m: np.full(shape, math.nan) for m in names} for split, names in measures.items()}
        kept = {
            split: {m: tuple(score[split].values[m] for score in own) for m in names}
            for split, names in measures.items()
        }
        done = np.zeros(shape, dtype=bool)
        return Plane(self.x, self.y, values, places, kept, done, axes, self.prepare is not None)

    def _tell(self, points: int, state: Weights) -> None:
        """What a long plane will cost, judged by one point; the first ones, with all they prepare, came before."""
        start = time.perf_counter()
        next(self.evaluator([state if self.prepare is None else self.prepare(state)]))
        each = time.perf_counter() - start
        if points * each > LONG:
            cost = f"about {points * each:.0f} s ({1e3 * each:.1f} ms each, on {self.evaluator.device})"
            tqdm.write(f"plane: {points} points to evaluate, {cost}; an interrupt keeps those that are done")


def _note(plane: Plane, row: int, column: int, score: Mapping[str, Score]) -> None:
    plane.done[row, column] = True
    for split, measures in plane.values.items():
        for measure, grid in measures.items():
            grid[row, column] = score[split].values[measure]


def _take_over(plane: Plane, earlier: Plane) -> None:
    """Copy the points that an earlier plane knows.

    Raises:
        InputError: it is a plane of other models, data, measures or points.
    """
    same = plane.values.keys() == earlier.values.keys() and plane.recalibrated == earlier.recalibrated
    same = same and all(np.array_equal(p, q) for p, q in ((plane.x, earlier.x), (plane.y, earlier.y)))
    for split, measures in plane.own.items():
        others = earlier.own.get(split, {})
        same = same and measures.keys() == others.keys()
        same = same and all(np.allclose(measures[m], others[m], rtol=1e-4, equal_nan=True) for m in measures)
    if not same:
        raise InputError("resume: a plane of other models, data, measures or points; pass it with the same arguments")
    plane.done[:] = earlier.done
    for split, measures in plane.values.items():
        for measure, grid in measures.items():
            grid[:] = earlier.values[split][measure]
