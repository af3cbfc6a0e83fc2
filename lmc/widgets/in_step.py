"""Widgets of one result move together."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

_SHOWN: WeakKeyDictionary[Any, WeakSet[Any]] = WeakKeyDictionary()


def keep_in_step(widget: Any, result: Any, traits: Sequence[str]) -> None:
    """From now on `traits` of all widgets of `result` that were handed in here are the same; `widget` takes over theirs.

    `result` is compared by identity: an object that hashes by identity, as result objects do.
    """
    others = _SHOWN.setdefault(result, WeakSet())
    for other in others:
        for name in traits:
            setattr(widget, name, getattr(other, name))
        break

    def follow(change: Any) -> None:
        for other in list(_SHOWN[result]):
            setattr(other, change["name"], change["new"])  # its own observer finds nothing left to change

    widget.observe(follow, list(traits))
    others.add(widget)
