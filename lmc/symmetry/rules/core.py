"""The classes of operators as functions on tags: pointwise (E), reductions (R), contractions (C), order-dependent (F).

The rules of single operators are compositions of these. Each keeps I1 and I2 of `lmc.symmetry.rules.tags`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lmc.symmetry.rules.tags import Shape, Tag, along, block, clusters, make, spread, support
from lmc.symmetry.rules.units import Ids, Units


def normal_dims(dims: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Dims as a sorted tuple of nonnegative numbers; none or an empty list means all of them."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return tuple(range(ndim))
    listed = [dims] if isinstance(dims, int) else dims
    return tuple(sorted(d % ndim for d in listed)) if ndim else ()


def widen(coord: Ids, ndim: int) -> Ids:
    """Leading dims of size 1, as broadcasting adds them."""
    return coord.reshape((1,) * (ndim - coord.ndim) + coord.shape)


def pointwise(units: Units, shape: Shape, tags: Sequence[Tag]) -> Tag:
    """E: the value at a position depends on the operands' values there: all their coordinates, joined."""
    return make(units, shape, [widen(c, len(shape)) for tag in tags for c in tag.coords])


def reduce(units: Units, tag: Tag, dims: tuple[int, ...], keepdim: bool) -> Tag:
    """R: a symmetric function over `dims`. Coordinates on other dims stay, those on `dims` vanish, those on both become
    blocks; coordinates correlated along reduced dims are paired before (or I1 breaks: the block of pairs is finer)."""
    coords: list[Ids] = []
    for cluster in clusters(list(tag.coords)):
        coords += [c for c in cluster if not set(support(c)) & set(dims)]
        touching = [c for c in cluster if set(support(c)) & set(dims)]
        for c in touching:
            units.touch(c)
        if all(set(support(c)) <= set(dims) for c in touching):
            continue
        for mixed in clusters_on(touching, dims):
            joint = mixed[0]
            for other in mixed[1:]:
                both = tuple(sorted({*support(joint), *support(other)}))
                joint = units.pair(spread(joint, both, tag.shape), spread(other, both, tag.shape))
            coords.append(block(units, joint, dims))
    kept = tuple(1 if d in dims else n for d, n in enumerate(tag.shape))
    result = make(units, kept, coords)
    return result if keepdim else squeeze(result, dims)


def clusters_on(coords: list[Ids], dims: tuple[int, ...]) -> list[list[Ids]]:
    """Coordinates grouped by the reduced dims they share."""
    shadows = [np.empty(tuple(n if d in dims else 1 for d, n in enumerate(c.shape)), np.int64) for c in coords]
    groups = clusters(shadows)
    return [[c for c, s in zip(coords, shadows, strict=True) if any(s is g for g in group)] for group in groups]


def squeeze(tag: Tag, dims: tuple[int, ...]) -> Tag:
    """Remove dims of size 1."""
    keep = tuple(d for d in range(len(tag.shape)) if d not in dims)
    coords = tuple(c.reshape(tuple(c.shape[d] for d in keep)) for c in tag.coords)
    return Tag(tuple(tag.shape[d] for d in keep), coords)


def lift(tag: Tag, labels: Sequence[str], order: Sequence[str]) -> list[Ids]:
    """A tag's coordinates in a labelled index space: dim d of the tag is the label `labels[d]`."""
    lifted = []
    for c in tag.coords:
        at = dict(zip(labels, range(c.ndim), strict=True))
        ordered = c.transpose([at[label] for label in order if label in at])
        lifted.append(ordered.reshape(tuple(c.shape[at[label]] if label in at else 1 for label in order)))
    return lifted


def contract(units: Units, operands: Sequence[tuple[Tag, Sequence[str]]], out: Sequence[str]) -> Tag:
    """C: an einsum. E on the space of all labels, then R over the labels that the result lacks."""
    sizes: dict[str, int] = {}
    for tag, labels in operands:
        for label, n in zip(labels, tag.shape, strict=True):
            sizes[label] = n if n != 1 else sizes.get(label, 1)  # 0 is a size, too
    order = [*out, *(label for label in sizes if label not in out)]
    shape = tuple(sizes[label] for label in order)
    joined = make(units, shape, [c for tag, labels in operands for c in lift(tag, labels, order)])
    return reduce(units, joined, tuple(range(len(out), len(order))), keepdim=False)


def frozen_along(units: Units, shape: Shape, dims: Sequence[int], reason: str) -> list[Ids]:
    """Frozen coordinates, one for each of `dims`."""
    return [along(units.frozen(reason, shape[d]), d, len(shape)) for d in dims if shape[d] > 1]


def each_dim(value: object, spatial: int) -> Sequence[object]:
    """A number or word for all dims, written out."""
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    return listed * spatial if len(listed) == 1 else listed


def still_along(units: Units, size: int, dim: int, ndim: int, reason: str = "pixel position") -> Tag:
    """A tensor of size 1 but along one dim, on which nothing moves."""
    shape = tuple(size if d == dim else 1 for d in range(ndim))
    return Tag(shape, tuple(frozen_along(units, shape, [dim], reason)))


def freeze(units: Units, tag: Tag, reason: str, dims: Sequence[int] | None = None) -> Tag:
    """The same tensor, with every index along `dims` (default: all) told apart and thus fixed."""
    freeze_points(units, tag)
    for c in tag.coords:
        units.touch(c)
    picked = range(len(tag.shape)) if dims is None else dims
    joined = make(units, tag.shape, [*tag.coords, *frozen_along(units, tag.shape, picked, reason)])
    return replace(tag, coords=joined.coords, points=None)


def freeze_points(units: Units, tag: Tag) -> None:
    """Values that name units are used as numbers: the units they name may not move."""
    if tag.points is not None and not units.is_frozen(tag.points):
        units.map(tag.points, units.frozen("router index used as a number", tag.points.size))


def still(units: Units, shape: Shape, reason: str) -> Tag:
    """A tensor on whose positions nothing moves."""
    return make(units, shape, frozen_along(units, shape, range(len(shape)), reason))


def ordered(units: Units, tag: Tag, dims: tuple[int, ...], reason: str, out: Shape) -> Tag:
    """F: depends on the order along `dims`, pointwise over the others; the result has shape `out`, of equal rank."""
    touched = any(set(support(c)) & set(dims) for c in tag.coords)
    rest = reduce(units, freeze(units, tag, reason, dims) if touched else tag, dims, keepdim=True)
    return make(units, out, [*rest.coords, *frozen_along(units, out, dims, reason)])


def on_dim(vector: Tag, dim: int, ndim: int) -> Tag:
    """A vector laid along one dim of a tensor of rank `ndim`; a scalar belongs to all positions alike."""
    if not vector.shape:
        return vector
    shape = tuple(vector.shape[0] if d == dim else 1 for d in range(ndim))
    return Tag(shape, tuple(along(c.ravel(), dim, ndim) for c in vector.coords))


def ranked(units: Units, tag: Tag, dim: int, out: Shape) -> Tag:
    """Values sorted along `dim`: a symmetric function (R), whose results differ by rank."""
    rest = reduce(units, tag, (dim,), keepdim=True)
    return make(units, out, [*rest.coords, *frozen_along(units, out, [dim], "rank after sorting")])


def choice(units: Units, tag: Tag, dim: int, out: Shape, no_ties: bool) -> Tag:
    """Positions along `dim` at which something is found (argmax, top-k): the values name the units of `dim`, if those are
    named by a coordinate of their own and no two values are equal (ties go by position); otherwise they are frozen."""
    names = [c for c in tag.coords if c.shape[dim] > 1]
    own = (
        no_ties
        and len(names) == 1
        and support(names[0]) == (dim,)
        and units.distinct(names[0].ravel()) == tag.shape[dim]
    )
    if not own:
        tag = freeze(units, tag, "position chosen by data", [dim])
    rest = reduce(units, tag, (dim,), keepdim=True)
    if len(out) < len(tag.shape):
        rest = squeeze(rest, (dim,))
        return replace(make(units, out, list(rest.coords)), points=names[0].ravel() if own else None)
    coords = [*rest.coords, *frozen_along(units, out, [dim], "rank after sorting")]
    return replace(make(units, out, coords), points=names[0].ravel() if own else None)
