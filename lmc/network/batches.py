"""Forms of data that functions accept, brought into one shape: named splits of `(inputs, targets)` batches."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lmc.errors import DataError

Batch = tuple[Any, Tensor]
TargetsOf = Callable[[Any, Tensor | None], Tensor]  # (inputs, targets or None) -> targets

# Batches of an iterable are read once and kept up to this many bytes; a longer one is read again for each weight set.
HELD_BYTES = 1 << 30
DATASET_BATCH = 256  # examples that are drawn from a map-style data set at a time
LABELS = ("labels", "label", "targets", "target", "y")  # entries of mappings and data objects that hold targets
SPLITS = {"train", "val", "valid", "validation", "dev", "eval", "test"}  # of mappings of sets, also of tensors
IGNORED = -100  # target of positions that do not count, the convention of torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class TaskData:
    """Data together with the task by which they are judged; `Task.on` makes it.

    The splits of the data, `.train`, `.validation` and `.test` where it has them, come with the task, too.
    """

    data: Any
    task: Any

    def __getattr__(self, name: str) -> "TaskData":
        if name in ("train", "validation", "test"):
            if isinstance(self.data, Mapping) and name in self.data:
                return TaskData(self.data[name], self.task)
            if hasattr(self.data, name):
                return TaskData(getattr(self.data, name), self.task)
        raise AttributeError(name)


@dataclass(frozen=True)
class Split:
    """The batches of one split.

    Attributes:
        name: "train", "test", or "data" where the caller gave a single set.
        batches: `(inputs, targets)` pairs: a list where they are held, else an iterable of the caller's batches.
        whole: one pair holds everything, so that it may be cut into batches of any size.
        labels: the key of mappings under which the targets came, None for other batches.
    """

    name: str
    batches: Iterable[Batch]
    whole: bool = False
    labels: str | None = None

    @property
    def held(self) -> bool:
        """The same examples come in the same order each time."""
        return isinstance(self.batches, list)

    @property
    def nbytes(self) -> float:
        """Bytes of the data; infinite where they are not held."""
        return sum(map(_nbytes, self.batches)) if self.held else math.inf

    def largest(self, batch_size: int) -> int:
        """Targets along axis 0 of the longest batch (of an iterable that is not held, of its first)."""
        lengths = [len(targets) for _, targets in (self.batches if self.held else islice(self.batches, 1))]
        return min(max(lengths), batch_size) if self.whole else max(lengths)

    def iterate(self, batch_size: int) -> Iterator[Batch]:
        """The batches; a split given whole is cut into pieces of `batch_size` examples."""
        if not self.whole:
            yield from self.batches
            return
        inputs, targets = next(iter(self.batches))
        for start in range(0, len(targets), batch_size):
            part = slice(start, start + batch_size)
            yield take(inputs, part), targets[part]

    def counting(self, weight: Callable[[Tensor], int]) -> "Split":
        """Without the examples, or the batches, in which no target counts: their mean loss is 0 / 0.

        Raises:
            DataError: there are no others.
        """
        if not self.held:
            return replace(self, batches=_Counting(self.batches, weight))
        kept = [batch for batch in self.batches if weight(batch[1])]
        if not kept:
            raise DataError(f"{self.name}: no target counts")
        if self.whole and weight(kept[0][1]) < kept[0][1].numel():
            inputs, targets = kept[0]
            rows = torch.tensor([weight(row[None]) > 0 for row in targets.cpu()]).to(targets.device)
            kept = kept if bool(rows.all()) else [(take(inputs, rows), targets[rows])]
        return replace(self, batches=kept)

    def shuffled(self, batch_size: int, generator: torch.Generator, *, drop_last: bool = False) -> Iterator[Batch]:
        """The batches of one epoch in random order; those of an iterable that is not held come in its own.

        Args:
            drop_last: leave out an incomplete last batch of a split given whole, unless it is the only one.
        """
        if self.whole:
            inputs, targets = next(iter(self.batches))
            for index in torch.randperm(len(targets), generator=generator).split(batch_size):
                if len(index) == min(batch_size, len(targets)) or not drop_last:
                    index = index.to(targets.device)
                    yield take(inputs, index), targets[index]
        elif isinstance(self.batches, list):
            for i in torch.randperm(len(self.batches), generator=generator).tolist():
                yield self.batches[i]
        else:
            yield from self.batches


class _Counting:
    """A long iterable of batches without those in which no target counts."""

    def __init__(self, batches: Iterable[Batch], weight: Callable[[Tensor], int]) -> None:
        self._batches, self._weight = batches, weight

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch in self._batches if self._weight(batch[1]))


def as_splits(data: Any, targets_of: TargetsOf | None = None) -> list[Split]:
    """The splits of `data`, "train" first and "test" last.

    One set of examples is

    - a pair `(inputs, targets)`, or a tuple of tensors of which the last holds the targets;
    - a mapping of tensors with "labels" (or "label", "targets", "target", "y") among them;
    - a `torch.utils.data.Dataset`;
    - a data object with the targets as attribute `y` or `labels`, which is called as one batch (a graph);
    - an iterable of batches of these forms, for example a `DataLoader`.

    Several sets come as an object with `.train` and `.test`, as a mapping such as `{"train": ..., "test": ...}`, or as a
    data object with `train_mask` and `test_mask`, which say whose targets count.

    Inputs are a tensor, a tuple of positional tensors, a mapping of keyword tensors, or a data object, the example axis
    first. Where the tensors of a batch do not count the same examples along axis 0 (nodes and edges of a graph), the
    batch is one call of the module and is never cut. An iterable is read once and held (up to 1 GiB), so that every
    weight set sees the same examples; a longer re-iterable one is read again for each weight set, a longer one-shot
    iterator is held whatever its size.

    Args:
        targets_of: makes the targets from inputs and the targets given, None where there are none; for tasks whose
            targets are in the inputs.

    Raises:
        DataError: empty data, inputs and targets of different lengths, or something that is none of the above.
    """
    if isinstance(data, TaskData):
        data, targets_of = data.data, data.task.targets if targets_of is None else targets_of
    if hasattr(data, "train") and hasattr(data, "test") and not isinstance(data, torch.nn.Module):
        named = {"train": data.train, "test": data.test}
    elif (
        isinstance(data, Mapping)
        and data
        and (data.keys() <= SPLITS or not any(isinstance(value, Tensor) for value in data.values()))
    ):
        named = {str(name): data[name] for name in sorted(data, key=lambda n: {"train": 0, "test": 2}.get(n, 1))}
    else:
        named = masked(data) or {"data": data}
    return [_split(part, name, targets_of) for name, part in named.items()]


def reread(data: Any) -> Any:
    """Data for functions that go through them several times: with lists in place of iterators, those of splits, too."""
    if isinstance(data, TaskData):
        return data.task.on(reread(data.data))
    if isinstance(data, Iterator):
        return list(data)
    if isinstance(data, Mapping) and any(isinstance(part, Iterator | TaskData) for part in data.values()):
        return {name: reread(part) for name, part in data.items()}
    if hasattr(data, "train") and hasattr(data, "test") and not isinstance(data, torch.nn.Module):
        sets = {name: getattr(data, name) for name in ("train", "validation", "test") if hasattr(data, name)}
        if any(isinstance(part, Iterator) for part in sets.values()):
            return SimpleNamespace(**{name: reread(part) for name, part in sets.items()})
    return data


def masked(data: Any) -> dict[str, Any]:
    """One set for each of the masks `train_mask`, `val_mask` and `test_mask` of a data object; else none."""
    masks = {name: getattr(data, f"{name}_mask", None) for name in ("train", "val", "test")}
    found = {name: mask for name, mask in masks.items() if isinstance(mask, Tensor)}
    targets = getattr(data, "y", None)
    if not (isinstance(targets, Tensor) and {"train", "test"} <= found.keys()):
        return {}
    return {name: [(data, targets.masked_fill(~mask, IGNORED))] for name, mask in found.items()}


def from_numpy(data: Any) -> Any:
    """Data with tensors in place of numpy's arrays, alone or in tuples, lists and mappings."""
    if isinstance(data, np.ndarray) and data.dtype.kind in "biufc":
        native = data.astype(data.dtype.newbyteorder("="), copy=False)
        plain = native.flags.writeable and min(native.strides, default=0) >= 0  # else a tensor cannot share its memory
        return torch.from_numpy(native if plain else native.copy())
    if isinstance(data, Mapping):
        found = {key: from_numpy(value) for key, value in data.items()}
        return found if any(found[key] is not value for key, value in data.items()) else data
    if type(data) in (tuple, list) and any(isinstance(part, np.ndarray | tuple | list | Mapping) for part in data):
        parts = [from_numpy(part) for part in data]
        return type(data)(parts) if any(x is not y for x, y in zip(parts, data, strict=True)) else data
    return data


def _split(data: Any, name: str, targets_of: TargetsOf | None) -> Split:
    data = from_numpy(data)
    if isinstance(data, TensorDataset):
        data = data.tensors
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=DATASET_BATCH)
    one = isinstance(data, Tensor | Mapping) or is_object(data)
    if isinstance(data, (tuple, list)):
        unlabelled = (
            targets_of is not None and isinstance(data, list) and isinstance(data[0], Tensor) if data else False
        )
        one = len(data) == 2 and isinstance(data[1], Tensor) and not unlabelled  # a list of tensors may be batches
        one = one or (isinstance(data, tuple) and len(data) != 2 and all(isinstance(part, Tensor) for part in data))
    if one:
        inputs, targets = batch = _pair(data, name, targets_of)
        fits = cuttable(inputs, targets)
        if (
            not fits
            and not any(leaf.ndim and len(leaf) == len(targets) for leaf in tensors(inputs))
            and not is_object(inputs)
        ):
            raise _lengths_differ(inputs, targets, name)
        return Split(name, [batch], whole=fits, labels=_label_of(data))
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise _no_data(data, name)
    batches, first = _hold(data, name, targets_of)
    return Split(name, batches, labels=_label_of(first))


class _Batches:
    """A long iterable of batches, each brought into the form of a pair as it is read."""

    def __init__(self, batches: Iterable[Any], name: str, targets_of: TargetsOf | None) -> None:
        self._batches, self._name, self._targets_of = batches, name, targets_of

    def __iter__(self) -> Iterator[Batch]:
        return (_batch(batch, self._name, self._targets_of) for batch in self._batches)


def _hold(batches: Iterable[Any], name: str, targets_of: TargetsOf | None) -> tuple[Iterable[Batch], Any]:
    """The batches as a list, or read again each time when they are long and can be; and the first one as it came."""
    one_shot = iter(batches) is batches
    held, size, first = [], 0, None
    for batch in batches:
        first = batch if first is None else first
        held.append(_batch(batch, name, targets_of))
        size += _nbytes(held[-1])
        if size > HELD_BYTES and not one_shot and not isinstance(batches, list):
            return _Batches(batches, name, targets_of), first
    if not held:
        raise DataError(
            f"{name}: no batches at all; an iterator that was read before is empty, pass a list or a loader"
        )
    return held, first


def _nbytes(batch: Batch) -> int:
    return sum(tensor.nbytes for tensor in (*tensors(batch[0]), batch[1]))


def _batch(batch: Any, name: str, targets_of: TargetsOf | None) -> Batch:
    """One batch of an iterable; a single tensor of inputs must have as many examples as there are targets."""
    inputs, targets = _pair(batch, name, targets_of)
    if isinstance(inputs, Tensor) and not cuttable(inputs, targets):
        raise _lengths_differ(inputs, targets, name)
    return inputs, targets


def _pair(batch: Any, name: str, targets_of: TargetsOf | None) -> Batch:
    """Inputs and targets of a batch of any accepted form."""
    batch = from_numpy(batch)
    label = _label_of(batch)
    if isinstance(batch, Mapping):
        inputs, targets = (
            {key: value for key, value in batch.items() if key != label},
            None if label is None else batch[label],
        )
    elif is_object(batch):
        inputs, targets = batch, None if label is None else fields(batch)[label]
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        inputs, targets = batch[0] if len(batch) == 2 else tuple(batch[:-1]), batch[-1]
    elif isinstance(batch, (tuple, list)) and len(batch) == 1 and targets_of is not None:
        inputs, targets = batch[0], None
    else:
        inputs, targets = batch, None
    if targets_of is not None and tensors(inputs):
        targets = targets_of(inputs, targets if isinstance(targets, Tensor) else None)
    elif isinstance(batch, Mapping) and targets is None:
        raise DataError(
            f"{name}: expected batches (inputs, targets), got a mapping with {', '.join(map(str, batch))}, none of which is "
            f"{' or '.join(LABELS)}; split the labels off, `(inputs, labels)`. For a language model that predicts the next "
            "token pass loss=lmc.Task.language()"
        )
    elif targets is None:
        raise _no_data(batch, name)
    if not tensors(inputs) or not isinstance(targets, Tensor):
        raise DataError(
            f"{name}: inputs must be a tensor, a tuple of tensors, a mapping of tensors or a data object and targets a "
            f"tensor, got {_describe(inputs)} and {_describe(targets)}"
        )
    if targets.ndim == 0 or len(targets) == 0:
        single = (
            ", this is a single one: put them together, DataLoader(data, batch_size=...)" if targets.ndim == 0 else ""
        )
        raise DataError(f"{name}: empty targets of shape {tuple(targets.shape)}; axis 0 counts the examples{single}")
    return inputs, targets


def _label_of(batch: Any) -> str | None:
    """The entry of a mapping or data object that holds the targets."""
    known = batch if isinstance(batch, Mapping) else fields(batch) if is_object(batch) else {}
    return next((name for name in LABELS if isinstance(known.get(name), Tensor)), None)


def is_object(batch: Any) -> bool:
    """True for a data object: neither a form that torch collates to nor an iterable of batches."""
    if batch is None or isinstance(
        batch, Tensor | Mapping | tuple | list | str | Dataset | DataLoader | torch.nn.Module
    ):
        return False
    if isinstance(batch, Iterable) and not hasattr(batch, "to_dict"):
        return False
    return any(isinstance(value, Tensor) for value in fields(batch).values())


def fields(data: Any) -> dict[str, Any]:
    """The entries of a data object by name."""
    # torch_geometric keeps its entries in stores, not in attributes.
    return dict(data.to_dict() if hasattr(data, "to_dict") else getattr(data, "__dict__", {}))


def cuttable(inputs: Any, targets: Tensor) -> bool:
    """True where every tensor counts the examples along axis 0, so that a batch can be cut."""
    return not is_object(inputs) and all(leaf.ndim and len(leaf) == len(targets) for leaf in tensors(inputs))


def _lengths_differ(inputs: Any, targets: Tensor, name: str) -> DataError:
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tensors(inputs))
    return DataError(
        f"{name}: inputs of shape {shapes} and targets of shape {tuple(targets.shape)} differ along axis 0, the examples. "
        "One call of the module with tensors of several lengths (a graph) is a list of one batch, [(inputs, targets)], "
        "its inputs a tuple, a mapping or a data object"
    )


def _no_data(data: Any, name: str) -> DataError:
    return DataError(
        f"{name}: expected a pair (inputs, targets), an iterable of such batches, or an object with .train and .test, "
        f"got {_describe(data)}"
    )


def tensors(inputs: Any) -> list[Tensor]:
    """The tensors inside inputs of any accepted form."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        leaves = list(inputs.values())
    else:
        leaves = inputs if isinstance(inputs, (tuple, list)) else list(fields(inputs).values())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def head(batch: Batch, count: int) -> Batch:
    """The first examples of a batch; all of one that cannot be cut."""
    inputs, targets = batch
    return (take(inputs, slice(count)), targets[:count]) if cuttable(inputs, targets) else batch


def check_numbers(inputs: Any, name: str) -> None:
    """Raise `DataError` for inputs that hold NaN, and say where; infinity may be meant, as in an additive mask."""
    for leaf in tensors(inputs):
        if leaf.is_floating_point() and not leaf.is_meta and bool(torch.isnan(leaf).any()):
            first = tuple(int(i) for i in torch.isnan(leaf).nonzero()[0])
            raise DataError(f"{name}: inputs of shape {tuple(leaf.shape)} hold NaN, first at {first}")


def take(inputs: Any, index: Any) -> Any:
    """`inputs[index]` along the examples, for inputs of any accepted form.

    What is spread over memory is put together: modules and losses may ask for a `.view` of it.
    """
    spread = isinstance(index, slice) and index.step is not None
    return mapped(inputs, lambda tensor: tensor[index].contiguous() if spread else tensor[index])


def to_device(inputs: Any, device: torch.device) -> Any:
    """`inputs.to(device)`, for inputs of any accepted form."""
    if hasattr(inputs, "to") and is_object(inputs):
        return inputs.to(device)
    return mapped(inputs, lambda tensor: tensor.to(device))


def mapped(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Inputs of any accepted form with `function` of every tensor in its place."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: function(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    if is_object(inputs):
        copied = copy.copy(inputs)
        for name, value in fields(inputs).items():
            if isinstance(value, Tensor):
                try:
                    setattr(copied, name, function(value))
                except AttributeError:  # of a frozen dataclass
                    vars(copied)[name] = function(value)
        return copied
    return tuple(function(value) if isinstance(value, Tensor) else value for value in inputs)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of length {len(value)}"
    return type(value).__name__
