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
