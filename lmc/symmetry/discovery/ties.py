"""Whether the values that a choice is made from differ from each other.

argmax, top-k and sort name units by their position only if no two values are equal: ties are broken by position, which
no symmetry respects. The entries of a product with a parameter, along an axis of that parameter, differ for almost all
weights, and increasing functions, squares, and sums over other axes keep them apart. Looked-up rows, comparisons, masks, rounding and rectifiers
can make ties: behind them, and behind everything that is not listed here, nothing may move.
"""

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from lmc.symmetry.discovery.trace import Graph

INJECTIVE = set(
    "softmax _softmax log_softmax _log_softmax sigmoid tanh exp neg log clone contiguous _to_copy to detach alias "
    "lift_fresh_copy softplus square pow abs sqrt rsqrt".split()
)
SUMS = ("sum", "mean", "linalg_vector_norm")
MOVES = set("view reshape transpose t permute".split())


def short_name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def chosen_dim(node: Node) -> int | None:
    """The dim along which an operator finds positions of values, none if it does no such thing."""
    name, args = short_name(node), node.args
    if name not in ("argmax", "argmin", "max", "min", "median", "topk", "sort") or not isinstance(args[0], Node):
        return None
    given: Any = [a for a in args[2 if name == "topk" else 1 :] if type(a) is int]
    default = -1 if name in ("topk", "sort") else None
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
    if name in INJECTIVE:
        return differ(graph, args[0], dim)
    if name in MOVES or name in SUMS:
        before = dim_before(node, dim)
        return before is not None and differ(graph, args[0], before)
    if name in ("add", "sub", "mul", "div"):
        scalar = not isinstance(args[1], Node)
        return (
            any(differ_in_broadcast(graph, a, node, dim) for a in args[:2])
            if name in ("add", "sub") or scalar
            else False
        )
    if name in ("linear", "mm", "matmul", "bmm", "addmm"):
        a, b = args[1:3] if name == "addmm" else args[:2]
        if name == "linear":
            return dim == last and differ(graph, b, 0)
        sides = ((b, last, -1), (a, last - 1, -2))
        return any(
            isinstance(p, Node) and dim == at and differ(graph, p, p.meta["val"].dim() + of) for p, at, of in sides
        )
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
    """Which dim of its operand a dim of a moved or summed tensor was; in a view only the last one is followed."""
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
