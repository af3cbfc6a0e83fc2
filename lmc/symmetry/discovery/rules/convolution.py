"""C over channels, order-dependent (F) over pixels: convolutions of any dimension, grouped and transposed; and windows
of an image as columns, and back."""

from typing import Any

import numpy as np

from lmc.symmetry.discovery.rules import core
from lmc.symmetry.discovery.rules.moves import reshape, run
from lmc.symmetry.discovery.rules.registry import Op, named, rule
from lmc.symmetry.discovery.tags import Tag, make


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
    """(n, c, h, w) -> (n, c k, l): k pixels of each of l windows. Where only channels (and the batch) move, pixel and
    window are numbered; else each coordinate goes through the operator."""
    if any(c.shape[-2:] != (1, 1) and not op.units.is_frozen(c.ravel()) for c in x.coords):
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
