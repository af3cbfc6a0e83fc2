"""Computing for chosen experts only: `weights[choice]` picks the weights of one expert at every position.

What follows pointwise is the same as computing for all experts and picking at the end, so that is how it is read: a
`Chosen` tensor stands for a dense tensor with a leading dim of experts, of which one is to be picked by the choice at
each position. Hidden units of different experts then stay apart. Operators that mix positions make the pick first
(`settle`); so does, by default, every rule that does not know about choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lmc.symmetry.rules import core
from lmc.symmetry.rules.tags import Shape, Tag, make
from lmc.symmetry.rules.units import Ids, Units


@dataclass(frozen=True, eq=False)
class Chosen:
    """`dense[e]` at the position's choice e.

    Attributes:
        dense: the tensor for all experts, (experts, *shape).
        index: coordinates (of the rank of the visible tensor) that distinguish positions with different choices.
        points: the units that choices stand for; one array per choice made, so that it identifies the choice.
    """

    dense: Tag
    index: tuple[Ids, ...]
    points: Ids

    @property
    def shape(self) -> Shape:
        return self.dense.shape[1:]


Operand: TypeAlias = Tag | Chosen


def settle(units: Units, x: Operand) -> Tag:
    """Make the pick: a symmetric function of the experts, given the choice."""
    if isinstance(x, Tag):
        return x
    rest = core.reduce(units, x.dense, (0,), keepdim=False)
    return make(units, x.shape, [*rest.coords, *x.index])


def choose(units: Units, x: Tag, index: Tag, points: Ids) -> Operand:
    """`x[index]`, where the values of `index` stand for `points`, units along the first dim of `x` (tied to it)."""
    ones = (1,) * len(index.shape)
    coords = tuple(c.reshape((len(c), *ones, *c.shape[1:])) for c in x.coords)
    dense = Tag((x.shape[0], *index.shape, *x.shape[1:]), coords)
    chosen = Chosen(dense, tuple(c.reshape(c.shape + (1,) * (len(x.shape) - 1)) for c in index.coords), points)
    mixed = any(1 < len(c) < c.size for c in coords)
    return chosen if mixed else settle(units, chosen)


def agree(one: Sequence[Ids], other: Sequence[Ids]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and bool((a == b).all()) for a, b in zip(one, other, strict=True)
    )


def pointwise(units: Units, shape: Shape, tags: Sequence[Operand]) -> Operand:
    """E for all experts at once, as long as all operands follow the same choice."""
    first = next((t for t in tags if isinstance(t, Chosen)), None)
    if first is None:
        return core.pointwise(units, shape, [t for t in tags if isinstance(t, Tag)])
    ndim = len(shape)
    index = tuple(core.widen(i, ndim) for i in first.index)
    wide: list[Tag] = []
    for tag in tags:
        if (
            isinstance(tag, Chosen)
            and tag.points is first.points
            and agree([core.widen(i, ndim) for i in tag.index], index)
        ):
            rows = (c.reshape(c.shape[:1] + (1,) * (ndim + 1 - c.ndim) + c.shape[1:]) for c in tag.dense.coords)
            wide.append(Tag((), tuple(rows)))
        else:
            wide.append(Tag((), tuple(core.widen(c, ndim)[None] for c in settle(units, tag).coords)))
    dense = core.pointwise(units, (first.dense.shape[0], *shape), wide)
    return Chosen(dense, index, first.points)


def reduce(units: Units, x: Operand, dims: tuple[int, ...], keepdim: bool) -> Operand:
    """R for all experts, unless the choice varies along the reduced dims."""
    if isinstance(x, Tag) or any(i.shape[d] > 1 for i in x.index for d in dims):
        return core.reduce(units, settle(units, x), dims, keepdim)
    dense = core.reduce(units, x.dense, tuple(d + 1 for d in dims), keepdim)
    index = x.index if keepdim else core.squeeze(Tag(x.shape, x.index), dims).coords
    return Chosen(dense, index, x.points)


def contract(units: Units, operands: Sequence[tuple[Operand, Sequence[str]]], out: Sequence[str]) -> Operand:
    """C for all experts; labels on which the choice varies are kept until the pick is made."""
    first, labels = next(((t, labels) for t, labels in operands if isinstance(t, Chosen)), (None, ()))
    if first is None:
        return core.contract(units, [(t, labels) for t, labels in operands if isinstance(t, Tag)], out)
    every = list(dict.fromkeys([*out, *(label for _, names in operands for label in names)]))
    index = core.lift(Tag(first.shape, first.index), labels, every)
    dense: list[tuple[Tag, Sequence[str]]] = []
    for tag, names in operands:
        if isinstance(tag, Chosen) and tag.points is first.points:
            if agree(core.lift(Tag(tag.shape, tag.index), names, every), index):
                dense.append((tag.dense, ["expert", *names]))
                continue
        dense.append((settle(units, tag), names))
    late = [label for d, label in enumerate(every) if label not in out and any(i.shape[d] > 1 for i in index)]
    kept = [*out, *late]
    product = core.contract(units, dense, ["expert", *kept])
    away = tuple(d for d, label in enumerate(every) if label not in kept)
    squeezed = core.squeeze(Tag((1,) * len(every), tuple(index)), away).coords
    result = Chosen(product, squeezed, first.points)
    if not late:
        return result
    return core.reduce(units, settle(units, result), tuple(range(len(out), len(kept))), keepdim=False)
