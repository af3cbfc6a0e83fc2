"""Tags, the knowledge about a tensor during discovery: for each position, the units that its value belongs to.

A *coordinate* is an int64 array of unit ids that broadcasts to the tensor's shape (size 1 along dims on which it does
not vary). A `Tag` is a shape with several coordinates. Every operator rule keeps two invariants:

- **I1** the value at a position is a function of the tuple of coordinates there: equal tuples, equal values;
- **I2** for every admissible permutation g of the units there is a permutation s of the positions with
  `c(s(p)) = g(c(p))` for every coordinate c, and the tensor computed from moved parameters is the old one moved by s.

`join` restores I2 after coordinates from several tensors meet: it records how they depend on each other.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import torch

from lmc.symmetry.rules.units import Ids, Units, first_codes

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Tag:
    """Shape and coordinates of one tensor.

    Attributes:
        shape: the tensor's shape.
        coords: its coordinates, mutually independent in the sense of `join`.
        value: the tensor itself (on CPU) where it does not depend on parameters or inputs and is known.
        constant: whether it does not depend on parameters or inputs.
        points: for an integer tensor whose values index a movable axis (a router's choice): `points[v]` is the unit
            that value v stands for. Under g, a value that stands for u becomes the value that stands for g(u).
    """

    shape: Shape
    coords: tuple[Ids, ...] = ()
    value: torch.Tensor | None = None
    constant: bool = False
    points: Ids | None = None


def support(coord: Ids) -> tuple[int, ...]:
    """The dims on which a coordinate varies."""
    return tuple(d for d, n in enumerate(coord.shape) if n > 1)


def along(ids: Ids, dim: int, ndim: int) -> Ids:
    """A coordinate that lists `ids` along one dim."""
    return ids.reshape((1,) * dim + (-1,) + (1,) * (ndim - dim - 1))


def shrink(coord: Ids) -> Ids:
    """Drop the dims on which a coordinate turns out to be constant."""
    for d in support(coord):
        head = coord.take([0], axis=d)
        if (coord == head).all():
            coord = head
    return coord


def spread(coord: Ids, dims: tuple[int, ...], shape: Shape) -> Ids:
    """Expand a coordinate to full size along `dims`."""
    return np.broadcast_to(coord, tuple(n if d in dims else coord.shape[d] for d, n in enumerate(shape)))


def make(units: Units, shape: Shape, coords: list[Ids], *, count: bool = False) -> Tag:
    """A tag in normal form: constant dims shrunk, coordinates joined; `count` also records their multisets, which is
    needed where positions were picked, repeated or left out."""
    if prod(shape) == 0:
        return Tag(shape)
    coords = [shrink(c) for c in coords]
    if count:
        for c in coords:
            units.count(c)
    return Tag(shape, tuple(join(units, shape, coords)))


def join(units: Units, shape: Shape, coords: list[Ids]) -> list[Ids]:
    """Make coordinates independent (I2): their joint multiset over positions must follow from the recorded facts.

    Coordinates that vary on disjoint dims are independent. Others are related cluster by cluster.
    """
    joined: list[Ids] = []
    for cluster in clusters(different(coords)):
        joined += cluster if len(cluster) == 1 else join_cluster(units, shape, cluster)
    return joined


def different(coords: list[Ids]) -> list[Ids]:
    """Coordinates that vary, without repetitions."""
    kept: list[Ids] = []
    for c in coords:
        if c.size > 1 and not any(c is k or (c.shape == k.shape and np.array_equal(c, k)) for k in kept):
            kept.append(c)
    return kept


def clusters(coords: list[Ids]) -> list[list[Ids]]:
    """Coordinates grouped so that those of different groups vary on disjoint dims."""
    groups: list[tuple[set[int], list[Ids]]] = []
    for c in coords:
        dims, members = set(support(c)), [c]
        apart = []
        for g_dims, g_members in groups:
            if g_dims & dims:
                dims, members = dims | g_dims, g_members + members
            else:
                apart.append((g_dims, g_members))
        groups = [*apart, (dims, members)]
    return [members for _, members in groups]


def join_cluster(units: Units, shape: Shape, coords: list[Ids]) -> list[Ids]:
    """Relate coordinates that share dims.

    A coordinate that is a function of another one, or of the frozen ones together, is dropped, the function recorded. Dims
    on which only one coordinate varies are summarised by blocks: given the blocks on the shared dims, the rest is a product.
    What is left varies on shared dims only; where these are several dims in one, they are taken apart, else it is either a
    full product or made into pairs.
    """
    coords = drop_determined(units, shape, drop_fixed(units, shape, coords))
    parts = clusters(coords)
    if len(parts) > 1:
        return [c for part in parts for c in (part if len(part) == 1 else join_cluster(units, shape, part))]
    if len(coords) == 1:
        return coords
    private = [tuple(d for d in support(c) if all(o is c or o.shape[d] == 1 for o in coords)) for c in coords]
    if not any(private):
        digits = [digits_of(coords, d, shape[d]) for d in range(len(shape))]
        if any(len(sizes) > 1 for sizes in digits):
            return join_digits(units, coords, digits)
        return join_shared(units, shape, coords)
    summaries = [block(units, c, dims) for c, dims in zip(coords, private, strict=True) if dims]
    plain = [c for c, dims in zip(coords, private, strict=True) if not dims]
    rest = join(units, shape, [shrink(s) for s in summaries] + plain)
    own = [c for c, dims in zip(coords, private, strict=True) if dims]
    own = [telling(units, shape, c, s) for c, s in zip(own, summaries, strict=True)]
    return own + [c for c in rest if not any(c is s for s in summaries)]


def join_digits(units: Units, coords: list[Ids], digits: list[list[int]]) -> list[Ids]:
    """Join with dims split into digits: the axes of a weight whose rows were flattened are dims of their own again."""
    fine = tuple(n for sizes in digits for n in sizes)
    split = [c.reshape([n if c.shape[d] > 1 else 1 for d, sizes in enumerate(digits) for n in sizes]) for c in coords]
    joined: list[Ids] = []
    for c in join(units, fine, [shrink(c) for c in split]):
        wide: list[int] = []
        for sizes in digits:
            own = c.shape[len(wide) : len(wide) + len(sizes)]
            wide += sizes if any(n > 1 for n in own) else own
        ends = np.cumsum([len(sizes) for sizes in digits]).tolist()
        whole = [prod(wide[end - len(sizes) : end]) for sizes, end in zip(digits, ends, strict=True)]
        joined.append(np.broadcast_to(c, wide).reshape(whole))
    return joined


def digits_of(coords: list[Ids], dim: int, size: int) -> list[int]:
    """The sizes of the digits into which indices along a dim fall, so that each coordinate depends on some of them only."""
    cuts = {1, size}
    for c in coords:
        if c.shape[dim] > 1:
            lines = c.reshape(prod(c.shape[:dim]), size, -1)
            cuts |= {run_length(lines), period(lines)}
    ordered = sorted(cuts)
    if any(large % small for small, large in pairwise(ordered)):
        return [size]
    return [large // small for small, large in pairwise(ordered)][::-1] or [size]


def run_length(lines: Ids) -> int:
    """The largest k such that entries along axis 1 come in k equal ones (k divides their number)."""
    changes = np.flatnonzero((lines[:, 1:] != lines[:, :-1]).any(axis=(0, 2))) + 1
    return int(np.gcd.reduce([lines.shape[1], *changes]))


def period(lines: Ids) -> int:
    """The smallest k, a divisor of their number, after which entries along axis 1 repeat themselves."""
    n = lines.shape[1]
    return next(k for k in range(1, n + 1) if n % k == 0 and (lines[:, k:] == lines[:, : n - k]).all())


def telling(units: Units, shape: Shape, coord: Ids, summary: Ids) -> Ids:
    """A coordinate that determines its block: paired with it where a unit is in several blocks (I1)."""
    dims = support(coord)
    wide, blocks = spread(coord, dims, shape), spread(summary, dims, shape)
    if units.determines(wide.ravel(), blocks.ravel()):
        return coord
    return shrink(units.pair(wide, blocks))


def drop_fixed(units: Units, shape: Shape, coords: list[Ids]) -> list[Ids]:
    """Drop each coordinate that is a function of all frozen ones together, and freeze its units: where no frozen unit
    moves, neither does it. Biases that are looked up for each two tokens would else make a unit for each two tokens."""
    still = [c for c in coords if units.is_frozen(c.ravel())]
    dims = tuple(sorted({d for c in still for d in support(c)}))
    if len(still) < 2 or all(set(support(c)) - set(dims) for c in coords if not any(c is k for k in still)):
        return coords
    joint, total = np.zeros(prod(shape[d] for d in dims), np.int64), 1
    for c in still:
        code, k = units.codes(spread(c, dims, shape).ravel())
        joint, total = joint * k + code, total * k
        if total > 4 * joint.size:
            joint, total = first_codes(joint)
    value = np.empty(total, np.int64)
    kept: list[Ids] = []
    for c in coords:
        if any(c is k for k in still) or set(support(c)) - set(dims):
            kept.append(c)
            continue
        flat = spread(c, dims, shape).ravel()
        value[joint] = flat
        if (value[joint] == flat).all():
            ids = np.unique(c)
            units.map(np.full(ids.size, still[0].flat[0]), ids)
        else:
            kept.append(c)
    return kept


def drop_determined(units: Units, shape: Shape, coords: list[Ids]) -> list[Ids]:
    """Drop each coordinate that is a function of another, and record the function; of two equivalent ones keep the
    frozen one, or the older."""
    kept: list[Ids] = []
    for c in coords:
        survivors: list[Ids] = []
        for k in kept:
            if c is None:
                survivors.append(k)
                continue
            dims = tuple(sorted({*support(c), *support(k)}))
            if len(dims) > max(len(support(c)), len(support(k))):
                survivors.append(k)
                continue
            flat_k, flat_c = spread(k, dims, shape).ravel(), spread(c, dims, shape).ravel()
            down, up = units.determines(flat_k, flat_c), units.determines(flat_c, flat_k)
            if down:
                units.map(flat_k, flat_c)
            if up:
                units.map(flat_c, flat_k)
            if down and up and older(units, c, k):
                continue
            if not up or down:
                survivors.append(k)
            if down:
                c = None
        kept = survivors if c is None else [*survivors, c]
    return kept


def older(units: Units, c: Ids, k: Ids) -> bool:
    """Whether c is the better name for the units that c and k both stand for."""
    frozen_c, frozen_k = units.is_frozen(c.ravel()), units.is_frozen(k.ravel())
    return frozen_c and not frozen_k or (frozen_c == frozen_k and int(c.flat[0]) < int(k.flat[0]))


def join_shared(units: Units, shape: Shape, coords: list[Ids]) -> list[Ids]:
    """Coordinates none of which has dims of its own: keep full products, pair up the others."""
    dims = tuple(sorted({d for c in coords for d in support(c)}))
    kept: list[Ids] = []
    for c in coords:
        flat = spread(c, dims, shape)
        for k in list(kept):
            if not is_product(units, [spread(k, dims, shape).ravel(), flat.ravel()]):
                kept = [other for other in kept if other is not k]
                flat = units.pair(flat, spread(k, dims, shape))
        if len(kept) > 1 and not is_product(units, [*(spread(k, dims, shape).ravel() for k in kept), flat.ravel()]):
            for k in kept:
                flat = units.pair(flat, spread(k, dims, shape))
            kept = []
        kept.append(shrink(flat))
    return kept


def is_product(units: Units, columns: list[Ids]) -> bool:
    """Whether each combination of values occurs as often as the product of their frequencies implies."""
    size, joint, expected, total = columns[0].size, np.zeros(columns[0].size, np.int64), np.ones(columns[0].size), 1
    for column in columns:
        code, k = units.codes(column)
        total *= k
        if total > size:
            return False
        joint = joint * k + code
        expected = expected * np.bincount(code, minlength=k)[code] / size
    times = np.bincount(joint, minlength=total)
    return bool((times > 0).all() and np.allclose(times[joint], expected * size, rtol=1e-9))


def block(units: Units, coord: Ids, dims: tuple[int, ...]) -> Ids:
    """The coordinate left after a symmetric reduction over `dims`: positions with the same multiset of units get the
    same block, every unit maps to its block (or, where blocks overlap, to its occurrences in blocks)."""
    dims = tuple(d for d in dims if coord.shape[d] > 1)
    if not dims:
        return coord
    keep = tuple(d for d in range(coord.ndim) if d not in dims)
    rows = coord.transpose(keep + dims).reshape(prod(coord.shape[d] for d in keep), -1)
    code, k = first_codes(units.hashes()[rows].sum(axis=1))
    shape = tuple(1 if d in dims else n for d, n in enumerate(coord.shape))
    if k == 1:
        return np.zeros((1,) * coord.ndim, np.int64)
    key = ("block", dims, coord.shape, hash(coord.tobytes()))
    if key in units.memo:
        return units.memo[key]
    if units.is_frozen(coord.ravel()):
        return units.frozen(units.reason(int(coord.flat[0])), k)[code].reshape(shape)
    blocks = units.fresh(k)
    child, parent = rows.ravel(), np.broadcast_to(blocks[code][:, None], rows.shape).ravel()
    if units.determines(child, parent):
        units.map(child, parent)
    else:
        units.pair(child, parent)
    units.count(child)
    units.count(blocks[code])
    units.memo[key] = blocks[code].reshape(shape)
    return units.memo[key]
