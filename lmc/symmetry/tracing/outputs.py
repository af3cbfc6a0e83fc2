"""Calling a module on example inputs, and choosing which of its outputs must stay the same."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lmc.errors import InputError
from lmc.network.task import chosen
from lmc.weights.state import inexact

Inputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
OutputSelector: TypeAlias = None | str | int | Callable[[Any], Any]

# Entries of a result that are states of the network, kept for its next call or for inspection, and no answers.
RECORDS = re.compile(
    r"past_.*|cache_params|mems|(.*_)?hidden_states?|(.*_)?attentions?|(.*_)?router_(logits|probs)|intermediate_.*|.*_model_output"
)
ANSWERS = re.compile(r"(.*_)?logits(_.*)?|pred_.*|.*prediction.*")


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call: a tensor is one positional argument, a tuple several, a dict keywords."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def select(output: Any, outputs: OutputSelector = None) -> list[Tensor]:
    """The tensors of a module's result that must stay the same; see `kept`."""
    return list(kept(output, outputs).values())


def in_one_row(output: Any) -> Tensor:
    """All numbers of a module's result that must stay the same."""
    return torch.cat([tensor.flatten() for tensor in select(output)])


def kept(output: Any, outputs: OutputSelector = None) -> dict[str, Tensor]:
    """The tensors of a module's result that must stay the same, by name ("logits", "0.1"; "" for a lone tensor).

    Args:
        outputs: an attribute or key, a position, or a function of the result. By default everything that a caller could
            use: all floating-point tensors in it, but not caches and records (`past_key_values`, `hidden_states`,
            `attentions` and their kin; `last_hidden_state` only where there is another answer).

    Raises:
        InputError: the result has no such entry, or no tensor in it.
    """
    part = answers(output) if outputs is None else chosen(output, outputs)
    found = dict(named_tensors(part, str(outputs) if isinstance(outputs, str | int) else ""))
    if outputs is None:
        found = {name: t for name, t in found.items() if inexact(t)} or found
    if not found:
        raise InputError(
            f"the selected output ({type(part).__name__}) holds no tensor; pass outputs= a function of the module's "
            "result that returns the tensors meant"
        )
    return found


def answers(output: Any) -> Any:
    """A result with named entries without its caches and records, unless it has nothing else."""
    entries = entries_of(output)
    if isinstance(output, Tensor | tuple | list) or not entries:
        return output
    has_head = any(ANSWERS.fullmatch(name) for name in entries)
    usable = {
        name: value
        for name, value in entries.items()
        if not RECORDS.fullmatch(name) or (name == "last_hidden_state" and not has_head)
    }
    return usable if any(True for _ in tensors_in(usable)) else entries


def entries_of(value: Any) -> dict[str, Any]:
    """The named parts of a mapping, a sequence, a dataclass or another plain object."""
    if isinstance(value, Mapping):
        return {str(name): item for name, item in value.items()}
    if isinstance(value, tuple | list):
        names = getattr(value, "_fields", None) or map(str, range(len(value)))
        return dict(zip(names, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, nn.Module | type) or callable(value) or "Cache" in type(value).__name__:
        return {}
    return dict(getattr(value, "__dict__", {}))


def named_tensors(value: Any, name: str = "", around: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested result with its path, in order."""
    if isinstance(value, Tensor):
        yield name, value
    elif id(value) not in around:
        for part, item in entries_of(value).items():
            yield from named_tensors(item, f"{name}.{part}" if name else part, (*around, id(value)))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a nested result, in order."""
    return (tensor for _, tensor in named_tensors(value))
