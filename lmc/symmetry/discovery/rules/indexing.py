"""I: indexing by a tensor. Known indices are a move; data picks positions that no symmetry may tell apart... or may
move along, if the index values themselves name units (`Tag.points`)."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from lmc.symmetry.discovery.rules import core
from lmc.symmetry.discovery.rules.chosen import Operand, choose
from lmc.symmetry.discovery.rules.moves import picked
from lmc.symmetry.discovery.rules.registry import Op, fixed, named, rule
from lmc.symmetry.discovery.tags import Tag, make


@rule(*named("embedding"), choices=True)
def embedding(op: Op, weight: Tag, index: Tag, *_: Any, **__: Any) -> Operand:
    weight = fixed(op.units, weight)
    return take(op, weight, 0, index)


@rule(*named("index_select"), choices=True, axes=True)
def index_select(op: Op, x: Tag, dim: int, index: Tag) -> Operand:
    x = fixed(op.units, x)
    return take(op, x, dim % len(x.shape), index)


def take(op: Op, x: Tag, dim: int, index: Tag) -> Operand:
    """x (a.., n, b..) indexed by (i..) along `dim` -> (a.., i.., b..)."""
    shape = (*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])
    if index.value is not None:
        at = index.value.numpy()
        return picked(op.units, x, shape, [dim], lambda c: c.take(at, axis=dim))
    tied = at_points(op, x, dim, index)
    if dim == 0 and index.points is not None and index.points.size == x.shape[0]:
        return choose(op.units, tied, index, index.points)
    rest = core.squeeze(core.reduce(op.units, tied, (dim,), keepdim=True), (dim,))
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


@rule(*named("index _unsafe_index"), choices=True)
def index(op: Op, x: Tag, indices: Sequence[Tag | None]) -> Operand:
    """Known indices: run. One unknown index: take. Several: the indexed dims are frozen."""
    x = fixed(op.units, x)
    if all(i is None or i.value is not None for i in indices):
        known = [i.value if i is not None else slice(None) for i in indices]
        full = range(len(x.shape))
        return picked(op.units, x, op.shape, full, lambda c: torch.from_numpy(np.array(c))[tuple(known)].numpy())
    given = as_integers(op, x, indices)
    return take(op, x, *given[0]) if len(given) == 1 else index_many(op, x, given)


def as_integers(op: Op, x: Tag, indices: Sequence[Tag | None]) -> list[tuple[int, Tag]]:
    """(dim, integers) for each dim that is indexed. A mask over r dims stands for r vectors of the places at which it is
    true; how many these are is the last size of what the indices broadcast to, read off the shape of the result."""
    given: list[tuple[int, Tag | None]] = []
    d = 0
    for number, i in enumerate(indices):
        if i is not None and number in op.masks:
            core.freeze(op.units, i, "index chosen by data")
            given += [(d + k, None) for k in range(len(i.shape))]
            d += len(i.shape)
        else:
            given += [(d, i)] if i is not None else []
            d += 1
    dims = [d for d, _ in given]
    place = dims[0] if dims == list(range(dims[0], dims[0] + len(dims))) else 0
    last = place + len(op.shape) - (len(x.shape) - len(dims)) - 1
    places = core.still(op.units, (op.shape[last],), "index chosen by data")
    return [(d, places if i is None else i) for d, i in given]


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
    coords += [
        core.widen(c, len(picked_shape)).reshape(before + core.widen(c, len(picked_shape)).shape + after)
        for _, i in given
        for c in i.coords
    ]
    return make(op.units, op.shape, coords)


@rule(*named("gather"), choices=True, axes=True)
def gather(op: Op, x: Tag, dim: int, index: Tag, **_: Any) -> Tag:
    """out[p] = x[p with p[dim] replaced by index[p]]; other dims may be cut short."""
    x = fixed(op.units, x)
    d = dim % len(x.shape)
    shape = tuple(n if e == d else m for e, (n, m) in enumerate(zip(x.shape, op.shape, strict=True)))
    cut = [e for e in range(len(shape)) if shape[e] != x.shape[e]]
    if cut:
        x = picked(
            op.units, x, shape, cut, lambda c: c[tuple(slice(0, n if e in cut else None) for e, n in enumerate(shape))]
        )
    if index.value is not None and prod(op.shape) < 1 << 24:
        at = index.value.numpy()
        return make(
            op.units,
            op.shape,
            [np.take_along_axis(np.broadcast_to(c, shape), at, axis=d) if c.shape[d] > 1 else c for c in x.coords],
            count=True,
        )
    rest = core.reduce(op.units, at_points(op, x, d, index), (d,), keepdim=True)
    return make(op.units, op.shape, [*rest.coords, *index.coords])


@rule(*named("_embedding_bag _embedding_bag_forward_only"))
def embedding_bag(op: Op, weight: Tag, index: Tag, offsets: Tag, *_: Any, **__: Any) -> tuple[Tag, ...]:
    """Sums, means or maxima of rows of an embedding: the rows are chosen by data, the features pass through."""
    for tag in (index, offsets):
        core.freeze(op.units, tag, "bag")
    features = core.reduce(op.units, core.freeze(op.units, weight, "index chosen by data", [0]), (0,), keepdim=True)
    bags = core.still(op.units, (op.shape[0], 1), "bag")
    rest = tuple(core.still(op.units, s, "bag") for s in op.shapes[1:])
    return core.pointwise(op.units, op.shape, [features, bags]), *rest


@rule(*named("eq ne"), choices=True)
def equal(op: Op, a: Any, b: Any) -> Tag:
    """Is this the chosen unit? Comparing a choice with known numbers tells which unit each number stands for."""
    choice, other = (a, b) if isinstance(a, Tag) and a.points is not None else (b, a)
    numbers = other.value if isinstance(other, Tag) else torch.tensor(other)
    if not isinstance(choice, Tag) or choice.points is None or numbers is None or numbers.is_floating_point():
        return core.pointwise(op.units, op.shape, [fixed(op.units, t) for t in (a, b) if isinstance(t, Tag)])
    asked = numbers.numpy()
    if asked.size and (asked.min() < 0 or asked.max() >= choice.points.size):
        return core.pointwise(op.units, op.shape, [fixed(op.units, choice)])
    units = core.widen(choice.points[asked], len(op.shape))
    return make(op.units, op.shape, [*(core.widen(c, len(op.shape)) for c in choice.coords), units], count=True)
