"""The paths that a connection shows, and the time that is kept for the last of them."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lmc.align.connecting.methods import Candidate, Pair
from lmc.core.progress import Budget
from lmc.landscape.evaluation.evaluation import Repair
from lmc.landscape.path import Path, loss_path
from lmc.network.task import Task
from lmc.weights import Weights

POINTS = (25, 11, 5)  # the most that take no more than this share of the time
SHARE = 0.1
RESERVE = 1.5  # times what the first path took is kept for the last, and for the certificate
KEPT = 0.25  # of all the time is kept for the last path, at most


class Time(Budget):
    """The seconds that connecting may take, of which some are kept for the last path.

    Attributes:
        reserve: seconds that are kept.
    """

    def __init__(self, seconds: float | None) -> None:
        super().__init__(seconds)
        self.reserve = 0.0

    @property
    def limited(self) -> bool:
        return math.isfinite(self.seconds)

    @property
    def free(self) -> float:
        """Seconds that may be spent on further candidates."""
        return self.left - self.reserve

    def part(self, share: float = 1.0) -> float | None:
        """A share of the seconds that are free, for what takes a budget."""
        return max(share * self.free, 1e-3) if self.limited else None


class Paths:
    """The ways from A to B, before and after, on the data that were given.

    Args:
        task: with which the targets of the data are made.
    """

    def __init__(self, pair: Pair, data: Any, task: Task, time: Time) -> None:
        self._pair, self._data, self._task, self._time = pair, data, task, time
        self._points = POINTS[0]
        self._seconds = 0.0

    @cached_property
    def naive(self) -> Path:
        """The path to B as it is, of the points for which there is time; where that is short, the one that shows it.

        From then on time is kept for the last path."""
        started = self._time.spent
        path = self._short() or self._path(self._pair.a, self._pair.b, self._points)
        self._seconds = self._time.spent - started
        self._time.reserve = RESERVE * self._seconds
        return path

    def _short(self) -> Path | None:
        """The path of fewest points, if there is no time for more; else it is known now for how many."""
        if not self._time.limited:
            return None
        started, fewest = self._time.spent, POINTS[-1]
        path = self._path(self._pair.a, self._pair.b, fewest)
        one = (self._time.spent - started) / fewest
        self._points = next((count for count in POINTS if count * one < SHARE * self._time.seconds), fewest)
        return path if self._points == fewest else None

    def last(self, candidate: Candidate) -> Path:
        """The path to B moved."""
        return self._path(
            candidate.a, candidate.weights, self._points, "repair" if candidate.repaired else "auto"
        )  # fmt: skip

    def may_be_longer(self, times: float) -> None:
        """Keep time for a last path that takes so many times as long as the first."""
        longer = min(RESERVE * self._seconds * times, KEPT * self._time.seconds)
        self._time.reserve = max(self._time.reserve, longer)

    def _path(self, a: Weights, b: Weights, points: int | Sequence[float], repair: Repair = "auto") -> Path:
        return loss_path(
            self._pair.model, a, b, self._data, alphas=points, repair=repair, loss=self._task, device=self._pair.device,
            progress=False,
        )  # fmt: skip
