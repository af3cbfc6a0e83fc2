"""Progress bars: none for what takes less than two seconds, none where the environment variable TQDM_DISABLE is set.

tqdm itself heeds that variable in terminals only; stored notebooks and their tests need it to hold in notebooks too.
"""

import os
from typing import Any

from tqdm import auto


class tqdm(auto.tqdm):  # noqa: N801 (it is tqdm, with other defaults)
    """`tqdm.auto.tqdm` that waits two seconds and leaves nothing behind."""

    def __init__(self, *args: Any, delay: float = 2, disable: bool = False, leave: bool = False, **kwargs: Any) -> None:
        unwanted = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
        super().__init__(*args, delay=delay, disable=disable or unwanted, leave=leave, **kwargs)

    def close(self) -> None:
        """A notebook keeps a bar that ended early, in red; one that is to leave nothing behind must count as finished."""
        if not self.leave:
            self.total = self.n
        super().close()
