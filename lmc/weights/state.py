"""Weights as every function of the package returns them: a state dict that prints short; which of its names are tied."""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from copy import deepcopy
from typing import Any, Self, TypeAlias

from torch import Tensor, nn
from torch.utils import _pytree

Weights: TypeAlias = dict[str, Tensor]
ModelOrWeights: TypeAlias = nn.Module | Mapping[str, Tensor]
SHOWN = 3  # names in the text


class StateDict(dict[str, Tensor]):
    """A `dict` of names to tensors, as `module.state_dict()` gives it, that prints in a few words.

    It keeps `_metadata`, the versions of modules that `load_state_dict` reads, also through `copy` and `|`. Pickled or
    saved with `torch.save` it becomes the `OrderedDict` that a module gives, which loads where `lmc` is not installed.

    Args:
        tensors: names and tensors.
        like: a state dict whose `_metadata` is kept (default: that of `tensors`).
    """

    def __init__(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (), *, like: Any = None) -> None:
        super().__init__(tensors)
        self._metadata = getattr(tensors if like is None else like, "_metadata", None)

    def copy(self) -> Self:
        """A shallow copy."""
        return self._of(self)

    def _of(self, tensors: Mapping[str, Tensor]) -> Self:
        made = type(self).__new__(type(self))
        made.update(tensors)
        made.__dict__.update(self.__dict__)
        return made

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.update({name: deepcopy(tensor, memo) for name, tensor in self.items()})
        made.__dict__.update(deepcopy(self.__dict__, memo))
        return made

    def __or__(self, other: Any) -> Any:
        return self._of({**self, **other}) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Any) -> Any:
        return self._of({**other, **self}) if isinstance(other, Mapping) else NotImplemented

    def __reduce__(self) -> Any:
        kept = None if self._metadata is None else {"_metadata": self._metadata}
        return OrderedDict, (), kept, None, iter(self.items())

    def __repr__(self) -> str:
        size = sum(tensor.numel() for tensor in self.values())
        kinds = Counter(f"{dtype_name(tensor)} on {tensor.device}" for tensor in self.values())
        shown = [f"{name} {tuple(tensor.shape)}" for name, tensor in list(self.items())[:SHOWN]]
        rest = ["..."] if len(self) > SHOWN else []
        what = f"{len(self)} tensors, {size:,} values" + (f", {', '.join(kinds)}" if kinds else "")
        return f"{type(self).__name__}({what}{': ' if shown else ''}{', '.join(shown + rest)})"


def dtype_name(tensor: Tensor) -> str:
    """The dtype without "torch."."""
    return str(tensor.dtype).removeprefix("torch.")


def _unflatten(tensors: Iterable[Any], context: tuple[list[str], Any]) -> StateDict:
    names, metadata = context
    made = StateDict(zip(names, tensors, strict=True))
    made._metadata = metadata
    return made


# `torch.func` transforms and `torch.export` walk through dicts, but not through subclasses that they do not know.
_pytree.register_pytree_node(
    StateDict,
    lambda state: (list(state.values()), (list(state), state._metadata)),
    _unflatten,
    serialized_type_name="lmc.weights.StateDict",
    flatten_with_keys_fn=lambda state: (  # type: ignore[arg-type]
        [(_pytree.MappingKey(name), tensor) for name, tensor in state.items()],
        (list(state), state._metadata),
    ),
)


def tied_names(model: ModelOrWeights) -> dict[str, str]:
    """Further names (aliases) of tensors that have several -> the first name.

    Of a module or state dict those of one memory; of an opened checkpoint those that are stored once. Other mappings,
    which may make their tensors on demand, have none.
    """
    if not isinstance(model, nn.Module | dict):
        return dict(getattr(model, "ties", {}))
    state = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model
    first: dict[Hashable, str] = {}
    names = {name: first.setdefault(memory(tensor), name) for name, tensor in state.items()}
    return {name: origin for name, origin in names.items() if name != origin}


def memory(tensor: Tensor) -> Hashable:
    """The place of a tensor's values: equal for two tensors that are one; tensors without values are compared by identity."""
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
