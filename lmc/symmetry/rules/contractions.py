"""C: contractions, that is sums of products over shared labels: matrix products, convolutions and attention."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmc.symmetry.rules import chosen, core
from lmc.symmetry.rules.moves import reshape, run
from lmc.symmetry.rules.reductions import normalise
from lmc.symmetry.rules.registry import Op, named, rule, unknown
from lmc.symmetry.rules.tags import Tag, make

BATCH = [f"batch{i}" for i in range(16)]


@rule(*named("mm matmul bmm mv dot vdot"), experts=True)
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


@rule(*named("_cdist_forward _euclidean_dist"))
def distances(op: Op, a: Tag, b: Tag, *_: Any) -> Tag:
    """(..., m, k), (..., n, k) -> (..., m, n): any norm of a difference is a symmetric function of its entries."""
    lead = BATCH[: len(op.shape) - 2]
    labels = [[*_last(lead, len(t.shape) - 2), at, "k"] for t, at in ((a, "m"), (b, "n"))]
    return core.contract(op.units, [(a, labels[0]), (b, labels[1])], [*lead, "m", "n"])


@rule(*named("tensordot"), experts=True)
def tensordot(op: Op, a: Tag, b: Tag, dims_a: Sequence[int], dims_b: Sequence[int]) -> chosen.Operand:
    """Sum over pairs of dims."""
    labels_a = [f"a{d}" for d in range(len(a.shape))]
    labels_b = [f"b{d}" for d in range(len(b.shape))]
    for da, db in zip(dims_a, dims_b, strict=True):
        labels_b[db % len(b.shape)] = labels_a[da % len(a.shape)]
    out = [*(x for x in labels_a if x not in labels_b), *(x for x in labels_b if x not in labels_a)]
    return chosen.contract(op.units, [(a, labels_a), (b, labels_b)], out)


@rule(*named("conv1d conv2d conv3d"))
def conv(
    op: Op, x: Tag, weight: Tag, bias: Tag | None = None, stride: Any = 1, padding: Any = 0, _: Any = 1, groups: int = 1
) -> Tag:
    padding = 0 if padding == "valid" else padding
    return convolve(op, x, weight, bias, groups, plain_dims(x, op, weight, stride, padding), transposed=False)


@rule(*named("conv_transpose1d conv_transpose2d conv_transpose3d"))
def conv_transpose(
    op: Op, x: Tag, weight: Tag, bias: Tag | None = None, stride: Any = 1, padding: Any = 0, _: Any = 0, groups: int = 1,
    *__: Any,
) -> Tag:  # fmt: skip
    return convolve(op, x, weight, bias, groups, plain_dims(x, op, weight, stride, padding), transposed=True)


@rule(*named("convolution"))
def convolution(
    op: Op, x: Tag, weight: Tag, bias: Tag | None, stride: Any, padding: Any, _: Any, transposed: bool, __: Any, groups: int
) -> Tag:  # fmt: skip
    return convolve(op, x, weight, bias, groups, plain_dims(x, op, weight, stride, padding), transposed)


def plain_dims(x: Tag, op: Op, weight: Tag, stride: Any, padding: Any) -> tuple[bool, ...]:
    """For each spatial dim, whether the kernel has size 1 there, moves in steps of 1 and needs no padding: pixels along
    it are then a batch, each treated alike, and no sequence."""
    kernel, spatial = weight.shape[2:], len(weight.shape) - 2
    steps, widths = core.each_dim(stride, spatial), core.each_dim(padding, spatial)
    return tuple(
        k == 1 and s == 1 and p in (0, "same") and i == o
        for k, s, p, i, o in zip(kernel, steps, widths, x.shape[-spatial:], op.shape[-spatial:], strict=True)
    )


def convolve(
    op: Op, x: Tag, weight: Tag, bias: Tag | None, groups: int, plain: tuple[bool, ...], transposed: bool
) -> Tag:
    """x (n, g c, ...), weight (g o, c, ...) or, transposed, (g c, o, ...) -> (n, g o, ...)."""
    units, g, spatial = op.units, groups, len(plain)
    if len(x.shape) == spatial + 1:  # no batch dim
        x = reshape(x, (1, *x.shape))
    taps = tuple(range(2, 2 + spatial))
    pixels = tuple(d for d in taps if not plain[d - 2])
    flat = tuple(1 if d in pixels else n for d, n in enumerate(x.shape))
    x = core.squeeze(core.ordered(units, x, pixels, "pixel position", flat), pixels) if pixels else x
    weight = core.squeeze(
        core.ordered(units, weight, taps, "kernel position", (*weight.shape[:2], *(1,) * spatial)), taps
    )
    x = reshape(x, (x.shape[0], g, x.shape[1] // g, *x.shape[2:]))
    weight = reshape(weight, (g, weight.shape[0] // g, weight.shape[1]))
    kept = [f"p{d}" for d in taps if d not in pixels]
    labels = ["g", "c", "o"] if transposed else ["g", "o", "c"]
    product = core.contract(units, [(x, ["n", "g", "c", *kept]), (weight, labels)], ["n", "g", "o", *kept])
    channels = product.shape[1] * product.shape[2]
    size = tuple(1 if d in pixels else n for d, n in zip(taps, op.shape[-spatial:], strict=True))
    product = reshape(product, (*op.shape[: -spatial - 1], channels, *size))
    first = len(op.shape) - spatial
    operands = [product]
    operands += [core.still_along(units, op.shape[d - 2 + first], d - 2 + first, len(op.shape)) for d in pixels]
    if bias is not None:
        operands.append(core.on_dim(bias, first - 1, len(op.shape)))
    return core.pointwise(units, op.shape, operands)


@rule(*named("im2col"))
def columns(op: Op, x: Tag, *args: Any) -> Tag:
    """(n, c, h, w) -> (n, c k, l): k pixels of each of l windows. Where pixels are told apart by themselves, and do not
    move, pixel and window are numbered; else each coordinate goes through the operator."""
    mixed = [c for c in x.coords if c.shape[-2:] != (1, 1) and (max(c.shape[:-2]) > 1 or not op.units.is_frozen(c))]
    if mixed:
        inside = Tag(x.shape, (*x.coords, np.broadcast_to(op.units.frozen("inside the image", 1), x.shape)))
        return run(op, inside, *args)
    channels = [c for c in x.coords if c.shape[-2:] == (1, 1)]
    wide = (*x.shape[:-2], op.shape[-2] // x.shape[-3], op.shape[-1])
    places = [core.still_along(op.units, wide[d], d, len(wide)).coords for d in (len(wide) - 2, len(wide) - 1)]
    return reshape(make(op.units, wide, [*channels, *places[0], *places[1]]), op.shape)


@rule(*named("col2im"))
def fold(op: Op, x: Tag, *_: Any) -> Tag:
    """(n, c k, l) -> (n, c, h, w): the sum of what windows hold at each pixel."""
    split = reshape(x, (*op.shape[:-2], x.shape[-2] // op.shape[-3], x.shape[-1]))
    dims = (len(op.shape) - 2, len(op.shape) - 1)
    return core.ordered(op.units, split, dims, "pixel position", op.shape)


@rule(*named("grid_sampler grid_sampler_2d grid_sampler_3d cudnn_grid_sampler"))
def sample(op: Op, x: Tag, grid: Tag, *_: Any) -> Tag:
    """x (n, c, ...) read at the places (n, ..., 2 or 3) -> (n, c, ...): each channel alike, each place alike."""
    last, pixels = len(grid.shape) - 1, tuple(range(2, len(x.shape)))
    image = core.ordered(op.units, x, pixels, "pixel position", (*x.shape[:2], *(1,) * len(pixels)))
    place = core.squeeze(core.ordered(op.units, grid, (last,), "x and y", (*grid.shape[:-1], 1)), (last,))
    return core.pointwise(op.units, op.shape, [image, reshape(place, (place.shape[0], 1, *place.shape[1:]))])


@rule(*named("scaled_dot_product_attention _scaled_dot_product_attention_math"))
def attention(op: Op, q: Tag, k: Tag, v: Tag, mask: Tag | None = None, *args: Any, **kwargs: Any) -> Any:
    """q (..., h, m, d), k (..., h, n, d), v (..., h, n, e) -> (..., h, m, e), and the weights (..., h, m, n) where they are
    asked for. Grouped queries repeat each key head."""
    units = op.units
    if (args and args[0]) or kwargs.get("dropout_p"):  # a random mask
        return unknown(op, [t for t in (q, k, v, mask) if t is not None])
    if not len(q.shape) == len(k.shape) == len(v.shape):
        q, k, v = (
            reshape(t, (1,) * (max(map(len, (q.shape, k.shape, v.shape))) - len(t.shape)) + t.shape) for t in (q, k, v)
        )
    causal = (len(args) > 1 and args[1]) or kwargs.get("is_causal", False)
    if len(q.shape) > 2:
        k, v = (repeat_heads(t, q.shape[-3]) for t in (k, v))
    lead = BATCH[: len(q.shape) - 2]
    scores = core.contract(units, [(q, [*lead, "m", "d"]), (k, [*lead, "n", "d"])], [*lead, "m", "n"])
    operands = [scores] if mask is None else [scores, mask]
    if causal:
        operands.append(core.still(units, scores.shape[-2:], "causal mask"))
    weights = normalise(op, core.pointwise(units, scores.shape, operands), (len(scores.shape) - 1,))
    result = core.contract(units, [(weights, [*lead, "m", "n"]), (v, [*lead, "n", "e"])], [*lead, "m", "e"])
    return result if len(op.shapes) == 1 else (result, weights)


def repeat_heads(x: Tag, heads: int) -> Tag:
    """Each key head serves `heads / key heads` consecutive query heads; one head serves all of the others."""
    *lead, h, n, d = x.shape
    if h in (1, heads) or heads == 1:
        return x
    wide = Tag((*lead, h, heads // h, n, d), tuple(c.reshape((*c.shape[:-2], 1, *c.shape[-2:])) for c in x.coords))
    return reshape(wide, (*lead, heads, n, d))
