"""Loss and accuracy on the straight line between two networks, and the barrier on it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lmc.core.codec import UNSAVED
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.landscape.evaluation.live import Bench, Live
from lmc.landscape.evaluation.measured import Measured
from lmc.landscape.evaluation.points import REPAIRS, preparation, renormalizer, run
from lmc.landscape.evaluation.predictions import Predictions, collect
from lmc.landscape.evaluation.scores import Score
from lmc.landscape.paths.barriers import Barrier, Baseline, barrier
from lmc.network.batches import Split
from lmc.network.network import pick_device
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import ModelOrWeights, Weights, agreeing, mean

if TYPE_CHECKING:
    import pandas as pd


Values = npt.NDArray[np.float64]
Repair: TypeAlias = Literal["auto", "repair", "closed_form"] | None


@dataclass(frozen=True, eq=False)
class Path(Measured, Result):
    """Losses and accuracies on the way from a (alpha = 0) to b (alpha = 1).

    Attributes:
        alphas: (P,) ascending, 0 and 1 among them.
        values: split -> measure -> (P,): "loss" (nats), "accuracy" (a fraction) and any further metric; NaN at points
            that an interrupt left out.
        own: split -> measure -> the values of a and of b as they were given. With batch statistics re-estimated they may
            differ from the ends of the curve, where the statistics are re-estimated as everywhere; otherwise they agree.
        recalibrated: batch statistics were re-estimated at every point.
        predictions: what the networks predict, for `explore`; None for anything but a classification.
        repaired: "repair" or "closed_form" where the statistics of all layers were repaired between the ends.
        exact: evaluates any other point, `exact(alpha)[split].loss`; it keeps the networks and data alive. None for a
            path that was read from a file.
    """

    alphas: Values
    values: dict[str, dict[str, Values]]
    own: dict[str, dict[str, tuple[float, float]]]
    recalibrated: bool = False
    predictions: Predictions | None = field(default=None, repr=False)
    repaired: str | None = None
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
        """The barrier of "loss", "error" (100 - accuracy in percent) or a metric that is lower when better."""
        split = self.split if split is None else split
        if split not in self.values:
            raise InputError(f"split={split!r}; this path has {', '.join(self.values)}")
        measures = self.values[split]
        name = "accuracy" if measure == "error" else measure
        if name not in measures:
            raise InputError(f"measure={measure!r}; {split} has {', '.join(measures)}")
        heights = 100.0 * (1.0 - measures[name]) if measure == "error" else measures[name]
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
            if np.isnan(ends).any():
                lines.append(f"  {split}: loss {ends[0]:.3f} to {ends[1]:.3f}, no barrier: an end is not a number")
                continue
            loss = self.barrier_of("loss", split)
            text = f"  {split}: loss {loss.start:.3f} to {loss.end:.3f}, barrier {loss.value:.3f} at alpha {loss.alpha:.3g}"
            if split in self.accuracies:
                error = self.barrier_of("error", split)
                text += f"; error {error.start:.1f} % to {error.end:.1f} %, barrier {error.value:.1f} points"
            lines.append(text)
        return "\n".join(lines)

    __repr__ = __str__


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
        inputs: inputs to estimate all these from (default: 2048 evenly spaced inputs of the train split, or
            of the only one; labels are not used).
        loss, metrics, outputs, batch_size, device: as for `lmc.landscape.evaluate`.
        progress: show a bar when it takes more than about two seconds.

    Raises:
        MismatchError: a, b and the model are not of one architecture, dtype and device.
        WeightsError: weights that are not finite. DataError: unusable data. InputError: an unusable argument.
    """
    a, b = agreeing([a, b], "ab", model=model)
    return mixture_path(
        model,
        (a, b),
        lambda alpha: (1.0 - alpha, alpha),
        data,
        alphas,
        repair=repair,
        inputs=inputs,
        loss=loss,
        metrics=metrics,
        outputs=outputs,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )


def mixture_path(
    model: nn.Module,
    controls: Sequence[Weights],
    shares: Callable[[float], Sequence[float]],
    data: Any,
    alphas: int | Sequence[float],
    *,
    repair: Repair,
    inputs: Any,
    loss: Loss | Task | None,
    metrics: Mapping[str, Loss] | None,
    outputs: Outputs,
    batch_size: int | None,
    device: torch.device | str | None,
    progress: bool,
) -> Path:
    """The path from the first of `controls` to the last on which each has the share `shares(alpha)`; see `loss_path`."""
    grid = _grid(alphas)
    if repair is not None and repair != "auto" and repair not in REPAIRS:
        raise InputError(f'repair={repair!r}; expected "auto", "repair", "closed_form" or None')

    def bench() -> Bench:
        evaluator = Evaluator(
            model,
            data,
            loss=loss,
            metrics=metrics,
            outputs=outputs,
            batch_size=batch_size,
            device=pick_device(device, controls[0]),
            predictions=True,
        )
        evaluator.network.check(controls[0], "a")
        moved = [{name: tensor.to(evaluator.device) for name, tensor in weights.items()} for weights in controls]
        if repair in REPAIRS:
            average = renormalizer(evaluator, moved, repair, inputs, progress)
            return evaluator, None, lambda alpha: average(shares(alpha))
        prepare = preparation(evaluator, repair, inputs, stacklevel=5)
        return evaluator, prepare, lambda alpha: mean(moved, shares(alpha))

    evaluator, prepare, state_at = bench()
    own = list(evaluator([controls[0], controls[-1]])) if prepare is not None else None
    order = _coarse_to_fine(grid)
    points = (state_at(float(grid[i])) for i in order)
    states = points if prepare is None else (prepare(state) for state in points)
    scores = run(evaluator, states, order, "path", progress, fewest=2)
    path = _assemble(grid, [scores.get(i) for i in range(len(grid))], own, evaluator.splits)
    return replace(path, repaired=repair if repair in REPAIRS else None, exact=Live(bench, controls))


def _assemble(
    grid: Values,
    scores: list[dict[str, Score] | None],
    own: list[dict[str, Score]] | None,
    splits: list[Split],
) -> Path:
    ends = own or [found for alpha, found in zip(grid, scores, strict=True) if alpha in (0.0, 1.0) and found]
    values: dict[str, dict[str, Values]] = {}
    for split in splits:
        values[split.name] = {}
        for measure in ends[0][split.name].values:
            curve = [math.nan if score is None else score[split.name].values[measure] for score in scores]
            values[split.name][measure] = np.array(curve, dtype=np.float64)
    kept = {
        name: {measure: (ends[0][name].values[measure], ends[1][name].values[measure]) for measure in measures}
        for name, measures in values.items()
    }
    shown = splits[-1]
    predicted: list[Tensor | None] = [None if score is None else score[shown.name].predictions for score in scores]
    return Path(grid, values, kept, own is not None, collect(shown, predicted))


def _grid(alphas: int | Sequence[float]) -> Values:
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
