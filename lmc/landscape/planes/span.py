"""A plane in weight space: one point, two directions, and coordinates on it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lmc.landscape.evaluation.measured import Values
from lmc.network.derived import gauged
from lmc.weights import ModelOrWeights, Weights, agreeing, as_weights
from lmc.weights.numbers import inexact


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
        own, state = self.span.origin, gauged(as_weights(weights))  # the form in which the plane was made
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
