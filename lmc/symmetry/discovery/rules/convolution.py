"""C over channels, order-dependent (F) over pixels: convolutions of any dimension, grouped and transposed."""

from typing import Any

from lmc.symmetry.discovery.rules import core
from lmc.symmetry.discovery.rules.moves import reshape
from lmc.symmetry.discovery.rules.registry import Op, named, rule
from lmc.symmetry.discovery.tags import Tag


@rule(*named("conv1d conv2d conv3d"))
def conv(op: Op, x: Tag, weight: Tag, bias: Tag | None = None, *args: Any) -> Tag:
    groups = args[3] if len(args) > 3 else 1
    return convolve(op, x, weight, bias, groups, transposed=False)


@rule(*named("conv_transpose1d conv_transpose2d conv_transpose3d"))
def conv_transpose(op: Op, x: Tag, weight: Tag, bias: Tag | None = None, *args: Any) -> Tag:
    groups = args[3] if len(args) > 3 else 1
    return convolve(op, x, weight, bias, groups, transposed=True)


@rule(*named("convolution"))
def convolution(op: Op, x: Tag, weight: Tag, bias: Tag | None, *args: Any) -> Tag:
    return convolve(op, x, weight, bias, groups=args[5], transposed=args[3])


def convolve(op: Op, x: Tag, weight: Tag, bias: Tag | None, groups: int, transposed: bool) -> Tag:
    """x (n, g c, ...), weight (g o, c, ...) or, transposed, (g c, o, ...) -> (n, g o, ...)."""
    units, g = op.units, groups
    spatial = len(weight.shape) - 2
    if len(x.shape) == spatial + 1:  # no batch dim
        x = reshape(x, (1, *x.shape))
    pixels, taps = tuple(range(2, 2 + spatial)), tuple(range(2, len(weight.shape)))
    x = core.squeeze(core.ordered(units, x, pixels, "pixel position", (*x.shape[:2], *(1,) * spatial)), pixels)
    weight = core.squeeze(
        core.ordered(units, weight, taps, "kernel position", (*weight.shape[:2], *(1,) * spatial)), taps
    )
    x = reshape(x, (x.shape[0], g, x.shape[1] // g))
    weight = reshape(weight, (g, weight.shape[0] // g, weight.shape[1]))
    labels = ["g", "c", "o"] if transposed else ["g", "o", "c"]
    product = core.contract(units, [(x, ["n", "g", "c"]), (weight, labels)], ["n", "g", "o"])
    channels = product.shape[1] * product.shape[2]
    product = reshape(product, (*op.shape[: -spatial - 1], channels, *(1,) * spatial))
    operands = [product, core.still(units, (*(1,) * (len(op.shape) - spatial), *op.shape[-spatial:]), "pixel position")]
    if bias is not None:
        operands.append(core.on_dim(bias, len(op.shape) - spatial - 1, len(op.shape)))
    return core.pointwise(units, op.shape, operands)
