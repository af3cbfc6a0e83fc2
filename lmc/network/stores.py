"""The places in which a forward pass may keep values, read off the code of modules.

A module that was called before may hold plain numbers or flags that it derived from its weights, among constants of the
same kind; and what stands in a dict of a class or of a file is shared by all copies of a module. The code of `forward`, and
of the functions that it calls, says which attributes it sets and which shared dicts and lists it names.
"""

import dis
import functools
import inspect
import itertools
import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

LIBRARIES = ("torch", "numpy", "builtins", "functools", "collections", "enum", "re", "pathlib", "logging", "threading")
# How a variable that is not there may be absent.
Absent: TypeAlias = Literal["none", "deleted"]
_PARTS = frozenset(("_parameters", "_buffers", "_modules"))  # of a module, which are no objects of the caller's
_SIMPLE = frozenset((bool, int, float, str, type(None)))
_FUNCTIONS = frozenset((types.FunctionType, types.MethodType))
_SETTERS = frozenset(("setdefault", "update", "append", "appendleft", "extend", "insert", "add"))


@dataclass(frozen=True, eq=False)
class Shared:
    """A place outside modules: a dict or list, one variable of a file or of a closure, or one attribute of a class, a function
    or another object.

    Attributes:
        holder: the dict, the list, the globals of a file, the cell of a closure, or what has the attribute.
        name: of the variable or attribute; None where the holder is the place.
    """

    holder: Any
    name: str | None = None

    @property
    def key(self) -> tuple[int, str | None]:
        return id(self.holder), self.name

    @property
    def ways(self) -> tuple[Absent, ...]:
        """The ways in which something may be absent."""
        return (
            ("none", "deleted") if self.name is not None and not isinstance(self.holder, types.CellType) else ("none",)
        )

    def read(self) -> dict[Any, Any]:
        """The value there, by key or position."""
        if isinstance(self.holder, types.CellType):
            return {self.name: content(self.holder)}
        if self.name is not None:
            held = self.holder if isinstance(self.holder, dict) else vars(self.holder)
            return {self.name: held[self.name]} if self.name in held else {}
        return dict(self.holder) if isinstance(self.holder, dict) else dict(enumerate(self.holder))

    def write(self, items: dict[Any, Any], way: Absent = "none") -> None:
        """Nothing but this; a variable that is not among the items becomes None, or is deleted."""
        if isinstance(self.holder, types.CellType):
            self.holder.cell_contents = items.get(self.name)
        elif self.name is not None:
            gone = self.name not in items and way == "deleted"
            if isinstance(self.holder, dict):
                self.holder.pop(self.name, None) if gone else self.holder.update({self.name: items.get(self.name)})
            elif not gone:
                setattr(self.holder, self.name, items.get(self.name))
            elif self.name in vars(self.holder):
                delattr(self.holder, self.name)
        elif isinstance(self.holder, dict):
            self.holder.clear()
            self.holder.update(items)
        else:
            self.holder[:] = items.values()


@dataclass(frozen=True)
class Writes:
    """The names of what functions may set or write; see `Stores`. False where there is nothing."""

    attributes: frozenset[str]
    items: frozenset[str]
    written: frozenset[str]
    names: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.attributes or self.items or self.written)


class Stores:
    """The places that functions may write to, by default those of the forward pass of a class of modules.

    Attributes:
        attributes: the names of attributes that are set, on whatever object.
        items: the names that occur in functions which set items of dicts or lists.
        written: the names that occur in functions which write into tensors or arrays.
        names: all names that occur.
        shared: the dicts and lists of classes, files, closures and default arguments that are named, the variables of
            files and closures that are set, and the attributes that are set of what these name, or of the class itself.
    """

    def __init__(self, kind: type[nn.Module], functions: Iterable[Any] | None = None) -> None:
        self.attributes: set[str] = set()
        self.items: set[str] = set()
        self.written: set[str] = set()
        self.shared: list[Shared] = []
        self.names: set[str] = set()
        self._seen: set[int] = set()
        for start in (kind.forward, kind.__call__) if functions is None else functions:
            self._follow(start, kind)

    @property
    def writes(self) -> Writes:
        return Writes(*(frozenset(getattr(self, field.name)) for field in fields(Writes)))

    def _follow(self, value: Any, kind: type) -> None:
        """Note what a function does, and those that it names."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        for function in _functions(value):
            steps = [step for code in _codes(function.__code__) for step in dis.get_instructions(code)]
            self.attributes |= {step.argval for step in steps if step.opname == "STORE_ATTR"}
            names = {name for code in _codes(function.__code__) for name in code.co_names}
            if names & {"setattr", "__setattr__", "__dict__", "vars"}:
                texts = {c for code in _codes(function.__code__) for c in code.co_consts if isinstance(c, str)}
                self.attributes |= {text for text in texts if text.isidentifier()}
            self.names |= names
            out = any("out" in c for code in _codes(function.__code__) for c in code.co_consts if isinstance(c, tuple))
            if out or any(step.opname == "STORE_SUBSCR" for step in steps) or any(map(_writes, names)):
                self.written |= names
            named = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            named += [cell.cell_contents for cell in function.__closure__ or () if _is_set(cell)]
            for name in names:
                named += [inspect.getattr_static(kind, name, None), function.__globals__.get(name)]
            if names & _SETTERS or any(step.opname == "STORE_SUBSCR" for step in steps):
                self.items |= names.union(function.__code__.co_varnames)
                self.shared += [Shared(value) for value in named if isinstance(value, dict | list)]
            self.shared += [Shared(held) for value in named for held in _held(value)]
            self.shared += _attributes_set(steps, function, kind)
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


_WRITTEN_IN: weakref.WeakKeyDictionary[types.CodeType, Writes] = weakref.WeakKeyDictionary()


def stores(kind: type[nn.Module]) -> Stores:
    """The places that the forward pass of a class of modules may write to."""
    if (known := _KNOWN.get(kind)) is None:
        known = _KNOWN[kind] = Stores(kind)
    return known


def is_torch(module: nn.Module) -> bool:
    """Whether a module is one of torch's own, which keep nothing that they derive from weights."""
    return type(module).__module__.startswith("torch.nn.")


def own_functions(module: nn.Module) -> list[Any]:
    """The functions that one module has as attributes or hooks."""
    return [value for value in additions(module) if isinstance(value, types.FunctionType)]


def additions(module: nn.Module) -> list[Any]:
    """The hooks of one module, and the functions among its attributes."""
    found = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    found += [x for x in vars(module).values() if type(x) in _FUNCTIONS]
    return found


def writes_of(model: nn.Module) -> Writes:
    """All that the forward passes of a model's modules, and the hooks on them, may set or write: also on each other."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    own = [(type(m), getattr(x, "__func__", x)) for m in modules for x in additions(m)]
    found = [stores(kind).writes for kind in {type(m) for m in modules if not is_torch(m)}]
    found += [_written_in(x, kind) for kind, x in own if isinstance(x, types.FunctionType)]
    names = frozenset[str]().union(*(x.names for x in found))
    held = [(kind, method) for kind in _classes_held(modules) for method in _methods(kind) if method.__name__ in names]
    found += [_written_in(method, kind) for kind, method in held]
    return Writes(*(frozenset[str]().union(*(getattr(x, f.name) for x in found)) for f in fields(Writes)))


def _written_in(function: types.FunctionType, kind: type) -> Writes:
    if (known := _WRITTEN_IN.get(function.__code__)) is None:
        known = _WRITTEN_IN[function.__code__] = Stores(kind, [function]).writes
    return known


def _classes_held(modules: Iterable[nn.Module]) -> set[type]:
    """The caller's own classes of the objects that modules have as attributes, or in tuples, lists and dicts there."""
    found: set[type] = set()
    for module in modules:
        for key, value in vars(module).items():
            if type(value) in _SIMPLE or key in _PARTS:
                continue
            if not isinstance(value, (dict, list, tuple)):
                found.add(type(getattr(value, "__self__", value)))
            elif value:  # each module has a dozen that are empty
                several = value.values() if isinstance(value, dict) else value
                found |= {type(getattr(one, "__self__", one)) for one in several}
    no_objects = nn.Module | torch.Tensor | type | types.FunctionType
    return {k for k in found if not issubclass(k, no_objects) and k.__module__.split(".")[0] not in LIBRARIES}


def _methods(kind: type) -> list[types.FunctionType]:
    held = [value for part in kind.__mro__ for value in vars(part).values()]
    known = (dict, list, set, torch.Tensor)  # whose methods may be meant
    return [f for f in held if isinstance(f, types.FunctionType) and not any(hasattr(x, f.__name__) for x in known)]


def written_by(functions: Iterable[Any], kind: type[nn.Module]) -> list[Shared]:
    """The places outside modules that functions of one module may write."""
    return Stores(kind, functions).shared


def _attributes_set(steps: list[dis.Instruction], function: types.FunctionType, kind: type) -> Iterator[Shared]:
    """The attributes that a function sets of what no module is: of what variables of files and closures name, and of a class
    that it asks for (`type(self).table = ...`)."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for before, step in itertools.pairwise(steps):
        if step.opname != "STORE_ATTR":
            continue
        if before.opname == "LOAD_GLOBAL":
            holder = function.__globals__.get(before.argval)
        elif before.opname == "LOAD_DEREF":
            holder = content(cells[before.argval]) if before.argval in cells else None
        else:
            asked = before.opname.startswith("CALL") or before.argval == "__class__"
            holder = kind if asked else None
        if hasattr(holder, "__dict__") and not isinstance(holder, nn.Module | torch.Tensor):
            yield Shared(holder, step.argval)


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
