"""Many tasks on the workers of an executor: what all of them need is sent once, results come as they are done.

An executor is any `concurrent.futures.Executor`, or the client of a dask cluster, whose own executor is taken. A worker
is whatever runs its tasks: a process, a thread, a process on another machine.
"""

import functools
import inspect
import multiprocessing
import os
import pickle
import queue
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmc.core.extras import require
from lmc.core.files import __version__
from lmc.errors import InputError, WorkerError

SMALL = 1 << 16  # bytes that go with each task; more is written to a file, or scattered
ATTEMPTS = 3  # at sending what is shared, where the workers that held it were lost
TRIES = 2  # of a task whose process dies
PATIENCE = 20.0  # seconds after which it is asked whether a scheduler is still there
DEEP = 6  # steps into an object, to say which part of it cannot be pickled

Task = Callable[[Any], Any]
Crew = Callable[[Sequence[Any]], Iterator[tuple[int, Any]]]
_HELD = threading.local()  # of a worker: what it has made of what was sent last


def spread(
    executor: Any,
    make: Callable[..., Task],
    shared: Mapping[str, Any],
    tasks: Sequence[Any],
    *,
    lost: Callable[[Any, Exception], Any] | None = None,
) -> Iterator[tuple[int, Any]]:
    """`(i, make(**shared)(tasks[i]))` for each task, as they are done; each exactly once.

    `make` runs once in each worker. In another process torch uses one thread.

    Args:
        executor: None works here, one task after the other.
        lost: gives what stands for a task whose worker died with it, however often it was tried; None: an error ends all.

    Raises:
        InputError: no executor, or one that takes no more work; something in `shared` that cannot be pickled.
        WorkerError: workers that are gone, or that have another version of this package. What the tasks raise.
    """
    with crew(executor, make, shared, lost=lost) as work:
        yield from work(tasks)


@contextmanager
def crew(
    executor: Any,
    make: Callable[..., Task],
    shared: Mapping[str, Any],
    *,
    lost: Callable[[Any, Exception], Any] | None = None,
) -> Iterator[Crew]:
    """As `spread`, for tasks that come in several turns: `for i, result in work(tasks)`; what is shared is sent once."""
    if executor is None:
        task = make(**shared)
        yield lambda tasks: ((i, task(each)) for i, each in enumerate(tasks))
        return
    executor = as_executor(executor)
    client = getattr(executor, "_client", None)  # of dask
    with _sent(executor, pack(make, shared)) as send:
        held: list[Any] = []  # what is sent, under which key

        def turn(tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
            left = dict(enumerate(tasks))
            suspects: set[int] = set()
            cancellations = 0
            while left:
                # Dask blames a task for a worker that died while the task waited on it: such are tried alone in the end.
                alone = [min(suspects)] if suspects == left.keys() else []
                cancelled = False
                if not held:
                    held[:] = secrets.token_hex(8), send()
                futures: dict[Future[Any], int] = {}
                gone: WorkerError | None = None
                try:
                    for i in alone or left:
                        futures[_submit(executor, _work, __version__, os.getpid(), *held, left[i])] = i
                    for future in _as_done(futures, client):
                        i = futures[future]
                        try:
                            result = future.result()
                        except CancelledError as error:
                            held.clear()  # all that held what was sent are gone: it is sent again
                            cancelled = True
                            if cancellations + 1 == ATTEMPTS:
                                gone = WorkerError(f"the workers, or their scheduler, are gone ({error})")
                            continue
                        except BrokenExecutor as error:
                            gone = WorkerError(
                                f"a worker died and took the whole executor with it ({error}): pass a new one; what was "
                                "finished is kept where it has a place"
                            )
                            continue  # others may have been finished before
                        except Exception as error:
                            if not _died(error) or lost is None:
                                raise
                            if client is not None and not alone:
                                suspects.add(i)
                                continue
                            result = lost(left[i], error)
                        suspects.discard(i)
                        del left[i]
                        yield i, result
                finally:  # after an interrupt or an error, what has not begun does not begin
                    for future in futures if getattr(client, "status", "") != "closed" else ():
                        future.cancel()
                if gone is not None:
                    raise gone
                cancellations += cancelled

        yield turn


def as_executor(executor: Any) -> Executor:
    """The executor itself, or that of a dask client.

    Raises:
        InputError: it is neither.
    """
    if isinstance(executor, Executor):
        return executor
    if hasattr(executor, "get_executor"):
        return executor.get_executor(pure=False)  # pure tasks of equal arguments would be one task
    raise InputError(
        f"executor: expected a concurrent.futures.Executor or a dask Client, got {type(executor).__name__}"
    )


def pack(make: Callable[..., Task], shared: Mapping[str, Any]) -> bytes:
    """Both pickled, functions of notebooks and of other functions by value.

    Raises:
        InputError: the part that cannot be pickled.
        MissingPackageError: a function that only cloudpickle can pickle.
    """
    try:
        return _dumps((make, dict(shared)))
    except Exception as error:
        for name, value in shared.items():
            if not _picklable(value):
                raise InputError(
                    f"{_culprit(value, name, DEEP)} cannot be sent to a worker ({type(error).__name__}: {error}): "
                    "make it inside the function, or pass a path to a file"
                ) from error
        raise


class Processes(Executor):
    """Processes on this machine. One that dies is replaced, and only the task that it worked on is tried again.

    Each process is a pool of its own: a pool of several breaks as a whole, and does not say whose task it was.
    """

    def __init__(self, count: int) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise WorkerError(f"called while a worker imports the script that started it: {_GUARD}")
        self._idle: queue.SimpleQueue[ProcessPoolExecutor | None] = queue.SimpleQueue()
        self._pools: set[ProcessPoolExecutor] = set()
        self._closed = False
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="worker")  # each waits for one process
        for _ in range(count):
            self._idle.put(None)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._threads.submit(self._run, fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all processes at once, whatever they are at."""
        self._closed = True
        for process in [process for pool in list(self._pools) for process in _processes(pool)]:
            process.kill()
        self._threads.shutdown(wait, cancel_futures=True)
        for pool in list(self._pools):
            pool.shutdown(wait, cancel_futures=True)

    def _run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ended = "before it began"
        for _ in range(TRIES):
            pool = self._idle.get()
            try:
                if self._closed:
                    break
                pool = pool or self._new()
                future = pool.submit(fn, *args, **kwargs)
                alive = _processes(pool)
                try:
                    return future.result()
                except BrokenExecutor:
                    self._pools.discard(pool)
                    pool.shutdown()
                    pool, ended = None, _ending(alive)
            finally:
                self._idle.put(pool)
        raise DiedWithTask(f"the process that ran this died: {ended}")

    def _new(self) -> ProcessPoolExecutor:
        """A process that is ready to work.

        Raises:
            WorkerError: it does not start.
        """
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of torch hold
        pool = ProcessPoolExecutor(1, mp_context=context, initializer=_quietly)
        self._pools.add(pool)
        try:
            pool.submit(os.getpid).result()
        except BrokenExecutor as error:
            raise WorkerError(f"a worker process ends before it is ready; {_GUARD}") from error
        return pool


class DiedWithTask(WorkerError):
    """A process died with one task, more than once; the other tasks go on."""


_GUARD = "a script must call this below `if __name__ == '__main__':`, since every worker imports the script"


def _work(version: str, sender: int, key: str, sent: Any, task: Any) -> Any:
    """Runs in the worker."""
    if version != __version__:
        where = f"the worker {os.getpid()} on {socket.gethostname()}"
        raise WorkerError(f"{where} has lmc {__version__}, the caller {version}: install one version everywhere")
    held = getattr(_HELD, "last", None)
    if held is None or held[0] != key:
        make, shared = pickle.loads(Path(sent).read_bytes() if isinstance(sent, str) else sent)
        if os.getpid() != sender and "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # the workers share the processors
        held = _HELD.last = key, make(**shared)
    return held[1](task)


@contextmanager
def _sent(executor: Executor, content: bytes) -> Iterator[Callable[[], Any]]:
    """A function that sends content to where the workers are, and gives what a task needs to get it."""
    client = getattr(executor, "_client", None)  # of dask: its workers may be on other machines
    if len(content) <= SMALL:
        yield lambda: content
    elif client is not None:
        yield lambda: client.scatter([content], broadcast=True, hash=False)[0]
    else:
        with tempfile.TemporaryDirectory(prefix="lmc-") as folder:
            file = Path(folder, "shared.pickle")
            file.write_bytes(content)
            yield lambda: str(file)


def _submit(executor: Executor, *call: Any) -> Future[Any]:
    try:
        return executor.submit(*call)
    except BrokenExecutor as error:
        raise WorkerError(f"executor: a worker of it died ({error}): pass a new one") from error
    except RuntimeError as error:
        raise InputError(f"executor: it takes no more work ({error}): pass a new one") from error


def _as_done(futures: Iterable[Future[Any]], client: Any) -> Iterator[Future[Any]]:
    """Futures as they are done; those of a scheduler that is gone never are.

    Raises:
        WorkerError: the client has given up to reach its scheduler.
    """
    waiting = set(futures)
    while waiting:
        try:
            for future in as_completed(waiting, timeout=None if client is None else PATIENCE):
                waiting.discard(future)
                yield future
        except TimeoutError:
            if client is not None and client.status == "closed":
                raise WorkerError("the scheduler is gone: connect to a new one") from None


def _died(error: Exception) -> bool:
    """Whether a task ended because its worker died with it each time.

    Raises:
        WorkerError: the workers are not like the caller.
    """
    if isinstance(error, ImportError | AttributeError) and "lmc" in str(error):
        raise WorkerError(f"the workers lack this version of lmc ({error}): install it there") from error
    return isinstance(error, DiedWithTask) or type(error).__module__.partition(".")[0] == "distributed"


def _dumps(value: Any) -> bytes:
    try:
        import cloudpickle
    except ImportError:
        cloudpickle = None
    if cloudpickle is not None:
        return cloudpickle.dumps(value)
    try:
        return pickle.dumps(value)
    except (AttributeError, pickle.PicklingError) as error:
        if "pickle" in str(error):  # by name only, which functions inside others do not have
            require("cloudpickle")
        raise


def _picklable(value: Any) -> bool:
    try:
        _dumps(value)
    except Exception:
        return False
    return True


def _culprit(value: Any, name: str, steps: int) -> str:
    """The innermost part of a value that cannot be pickled, by the way to it."""
    for step, part in _parts(value).items() if steps else ():
        if not _picklable(part):
            return _culprit(part, f"{name} > {step}", steps - 1)
    return f"{name} ({type(value).__name__})"


def _parts(value: Any) -> dict[str, Any]:
    """The parts of a value, by name."""
    if isinstance(value, functools.partial):
        return {"function": value.func, **value.keywords} | {f"[{i}]": part for i, part in enumerate(value.args)}
    if inspect.ismethod(value):
        return {"its object": value.__self__}
    if inspect.isfunction(value):
        seen = inspect.getclosurevars(value)
        return {**seen.globals, **seen.nonlocals} | {f"default {i}": p for i, p in enumerate(value.__defaults__ or ())}
    if isinstance(value, Mapping):
        return {f"[{key!r}]": part for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return {f"[{i}]": part for i, part in enumerate(value)}
    return dict(getattr(value, "__dict__", {}))


def _quietly() -> None:
    """In a worker: an interrupt of the caller's is for the caller, who decides what becomes of the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _processes(pool: ProcessPoolExecutor) -> list[Any]:
    return list((getattr(pool, "_processes", None) or {}).values())  # Python 3.14 has methods that end them


def _ending(processes: Sequence[Any]) -> str:
    """The end of processes, in words."""
    codes = [process.exitcode for process in processes if process.exitcode is not None]
    if not codes:
        return "it is gone"
    if codes[0] < 0:
        name = signal.Signals(-codes[0]).name
        return f"by {name}" + (", most often for lack of memory" if name == "SIGKILL" else "")
    return f"with exit status {codes[0]}"
