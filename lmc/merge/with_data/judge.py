"""The common ground of methods with data: examples with targets or without, and the measure of weights on validation data."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lmc.errors import DataError, InputError, WeightsError
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.network.batches import (
    DATASET_BATCH,
    LABELS,
    SPLITS,
    TaskData,
    as_splits,
    check_numbers,
    cuttable,
    masked,
    reread,
    take,
    tensors,
)
from lmc.network.batchnorm import Recalibrator, calls_in
from lmc.network.inputs import required_arguments, with_decoder
from lmc.network.network import Network, pick_device, whole
from lmc.network.task import Loss, Task
from lmc.weights import Weights, check_finite


def splits(data: Any) -> bool:
    """Whether data are a mapping of splits, `{"train": ..., "test": ...}`."""
    named = isinstance(data, Mapping) and {"train", "test"} <= data.keys()
    return named and (data.keys() <= SPLITS or not isinstance(data["train"], Tensor))


def is_measure(validation: Any) -> bool:
    """Whether `validation` is a function of weights, and not data: those of torch_geometric can be called, too."""
    return callable(validation) and not hasattr(validation, "to_dict")


def chosen(data: Any) -> Any:
    """The one set of examples in `data`: `.validation` of a data set that has it, else `.train`, never `.test`."""
    if isinstance(data, TaskData):
        return data.task.on(chosen(data.data))
    if sets := masked(data):
        return sets.get("val", sets["train"])
    if splits(data):
        data = SimpleNamespace(**data)
    for name in ("validation", "train"):
        if hasattr(data, name) and not isinstance(data, nn.Module):
            return getattr(data, name)
    return data


def batches(
    data: Any, what: str, *, limit: int | None, size: int, model: nn.Module | None = None
) -> Iterator[tuple[Any, Tensor | None]]:
    """Batches `(inputs, targets or None)` of at most `size` examples.

    Args:
        data: `(inputs, targets)`, an iterable of such batches, a data set (see `chosen`), or inputs alone: a tensor, a
            mapping of tensors, or an iterable of these. A batch that is one call (a graph) comes as it is.
        what: how messages call the data.
        limit: use this many examples, spread evenly over data given whole, the first ones of an iterable.
        model: what the inputs are for: tensors that are as many as its forward asks for are inputs without targets.
    """
    data = _alone(chosen(data), 1 if model is None else required_arguments(model))
    if isinstance(data, Tensor) or (isinstance(data, Mapping) and not data.keys() & set(LABELS)):
        leaves = tensors(data)
        if not leaves or any(leaf.ndim == 0 or len(leaf) != len(leaves[0]) or len(leaf) == 0 for leaf in leaves):
            raise DataError(f"{what}: inputs must be non-empty tensors with the examples along axis 0")
        whole: list[tuple[Any, Tensor | None]] = [(data, None)]
    else:
        data = reread(data)
        try:
            whole = list(as_splits(data)[0].batches)
        except DataError:
            held = as_splits(data, _targets_or_none)[0].batches
            whole = [
                (inputs, None if targets.ndim == 2 and not targets.numel() else targets) for inputs, targets in held
            ]
    if model is not None:
        whole = [(with_decoder(model, inputs, targets), targets) for inputs, targets in whole]
    if len(whole) == 1 and pieces(*whole[0]) and limit is not None and limit < (count := len(tensors(whole[0][0])[0])):
        spread = torch.linspace(0, count - 1, limit).round().long()
        inputs, targets = whole[0]
        whole = [(take(inputs, spread), None if targets is None else targets[spread])]
    left = limit
    for inputs, targets in whole:
        check_numbers(inputs, what)
        count = len(tensors(inputs)[0])
        if not pieces(inputs, targets):
            yield inputs, targets
            left = None if left is None else max(0, left - count)
            continue
        for start in range(0, count if left is None else min(count, left), size):
            part = slice(start, min(start + size, count if left is None else left))
            yield take(inputs, part), None if targets is None else targets[part]
        left = None if left is None else left - count


def _alone(data: Any, needed: int) -> Any:
    """Data whose inputs without targets are told from a pair `(inputs, targets)`: each as a tuple of its own.

    Args:
        needed: the tensors that one call of the module takes.
    """
    if isinstance(data, TaskData):
        return data.task.on(_alone(data.data, needed))
    if isinstance(data, TensorDataset):
        data = data.tensors
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=DATASET_BATCH)
    if not isinstance(data, Iterable) or isinstance(data, Tensor | Mapping | str) or hasattr(data, "to_dict"):
        return data
    if needed > 1:
        one = _is_call(data, needed)
        return [(tuple(data),)] if one else [(tuple(part),) if _is_call(part, needed) else part for part in data]
    numbers = isinstance(data, list) and all(
        isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 for x in data
    )
    return [(part,) for part in data] if numbers and len({(x.shape[1:], x.dtype) for x in data}) == 1 else data


def _is_call(part: Any, needed: int) -> bool:
    return isinstance(part, tuple | list) and len(part) == needed and all(isinstance(x, Tensor) for x in part)


def _targets_or_none(inputs: Any, targets: Tensor | None) -> Tensor:
    """The targets, or an empty tensor in their place for inputs alone."""
    return torch.empty(len(tensors(inputs)[0]), 0) if targets is None else targets


def pieces(inputs: Any, targets: Tensor | None) -> bool:
    """Whether a batch can be cut into examples."""
    return cuttable(inputs, tensors(inputs)[0] if targets is None else targets)


def gather(data: Any, what: str, model: nn.Module | None = None) -> tuple[Any, Tensor | None]:
    """All examples of `data` as one `(inputs, targets or None)`."""
    parts = list(batches(data, what, limit=None, size=1 << 40, model=model))
    if len(parts) == 1:
        return parts[0]
    columns = [inputs for inputs, _ in parts]
    if not all(pieces(inputs, goal) for inputs, goal in parts):
        raise DataError(
            f"{what}: several calls that cannot be cut into examples (graphs); this method draws batches of examples"
        )
    goals = [goal for _, goal in parts if goal is not None]
    targets = torch.cat(goals) if goals else None
    if isinstance(columns[0], Tensor):
        return torch.cat(columns), targets
    if isinstance(columns[0], Mapping):
        return {key: torch.cat([column[key] for column in columns]) for key in columns[0]}, targets
    return tuple(torch.cat(column) for column in zip(*columns, strict=True)), targets


def each(data: Any, count: int, what: str) -> list[Any]:
    """`data` as a list with one entry per model."""
    pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    labelled = pair and len(data[0]) == len(data[1]) and data[1].ndim < data[0].ndim
    if labelled or isinstance(data, (Tensor, Mapping)) or not hasattr(data, "__len__") or len(data) != count:
        found = "a single pair (inputs, targets)" if labelled else type(data).__name__
        raise InputError(f"{what}: expected a list with one data set for each of the {count} models, got {found}")
    return list(data)


def as_came(data: Any, inputs: Any, targets: Tensor | None) -> Any:
    """Inputs and targets of `data` in its form: inputs alone, a pair, or a mapping in which the targets have a name, by which
    they may be asked for."""
    if targets is None:
        return inputs
    named = isinstance(inputs, Mapping) and not isinstance(data, Iterator)
    label = as_splits(chosen(data))[0].labels if named else None
    return (inputs, targets) if label is None else {**inputs, label: targets}


class Judge:
    """The measure of weights on validation data, `judge(weights)`, and which of two values is better.

    Args:
        model: the architecture.
        validation: labelled data as for `lmc.loss_path` (of a data set `.validation`, or its `.train`; never its
            `.test`), or a function from weights to a score, larger being better (smaller with `metric="loss"`).
        metric: "accuracy", "loss" or a metric of the task (default: the accuracy where targets are classes, else the
            loss).
        loss: how outputs are judged, as for `lmc.loss_path`.
        inputs: unlabelled; BatchNorm statistics of merged weights are re-estimated from them.
        device: where to evaluate (default: where the weights are).
        models: the weights that are merged. One of them that comes back unmerged keeps its own statistics, so that it
            has one score.

    Attributes:
        measure: the name of the measure; of a default known after the first call.
        higher: whether larger values are better; likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        validation: Any,
        metric: str | None = None,
        *,
        loss: Loss | Task | None = None,
        inputs: Any = None,
        device: torch.device | str | None = None,
        models: Sequence[Weights],
    ) -> None:
        where = pick_device(device, models[0])
        self.measure = metric
        self.higher = metric != "loss"
        self._unmerged = models
        self._recalibrate = None
        if inputs is not None:
            network = Network(model, where, whole)
            self._recalibrate = Recalibrator(network, calls_in(network.module, inputs))
        self._function: Callable[[Weights], Any] | None = None
        if is_measure(validation):
            self._function = validation
            self.measure = metric or "score"
            return
        self._evaluator = Evaluator(model, chosen(validation), loss=loss, at_once=1, device=where)

    def __call__(self, weights: Weights) -> float:
        """The measure of weights, as it is: an accuracy as a share, a loss in its unit."""
        if self._function is not None:
            return float(self._function(weights))
        values = next(self._evaluator([weights]))["data"].values
        if self.measure is None:
            self.measure = "accuracy" if "accuracy" in values else "loss"
        if self.measure not in values:
            raise InputError(f"metric={self.measure!r}: the data have {', '.join(values)}; give one of these")
        self.higher = self.measure in self._evaluator.task.higher
        return values[self.measure]

    @property
    def unit(self) -> str:
        """The unit of the loss, empty for other measures."""
        return self._evaluator.task.unit if self.measure == "loss" and self._function is None else ""

    def gain(self, value: float) -> float:
        """The value, or its negative, so that larger is better; minus infinity where it is not finite."""
        if not math.isfinite(value):
            return -math.inf
        return value if self.higher else -value

    def renew(self, weights: Weights) -> Weights:
        """Merged weights with statistics of their own; unmerged ones as they are."""
        if self._recalibrate is None or any(_equal(weights, model) for model in self._unmerged):
            return weights
        return self._recalibrate(weights)


def finite(state: Weights) -> str:
    """Empty if all weights are finite, else what is not."""
    try:
        check_finite(state)
    except WeightsError as error:
        return str(error)
    return ""


def _equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())
