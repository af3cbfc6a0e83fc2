"""Parts of large tensors, several tensors side by side, and reading from disk what comes next meanwhile."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor

from lmc.weights.checkpoint import Checkpoint

Chunk: TypeAlias = slice | None  # of the flattened tensor, from start to stop; None is the whole tensor in its shape
Step = tuple[str, Chunk]
Cut = Literal["whole", "filters", "rows", "entries"]
Load = Callable[[Checkpoint, str, Chunk], Tensor]

VALUES = 1 << 18  # of a chunk: a few chunks fit into the cache of a processor core
DEPTH = 3  # steps that are read ahead
AHEAD = 8  # chunks that a worker makes before its turn
Found = TypeVar("Found")
Made: TypeAlias = tuple[str, Chunk, Tensor]


def grain(tensor: Tensor, cut: Cut) -> int:
    """The number of values in sequence that no cut may part.

    Those of an entry, of a row (last axis; a vector is one row), of a filter (everything at one place of the first
    axis; a vector is one filter), or all.
    """
    size = tensor.numel()
    if cut == "entries":
        return 1
    if cut == "filters" and tensor.ndim > 1:
        return size // max(1, tensor.shape[0])
    return tensor.shape[-1] if cut == "rows" and tensor.ndim > 1 else size


def chunks(tensor: Tensor, cut: Cut = "entries") -> list[Chunk]:
    """The chunks of a tensor: of one on an accelerator, whose memory this does not spare, the whole."""
    size = tensor.numel()
    if size <= VALUES or tensor.device.type not in ("cpu", "meta"):
        return [None]
    together = grain(tensor, cut)
    step = max(1, VALUES // together) * together
    return [None] if step >= size else [slice(start, min(start + step, size)) for start in range(0, size, step)]


def blocks(sizes: Mapping[str, int], count: int, length: int) -> Iterator[tuple[str, slice]]:
    """About `count` short slices spread evenly over all tensors one after the other, `length` values each or fewer."""
    total = sum(sizes.values())
    stride = max(length, total // count) | 1  # odd, so that blocks begin at all places of a row
    begin, at = 0, stride // 2
    for name, size in sizes.items():
        while at < begin + size:
            start = at - begin
            yield name, slice(start, min(start + length, size))
            at += stride
        begin += size


class Latest(threading.local):
    """What was found of the tensor that a thread is at, whose chunks come together."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._found: dict[str, Any] = {}

    def __call__(self, name: str, what: str, find: Callable[[], Found]) -> Found:
        """`find()`, asked once for the tensor `name`."""
        if name != self._name:
            self._name, self._found = name, {}
        if what not in self._found:
            self._found[what] = find()
        return self._found[what]


def side_by_side(
    names: Iterable[str], made: Callable[[Sequence[str]], Iterator[Made]], workers: int
) -> Generator[Made, None, None]:
    """`made(names)`, in order, with each tensor made by a thread of its own, `workers` at a time.

    A thread that is ahead of its turn waits when it has made a few chunks.
    """
    if workers == 1:
        yield from made(list(names))
        return
    ended, names = threading.Event(), iter(names)
    waiting: deque[tuple[Future[None], queue.Queue[Made | None]]] = deque()

    def give(name: str, place: "queue.Queue[Made | None]") -> None:
        try:
            for found in made([name]):
                if not _put(place, found, ended):
                    return
        finally:
            _put(place, None, ended)

    with ThreadPoolExecutor(workers, thread_name_prefix="merge") as pool:
        try:
            while True:
                while len(waiting) < workers and (name := next(names, None)) is not None:
                    place: queue.Queue[Made | None] = queue.Queue(AHEAD)
                    waiting.append((pool.submit(give, name, place), place))
                if not waiting:
                    return
                done, place = waiting.popleft()
                while (found := place.get()) is not None:
                    yield found
                done.result()
        finally:
            ended.set()


def _put(place: "queue.Queue[Made | None]", found: Made | None, ended: threading.Event) -> bool:
    """Wait for room; False where the reader has gone."""
    while not ended.is_set():
        try:
            place.put(found, timeout=0.5)
        except queue.Full:
            continue
        return True
    return False


class Ahead:
    """Tensors that threads have read, or are reading, for the steps to come. Tensors in it are shared: nothing changes them."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Future[Tensor]] = {}

    def take(self, state: Mapping[str, Tensor], name: str, chunk: Chunk) -> Tensor | None:
        """The tensor, if it was read ahead."""
        future = self._held.get(_key(state, name, chunk))
        return None if future is None else future.result()

    def walk(
        self, steps: Iterable[Step], shells: Mapping[str, Tensor], lazy: Sequence[Checkpoint], load: Load
    ) -> Iterator[Step]:
        """The steps; while one is worked on, `load` reads the next ones from each checkpoint.

        Whole tensors that are large are not read ahead, which would take memory for one more of each.
        """
        if not lazy:
            yield from steps
            return
        steps, waiting = iter(steps), deque[tuple[Step, list[tuple[Any, ...]]]]()
        with ThreadPoolExecutor(min(len(lazy), 4), thread_name_prefix="read") as pool:
            try:
                while True:
                    while len(waiting) <= DEPTH and (step := next(steps, None)) is not None:
                        waiting.append((step, self._begin(step, shells, lazy, load, pool)))
                    if not waiting:
                        return
                    yield waiting[0][0]
                    self._drop(waiting.popleft()[1])
            finally:
                for _, keys in waiting:
                    self._drop(keys)

    def _begin(
        self,
        step: Step,
        shells: Mapping[str, Tensor],
        lazy: Sequence[Checkpoint],
        load: Load,
        pool: ThreadPoolExecutor,
    ) -> list[tuple[Any, ...]]:
        name, chunk = step
        small = chunk is not None or shells[name].numel() <= VALUES
        if not small or not shells[name].is_floating_point():
            return []
        keys = []
        for state in lazy:
            key = _key(state, name, chunk)
            if key not in self._held:
                self._held[key] = pool.submit(load, state, name, chunk)
                keys.append(key)
        return keys

    def _drop(self, keys: Iterable[tuple[Any, ...]]) -> None:
        for key in keys:
            self._held.pop(key).cancel()


def _key(state: Mapping[str, Tensor], name: str, chunk: Chunk) -> tuple[Any, ...]:
    return (id(state), name) if chunk is None else (id(state), name, chunk.start, chunk.stop)
