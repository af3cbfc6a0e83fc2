"""Normalisations: each value minus the mean, over the deviation of a set of values; then a pointwise affine map."""

from collections.abc import Sequence
from typing import Any

from lmc.symmetry.discovery.rules import core
from lmc.symmetry.discovery.rules.moves import reshape
from lmc.symmetry.discovery.rules.registry import Op, named, rule
from lmc.symmetry.discovery.tags import Tag


def normalise(op: Op, x: Tag, dims: tuple[int, ...]) -> Tag:
    """R over `dims`, put back in place (E)."""
    return core.pointwise(op.units, x.shape, [x, core.reduce(op.units, x, dims, keepdim=True)])


def present(*tags: Tag | None) -> list[Tag]:
    return [t for t in tags if t is not None]


@rule(*named("softmax _softmax log_softmax _log_softmax _safe_softmax"))
def softmax(op: Op, x: Tag, dim: int, *_: Any, **__: Any) -> Tag:
    return normalise(op, x, (dim % len(x.shape),) if x.shape else ())


@rule(*named("layer_norm native_layer_norm rms_norm _fused_rms_norm"))
def layer_norm(op: Op, x: Tag, shape: Sequence[int], weight: Tag | None = None, bias: Any = None, *_: Any) -> Any:
    """Over the last dims."""
    dims = tuple(range(len(x.shape) - len(shape), len(x.shape)))
    affine = present(weight, bias if isinstance(bias, Tag) else None)
    result = core.pointwise(op.units, x.shape, [normalise(op, x, dims), *affine])
    statistics = core.reduce(op.units, x, dims, keepdim=True)
    return result if len(op.shapes) == 1 else (result, *(statistics,) * (len(op.shapes) - 1))


@rule(
    *named(
        "batch_norm _native_batch_norm_legit_no_training native_batch_norm _native_batch_norm_legit "
        "cudnn_batch_norm _batch_norm_no_update instance_norm _native_batch_norm_legit_functional"
    )
)
def batch_norm(op: Op, x: Tag, *args: Any, **kwargs: Any) -> Any:
    """Per channel (dim 1); in training and in instance norm also over the pixels (and the batch)."""
    vectors = [a for a in [*args, *kwargs.values()] if isinstance(a, Tag)]
    channels = [core.on_dim(v, 1, len(x.shape)) for v in vectors]
    pixels = tuple(range(2, len(x.shape)))
    if "instance" in op.name:
        x = normalise(op, x, pixels)
    elif "no_training" not in op.name and any(a is True for a in args):
        x = normalise(op, x, (0, *pixels))
    result = core.pointwise(op.units, x.shape, [x, *channels])
    if len(op.shapes) == 1:
        return result
    statistics = core.reduce(op.units, result, (0, *pixels), keepdim=False)
    return (result, *(statistics if s == statistics.shape else Tag(s) for s in op.shapes[1:]))


@rule(*named("group_norm native_group_norm"))
def group_norm(op: Op, x: Tag, *args: Any) -> Any:
    """Channels in consecutive groups, normalised with their pixels: channels move within a group, groups as a whole."""
    if "native" in op.name:
        weight, bias, groups = args[0], args[1], args[5]
    else:
        groups, weight, bias = args[0], args[1] if len(args) > 1 else None, args[2] if len(args) > 2 else None
    n, channels = x.shape[:2]
    grouped = reshape(x, (n, groups, channels // groups, *x.shape[2:]))
    y = reshape(normalise(op, grouped, tuple(range(2, len(grouped.shape)))), x.shape)
    affine = [core.on_dim(v, 1, len(x.shape)) for v in present(weight, bias)]
    result = core.pointwise(op.units, x.shape, [y, *affine])
    if len(op.shapes) == 1:
        return result
    statistics = core.reduce(op.units, grouped, tuple(range(2, len(grouped.shape))), keepdim=False)
    return (result, *(statistics for _ in op.shapes[1:]))
