"""The origin of tensors as the graph shows it, beyond what a tag can hold.

*Pieces.* A piece picked out of a concatenation is a piece of one part: the last layer's state out of all stacked
states. Reading it off the part keeps the parts apart; a concatenation as a tensor of its own ties them along their
other dims.

*Ties.* argmax, top-k and sort name units by their position only if no two values are equal: ties are broken by
position, which no symmetry respects. The entries of a product with a parameter, along an axis of that parameter, differ
for almost all weights, and increasing functions, squares, and sums over other axes keep them apart. Looked-up rows,
comparisons, masks, rounding and rectifiers can make ties: behind them, and behind everything that is not listed here,
nothing may move.

*Runs.* Rows sorted by expert, and the ends of the runs that a grouped product takes, are two sides of one choice: the
matrix of a row and the bias looked up for it belong to the same expert.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from lmc.symmetry.rules.moves import reshape, window
from lmc.symmetry.rules.tags import Tag
from lmc.symmetry.rules.units import Units
from lmc.symmetry.tracing.graph import Graph
from lmc.weights.state import inexact

INJECTIVE = set(
    "softmax _softmax log_softmax _log_softmax sigmoid tanh exp neg log clone contiguous _to_copy to detach alias "
    "lift_fresh_copy softplus square pow abs sqrt rsqrt".split()
)
FINDERS = set("argmax argmin max min median nanmedian topk sort kthvalue mode".split())
SUMS = ("sum", "mean", "linalg_vector_norm")
MOVES = set("view reshape transpose t permute".split())


def short_name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def chosen_dim(node: Node) -> int | None:
    """The dim along which an operator finds positions of values, none if it does no such thing."""
    name, args = short_name(node), node.args
    if name not in FINDERS or not isinstance(args[0], Node):
        return None
    given: Any = [a for a in args[2 if name in ("topk", "kthvalue") else 1 :] if type(a) is int]
    default = -1 if name in ("topk", "sort", "kthvalue", "mode") else None
    dim = node.kwargs.get("dim", given[0] if given else default)
    return dim % args[0].meta["val"].dim() if isinstance(dim, int) and args[0].meta["val"].dim() else None


def chooses_without_ties(graph: Graph, node: Node) -> bool:
    """Whether an operator that finds positions of values finds them among values that differ."""
    dim = chosen_dim(node)
    return dim is not None and isinstance(node.args[0], Node) and differ(graph, node.args[0], dim)


def differ(graph: Graph, node: Any, dim: int) -> bool:
    """Whether the entries of a node along `dim` differ from each other for almost all parameters."""
    if not isinstance(node, Node) or not 0 <= dim < node.meta["val"].dim():
        return False
    name, args, last = short_name(node), node.args, node.meta["val"].dim() - 1
    leaf = graph.leaves.get(node.name)
    if leaf is not None:
        return leaf.kind in ("parameter", "buffer")
    if name in INJECTIVE:  # but for casts to integers, which round
        return inexact(node.meta["val"]) and differ(graph, args[0], dim)
    if name in MOVES or name in SUMS:
        before = dim_before(node, dim)
        return before is not None and differ(graph, args[0], before)
    if name in ("add", "sub", "mul", "div"):
        scaled = not isinstance(args[1], Node) and bool(args[1] != 0) and node.kwargs.get("rounding_mode") is None
        return (name in ("add", "sub") or scaled) and any(differ_in_broadcast(graph, a, node, dim) for a in args[:2])
    if name in ("linear", "mm", "matmul", "bmm", "addmm"):
        a, b = args[1:3] if name == "addmm" else args[:2]
        if name == "linear":
            return dim == last and differ(graph, b, 0)
        if not (isinstance(a, Node) and isinstance(b, Node)):
            return False
        m, n = a.meta["val"].dim(), b.meta["val"].dim()  # a vector is summed along its only axis
        column = n > 1 and dim == last and differ(graph, b, n - 1)
        return column or (m > 1 and dim == last - (n > 1) and differ(graph, a, m - 2))
    if name in ("_cdist_forward", "_euclidean_dist") and 0.0 not in args:  # p = 0 counts entries that differ
        own, at = (args[1], last) if dim == last else (args[0], last - 1)
        return isinstance(own, Node) and dim == at and differ(graph, own, own.meta["val"].dim() - 2)
    if name == "einsum" and isinstance(args[0], str) and isinstance(args[1], Sequence):
        terms, _, out = args[0].replace(" ", "").partition("->")
        labels = zip(terms.split(","), args[1], strict=True)
        plain = "." not in args[0] and dim < len(out)
        return plain and any(out[dim] in term and differ(graph, p, term.index(out[dim])) for term, p in labels)
    return False


def differ_in_broadcast(graph: Graph, operand: Any, result: Node, dim: int) -> bool:
    """The same for an operand of a sum or a multiple of it: it must itself extend along the dim."""
    if not isinstance(operand, Node):
        return False
    own = dim - (result.meta["val"].dim() - operand.meta["val"].dim())
    return own >= 0 and operand.meta["val"].shape[own] > 1 and differ(graph, operand, own)


def dim_before(node: Node, dim: int) -> int | None:
    """The dim of its operand that a dim of a moved or summed tensor was; in a view only the last one is followed."""
    source = node.args[0]
    if not isinstance(source, Node):
        return None
    shape, before = node.meta["val"].shape, source.meta["val"].shape
    name, last = short_name(node), len(shape) - 1
    args: Any = node.args
    if name == "permute":
        return args[1][dim] % len(before)
    if name in ("transpose", "t"):
        a, b = (d % len(shape) for d in (args[1:3] if name == "transpose" else (0, -1)))
        return {a: b, b: a}.get(dim, dim)
    if name in SUMS:
        summed = args[2 if name == "linalg_vector_norm" else 1] if len(args) > 1 else None
        if not isinstance(summed, (list, tuple)) or len(summed) == 0:
            return None
        gone = {d % len(before) for d in summed}
        kept = [d for d in range(len(before)) if len(before) == len(shape) or d not in gone]
        return None if kept[dim] in gone else kept[dim]
    return len(before) - 1 if dim == last and before and before[-1] == shape[-1] else None


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
        stacked = short_name(node) == "stack"
        if not stacked and short_name(node) not in ("cat", "concat"):
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


def span_of(node: Node, dim: int, whole: Tensor) -> tuple[int, int] | None:
    """First index and length of what a select or slice along `dim` picks, none for other operators."""
    args: tuple[Any, ...] = node.args
    size = int(whole.shape[dim])
    if short_name(node) == "select" and args[1] % whole.dim() == dim:
        return args[2] % size, 1
    if short_name(node) == "slice" and (args[1] if len(args) > 1 else 0) % whole.dim() == dim:
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


CASTS = set("_to_copy to type_as clone contiguous detach alias".split())


def sorted_runs(graph: Graph) -> dict[Node, tuple[Node, int]]:
    """For each vector of experts' numbers in sorted order, and each vector of the ends of its runs from which grouped
    products take their rows: that sorted vector, and the number of experts."""
    found: dict[Node, tuple[Node, int]] = {}
    for node in graph.nodes:
        if "grouped_mm" not in short_name(node):
            continue
        given = (*node.args, *node.kwargs.values())
        ends = next((a for a in given[2:] if isinstance(a, Node)), None)
        experts = int(given[1].meta["val"].shape[0]) if isinstance(given[1], Node) else 0
        rows = None if ends is None else counted(ends, experts)
        if ends is not None and rows is not None and is_sorted(rows):
            found |= {ends: (rows, experts), rows: (rows, experts)}
    return found


def counted(ends: Node, experts: int) -> Node | None:
    """The vector whose numbers 0 ... experts - 1 are counted, and the counts added up, in `ends`."""
    total = uncast(ends)
    if short_name(total) != "cumsum":
        return None
    count = uncast(total.args[0])
    args: tuple[Any, ...] = count.args
    given = {"histc": (experts, 0, experts - 1), "bincount": (None, experts)}
    told = args[1:] == given.get(short_name(count), "no count")
    return uncast(args[0]) if told else None


def is_sorted(rows: Node) -> bool:
    """Whether a vector holds its numbers in ascending order: the values of a sort, or looked up in a sort's order."""
    args: Any = rows.args
    if rows.meta["val"].dim() != 1:
        return False
    if short_name(rows) == "index" and len(args[1]) == 1:
        order = args[1][0]
        return is_result(order, 1) and uncast(order.args[0].args[0]) is uncast(args[0])
    return is_result(rows, 0)


def is_result(node: Any, number: int) -> bool:
    """Whether a node is the values (0) or the order (1) of an ascending sort."""
    return bool(
        isinstance(node, Node)
        and node.target is operator.getitem
        and node.args[1] == number
        and isinstance(node.args[0], Node)
        and short_name(node.args[0]) == "sort"
        and True not in (*node.args[0].args[2:], node.args[0].kwargs.get("descending"))
    )


def uncast(node: Any) -> Any:
    """The node of which a node is a copy or cast."""
    while isinstance(node, Node) and short_name(node) in CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
