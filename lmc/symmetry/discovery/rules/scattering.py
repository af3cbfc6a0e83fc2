"""I, the other way round: values put at, or added to, places chosen by data."""

from collections.abc import Sequence
from math import prod
from typing import Any

from lmc.symmetry.discovery.rules import core
from lmc.symmetry.discovery.rules.indexing import at_points
from lmc.symmetry.discovery.rules.moves import picked, reshape
from lmc.symmetry.discovery.rules.registry import Op, fixed, named, rule
from lmc.symmetry.discovery.tags import Tag


@rule(*named("scatter scatter_add scatter_reduce"), choices=True, axes=True)
def scatter(op: Op, x: Tag, dim: int, index: Tag, src: Any, *_: Any, **__: Any) -> Tag:
    """x with src[p] put at (or added to) p with p[dim] replaced by index[p]."""
    x = fixed(op.units, x)
    d = dim % len(x.shape)
    if isinstance(src, Tag) and src.shape != index.shape:
        shape = index.shape
        cut = tuple(slice(0, n) for n in shape)
        src = picked(op.units, src, shape, range(len(shape)), lambda c: c[cut])
    src = fixed(op.units, src)
    sources = [t for t in (index, src) if isinstance(t, Tag)]
    target = at_points(op, x, d, index)
    seen = core.pointwise(op.units, index.shape, [Tag(t.shape, t.coords) for t in sources])
    if "add" in op.name:
        seen = core.reduce(op.units, seen, (d,), keepdim=True)
    else:  # what is written last stays: the order along dim matters
        seen = core.ordered(
            op.units, seen, (d,), "order of writing", tuple(1 if e == d else n for e, n in enumerate(seen.shape))
        )
    if any(seen.shape[e] != x.shape[e] for e in range(len(x.shape)) if e != d):
        target = core.freeze(op.units, target, "partial scatter")
        return core.still(op.units, op.shape, "partial scatter")
    return core.pointwise(op.units, op.shape, [target, seen])


@rule(*named("index_add index_copy index_reduce index_fill"), choices=True, axes=True)
def index_add(op: Op, x: Tag, dim: int, index: Tag, src: Any, *_: Any, **__: Any) -> Tag:
    """x with slices of src added to (or put at) chosen indices along one dim."""
    x = fixed(op.units, x)
    d = dim % len(x.shape)
    target = at_points(op, x, d, index)
    src = fixed(op.units, src)
    if not isinstance(src, Tag) or not src.shape:  # one number put at all places
        return target
    flat = Tag(
        tuple(src.shape[d] if e == d else 1 for e in range(len(x.shape))),
        tuple(c.reshape([-1 if e == d else 1 for e in range(len(x.shape))]) for c in index.coords),
    )
    written = core.pointwise(op.units, src.shape, [flat, src])
    one = tuple(1 if e == d else n for e, n in enumerate(src.shape))
    order_matters = "copy" in op.name
    seen = (
        core.ordered(op.units, written, (d,), "order of writing", one)
        if order_matters
        else core.reduce(op.units, written, (d,), keepdim=True)
    )
    return core.pointwise(op.units, op.shape, [target, seen])


@rule(*named("index_put _unsafe_index_put"), choices=True)
def index_put(op: Op, x: Tag, indices: Sequence[Tag | None], values: Tag, accumulate: bool = False) -> Tag:
    """Where one mask chooses, values that are alike for all places; or whole slices put at indices along the first dim."""
    x, values = fixed(op.units, x), fixed(op.units, values)
    if op.masks and sum(i is not None for i in indices) == 1 and not accumulate:
        (d,) = op.masks
        mask = indices[d]
        assert mask is not None
        behind = x.shape[d + len(mask.shape) :]
        if prod(values.shape[: max(0, len(values.shape) - len(behind))]) == 1 and d == 0:
            where = Tag(
                (*mask.shape, *(1,) * len(behind)), tuple(c.reshape(*c.shape, *(1,) * len(behind)) for c in mask.coords)
            )
            last = reshape(values, values.shape[max(0, len(values.shape) - len(behind)) :])
            return core.pointwise(op.units, op.shape, [x, where, last])
    dims = [d for d, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    if (
        dims != [0]
        or len(given[0].shape) != 1
        or given[0].shape[0] != (values.shape[0] if len(values.shape) == len(x.shape) else -1)
    ):
        for tag in (x, *given, values):
            core.freeze(op.units, tag, "index_put")
        return core.still(op.units, op.shape, "index_put")
    wide = core.pointwise(op.units, (given[0].shape[0], *x.shape[1:]), [values])
    flat = Tag(
        (given[0].shape[0], *(1,) * (len(x.shape) - 1)),
        tuple(c.reshape(-1, *(1,) * (len(x.shape) - 1)) for c in given[0].coords),
    )
    written = core.pointwise(op.units, wide.shape, [flat, wide])
    one = (1, *x.shape[1:])
    seen = (
        core.reduce(op.units, written, (0,), keepdim=True)
        if accumulate
        else core.ordered(op.units, written, (0,), "order of writing", one)
    )
    return core.pointwise(op.units, op.shape, [at_points(op, x, 0, given[0]), seen])
