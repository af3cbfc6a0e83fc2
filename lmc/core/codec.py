"""Dataclasses as files, driven by their type hints: JSON, and a safetensors file around it where there are tensors.

Numbers are written exactly. An array whose dtype the hint names becomes a nested list with NaN as null; others carry their
dtype and shape. Tensors stay bit by bit what they are and come back on the CPU. A field with the metadata `UNSAVED` stays
behind.
"""

import base64
import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from lmc.errors import DataError, InputError, LmcError

UNSAVED = {"saved": False}
MOST_LISTED = 10_000  # entries of an array or index vector that is written as a list of numbers

KINDS: dict[str, type] = {}  # by name, what may stand where no hint names a type
# The keys of mappings that stand for something else there.
MARKS = ({"kind", "content"}, {"tensor"}, {"float"}, {"dtype", "shape", "values"}, {"pairs"})

Tensors = dict[str, Tensor]
FAULTS = (ValueError, KeyError, TypeError, IndexError, AttributeError, SafetensorError, LmcError)


def dump(form: str, content: Mapping[str, Any], tensors: Tensors) -> bytes:
    """Plain data under a format name as the bytes of a file: safetensors where there are tensors, else JSON."""
    text = json.dumps({"format": form, **content}, allow_nan=False)
    if not tensors:
        return text.encode()
    stored = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}  # tied tensors as equal ones
    return serialise(stored, {"lmc": text})


def read(file: str | Path) -> tuple[str, dict[str, Any], Tensors]:
    """Format name, plain data and tensors of a file that holds what `dump` gave."""
    with open(file, "rb") as opened:
        start = opened.read(8)
    if b"\0" not in start:  # a safetensors file starts with the length of its header, in eight bytes
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        return content["format"], content, {}
    with safe_open(file, framework="pt") as stored:
        header = dict(stored.metadata() or {})
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    content = json.loads(header["lmc"]) if "lmc" in header else header
    return content["format"], content, tensors


@contextmanager
def reading(file: str | Path, what: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file that is something else into a `DataError` that names it."""
    try:
        yield
    except FAULTS as error:
        raise DataError(f"{file} holds no {what}: {type(error).__name__}: {error}") from error


def saved_fields(kind: type) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that are written."""
    return [field for field in dataclasses.fields(kind) if field.metadata.get("saved", True)]


def encode(value: Any, hint: Any, tensors: Tensors) -> Any:
    """`value` as JSON takes it; tensors are put into `tensors` and referred to.

    Raises:
        InputError: a value of a type that is not written.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return {"float": str(value)} if hint is Any else None if hint is float and math.isnan(value) else str(value)
    if isinstance(value, np.generic):
        return encode(value.item(), hint, tensors)
    if isinstance(value, Tensor):
        if value.dtype == torch.int64 and 0 < value.numel() <= MOST_LISTED:  # an empty list would lose its shape
            return value.tolist()
        key = str(len(tensors))
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:  # whose bytes are addresses
            return encode(value.tolist(), Any, tensors)
        return _array(value, _dtype(_member(hint, np.ndarray)))
    if isinstance(value, nn.Module):  # as its weights, which whoever reads it puts into the architecture
        return encode(value.state_dict(), dict[str, Tensor], tensors)
    if hint is Any and type(value) in KINDS.values():
        return {"kind": type(value).__name__, "content": encode(value, type(value), tensors)}
    if hasattr(value, "to_dict"):
        return value.to_dict() if type(value) in KINDS.values() else encode(value.to_dict(), Any, tensors)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        fields = saved_fields(type(value))
        return {field.name: encode(getattr(value, field.name), hints[field.name], tensors) for field in fields}
    if isinstance(value, Mapping):
        _, of = _mapping(_member(hint, Mapping))
        if hint is Any and (any(value.keys() == keys for keys in MARKS) or not all(isinstance(k, str) for k in value)):
            return {"pairs": [[encode(key, Any, tensors), encode(item, Any, tensors)] for key, item in value.items()]}
        if all(isinstance(key, str | int) for key in value):
            return {str(key): encode(item, of, tensors) for key, item in value.items()}
        return [[encode(key, Any, tensors), encode(item, of, tensors)] for key, item in value.items()]
    if isinstance(value, Sequence | Set):
        items = sorted(value) if isinstance(value, Set) else value
        hints = _elements(_member(hint, Iterable), len(items))
        return [encode(item, of, tensors) for item, of in zip(items, hints, strict=True)]
    if hint is Any:  # a note about how something was made, such as the function that an option was
        return repr(value)
    raise InputError(f"a value of type {type(value).__name__} cannot be saved")


def decode(plain: Any, hint: Any, tensors: Tensors) -> Any:
    """The value of type `hint` that `encode` made `plain` of; one of `FAULTS` where it was made of something else."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return _guess(plain, tensors)
    if origin in (typing.Union, types.UnionType):
        return _any_of(plain, typing.get_args(hint), tensors)
    if origin is Literal:
        return _checked(plain, plain in typing.get_args(hint), hint)
    if hint in (bool, str, int):
        return _checked(plain, type(plain) is hint, hint)
    if hint is float:
        return math.nan if plain is None else float(plain)
    kind = origin or hint
    if kind is nn.Module:
        return decode(plain, dict[str, Tensor], tensors)
    if kind is Tensor:
        return tensors[plain["tensor"]] if isinstance(plain, dict) else torch.tensor(plain, dtype=torch.int64)
    if kind is np.ndarray:
        return _from_array(plain, _dtype(hint))
    if dataclasses.is_dataclass(kind):
        return build(kind, plain, tensors, {})
    if isinstance(kind, type) and issubclass(kind, Mapping):
        name, of = _mapping(hint)
        pairs = plain.items() if isinstance(plain, dict) else [(_frozen(key), item) for key, item in plain]
        made = {int(key) if name is int else key: decode(item, of, tensors) for key, item in pairs}
        return kind(made) if kind not in (dict, Mapping) and issubclass(kind, dict) else made
    if isinstance(kind, type) and issubclass(kind, Sequence | Set):
        _checked(plain, isinstance(plain, list), hint)
        items = [decode(item, of, tensors) for item, of in zip(plain, _elements(hint, len(plain)), strict=True)]
        return items if kind is list else frozenset(items) if issubclass(kind, Set) else tuple(items)
    raise TypeError(f"nothing of type {hint} is read from files")


def build(kind: Any, content: Mapping[str, Any], tensors: Tensors, kept: Mapping[str, Any]) -> Any:
    """An instance of a dataclass; `kept` are fields that stayed behind, and those that a file lacks have their defaults."""
    if hasattr(kind, "from_dict"):
        return kind.from_dict(content)
    hints = typing.get_type_hints(kind)
    names = [field.name for field in saved_fields(kind) if field.name in content]
    return kind(**{name: decode(content[name], hints[name], tensors) for name in names}, **kept)


def _any_of(plain: Any, hints: Sequence[Any], tensors: Tensors) -> Any:
    """By the first of several hints that fits."""
    if plain is None and type(None) in hints:
        return None
    for hint in hints:
        try:
            return decode(plain, hint, tensors)
        except FAULTS:
            continue
    raise TypeError(f"expected one of {', '.join(map(str, hints))}")


def _checked(plain: Any, fits: bool, hint: Any) -> Any:
    if not fits:
        raise TypeError(f"expected {getattr(hint, '__name__', hint)}, got {type(plain).__name__}")
    return plain


def _guess(plain: Any, tensors: Tensors) -> Any:
    """A value whose type no hint names."""
    if isinstance(plain, list):
        return [_guess(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if plain.keys() == {"pairs"}:
        return {_frozen(_guess(key, tensors)): _guess(item, tensors) for key, item in plain["pairs"]}
    if plain.keys() == {"kind", "content"}:
        return build(KINDS[plain["kind"]], plain["content"], tensors, {})
    if plain.keys() == {"tensor"}:
        return tensors[plain["tensor"]]
    if plain.keys() == {"float"}:
        return float(plain["float"])
    if plain.keys() == {"dtype", "shape", "values"}:
        return _from_array(plain, None)
    return {key: _guess(item, tensors) for key, item in plain.items()}


def _frozen(key: Any) -> Any:
    return tuple(map(_frozen, key)) if isinstance(key, list) else key


def _array(value: npt.NDArray[Any], expected: np.dtype | None) -> Any:
    if value.size > MOST_LISTED or value.dtype.kind not in "biuf":
        listed: Any = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    elif value.dtype.kind == "f":
        flat = [None if x != x else x if math.isfinite(x) else str(x) for x in value.ravel().tolist()]
        listed = np.array(flat, dtype=object).reshape(value.shape).tolist()
    else:
        listed = value.tolist()
    if isinstance(listed, str) or expected is None or value.dtype != expected or not value.size:
        return {"dtype": value.dtype.str, "shape": list(value.shape), "values": listed}
    return listed


def _from_array(plain: Any, expected: np.dtype | None) -> npt.NDArray[Any]:
    if not isinstance(plain, dict):
        return np.array(plain, dtype=expected)
    dtype, shape, values = np.dtype(plain["dtype"]), plain["shape"], plain["values"]
    if isinstance(values, str):
        return np.frombuffer(base64.b64decode(values), dtype=dtype).reshape(shape).copy()
    return np.array(values, dtype=dtype).reshape(shape)


def _member(hint: Any, kind: type) -> Any:
    """The hint itself, or of a union the member that is a `kind`."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = ((member, typing.get_origin(member) or member) for member in members)
    return next((member for member, of in kinds if isinstance(of, type) and issubclass(of, kind)), Any)


def _dtype(hint: Any) -> np.dtype | None:
    """The dtype that `NDArray[...]` names."""
    arguments = typing.get_args(hint)
    inner = typing.get_args(arguments[1]) if len(arguments) == 2 else ()
    return np.dtype(inner[0]) if inner and isinstance(inner[0], type) and inner[0] is not np.generic else None


def _mapping(hint: Any) -> tuple[Any, Any]:
    """The hints of keys and values; a class made of such a mapping, as `dict[str, Tensor]`, has those of its base."""
    arguments = typing.get_args(hint)
    if not arguments:
        arguments = next((a for base in getattr(hint, "__orig_bases__", ()) if (a := typing.get_args(base))), ())
    return arguments if len(arguments) == 2 else (Any, Any)  # pyright: ignore[reportReturnType]


def _elements(hint: Any, count: int) -> Sequence[Any]:
    """A hint for each of `count` elements."""
    arguments = typing.get_args(hint)
    if not arguments:
        return [Any] * count
    if typing.get_origin(hint) is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        return arguments
    return [arguments[0]] * count
