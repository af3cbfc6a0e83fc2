"""Averages along one training run, judged at every checkpoint: SWA, LAWA and EMA beside the checkpoints themselves."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluation import Evaluation
from lmc.merge.rules.averaging import ema, lawa, swa
from lmc.weights import ModelOrWeights, Weights

if TYPE_CHECKING:
    import pandas as pd

AVERAGES = ("checkpoint", "SWA", "LAWA", "EMA")


@dataclass(frozen=True, eq=False)
class TrajectoryAverages(Result):
    """Scores, at each checkpoint of a run, of averages of the checkpoints so far.

    Attributes:
        steps: (T,) what the checkpoints are called: epochs, or 0, 1, ...
        values: "checkpoint", "SWA", "LAWA", "EMA" -> split -> measure -> (T,); NaN where an interrupt came first.
        last: the same names -> weights at the last checkpoint.
        window, decay: of LAWA and of EMA. start: the place of the checkpoint at which SWA begins.
        unit: of the loss.
    """

    steps: npt.NDArray[np.float64]
    values: dict[str, dict[str, dict[str, npt.NDArray[np.float64]]]]
    last: dict[str, Weights]
    window: int
    decay: float
    start: int
    unit: str = "nats"

    @property
    def split(self) -> str:
        """The split that is shown unless another is named: "test" where there is one."""
        splits = self.values["checkpoint"]
        return "test" if "test" in splits else next(iter(splits))

    def to_frame(self) -> "pd.DataFrame":
        """A row for each average, split and checkpoint."""
        pd = require("pandas")

        frames = [
            pd.DataFrame({"average": name, "split": split, "step": self.steps, **measures})
            for name, splits in self.values.items()
            for split, measures in splits.items()
        ]
        return pd.concat(frames, ignore_index=True)

    def __str__(self) -> str:
        lines = [
            f"{len(self.steps)} checkpoints; LAWA of {self.window}, EMA with {self.decay}, SWA from {self.start} on"
        ]
        for name, splits in self.values.items():
            found = [f"{split} loss {measures['loss'][-1]:.4f}" for split, measures in splits.items()]
            lines.append(f"  {name} at the end: {', '.join(found)}")
        return "\n".join(lines)

    __repr__ = __str__


@own_context
def trajectory_averages(
    model: nn.Module,
    trajectory: Sequence[ModelOrWeights],
    data: Any,
    *,
    steps: Sequence[float] | None = None,
    start: int = 0,
    window: int = 6,
    decay: float = 0.9,
    inputs: Any = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> TrajectoryAverages:
    """Evaluate every checkpoint of a run and the averages of those up to it, as they would be used during training.

    SWA is the mean of all from `start` on (Izmailov et al. 2018, 1803.05407), LAWA that of the `window` latest (Kaddour
    2022, 2209.14981), EMA decays by `decay` a checkpoint. Before `start` SWA is the checkpoint itself. BatchNorm
    statistics are re-estimated from `inputs` (default: the first split) for every point.

    Args:
        model: the architecture.
        trajectory: checkpoints in the order of training.
        data: as for `lmc.loss_path`.
        steps: what they are called on the axis (default: 0, 1, ...).

    Raises:
        InputError: an unusable argument.
        MismatchError: checkpoints of different architectures.
        WeightsError: a checkpoint that is not finite.
        DataError: unusable data.
    """
    count = len(trajectory)
    if not count:
        raise InputError("trajectory: expected at least one checkpoint")
    axis = np.arange(count, dtype=np.float64) if steps is None else np.asarray(steps, dtype=np.float64)
    if axis.shape != (count,):
        raise InputError(f"steps: expected {count} numbers, one for each checkpoint, got shape {axis.shape}")
    if not 0 <= start < count:
        raise InputError(f"start={start}; expected the place of a checkpoint, 0 to {count - 1}")
    names = [f"trajectory[{i}]" for i in range(count)]
    evaluation = Evaluation(model, trajectory, data, names=names, inputs=inputs, device=device, progress=progress)
    states = evaluation.states

    def at(name: str, t: int) -> Weights:
        so_far = states[: t + 1]
        made = {
            "checkpoint": lambda: so_far[-1],
            "SWA": lambda: swa(states[start : t + 1] or so_far[-1:]),
            "LAWA": lambda: lawa(so_far, window=window),
            "EMA": lambda: ema(so_far, decay=decay),
        }[name]()
        return evaluation.ready(made)

    places = [(name, t) for name in AVERAGES for t in range(len(states))]
    points: Iterable[Weights] = (at(name, t) for name, t in places)
    found = evaluation.run(points, range(len(places)), "averages")
    splits = {split: list(score.values) for split, score in found[0].items()}
    values = {
        name: {split: {m: np.full(len(states), math.nan) for m in measures} for split, measures in splits.items()}
        for name in AVERAGES
    }
    for i, scores in found.items():
        name, t = places[i]
        for split, score in scores.items():
            for measure, value in score.values.items():
                values[name][split][measure][t] = value
    last = {name: at(name, len(states) - 1) for name in AVERAGES}
    return TrajectoryAverages(axis, values, last, window, decay, start, evaluation.evaluator.task.unit)
