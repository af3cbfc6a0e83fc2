"""I: indexing by a tensor. Known indices are a move; data picks positions that no symmetry may tell apart... or may
move along, if the index values themselves name units (`Tag.points`)."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from lmc.symmetry.rules import core
from lmc.symmetry.rules.moves import picked
from lmc.symmetry.rules.registry import Op, named, rule
from lmc.symmetry.tags import Tag, make


@rule(*named("embedding"))
def embedding(op: Op, weight: Tag, index: Tag, *_: Any, **__: Any) -> Tag:
    return take(op, weight, 0, index)


@rule(*named("index_select"))
def index_select(op: Op, x: Tag, dim: int, index: Tag) -> Tag:
    return take(op, x, dim % len(x.shape), index)


def take(op: Op, x: Tag, dim: int, index: Tag) -> Tag:
    """x (a.., n, b..) indexed by (i..) along `dim` -> (a.., i.., b..)."""
    shape = (*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])
    if index.value is not None:
        at = index.value.numpy()
        return picked(op.units, x, shape, [dim], lambda c: c.take(at, axis=dim))
    rest = core.squeeze(core.reduce(op.units, at_points(op, x, dim, index), (dim,), keepdim=True), (dim,))
    before, after, middle = (1,) * dim, (1,) * (len(x.shape) - dim - 1), (1,) * len(index.shape)
    coords = [c.reshape(c.shape[:dim] + middle + c.shape[dim:]) for c in rest.coords]
    coords += [c.reshape(before + c.shape + after) for c in index.coords]
    return make(op.units, shape, coords)


def at_points(op: Op, x: Tag, dim: int, index: Tag) -> Tag:
    """`x`, its indices along `dim` tied to the units that the index values stand for, or frozen."""
    if index.points is None or index.points.size != x.shape[dim]:
        core.freeze_points(op.units, index)
        return core.freeze(op.units, x, "index chosen by data", [dim])
    shape = tuple(index.points.size if d == dim else 1 for d in range(len(x.shape)))
    return make(op.units, x.shape, [*x.coords, index.points.reshape(shape)])


@rule(*named("index", "_unsafe_index"))
def index(op: Op, x: Tag, indices: Sequence[Tag | None]) -> Tag:
    """Known indices: run. One unknown index: take. Several: the indexed dims are frozen."""
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if all(i.value is not None for _, i in given):
        known = [i.value if i is not None else slice(None) for i in indices]
        full = range(len(x.shape))
        return picked(op.units, x, op.shape, full, lambda c: torch.from_numpy(np.ascontiguousarray(c))[tuple(known)].numpy())
    if len(given) == 1:
        return take(op, x, *given[0])
    return index_many(op, x, given)


def index_many(op: Op, x: Tag, given: list[tuple[int, Tag]]) -> Tag:
    """Indices broadcast against each other; adjacent ones take the place of their dims, others go first."""
    dims = tuple(d for d, _ in given)
    picked_shape = np.broadcast_shapes(*(i.shape for _, i in given))
    for d, i in given:
        x = at_points(op, x, d, i)
    rest = core.squeeze(core.reduce(op.units, x, dims, keepdim=True), dims)
    place = dims[0] if dims == tuple(range(dims[0], dims[0] + len(dims))) else 0
    before, after, middle = (1,) * place, (1,) * (len(rest.shape) - place), (1,) * len(picked_shape)
    coords = [c.reshape(c.shape[:place] + middle + c.shape[place:]) for c in rest.coords]
    coords += [core.widen(c, len(picked_shape)).reshape(before + core.widen(c, len(picked_shape)).shape + after) for _, i in given for c in i.coords]
    return make(op.units, op.shape, coords)


@rule(*named("gather"))
def gather(op: Op, x: Tag, dim: int, index: Tag, **_: Any) -> Tag:
    """out[p] = x[p with p[dim] replaced by index[p]]; other dims may be cut short."""
    d = dim % len(x.shape)
    shape = tuple(n if e == d else m for e, (n, m) in enumerate(zip(x.shape, op.shape, strict=True)))
    cut = [e for e in range(len(shape)) if shape[e] != x.shape[e]]
    if cut:
        x = picked(op.units, x, shape, cut, lambda c: c[tuple(slice(0, n if e in cut else None) for e, n in enumerate(shape))])
    if index.value is not None and prod(op.shape) < 1 << 24:
        at = index.value.numpy()
        return make(op.units, op.shape, [np.take_along_axis(np.broadcast_to(c, shape), at, axis=d) if c.shape[d] > 1 else c for c in x.coords], count=True)
    rest = core.reduce(op.units, at_points(op, x, d, index), (d,), keepdim=True)
    return make(op.units, op.shape, [*rest.coords, *index.coords])


@rule(*named("scatter", "scatter_add", "scatter_reduce"))
def scatter(op: Op, x: Tag, dim: int, index: Tag, src: Any, *_: Any, **__: Any) -> Tag:
    """x with src[p] put at (or added to) p with p[dim] replaced by index[p]."""
    d = dim % len(x.shape)
    if isinstance(src, Tag) and src.shape != index.shape:
        shape = index.shape
        cut = tuple(slice(0, n) for n in shape)
        src = picked(op.units, src, shape, range(len(shape)), lambda c: c[cut])
    sources = [t for t in (index, src) if isinstance(t, Tag)]
    target = at_points(op, x, d, index)
    seen = core.pointwise(op.units, index.shape, [Tag(t.shape, t.coords) for t in sources])
    if "add" in op.name:
        seen = core.reduce(op.units, seen, (d,), keepdim=True)
    else:  # what is written last stays: the order along dim matters
        seen = core.ordered(op.units, seen, (d,), "order of writing", tuple(1 if e == d else n for e, n in enumerate(seen.shape)))
    if any(seen.shape[e] != x.shape[e] for e in range(len(x.shape)) if e != d):
        target = core.freeze(op.units, target, "partial scatter")
        return core.still(op.units, op.shape, "partial scatter")
    return core.pointwise(op.units, op.shape, [target, seen])


@rule(*named("index_add", "index_copy", "index_reduce", "index_fill"))
def index_add(op: Op, x: Tag, dim: int, index: Tag, src: Any, *_: Any, **__: Any) -> Tag:
    """x with slices of src added to (or put at) chosen indices along one dim."""
    d = dim % len(x.shape)
    target = at_points(op, x, d, index)
    if not isinstance(src, Tag):
        return target
    flat = Tag(tuple(src.shape[d] if e == d else 1 for e in range(len(x.shape))), tuple(c.reshape([-1 if e == d else 1 for e in range(len(x.shape))]) for c in index.coords))
    written = core.pointwise(op.units, src.shape, [flat, src])
    one = tuple(1 if e == d else n for e, n in enumerate(src.shape))
    order_matters = "copy" in op.name
    seen = core.ordered(op.units, written, (d,), "order of writing", one) if order_matters else core.reduce(op.units, written, (d,), keepdim=True)
    return core.pointwise(op.units, op.shape, [target, seen])


@rule(*named("index_put", "_unsafe_index_put"))
def index_put(op: Op, x: Tag, indices: Sequence[Tag | None], values: Tag, accumulate: bool = False) -> Tag:
    """Only the case of whole slices put at indices along the first dims."""
    dims = [d for d, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    if dims != [0] or len(given[0].shape) != 1 or given[0].shape[0] != (values.shape[0] if len(values.shape) == len(x.shape) else -1):
        for tag in (x, *given, values):
            core.freeze(op.units, tag, "index_put")
        return core.still(op.units, op.shape, "index_put")
    wide = core.pointwise(op.units, (given[0].shape[0], *x.shape[1:]), [values])
    flat = Tag((given[0].shape[0], *(1,) * (len(x.shape) - 1)), tuple(c.reshape(-1, *(1,) * (len(x.shape) - 1)) for c in given[0].coords))
    written = core.pointwise(op.units, wide.shape, [flat, wide])
    one = (1, *x.shape[1:])
    seen = core.reduce(op.units, written, (0,), keepdim=True) if accumulate else core.ordered(op.units, written, (0,), "order of writing", one)
    return core.pointwise(op.units, op.shape, [at_points(op, x, 0, given[0]), seen])


@rule(*named("_embedding_bag", "_embedding_bag_forward_only"))
def embedding_bag(op: Op, weight: Tag, index: Tag, offsets: Tag, *_: Any, **__: Any) -> tuple[Tag, ...]:
    """Sums, means or maxima of rows of an embedding: the rows are chosen by data, the features pass through."""
    for tag in (index, offsets):
        core.freeze(op.units, tag, "bag")
    features = core.reduce(op.units, core.freeze(op.units, weight, "index chosen by data", [0]), (0,), keepdim=True)
    bags = core.still(op.units, (op.shape[0], 1), "bag")
    rest = tuple(core.still(op.units, s, "bag") for s in op.shapes[1:])
    return core.pointwise(op.units, op.shape, [features, bags]), *rest
