"""C: contractions, that is sums of products over shared labels."""

from collections.abc import Sequence
from typing import Any

from lmc.symmetry.discovery.rules import chosen, core
from lmc.symmetry.discovery.rules.moves import reshape
from lmc.symmetry.discovery.rules.registry import Op, named, rule
from lmc.symmetry.discovery.tags import Tag

BATCH = [f"batch{i}" for i in range(16)]


@rule(*named("mm matmul bmm mv dot"), experts=True)
def matmul(op: Op, a: Tag, b: Tag) -> chosen.Operand:
    """(..., m, k) x (..., k, n) -> (..., m, n); vectors lack m or n; leading dims broadcast."""
    rows, columns = (["m"] if len(a.shape) > 1 else []), (["n"] if len(b.shape) > 1 else [])
    lead = BATCH[: max(len(a.shape), len(b.shape)) - 2] if len(a.shape) > 2 or len(b.shape) > 2 else []
    labels_a = [*_last(lead, len(a.shape) - 2), *rows, "k"]
    labels_b = [*_last(lead, len(b.shape) - 2), "k", *columns]
    return chosen.contract(op.units, [(a, labels_a), (b, labels_b)], [*lead, *rows, *columns])


def _last(labels: list[str], n: int) -> list[str]:
    return labels[len(labels) - n :] if n > 0 else []


@rule(*named("linear"), experts=True)
def linear(op: Op, x: Tag, weight: Tag, bias: Tag | None = None) -> chosen.Operand:
    """(..., i), (o, i), (o) -> (..., o)."""
    lead = BATCH[: len(x.shape) - 1]
    out = ["o"] if len(weight.shape) > 1 else []
    product = chosen.contract(op.units, [(x, [*lead, "i"]), (weight, [*out, "i"])], [*lead, *out])
    return product if bias is None else chosen.pointwise(op.units, op.shape, [product, bias])


@rule(*named("addmm baddbmm addmv"), experts=True)
def addmm(op: Op, bias: Tag, a: Tag, b: Tag, **_: Any) -> chosen.Operand:
    return chosen.pointwise(op.units, op.shape, [bias, matmul(op, a, b)])


@rule(*named("addbmm"), experts=True)
def addbmm(op: Op, bias: Tag, a: Tag, b: Tag, **_: Any) -> chosen.Operand:
    """(n, o) + (k, n, m) x (k, m, o), summed over k."""
    product = chosen.contract(op.units, [(a, ["k", "n", "m"]), (b, ["k", "m", "o"])], ["n", "o"])
    return chosen.pointwise(op.units, op.shape, [bias, product])


@rule(*named("einsum"), experts=True)
def einsum(op: Op, equation: str, operands: Sequence[Tag], **_: Any) -> chosen.Operand:
    """Any einsum without repeated labels in one operand."""
    terms, arrow, out = equation.replace(" ", "").partition("->")
    labels = [spelled(term, len(tag.shape)) for term, tag in zip(terms.split(","), operands, strict=True)]
    if any(len(set(term)) < len(term) for term in labels):
        for tag in operands:
            core.freeze(op.units, tag, f"einsum {equation}")
        return core.still(op.units, op.shape, f"einsum {equation}")
    result = spelled(out, len(op.shape))
    if not arrow:
        every = [label for term in labels for label in term]
        named_once = sorted(label for label in set(every) if every.count(label) == 1 and label not in BATCH)
        result = [*(label for label in BATCH if label in every), *named_once]
    return chosen.contract(op.units, list(zip(operands, labels, strict=True)), result)


def spelled(term: str, ndim: int) -> list[str]:
    """The labels of one operand, an ellipsis written out; it aligns to the right, as broadcasting does."""
    before, dots, after = term.partition("...")
    hidden = ndim - len(before) - len(after) if dots else 0
    return [*before, *BATCH[len(BATCH) - hidden :], *after] if dots else list(term)


@rule(*named("outer ger"))
def outer(op: Op, a: Tag, b: Tag) -> chosen.Operand:
    return chosen.contract(op.units, [(a, ["m"]), (b, ["n"])], ["m", "n"])


@rule(*named("bilinear"), experts=True)
def bilinear(op: Op, a: Tag, b: Tag, weight: Tag, bias: Tag | None = None) -> chosen.Operand:
    """(..., i), (..., j), (o, i, j) -> (..., o)."""
    lead = BATCH[: len(a.shape) - 1]
    operands = [(a, [*lead, "i"]), (b, [*lead, "j"]), (weight, ["o", "i", "j"])]
    product = chosen.contract(op.units, operands, [*lead, "o"])
    return product if bias is None else chosen.pointwise(op.units, op.shape, [product, bias])


@rule(*named("_trilinear"))
def trilinear(
    op: Op, a: Tag, b: Tag, c: Tag, wide_a: Any, wide_b: Any, wide_c: Any, summed: Any, *_: Any
) -> chosen.Operand:
    """The product of three tensors, each with dims of size 1 inserted, summed over some dims."""
    operands = []
    for tag, wide in ((a, wide_a), (b, wide_b), (c, wide_c)):
        shape = list(tag.shape)
        for d in sorted(wide):
            shape.insert(d, 1)
        operands.append(reshape(tag, tuple(shape)))
    full = tuple(max(t.shape[d] for t in operands) for d in range(len(operands[0].shape)))
    return chosen.reduce(op.units, chosen.pointwise(op.units, full, operands), tuple(sorted(summed)), keepdim=False)


@rule(*named("tensordot"), experts=True)
def tensordot(op: Op, a: Tag, b: Tag, dims_a: Sequence[int], dims_b: Sequence[int]) -> chosen.Operand:
    """Sum over pairs of dims."""
    labels_a = [f"a{d}" for d in range(len(a.shape))]
    labels_b = [f"b{d}" for d in range(len(b.shape))]
    for da, db in zip(dims_a, dims_b, strict=True):
        labels_b[db % len(b.shape)] = labels_a[da % len(a.shape)]
    out = [*(x for x in labels_a if x not in labels_b), *(x for x in labels_b if x not in labels_a)]
    return chosen.contract(op.units, [(a, labels_a), (b, labels_b)], out)
