"""Parts of large tensors, and reading from disk what comes next while the present chunk is worked on."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeAlias

from torch import Tensor

from lmc.weights.checkpoint import Checkpoint

Chunk: TypeAlias = slice | None  # of the flattened tensor, from start to stop; None is the whole tensor in its shape
Step = tuple[str, Chunk]
Cut = Literal["whole", "filters", "rows", "entries"]
Load = Callable[[Checkpoint, str, Chunk], Tensor]

VALUES = 1 << 18  # of a chunk: a few chunks fit into the cache of a processor core
DEPTH = 3  # steps that are read ahead


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
