"""All weights of all models, one chunk after the other: what the surveys of merging methods look at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lmc.merge.engine.chunks import Chunk, Cut, blocks
from lmc.merge.engine.tensors import WeightSets

Read = Callable[[str, Chunk], tuple[Any, ...]]


@dataclass(frozen=True)
class Pass:
    """The arguments of a rule for every weight, one at a time; a survey may iterate over it several times.

    Iterating gives `(models, *shape)` tensors, or a tuple of tensors if the rule takes several; all of one dtype. Of
    rules that can be given chunks (`cut`), large tensors come in chunks, flattened.
    """

    sets: WeightSets
    read: Read
    cut: Cut = "whole"

    @property
    def size(self) -> int:
        """The number of values of each model."""
        return sum(self.sets.shells[name].numel() for name in self.sets.weights)

    def __iter__(self) -> Iterator[Any]:
        for name, chunk in self.sets.walk(self.sets.weights, self.cut):
            yield self._values(name, chunk)

    def sample(self) -> Iterator[Any]:
        """The same for up to 2048 short slices, spread evenly over the model; nothing else is read."""
        sizes = {name: self.sets.shells[name].numel() for name in self.sets.weights}
        count = min(2048, max(32, self.size >> 16))
        for name, chunk in blocks(sizes, count, sample_size(self.size) // count):
            yield self._values(name, chunk)

    def of(self, name: str) -> "Pass":
        """The same for one tensor alone."""
        return replace(self, sets=replace(self.sets, weights=(name,)))

    def _values(self, name: str, chunk: Chunk) -> Any:
        first, *rest = (value.to(self.sets.dtype) for value in self.read(name, chunk))
        return (first, *rest) if rest else first


def sample_size(size: int) -> int:
    """The number of values that are a fair sample of `size`: a sixteenth of few, a million of most, a five hundredth of very many."""
    return max(size >> 9, min(size >> 4, 1 << 20))
