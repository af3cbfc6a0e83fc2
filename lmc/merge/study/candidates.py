"""The defaults of `lmc.merge.compare`: every method with a small grid of its most important options."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from torch import nn

from lmc.errors import InputError
from lmc.merge.rules.averaging import average, karcher_mean, model_stock, slerp
from lmc.merge.rules.postprocess import consensus, lines
from lmc.merge.rules.selection import magmax, ram, sce
from lmc.merge.rules.spectral import iso_c, iso_cts, knots, tsv_m, wudi
from lmc.merge.rules.task_vectors import breadcrumbs, dare, della, task_arithmetic
from lmc.merge.rules.ties import pcb, ties
from lmc.merge.with_data.adamerging import adamerging
from lmc.merge.with_data.cat import cat_merging
from lmc.merge.with_data.fisher import fisher
from lmc.merge.with_data.regmean import regmean, regmean_plus_plus
from lmc.merge.with_data.soups import greedy_soup, learned_soup, wise_ft
from lmc.network.task import Loss, Task
from lmc.weights import ModelOrWeights, Weights
from lmc.weights.state import modules_in_order, numbered_depths


@dataclass(frozen=True)
class MergeTask:
    """Everything that a method may use to merge.

    Attributes:
        model: the architecture.
        models, base: the weights.
        inputs: one data set per model, for methods that look at inputs.
        labelled: validation data, for methods that learn from labels.
        score: a function of weights, larger is better, on validation data.
        loss: how outputs are judged.
    """

    model: nn.Module
    models: Sequence[Weights]
    base: Weights | None
    inputs: Sequence[Any]
    labelled: Any
    score: Callable[[Weights], float]
    loss: Loss | Task | None = None


Runner = Callable[..., Weights]


@dataclass(frozen=True)
class Candidate:
    """A method and the options to try: `run(task, **options)` for all combinations of the values in `grid`.

    `cost`: about how many times as long it takes as an average, both evaluated.
    """

    run: Runner
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    needs_base: bool = False
    cost: float = 1.0

    def options(self, most: int) -> list[dict[str, Any]]:
        """At most `most` combinations, spread evenly over the grid."""
        every = [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]
        if len(every) <= most:
            return every
        step = (len(every) - 1) / max(most - 1, 1)
        return [every[round(i * step)] for i in range(most)]


def _plain(method: Callable[..., Weights]) -> Runner:
    return lambda task, **options: method(task.models, **options)


def _on_base(method: Callable[..., Any]) -> Runner:
    return lambda task, **options: method(task.models, base=task.base, **options)


def _on_inputs(method: Callable[..., Weights]) -> Runner:
    return lambda task, **options: method(task.model, task.models, task.inputs, progress=False, **options)


def _lines(task: MergeTask, **options: Any) -> Weights:
    """LiNeS, whose blocks are all modules in the model's order where none are numbered."""
    names = list(task.models[0])
    try:
        numbered_depths(names)
    except InputError:
        options["blocks"] = modules_in_order(task.model, [name for name, _ in task.model.named_parameters()])
    return lines(task.models, base=task.base, **options)


SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.3)
FEW_SCALES = (0.3, 0.5, 1.0, 1.5)

CANDIDATES: dict[str, Candidate] = {
    "average": Candidate(_plain(average)),
    "slerp": Candidate(_plain(slerp), {"t": (0.3, 0.5, 0.7)}),
    "karcher_mean": Candidate(_plain(karcher_mean)),
    "greedy_soup": Candidate(lambda task: greedy_soup(task.model, task.models, task.score, progress=False)),
    "learned_soup": Candidate(
        lambda task, **options: learned_soup(
            task.model, task.models, task.labelled, loss=task.loss, progress=False, **options
        ),
        {"per": ("model", "layer")},
        cost=50.0,
    ),
    "fisher": Candidate(_on_inputs(fisher), {"normalize": (False, True)}, cost=100.0),
    "regmean": Candidate(_on_inputs(regmean), {"shrink": (0.5, 0.9, 1.0)}, cost=3.0),
    "regmean_plus_plus": Candidate(_on_inputs(regmean_plus_plus), {"shrink": (0.9,)}, cost=3.0),
    "wise_ft": Candidate(_on_base(wise_ft), {"alpha": (0.2, 0.4, 0.5, 0.6, 0.8)}, needs_base=True),
    "model_stock": Candidate(_on_base(model_stock), needs_base=True),
    "task_arithmetic": Candidate(_on_base(task_arithmetic), {"scale": SCALES}, needs_base=True),
    "ties": Candidate(_on_base(ties), {"density": (0.2, 0.5, 1.0), "scale": FEW_SCALES}, needs_base=True),
    "dare": Candidate(_on_base(dare), {"density": (0.3, 0.7), "scale": FEW_SCALES}, needs_base=True),
    "della": Candidate(_on_base(della), {"density": (0.3, 0.7), "scale": FEW_SCALES}, needs_base=True),
    "breadcrumbs": Candidate(_on_base(breadcrumbs), {"density": (0.15, 0.5), "scale": FEW_SCALES}, needs_base=True),
    "pcb": Candidate(_on_base(pcb), {"scale": FEW_SCALES}, needs_base=True),
    "sce": Candidate(_on_base(sce), {"select": (0.1, 1.0), "scale": (1.0, 1.5)}, needs_base=True),
    "ram": Candidate(_on_base(ram), {"boost": (0.0, 0.1), "scale": FEW_SCALES}, needs_base=True),
    "magmax": Candidate(_on_base(magmax), {"scale": FEW_SCALES}, needs_base=True),
    "tsv_m": Candidate(_on_base(tsv_m), {"scale": FEW_SCALES}, needs_base=True),
    "iso_c": Candidate(_on_base(iso_c), {"scale": FEW_SCALES}, needs_base=True),
    "iso_cts": Candidate(_on_base(iso_cts), {"scale": FEW_SCALES}, needs_base=True),
    "wudi": Candidate(_on_base(wudi), {"rest": ("base", "mean"), "scale": (0.1, 0.3, 0.5, 1.0)}, needs_base=True),
    "knots": Candidate(_on_base(knots), {"density": (0.2, 1.0), "scale": FEW_SCALES}, needs_base=True),
    "cat_merging": Candidate(
        lambda task, **options: cat_merging(
            task.model, task.models, task.inputs, base=task.base, progress=False, **options
        ),
        {"directions": (1, 3), "scale": (0.3, 0.5, 1.0)},
        needs_base=True,
    ),
    "consensus": Candidate(_on_base(consensus), {"threshold": (0.2, 0.4), "scale": FEW_SCALES}, needs_base=True),
    "lines": Candidate(_lines, {"beta": (0.5, 1.0), "scale": FEW_SCALES}, needs_base=True),
    "adamerging": Candidate(
        lambda task, **options: adamerging(
            task.model, task.models, task.inputs, base=task.base, progress=False, **options
        ),
        {"steps": (200,), "lr": (0.001, 0.01)},
        needs_base=True,
        cost=80.0,
    ),
}


def selected(methods: Iterable[str] | Mapping[str, Any] | None, based: bool, count: int) -> dict[str, Candidate]:
    """The candidates by name: those that the models allow by default, those named, or the caller's own functions."""
    if methods is None:
        fits = {name: c for name, c in CANDIDATES.items() if based or not c.needs_base}
        return {name: c for name, c in fits.items() if name != "slerp" or count == 2}
    if isinstance(methods, Mapping):
        return {name: _own(name, given) for name, given in methods.items()}
    if isinstance(methods, str):
        raise InputError(f"methods={methods!r}: expected a list of names, or a mapping of names to functions")
    for name in (names := list(methods)):
        if name not in CANDIDATES:
            raise InputError(f"methods: {name!r} is none of {', '.join(CANDIDATES)}")
    return {name: CANDIDATES[name] for name in names}


def _own(name: str, given: Any) -> Candidate:
    method, grid = given if isinstance(given, tuple) and len(given) == 2 else (given, {})
    if not callable(method) or not isinstance(grid, Mapping):
        raise InputError(f"methods[{name!r}]: expected method(models, base=..., **options) or a pair (method, grid)")
    return Candidate(_on_base(method), {option: list(values) for option, values in grid.items()})


def models_of(models: Sequence[ModelOrWeights]) -> int:
    """The number of models; refuses a single one in place of a sequence."""
    if isinstance(models, (nn.Module, Mapping)) or not models:
        raise InputError("models: expected a sequence of at least one module or state dict")
    return len(models)
