"""The points of a plane, evaluated from coarse to fine: where interpolation fails, that is, and interpolated elsewhere.

The grid is the finest of a chain of meshes, each twice as fine as the one before. From one mesh to the next, values are
predicted by polynomials through the nearest points; where a prediction was off, the points around it are evaluated on
the next mesh as well, elsewhere predictions stand for values (interpolating wavelets: Harten 1996, Comm. Pure Appl. Math.
48, 1305; Holmstrom 1999, SIAM J. Sci. Comput. 21, 405). Points drawn at random among those that were interpolated are
then evaluated after all and show the error; where it is too large, all is done again with a smaller threshold."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from lmc.core.context import warn
from lmc.core.progress import tqdm
from lmc.errors import InputError, WorkerError
from lmc.landscape.evaluation.evaluation import Evaluation
from lmc.landscape.evaluation.measured import Live, Values, take_over
from lmc.landscape.evaluation.scores import Score
from lmc.landscape.planes.plane_result import Plane
from lmc.landscape.planes.span import Frame, coarse_to_fine
from lmc.landscape.planes.workers import Scoring, Workers, scoring

Mask = npt.NDArray[np.bool_]
Guess = dict[str, dict[str, Values]]

COARSEST = 6  # intervals along an axis of the coarsest mesh, at least
ORDER = 6  # points of the polynomials that interpolate losses
HELD_OUT = 64
SAFETY = 0.5  # share of the tolerance that the worst of so few points may take: among all there are worse ones
THRESHOLDS = (1.0, 0.25, 0.0625, -1.0)  # in units of the tolerance, one attempt after the other; -1: every point
REACH = 2  # nodes of the next mesh, around one where a prediction was off, that are evaluated


def refine(plane: Plane, evaluate: Callable[[Mask], bool], tolerance: float) -> Plane:
    """The plane with every point known: losses within `tolerance` of their range, as far as held-out points show.

    Other measures than the loss do not decide where points are evaluated (accuracies go in steps of one example); they
    are interpolated linearly, and their error is measured too.

    Args:
        plane: some of its points may be known already.
        evaluate: writes the points of a mask (Y, X) into the plane; False when it was interrupted.
    """
    random = np.random.default_rng(0)
    guess, error = plane.values, {}
    for threshold in THRESHOLDS:
        swept = _sweep(plane, evaluate, threshold * tolerance)
        if swept is None:
            return plane
        guess, held_out = swept, _draw(~plane.done, random)
        if not evaluate(held_out):
            return plane
        off = {s: {m: np.abs(guess[s][m] - grid)[held_out] for m, grid in ms.items()} for s, ms in plane.values.items()}
        error = {s: {m: float(np.nanmax(d, initial=0.0)) for m, d in ms.items()} for s, ms in off.items()}
        bounds = {split: SAFETY * tolerance * _span(loss) for split, loss in plane.losses.items()}
        if all((off[split]["loss"] <= bound).all() for split, bound in bounds.items()):  # NaN, a gap missed, is not
            break
    values = {
        split: {m: np.where(plane.done, grid, guess[split][m]) for m, grid in measures.items()}
        for split, measures in plane.values.items()
    }
    known = np.ones_like(plane.done)
    return replace(plane, values=values, done=known, interpolated=~plane.done, error=error)


def _sweep(plane: Plane, evaluate: Callable[[Mask], bool], threshold: float) -> Guess | None:
    """One way from the coarsest mesh to the grid: values where evaluated, else predictions; None if interrupted."""
    meshes = _meshes(*plane.done.shape)
    flagged = np.zeros_like(plane.done)
    flagged[meshes[0]] = True
    side = 2 * REACH + 1
    if not evaluate(flagged & ~plane.done):
        return None
    guess: Guess = {s: {m: grid.copy() for m, grid in measures.items()} for s, measures in plane.values.items()}
    for coarse, fine in pairwise(meshes):
        predicted = {
            split: {m: _predict(plane, grid[coarse], coarse, fine, m, plane.values[split][m]) for m, grid in ms.items()}
            for split, ms in guess.items()
        }
        wanted = np.zeros_like(plane.done)
        wanted[fine] = sliding_window_view(np.pad(flagged[fine], REACH), (side, side)).any((2, 3))
        for grids in predicted.values():
            for grid in grids.values():
                wanted[fine] |= np.isnan(grid)
        if not evaluate(wanted & ~plane.done):
            return None
        known, detail = plane.done[fine], np.zeros(plane.done[fine].shape)
        for split, measures in plane.values.items():
            for measure, grid in measures.items():
                guess[split][measure][fine] = np.where(known, grid[fine], predicted[split][measure])
            off = np.abs(predicted[split]["loss"] - measures["loss"][fine]) / max(_span(measures["loss"]), 1e-30)
            detail = np.maximum(detail, np.where(known, np.nan_to_num(off, nan=np.inf), 0.0))
        flagged[:] = False
        flagged[fine] = detail > threshold
    return guess


def _meshes(rows: int, columns: int) -> list[tuple[Any, ...]]:
    """Index pairs, as `np.ix_` makes them, of the nodes of every mesh, from coarse to fine; both ends are on each."""
    step = 1
    while (min(rows, columns) - 1) // (2 * step) >= COARSEST:
        step *= 2
    meshes = []
    while step:
        meshes.append(np.ix_(*(np.unique([*range(0, count, step), count - 1]) for count in (rows, columns))))
        step //= 2
    return meshes


def _predict(
    plane: Plane, values: Values, coarse: tuple[Any, ...], fine: tuple[Any, ...], measure: str, known: Values
) -> Values:
    """Values on the fine mesh by interpolation between those on the coarse one; NaN where one that is not finite is needed.

    Losses, where all are positive, are interpolated as logarithms: they span orders of magnitude.
    """
    order = ORDER if measure == "loss" else 2
    rows, columns = (
        _interpolation(nodes[c.ravel()], nodes[f.ravel()], order)
        for nodes, c, f in zip((plane.y, plane.x), coarse, fine, strict=True)
    )
    logarithms = measure == "loss" and np.nanmin(np.where(plane.done, known, np.nan), initial=np.inf) > 0.0
    bad = ~np.isfinite(values)
    filled = np.where(bad, 1.0, values)
    result = rows @ (np.log(filled) if logarithms else filled) @ columns.T
    needs_bad = (rows != 0.0).astype(float) @ bad @ (columns != 0.0).T > 0.0
    return np.where(needs_bad, np.nan, np.exp(result) if logarithms else result)


def _interpolation(nodes: Values, at: Values, order: int) -> Values:
    """The matrix (A, N) that takes values at N ascending nodes to those of the polynomial through the `order` nodes
    around each place; exactly 1 and 0 at the nodes themselves."""
    order = min(order, len(nodes))
    matrix = np.zeros((len(at), len(nodes)))
    for row, place in enumerate(at):
        start = min(max(int(np.searchsorted(nodes, place)) - order // 2, 0), len(nodes) - order)
        near = nodes[start : start + order]
        for i, node in enumerate(near):
            others = np.delete(near, i)
            matrix[row, start + i] = np.prod((place - others) / (node - others))
    return matrix


def _span(values: Values) -> float:
    """Largest minus smallest of the finite values."""
    finite = values[np.isfinite(values)]
    return float(finite.max() - finite.min()) if len(finite) else 0.0


def _draw(candidates: Mask, random: np.random.Generator) -> Mask:
    """Up to `HELD_OUT` of the points in a mask."""
    chosen = np.zeros_like(candidates)
    where = np.flatnonzero(candidates)
    chosen.flat[random.choice(where, min(HELD_OUT, len(where)), replace=False)] = True
    return chosen


@dataclass(frozen=True)
class Layout:
    """The places of the points of a plane.

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


def survey(
    evaluation: Evaluation, layout: Layout, tolerance: float | None, resume: Plane | None, executor: Any = None
) -> Plane:
    """The plane, with as many points as an interrupt left time for.

    Raises:
        InputError: an unusable tolerance, or `resume` is another plane.
    """
    if tolerance is not None and not 0.0 < tolerance < 1.0:
        raise InputError(f"tolerance={tolerance}; expected a share of the range of losses in (0, 1), or None")
    own = list(evaluation.evaluator(evaluation.states[-len(layout.places) :]))
    plane = _blank(evaluation, layout, own)
    if resume is not None:
        points = all(np.array_equal(p, q) for p, q in ((plane.x, resume.x), (plane.y, resume.y)))
        take_over(plane, resume, resume.evaluated, points, "a plane")
    if evaluation.prepare is None:  # the models are their own points
        for (x, y), score in zip(layout.places.values(), own, strict=True):
            _note(plane, int(np.flatnonzero(layout.y == y)[0]), int(np.flatnonzero(layout.x == x)[0]), score)

    def place(i: int) -> tuple[float, float]:
        row, column = divmod(i, len(layout.x))
        return layout.frame.inside(float(layout.x[column]), float(layout.y[row]))

    places = [place(i) for i in range(plane.done.size)]
    most = "" if tolerance is None else "at most "
    with scoring(evaluation, layout.frame.span, places, executor) as score:
        if isinstance(score, Workers):
            evaluation.tell("plane", int((~plane.done).sum()), score.seconds_each, most)
        with tqdm(total=0, desc="plane", unit="point", disable=not evaluation.progress) as bar:
            if tolerance is not None:
                return refine(plane, lambda mask: _evaluate(plane, score, mask, bar), tolerance)
            _evaluate(plane, score, ~plane.done, bar)
    return plane


def _evaluate(plane: Plane, scored: Scoring, wanted: Mask, bar: tqdm) -> bool:
    """Evaluate the points of a mask, from coarse to fine; False, and a warning, when an interrupt came first, or
    an executor lost its workers."""
    order = [i for i in coarse_to_fine(*wanted.shape) if wanted.flat[i]]
    bar.total += len(order)
    try:
        for i, score in scored(order):
            _note(plane, *divmod(i, wanted.shape[1]), score)
            bar.update()
    except (KeyboardInterrupt, WorkerError) as error:
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        count = int(plane.done[wanted].sum())
        warn(f"{why}: {count} of {len(order)} points were evaluated, the others are NaN")
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
