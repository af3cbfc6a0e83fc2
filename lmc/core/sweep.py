"""One function over a grid, on any number of workers, with a file for each finished cell."""

import hashlib
import inspect
import itertools
import json
import math
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lmc.core.context import own_context, warn
from lmc.core.extras import require
from lmc.core.files import write_bytes, write_text
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.core.workers import Processes, spread
from lmc.errors import DataError, InputError

if TYPE_CHECKING:
    import pandas as pd

HEAD = "sweep.json"  # says whose sweep a folder holds
LONGEST = 80  # characters of a cell in the name of its file


@dataclass(frozen=True, eq=False)
class Cell(Result):
    """The outcome of one combination.

    Attributes:
        parameters: name -> its value, as plain data; functions by their name.
        values: name -> what the function returned; empty where it failed.
        error: type and message; empty where it did not fail.
        trace: the traceback, as text.
        seconds: taken by the function.
    """

    parameters: dict[str, Any]
    values: dict[str, Any]
    error: str = ""
    trace: str = field(default="", repr=False)
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Sweep(Result):
    """The finished cells of a sweep, in the order of its grid.

    Attributes:
        function: the name of the function.
        grid: name -> values, as plain data.
        cells: finished ones, among them those that failed.
    """

    function: str
    grid: dict[str, list[Any]]
    cells: tuple[Cell, ...]

    @property
    def failed(self) -> tuple[Cell, ...]:
        """The cells that ended with an error."""
        return tuple(cell for cell in self.cells if cell.error)

    @property
    def complete(self) -> bool:
        """Every cell is finished, and none failed."""
        return len(self.cells) == _count(self.grid) and not self.failed

    def to_frame(self) -> "pd.DataFrame":
        """A row for each finished cell: its parameters, its values, seconds, and its error where any cell has one."""
        rows = [{**cell.parameters, **cell.values, "seconds": cell.seconds, "error": cell.error} for cell in self.cells]
        frame = require("pandas").DataFrame(rows)
        return frame if self.failed else frame.drop(columns="error", errors="ignore")

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(float_format="{:.4g}".format)

    def __str__(self) -> str:
        axes = " x ".join(f"{len(values)} {name}" for name, values in self.grid.items())
        count = _count(self.grid)
        lines = [f"Sweep of {self.function}: {axes}, {len(self.cells) - len(self.failed)} of {count} cells"]
        lines[0] += f", {sum(cell.seconds for cell in self.cells):.3g} s of work"
        lines += [f"  failed: {_words(cell.parameters)}: {cell.error}" for cell in self.failed[:3]]
        return "\n".join([*lines, *(["  ..."] if len(self.failed) > 3 else [])])

    __repr__ = __str__


@own_context
def sweep(
    function: Callable[..., Any],
    grid: Mapping[str, Iterable[Any]],
    *,
    executor: Any = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Sweep:
    """Call `function(name=value, ...)` for every combination of a grid, on all processors of this machine or on an executor.

    A cell that raises is recorded with its traceback while the others go on. With a `folder`, each finished cell is a file
    in it, and the same call takes up what is there: it computes what is missing and what failed. A larger grid of the same
    names may follow in the same folder. An interrupt returns what is finished, with a warning.

    Args:
        function: takes the names of the grid as keywords; returns a number, or a mapping of names to numbers, texts,
            lists or results of this package. It may be defined in a notebook. It runs in other processes, so it loads
            what is large itself, from a path; what it refers to is sent once. What it draws at random must come from a
            seed among its arguments. Torch uses one thread in each process, unless the function sets another number.
        grid: name -> values: numbers, texts, paths, functions by name, or lists of these.
        executor: a `concurrent.futures.Executor` or a dask `Client`. Default: one process for each processor; one that
            dies is replaced and its cell tried once more, which then counts as failed. A pool of
            `concurrent.futures` ends as a whole with the first process that dies.
        folder: where to keep cells; made where it is not there.
        progress: show a bar with the time that is left.

    Raises:
        InputError: a grid that cannot be used, an executor that was shut down, a function that cannot be sent to other
            processes; says which object of it.
        DataError: the folder holds the sweep of another function, or something else.
        WorkerError: the executor has lost its workers, or they have another version of this package. Finished cells are
            kept in the folder.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> import lmc
    >>> with ThreadPoolExecutor(2) as pool:
    ...     found = lmc.sweep(lambda width, seed: width + seed, {"width": [8, 16], "seed": range(2)}, executor=pool)
    >>> found.to_frame()["value"].tolist()
    [8, 9, 16, 17]
    """
    plain, cells = _cells(grid)
    with ExitStack() as stack:
        home = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="lmc-")))
        _claim(home, function, list(plain))
        files = {home / _file(cell): cell for cell, _ in cells}
        done = {file: Cell.load(file) for file in files if file.exists()}
        failed = sum(1 for cell in done.values() if cell.error)
        missing = {
            file: arguments
            for file, (_, arguments) in zip(files, cells, strict=True)
            if file not in done or done[file].error
        }
        bar = stack.enter_context(tqdm(total=len(files), desc="sweep", unit=" cells", disable=not progress))
        bar.update(len(files) - len(missing))
        try:
            for file, content in _run(stack, executor, function, files, missing):
                write_bytes(file, content)
                done[file] = Cell.load(file)
                bar.update()
                failed = sum(1 for cell in done.values() if cell.error)
                bar.set_postfix({"failed": failed} if failed else {})
        except KeyboardInterrupt:
            if not done:
                raise
            kept = "" if folder is None else "; the same call goes on from there"
            warn(f"interrupted: {len(done)} of {len(files)} cells are finished{kept}")
    found = Sweep(_name(function), plain, tuple(done[file] for file in files if file in done))
    if found.failed:
        first = found.failed[0]
        warn(
            f"{len(found.failed)} of {len(files)} cells failed, the first, {_words(first.parameters)}, with {first.error}"
        )
    return found


def _run(
    stack: ExitStack,
    executor: Any,
    function: Callable[..., Any],
    files: Mapping[Path, dict[str, Any]],
    missing: Mapping[Path, dict[str, Any]],
) -> Iterator[tuple[Path, bytes]]:
    """The missing cells as they are finished, as the bytes of their files."""
    if executor is None and missing:
        executor = Processes(min(_processors(), len(missing)))
        stack.callback(executor.shutdown)
    order = list(missing)
    tasks = [(files[file], missing[file]) for file in order]
    for i, content in spread(executor, _caller, {_name(function): function}, tasks, lost=_dead):
        yield order[i], content


def _processors() -> int:
    """The number of processors that this process may use; of all, where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _caller(**functions: Callable[..., Any]) -> Callable[[Any], bytes]:
    """A worker's task for a cell: `(its parameters as plain data, the arguments)` to the bytes of its file."""
    (function,) = functions.values()

    def call(task: tuple[dict[str, Any], dict[str, Any]]) -> bytes:
        parameters, arguments = task
        started = time.perf_counter()
        try:
            found = function(**arguments)
            seconds = time.perf_counter() - started
            values = found if isinstance(found, Mapping) else {"value": found}
            if taken := [name for name in values if name in parameters or not isinstance(name, str)]:
                raise InputError(f"{taken[0]!r} is no name for a value: it must be a text, and not one of the grid")
            return Cell(parameters, {n: _number(v) for n, v in values.items()}, seconds=seconds).to_bytes()
        except Exception as error:  # whatever it is, the other cells go on
            trace = "".join(traceback.format_exception(error))
            seconds = time.perf_counter() - started
            return Cell(parameters, {}, f"{type(error).__name__}: {error}", trace, seconds).to_bytes()

    return call


def _dead(task: tuple[dict[str, Any], dict[str, Any]], error: Exception) -> bytes:
    """The cell of a task whose worker died with it."""
    return Cell(task[0], {}, f"{type(error).__name__}: {error}").to_bytes()


def _number(value: Any) -> Any:
    """A tensor of one number as that number."""
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


def _cells(
    grid: Mapping[str, Iterable[Any]],
) -> tuple[dict[str, list[Any]], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """The grid as plain data, and for each cell its parameters as plain data and as they were given."""
    if not isinstance(grid, Mapping) or not grid:
        raise InputError("grid: expected a mapping of names to values, with at least one name")
    if wrong := [name for name in grid if not isinstance(name, str)]:
        raise InputError(f"grid: {wrong[0]!r} is no name of an argument")
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise InputError(f"grid: {name} has {values!r}; expected a list of values")
    axes = {name: list(values) for name, values in grid.items()}
    plain = {name: [_plain(value, name) for value in values] for name, values in axes.items()}
    for name, values in plain.items():
        if not values or len({json.dumps(value) for value in values}) < len(values):
            raise InputError(f"grid: {name} has {values}; expected at least one value, each once")
    parts = zip(itertools.product(*plain.values()), itertools.product(*axes.values()), strict=True)
    return plain, [(dict(zip(axes, left, strict=True)), dict(zip(axes, right, strict=True))) for left, right in parts]


def _plain(value: Any, name: str) -> Any:
    """A value of the grid as JSON has it, by which its cell is known again."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return _plain(value.item(), name)
    if isinstance(value, list | tuple):
        return [_plain(part, name) for part in value]
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value)
    raise InputError(
        f"grid: {name} has a {type(value).__name__}; expected numbers, texts, paths, functions or lists of these. What is "
        "large travels by its path; what has no short form, by a name or number under which the function finds it"
    )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__).replace("<locals>.", "")


def _words(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items())


def _count(grid: Mapping[str, list[Any]]) -> int:
    return math.prod(len(values) for values in grid.values())


def _file(parameters: Mapping[str, Any]) -> str:
    """The name of the file of a cell: readable, and its own."""
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()
    readable = "".join(c if c.isalnum() or c in "=.,-" else "_" for c in _words(parameters).replace(" ", ""))
    return f"{readable[:LONGEST]}-{digest[:12]}.cell"


def _claim(folder: Path, function: Callable[..., Any], names: list[str]) -> None:
    """Note whose sweep a folder holds.

    Raises:
        DataError: it is another one's, or holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = {"function": _name(function), "names": names, "source": _source(function)}
    head = folder / HEAD
    if not head.exists():
        if any(folder.iterdir()):
            raise DataError(f"{folder} is not empty and holds no sweep: name another folder")
    else:
        try:
            theirs = {key: json.loads(head.read_text(encoding="utf-8"))[key] for key in ours}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{head} does not say whose sweep this is ({type(error).__name__}: {error})") from error
        if (theirs["function"], sorted(theirs["names"])) != (ours["function"], sorted(names)):
            found = f"{theirs['function']} over {', '.join(theirs['names'])}"
            raise DataError(
                f"{folder} holds the sweep of {found}, not of {ours['function']} over {', '.join(names)}: name another folder"
            )
        if theirs["source"] != ours["source"]:
            warn(
                f"{ours['function']} has been changed since cells in {folder} were finished; they are not computed again"
            )
            return
    write_text(head, json.dumps(ours))


def _source(function: Callable[..., Any]) -> str:
    """A digest of the text of a function; empty where it has none."""
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError):
        return ""
