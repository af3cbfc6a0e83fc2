"""The places in which a forward pass may keep values, read off the code of modules.

A module that was called before may hold plain numbers or flags that it derived from its weights, among constants of the
same kind; and what stands in a dict of a class or of a file is shared by all copies of a module. The code of `forward`, and
of the functions that it calls, says which attributes it sets and which shared dicts and lists it names.
"""

import dis
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LIBRARIES = ("torch", "numpy", "builtins", "functools", "collections", "enum", "re", "pathlib", "logging", "threading")
_SETTERS = frozenset(("setdefault", "update", "append", "appendleft", "extend", "insert", "add"))


@dataclass(frozen=True, eq=False)
class Shared:
    """A place outside modules: a dict or list, or one variable of a file or of a closure.

    Attributes:
        holder: the dict, the list, the globals of a file, or the cell of a closure.
        name: of the variable; None where the holder is the place.
    """

    holder: Any
    name: str | None = None

    @property
    def key(self) -> tuple[int, str | None]:
        return id(self.holder), self.name

    def read(self) -> dict[Any, Any]:
        """The value there, by key or position."""
        if self.name is not None:
            return {self.name: self.holder.get(self.name) if isinstance(self.holder, dict) else content(self.holder)}
        return dict(self.holder) if isinstance(self.holder, dict) else dict(enumerate(self.holder))

    def write(self, items: dict[Any, Any]) -> None:
        """Nothing but this; a variable that is not among the items becomes None."""
        if isinstance(self.holder, types.CellType):
            self.holder.cell_contents = items.get(self.name)
        elif self.name is not None:
            self.holder[self.name] = items.get(self.name)
        elif isinstance(self.holder, dict):
            self.holder.clear()
            self.holder.update(items)
        else:
            self.holder[:] = items.values()


class Stores:
    """The places that functions may write to, by default those of the forward pass of a class of modules.

    Attributes:
        attributes: the names of attributes that are set, on whatever object.
        items: the names that occur in functions which set items of dicts or lists.
        written: the names that occur in functions which write into tensors or arrays.
        shared: the dicts and lists of classes, files, closures and default arguments that are named, and the variables of
            files and closures that are set.
    """

    def __init__(self, kind: type[nn.Module], functions: Iterable[Any] | None = None) -> None:
        self.attributes: set[str] = set()
        self.items: set[str] = set()
        self.written: set[str] = set()
        self.shared: list[Shared] = []
        self._seen: set[int] = set()
        for start in (kind.forward, kind.__call__) if functions is None else functions:
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
            out = any("out" in c for code in _codes(function.__code__) for c in code.co_consts if isinstance(c, tuple))
            if out or any(step.opname == "STORE_SUBSCR" for step in steps) or any(map(_writes, names)):
                self.written |= names
            named = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            named += [cell.cell_contents for cell in function.__closure__ or () if _is_set(cell)]
            for name in names:
                named += [inspect.getattr_static(kind, name, None), function.__globals__.get(name)]
            if names & _SETTERS or any(step.opname == "STORE_SUBSCR" for step in steps):
                self.items |= names
                self.shared += [Shared(value) for value in named if isinstance(value, dict | list)]
            self.shared += [Shared(held) for value in named for held in _held(value)]
            set_here = {step.argval: step.opname for step in steps if step.opname in ("STORE_GLOBAL", "STORE_DEREF")}
            cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
            for name, operation in set_here.items():
                if operation == "STORE_GLOBAL":
                    self.shared.append(Shared(function.__globals__, name))
                elif name in cells:
                    self.shared.append(Shared(cells[name], name))
            for value in named:
                self._follow(value, kind)


_KNOWN: weakref.WeakKeyDictionary[type[nn.Module], Stores] = (
    weakref.WeakKeyDictionary()
)  # classes of notebooks come and go


def stores(kind: type[nn.Module]) -> Stores:
    """The places that the forward pass of a class of modules may write to."""
    if (known := _KNOWN.get(kind)) is None:
        known = _KNOWN[kind] = Stores(kind)
    return known


def written_by(functions: Iterable[Any], kind: type[nn.Module]) -> list[Shared]:
    """The places outside modules that functions of one module may write."""
    return Stores(kind, functions).shared


def _held(value: Any) -> list[dict[Any, Any] | list[Any]]:
    """The dicts and lists that an object of the caller's own holds, or a thread's own values."""
    if isinstance(value, threading.local):
        return [vars(value)]
    known = (nn.Module, torch.Tensor, type, types.FunctionType, types.MethodType, types.ModuleType)
    if isinstance(value, known) or type(value).__module__.split(".")[0] in LIBRARIES:
        return []
    return [held for held in getattr(value, "__dict__", {}).values() if isinstance(held, dict | list)]


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


def _writes(name: str) -> bool:
    """Whether a method or attribute of this name changes the values of a tensor: `copy_`, `add_`, `data`."""
    return name == "data" or (name.endswith("_") and not name.endswith("__"))


def _is_set(cell: types.CellType) -> bool:
    return content(cell) is not None


def content(cell: types.CellType) -> Any:
    """The contents of a cell of a closure; None where it holds nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None
