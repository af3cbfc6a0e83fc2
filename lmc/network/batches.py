"""What evaluation functions accept as data, brought into one shape: named splits of `(inputs, targets)` batches."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lmc.errors import DataError

Batch = tuple[Any, Any]

# Batches of an iterable are read once and kept up to this many bytes; a longer one is read anew for each weight set.
HELD_BYTES = 1 << 30


@dataclass(frozen=True)
class Split:
    """The batches of one split.

    Attributes:
        name: "train", "test", or "data" where the caller gave a single set.
        batches: `(inputs, targets)` pairs: a list where they are held, else the caller's own iterable.
        whole: one pair holds everything, so that it may be cut into batches of any size.
    """

    name: str
    batches: Iterable[Batch]
    whole: bool = False

    @property
    def held(self) -> bool:
        """The same examples come in the same order each time."""
        return isinstance(self.batches, list)

    @property
    def nbytes(self) -> float:
        """Bytes of the data; infinite where they are not held."""
        return sum(map(_nbytes, self.batches)) if self.held else math.inf

    def largest(self, batch_size: int) -> int:
        """Examples in the longest batch (of an iterable that is not held, in its first)."""
        lengths = [len(targets) for _, targets in (self.batches if self.held else islice(self.batches, 1))]
        return min(max(lengths), batch_size) if self.whole else max(lengths)

    def iterate(self, batch_size: int) -> Iterator[Batch]:
        """The batches; a split given whole is cut into pieces of `batch_size` examples."""
        if not self.whole:
            for batch in self.batches:
                yield _check_batch(batch, self.name)
            return
        inputs, targets = next(iter(self.batches))
        for start in range(0, len(targets), batch_size):
            part = slice(start, start + batch_size)
            yield take(inputs, part), targets[part]


def as_splits(data: Any) -> list[Split]:
    """The splits of `data`: an `(inputs, targets)` pair, an iterable of such batches, or an object with `.train` and `.test`.

    Inputs are a tensor, a tuple of positional tensors, or a mapping of keyword tensors, the example axis first.
    An iterable is read once and held (up to 1 GiB), so that every weight set sees the same examples; a longer
    re-iterable one is read again for each weight set, a longer one-shot iterator is held whatever its size.

    Raises:
        DataError: empty data, inputs and targets of different lengths, or something that is none of the above.
    """
    if hasattr(data, "train") and hasattr(data, "test") and not isinstance(data, torch.nn.Module):
        return [_split(data.train, "train"), _split(data.test, "test")]
    return [_split(data, "data")]


def _split(data: Any, name: str) -> Split:
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor):
        return Split(name, [_check_batch(data, name)], whole=True)
    if isinstance(data, (Tensor, str, Mapping)) or not isinstance(data, Iterable):
        raise DataError(
            f"{name}: expected a pair (inputs, targets), an iterable of such batches, or an object with .train and "
            f".test, got {type(data).__name__}"
        )
    return Split(name, _hold(data, name))


def _hold(batches: Iterable[Any], name: str) -> Iterable[Batch]:
    """The batches as a list, or the iterable itself when it is long and can be read again."""
    one_shot = iter(batches) is batches
    held, size = [], 0
    for batch in batches:
        held.append(_check_batch(batch, name))
        size += _nbytes(held[-1])
        if size > HELD_BYTES and not one_shot and not isinstance(batches, list):
            return batches
    if not held:
        raise DataError(f"{name}: no batches at all; an iterator that was read before is empty, pass a list or a loader")
    return held


def _nbytes(batch: Batch) -> int:
    return sum(tensor.nbytes for tensor in (*tensors(batch[0]), batch[1]))


def _check_batch(batch: Any, name: str) -> Batch:
    if isinstance(batch, Mapping):
        raise DataError(
            f"{name}: expected batches (inputs, targets), got a mapping with {', '.join(map(str, batch))}: split the labels "
            "off, `(inputs, labels)`; the targets of a language model that predicts the next token are the tokens moved "
            'on by one, `({"input_ids": ids[:, :-1]}, ids[:, 1:])`'
        )
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise DataError(f"{name}: expected batches (inputs, targets), got {_describe(batch)}")
    inputs, targets = batch
    leaves = tensors(inputs)
    if not leaves or not isinstance(targets, Tensor):
        raise DataError(
            f"{name}: inputs must be a tensor, a tuple of tensors or a mapping of tensors and targets a tensor, "
            f"got {_describe(inputs)} and {_describe(targets)}"
        )
    if targets.ndim == 0 or len(targets) == 0:
        raise DataError(f"{name}: empty targets of shape {tuple(targets.shape)}; axis 0 counts the examples")
    for leaf in leaves:
        if leaf.ndim == 0 or len(leaf) != len(targets):
            raise DataError(
                f"{name}: inputs of shape {tuple(leaf.shape)} and targets of shape {tuple(targets.shape)} "
                "differ along axis 0, the examples"
            )
    return inputs, targets


def tensors(inputs: Any) -> list[Tensor]:
    """The tensors inside inputs of any accepted form; empty if something else is among them."""
    if isinstance(inputs, Tensor):
        return [inputs]
    leaves = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if not isinstance(leaves, (tuple, list)) or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return []
    return list(leaves)


def check_numbers(inputs: Any, name: str) -> None:
    """Raise `DataError` for inputs that hold NaN, and say where; infinity may be meant, as in an additive mask."""
    for leaf in tensors(inputs):
        if leaf.is_floating_point() and bool(torch.isnan(leaf).any()):
            first = tuple(int(i) for i in torch.isnan(leaf).nonzero()[0])
            raise DataError(f"{name}: inputs of shape {tuple(leaf.shape)} hold NaN, first at {first}")


def take(inputs: Any, index: Any) -> Any:
    """`inputs[index]` along the examples, for inputs of any accepted form."""
    return _map(inputs, lambda tensor: tensor[index])


def to_device(inputs: Any, device: torch.device) -> Any:
    """`inputs.to(device)`, for inputs of any accepted form."""
    return _map(inputs, lambda tensor: tensor.to(device))


def _map(inputs: Any, function: Any) -> Any:
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: function(tensor) for name, tensor in inputs.items()}
    return tuple(function(tensor) for tensor in inputs)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of length {len(value)}"
    return type(value).__name__
