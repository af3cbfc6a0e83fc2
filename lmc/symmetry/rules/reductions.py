"""E: functions of each value alone. R: functions of a multiset of values along some dims, normalisations among them. F:
functions of a sequence of values."""

from collections.abc import Sequence
from typing import Any

from lmc.symmetry.rules import core
from lmc.symmetry.rules.moves import picked, reshape
from lmc.symmetry.rules.registry import Op, Parts, all_pointwise, named, rule, unknown
from lmc.symmetry.rules.tags import Tag

rule(
    *named(
        "where gelu silu hardswish hardsigmoid hardtanh masked_fill mish relu relu6 elu selu celu softplus "
        "leaky_relu threshold clamp rsub lerp logit hardshrink softshrink float_power addcmul addcdiv "
        "nan_to_num log_sigmoid floor_divide"
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
    d = dim % len(x.shape)
    half = x.shape[d] // 2
    halves = [
        picked(op.units, x, op.shape, [d], lambda c, h=h: c.take(range(h * half, (h + 1) * half), axis=d))
        for h in (0, 1)
    ]
    return core.pointwise(op.units, op.shape, halves)


@rule(*named("sum mean var std amax amin any all logsumexp nansum prod var_mean std_mean count_nonzero aminmax"))
def reduction(op: Op, x: Tag, dims: Any = None, *_: Any, **kwargs: Any) -> Any:
    dims = kwargs.get("dim", None if isinstance(dims, bool) else dims)
    return _reduced(op, x, core.normal_dims(dims, len(x.shape)))


@rule(*named("linalg_vector_norm norm"))
def vector_norm(op: Op, x: Tag, _: Any = 2, dims: int | Sequence[int] | None = None, *__: Any, **___: Any) -> Any:
    return _reduced(op, x, core.normal_dims(dims, len(x.shape)))


def _reduced(op: Op, x: Tag, dims: tuple[int, ...]) -> Any:
    keepdim = len(op.shape) == len(x.shape)
    result = core.reduce(op.units, x, dims, keepdim)
    return result if len(op.shapes) == 1 else (result,) * len(op.shapes)


@rule(*named("max min median nanmedian"), axes=True)
def extremum(op: Op, x: Tag, dim: Any = None, *_: Any, **__: Any) -> Any:
    """Overall, pairwise of two tensors, or along a dim with the position of the extremum."""
    if isinstance(dim, Tag):
        return core.pointwise(op.units, op.shape, [x, dim])
    values = core.reduce(op.units, x, core.normal_dims(dim, len(x.shape)), len(op.shape) == len(x.shape))
    if dim is None:
        return values
    return found_at(op, x, dim % len(x.shape), values)


@rule(*named("kthvalue mode"), axes=True)
def found_value(op: Op, x: Tag, *args: Any, **kwargs: Any) -> Any:
    """(x, k, dim) or (x, dim) -> a value along the dim, and its position."""
    given = args[1:] if "kthvalue" in op.name else args
    return extremum(op, x, kwargs.get("dim", given[0] if given else -1))


@rule(*named("argmax argmin"), axes=True)
def argument(op: Op, x: Tag, dim: int | None = None, *_: Any, **__: Any) -> Tag:
    if dim is None:
        core.freeze(op.units, x, op.name)
        return core.still(op.units, op.shape, op.name)
    return core.choice(op.units, x, dim % len(x.shape), op.shape, op.no_ties)


@rule(*named("sort topk"), axes=True)
def sort(op: Op, x: Tag, *args: Any, **kwargs: Any) -> Parts:
    """The values in order are a symmetric function of the values along the dim; only their ranks are told apart."""
    is_topk = "topk" in op.name
    given = args[1:] if is_topk else args
    dims = [a for a in given if type(a) is int]
    d = kwargs.get("dim", dims[0] if dims else -1) % len(x.shape)
    values = core.ranked(op.units, x, d, op.shape)
    return found_at(op, x, d, values)


def found_at(op: Op, x: Tag, dim: int, values: Tag) -> Parts:
    """Values along a dim and where they are; where nobody asks where, it makes no difference in which order they come."""
    return Parts([lambda: values, lambda: core.choice(op.units, x, dim, op.shape, op.no_ties)])


@rule(*named("cumsum cumprod logcumsumexp cummax cummin"), axes=True)
def cumulative(op: Op, x: Tag, dim: int, *_: Any, **__: Any) -> Any:
    result = core.ordered(op.units, x, (dim % len(x.shape),), op.name, op.shape)
    return result if len(op.shapes) == 1 else (result,) * len(op.shapes)


POOLS = (
    "max_pool avg_pool adaptive_avg_pool adaptive_max_pool _adaptive_avg_pool lp_pool upsample_nearest upsample_linear "
    "upsample_bilinear upsample_bicubic upsample_trilinear _upsample_nearest_exact"
).split()
SUFFIXES = ("", "1d", "2d", "3d", "1d_with_indices", "2d_with_indices", "3d_with_indices")
ANTIALIASED = "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa"


@rule(*named(*(stem + suffix for stem in POOLS for suffix in SUFFIXES), ANTIALIASED))
def pool(op: Op, x: Tag, *args: Any, **_: Any) -> Any:
    """Pooling and interpolation: depend on the order of all dims after batch and channel, but of those where each
    window is one pixel."""
    spatial = len(x.shape) - 2
    for suffix in ("1d", "2d", "3d"):
        if suffix in op.name:
            spatial = int(suffix[0])
    dims = tuple(range(len(x.shape) - spatial, len(x.shape)))
    if all(n == 1 for n in op.shape[-spatial:]) and "adaptive_avg" in op.name:
        return core.reduce(op.units, x, dims, keepdim=True)
    if len(op.shapes) == 1:  # the position of a maximum is counted over all dims
        plain = windows_of_one(op, x, args, spatial)
        dims = tuple(d for d, alone in zip(dims, plain, strict=True) if not alone)
    if not dims:  # of another size where a divisor is given: not the same tensor
        return core.pointwise(op.units, op.shape, [x])
    result = core.ordered(op.units, x, dims, "pixel position", op.shape)
    return result if len(op.shapes) == 1 else (result,) * len(op.shapes)


def windows_of_one(op: Op, x: Tag, args: tuple[Any, ...], spatial: int) -> list[bool]:
    """For each spatial dim, whether each result there is one value of x, at the same place."""
    same = [i == o for i, o in zip(x.shape[-spatial:], op.shape[-spatial:], strict=True)]
    if "adaptive" in op.name:
        return same
    if "upsample" in op.name or "lp_pool" in op.name:
        return [False] * spatial
    kernel, stride, padding = (core.each_dim(v, spatial) for v in (*args, *([], 0)[len(args) - 1 :])[:3])
    stride = stride or kernel
    return [s and k == 1 and by == 1 and p == 0 for s, k, by, p in zip(same, kernel, stride, padding, strict=True)]


@rule(*named("_fft_c2c _fft_r2c _fft_c2r"))
def fourier(op: Op, x: Tag, dims: Sequence[int], *_: Any) -> Tag:
    """A transform mixes the transformed dims by frequency and leaves the others alone."""
    return core.ordered(op.units, x, core.normal_dims(list(dims), len(x.shape)), "Fourier transform", op.shape)


@rule(*named("view_as_real view_as_real_copy"))
def view_as_real(op: Op, x: Tag) -> Tag:
    """A last dim of two: real and imaginary part."""
    parts = core.still(op.units, (*(1,) * len(x.shape), 2), "real and imaginary part")
    wide = Tag((*x.shape, 1), tuple(c[..., None] for c in x.coords))
    return core.pointwise(op.units, op.shape, [wide, parts])


@rule(*named("view_as_complex view_as_complex_copy"))
def view_as_complex(op: Op, x: Tag) -> Tag:
    """The last dim of two becomes one complex number."""
    last = len(x.shape) - 1
    return core.squeeze(core.ordered(op.units, x, (last,), "real and imaginary part", (*x.shape[:-1], 1)), (last,))


@rule(*named("real imag complex polar _conj conj"))
def complex_parts(op: Op, *parts: Tag) -> Tag:
    return core.pointwise(op.units, op.shape, list(parts))


def normalise(op: Op, x: Tag, dims: tuple[int, ...]) -> Tag:
    """R over `dims`, put back in place (E)."""
    return core.pointwise(op.units, x.shape, [x, core.reduce(op.units, x, dims, keepdim=True)])


def present(*tags: Tag | None) -> list[Tag]:
    return [t for t in tags if t is not None]


@rule(*named("_weight_norm"))
def weight_norm(op: Op, v: Tag, g: Tag, dim: int = 0) -> Tag:
    """A direction for each index along `dim` times its length; one for the whole tensor where `dim` is -1."""
    directions = normalise(op, v, tuple(d for d in range(len(v.shape)) if d != dim))
    return core.pointwise(op.units, op.shape, [directions, g])


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
