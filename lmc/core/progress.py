"""Progress of long work: what it says before it begins, bars that show how far it is, and the seconds that it may take.

There are no bars for what takes less than two seconds, and nothing is shown where the environment variable TQDM_DISABLE is
set. tqdm itself heeds it in terminals only; stored notebooks and their tests need it to hold in notebooks too.
"""

import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm import auto

from lmc.errors import InputError

LONG = 10.0  # seconds from which on it is said beforehand how long work will take

_Bar = auto.tqdm if TYPE_CHECKING else object


def _unwanted() -> bool:
    return os.environ.get("TQDM_DISABLE", "0") not in ("", "0")


def beforehand(work: str, seconds: float, *, budget: float | None = None, least: bool = False, more: str = "") -> None:
    """Say of long work, before it begins, about how long it will take (or at least) and how long it may.

    Written beside the bars, which stored notebooks do not keep: how long depends on the machine.
    """
    if seconds < LONG or _unwanted():
        return
    allowed = "" if budget is None or math.isinf(budget) else f", budget {_duration(budget)}"
    auto.tqdm.write(f"{work}: {'at least' if least else 'about'} {_duration(seconds)}{allowed}{more}", file=sys.stderr)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100.0 else f"{seconds / 60.0:.0f} minutes"


class Quiet(_Bar):
    """A bar of tqdm that waits two seconds and leaves nothing behind, neither in sight nor in a saved notebook."""

    def __init__(self, *args: Any, delay: float = 2, disable: bool = False, leave: bool = False, **kwargs: Any) -> None:
        self._output: Any = None  # of a notebook, once the bar is shown
        super().__init__(*args, delay=delay, disable=disable or _unwanted(), leave=leave, **kwargs)

    def display(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the bar; in a notebook as an output that can be emptied, where tqdm shows a widget that cannot."""
        box = getattr(self, "container", None)
        if box is not None and kwargs.get("check_delay", True) and self.delay > 0 and not self.displayed:
            from IPython.display import display

            self._output = display(box, display_id=True)
            self.displayed = True
        return super().display(*args, **kwargs)

    def close(self) -> None:
        """A notebook keeps a bar that ended early, in red; one that is to leave nothing behind must count as finished."""
        if not self.leave:
            self.total = self.n
        super().close()
        if self._output is not None and not self.leave:
            self._output.update({"text/html": "", "text/plain": ""}, raw=True)


class tqdm(Quiet, auto.tqdm):  # noqa: N801 (it is tqdm, with other defaults)
    """`tqdm.auto.tqdm` that waits two seconds and leaves nothing behind."""


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
