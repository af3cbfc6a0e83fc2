"""C: contractions, that is sums of products over shared labels."""

from collections.abc import Sequence
from typing import Any

from lmc.symmetry.rules import core
from lmc.symmetry.rules.registry import Op, named, rule
from lmc.symmetry.tags import Tag

BATCH = [f"batch{i}" for i in range(16)]


@rule(*named("mm", "matmul", "bmm", "mv", "dot"))
def matmul(op: Op, a: Tag, b: Tag) -> Tag:
    """(..., m, k) x (..., k, n) -> (..., m, n); vectors lack m or n; leading dims broadcast."""
    rows, columns = (["m"] if len(a.shape) > 1 else []), (["n"] if len(b.shape) > 1 else [])
    lead = BATCH[: max(len(a.shape), len(b.shape)) - 2] if len(a.shape) > 2 or len(b.shape) > 2 else []
    labels_a = [*_last(lead, len(a.shape) - 2), *rows, "k"]
    labels_b = [*_last(lead, len(b.shape) - 2), "k", *columns]
    return core.contract(op.units, [(a, labels_a), (b, labels_b)], [*lead, *rows, *columns])


def _last(labels: list[str], n: int) -> list[str]:
    return labels[len(labels) - n :] if n > 0 else []


@rule(*named("linear"))
def linear(op: Op, x: Tag, weight: Tag, bias: Tag | None = None) -> Tag:
    """(..., i), (o, i), (o) -> (..., o)."""
    lead = BATCH[: len(x.shape) - 1]
    out = ["o"] if len(weight.shape) > 1 else []
    product = core.contract(op.units, [(x, [*lead, "i"]), (weight, [*out, "i"])], [*lead, *out])
    return product if bias is None else core.pointwise(op.units, op.shape, [product, bias])


@rule(*named("addmm", "baddbmm", "addmv", "addbmm"))
def addmm(op: Op, bias: Tag, a: Tag, b: Tag, **_: Any) -> Tag:
    return core.pointwise(op.units, op.shape, [bias, matmul(op, a, b)])


@rule(*named("einsum"))
def einsum(op: Op, equation: str, operands: Sequence[Tag], **_: Any) -> Tag:
    """Explicit einsum notation, without repeated labels in one operand."""
    terms, _, out = equation.replace(" ", "").partition("->")
    if "..." in equation or "->" not in equation or any(len(set(t)) < len(t) for t in terms.split(",")):
        for tag in operands:
            core.freeze(op.units, tag, f"einsum {equation}")
        return core.still(op.units, op.shape, f"einsum {equation}")
    return core.contract(op.units, [(t, list(labels)) for t, labels in zip(operands, terms.split(","), strict=True)], list(out))


@rule(*named("outer", "ger"))
def outer(op: Op, a: Tag, b: Tag) -> Tag:
    return core.contract(op.units, [(a, ["m"]), (b, ["n"])], ["m", "n"])


@rule(*named("bilinear", "_trilinear"))
def bilinear(op: Op, a: Tag, b: Tag, weight: Tag, bias: Tag | None = None) -> Tag:
    """(..., i), (..., j), (o, i, j) -> (..., o)."""
    lead = BATCH[: len(a.shape) - 1]
    product = core.contract(op.units, [(a, [*lead, "i"]), (b, [*lead, "j"]), (weight, ["o", "i", "j"])], [*lead, "o"])
    return product if not isinstance(bias, Tag) else core.pointwise(op.units, op.shape, [product, bias])
