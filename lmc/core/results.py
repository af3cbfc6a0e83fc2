"""Abilities that all results share: `plot`, `explore` and `save_html` by views from outside, `save` and `load` as files.

A view is a function of a result, registered above its definition:

    @view(Path, "plot")
    def plot(path: Path, label: str | None = None) -> go.Figure: ...

From then on it *is* the method `Path.plot`, with its own signature and docstring. The results know nothing of their views;
these are imported when the first of them is asked for.
"""

import dataclasses
import importlib
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

from lmc.core import codec
from lmc.core.extras import require
from lmc.core.files import write_bytes
from lmc.errors import InputError, MissingPackageError

if TYPE_CHECKING:
    import anywidget
    import pandas as pd
    import plotly.graph_objects as go

Shown = TypeVar("Shown")
Function = TypeVar("Function", bound=Callable[..., Any])

WHERE = {"plot": "lmc.views.plots", "explore": "lmc.views.widgets", "save_html": "lmc.views.widgets"}
_VIEWS: dict[tuple[type, str], Callable[..., Any]] = {}


def view(result: type, verb: str) -> Callable[[Function], Function]:
    """Make a function the method `verb` of a result: "plot", "explore" or "save_html"."""

    def register(function: Function) -> Function:
        _VIEWS[result, verb] = function
        return function

    return register


class View(Generic[Shown]):
    """A method that is found among the registered views; returns a `Shown`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.verb = name

    def __get__(self, result: Any, owner: type) -> Callable[..., Shown]:
        try:
            importlib.import_module(WHERE[self.verb])
        except MissingPackageError as error:
            return _failing(error)
        found = next((_VIEWS[kind, self.verb] for kind in owner.__mro__ if (kind, self.verb) in _VIEWS), None)
        if found is None:
            known = [verb for verb in WHERE if any((kind, verb) in _VIEWS for kind in owner.__mro__)]
            there = f"; there is {', '.join(known)}" if known else ""
            raise AttributeError(f"{owner.__name__} has no {self.verb}{there}", name=self.verb, obj=result)
        return found if result is None else types.MethodType(found, result)


class Result:
    """A dataclass that prints, plots, becomes a data frame, and is written to a file and read back."""

    version: ClassVar[int] = 1  # of the file format

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        codec.KINDS[cls.__name__] = cls

    plot = cast("View[go.Figure]", View())
    explore = cast("View[anywidget.AnyWidget]", View())
    save_html = cast("View[Path]", View())

    def to_frame(self) -> "pd.DataFrame":
        """A single row: the plain numbers and words that this holds."""
        plain = {field.name: getattr(self, field.name) for field in codec.saved_fields(type(self))}
        row = {name: value for name, value in plain.items() if isinstance(value, str | int | float)}
        return require("pandas").DataFrame([row])

    def save(self, file: str | Path) -> Path:
        """Write all but what refers to networks and data; `load` reads it back, exactly.

        A JSON file, or a safetensors file where there are weights. It is written whole or not at all.
        """
        write_bytes(file, self.to_bytes())
        return Path(file)

    def to_bytes(self) -> bytes:
        """The bytes that `save` writes."""
        tensors: codec.Tensors = {}
        return codec.dump(_format(type(self)), codec.encode(self, type(self), tensors), tensors)

    @classmethod
    def load(cls, file: str | Path, **kept: Any) -> Self:
        """Read what `save` wrote; tensors are on the CPU.

        Args:
            kept: the fields that stayed behind, where they have no default.

        Raises:
            DataError: a file that holds something else.
            InputError: fields that are missing, or that are read from the file.
        """
        kinds = {_format(kind): kind for kind in _family(cls)}
        with codec.reading(file, _words(cls)):
            form, content, tensors = codec.read(file)
            if form not in kinds:
                form, content = cls._from_older(form, content, tensors)
            kind = kinds[form]
        _check_kept(kind, kept)
        with codec.reading(file, _words(cls)):
            return codec.build(kind, content, tensors, kept)

    @classmethod
    def _from_older(cls, form: str, content: dict[str, Any], tensors: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The format name and the content that today's code would have written for a file of an older format."""
        raise ValueError(f"format {form!r}, expected {_format(cls)!r}")

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in WHERE or hasattr(self, name)]


def _failing(error: MissingPackageError) -> Callable[..., Any]:
    """A method that is there, but needs a package."""

    def missing(*_: Any, **__: Any) -> Any:
        raise error

    return missing


def _words(kind: type) -> str:
    """The name of a class in words: "permutation spec" for `PermutationSpec`."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", kind.__name__).lower()


def _format(kind: type[Result]) -> str:
    return f"lmc {_words(kind)} {kind.version}"


def _family(kind: type[Result]) -> list[type[Result]]:
    return [kind, *(each for child in kind.__subclasses__() for each in _family(child))]


def _check_kept(kind: Any, kept: Mapping[str, Any]) -> None:
    behind = {field.name: field for field in dataclasses.fields(kind) if field not in codec.saved_fields(kind)}
    unknown = [name for name in kept if name not in behind]
    if unknown:
        raise InputError(f"{unknown[0]}: not a field that stays behind when a {kind.__name__} is saved")
    needed = [
        name
        for name, field in behind.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and name not in kept
    ]
    if needed:
        raise InputError(f"a saved {kind.__name__} lacks its {needed[0]}: pass {needed[0]}= to load")
