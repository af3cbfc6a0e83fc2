"""Loss, accuracy and further measures of a network's outputs, added up over batches."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmc.core.context import warn
from lmc.errors import DataError
from lmc.network.batches import take
from lmc.network.task import Loss, Task, class_last, class_weights, measured, no_classes, own_loss
from lmc.weights.state import wide

FEW_CLASSES = 32
PROBED = 8  # examples on which it is checked that the mean of a batch is that of its halves


@dataclass(frozen=True)
class Score:
    """The scores of one weight set on one split.

    Attributes:
        values: mean over the examples, or over the targets that count, of "loss" (cross-entropy in nats unless a loss was
            given), "accuracy" (a fraction; where targets are classes) and every metric given.
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


# How much the mean over a batch counts among those of other batches.
Weighing = Callable[[Tensor], float]


@dataclass(frozen=True)
class Judging:
    """The measures that are taken of the outputs of one split.

    Attributes:
        split: its name.
        task: what is measured.
        classes: accuracy is computed, and cross-entropy where no loss was given.
        at_once: measures of the caller's own are called on all the examples of the split together.
        weighings: for such a measure the weights of batch means, where batches are measured one by one; None for a sum.
    """

    split: str
    task: Task
    classes: bool
    at_once: bool
    weighings: Mapping[str, Weighing | None] = field(default_factory=dict)

    @property
    def measures(self) -> dict[str, Loss]:
        """The measures that are not computed here, the module's own loss among them."""
        return measures_of(self.task)


def measures_of(task: Task) -> dict[str, Loss]:
    """The measures that a task names, by name."""
    loss = (lambda outputs, _targets: own_loss(outputs)) if task.labels is not None else task.loss
    return {**({} if loss is None else {"loss": loss}), **task.metrics}


class Tally:
    """Adds up the measures of K weight sets over the batches of one split."""

    def __init__(self, judging: Judging, predictions: bool) -> None:
        self.judging = judging
        self.predictions = predictions
        self._measures = judging.measures
        self._sums: dict[str, list[Tensor]] = {}
        self._weights: dict[str, float] = {}
        self._stored: list[tuple[Sequence[Any] | Tensor, Any, Tensor]] = []
        self._predicted: list[Tensor] = []
        self._counted = 0

    def add(self, outputs: Sequence[Any] | Tensor, inputs: Any, targets: Tensor, counted: int) -> None:
        """One batch: outputs (K, N, ...), or K results of any form, and targets (N, ...) on the same device, of which
        `counted` are not ignored."""
        if self.judging.classes:
            self._classify(outputs, targets, counted == targets.numel())
        if self._measures:
            if self.judging.at_once:
                self._stored.append((outputs, inputs, targets))
            else:
                self._measure(outputs, inputs, targets)
        self._counted += counted

    def _classify(self, outputs: Sequence[Any] | Tensor, targets: Tensor, all_count: bool) -> None:
        """Accuracy and cross-entropy."""
        task = self.judging.task
        logits = self._logits(outputs, targets)
        flat = targets.reshape(-1)
        best, predictions = logits.max(-1)
        right = predictions == flat
        self._append("accuracy", (right if all_count else right & (flat != task.ignore)).sum(1), 0)
        if self.predictions and targets.ndim == 1:
            self._predicted.append(predictions)
        if "loss" not in self._measures:
            self._append("loss", _cross_entropy(logits, flat.long(), best, all_count, task.ignore), 0)

    def _logits(self, outputs: Sequence[Any] | Tensor, targets: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            logits = class_last(outputs, targets, self.judging.task.axis)
        else:
            rows = [self.judging.task.logits(output, targets) for output in outputs]
            logits = None if any(row is None for row in rows) else torch.stack([row for row in rows if row is not None])
        if logits is None:
            raise no_classes(outputs[0], targets, self.judging.split)
        return logits

    def _measure(self, outputs: Sequence[Any] | Tensor, inputs: Any, targets: Tensor, *, alone: bool = False) -> None:
        """The caller's own measures on some examples, `alone` where they are all there are."""
        for name, measure in self._measures.items():
            sums, weight = [], 0.0
            for output in outputs:
                total, weight = _total(measure, name, output, targets, inputs, self.judging, alone)
                sums.append(total)
            self._append(name, torch.stack(sums), weight)

    def _append(self, name: str, sums: Tensor, weight: float) -> None:
        self._sums.setdefault(name, []).append(sums)
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def _measure_stored(self) -> None:
        """Measure what was put aside, at once, or batch by batch where it cannot be joined."""
        stored, self._stored = self._stored, []
        if len(stored) == 1:
            self._measure(*stored[0], alone=True)
            return
        try:
            each = [joined([outputs[k] for outputs, _, _ in stored]) for k in range(len(stored[0][0]))]
            inputs, targets = joined([inputs for _, inputs, _ in stored]), torch.cat([goal for _, _, goal in stored])
        except (RuntimeError, TypeError):  # sequences of several lengths, or a number for each batch
            for batch in stored:
                self._measure(*batch)
        else:
            self._measure(each, inputs, targets, alone=True)

    def scores(self) -> list[Score]:
        """The score of each of the K weight sets.

        Raises:
            DataError: no target counts.
        """
        if self._counted == 0:
            raise DataError(f"{self.judging.split}: no target counts; every one is {self.judging.task.ignore}")
        if self._stored:
            self._measure_stored()
        means = {}
        task = self.judging.task
        names = sorted(self._sums, key=["loss", "accuracy", *self._measures].index)
        sums = [part for name in names for part in self._sums[name]]
        rows = iter(torch.stack([part.to(sums[0].device) for part in sums]).tolist())  # one wait for all measures
        for name in names:
            batches = [next(rows) for _ in self._sums[name]]
            count = self._weights[name] if name in self._measures else self._counted
            count = 1.0 if self.judging.weighings.get(name, len) is None else count
            means[name] = [math.fsum(sums) / count if count else math.nan for sums in zip(*batches, strict=True)]
        means |= {name: [function(x) for x in means["loss"]] for name, function in task.derived.items()}
        predictions = torch.cat(self._predicted, dim=1).cpu() if self._predicted else None
        return [
            Score(
                {name: mean[k] for name, mean in means.items()},
                self._counted,
                None if predictions is None else predictions[k],
            )
            for k in range(len(next(iter(means.values()))))
        ]


def joined(parts: Sequence[Any]) -> Any:
    """Outputs or inputs of several batches as those of one: tensors one behind the other along axis 0."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        whole: Any = copy.copy(first)
        for name in first:
            whole[name] = joined([part[name] for part in parts])
        return whole
    if isinstance(first, tuple | list):
        columns = [joined(column) for column in zip(*parts, strict=True)]
        return type(first)(*columns) if hasattr(first, "_fields") else type(first)(columns)
    if hasattr(first, "__dict__"):
        whole = copy.copy(first)
        vars(whole).update({name: joined([vars(part)[name] for part in parts]) for name in vars(first)})
        return whole
    return first


def weighing(
    task: Task, name: str, value_of: Callable[[Any, Tensor], Tensor], call: Any, targets: Tensor, split: str
) -> Weighing | None:
    """The weight of the mean over a batch, found by the weights that make a batch of its halves.

    Tried are the targets that count, or, where the module's own loss shifts them, those behind the first of each sequence;
    the weights of their classes; the examples; and none, for a sum. A warning says that none fits: the value then depends on how the data are batched.

    Args:
        value_of: the measure `name` of some examples, from a call of the module and targets.
        call, targets: of a batch that can be cut.
    """

    def behind_the_first(goal: Tensor) -> float:
        return task.weight(goal[:, 1:])

    counting: Weighing = behind_the_first if _shifts(task, value_of, call, targets) else task.weight
    if len(targets) < 2:
        return counting
    counts = (targets != task.ignore).reshape(len(targets), -1).sum(1)
    order = counts.argsort()  # halves in which as few, and as many, targets count as possible
    few, many = order[: min(len(order) // 2, PROBED // 2)], order[len(order) - min(len(order) // 2, PROBED // 2) :]
    both = torch.cat([few, many])
    value, *halves = (float(value_of(take(call, i), targets[i]).double().mean()) for i in (both, few, many))
    candidates: list[Weighing] = [counting, len]
    if (weights := class_weights(task.loss)) is not None:
        candidates.insert(0, lambda goal: float(weights.cpu()[goal[goal != task.ignore].long().cpu()].sum()))
    for weigh in candidates:
        shares = [weigh(targets[index]) for index in (few, many)]
        total = sum(share * half for share, half in zip(shares, halves, strict=True) if share)
        if sum(shares) and math.isclose(total / sum(shares), value, rel_tol=1e-3, abs_tol=1e-6):
            return weigh
    if math.isclose(sum(halves), value, rel_tol=1e-3, abs_tol=1e-6):
        return None
    warn(
        f"{name} on {split}: its value {value:.6g} for {len(both)} examples is no mean of those for their halves, "
        f"{halves[0]:.6g} and {halves[1]:.6g}; it depends on how the data are batched. Return one value for each example, "
        "or pass a batch_size that takes them all"
    )
    return counting


def _shifts(task: Task, value_of: Callable[[Any, Tensor], Tensor], call: Any, targets: Tensor) -> bool:
    """Whether the module's own loss leaves out the first target of each sequence: it makes no difference which it is."""
    if task.labels is None or targets.ndim != 2 or targets.is_floating_point():
        return False
    others = targets.clone()
    others[:, 0] = torch.where(targets[:, 0] == task.ignore, 0, task.ignore)
    found, other = (value_of(task.relabelled(call, goal), goal) for goal in (targets, others))
    return bool(torch.isclose(found, other, rtol=1e-6).all())


def _total(
    measure: Loss, name: str, output: Any, targets: Tensor, inputs: Any, judging: Judging, alone: bool
) -> tuple[Tensor, float]:
    """The sum of a measure over a batch and the weight that it is divided by, from a mean or single values."""
    task = judging.task
    value = measured(measure, name, output, targets, inputs)
    if value.ndim == 0:
        weigh = judging.weighings.get(name, task.weight)
        weight = 1.0 if alone or weigh is None else weigh(targets)
        # The mean over a batch in which nothing counts is 0 / 0.
        return (value.double() * weight if weight else torch.zeros_like(value, dtype=torch.float64)), weight
    if value.shape == targets.shape and task.counted(targets) < targets.numel():
        counted = targets != task.ignore
        return value[counted].double().sum(), float(counted.sum())
    return value.to(wide(value.dtype)).reshape(len(targets), -1).mean(1).double().sum(), float(len(targets))


def _cross_entropy(logits: Tensor, targets: Tensor, best: Tensor, all_count: bool, ignore: int) -> Tensor:
    """Sums (K,) of the cross-entropy of logits (K, N, C), their maxima `best` (K, N) and targets (N,)."""
    if logits.device.type == "cpu" and logits.shape[-1] <= FEW_CLASSES and all_count:
        logits, best = logits.to(wide(logits.dtype)), best.to(wide(best.dtype))
        right = logits.gather(2, targets.expand(len(logits), -1)[..., None])[..., 0]
        # log sum exp(z - max z) + max z - z[target]: as exact as log_softmax, and several times faster for few classes.
        return ((logits - best[..., None]).exp_().sum(2).log_() + (best - right)).sum(1)
    rows, goals = (
        logits.to(wide(logits.dtype)).reshape(-1, logits.shape[-1]),
        targets.expand(len(logits), -1).reshape(-1),
    )
    return F.cross_entropy(rows, goals, reduction="none", ignore_index=ignore).reshape(len(logits), -1).sum(1)
