"""Loss, accuracy and further measures of a network's outputs, added up over batches."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lmc.errors import DataError, InputError

# (outputs, targets) of a batch -> one value for each example along axis 0, or their mean.
Measure = Callable[[Tensor, Tensor], Tensor]

FEW_CLASSES = 32
IGNORED = -100  # target of positions that do not count, the convention of torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Score:
    """What one weight set scores on one split.

    Attributes:
        values: mean over the examples of "loss" (cross-entropy in nats unless a loss was given), "accuracy" (a fraction;
            where targets are classes) and every metric given.
        count: number of targets that counted.
        predictions: (N,) int64 on the CPU, the most probable class of each example, where they were asked for.
    """

    values: dict[str, float]
    count: int
    predictions: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def loss(self) -> float:
        return self.values["loss"]

    @property
    def accuracy(self) -> float:
        """A fraction; NaN where targets are no classes."""
        return self.values.get("accuracy", math.nan)


class Tally:
    """Adds up the measures of K weight sets over the batches of one split."""

    def __init__(self, split: str, measures: Mapping[str, Measure], predictions: bool) -> None:
        self.split = split
        self.measures = measures
        self.predictions = predictions
        self._sums: dict[str, list[Tensor]] = {}
        self._predicted: list[Tensor] = []
        self._targets = self._examples = 0

    def add(self, outputs: Tensor, targets: Tensor, counted: int) -> None:
        """One batch: outputs (K, N, ...), targets (N, ...) on the same device, of which `counted` are not ignored."""
        logits = class_last(outputs, targets)
        if logits is not None:
            self._classify(logits, targets, counted == targets.numel())
        elif "loss" not in self.measures:
            raise DataError(
                f"{self.split}: outputs {tuple(outputs.shape[1:])} and targets {targets.dtype} {tuple(targets.shape)} "
                "are no classification; expected integer targets (N,) for outputs (N, C), or (N, T) for (N, T, C). "
                "For anything else pass loss="
            )
        for name, measure in self.measures.items():
            self._append(name, torch.stack([_total(measure, name, output, targets) for output in outputs]))
        self._targets += counted
        self._examples += len(targets)

    def _classify(self, logits: Tensor, targets: Tensor, all_count: bool) -> None:
        """Accuracy and cross-entropy of logits (K, targets, C)."""
        flat = targets.reshape(-1)
        best, predictions = logits.max(-1)
        self._append("accuracy", (predictions == flat).sum(1))
        if self.predictions and targets.ndim == 1:
            self._predicted.append(predictions)
        if "loss" not in self.measures:
            self._append("loss", _cross_entropy(logits, flat.long(), best, all_count))

    def _append(self, name: str, sums: Tensor) -> None:
        self._sums.setdefault(name, []).append(sums)

    def scores(self) -> list[Score]:
        """The score of each of the K weight sets."""
        if self._targets == 0:
            raise DataError(f"{self.split}: no target counts; every one is {IGNORED}")
        means = {}
        for name in sorted(self._sums, key=["loss", "accuracy", *self.measures].index):
            parts = self._sums[name]
            batches = [parts[0].tolist()] if len(parts) == 1 else torch.stack(parts).tolist()
            count = self._examples if name in self.measures else self._targets
            means[name] = [math.fsum(sums) / count for sums in zip(*batches, strict=True)]
        predictions = torch.cat(self._predicted, dim=1).cpu() if self._predicted else None
        return [
            Score(
                {name: mean[k] for name, mean in means.items()},
                self._targets,
                None if predictions is None else predictions[k],
            )
            for k in range(len(next(iter(means.values()))))
        ]


def class_last(outputs: Tensor, targets: Tensor) -> Tensor | None:
    """Outputs (K, N, ..., C) or (K, N, C, ...) as logits (K, targets, C) where the targets are classes, else None."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        return None
    shape = outputs.shape[1:]
    if len(shape) != targets.ndim + 1:
        return None
    if shape[:-1] != targets.shape:
        if shape[:1] + shape[2:] != targets.shape:
            return None
        outputs = outputs.movedim(2, -1)
    return outputs.reshape(len(outputs), targets.numel(), outputs.shape[-1])


def check_classes(targets: Tensor, classes: int, split: str) -> None:
    """Raise `DataError` for a target that is no class: on a GPU it would end the whole process."""
    counted = targets[targets != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        raise DataError(
            f"{split}: targets from {int(counted.min())} to {int(counted.max())}, but the model has {classes} classes "
            f"(0 to {classes - 1})"
        )


def _cross_entropy(logits: Tensor, targets: Tensor, best: Tensor, all_count: bool) -> Tensor:
    """Sums (K,) of the cross-entropy of logits (K, N, C), their maxima `best` (K, N) and targets (N,)."""
    if logits.device.type == "cpu" and logits.shape[-1] <= FEW_CLASSES and all_count:
        logits, best = logits.float(), best.float()
        right = logits.gather(2, targets.expand(len(logits), -1)[..., None])[..., 0]
        # log sum exp(z - max z) + max z - z[target]: as exact as log_softmax, and several times faster for few classes.
        return ((logits - best[..., None]).exp_().sum(2).log_() + (best - right)).sum(1)
    rows, goals = logits.float().reshape(-1, logits.shape[-1]), targets.expand(len(logits), -1).reshape(-1)
    return F.cross_entropy(rows, goals, reduction="none", ignore_index=IGNORED).reshape(len(logits), -1).sum(1)


def _total(measure: Measure, name: str, output: Tensor, targets: Tensor) -> Tensor:
    """The sum of a measure over the examples of a batch, from its mean or its value for each example."""
    value = torch.as_tensor(measure(output, targets), device=output.device)
    if value.ndim > 0 and len(value) == len(targets):
        return value.float().reshape(len(targets), -1).mean(1).sum()
    if value.numel() != 1:
        raise InputError(
            f"{name} returned shape {tuple(value.shape)}; expected one value, or one for each of {len(targets)} examples"
        )
    return value.float().reshape(()) * len(targets)
