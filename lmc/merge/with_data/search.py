"""Coefficients and options found by trial: CMA-ES (Hansen) over whatever a merging method takes, scored on data.

Needs the package `cma`: `pip install "lmc-lab[search]"`. The score that is searched for is no estimate of quality any
more: measure on other data.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError, LmcError
from lmc.merge.engine.aligning import alignable
from lmc.merge.engine.assembly import Merged
from lmc.merge.engine.method import MergeFunction
from lmc.merge.rules.averaging import average
from lmc.merge.with_data.judge import Judge, is_measure
from lmc.network.task import Loss, Task
from lmc.weights import ModelOrWeights, as_weights, fitted


@dataclass(frozen=True)
class Trial:
    """One merge that was tried: its options and its score (NaN if it failed)."""

    options: dict[str, Any]
    score: float


@dataclass(frozen=True)
class SearchReport(Result):
    """The best options found, their score, all trials in order, and what scores are: an accuracy, a loss, a metric."""

    options: dict[str, Any]
    score: float
    trials: tuple[Trial, ...] = field(repr=False)
    measure: str = "score"

    def to_frame(self) -> Any:
        """A pandas data frame, one row per trial."""
        pandas = require("pandas")

        return pandas.DataFrame([{**trial.options, "score": trial.score} for trial in self.trials])

    def __str__(self) -> str:
        chosen = "\n".join(f"{name}: {_format(value)}" for name, value in self.options.items())
        return f"best of {len(self.trials)} trials, {self.measure} {self.score:.4f}\n{chosen}"


@own_context
@alignable
def evolve(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    validation: Any,
    *,
    method: MergeFunction | Callable[..., Any],
    space: Mapping[str, tuple[float, float]],
    base: ModelOrWeights | None = None,
    groups: Sequence[str] = (),
    metric: str | None = None,
    loss: Loss | Task | None = None,
    evaluations: int = 100,
    sigma: float = 1 / 6,
    inputs: Any = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    **fixed: Any,
) -> Merged[SearchReport]:
    """Search a method's options by CMA-ES: evolutionary merging in parameter space (Akiba et al. 2024, 2403.13187).

    The genome is in the unit cube, one gene per number: `space={"density": (0.1, 1.0), "weights": (0.0, 2.0)}` has
    one for the density and one per model for the weights; with `groups` (name patterns, e.g. of layers) each group has
    its own. It starts in the middle, step `sigma`; the paper's search is `dare` with `combine_by="ties"`, density and
    weights, population `4 + floor(3 ln n)`. A merge that fails or is not finite counts as the worst.

    Args:
        method: any merging method of this package or of your own.
        model, models, validation, metric, loss, inputs, device: as for `greedy_soup`.
        space: lower and upper bound of each option.
        base: given to the method.
        groups: name patterns; options become `{pattern: value}`.
        evaluations: merges that are tried.
        fixed: further options of the method.

    Returns:
        The best merge, a state dict whose `.report` holds options and trials.
    """
    for name, (low, high) in space.items():
        if not low < high:
            raise InputError(f"space: {name} from {low} to {high} is empty")
    known = [fitted(model, as_weights(one)) for one in [*models, *([] if base is None else [base])]]
    judge = Judge(model, validation, metric, loss=loss, inputs=inputs, device=device, models=known)
    places = [(group, name) for group in groups or [""] for name in space]
    sizes = [len(models) if name == "weights" else 1 for _, name in places]

    def decode(genome: Sequence[float]) -> dict[str, Any]:
        genes = iter(genome)
        options: dict[str, Any] = {}
        for (group, name), size in zip(places, sizes, strict=True):
            low, high = space[name]
            values = [low + (high - low) * min(max(next(genes), 0.0), 1.0) for _ in range(size)]
            value = values if name == "weights" else values[0]
            options[name] = {**options.get(name, {}), group: value} if group else value
        return options

    def build(options: dict[str, Any]) -> Any:
        return judge.renew(method(models, base=base, **fixed, **options))

    trials = _search(
        lambda genome: _try(build, judge, decode(genome)),
        judge.gain,
        [[0.5] * sum(sizes)],
        sigma,
        evaluations,
        seed,
        [0.0, 1.0],
        tqdm(total=evaluations, desc="evolve", disable=not progress),
    )
    best = max(trials, key=lambda trial: judge.gain(trial.score))
    if math.isnan(best.score):
        build(best.options)  # raises what went wrong
    return Merged(build(best.options), SearchReport(best.options, best.score, tuple(trials), judge.measure or ""))


@own_context
def lcsc(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    validation: Any,
    *,
    metric: str | None = None,
    loss: Loss | Task | None = None,
    evaluations: int = 500,
    sigma: float = 0.3,
    inputs: Any = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Merged[SearchReport]:
    """A linear combination of saved checkpoints of one run (LCSC: Liu et al. 2024, 2404.02241), by its score.

    Coefficients sum to 1 (the last is what the others leave) and may be negative or large, as in the paper. Its
    evolutionary operators are not published; this is CMA-ES with step `sigma`. Every single checkpoint and the uniform
    mean are tried first, however few `evaluations` are, and the search starts at the best of them, so that the result is
    never worse. Arguments and
    result as for `evolve`; the report's option is `weights`.
    """
    count = len(models)
    if metric is None and not is_measure(validation):
        metric = "loss"
    states = [fitted(model, as_weights(m)) for m in models]
    judge = Judge(model, validation, metric, loss=loss, inputs=inputs, device=device, models=states)

    def decode(free: Sequence[float]) -> dict[str, Any]:
        values = [float(v) for v in free]
        return {"weights": [*values, 1.0 - sum(values)]}

    def build(options: dict[str, Any]) -> Any:
        return judge.renew(average(models, **options))

    corners = [[float(i == j) for j in range(count - 1)] for i in range(count)]
    trials = _search(
        lambda free: _try(build, judge, decode(free)),
        judge.gain,
        [*corners, [1.0 / count] * (count - 1)],
        sigma,
        evaluations,
        seed,
        None,
        tqdm(total=evaluations, desc="LCSC", disable=not progress),
    )
    best = max(trials, key=lambda trial: judge.gain(trial.score))
    return Merged(build(best.options), SearchReport(best.options, best.score, tuple(trials), judge.measure or ""))


def _try(build: Callable[[dict[str, Any]], Any], score: Callable[[Any], float], options: dict[str, Any]) -> Trial:
    try:
        found = score(build(options))
    except LmcError:
        found = math.nan
    return Trial(options, found if math.isfinite(found) else math.nan)


def _search(
    attempt: Callable[[Sequence[float]], Trial],
    gain: Callable[[float], float],
    starts: list[list[float]],
    sigma: float,
    evaluations: int,
    seed: int,
    bounds: list[float] | None,
    bar: Any,
) -> list[Trial]:
    """All trials: the starting points, then CMA-ES from the best of them until `evaluations` are spent."""
    cma = _cma()
    trials = []
    state = np.random.get_state()
    restart = 0
    try:
        for start in starts:
            trials.append(attempt(start))
            bar.update()
        origin = starts[max(range(len(starts)), key=lambda i: gain(trials[i].score))]
        # CMA-ES wants two dimensions at least; an unused one does no harm. Its random numbers are numpy's global ones.
        padded = [*origin, 0.5] if len(origin) == 1 else origin
        # A strategy that has settled, on a plateau for example, is followed by a larger one.
        while origin and len(trials) < evaluations:
            population = (4 + int(3 * math.log(len(padded)))) * 2**restart
            options = {
                "seed": seed + restart + 1,
                "popsize": population,
                "verbose": -9,
                "bounds": bounds or [None, None],
            }
            strategy = cma.CMAEvolutionStrategy(padded, sigma, options)
            while len(trials) < evaluations and not strategy.stop():
                genomes = strategy.ask()
                chosen = genomes[: evaluations - len(trials)]  # of the last population what is left to spend
                found = [attempt(list(genome[: len(origin)])) for genome in chosen]
                if len(found) == len(genomes):
                    strategy.tell(genomes, _losses([gain(trial.score) for trial in found]))
                trials += found
                bar.update(len(found))
            restart += 1
    finally:
        np.random.set_state(state)
        bar.close()
    return trials


def _losses(gains: Sequence[float]) -> list[float]:
    """The values that CMA-ES minimises: failures count a little more than the worst that worked."""
    worst = min((gain for gain in gains if gain > -math.inf), default=0.0)
    return [-gain if gain > -math.inf else 1.0 - worst + abs(worst) for gain in gains]


def _cma() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses matplotlib, which nothing here needs
            return importlib.import_module("cma")
    except ImportError as error:
        raise InputError("searching needs the package cma: pip install 'lmc-lab[search]'") from error


def _format(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{pattern} {_format(v)}" for pattern, v in value.items())
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(f"{v:.3f}" for v in value) + "]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
