"""E: operators that torch does not mark as pointwise but are, and those whose value does not depend on their input."""

from typing import Any

from lmc.symmetry.rules import core
from lmc.symmetry.rules.registry import Op, all_pointwise, named, rule, unknown
from lmc.symmetry.rules.tags import Tag

rule(
    *named(
        "where gelu silu hardswish hardsigmoid hardtanh masked_fill mish relu relu6 elu selu celu softplus "
        "leaky_relu threshold clamp rsub lerp logit hardshrink softshrink float_power addcmul addcdiv "
        "nan_to_num log_sigmoid"
    ),
    experts=True,
)(all_pointwise)


@rule(*named("prelu _prelu_kernel"))
def prelu(op: Op, x: Tag, weight: Tag) -> Tag:
    """The weight belongs to dim 1."""
    return core.pointwise(op.units, op.shape, [x, core.on_dim(weight, 1 if len(x.shape) > 1 else 0, len(x.shape))])


@rule(*named("rrelu rrelu_with_noise rrelu_with_noise_functional"))
def rrelu(op: Op, x: Tag, *args: Any, **_: Any) -> Any:
    """A leaky ReLU in evaluation mode; else random."""
    if any(a is True for a in args):
        return unknown(op, [x])
    result = core.pointwise(op.units, op.shape, [x])
    return result if len(op.shapes) == 1 else (result, *(Tag(shape) for shape in op.shapes[1:]))


@rule(*named("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty"))
def constant_like(op: Op, *_: Any, **__: Any) -> Tag:
    """The same number everywhere: no position differs from another."""
    return Tag(op.shape)


@rule(*named("glu"))
def glu(op: Op, x: Tag, dim: int = -1) -> Tag:
    """The first half times the sigmoid of the second half."""
    from lmc.symmetry.rules.moves import picked

    d = dim % len(x.shape)
    half = x.shape[d] // 2
    halves = [
        picked(op.units, x, op.shape, [d], lambda c, h=h: c.take(range(h * half, (h + 1) * half), axis=d))
        for h in (0, 1)
    ]
    return core.pointwise(op.units, op.shape, halves)
