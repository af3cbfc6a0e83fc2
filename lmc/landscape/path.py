"""Straight lines between two networks: loss along the way, and the barrier, how much worse the way is than its ends."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lmc.core.codec import UNSAVED
from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluation import Evaluation, Repair
from lmc.landscape.evaluation.measured import Live, Measured, Predictions, Values, collect
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import ModelOrWeights

if TYPE_CHECKING:
    import pandas as pd

Baseline: TypeAlias = Literal["linear", "mean"]


@dataclass(frozen=True)
class Barrier:
    """The highest rise of a measure E (lower is better) above a baseline between two ends.

    Attributes:
        value: `max E(alpha) - baseline(alpha)` over the grid with both ends, in the unit of the values.
        alpha: where the maximum is attained.
        midpoint: E at the grid point nearest to 1/2.
        start, end: E(0) and E(1).
        baseline: "linear", (1 - alpha) E(0) + alpha E(1) (Entezari et al. 2022, arXiv:2110.06296, Definition 2.1), or
            "mean", (E(0) + E(1)) / 2 (Frankle et al. 2020, arXiv:1912.05671, section 2).
    """

    value: float
    alpha: float
    midpoint: float
    start: float
    end: float
    baseline: Baseline


def barrier(
    alphas: Sequence[float] | npt.NDArray[np.float64],
    values: Sequence[float] | npt.NDArray[np.float64],
    *,
    baseline: Baseline = "linear",
) -> Barrier:
    """The barrier of `values` (P,) at `alphas` (P,), which hold 0 and 1.

    Both ends belong to the grid, so with the linear baseline the barrier is never negative. Points that are NaN (not
    evaluated) are passed over; so is whatever lies outside [0, 1].

    Raises:
        InputError: lengths that differ, an unknown baseline, or ends that are missing or not finite.
    """
    grid, heights = np.asarray(alphas, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if grid.shape != heights.shape or grid.ndim != 1:
        raise InputError(f"alphas of shape {grid.shape} and values of shape {heights.shape}; expected the same (P,)")
    if baseline not in get_args(Baseline):
        raise InputError(f"baseline={baseline!r}; expected one of {', '.join(get_args(Baseline))}")
    ends = heights[np.isin(grid, (0.0, 1.0))]
    if not np.isfinite(ends).all():
        raise InputError(f"no barrier between ends of {ends.tolist()}: the values at alpha = 0 and 1 must be finite")
    inside = (grid >= 0.0) & (grid <= 1.0) & ~np.isnan(heights)
    grid, heights = grid[inside], heights[inside]
    if not {0.0, 1.0} <= set(grid.tolist()):
        raise InputError("a barrier needs the values at alpha = 0 and alpha = 1")
    start, end = float(heights[grid == 0.0][0]), float(heights[grid == 1.0][0])
    floor = (1.0 - grid) * start + grid * end if baseline == "linear" else np.full_like(grid, 0.5 * (start + end))
    rise = heights - floor
    top = int(np.argmax(rise))
    middle = int(np.argmin(np.abs(grid - 0.5)))
    return Barrier(float(rise[top]), float(grid[top]), float(heights[middle]), start, end, baseline)


@dataclass(frozen=True, eq=False)
class Path(Measured, Result):
    """Losses and accuracies on the way from a (alpha = 0) to b (alpha = 1).

    Attributes:
        alphas: (P,) ascending, 0 and 1 among them.
        values: split -> measure -> (P,): "loss", "accuracy" (a fraction) and any further metric; NaN at points that an
            interrupt left out.
        own: split -> measure -> the values of a and of b as they were given. With batch statistics re-estimated they may
            differ from the ends of the curve, where the statistics are re-estimated as everywhere; otherwise they agree.
        recalibrated: batch statistics were re-estimated at every point.
        predictions: what the networks predict, for `explore`; None for anything but a classification.
        repaired: "repair" or "closed_form" where the statistics of all layers were repaired between the ends.
        unit: of the loss.
        higher: the measures of which higher values are better.
        exact: evaluates any other point, `exact(alpha)[split].loss`; it keeps the networks and data alive. None for a
            path that was read from a file.
    """

    alphas: Values
    values: dict[str, dict[str, Values]]
    own: dict[str, dict[str, tuple[float, float]]]
    recalibrated: bool = False
    predictions: Predictions | None = field(default=None, repr=False)
    repaired: str | None = None
    unit: str = "nats"
    higher: tuple[str, ...] = ("accuracy",)
    exact: Live | None = field(default=None, repr=False, metadata=UNSAVED)

    @property
    def complete(self) -> bool:
        """No point is missing."""
        return not any(np.isnan(loss).any() for loss in self.losses.values())

    @property
    def barrier(self) -> float:
        """Loss barrier above the line between the ends, on the test split if there is one, in the loss's unit; >= 0."""
        return self.barrier_of("loss").value

    @property
    def error_barrier(self) -> float:
        """The same for the classification error, in percentage points; NaN where targets are no classes."""
        return self.barrier_of("error").value if self.split in self.accuracies else math.nan

    def barrier_of(self, measure: str, split: str | None = None, baseline: Baseline = "linear") -> Barrier:
        """The barrier of "loss", "error" (100 - accuracy in percent) or a metric; of one that is higher when better, it is
        the deepest fall below the baseline.

        Raises:
            InputError: a split or a measure that there is not, or an end that is not finite.
        """
        split = self.split if split is None else split
        if split not in self.values:
            raise InputError(f"split={split!r}; this path has {', '.join(self.values)}")
        measures = self.values[split]
        name = "accuracy" if measure == "error" else measure
        if name not in measures:
            raise InputError(f"measure={measure!r}; {split} has {', '.join(measures)}")
        heights = 100.0 * (1.0 - measures[name]) if measure == "error" else measures[name]
        if measure in self.higher:
            found = barrier(self.alphas, -heights, baseline=baseline)
            return replace(found, midpoint=-found.midpoint, start=-found.start, end=-found.end)
        return barrier(self.alphas, heights, baseline=baseline)

    def barriers(self) -> "pd.DataFrame":
        """A row for each split, measure ("loss"; "error" in percentage points) and baseline."""
        pd = require("pandas")

        rows = []
        for split, measures in self.values.items():
            for measure in ("loss", *(["error"] if "accuracy" in measures else [])):
                for baseline in ("linear", "mean"):
                    found = self.barrier_of(measure, split, baseline)
                    rows.append({"split": split, "measure": measure, "barrier": found.value, **vars(found)})
        return pd.DataFrame(rows).drop(columns="value").set_index(["split", "measure", "baseline"])

    def to_frame(self) -> "pd.DataFrame":
        """A row for each point and split: alpha, split, loss, accuracy and metrics."""
        pd = require("pandas")

        frames = [
            pd.DataFrame({"alpha": self.alphas, "split": split, **measures}) for split, measures in self.values.items()
        ]
        return pd.concat(frames, ignore_index=True)

    def __str__(self) -> str:
        missing = int(np.isnan(self.losses[self.split]).sum())
        points = f"{len(self.alphas)} points" + (
            f", {missing} without a loss (not evaluated, or not a number)" if missing else ""
        )
        how = ", batch statistics re-estimated at each" if self.recalibrated else ""
        how += f", repaired between the ends ({self.repaired!r})" if self.repaired else ""
        lines = [f"Path of {points}{how}"]
        for split in self.values:
            ends = self.losses[split][np.isin(self.alphas, (0.0, 1.0))]
            if not np.isfinite(ends).all():
                lines.append(f"  {split}: loss {ends[0]:.3f} to {ends[1]:.3f}, no barrier: an end is not finite")
                continue
            loss = self.barrier_of("loss", split)
            text = f"  {split}: loss {loss.start:.3f} to {loss.end:.3f}, barrier {loss.value:.3f} at alpha {loss.alpha:.3g}"
            if split in self.accuracies:
                error = self.barrier_of("error", split)
                text += f"; error {error.start:.1f} % to {error.end:.1f} %, barrier {error.value:.1f} points"
            lines.append(text)
        return "\n".join(lines)

    __repr__ = __str__


@own_context
def loss_path(
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    data: Any,
    *,
    alphas: int | Sequence[float] = 25,
    repair: Repair = "auto",
    inputs: Any = None,
    loss: Loss | Task | None = None,
    metrics: Mapping[str, Loss] | None = None,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Path:
    """Evaluate `(1 - alpha) a + alpha b` on every split of `data`, in eval mode; nothing of the caller's is touched.

    The points are evaluated from coarse to fine, the ends first. An interrupt returns what is done (the rest NaN, with a
    warning) once both ends are known; before that it is passed on.

    Args:
        model: the architecture.
        a, b: its weights at alpha = 0 and alpha = 1; modules or state dicts.
        data: labelled examples in any of the forms that `lmc.landscape.evaluate` takes.
        alphas: an odd number of evenly spaced points (so that 0, 1/2 and 1 are among them), or the points themselves,
            in which case 0 and 1 are added where missing. Points outside [0, 1] are evaluated but make no barrier.
        repair: "auto" re-estimates the running statistics of batch normalisation at every point, ends included, so that
            the curve has no jump; what a and b score with their own statistics is kept in `Path.own`. None leaves
            averaged statistics, with a warning. "repair" gives every layer between the ends the mean and spread that it
            has in a and b, averaged, whatever the network is normalised by (see `lmc.repair`), "closed_form" does so in
            closed form; both leave the ends as they are.
        inputs: unlabelled, to estimate all these from (default: 2048 evenly spaced ones of the train split, or of the
            only one).
        loss, metrics, outputs, batch_size, device: as for `lmc.landscape.evaluate`.
        progress: show a bar when it takes more than about two seconds.

    Raises:
        MismatchError: a, b and the model are not of one architecture, dtype and device.
        WeightsError: weights that are not finite.
        DataError: unusable data.
        InputError: an unusable argument.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> path = lmc.loss_path(model, a, b, data.test)
        >>> round(path.barrier, 1)  # nats
        1.5
    """
    evaluation = Evaluation(
        model,
        (a, b),
        data,
        names=("a", "b"),
        repair=repair,
        inputs=inputs,
        loss=loss,
        metrics=metrics,
        outputs=outputs,
        batch_size=batch_size,
        device=device,
        progress=progress,
        repairs=True,
        predictions=True,
    )
    return mixture_path(evaluation, lambda alpha: (1.0 - alpha, alpha), points_of(alphas))


def mixture_path(evaluation: Evaluation, shares: Callable[[float], Sequence[float]], alphas: Values) -> Path:
    """The path from the first to the last model of an evaluation on which each has the share `shares(alpha)`."""
    prepared = evaluation.prepare is not None
    own = list(evaluation.evaluator([evaluation.states[0], evaluation.states[-1]])) if prepared else None
    order = _coarse_to_fine(alphas)
    points = (evaluation.mixed(shares(float(alphas[i]))) for i in order)
    found = evaluation.run(points, order, "path", fewest=2)
    scores = [found.get(i) for i in range(len(alphas))]
    ends = own or [found[i] for i in order[:2]]
    values: dict[str, dict[str, Values]] = {}
    for split, first in ends[0].items():
        curves = {m: [math.nan if s is None else s[split].values[m] for s in scores] for m in first.values}
        values[split] = {measure: np.array(curve, dtype=np.float64) for measure, curve in curves.items()}
    kept = {
        split: {measure: (ends[0][split].values[measure], ends[1][split].values[measure]) for measure in measures}
        for split, measures in values.items()
    }
    shown = evaluation.evaluator.splits[-1]
    predicted: list[Tensor | None] = [None if score is None else score[shown.name].predictions for score in scores]
    return Path(
        alphas,
        values,
        kept,
        evaluation.recalibrated,
        collect(shown, predicted),
        evaluation.repaired,
        evaluation.evaluator.task.unit,
        tuple(evaluation.evaluator.task.higher),
        Live(evaluation, lambda evaluation, alpha: evaluation.mixed(shares(alpha))),
    )


def points_of(alphas: int | Sequence[float]) -> Values:
    """The points that `alphas` of `loss_path` stand for, ascending."""
    if isinstance(alphas, int):
        if alphas < 3 or alphas % 2 == 0:
            raise InputError(
                f"alphas={alphas}; expected an odd number of points, at least 3, so that 0, 1/2 and 1 are among them: "
                f"pass {max(3, alphas + 1)}, or the points themselves"
            )
        return np.linspace(0.0, 1.0, alphas)
    points = np.asarray(alphas, dtype=np.float64)
    if points.ndim != 1 or len(points) == 0 or not np.isfinite(points).all():
        raise InputError(f"alphas: expected finite numbers (P,), got shape {points.shape}: {alphas}")
    return np.unique(np.concatenate([points, [0.0, 1.0]]))


def _coarse_to_fine(grid: Values) -> list[int]:
    """The indices of the grid: alpha 0 and 1, then the middle of every stretch, again and again."""
    order = [int(np.flatnonzero(grid == end)[0]) for end in (0.0, 1.0)]
    stretches = [(order[0], order[1]), (-1, order[0]), (order[1], len(grid))]
    for low, high in stretches:
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            stretches += [(low, middle), (middle, high)]
    return order
