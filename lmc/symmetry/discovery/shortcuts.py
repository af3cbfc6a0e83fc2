"""A piece picked out of a concatenation is a piece of one part: the last layer's state out of all stacked states. Reading
it off the part keeps the parts apart; a concatenation as a tensor of its own ties them along their other dims."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from lmc.symmetry.discovery.rules.moves import reshape, window
from lmc.symmetry.discovery.tags import Tag
from lmc.symmetry.discovery.units import Units


@dataclass(frozen=True)
class Piece:
    """`length` indices from `start` on along `dim` of `part` (the only one, if the parts were stacked)."""

    part: Node
    dim: int
    start: int
    length: int
    stacked: bool


def pieces(nodes: Sequence[Node]) -> dict[Node, Piece]:
    """For each select or slice that falls into one part of a concatenation, that piece."""
    found: dict[Node, Piece] = {}
    for node in nodes:
        stacked = name_of(node) == "aten.stack"
        if not stacked and name_of(node) not in ("aten.cat", "aten.concat"):
            continue
        parts, ndim = node.args[0], node.meta["val"].dim()
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(parts, (list, tuple)) or not isinstance(given, int):
            continue
        dim, start = given % ndim, 0
        picks = {user: span for user in node.users if (span := span_of(user, dim, node.meta["val"]))}
        for part in parts:
            if not isinstance(part, Node) or not isinstance(part.meta.get("val"), Tensor):
                break
            shape = part.meta["val"].shape
            if not stacked and len(shape) != ndim:
                continue  # torch lets an empty vector stand beside tensors of any shape: a key-value cache at its start
            size = 1 if stacked else shape[dim]
            for user, (first, length) in picks.items():
                if start <= first and first + length <= start + size:
                    found[user] = Piece(part, dim, first - start, length, stacked)
            start += size
    return found


def name_of(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target))


def span_of(node: Node, dim: int, whole: Tensor) -> tuple[int, int] | None:
    """First index and length of what a select or slice along `dim` picks, none for other operators."""
    args: tuple[Any, ...] = node.args
    size = int(whole.shape[dim])
    if name_of(node) == "aten.select" and args[1] % whole.dim() == dim:
        return args[2] % size, 1
    if name_of(node) == "aten.slice" and (args[1] if len(args) > 1 else 0) % whole.dim() == dim:
        start, end, by = (*args[2:5], None, None, None)[:3]
        first, stop, step = slice(start, end, by).indices(size)
        return (first, stop - first) if step == 1 and stop > first else None
    return None


def piece_tag(units: Units, part: Tag, piece: Piece, shape: tuple[int, ...]) -> Tag:
    """The tag of a piece, of the shape that the select or slice gives it."""
    if piece.stacked:
        return reshape(part, shape)
    kept = tuple(piece.length if d == piece.dim else n for d, n in enumerate(part.shape))
    return reshape(window(units, part, kept, piece.dim, piece.start), shape)
