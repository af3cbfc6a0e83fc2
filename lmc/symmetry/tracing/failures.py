"""Failures of a capture: the place, the cause and the way out; and torch's own log kept out of it."""

import logging
import os
import re
import sysconfig
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lmc.errors import CertificateError, TraceError

BY_HAND = (
    "If the inputs fit the model, derive the symmetries of its traceable submodules one by one, or write them by hand "
    "with PermutationSpec.from_patterns, and check the result with its certify method."
)
LIBRARY = (
    "If the inputs fit: models of transformers know several implementations of a layer, and these can be captured: "
    'attn_implementation="eager" and experts_implementation="batched_mm", given to the configuration. Otherwise '
    "write the symmetries by hand with PermutationSpec.from_patterns, and check them with its certify method."
)
LAZY = "Its lazy layers have no weights yet: call the model once on the example inputs first."
SCRIPTED = (
    "It is TorchScript, of which one run could not be recorded: pass the nn.Module that it was made from, whose state dict has the "
    "same names, or write the symmetries by hand with PermutationSpec.from_patterns, and check them with its certify method."
)
QUANTISED = "Its weights are packed integers: pass the floating-point module that it was quantised from."

# With a separator at the end: torchvision and torch_geometric are not torch.
TORCH_HOME = f"{Path(torch.__file__).parent}{os.sep}"
OUR_HOMES = tuple(f"{Path(__file__).parents[2] / room}{os.sep}" for room in ("symmetry", "network"))
PYTHON_HOME = sysconfig.get_path("stdlib")


class Stopped(Exception):
    """The forward pass of the user's module raised; the cause says what. Export logs and prints what it knows of other
    errors, before we can say it better."""


@contextmanager
def stopping() -> Iterator[None]:
    """Turn any error into `Stopped`."""
    try:
        yield
    except Exception as error:
        raise Stopped from error


def explained(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException) -> TraceError:
    """The error of a forward pass that cannot be captured, in the model's own words: inputs that do not fit, or a graph that
    depends on data."""
    place = where(model, error)
    if "GuardOnDataDependent" in type(error).__name__ or "data-dependent" in str(error).lower():
        what = "its control flow or a shape depends on the values of tensors, so there is no fixed graph of operators"
    else:
        what = f"{type(error).__name__}: {first_line(error)}"
    return TraceError(f"cannot trace {call_of(model, args, kwargs)}{place}: {what}. {advice(model, place) or BY_HAND}")


def not_computed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException
) -> CertificateError:
    """The error of a forward pass that cannot be computed on known numbers."""
    return CertificateError(
        f"cannot compute {call_of(model, args, kwargs)}{where(model, error)} in double precision, so nothing can be "
        f"certified: {type(error).__name__}: {first_line(error)}. If the model takes these inputs in its own precision, an "
        "operator of it knows no float64: let it use another implementation of that layer, or pass certify=False."
    )


def call_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """`Model(float32[2, 5], mask=None)`."""
    given = [*map(describe, args), *(f"{name}={describe(value)}" for name, value in kwargs.items())]
    return f"{type(model).__name__}({', '.join(given)})"


def where(model: nn.Module, error: BaseException) -> str:
    """` in submodule (Class) at file:line`, as far as known."""
    return submodule_in(model, error) + last_user_line(error)


def advice(model: nn.Module, place: str) -> str:
    """The way out, where it follows from the module or the library that it comes from."""
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        return SCRIPTED
    if any("quantized" in type(m).__module__ for m in model.modules()):
        return QUANTISED
    return LIBRARY if "transformers" in re.split(r"[/\\]", place) else ""


def describe(value: Any) -> str:
    """An argument by its dtype and shape, or what it holds; numbers inside tensors and arrays are not shown."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k!r}: {describe(v)}' for k, v in value.items())}}}"
    if isinstance(value, (list, tuple)):
        shown = [describe(v) for v in value[:4]] + [f"... {len(value)} in all"] * (len(value) > 4)
        return f"[{', '.join(shown)}]" if isinstance(value, list) else f"({', '.join(shown)})"
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else f"<{type(value).__name__}>"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop."""
    return next((line for line in str(error).splitlines() if line.strip()), "no message")[:300].rstrip(". ")


def frames_of(trace: TracebackType | None) -> Iterator[TracebackType]:
    """The frames of a traceback, outermost first."""
    while trace is not None:
        yield trace
        trace = trace.tb_next


def submodule_in(model: nn.Module, error: BaseException) -> str:
    """` in path (Class)` of the innermost submodule that was running."""
    names = {id(module): name for name, module in model.named_modules() if name}
    found = ""
    for step in frames_of(error.__traceback__):
        running = step.tb_frame.f_locals.get("self")
        if id(running) in names:
            found = f" in {names[id(running)]} ({type(running).__name__})"
    return found


def last_user_line(error: BaseException) -> str:
    """` at file:line` of the deepest frame outside torch."""
    frames = [(step.tb_frame.f_code.co_filename, step.tb_lineno) for step in frames_of(error.__traceback__)]
    inner = [(file, line) for file, line in named_lines(str(error)) if is_user_file(file)]
    outer = [(file, line) for file, line in frames if is_user_file(file)]
    deepest = (inner or outer)[-1:]
    return "".join(f" at {file}:{line}" for file, line in deepest)


def named_lines(text: str) -> list[tuple[str, int]]:
    """The files and lines of a printed traceback."""
    return [(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', text)]


def is_user_file(file: str) -> bool:
    """Whether a file belongs neither to torch, nor to Python itself, nor to the parts of this package that call the module."""
    library = file.startswith(PYTHON_HOME) and "site-packages" not in file
    return not library and not file.startswith((TORCH_HOME, *OUR_HOMES, "<"))


class FromElsewhere(logging.Filter):
    """Lets pass what other threads log."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self.thread


@contextmanager
def quiet() -> Iterator[None]:
    """Export warns about things that do not concern a graph that is only looked at, and logs what fails before we say
    it. Torch's loggers say nothing in this thread meanwhile; their levels and handlers stay as they are."""
    everyone = list(logging.root.manager.loggerDict.items())
    known = [item for name, item in everyone if name.split(".")[0] == "torch" and isinstance(item, logging.Logger)]
    silence = FromElsewhere()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in known:
                logger.addFilter(silence)
            yield
        finally:
            for logger in known:
                logger.removeFilter(silence)
