"""The measure of weights on validation data, and the renewal of statistics before it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lmc.errors import InputError, WeightsError
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.merge.with_data.examples import chosen
from lmc.network.batchnorm import Recalibrator
from lmc.network.network import Network, pick_device
from lmc.network.task import Loss, Task
from lmc.weights import Weights, check_finite


class Judge:
    """The measure of weights on validation data, `judge(weights)`, and which of two values is better.

    Args:
        model: the architecture.
        validation: labelled data as for `lmc.loss_path` (of a data set `.validation`, or its `.train`; never its
            `.test`), or a function from weights to a score, larger being better (smaller with `metric="loss"`).
        metric: "accuracy", "loss" or a metric of the task (default: the accuracy where targets are classes, else the
            loss).
        loss: how outputs are judged, as for `lmc.loss_path`.
        inputs: unlabelled; BatchNorm statistics of merged weights are re-estimated from them.
        device: where to evaluate (default: where the weights are).
        models: the weights that are merged. One of them that comes back unmerged keeps its own statistics, so that it
            has one score.

    Attributes:
        measure: the name of the measure; of a default known after the first call.
        higher: whether larger values are better; likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        validation: Any,
        metric: str | None = None,
        *,
        loss: Loss | Task | None = None,
        inputs: Any = None,
        device: torch.device | str | None = None,
        models: Sequence[Weights],
    ) -> None:
        where = pick_device(device, models[0])
        self.measure = metric
        self.higher = metric != "loss"
        self._unmerged = models
        self._recalibrate = None if inputs is None else Recalibrator(Network(model, where), inputs)
        self._function: Callable[[Weights], Any] | None = None
        if callable(validation):
            self._function = validation
            self.measure = metric or "score"
            return
        self._evaluator = Evaluator(model, chosen(validation), loss=loss, at_once=1, device=where)

    def __call__(self, weights: Weights) -> float:
        """The measure of weights, as it is: an accuracy as a share, a loss in its unit."""
        if self._function is not None:
            return float(self._function(weights))
        values = next(self._evaluator([weights]))["data"].values
        if self.measure is None:
            self.measure = "accuracy" if "accuracy" in values else "loss"
        if self.measure not in values:
            raise InputError(f"metric={self.measure!r}: the data have {', '.join(values)}; give one of these")
        self.higher = self.measure in self._evaluator.task.higher
        return values[self.measure]

    @property
    def unit(self) -> str:
        """The unit of the loss, empty for other measures."""
        return self._evaluator.task.unit if self.measure == "loss" and self._function is None else ""

    def gain(self, value: float) -> float:
        """The value, or its negative, so that larger is better; minus infinity where it is not finite."""
        if not math.isfinite(value):
            return -math.inf
        return value if self.higher else -value

    def renew(self, weights: Weights) -> Weights:
        """Merged weights with statistics of their own; unmerged ones as they are."""
        if self._recalibrate is None or any(_equal(weights, model) for model in self._unmerged):
            return weights
        return self._recalibrate(weights)


def finite(state: Weights) -> str:
    """Empty if all weights are finite, else what is not."""
    try:
        check_finite(state)
    except WeightsError as error:
        return str(error)
    return ""


def _equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())
