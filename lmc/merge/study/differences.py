"""Differences between weight sets that do not fit together, as a table instead of the first error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lmc.merge.engine.tensors import outline
from lmc.weights import tied_names
from lmc.weights.agreement import optional
from lmc.weights.checkpoint import Checkpoint

Kind = Literal["missing", "shape", "dtype", "tie", "buffer"]


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same kind of thing everywhere.

    Attributes:
        name: of the tensor.
        kind: what differs: it is "missing" somewhere (or an optional "buffer" is, which does no harm), its "shape", its
            "dtype", or what it is a "tie" with.
        found: what each model (and last the base, if there is one) has, in words.
    """

    name: str
    kind: Kind
    found: tuple[str, ...]


def differences(states: Sequence[Mapping[str, Tensor]]) -> tuple[Difference, ...]:
    """All tensors in which the weight sets differ other than by values; nothing is read from checkpoints on disk."""
    outlines = [outline(state) for state in states]
    ties = [state.ties if isinstance(state, Checkpoint) else tied_names(state) for state in states]
    rows = []
    for name in dict.fromkeys(name for seen in outlines for name in seen):
        tensors = [seen.get(name) for seen in outlines]
        shapes = {None if tensor is None else tuple(tensor.shape) for tensor in tensors}
        dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
        kind: Kind | None = (
            "missing" if None in shapes else "shape" if len(shapes) > 1 else "dtype" if len(dtypes) > 1 else None
        )
        if kind == "missing" and any(tensor is not None and optional(name, tensor) for tensor in tensors):
            kind = "buffer"
        if kind:
            rows.append(Difference(name, kind, tuple(map(_describe, tensors))))
        elif len(partners := {tied.get(name) for tied in ties}) > 1 and None in partners:
            rows.append(Difference(name, "tie", tuple(_partner(tied.get(name)) for tied in ties)))
    return tuple(rows)


def _describe(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _partner(name: str | None) -> str:
    return f"one with {name}" if name else "on its own"
