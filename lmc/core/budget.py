"""Seconds that a search may take."""

import math
import time

from lmc.errors import InputError

clock = time.monotonic


class Budget:
    """A number of seconds, counted from when this is made; None is without end.

    Raises:
        InputError: seconds that are no positive number.
    """

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not seconds > 0:
            raise InputError(f"budget={seconds!r}: expected a positive number of seconds, or None for no limit")
        self.seconds = math.inf if seconds is None else float(seconds)
        self._started = clock()

    @property
    def spent(self) -> float:
        return clock() - self._started

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    @property
    def over(self) -> bool:
        return self.left <= 0
