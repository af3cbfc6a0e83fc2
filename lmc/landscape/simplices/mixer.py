"""Mixtures of given models, evaluated: one at a time, or all points of a lattice, from coarse to fine."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.landscape.evaluation.points import run
from lmc.landscape.evaluation.scores import Score
from lmc.landscape.simplices.lattice import Values
from lmc.network.batchnorm import Recalibrator
from lmc.weights import Weights, mean

LONG = 10.0  # seconds from which on the cost is told before it starts

Note = Callable[[int, dict[str, Score]], None]


@dataclass(frozen=True)
class Mixer:
    """How mixtures `sum_i s_i theta_i` are evaluated: batch statistics re-estimated where there are any.

    Attributes:
        states: the models' weights, on the evaluator's device.
    """

    evaluator: Evaluator
    states: Sequence[Weights]
    prepare: Recalibrator | None

    def __call__(self, shares: Sequence[float]) -> dict[str, dict[str, float]]:
        """split -> measure -> value of one mixture.

        Raises:
            InputError: not one finite share for each model, or shares that do not sum to 1.
        """
        given = [float(share) for share in shares]
        if len(given) != len(self.states) or not all(map(math.isfinite, given)) or abs(sum(given) - 1.0) > 1e-6:
            raise InputError(f"shares={given}: expected {len(self.states)} finite numbers that sum to 1")
        score = next(self.evaluator([self._state(given)]))
        return {split: dict(found.values) for split, found in score.items()}

    def own(self) -> list[dict[str, Score]]:
        """The scores of the models as they are."""
        return list(self.evaluator(self.states))

    def survey(self, points: Values, order: Sequence[int], note: Note, name: str, progress: bool) -> None:
        """Evaluate `points[i]` for i in `order` and hand each score to `note`; an interrupt ends it with a warning."""
        if progress and order:
            self._tell(points[order[0]].tolist(), len(order), name)
        states: Iterator[Weights] = (self._state(points[i].tolist()) for i in order)
        for i, score in run(self.evaluator, states, order, name, progress).items():
            note(i, score)

    def _state(self, shares: Sequence[float]) -> Weights:
        mixed = mean(self.states, shares)
        return mixed if self.prepare is None else self.prepare(mixed)

    def _tell(self, shares: Sequence[float], count: int, name: str) -> None:
        """What a long survey will cost, judged by one point."""
        start = time.perf_counter()
        self(shares)
        each = time.perf_counter() - start
        if count * each > LONG:
            cost = f"about {count * each:.0f} s ({1e3 * each:.1f} ms each, on {self.evaluator.device})"
            tqdm.write(f"{name}: {count} points to evaluate, {cost}; an interrupt keeps those that are done")
