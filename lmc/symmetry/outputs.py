"""Calling a module on example inputs, and choosing which of its outputs must stay the same."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from lmc.errors import InputError

Inputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
OutputSelector: TypeAlias = None | str | int | Callable[[Any], Any]

CACHES = ("past_key_values", "past_key_value", "cache_params", "mems")


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call: a tensor is one positional argument, a tuple several, a dict keywords."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def select(output: Any, outputs: OutputSelector = None) -> list[Tensor]:
    """The tensors of a module's result that must stay the same.

    `None`: the tensor itself, the `.logits` of a result that has them, else every tensor in it but those of caches for
    the next tokens, which are states of the network and not its answer. A string is an
    attribute or key, an integer a position, a callable is applied to the result.
    """
    if outputs is None:
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        chosen = without_caches(output) if logits is None else logits
    elif callable(outputs):
        chosen = outputs(output)
    elif isinstance(outputs, int):
        chosen = tuple(output.values())[outputs] if isinstance(output, Mapping) else output[outputs]
    elif isinstance(output, Mapping) and outputs in output:
        chosen = output[outputs]
    elif hasattr(output, outputs):
        chosen = getattr(output, outputs)
    else:
        raise InputError(f"outputs={outputs!r}: the module's result ({type(output).__name__}) has no such entry")
    found = list(tensors_in(chosen))
    if not found:
        raise InputError(
            f"the selected output ({type(chosen).__name__}) holds no tensor; pass outputs= a function of the module's "
            "result that returns the tensors meant"
        )
    return found


def without_caches(output: Any) -> Any:
    """A mapping of results without the entries by which a decoder hands keys, values or states to its next call."""
    if not isinstance(output, Mapping):
        return output
    return {name: value for name, value in output.items() if name not in CACHES}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a nested result, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
