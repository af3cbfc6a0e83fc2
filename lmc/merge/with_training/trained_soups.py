"""Recipes that train their ingredients: many runs from one start (DiWA), from starts that other tasks gave (ratatouille), or
with soft labels, so that the tuned model does not dominate its average with the base (BANG)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.merge.engine.assembly import Merged
from lmc.merge.engine.call import matches
from lmc.merge.rules.averaging import average
from lmc.merge.with_data.judge import Judge
from lmc.merge.with_data.soups import greedy_soup
from lmc.network.task import Loss, Task
from lmc.weights import ModelOrWeights, Weights, as_weights, check_compatible

if TYPE_CHECKING:
    import pandas as pd


def balanced_batch(
    inputs: Tensor,
    targets: Tensor,
    *,
    classes: int,
    smoothing: float = 0.1,
    mixup: float = 0.4,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A training batch with label smoothing and mixup, for balanced averaging (Lin et al. 2024, 2309.17230).

    A fine-tuned model is overconfident and dominates its average with the zero-shot model. BANG fine-tunes on such
    batches and then takes `wise_ft(alpha=0.5)`. The strengths of the paper could not be read; these are ours. With
    `smoothing=0, mixup=0` the batch is unchanged and the recipe is WiSE-FT.

    Args:
        inputs: `(N, ...)` floating point.
        targets: `(N,)` classes.
        classes: number of classes C.
        smoothing: share of each label spread over all classes.
        mixup: both parameters of the Beta distribution of the mixing ratio, one per batch; 0 for none.
        generator: of the partners and the ratio, on the CPU.

    Returns:
        inputs `(N, ...)` and target probabilities `(N, C)`, as `torch.nn.functional.cross_entropy` takes them.
    """
    if not 0.0 <= smoothing < 1.0 or mixup < 0.0:
        raise InputError(f"smoothing must be in [0, 1) and mixup not negative, got {smoothing} and {mixup}")
    labels = F.one_hot(targets, classes).to(inputs.dtype) * (1.0 - smoothing) + smoothing / classes
    if mixup == 0.0:
        return inputs, labels
    partner = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    first, second = torch._standard_gamma(torch.full((2,), mixup, dtype=torch.float64), generator=generator).tolist()
    ratio = first / (first + second)
    return inputs.lerp(inputs[partner], 1.0 - ratio), labels.lerp(labels[partner], 1.0 - ratio)


# Starting weights (a copy, to be changed at will) and the number of the run -> the trained weights, or the module.
FineTune = Callable[[Weights, int], ModelOrWeights]
Select = Literal["uniform", "restricted"]


@dataclass(frozen=True)
class FineTuneRun:
    """One run: its number, the place of its start in the list given, its own validation score (NaN without such data),
    and whether it is in the average, and why."""

    run: int
    start: int
    score: float
    taken: bool
    reason: str


@dataclass(frozen=True)
class RunsReport(Result):
    """The runs of a recipe, in the order in which they were made.

    Attributes:
        runs: one row each.
        score: the validation score of their average.
        measure: what scores are: "accuracy" (a share), "loss", or a metric.
    """

    runs: tuple[FineTuneRun, ...]
    score: float
    measure: str = "score"

    def to_frame(self) -> "pd.DataFrame":
        """A row for each run."""
        pd = require("pandas")

        return pd.DataFrame([vars(run) for run in self.runs]).set_index("run")

    def __str__(self) -> str:
        lines = [f"{'run':>3}  {'start':>5}  {'alone':>8}  {'taken':5}  reason"]
        for run in self.runs:
            taken = "yes" if run.taken else "no"
            lines.append(f"{run.run:>3}  {run.start:>5}  {run.score:>8.4f}  {taken:5}  {run.reason}")
        count = sum(run.taken for run in self.runs)
        return "\n".join([*lines, f"{count} of {len(self.runs)} runs, {self.measure} {self.score:.4f}"])


@own_context
def diwa(
    model: nn.Module,
    base: ModelOrWeights,
    validation: Any = None,
    *,
    fine_tune: FineTune,
    runs: int = 6,
    select: Select = "uniform",
    metric: str | None = None,
    loss: Loss | Task | None = None,
    inputs: Any = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Merged[RunsReport]:
    """Diverse weight averaging (Rame et al. 2022, 2205.09739): average independent runs from one start.

    The error of the average is about bias² + variance / M + (1 - 1/M) covariance + O(distance²): runs should differ (in
    order of data, learning rate, augmentation) and stay close, which a shared start with a shared head brings about.

    Args:
        model: the architecture.
        base: where every run starts: pre-trained, with a head that has been trained on the task alone (linear probing).
        validation: data of the training domain, as for `greedy_soup`; needed to select.
        fine_tune: `(weights, run) -> weights or module`: train from these weights; `run` decides seed and hyperparameters.
        runs: how many.
        select: "uniform", the average of all runs, or "restricted", greedily by validation score.
        metric, loss, inputs, device: as for `greedy_soup`.

    Returns:
        The average, a state dict whose `.report` is the table of runs.

    Raises:
        InputError: an unusable argument.
        MismatchError: a run that comes back with another architecture.
    """
    return _average(
        [as_weights(base)], model, fine_tune, validation, runs, select, metric, loss, inputs, device, progress
    )


@own_context
def ratatouille(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    validation: Any = None,
    *,
    base: ModelOrWeights,
    fine_tune: FineTune,
    head: str | Sequence[str],
    runs: int = 6,
    select: Select = "uniform",
    metric: str | None = None,
    loss: Loss | Task | None = None,
    inputs: Any = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Merged[RunsReport]:
    """Model ratatouille (Rame et al. 2023, 2212.10445): recycle models that others fine-tuned from the same base.

    Every run starts from the trunk of one of them, in turn, with the head of the base, and is fine-tuned on the target
    task; then all are averaged. More diverse than DiWA, which it equals when the base is the only auxiliary model.

    Args:
        models: fine-tuned from the base on other, auxiliary tasks. Their heads may have any shape: they are not used.
        base: the common ancestor, with a head trained on the target task alone; its head starts every run.
        head: name patterns of the head's tensors, such as "fc" or "classifier.*".
        model, fine_tune, validation, runs, select, metric, loss, inputs, device, progress: as for `diwa`.

    Raises:
        InputError: as for `diwa`, and a pattern that fits no tensor, or all of them.
    """
    ancestor = as_weights(base)
    patterns = [head] if isinstance(head, str) else list(head)
    own = [name for name in ancestor if any(matches(name, pattern) for pattern in patterns)]
    if not own or len(own) == len(ancestor):
        raise InputError(
            f"head={head!r} fits {len(own)} of {len(ancestor)} tensors; names are like {list(ancestor)[:3]}"
        )
    if not models:
        raise InputError("models: expected at least one model fine-tuned from the base; without any, use diwa")
    starts = []
    for i, other in enumerate(models):
        trunk = {name: tensor for name, tensor in as_weights(other).items() if name in ancestor and name not in own}
        check_compatible({n: t for n, t in ancestor.items() if n not in own}, trunk, ("base", f"models[{i}]"))
        starts.append({name: ancestor[name] if name in own else trunk[name] for name in ancestor})
    return _average(starts, model, fine_tune, validation, runs, select, metric, loss, inputs, device, progress)


def _average(
    starts: Sequence[Weights],
    model: nn.Module,
    fine_tune: FineTune,
    validation: Any,
    runs: int,
    select: Select,
    metric: str | None,
    loss: Loss | Task | None,
    inputs: Any,
    device: torch.device | str | None,
    progress: bool,
) -> Merged[RunsReport]:
    """Train the runs, each from the next start, and average them."""
    if runs < 1:
        raise InputError(f"runs={runs}; expected at least 1")
    if select not in ("uniform", "restricted"):
        raise InputError(f"select={select!r}; expected 'uniform' or 'restricted'")
    if select == "restricted" and validation is None:
        raise InputError("select='restricted' chooses by validation score: pass validation=")
    made = []
    for run in tqdm(range(runs), desc="runs", disable=not progress):
        start = {name: tensor.clone() for name, tensor in starts[run % len(starts)].items()}
        trained = {name: tensor.clone() for name, tensor in as_weights(fine_tune(start, run)).items()}
        check_compatible(starts[0], trained, ("start", f"run {run}"))
        made.append(trained)
    if select == "restricted":
        soup = greedy_soup(
            model, made, validation, metric=metric, loss=loss, inputs=inputs, device=device, progress=progress
        )
        rows = sorted(soup.report.ingredients, key=lambda row: row.model)
        found = tuple(FineTuneRun(row.model, row.model % len(starts), row.score, row.taken, row.reason) for row in rows)
        return Merged(soup, RunsReport(found, soup.report.score, soup.report.measure))
    soup, alone, score, measure = average(made), [math.nan] * runs, math.nan, "score"
    if validation is not None:
        judge = Judge(model, validation, metric, loss=loss, inputs=inputs, device=device, models=made)
        soup = judge.renew(soup)
        alone, score = [judge(weights) for weights in made], judge(soup)
        measure = judge.measure or measure
    found = tuple(FineTuneRun(run, run % len(starts), alone[run], True, "all are taken") for run in range(runs))
    return Merged(soup, RunsReport(found, score, measure))
