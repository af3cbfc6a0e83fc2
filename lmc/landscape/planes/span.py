"""A plane in weight space: one point, two directions, and coordinates on it; grids through given places, three models,
directions around one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmc.errors import InputError
from lmc.landscape.evaluation.measured import Values
from lmc.network.derived import gauged_as
from lmc.weights import ModelOrWeights, Weights, agreeing, as_weights
from lmc.weights.state import inexact

FLATTEST = 1e-3  # height over side below which a triangle counts as a line


class PlaneSpan:
    """`origin + u U + v V`.

    Args:
        origin: the weights at (0, 0).
        directions: U and V. Tensors that both lack do not move, nor do integers.
    """

    def __init__(self, origin: Weights, directions: Sequence[Weights]) -> None:
        self.origin = origin
        moving = [n for n, t in origin.items() if inexact(t) and any(n in d for d in directions)]
        # Complex tensors are moved as pairs of reals; they come first, since a complex view must start at an even place.
        moving.sort(key=lambda name: not origin[name].is_complex())
        self._shapes = {name: as_reals(origin[name]).shape for name in moving}
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        self._dtype = torch.float32
        for name in moving:
            self._dtype = torch.promote_types(self._dtype, as_reals(origin[name]).dtype)
        self._one_dtype = all(as_reals(origin[name]).dtype == self._dtype for name in moving)
        # One vector for all that moves: a point is then two operations, however many tensors there are.
        self._base, self._u, self._v = (self._flat(part) for part in (origin, *directions))

    @classmethod
    def through(cls, first: Weights, second: Weights, third: Weights) -> "PlaneSpan":
        """The second weight set is at (1, 0), the third at (0, 1)."""
        return cls(first, [difference(second, first), difference(third, first)])

    def __call__(self, u: float, v: float) -> Weights:
        """The weights at (u, v), in the dtypes of the origin."""
        return self.origin | self._cut(self._mix(u, v))

    def traveller(self) -> tuple[Weights, Callable[[float, float], object]] | None:
        """Weights that stay where they are in memory, and what takes them to (u, v); None where dtypes differ."""
        if not self._one_dtype:
            return None
        flat = self._base.clone()
        return self.origin | self._cut(flat), partial(self._mix, out=flat)

    def _mix(self, u: float, v: float, out: Tensor | None = None) -> Tensor:
        return torch.add(self._base, self._u, alpha=u, out=out).add_(self._v, alpha=v)

    def parts(self) -> list[Weights]:
        """The origin, U and V, for every tensor that moves."""
        return [self._cut(flat) for flat in (self._base, self._u, self._v)]

    def _flat(self, part: Weights) -> Tensor:
        pieces = [part[n] if n in part else torch.zeros_like(self.origin[n]) for n in self._shapes]
        return torch.cat([as_reals(p).to(self._dtype).flatten() for p in pieces]) if pieces else torch.zeros(0)

    def _cut(self, flat: Tensor) -> Weights:
        pieces = zip(self._shapes.items(), flat.split(self._sizes), strict=True) if self._sizes else ()
        views = {name: piece.view(shape) for (name, shape), piece in pieces}
        views = {n: torch.view_as_complex(v) if self.origin[n].is_complex() else v for n, v in views.items()}
        return views if self._one_dtype else {name: view.to(self.origin[name].dtype) for name, view in views.items()}


def as_reals(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, along a new last axis; any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def difference(a: Weights, b: Weights) -> Weights:
    """`a - b` of all floating-point and complex tensors, in float32 at least."""
    dtypes = {n: torch.promote_types(t.dtype, torch.float32) for n, t in a.items() if inexact(t)}
    return {name: a[name].to(dtype) - b[name].to(dtype) for name, dtype in dtypes.items()}


class Frame:
    """Coordinates (x, y) on a span.

    Args:
        span: the plane; its first model, or the network in its middle, is at (0, 0).
        parameters: the tensors that distances are measured over.
        units: (2, 2) the coordinates (x, y), in columns, of the ends of U, which lies on the x axis, and of V (default: x
            and y are u and v).
    """

    def __init__(self, span: PlaneSpan, parameters: Sequence[str], units: Values | None = None) -> None:
        self.span = span
        self._parameters = list(parameters)
        self._units: list[list[float]] = (np.eye(2) if units is None else units).tolist()

    def inside(self, x: float, y: float) -> tuple[float, float]:
        """(u, v) of a point: numbers that are exactly 0 or 1 where U or V end."""
        (ux, vx), (_, vy) = self._units
        v = y / vy  # in this order: v is exactly 1 where V ends, and u then exactly 0
        return (x - v * vx) / ux, v

    def project(self, weights: ModelOrWeights) -> tuple[float, float, float]:
        """(x, y) of the point of the plane that is nearest to `weights`, and the distance to it, in float64.

        Raises:
            MismatchError: weights of another architecture.
        """
        own = self.span.origin
        state = gauged_as(as_weights(weights), own)
        there = {name: tensor.to(own[name].device) if name in own else tensor for name, tensor in state.items()}
        state = agreeing([own, there], ["plane", "weights"])[1]
        gram, products, square = np.zeros((2, 2)), np.zeros(2), 0.0
        for offset, along in self._pieces(state):
            gram += [[float(p @ q) for q in along] for p in along]
            products += [float(offset @ p) for p in along]
        u, v = np.linalg.solve(gram, products)
        for offset, (p, q) in self._pieces(state):  # a difference of squares would be rounding for points on the plane
            square += float((offset - u * p - v * q).square().sum())
        x, y = np.array(self._units) @ (u, v)
        return float(x), float(y), square**0.5

    def _pieces(self, state: Weights) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Of each parameter the offset of `state` from the origin, and U and V; all flat, in float64."""
        origin, *directions = self.span.parts()
        for name in self._parameters:
            base = self.span.origin[name]
            if inexact(base):
                parts = (state[name], origin.get(name, base), *(part.get(name) for part in directions))
                flat = [torch.zeros_like(base) if part is None else part for part in parts]
                there, here, *along = (as_reals(part).double().flatten() for part in flat)
                yield there - here, along


def axis(low: float, high: float, count: int, through: Iterable[float]) -> Values:
    """`count` ascending points from low to high, evenly spaced but for those moved onto the places in `through`."""
    points = np.linspace(low, high, count)
    free = np.ones(count, dtype=bool)
    for place in sorted(set(through)):
        nearest = int(np.argmin(np.where(free, np.abs(points - place), np.inf)))
        points[nearest], free[nearest] = place, False
    return np.sort(points)


def coarse_to_fine(rows: int, columns: int) -> list[int]:
    """The flat indices of a grid: a wide mesh first, then the meshes half as wide, so that every start of it is a
    coarser picture of the whole."""
    row, column = (_mesh(np.arange(count)) for count in (rows, columns))
    mesh = np.minimum.outer(row, column)
    return np.argsort(-mesh.ravel(), kind="stable").tolist()


def _mesh(index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The largest power of two that divides each index; for 0, larger than any."""
    return np.where(index == 0, 1 << 30, index & -index)


@dataclass(frozen=True)
class ThroughThree:
    """Three models in the plane through them (Garipov et al. 2018, arXiv:1802.10026, section 3.2).

    The x axis runs from the first model to the third, the y axis at right angles towards the second: they lie at (0, 0),
    (foot, height) and (side, 0), in units of Euclidean distance between parameters.
    """

    side: float
    foot: float
    height: float

    @property
    def places(self) -> list[tuple[float, float]]:
        """The places of the three models."""
        return [(0.0, 0.0), (self.foot, self.height), (self.side, 0.0)]

    @property
    def units(self) -> Values:
        """(2, 2) the places of the third and of the second model, in columns."""
        return np.array([[self.side, self.foot], [0.0, self.height]])

    @classmethod
    def of(cls, models: Sequence[Weights], names: Sequence[str], parameters: Iterable[str]) -> "ThroughThree":
        """The triangle of three weight sets, measured over the tensors named in `parameters`.

        Raises:
            InputError: models that are equal or lie on a line.
        """
        first, second, third = models
        uu = uv = vv = 0.0
        for name in parameters:
            u = _difference(third[name], first[name])
            v = _difference(second[name], first[name])
            uu, uv, vv = uu + float(u @ u), uv + float(u @ v), vv + float(v @ v)
        far = max(uu, vv) ** 0.5
        if uu**0.5 <= FLATTEST * far:
            raise InputError(_flat(names, f"{names[0]} and {names[2]} are the same, or nearly"))
        side, foot = uu**0.5, uv / uu**0.5
        height = max(vv - foot**2, 0.0) ** 0.5
        if height <= FLATTEST * max(far, abs(foot)):
            raise InputError(_flat(names, f"{names[1]} is {height:.3g} off the line, {names[2]} {side:.3g} along it"))
        if min(abs(foot), abs(foot - side)) <= 1e-9 * side:  # a right angle, up to rounding
            foot = 0.0 if abs(foot) < abs(foot - side) else side
        return cls(side, foot, height)


@dataclass(frozen=True)
class Principal:
    """The two directions along which a trajectory moves most, seen from its end (Li et al. 2018, arXiv:1712.09913,
    section 7.2).

    Attributes:
        directions: two orthogonal weight sets of length 1 over the parameters; buffers go along.
        track: (K, 2) the trajectory, projected; its end is at (0, 0), its start in the first quadrant.
        explained: the share of the squared distances to the end that lies along each direction.
    """

    directions: tuple[Weights, Weights]
    track: Values
    explained: tuple[float, float]

    @classmethod
    def of(cls, states: Sequence[Weights], parameters: Iterable[str]) -> "Principal":
        """Of K weight sets, from start to end; their differences to the last one are not centred, since the plane goes
        through it.

        Raises:
            InputError: weight sets that are equal or lie on a line.
        """
        *earlier, end = states
        gram = np.zeros((len(earlier), len(earlier)))
        for name in parameters:
            moved = torch.stack([_difference(state[name], end[name]) for state in earlier])
            gram += (moved @ moved.T).cpu().numpy()
        squares, mixtures = np.linalg.eigh(gram)  # ascending; the directions are mixtures of the differences
        squares, mixtures = squares[::-1].clip(0.0), mixtures[:, ::-1]
        if squares[0] == 0.0 or squares[1] <= FLATTEST**2 * squares[0]:
            raise InputError(
                "trajectory: its points are collinear, or nearly, so that they span no plane; draw the line with loss_path"
            )
        mixtures = mixtures * np.where(mixtures[0] < 0.0, -1.0, 1.0)
        lengths = np.sqrt(squares[:2])
        differences = [difference(state, end) for state in earlier]
        one, two = (_mixed(differences, mixtures[:, k] / lengths[k]) for k in (0, 1))
        track = np.vstack([mixtures[:, :2] * lengths, np.zeros((1, 2))])
        shares = squares[:2] / squares.sum()
        return cls((one, two), track, (float(shares[0]), float(shares[1])))


def filter_normalised(weights: Weights, parameters: Iterable[str], generator: torch.Generator) -> Weights:
    """A Gaussian direction, each filter of it as long as the filter of the weights (Li et al. 2018, arXiv:1712.09913,
    section 4): a filter is all that feeds one output unit, `tensor[j]`. Vectors and scalars (biases, scales of
    normalisations) do not move; nor does what is missing in the result."""
    direction = {}
    for name in parameters:
        tensor = weights[name]
        if tensor.ndim < 2 or not inexact(tensor):
            continue
        dtype = torch.complex64 if tensor.is_complex() else torch.float32
        random = torch.randn(tensor.shape, generator=generator, dtype=dtype).to(tensor.device)
        lengths = tensor.to(dtype).flatten(1).norm(dim=1) / random.flatten(1).norm(dim=1).clamp_min(1e-10)
        direction[name] = random * lengths.reshape(-1, *[1] * (tensor.ndim - 1))
    return direction


def _mixed(differences: Sequence[Weights], shares: Values) -> Weights:
    return {
        name: sum(
            (part[name] * float(share) for part, share in zip(differences, shares, strict=True)), start=0 * tensor
        )
        for name, tensor in differences[0].items()
    }


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return (as_reals(a).double() - as_reals(b).double()).flatten()


def _flat(names: Sequence[str], why: str) -> str:
    return (
        f"the models {', '.join(names)} are collinear ({why}), so that no plane is theirs alone; take a third model off "
        "the line, or draw the line with loss_path"
    )
