"""What functions that only run a network accept as inputs, brought into one shape: calls of the module."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmc.errors import DataError
from lmc.network.batches import take, tensors

Call = Any  # a tensor, a tuple of positional tensors, or a mapping of keyword tensors


def input_batches(model: nn.Module, inputs: Any, batch_size: int) -> Iterator[Call]:
    """The calls that `inputs` stand for, examples along axis 0, no more than `batch_size` of them where we may cut.

    Accepted are a tensor, a mapping of keyword tensors, a tuple of positional tensors, an object with `.train`, and any
    iterable of such batches. A pair is `(inputs, targets)`, of which the targets are dropped, unless the module's
    forward asks for two arguments; optional arguments go in a mapping.

    Raises:
        DataError: no examples at all, or something that is none of the above.
    """
    if hasattr(inputs, "train") and hasattr(inputs, "test") and not isinstance(inputs, nn.Module):
        inputs = inputs.train
    needed = required_arguments(model)
    seen = 0
    whole = isinstance(inputs, Tensor | Mapping | tuple)
    for batch in (inputs,) if whole else _iterable(inputs):
        call = _without_targets(batch, needed)
        count = _length(call)
        seen += 1 if count is None else count
        if not whole or count is None or count <= batch_size:
            yield call
        else:
            for start in range(0, count, batch_size):
                yield take(call, slice(start, start + batch_size))
    if not seen:
        raise DataError(
            "inputs: no examples at all; an iterator that was read before is empty, pass a list or a loader"
        )


def required_arguments(model: nn.Module) -> int:
    """How many positional arguments the module's forward cannot do without."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _iterable(inputs: Any) -> Iterable[Any]:
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise DataError(
            "inputs: expected a tensor, a tuple or mapping of tensors, or an iterable of such batches, "
            f"got {type(inputs).__name__}"
        )
    return inputs


def _without_targets(batch: Any, needed: int) -> Call:
    if isinstance(batch, tuple | list) and len(batch) == 2 and needed < 2:
        batch = batch[0]
    elif isinstance(batch, list):
        batch = tuple(batch)
    if not tensors(batch):
        raise DataError(f"inputs: expected batches of tensors, got {type(batch).__name__}")
    return batch


def first_of(call: Call, count: int) -> Call:
    """The first examples of a call; all of it where its tensors do not count the same examples along axis 0."""
    return call if _length(call) is None else take(call, slice(0, count))


def _length(call: Call) -> int | None:
    """The number of examples, None where the lengths of axis 0 differ."""
    lengths = {len(tensor) for tensor in tensors(call) if tensor.ndim}
    if not lengths or 0 in lengths:
        raise DataError("inputs: axis 0 counts the examples, and a tensor has none")
    return lengths.pop() if len(lengths) == 1 else None


def call_module(module: nn.Module, call: Call, device: torch.device) -> Any:
    """The module's result for one call, on `device`."""
    if isinstance(call, Mapping):
        return module(**{name: tensor.to(device) for name, tensor in call.items()})
    if isinstance(call, Tensor):
        return module(call.to(device))
    return module(*(tensor.to(device) for tensor in call))
