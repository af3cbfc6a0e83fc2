"""M with several tensors: concatenation, padding, and writing one tensor into a part of another."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from lmc.symmetry.discovery.rules import core
from lmc.symmetry.discovery.rules.moves import picked, reshape
from lmc.symmetry.discovery.rules.registry import Op, named, rule
from lmc.symmetry.discovery.tags import Shape, Tag, along, make, spread
from lmc.symmetry.discovery.units import Ids, Units


@rule(*named("cat concat concatenate"))
def cat(op: Op, tensors: Sequence[Tag], dim: int = 0) -> Tag:
    parts = [t for t in tensors if prod(t.shape)]
    return concatenate(op.units, parts, dim % len(op.shape), op.shape)


def concatenate(units: Units, parts: Sequence[Tag], dim: int, shape: Shape) -> Tag:
    """Coordinates along `dim` one after the other, plus the part number as a frozen coordinate: equal units in two
    parts can carry different values (I1), unless both are the same tensor. Coordinates on other dims are joined."""
    if len(parts) == 1:
        return parts[0]
    ndim = len(shape)
    coords: list[Ids] = []
    pieces: list[Ids] = []
    for number, part in enumerate(parts):
        touching = [c for c in part.coords if c.shape[dim] > 1]
        coords += [c for c in part.coords if c.shape[dim] == 1]
        if not touching:
            pieces.append(np.full((1,) * ndim, units.frozen("one part of a concatenation", number + 1)[number]))
            continue
        joint = touching[0]
        for other in touching[1:]:
            dims = tuple(d for d in range(ndim) if joint.shape[d] > 1 or other.shape[d] > 1)
            joint = units.pair(spread(joint, dims, part.shape), spread(other, dims, part.shape))
        pieces.append(joint)
    across = tuple(max(p.shape[d] for p in pieces) for d in range(ndim))
    wide = [
        np.broadcast_to(p, (*across[:dim], part.shape[dim], *across[dim + 1 :]))
        for p, part in zip(pieces, parts, strict=True)
    ]
    which = [next(k for k, other in enumerate(parts) if other is part) for part in parts]
    numbers = units.frozen("part of a concatenation", len(parts))[which]
    labels = along(np.repeat(numbers, [part.shape[dim] for part in parts]), dim, ndim)
    return make(units, shape, [np.concatenate(wide, axis=dim), labels, *coords])


@rule(*named("stack"))
def stack(op: Op, tensors: Sequence[Tag], dim: int = 0) -> Tag:
    d = dim % len(op.shape)
    lifted = {id(t): reshape(t, (*t.shape[:d], 1, *t.shape[d:])) for t in tensors}
    parts = [lifted[id(t)] for t in tensors]
    return concatenate(op.units, parts, d, op.shape)


@rule(*named("constant_pad_nd zero_pad2d"))
def pad(op: Op, x: Tag, widths: Sequence[int], *_: Any) -> Tag:
    """Padded positions hold one constant: they share one frozen unit."""
    ndim, units = len(x.shape), op.units
    outside = units.frozen("padding", 2)
    before = [widths[2 * (ndim - 1 - d)] if 2 * (ndim - 1 - d) < len(widths) else 0 for d in range(ndim)]
    after = [widths[2 * (ndim - 1 - d) + 1] if 2 * (ndim - 1 - d) < len(widths) else 0 for d in range(ndim)]
    for d in range(ndim):  # a negative width crops
        if min(before[d], after[d]) < 0:
            kept = tuple(range(max(0, -before[d]), x.shape[d] + min(0, after[d])))
            shape = (*x.shape[:d], len(kept), *x.shape[d + 1 :])
            x = picked(units, x, shape, [d], lambda c, kept=kept, d=d: c.take(kept, axis=d))
    before, after = ([max(0, n) for n in widths] for widths in (before, after))
    padded = [d for d in range(ndim) if before[d] or after[d]]
    coords = [
        _pad(c, [(before[d], after[d]) if c.shape[d] > 1 else (0, 0) for d in range(ndim)], outside[0])
        for c in x.coords
    ]
    for d in padded:
        marks = np.full(op.shape[d], outside[0])
        marks[before[d] : before[d] + x.shape[d]] = outside[1]
        coords.append(along(marks, d, ndim))
    return make(units, op.shape, coords)


def _pad(coord: Ids, widths: list[tuple[int, int]], value: int) -> Ids:
    return np.pad(coord, widths, constant_values=value)


@rule(*named("slice_scatter"))
def slice_scatter(
    op: Op, x: Tag, src: Tag, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tag:
    """`x` with a slice replaced: the three stretches, concatenated."""
    d = dim % len(x.shape)
    inside = np.zeros(x.shape[d], np.bool_)
    inside[start:end:step] = True
    return overwrite(op.units, x, src, d, inside)


@rule(*named("select_scatter"))
def select_scatter(op: Op, x: Tag, src: Tag, dim: int, index: int) -> Tag:
    d = dim % len(x.shape)
    inside = np.zeros(x.shape[d], np.bool_)
    inside[index] = True
    return overwrite(op.units, x, reshape(src, (*x.shape[:d], 1, *x.shape[d + 1 :])), d, inside)


def overwrite(units: Units, x: Tag, src: Tag, dim: int, inside: np.ndarray) -> Tag:
    """Positions `inside` along `dim` come from `src` (in order), the others from `x`."""
    if inside.all():
        return src
    shape = tuple(int((~inside).sum()) if d == dim else n for d, n in enumerate(x.shape))
    rest = picked(units, x, shape, [dim], lambda c: c.compress(~inside, axis=dim))
    both = concatenate(units, [rest, src], dim, x.shape)
    back = np.argsort(np.concatenate([np.flatnonzero(~inside), np.flatnonzero(inside)]))
    return picked(units, both, x.shape, [dim], lambda c: c.take(back, axis=dim))


@rule(*named("copy"))
def copy(op: Op, x: Tag, src: Tag, *_: Any) -> Tag:
    """The result is `src`, broadcast to the shape of `x`."""
    return core.pointwise(op.units, op.shape, [src])
