"""The points of a plane, evaluated from coarse to fine."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lmc.core.context import warn
from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluation import Evaluation
from lmc.landscape.evaluation.measured import Live, Values
from lmc.landscape.evaluation.scores import Score
from lmc.landscape.planes.plane_result import Plane
from lmc.landscape.planes.refinement import Mask, refine
from lmc.landscape.planes.span import Frame, coarse_to_fine
from lmc.landscape.planes.workers import Workers


@dataclass(frozen=True)
class Layout:
    """Where the points of a plane lie.

    Attributes:
        frame: the plane in weight space, with its coordinates.
        x, y: the columns and rows of the grid.
        places: the models of the evaluation that lie on nodes, by name, in its order; the last ones of it.
        axes: what x and y are.
    """

    frame: Frame
    x: Values
    y: Values
    places: dict[str, tuple[float, float]]
    axes: tuple[str, str]


def survey(evaluation: Evaluation, layout: Layout, tolerance: float | None, resume: Plane | None) -> Plane:
    """The plane, with as many points as an interrupt left time for.

    Raises:
        InputError: an unusable tolerance, or `resume` is another plane.
    """
    if tolerance is not None and not 0.0 < tolerance < 1.0:
        raise InputError(f"tolerance={tolerance}; expected a share of the range of losses in (0, 1), or None")
    own = list(evaluation.evaluator(evaluation.states[-len(layout.places) :]))
    plane = _blank(evaluation, layout, own)
    if resume is not None:
        _take_over(plane, resume)
    if evaluation.prepare is None:  # the models are their own points
        for (x, y), score in zip(layout.places.values(), own, strict=True):
            _note(plane, int(np.flatnonzero(layout.y == y)[0]), int(np.flatnonzero(layout.x == x)[0]), score)

    def place(i: int) -> tuple[float, float]:
        row, column = divmod(i, len(layout.x))
        return layout.frame.inside(float(layout.x[column]), float(layout.y[row]))

    workers = Workers(evaluation, layout.frame.span, place)
    most = "" if tolerance is None else "at most "
    evaluation.tell("plane", int((~plane.done).sum()), workers.seconds_each, most)
    with tqdm(total=0, desc="plane", unit="point", disable=not evaluation.progress) as bar:
        if tolerance is not None:
            return refine(plane, lambda mask: _evaluate(plane, workers, mask, bar), tolerance)
        _evaluate(plane, workers, ~plane.done, bar)
    return plane


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
        warn(message)
        return False
    return True


def _blank(evaluation: Evaluation, layout: Layout, own: list[dict[str, Score]]) -> Plane:
    """A plane of which no point is known."""
    shape, frame, task = (len(layout.y), len(layout.x)), layout.frame, evaluation.evaluator.task
    measures = {split: list(score.values) for split, score in own[0].items()}
    return Plane(
        layout.x,
        layout.y,
        values={split: {m: np.full(shape, math.nan) for m in names} for split, names in measures.items()},
        places=layout.places,
        own={s: {m: tuple(score[s].values[m] for score in own) for m in names} for s, names in measures.items()},
        done=np.zeros(shape, dtype=bool),
        axes=layout.axes,
        recalibrated=evaluation.recalibrated,
        unit=task.unit,
        higher=tuple(task.higher),
        frame=frame,
        exact=Live(evaluation, lambda evaluation, x, y: evaluation.ready(frame.span(*frame.inside(x, y)))),
    )


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
