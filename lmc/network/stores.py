"""The places in which a forward pass may keep values, read off the code of modules.

A module that was called before may hold plain numbers or flags that it derived from its weights, among constants of the
same kind; and what stands in a dict of a class or of a file is shared by all copies of a module. The code of `forward`, and
of the functions that it calls, says which attributes it sets and which shared dicts and lists it names.
"""

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_SETTERS = frozenset(("setdefault", "update", "append", "insert"))


class Stores:
    """What the forward pass of a class of modules may write.

    Attributes:
        attributes: the names of attributes that are set, on whatever object.
        items: the names that occur in functions which set items of dicts or lists.
        shared: the dicts and lists of classes, files, closures and default arguments that are named.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        self.attributes: set[str] = set()
        self.items: set[str] = set()
        self.shared: list[dict[Any, Any] | list[Any]] = []
        self._seen: set[int] = set()
        for start in (kind.forward, kind.__call__):
            self._follow(start, kind)

    def _follow(self, value: Any, kind: type) -> None:
        """Note what a function does, and those that it names."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        for function in _functions(value):
            steps = [step for code in _codes(function.__code__) for step in dis.get_instructions(code)]
            self.attributes |= {step.argval for step in steps if step.opname == "STORE_ATTR"}
            names = {name for code in _codes(function.__code__) for name in code.co_names}
            named = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            named += [cell.cell_contents for cell in function.__closure__ or () if _is_set(cell)]
            for name in names:
                named += [inspect.getattr_static(kind, name, None), function.__globals__.get(name)]
            if names & _SETTERS or any(step.opname == "STORE_SUBSCR" for step in steps):
                self.items |= names
                self.shared += [value for value in named if isinstance(value, dict | list)]
            for value in named:
                self._follow(value, kind)


@functools.lru_cache(maxsize=1024)
def stores(kind: type[nn.Module]) -> Stores:
    """What the forward pass of a class of modules may write."""
    return Stores(kind)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The Python functions behind a method, property or decorated function, but those of torch."""
    inner = value.fget if isinstance(value, property) else value
    inner = inner.__func__ if isinstance(inner, staticmethod | classmethod | types.MethodType) else inner
    while isinstance(inner, types.FunctionType | functools._lru_cache_wrapper):
        if isinstance(inner, types.FunctionType) and not (inner.__module__ or "").startswith("torch."):
            yield inner
        inner = getattr(inner, "__wrapped__", None)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_set(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
