"""I: indexing by a tensor, reading and writing, and products with matrices chosen by a tensor.

Known indices are a move; data pick positions that no symmetry may exchange, or that may move along where the index values
themselves name units (`Tag.points`).
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch

from lmc.symmetry.rules import core
from lmc.symmetry.rules.chosen import Chosen, Operand, choose, contract, pointwise, settle
from lmc.symmetry.rules.moves import picked, reshape
from lmc.symmetry.rules.registry import Op, fixed, named, rule
from lmc.symmetry.rules.tags import Tag, along, make
from lmc.symmetry.rules.units import Ids, Units


@rule(*named("embedding"), choices=True)
def embedding(op: Op, weight: Tag, index: Tag, *_: Any, **__: Any) -> Operand:
    weight = fixed(op.units, weight)
    return take(op, weight, 0, index)


@rule(*named("index_select"), choices=True, axes=True)
def index_select(op: Op, x: Tag, dim: int, index: Tag) -> Operand:
    x = fixed(op.units, x)
    if not index.shape:  # a single number keeps the dim, with size 1
        index = replace(index, shape=(1,), value=None if index.value is None else index.value.reshape(1))
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
    """A comparison of a choice with known numbers, which shows the unit that each number stands for."""
    choice, other = (a, b) if isinstance(a, Tag) and a.points is not None else (b, a)
    numbers = other.value if isinstance(other, Tag) else torch.tensor(other)
    if not isinstance(choice, Tag) or choice.points is None or numbers is None or numbers.is_floating_point():
        return core.pointwise(op.units, op.shape, [fixed(op.units, t) for t in (a, b) if isinstance(t, Tag)])
    asked = numbers.to(torch.int64).numpy()  # true is 1
    if asked.size and (asked.min() < 0 or asked.max() >= choice.points.size):
        return core.pointwise(op.units, op.shape, [fixed(op.units, choice)])
    units = core.widen(choice.points[asked], len(op.shape))
    return make(op.units, op.shape, [*(core.widen(c, len(op.shape)) for c in choice.coords), units], count=True)


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
    """Values that are alike for all places that one mask chooses; or whole slices put at indices along the first dim."""
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


SORTED = "rows sorted by expert"


def run_of(units: Units, tag: Operand, run: str, experts: int) -> Tag:
    """Experts' numbers in sorted order, or the ends of their runs, as a choice: its values stand for experts. Rows and
    experts stay in place. The same `run` gives the same choice."""
    fixed = core.freeze(units, settle(units, tag), SORTED)
    choice = units.memo.setdefault(("run", run), units.frozen(SORTED, experts).copy())
    rows = rows_of(units, choice, fixed.shape[0])
    return Tag(fixed.shape, (along(rows, 0, 1),) if fixed.shape[0] != 1 else (), points=choice)


def rows_of(units: Units, choice: Ids, n: int) -> Ids:
    """The frozen units of the n rows that follow a choice."""
    return units.memo.setdefault(("rows", id(choice), n), units.frozen(SORTED, n))


@rule(*named("_grouped_mm"), "transformers.grouped_mm_fallback", choices=True, experts=True)
def grouped_mm(op: Op, x: Operand, weight: Tag, ends: Tag | None = None, bias: Tag | None = None, *_: Any) -> Operand:
    """x (t, i), weight (e, i, o), ends (e) -> (t, o): which rows are whose is data, so rows and experts stay in place,
    but the hidden units of different experts are kept apart."""
    units = op.units
    if ends is None or len(x.shape) != 2 or len(weight.shape) != 3:
        for tag in (settle(units, x), weight):
            core.freeze(units, tag, "grouped product")
        return core.still(units, op.shape, "grouped product")
    if ends.points is None or ends.points.size != weight.shape[0]:
        ends = run_of(units, ends, f"ends {id(ends)}", weight.shape[0])
    assert ends.points is not None
    fixed = core.freeze(units, weight, SORTED, [0])
    dense = Tag((weight.shape[0], x.shape[0], *weight.shape[1:]), tuple(c[:, None] for c in fixed.coords))
    picked = Chosen(dense, (along(rows_of(units, ends.points, x.shape[0]), 0, 3),), ends.points)
    product = contract(units, [(x, ["t", "i"]), (picked, ["t", "i", "o"])], ["t", "o"])
    return product if bias is None else pointwise(units, op.shape, [product, bias])
