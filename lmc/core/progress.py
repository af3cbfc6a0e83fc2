"""Progress bars: none for what takes less than two seconds, none where the environment variable TQDM_DISABLE is set.

tqdm itself heeds that variable in terminals only; stored notebooks and their tests need it to hold in notebooks too.
"""

import os
from typing import TYPE_CHECKING, Any

from tqdm import auto

_Bar = auto.tqdm if TYPE_CHECKING else object


class Quiet(_Bar):
    """A bar of tqdm that waits two seconds and leaves nothing behind, neither in sight nor in a saved notebook."""

    def __init__(self, *args: Any, delay: float = 2, disable: bool = False, leave: bool = False, **kwargs: Any) -> None:
        unwanted = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
        self._output: Any = None  # of a notebook, once the bar is shown
        super().__init__(*args, delay=delay, disable=disable or unwanted, leave=leave, **kwargs)

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
