"""The command `lmc`: `lmc inspect`, `lmc merge`, `lmc align`, `lmc connect`, `lmc barrier`, each the call of the same name in Python."""

import gc

_enabled = gc.isenabled()
gc.disable()  # imports make many objects and no garbage
from lmc.cli.command import main  # noqa: E402

if _enabled:
    gc.enable()

__all__ = ["main"]


def __dir__() -> list[str]:
    return __all__
