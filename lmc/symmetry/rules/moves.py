"""M: operators that only move values, among them concatenation, padding, and writing one tensor into a part of another.

They run on the coordinates themselves, so I1 holds by construction; where they pick, repeat or drop positions, the
multisets that remain are recorded (I2).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from math import prod
from typing import Any

import numpy as np
import torch

from lmc.symmetry.rules import core
from lmc.symmetry.rules.chosen import Chosen, Operand, pointwise, settle
from lmc.symmetry.rules.registry import Op, Parts, fixed, named, rule, tags_in, unknown
from lmc.symmetry.rules.tags import Shape, Tag, along, make, shrink, spread
from lmc.symmetry.rules.units import Ids, Units


def also_for_experts(*dims_at: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a move act on `Chosen` tensors: on the dense tensor with dims counted behind the dim of experts, and on the
    index. `dims_at`: which arguments after the tensor are dims (a missing one is 0)."""

    def wrap(move: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(move)
        def moved(op: Op, x: Operand, *args: Any, **kwargs: Any) -> Any:
            if isinstance(x, Tag):
                return move(op, x, *args, **kwargs)
            experts, ndim, points = x.dense.shape[0], len(x.shape), x.points
            given = [*args, *(0 for k in dims_at if k >= len(args))]
            for k in dims_at:
                many = isinstance(given[k], Sequence)
                given[k] = [0, *(d % ndim + 1 for d in given[k])] if many else given[k] % ndim + 1
            dense = move(replace(op, shapes=tuple((experts, *s) for s in op.shapes)), x.dense, *given, **kwargs)
            index = move(op, Tag(x.shape, x.index), *args, **kwargs)
            if isinstance(dense, Tag):
                return Chosen(dense, index.coords, points)
            return Parts([lambda k=k: Chosen(dense[k], index[k].coords, points) for k in range(len(op.shapes))])

        return moved

    return wrap


@rule(
    *named("view _unsafe_view reshape flatten unflatten view_copy view_as reshape_as _reshape_alias squeeze unsqueeze"),
    choices=True,
    experts=True,
)
@also_for_experts()
def view(op: Op, x: Tag, *_: Any, **__: Any) -> Tag:
    return reshape(x, op.shape)


def reshape(x: Tag, shape: Shape) -> Tag:
    """Row-major renumbering: done on each coordinate, within the smallest groups of dims that it mixes."""
    return Tag(shape, tuple(reshape_coord(c, x.shape, shape) for c in x.coords), points=x.points)


def reshape_coord(coord: Ids, old: Shape, new: Shape) -> Ids:
    expanded: list[int] = []
    result: list[int] = []
    for old_dims, new_dims in matching_dims(old, new):
        moves = any(coord.shape[d] > 1 for d in old_dims)
        expanded += [old[d] if moves else 1 for d in old_dims]
        result += [new[d] if moves else 1 for d in new_dims]
    return shrink(np.broadcast_to(coord, expanded).reshape(result))


def matching_dims(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Split both shapes into consecutive runs of dims of equal products: a view mixes dims within runs only."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(left), j + len(right)
        while prod(old[d] for d in left) != prod(new[d] for d in right):
            if prod(old[d] for d in left) < prod(new[d] for d in right):
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        runs.append((left, right))
    return runs


def by_coordinate(x: Tag, shape: Shape, move: Callable[[Ids], Ids]) -> Tag:
    """A one-to-one move that works on coordinates of size 1 along unmoved dims."""
    return Tag(shape, tuple(move(c) for c in x.coords), points=x.points)


def picked(units: Units, x: Tag, shape: Shape, dims: Sequence[int], pick: Callable[[Ids], Ids]) -> Tag:
    """A move that may drop or repeat positions along `dims`: coordinates that vary there are expanded on `dims`."""
    coords, repicked = [], False
    for c in x.coords:
        if any(c.shape[d] > 1 for d in dims):
            repicked = True
            coords.append(pick(spread(c, tuple(dims), x.shape)))
        else:
            coords.append(_keep(c, pick, dims, x.shape))
    result = make(units, shape, coords, count=repicked)
    return Tag(shape, result.coords, points=x.points)


def _keep(coord: Ids, pick: Callable[[Ids], Ids], dims: Sequence[int], shape: Shape) -> Ids:
    """A coordinate constant along `dims` goes through the same operator, and is constant again on what they became."""
    return shrink(pick(spread(coord, tuple(dims), shape)))


@rule(*named("permute permute_copy"), choices=True, experts=True)
@also_for_experts(0)
def permute(op: Op, x: Tag, dims: Sequence[int]) -> Tag:
    order = tuple(d % len(x.shape) for d in dims)
    return by_coordinate(x, op.shape, lambda c: c.transpose(order))


@rule(*named("transpose swapaxes transpose_copy"), choices=True, experts=True)
@also_for_experts(0, 1)
def transpose(op: Op, x: Tag, a: int, b: int) -> Tag:
    return by_coordinate(x, op.shape, lambda c: c.swapaxes(a, b)) if x.shape else x


@rule(*named("t numpy_T mT t_copy"), choices=True)
def matrix_transpose(op: Op, x: Tag) -> Tag:
    return by_coordinate(x, op.shape, lambda c: c.swapaxes(-1, -2)) if len(x.shape) > 1 else x


@rule(*named("expand expand_copy expand_as broadcast_to"), choices=True, experts=True)
def expand(op: Op, x: Operand, *_: Any, **__: Any) -> Operand:
    if isinstance(x, Chosen):
        return pointwise(op.units, op.shape, [x])
    return Tag(op.shape, tuple(core.widen(c, len(op.shape)) for c in x.coords), points=x.points)


@rule(*named("slice slice_copy"), choices=True, experts=True)
@also_for_experts(0)
def slice_(op: Op, x: Tag, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tag:
    if op.shape == x.shape and step == 1:
        return x
    d = dim % len(x.shape)
    window = (slice(None),) * d + (slice(start, end, step),)
    return picked(op.units, x, op.shape, [d], lambda c: c[window])


@rule(*named("narrow narrow_copy"), choices=True, experts=True)
@also_for_experts(0)
def narrow(op: Op, x: Tag, dim: int, start: int | Tag, length: int) -> Any:
    """A stretch given by start and length; the start may be a tensor, known or not."""
    first = start.value if isinstance(start, Tag) else start
    if first is None:
        return unknown(op, tags_in((x, start)))
    d = dim % len(x.shape)
    return window(op.units, x, op.shape, d, int(first) + (x.shape[d] if int(first) < 0 else 0))


@rule(*named("select select_copy"), choices=True, experts=True)
@also_for_experts(0)
def select(op: Op, x: Tag, dim: int, index: int | Tag) -> Any:
    """One index along a dim; it may have been read off a tensor, whose value is not known."""
    return unknown(op, tags_in((x, index))) if isinstance(index, Tag) else select_at(op.units, x, dim, index)


def select_at(units: Units, x: Tag, dim: int, index: int) -> Tag:
    d = dim % len(x.shape)
    return picked(units, x, x.shape[:d] + x.shape[d + 1 :], [d], lambda c: np.asarray(c.take(index, axis=d)))


@rule(*named("unbind unbind_copy"), choices=True, experts=True)
@also_for_experts(0)
def unbind(op: Op, x: Tag, dim: int = 0) -> Parts:
    return Parts([partial(select_at, op.units, x, dim, i) for i in range(x.shape[dim])])


@rule(
    *named("split split_with_sizes split_copy split_with_sizes_copy chunk tensor_split unsafe_split unsafe_chunk"),
    choices=True,
    experts=True,
)
@also_for_experts(1)
def split(op: Op, x: Tag, _: Any, dim: int = 0) -> Parts:
    d = dim % len(x.shape)
    ends = np.cumsum([shape[d] for shape in op.shapes])
    return Parts(
        [partial(window, op.units, x, shape, d, end - shape[d]) for shape, end in zip(op.shapes, ends, strict=True)]
    )


def window(units: Units, x: Tag, shape: Shape, dim: int, start: int) -> Tag:
    """The stretch of length `shape[dim]` from `start` on."""
    return picked(units, x, shape, [dim], lambda c: c.take(np.arange(start, start + shape[dim]), axis=dim))


@rule(*named("flip"), choices=True)
def flip(op: Op, x: Tag, dims: Sequence[int]) -> Tag:
    return by_coordinate(x, op.shape, lambda c: np.flip(c, tuple(dims)))


@rule(*named("roll"), choices=True)
def roll(op: Op, x: Tag, shifts: Any, dims: Any = ()) -> Tag:
    shifts, dims = ([v] if isinstance(v, int) else list(v) for v in (shifts, dims))
    if not dims:
        return run(op, fixed(op.units, x), shifts)
    return by_coordinate(x, op.shape, lambda c: np.roll(c, shifts, dims))


@rule(
    *named(
        "clone contiguous alias detach lift_fresh_copy _to_copy to type_as lift positive resolve_conj "
        "resolve_neg _assert_tensor_metadata"
    ),
    choices=True,
    experts=True,
)
def same(op: Op, x: Operand, *_: Any, **__: Any) -> Operand:
    """Copies and casts."""
    return Tag(op.shape, x.coords, points=x.points) if isinstance(x, Tag) and op.shapes else x


@rule(*named("dropout feature_dropout alpha_dropout feature_alpha_dropout"), experts=True)
def dropout(op: Op, x: Operand, probability: float, training: bool) -> Any:
    """Nothing in evaluation mode; else the result is random."""
    return x if not training or probability == 0 else unknown(op, [settle(op.units, x)])


@rule(
    *named(
        "repeat unfold diagonal tile pixel_shuffle pixel_unshuffle channel_shuffle "
        "movedim rot90 reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
        "replication_pad3d diagonal_copy unfold_copy hsplit vsplit fliplr flipud"
    )
)
def run(op: Op, x: Tag, *args: Any, **kwargs: Any) -> Any:
    """Any other move: the operator itself, run on each coordinate at full size."""
    if any(isinstance(a, Tag) for a in (*args, *kwargs.values())):
        args = tuple(a.value if isinstance(a, Tag) else a for a in args)
        if any(a is None for a in args):
            return unknown(op, [x])
    columns = [_run_one(op, np.broadcast_to(c, x.shape), args, kwargs) for c in x.coords]
    tags = [make(op.units, shape, [c[k] for c in columns], count=True) for k, shape in enumerate(op.shapes)]
    return tags[0] if len(tags) == 1 else tuple(tags)


@rule(*named("repeat_interleave"))
def repeat_interleave(op: Op, x: Tag, *args: Any, **kwargs: Any) -> Any:
    """Each index several times over; of the numbers of times alone, the index of each copy, which is a value."""
    return unknown(op, [x]) if op.name.endswith(".Tensor") else run(op, x, *args, **kwargs)


def _run_one(op: Op, coord: Ids, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Ids]:
    """float64 holds unit ids exactly, and every operator has a kernel for it; zeros that appear are padding."""
    out = op.target(torch.from_numpy(coord.astype(np.float64) + 1), *args, **kwargs)
    moved = [o.numpy().astype(np.int64) - 1 for o in (out if isinstance(out, (tuple, list)) else [out])]
    outside = op.units.frozen("padding", 1)
    return [np.where(ids < 0, outside, ids) for ids in moved]


@rule(*named("as_strided as_strided_copy"))
def as_strided(op: Op, x: Tag, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Tag:
    """Positions of the storage, such as windows that overlap, where `x` fills its stretch of it without a gap; what lies
    beyond is not known."""
    dense, start = as_stored(op, x), 0 if storage_offset is None else storage_offset - op.layout[1]
    last = start + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if dense is None or not all(size) or start < 0 or last >= prod(dense.shape):
        core.freeze(op.units, x, "as_strided")
        return core.still(op.units, op.shape, "as_strided")
    kept, block = 0, 1  # trailing dims that come out as they are, and their numbers: only the rows of these are picked
    while kept < min(len(size), len(dense.shape)) - 1:
        n = dense.shape[-kept - 1]
        further = [start, *stride[: len(stride) - kept - 1]]
        if (size[-kept - 1], stride[-kept - 1]) != (n, block) or any(s % (block * n) for s in further):
            break
        kept, block = kept + 1, block * n
    outer, rows = len(size) - kept, prod(dense.shape) // block
    at = torch.arange(rows).as_strided(list(size[:outer]), [s // block for s in stride[:outer]], start // block).numpy()
    by_row = reshape(dense, (rows, *dense.shape[len(dense.shape) - kept :]))
    return picked(op.units, by_row, op.shape, [0], lambda c: c.take(at.ravel(), axis=0).reshape(*at.shape, *c.shape[1:]))


def as_stored(op: Op, x: Tag) -> Tag | None:
    """The first operand with its dims in the order in which they fill its storage, those of size 1 left out; None where they
    leave gaps, or overlap."""
    strides = op.layout[0]
    if len(strides) != len(x.shape):
        return None
    dims = sorted((d for d in range(len(x.shape)) if x.shape[d] != 1), key=lambda d: -strides[d])
    shape = tuple(x.shape[d] for d in dims)
    if [strides[d] for d in dims] != [prod(shape[k + 1 :]) for k in range(len(shape))]:
        return None
    order = [d for d in range(len(x.shape)) if d not in dims] + dims
    stored = by_coordinate(x, tuple(x.shape[d] for d in order), lambda c: c.transpose(order))
    return reshape(stored, shape)


@rule(*named("cat concat concatenate"))
def cat(op: Op, tensors: Sequence[Tag], dim: int = 0) -> Tag:
    parts = [t for t in tensors if prod(t.shape)]
    if not parts:
        return Tag(op.shape)
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
