"""Inputs for functions that only run a network, brought into one shape: calls of the module."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lmc.core.context import warn
from lmc.errors import DataError
from lmc.network.batches import (
    DATASET_BATCH,
    LABELS,
    SPLITS,
    TaskData,
    check_numbers,
    fields,
    from_numpy,
    take,
    tensors,
)

# Modules that pass all that they are given on to the one inside.
WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "AveragedModel")
Call = Any  # a tensor, a tuple of positional tensors, a mapping of keyword tensors, or a data object


def input_batches(model: nn.Module, inputs: Any, batch_size: int) -> Iterator[Call]:
    """The calls that `inputs` stand for, examples along axis 0, no more than `batch_size` of them where we may cut.

    Accepted are a tensor, a mapping of keyword tensors, a tuple of positional tensors, a data object (a graph), an
    iterable of such batches, a `torch.utils.data.Dataset`, and of an object with `.train` or a mapping
    `{"train": ..., "test": ...}` the training split. Targets are dropped: the last of a tuple that is one longer than
    the module's forward asks for, of a pair whose first part holds all that it asks for the second, and "labels" (or
    "label", "targets", "target", "y") of a mapping, unless forward asks for them. Optional arguments go in a mapping.

    Raises:
        DataError: no examples at all, NaN, or something that is none of the above.
    """
    inputs = from_numpy(_training_inputs(inputs))
    needed = required_arguments(model)
    seen = 0
    if isinstance(inputs, list) and _is_labelled(inputs, max(needed, 1) + 1):
        inputs = tuple(inputs)
    whole = bool(tensors(inputs)) and not isinstance(inputs, list) and not _is_loader(inputs)
    for batch in (inputs,) if whole else _iterable(inputs):
        call = _without_targets(model, batch, needed)
        count = length(call)
        seen += 1 if count is None else count
        check_numbers(call, "inputs")
        if not whole or count is None or count <= batch_size:
            yield call
        else:
            for start in range(0, count, batch_size):
                yield take(call, slice(start, start + batch_size))
    if not seen:
        raise DataError(
            "inputs: no examples at all; an iterator that was read before is empty, pass a list or a loader"
        )


def _training_inputs(inputs: Any) -> Any:
    """The set that is used of several, and a data set as batches."""
    if isinstance(inputs, TaskData):
        inputs = inputs.data
    if hasattr(inputs, "train") and hasattr(inputs, "test") and not isinstance(inputs, nn.Module):
        inputs = inputs.train
    elif isinstance(inputs, Mapping) and inputs and (inputs.keys() <= SPLITS or not tensors(inputs)):
        inputs = inputs["train"] if "train" in inputs else next(iter(inputs.values()))
    if isinstance(inputs, Dataset) and not isinstance(inputs, IterableDataset):
        return DataLoader(inputs, batch_size=DATASET_BATCH)
    return inputs


def required_arguments(model: nn.Module) -> int:
    """The number of positional arguments that the module's forward cannot do without."""
    if isinstance(model, torch.jit.ScriptModule):  # has a schema and no signature; its first argument is the module
        return sum(not argument.has_default_value() for argument in model.forward.schema.arguments[1:])
    while type(model).__name__ in WRAPPERS:
        model = next(model.children())
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _iterable(inputs: Any) -> Iterable[Any]:
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise DataError(
            "inputs: expected a tensor, a tuple or mapping of tensors, a data object, or an iterable of such batches, "
            f"got {type(inputs).__name__}"
        )
    return inputs


def _is_loader(inputs: Any) -> bool:
    """True for an iterable of batches that happens to have tensors as attributes."""
    plain = isinstance(inputs, Tensor | Mapping | tuple | list)
    return not plain and isinstance(inputs, Iterable) and not hasattr(inputs, "to_dict")


def _is_labelled(batch: list[Any], count: int) -> bool:
    """True for tensors of as many examples of which the last is of another kind: the targets, and no batch of inputs."""
    if len(batch) != count or not all(isinstance(part, Tensor) and part.ndim for part in batch):
        return False
    kinds = {(part.dtype, part.shape[1:]) for part in batch[:-1]}
    return len({len(part) for part in batch}) == 1 and (batch[-1].dtype, batch[-1].shape[1:]) not in kinds


def _without_targets(model: nn.Module, batch: Any, needed: int) -> Call:
    batch = from_numpy(batch)
    if isinstance(batch, tuple | list):
        batch = tuple(batch)
        if len(batch) == 2 and (needed <= 1 or _holds_all(model, batch[0], needed)):
            batch = batch[0]
        elif len(batch) == max(needed, 1) + 1:
            batch = batch[:-1]
    elif isinstance(batch, Mapping) and any(name in batch for name in LABELS):
        asked = inspect.signature(model.forward).parameters
        given = next(batch[name] for name in LABELS if name in batch)
        batch = with_decoder(model, batch, given)
        batch = {
            k: v
            for k, v in batch.items()
            if k not in LABELS or (k in asked and asked[k].default is inspect.Parameter.empty)
        }
    if not tensors(batch):
        raise DataError(f"inputs: expected batches of tensors, got {type(batch).__name__}")
    return batch


def _holds_all(model: nn.Module, part: Any, needed: int) -> bool:
    """Whether the first part of a pair is all inputs that forward asks for, so that the second are targets."""
    if isinstance(part, Mapping):
        return bool(tensors(part)) and len(arguments(model, part)[1]) >= needed
    return isinstance(part, tuple | list) and len(part) == needed


def with_decoder(model: nn.Module, inputs: Any, targets: Any) -> Any:
    """Inputs with those of the decoder, where a model of Hugging Face makes them of the targets, moved on by one.

    Left to itself, one such model fails without its labels, and another lets its decoder read the inputs again.
    """
    made = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if made is None or not isinstance(inputs, Mapping) or not isinstance(targets, Tensor):
        return inputs
    known = "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
    return inputs if known else {**inputs, "decoder_input_ids": made(targets)}


def first_of(call: Call, count: int) -> Call:
    """The first examples of a call; all of it where its tensors do not count the same examples along axis 0."""
    return call if length(call) is None else take(call, slice(0, count))


def length(call: Call) -> int | None:
    """The number of examples; None where the lengths of axis 0 differ, and of a data object."""
    lengths = {len(tensor) for tensor in tensors(call) if tensor.ndim}
    if not lengths or 0 in lengths:
        raise DataError("inputs: axis 0 counts the examples, and a tensor has none")
    plain = isinstance(call, Tensor | Mapping | tuple)
    return lengths.pop() if plain and len(lengths) == 1 else None


def arguments(module: nn.Module, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) with which `module` is called.

    The entries of a mapping go to the arguments of these names; those that forward does not know, such as the names of
    files, are left out. Where forward asks for one argument of another name, that is the mapping. So it is with the entries
    of a data object, as in `forward(x, edge_index, batch)`.
    """
    if isinstance(call, Tensor):
        return (call,), {}
    if isinstance(call, Mapping):
        return _named(module, call)
    if isinstance(call, tuple | list):
        return tuple(call), {}
    known = {name: value for name, value in fields(call).items() if value is not None}
    asked = inspect.signature(module.forward).parameters
    required = [name for name, p in asked.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if required and all(name in known for name in required):
        return (), {name: known[name] for name in asked if name in known}
    return (call,), {}


def _named(module: nn.Module, call: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(module, torch.jit.ScriptModule):
        return (), dict(call)
    asked = inspect.signature(module.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in asked.values()) or all(name in asked for name in call):
        return (), dict(call)
    required = [name for name, p in asked.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(required) == 1 and required[0] not in call:
        return (dict(call),), {}
    if (left := [name for name in call if name not in asked]) and any(isinstance(call[n], Tensor) for n in left):
        warn(f"{type(module).__name__}.forward takes no {', '.join(map(str, left))}; left out")
    return (), {name: value for name, value in call.items() if name in asked}


def plain(module: nn.Module, call: Call) -> Any:
    """A call as tensors, a tuple or a mapping: a data object, such as a graph, as what `module` takes of it."""
    if isinstance(call, Tensor | tuple | list | Mapping):
        return call
    args, kwargs = arguments(module, call)
    return kwargs or args
