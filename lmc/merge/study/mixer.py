"""The mixer: a coefficient for each model and group of layers, and what each task makes of the sum."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lmc.core.codec import UNSAVED
from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.merge.engine.call import matches
from lmc.merge.engine.tensors import weight_sets
from lmc.merge.rules.task_vectors import task_arithmetic
from lmc.merge.with_data.judge import Judge
from lmc.network.task import Loss, Task
from lmc.weights import ModelOrWeights, StateDict, Weights, as_weights, fitted
from lmc.weights.state import modules_in_order

if TYPE_CHECKING:
    import pandas as pd

MOST_POINTS = 256  # evaluated beforehand, for pages without a kernel
# The levels of each model's coefficient, by the number of models; sliders can stand on all of them (steps of 0.05).
LEVELS = {
    1: tuple(i / 20 for i in range(31)),
    2: tuple(i / 10 for i in range(16)),
    3: (0.0, 0.2, 0.4, 0.7, 1.0, 1.5),
    4: (0.0, 0.3, 0.65, 1.0),
    5: (0.0, 0.5, 1.0),
}
GROUPS = 3

Coefficients = Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True, eq=False)
class Mixer(Result):
    """`base + sum_t c[g, t] tau_t` for coefficients c of each group of layers g and model t, scored on every task.

    `explore()` is the widget; `weights(c)` and `scores(c)` are what it shows.

    Attributes:
        names: of the models. tasks: names of the tasks.
        groups: name of each group of layers -> its name patterns.
        levels: the coefficients on which `grid` stands, 0 and 1 among them; more models have fewer.
        grid: (levels, ..., levels, tasks), measures with one coefficient per model, the same in all groups.
        own: (models + 1, tasks): measures of each model, and last of the base.
        measures: for each task the name of its measure, for example "accuracy" (a share) or "loss". `units`: of losses.
            `higher`: whether larger values are better.
    """

    names: tuple[str, ...]
    tasks: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    levels: np.ndarray
    grid: np.ndarray
    own: np.ndarray
    models: Sequence[Weights] = field(repr=False)
    base: Weights = field(repr=False)
    measures: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    higher: tuple[bool, ...] = ()
    scorers: Sequence[Callable[[Weights], float]] = field(default=(), repr=False, metadata=UNSAVED)

    def options(self, coefficients: Coefficients) -> dict[str, Any]:
        """The options with which `task_arithmetic(models, base=base, ...)` gives this mixture.

        Args:
            coefficients: (models,), or (groups, models) for each group its own.
        """
        rows = np.asarray(coefficients, dtype=np.float64)
        shape = (len(self.groups), len(self.names))
        if rows.shape == shape[1:]:
            rows = np.broadcast_to(rows, shape)
        if rows.shape != shape or not np.isfinite(rows).all():
            raise InputError(f"coefficients of shape {rows.shape}; expected finite numbers, {shape[1:]} or {shape}")
        parts = zip(self.groups.values(), rows, strict=True)
        return {"weights": {pattern: row.tolist() for patterns, row in parts for pattern in patterns}}

    @own_context
    def weights(self, coefficients: Coefficients) -> StateDict:
        """The merged weights."""
        return task_arithmetic(self.models, base=self.base, **self.options(coefficients))

    @own_context
    def scores(self, coefficients: Coefficients) -> dict[str, float]:
        """The measure of the merged weights on each task."""
        merged = self.weights(coefficients)
        return {task: score(merged) for task, score in zip(self.tasks, self.scorers, strict=True)}

    @property
    def best(self) -> tuple[float, ...]:
        """The coefficients with the best mean measure among those of the grid. Where tasks have different measures, each
        counts as the share of the way from the base to the best single model."""
        better = np.where(self.higher, 1.0, -1.0)
        gains, own = better * self.grid, better * self.own
        if len(set(self.measures)) > 1:
            way = own[:-1].max(0) - own[-1]
            gains = (gains - own[-1]) / np.where(way > 0, way, 1.0)
        means = np.where(np.isfinite(gains), gains, -np.inf).mean(-1)
        place = np.unravel_index(int(means.argmax()), means.shape)
        return tuple(float(self.levels[i]) for i in place)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each mixture of the grid: the coefficient of each model, the measure on each task."""
        pd = require("pandas")

        points = product(self.levels.tolist(), repeat=len(self.names))
        coefficients = pd.DataFrame(points, columns=[f"coefficient of {name}" for name in self.names])
        return coefficients.join(pd.DataFrame(self.grid.reshape(-1, len(self.tasks)), columns=list(self.tasks)))

    def __repr__(self) -> str:
        return f"Mixer({', '.join(self.names)} on {', '.join(self.tasks)}; groups {', '.join(self.groups)})"


@own_context
def mixer(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    data: Mapping[str, Any],
    *,
    base: ModelOrWeights,
    names: Sequence[str] | None = None,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    metric: str | None = None,
    loss: Loss | Task | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Mixer:
    """Prepare mixing task vectors by hand, model by model and layer by layer.

    Args:
        model: the architecture.
        models: fine-tuned from `base`.
        data: task -> labelled data; `lmc.Task.regression().on(data)` and its kin say how one of them is judged. What is
            chosen by looking at them needs other data to be judged on.
        names: of the models (default: those of the tasks, if there are as many).
        groups: name -> name patterns of its tensors (default: up to three stretches of the layers in their order). Each
            tensor belongs to one group.
        metric: "accuracy", "loss" or a metric of the tasks (default: of each task the accuracy where its targets are
            classes, else the loss).
        loss: how outputs of all tasks are judged, as for `lmc.loss_path`.
        device: where to evaluate (default: where the weights are).

    Raises:
        InputError: names, groups or data that do not fit.
        MismatchError: models of different architectures.
    """
    sets = weight_sets(models, base, module=model)
    if not isinstance(data, Mapping) or not data:
        raise InputError("data: expected a mapping of task names to labelled data")
    called = tuple(names or (data if len(data) == len(sets) else (f"models[{i}]" for i in range(len(sets)))))
    if len(called) != len(sets) or len(set(called)) != len(called):
        raise InputError(f"names={list(called)}; expected a different one for each of {len(sets)} models")
    chosen = _thirds(modules_in_order(model, sets.weights)) if groups is None else _given(groups, sets.weights)
    *states, origin = [fitted(model, as_weights(one)) for one in (*models, base)]
    known = [*states, origin]
    scorers = [Judge(model, part, metric, loss=loss, device=device, models=known) for part in data.values()]
    own = np.array([[score(state) for score in scorers] for state in known])
    levels = np.array(LEVELS.get(len(sets), (0.0, 1.0) if 2 ** len(sets) <= MOST_POINTS else (0.0,)))
    count = len(levels)
    grid = np.zeros((*(count,) * len(sets), len(data)))
    measures, higher = tuple(str(score.measure) for score in scorers), tuple(score.higher for score in scorers)
    units = tuple(score.unit for score in scorers)
    made = Mixer(called, tuple(data), chosen, levels, grid, own, states, origin, measures, units, higher, scorers)
    points = list(product(range(count), repeat=len(sets)))
    for place in tqdm(points, desc="mixer", unit=" mixtures", disable=not progress):
        grid[place] = list(made.scores([float(levels[i]) for i in place]).values())
    return made


def _thirds(modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Modules in their order, cut into at most three stretches of about as many modules."""
    if len(modules) <= GROUPS:
        return {module: (module,) for module in modules}
    cuts = [round(i * len(modules) / GROUPS) for i in range(GROUPS + 1)]
    parts = [tuple(modules[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    return {part[0] if len(part) == 1 else f"{part[0]} – {part[-1]}": part for part in parts}


def _given(groups: Mapping[str, str | Sequence[str]], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    chosen = {name: (given,) if isinstance(given, str) else tuple(given) for name, given in groups.items()}
    for name in names:
        found = [group for group, patterns in chosen.items() if any(matches(name, pattern) for pattern in patterns)]
        if len(found) != 1:
            raise InputError(f"groups: {name} is in {' and '.join(found) or 'none'}; each tensor belongs to one group")
    return chosen
