"""Weights as every function of the package returns them: a state dict that prints short; its tied names, its numbers, and
orders of its names that do not depend on how it was stored.

Codes of quantised weights and factors of adapters are no coordinates of a weight space: the mean of two codes is not the
code of a mean, and the mean of products `B A` is not the product of the means.

Keys of a stored state dict come in the order in which a tool wrote them; that order means nothing. Depth is told from
names and from modules.
"""

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from lmc.core.context import warn
from lmc.errors import InputError, WeightsError

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
    held = ((name, tensor) for name, tensor in state.items() if isinstance(tensor, Tensor))
    names = {name: first.setdefault(memory(tensor), name) for name, tensor in held}
    return {name: origin for name, origin in names.items() if name != origin}


def memory(tensor: Tensor) -> Hashable:
    """The place of a tensor's values: equal for two tensors that are one; tensors without values are compared by identity."""
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def overlapping(model: nn.Module) -> tuple[str, str] | None:
    """Two parameters that share a part of their memory, so that neither has values of its own; None where there are none."""
    placed = [
        (p.device, p.untyped_storage().data_ptr(), p.storage_offset(), name, p)
        for name, p in model.named_parameters()
        if type(p) is nn.Parameter and p.layout == torch.strided and not p.is_meta and p.numel()
    ]
    found = sorted(placed, key=lambda entry: (str(entry[0]), *entry[1:4]))
    for (*place, _, first, p), (*other, start, second, q) in pairwise(found):
        extent = 1 + sum((n - 1) * step for n, step in zip(p.shape, p.stride(), strict=True))
        apart = place != other or start >= p.storage_offset() + extent or p.dtype != q.dtype
        if not apart and memory(p) != memory(q) and _share(p, q):
            return first, second
    return None


def _share(p: Tensor, q: Tensor) -> bool:
    """Whether two tensors of one memory have an entry in common."""
    length = p.untyped_storage().nbytes() // p.itemsize
    places = (torch.arange(length).as_strided(x.shape, x.stride(), x.storage_offset()).flatten() for x in (p, q))
    return bool(torch.isin(*places).any())


# What bitsandbytes, GPTQ, AWQ, compressed-tensors, block fp8 and torchao put beside or in place of a weight.
CODES = re.compile(
    r"(^|[._])(qweight|qzeros|scales_and_zeros|SCB|weight_format|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|"
    r"weight_global_scale|weight_g_idx|absmax|nested_absmax|quant_map|nested_quant_map|quant_state(\..*)?)$"
)
# Of a LoRA, DoRA, LoHa, LoKr, VeRA, IA3 or prompt adapter.
FACTORS = re.compile(
    r"(^|\.)(lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|lora_(down|up)|(\w+_)?lora\.(down|up)|hada_w[12]_[ab]|"
    r"lokr_w[12](_[ab])?|vera_lambda_[bd]|ia3_l|dora_scale|prompt_embeddings|(oft|boft)_[RrSs]|fourierft_spectrum|hra_u)"
    r"(\.|$)"
)
QUANTISED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)
NARROW = (torch.int8, torch.uint8, torch.int16, torch.int32)
USUAL = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})  # no codes, unless by their name
DEQUANTISE = (
    "dequantise it first, by loading it with the library that quantised it and saving float weights, or take the "
    "weights it was made from"
)


def inexact(tensor: Tensor) -> bool:
    """True where the values take part in sums: floating-point or complex, not integers or booleans."""
    return tensor.is_floating_point() or tensor.is_complex()


def least_divisor(tensors: Iterable[Tensor]) -> float:
    """The number that Adam adds to what it divides by, its `eps`: 1e-8, or what the dtypes of its parameters still tell from 0."""
    return max([1e-8, *(torch.finfo(x.dtype).tiny for x in tensors)])


@cache
def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of these are summed: float32, complex64, or the widest of them if that is wider."""
    found = torch.float32
    for dtype in dtypes:  # torch does not promote float8
        found = torch.promote_types(found, torch.float32 if dtype.itemsize == 1 else dtype)
    return found


def finite(tensor: Tensor) -> bool:
    """True where all values are finite numbers, and their sum is; one question to the device.

    Of half precision on a CPU the bits are looked at, in a third of the time: as signed integers positive infinity and NaN are
    the largest, as unsigned ones negative infinity and NaN.
    """
    if tensor.dtype in (torch.float16, torch.bfloat16) and tensor.device.type == "cpu" and tensor.numel():
        bits, infinity = tensor.view(torch.int16).numpy(), 0x7C00 if tensor.dtype == torch.float16 else 0x7F80
        return bool(bits.max() < infinity and bits.view(np.uint16).max() < 0x8000 + infinity)
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return math.isfinite(abs(values.sum(dtype=wide(values.dtype)).item()))


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`.

    Raises:
        WeightsError: a finite value leaves the range of `dtype`, such as 65504 of float16; the tensor is named.
    """
    if inexact(tensor) and tensor.numel() and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        if dtype.itemsize == 2:  # a finite sum has finite terms
            found = tensor.to(dtype)
            if finite(found):
                return found
        values, most = tensor.to(wide(tensor.dtype)), torch.finfo(dtype).max
        values = torch.view_as_real(values) if values.is_complex() else values
        low, high = values.aminmax()  # one pass; NaN where there is one
        # Asked of the values, not of the result: casts to float8 may stop at its largest number.
        within = bool((low >= -most) & (high <= most))
        if not within and bool(((values.abs() > most) & torch.isfinite(values)).any()):
            raise WeightsError(
                f"{name}: the result leaves the range of {str(dtype).removeprefix('torch.')}, up to "
                f"{torch.finfo(dtype).max:g}; convert the models to float32 or bfloat16 first, or use a smaller scale"
            )
    return tensor.to(dtype)


def code(state: Mapping[str, Tensor]) -> str:
    """The reason why a weight set holds codes instead of weights, naming the first tensor; empty where it does not."""
    scaled: set[str] = set()
    if any(tensor.dtype.itemsize == 1 for tensor in state.values()):
        scaled = {name.rpartition(".")[0] for name in state if "scale" in name.rpartition(".")[2]}
    for name, tensor in state.items():
        if tensor.is_quantized or _named_code(name):
            return f"{name} ({dtype_name(tensor)}) belongs to a quantised weight"
        if tensor.dtype in USUAL:
            continue
        parent, _, last = name.rpartition(".")
        if last == "weight" and tensor.dtype in NARROW:
            return f"{name} holds {dtype_name(tensor)} codes of a quantised weight"
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1 and parent in scaled and "scale" not in last:
            return f"{name} holds {dtype_name(tensor)} codes with a scale of their own"
    return ""


@lru_cache(maxsize=2**16)  # the same names are asked for again with every weight set of an architecture
def _named_code(name: str) -> bool:
    return CODES.search(name) is not None


def factor(state: Mapping[str, Tensor]) -> str:
    """The first name of an adapter's factor; empty where there is none."""
    return next((name for name in state if _named_factor(name)), "")


@lru_cache(maxsize=2**16)
def _named_factor(name: str) -> bool:
    return FACTORS.search(name) is not None


def unmergeable(state: Mapping[str, Tensor]) -> str:
    """The reason why a weight set cannot be merged, and the way out; empty where it can."""
    if reason := code(state):
        return f"{reason}, which are no numbers to add and scale; {DEQUANTISE}"
    if name := factor(state):
        return (
            f"{name} is a factor of an adapter, and the mean of products is not the product of means; pass the folder of "
            "the adapter and the model it was trained on as base=, or merge each adapter into its base first (peft: "
            "model.merge_and_unload()), and merge those"
        )
    return ""


def check_integers(
    states: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    same: Callable[[str, int], bool] | None = None,
    values: Callable[[str, int], Tensor] | None = None,
) -> None:
    """Check integers and booleans, which no sum is made of: where weight sets differ in them, those of the first are kept.

    Counters, which are single numbers, may differ. Of other integers and masks a warning names the first that differ.

    Args:
        states: the weight sets, or outlines of them.
        names: what messages call them.
        same: whether a tensor of the first weight set is the same in another, given by its place.
        values: a tensor of a weight set, given by its place.

    Raises:
        WeightsError: narrow integers (int8, uint8, int16) that are more than a mask differ: they are codes of weights.
    """
    same = same or (lambda name, i: torch.equal(states[0][name], states[i][name]))
    values = values or (lambda name, i: states[i][name])
    differing: dict[str, str] = {}
    for name, tensor in states[0].items():
        if inexact(tensor) or tensor.numel() < 2 or tensor.is_meta:
            continue
        others = [i for i in range(1, len(states)) if name in states[i] and not states[i][name].is_meta]
        first = next((i for i in others if not same(name, i)), None)
        if first is None:
            continue
        differing[name] = names[first]
        if tensor.dtype in (torch.int8, torch.uint8, torch.int16):
            both = [values(name, i) for i in (0, first)]
            if any(bool(((x != 0) & (x != 1)).any()) for x in both):
                raise WeightsError(
                    f"{name} holds {dtype_name(tensor)} numbers that differ between {names[0]} and {names[first]}: they look "
                    f"like codes of a quantised weight, which are no numbers to add and scale; {DEQUANTISE}; if they are "
                    "no weights, leave them out of both, or give both the same"
                )
    if differing:
        name, more = next(iter(differing)), len(differing) - 1
        warn(
            f"{name}{f' and {more} more' if more else ''}: integers or masks that differ between {names[0]} and "
            f"{differing[name]}; no sums are made of them, those of {names[0]} are kept"
        )


def check_codes(state: Mapping[str, Tensor], what: str) -> None:
    """Check that tensors are no codes of quantised weights; factors of an adapter are parameters like others.

    Raises:
        WeightsError: they are; the message names the first and the way out.
    """
    if code(state):
        raise WeightsError(f"{what}: {unmergeable(state)}")


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key to sort names by, numbers by their value: "layers.2" before "layers.10"."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def numbered_depths(names: Iterable[str]) -> dict[str, float]:
    """Depths from 0 (first block) to 1 (last block) of the names inside numbered blocks; the others are left out.

    Blocks are modules that differ by one number, `layers.0`, `h.11`, `fc2`, `layer4`; the outermost number counts. Two
    towers with equally many blocks (`encoder.0`, `decoder.0`) lie beside each other.

    Raises:
        InputError: no numbered modules, or several series that may follow one another (`conv1`, `conv2`, `fc1`).
    """
    # For every name the numbers in its module path from the outermost on, each with what stands before it.
    found = {
        name: [(path[: m.start()], int(m[1])) for m in re.finditer(r"(\d+)(?=\.|$)", path)]
        for name in names
        for path in [name if name.rpartition(".")[2].isdigit() else name.rpartition(".")[0]]
    }
    series: dict[str, set[int]] = {}
    for numbers in found.values():
        for before, number in numbers:
            series.setdefault(before, set()).add(number)
    places = {
        name: next(((before, number) for before, number in numbers if len(series[before]) > 1), None)
        for name, numbers in found.items()
    }
    used = {place[0]: sorted(series[place[0]]) for place in places.values() if place}
    homes = {before.rpartition(".")[0] for before in used}
    if len({len(numbers) for numbers in used.values()}) != 1 or len(homes) != len(used):
        lengths = {before + "*": len(numbers) for before, numbers in used.items()}
        raise InputError(f"cannot tell the blocks from the names (numbered modules: {lengths or 'none'})")
    return {name: used[place[0]].index(place[1]) / (len(used[place[0]]) - 1) for name, place in places.items() if place}


def modules_in_order(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The modules that hold the tensors `names`, in the order in which the model registers them."""
    wanted = {name.rpartition(".")[0] or name for name in names}
    return list(dict.fromkeys(m for name in model.state_dict() if (m := name.rpartition(".")[0] or name) in wanted))


def tensors_by_module(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """The tensors `names` under the modules that hold them, these in the order in which the model registers them."""
    chosen = list(names)
    found: dict[str, list[str]] = {module: [] for module in modules_in_order(model, chosen)}
    for name in chosen:
        found[name.rpartition(".")[0] or name].append(name)
    return found


def model_depths(model: nn.Module, names: Sequence[str]) -> dict[str, float]:
    """As `numbered_depths`; where blocks are not numbered clearly, each module is one, in the model's order."""
    try:
        return numbered_depths(names)
    except InputError:
        modules = modules_in_order(model, names)
    last = max(len(modules) - 1, 1)
    return {name: modules.index(name.rpartition(".")[0] or name) / last for name in names}
