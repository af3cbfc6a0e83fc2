"""The points of a plane, evaluated from coarse to fine."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.landscape.evaluation.live import Live
from lmc.landscape.evaluation.points import preparation
from lmc.landscape.evaluation.scores import Score
from lmc.landscape.planes.grid import Values, coarse_to_fine
from lmc.landscape.planes.plane_result import Plane
from lmc.landscape.planes.refinement import Mask, refine
from lmc.landscape.planes.span import Span
from lmc.landscape.planes.workers import Workers
from lmc.network.network import pick_device
from lmc.network.task import Loss, Task
from lmc.weights import ModelOrWeights, agreeing

LONG = 10.0  # seconds from which on the cost of a plane is told before it starts


@dataclass(frozen=True)
class Options:
    """How the points of a plane are evaluated: the keyword arguments that all kinds of planes share (`loss_plane`)."""

    tolerance: float | None
    resume: Plane | None
    repair: Literal["auto"] | None
    inputs: Any
    loss: Loss | Task | None
    metrics: Mapping[str, Loss] | None
    batch_size: int | None
    device: torch.device | str | None
    progress: bool

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0.0 < self.tolerance < 1.0:
            raise InputError(f"tolerance={self.tolerance}; expected a share of the range of losses in (0, 1), or None")


@dataclass(frozen=True)
class Layout:
    """Where the points of a plane lie.

    Attributes:
        span: the weights of the plane.
        inside: x and y -> coordinates in the span.
        x, y: the columns and rows of the grid.
        places: the models that lie on nodes.
        axes: what x and y are.
    """

    span: Span
    inside: Callable[[float, float], tuple[float, float]]
    x: Values
    y: Values
    places: dict[str, tuple[float, float]]
    axes: tuple[str, str]


class Survey:
    """One plane in the making.

    Attributes:
        states: the weights of each model, where they are evaluated.
        parameters: what distances are measured over: each parameter once, no buffers.
    """

    def __init__(self, model: nn.Module, models: Mapping[str, ModelOrWeights], data: Any, options: Options) -> None:
        agreed = agreeing(list(models.values()), list(models), model=model)
        states, first = dict(zip(models, agreed, strict=True)), next(iter(models))
        self.options = options
        self._evaluator = Evaluator(
            model,
            data,
            loss=options.loss,
            metrics=options.metrics,
            batch_size=options.batch_size,
            device=pick_device(options.device, states[first]),
        )
        self._prepare = preparation(self._evaluator, options.repair, options.inputs)
        device = self._evaluator.device
        self.states = {n: {key: tensor.to(device) for key, tensor in state.items()} for n, state in states.items()}
        self.parameters = [name for name, _ in self._evaluator.network.module.named_parameters()]

    def plane(self, layout: Layout) -> Plane:
        """The plane, with as many points as an interrupt left time for."""
        options = self.options
        own = list(self._evaluator([self.states[name] for name in layout.places]))
        plane = replace(_blank(layout, own, self._prepare is not None), exact=self._live(layout))
        if options.resume is not None:
            _take_over(plane, options.resume)
        if self._prepare is None:  # the models are their own points
            for (x, y), score in zip(layout.places.values(), own, strict=True):
                _note(plane, int(np.flatnonzero(layout.y == y)[0]), int(np.flatnonzero(layout.x == x)[0]), score)

        def place(i: int) -> tuple[float, float]:
            row, column = divmod(i, len(layout.x))
            return layout.inside(float(layout.x[column]), float(layout.y[row]))

        workers = Workers(self._evaluator, self._prepare, layout.span, place)
        if options.progress and not plane.complete:
            _tell(plane, workers, self._evaluator.device, options.tolerance)
        with tqdm(total=0, desc="plane", unit="point", disable=not options.progress) as bar:
            if options.tolerance is not None:
                return refine(plane, lambda mask: _evaluate(plane, workers, mask, bar), options.tolerance)
            _evaluate(plane, workers, ~plane.done, bar)
        return plane

    def _live(self, layout: Layout) -> Live:
        bench = self._evaluator, self._prepare, lambda x, y: layout.span(*layout.inside(x, y))
        return Live(lambda: bench, list(self.states.values()))


def _evaluate(plane: Plane, workers: Workers, wanted: Mask, bar: tqdm) -> bool:
    """Evaluate the points of a mask, from coarse to fine; False, and a warning, when an interrupt came first."""
    order = [i for i in coarse_to_fine(*wanted.shape) if wanted.flat[i]]
    bar.total += len(order)
    try:
        for i, score in workers(order):
            _note(plane, *divmod(i, wanted.shape[1]), score)
            bar.update()
    except KeyboardInterrupt:
        count = int(plane.done[wanted].sum())
        message = f"interrupted: {count} of {len(order)} points were evaluated, the others are NaN"
        warnings.warn(message, stacklevel=5)
        return False
    return True


def _blank(layout: Layout, own: list[dict[str, Score]], recalibrated: bool) -> Plane:
    """A plane of which no point is known."""
    shape = (len(layout.y), len(layout.x))
    measures = {split: list(score.values) for split, score in own[0].items()}
    values = {split: {m: np.full(shape, math.nan) for m in names} for split, names in measures.items()}
    kept = {s: {m: tuple(score[s].values[m] for score in own) for m in names} for s, names in measures.items()}
    done = np.zeros(shape, dtype=bool)
    return Plane(layout.x, layout.y, values, layout.places, kept, done, layout.axes, recalibrated)


def _tell(plane: Plane, workers: Workers, device: torch.device, tolerance: float | None) -> None:
    """What a long plane will cost, judged by one point."""
    each, points = workers.seconds_each(), int((~plane.done).sum())
    if points * each > LONG:
        cost = f"about {points * each:.0f} s ({1e3 * each:.1f} ms each, on {device})"
        most = "" if tolerance is None else "at most "
        tqdm.write(f"plane: {most}{points} points to evaluate, {cost}; an interrupt keeps those that are done")


def _note(plane: Plane, row: int, column: int, score: Mapping[str, Score]) -> None:
    plane.done[row, column] = True
    for split, measures in plane.values.items():
        for measure, grid in measures.items():
            grid[row, column] = score[split].values[measure]


def _take_over(plane: Plane, earlier: Plane) -> None:
    """Copy the points that an earlier plane evaluated.

    Raises:
        InputError: it is a plane of other models, data, measures or points.
    """
    same = plane.values.keys() == earlier.values.keys() and plane.recalibrated == earlier.recalibrated
    same = same and all(np.array_equal(p, q) for p, q in ((plane.x, earlier.x), (plane.y, earlier.y)))
    for split, measures in plane.own.items():
        others = earlier.own.get(split, {})
        same = same and measures.keys() == others.keys()
        same = same and all(np.allclose(measures[m], others[m], rtol=1e-4, equal_nan=True) for m in measures)
    if not same:
        raise InputError("resume: a plane of other models, data, measures or points; pass it with the same arguments")
    plane.done[:] = earlier.evaluated
    for split, measures in plane.values.items():
        for measure, grid in measures.items():
            grid[:] = np.where(earlier.evaluated, earlier.values[split][measure], math.nan)
