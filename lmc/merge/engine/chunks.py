"""Parts of large tensors."""

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor

Chunk: TypeAlias = slice | None  # of the flattened tensor, from start to stop; None is the whole tensor in its shape
Cut = Literal["whole", "filters", "rows", "entries"]

VALUES = 1 << 18  # of a chunk: a few chunks fit into the cache of a processor core
Found = TypeVar("Found")
Made: TypeAlias = tuple[str, Chunk, Tensor]
Make: TypeAlias = Callable[[Iterable[str]], Iterator[Made]]  # the tensors of these names, in chunks, in this order


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
    """Memory of what was found of the tensor that a thread is at, or of some that belong together."""

    def __init__(self) -> None:
        self._at: Hashable = None
        self._found: dict[str, Any] = {}

    def __call__(self, at: Hashable, what: str, find: Callable[[], Found]) -> Found:
        """`find()`, asked once for the tensor of this name, or for whatever else the thread is at."""
        if at != self._at:
            self._at, self._found = at, {}  # what was found before is let go of first
        if what not in self._found:
            self._found[what] = find()
        return self._found[what]
