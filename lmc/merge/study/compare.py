"""`lmc.merge.compare`: many methods on the same models, tuned on validation data, judged on other data."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmc.core.context import own_context, warn
from lmc.core.extras import require
from lmc.core.progress import beforehand, tqdm
from lmc.core.results import Result
from lmc.core.workers import spread
from lmc.errors import InputError, LmcError, WorkerError
from lmc.merge.engine.aligning import Align, aligned
from lmc.merge.engine.tensors import on_base
from lmc.merge.rules.averaging import average
from lmc.merge.study.candidates import Candidate, MergeTask, models_of, selected
from lmc.merge.with_data.judge import Judge, as_came, batches, chosen, gather, is_measure, splits
from lmc.network.batches import IGNORED, TaskData, cuttable, masked, reread, take, tensors
from lmc.network.task import Loss, Task
from lmc.weights import ModelOrWeights, Weights, agreeing, as_weights

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Entry:
    """One row: a method with the options that did best on validation data.

    Attributes:
        method, options: what was run.
        validation: the score it was chosen by, the mean over tasks.
        test: score on data that nothing was chosen by, the mean over tasks; NaN without such data.
        tasks: test score of each task.
        tried: combinations of options.
        seconds: for all of them, evaluation included.
        note: what went wrong, if all failed, or why nothing was tried.
    """

    method: str
    options: dict[str, Any]
    validation: float
    test: float
    tasks: dict[str, float]
    tried: int
    seconds: float
    note: str = ""


@dataclass(frozen=True, eq=False)
class MergeComparison(Result):
    """Merging methods ranked by validation score; `weights` are those of the best one.

    Attributes:
        entries: best first; the single models and the base are among them, to compare with.
        weights: of the best merge (single models and base excluded).
        metric: what scores are: "accuracy" (a share), "loss", or a metric of the task.
        higher: whether larger scores are better.
        unit: of the loss.
    """

    entries: tuple[Entry, ...]
    weights: Weights = field(repr=False)
    metric: str
    higher: bool = True
    unit: str = ""

    @property
    def best(self) -> Entry:
        """The best merge by validation score."""
        return next(entry for entry in self.entries if entry.method not in _REFERENCES and not entry.note)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per method, ranked by validation score: options, scores, scores per task, what was tried, seconds."""
        pandas = require("pandas")

        rows = []
        for e in self.entries:
            tasks = e.tasks if len(e.tasks) > 1 else {}
            options = ", ".join(f"{name}={_short(value)}" for name, value in e.options.items())
            scores = {"validation": e.validation, "test": e.test}
            rows.append({"method": e.method, "options": options, **scores, **tasks, "tried": e.tried})
            rows[-1] |= {"seconds": round(e.seconds, 2), "note": e.note}
        frame = pandas.DataFrame(rows).set_index("method")
        return frame if any(e.note for e in self.entries) else frame.drop(columns="note")

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(float_format="{:.4f}".format)

    def __repr__(self) -> str:
        return self.to_frame().to_string(float_format="{:.4f}".format)


_REFERENCES = ("base", "best single model")


@own_context
def compare(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    validation: Any,
    *,
    base: ModelOrWeights | None = None,
    test: Any = None,
    data: Sequence[Any] | None = None,
    methods: Iterable[str] | Mapping[str, Any] | None = None,
    metric: str | None = None,
    loss: Loss | Task | None = None,
    evaluations: int = 12,
    seconds: float | None = None,
    align: Align | None = None,
    inputs: Any = None,
    device: torch.device | str | None = None,
    executor: Any = None,
    progress: bool = True,
) -> MergeComparison:
    """Merge by every method that the models allow, choose options on validation data, and rank.

    Nothing is ever chosen by `test`. A method that fails stays in the table with its reason; an interrupt returns the
    methods done so far, with a warning. Nothing given is changed.

    Args:
        model: the architecture.
        models: modules or state dicts.
        validation: labelled data; a mapping of task names to labelled data, whose scores are averaged; or a function
            from weights to a score, larger being better.
        base: what the models were fine-tuned from; without it, methods on task vectors are left out.
        test: data of the same kind to report scores on. Default: `.test` of a data set; of data given whole, every
            second example, which is then kept out of validation.
        data: one data set per model for methods that look at inputs (default: the tasks of `validation` if there are as
            many, else all of it for each).
        methods: names (see `lmc.merge.study.candidates.CANDIDATES`), or a mapping of names to `method(models, base=...,
            **options)` or to pairs `(method, {option: values})`. Default: all that the models allow.
        metric: "accuracy", "loss" or a metric of the task (default: the accuracy where targets are classes, else the
            loss).
        loss: how outputs are judged, as for `lmc.loss_path`: a function of outputs and targets, or an `lmc.Task`.
        evaluations: most combinations of options to try for each method.
        seconds: a budget. Every method has an equal share of what is left; its options are tried in an order that
            covers the grid early; methods whose turn does not come stay in the table with a note. What has begun is
            finished, so that it takes a little longer.
        align: bring independently trained models into one order first, as for every method.
        inputs: unlabelled; BatchNorm statistics of every merge are re-estimated from them.
        device: where to evaluate (default: where the weights are).
        executor: a `concurrent.futures.Executor` or a dask `Client` whose workers take the methods (default: one after the
            other, here). Of a budget each method then has an equal share from the start.
        progress: show a bar when it takes longer than two seconds, and of a long comparison beforehand about how long.

    Raises:
        InputError: arguments that do not fit, or no method that worked.
        MismatchError: models of different architectures.
    """
    if evaluations < 1:
        raise InputError(f"evaluations={evaluations}; expected at least 1")
    if seconds is not None and not seconds > 0.0:
        raise InputError(f"seconds={seconds}; expected a positive budget")
    deadline = math.inf if seconds is None else time.perf_counter() + seconds
    if methods is not None and not isinstance(methods, Mapping | str):
        methods = list(methods)  # which workers read again
    candidates = selected(methods, base is not None, models_of(models))
    states, origin = _weights(model, models, base, align)
    tasks, held_out = _split(reread(validation), reread(test))
    data, inputs = [reread(one) for one in data] if isinstance(data, list | tuple) else data, reread(inputs)
    shared: dict[str, Any] = {
        "model": model, "states": states, "origin": origin, "tasks": tasks, "held_out": held_out, "data": data,
        "metric": metric, "loss": loss, "inputs": inputs, "device": device, "evaluations": evaluations,
    }  # fmt: skip
    trial = _trial(**shared)
    judge = trial.judge
    order = {name: i for i, name in enumerate([*_REFERENCES, *candidates])}
    entries, best = trial.references(), (-math.inf, math.inf, states[0])
    if progress and executor is None:
        trial.announce(candidates, seconds)
    if executor is None:
        found = _in_turn(trial, candidates, deadline, seconds)
    else:
        turns = [(name, math.inf if seconds is None else seconds / len(candidates)) for name in candidates]
        found = (entry for _, entry in spread(executor, _elsewhere, {**shared, "methods": methods}, turns))
    with tqdm(total=len(candidates), desc="compare", unit=" methods", disable=not progress) as bar:
        try:
            for entry, weights in found:
                entries.append(entry)
                bar.update()
                rank = judge.gain(entry.validation), -order[entry.method]  # of equals the first, whichever came first
                if weights is not None and rank > best[:2]:
                    best = (*rank, weights)
        except (KeyboardInterrupt, WorkerError) as error:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            warn(f"{why}: the methods that were not finished are missing")
    if best[0] == -math.inf:
        raise InputError("no method worked: " + "; ".join(f"{e.method}: {e.note}" for e in entries if e.note))
    ranked = sorted(entries, key=lambda e: (-judge.gain(e.validation), order[e.method]))
    return MergeComparison(tuple(ranked), best[2], judge.measure, judge.higher, judge.unit)


def _trial(
    model: nn.Module,
    states: list[Weights],
    origin: Weights | None,
    tasks: dict[str, Any],
    held_out: dict[str, Any],
    data: Sequence[Any] | None,
    metric: str | None,
    loss: Loss | Task | None,
    inputs: Any,
    device: torch.device | str | None,
    evaluations: int,
) -> "_Trial":
    known = states if origin is None else [*states, origin]
    options: dict[str, Any] = {"loss": loss, "device": device, "models": known}
    judge = _Panel({name: Judge(model, part, metric, inputs=inputs, **options) for name, part in tasks.items()})
    final = _Panel({name: Judge(model, part, metric, **options) for name, part in held_out.items()})
    parts = data if data is not None else list(tasks.values()) if len(tasks) == len(states) else None
    labelled = next(iter(tasks.values())) if len(tasks) == 1 else _together(tasks)
    task = MergeTask(
        model, states, origin, parts or [labelled] * len(states), labelled, lambda w: judge.gain(_mean(judge(w))), loss
    )
    return _Trial(task, judge, final, evaluations)


def _in_turn(
    trial: "_Trial", candidates: Mapping[str, Candidate], deadline: float, seconds: float | None
) -> Iterator[tuple[Entry, Weights | None]]:
    """Each method with an equal share of the time that is left."""
    for i, name in enumerate(candidates):
        now = time.perf_counter()
        if now >= deadline:
            yield _untried(name, f"not tried: the budget of {seconds:g} s was spent"), None
        else:
            yield trial.run(name, candidates[name], now + (deadline - now) / (len(candidates) - i))


def _elsewhere(
    states: list[Weights], origin: Weights | None, methods: Any, **shared: Any
) -> Callable[[tuple[str, float]], tuple[Entry, Weights | None]]:
    """A worker's task for a method, with its seconds."""
    trial = _trial(states=states, origin=origin, **shared)
    trial.references()  # from which the judges know what is measured
    candidates = selected(methods, origin is not None, len(states))
    return lambda turn: trial.run(turn[0], candidates[turn[0]], time.perf_counter() + turn[1])


class _Panel:
    """The judges of several tasks, all of one measure."""

    def __init__(self, judges: Mapping[str, Judge]) -> None:
        self.judges = judges

    def __call__(self, weights: Weights) -> dict[str, float]:
        scores = {name: judge(weights) for name, judge in self.judges.items()}
        measures = {name: judge.measure for name, judge in self.judges.items()}
        if len(set(measures.values())) > 1:
            raise InputError(f"tasks are measured differently ({measures}): pass metric='loss'")
        return scores

    @property
    def first(self) -> Judge:
        return next(iter(self.judges.values()))

    @property
    def measure(self) -> str:
        return self.first.measure or ""

    @property
    def higher(self) -> bool:
        return self.first.higher

    @property
    def unit(self) -> str:
        return self.first.unit

    def gain(self, value: float) -> float:
        return self.first.gain(value)


@dataclass(frozen=True)
class _Trial:
    """The trials of one method."""

    task: MergeTask
    judge: _Panel
    final: _Panel
    evaluations: int

    def references(self) -> list[Entry]:
        """The base, and the model that is best alone on validation data."""
        started = time.perf_counter()
        scores = [_mean(self.judge(state)) for state in self.task.models]
        first = max(range(len(scores)), key=lambda i: self.judge.gain(scores[i]))
        found = [
            self._entry(
                "best single model", {"model": first}, scores[first], self.task.models[first], len(scores), started
            )
        ]
        if self.task.base is not None:
            started = time.perf_counter()
            score = _mean(self.judge(self.task.base))
            found.append(self._entry("base", {}, score, self.task.base, 1, started))
        return found

    def announce(self, candidates: Mapping[str, Candidate], budget: float | None) -> None:
        """Say about how long it will take: each merge as many times an average and its evaluation as is known of its method."""
        started = time.perf_counter()
        self.judge(average(self.task.models))
        one = time.perf_counter() - started
        tries = {name: len(candidate.options(self.evaluations)) for name, candidate in candidates.items()}
        seconds = one * sum(count * candidates[name].cost for name, count in tries.items())
        work = f"compare: {sum(tries.values())} merges of {len(self.task.models)} models by {len(candidates)} methods"
        beforehand(work, seconds, budget=budget)

    def run(self, name: str, candidate: Candidate, until: float) -> tuple[Entry, Weights | None]:
        started = time.perf_counter()
        best: tuple[float, dict[str, Any], Weights] | None = None
        note, tried = "", 0
        combinations = candidate.options(self.evaluations)
        for options in combinations if until == math.inf else _spread(combinations):
            if (tried or note) and time.perf_counter() >= until:
                break
            try:
                weights = self.judge.first.renew(candidate.run(self.task, **options))
                score = _mean(self.judge(weights))
            except LmcError as error:
                note = note or str(error)
                continue
            tried += 1
            if math.isfinite(score) and (best is None or self.judge.gain(score) > self.judge.gain(best[0])):
                best = score, options, weights
        if best is None:
            seconds = time.perf_counter() - started
            return replace(_untried(name, note or "no finite score"), tried=tried, seconds=seconds), None
        return self._entry(name, best[1], best[0], best[2], tried, started), best[2]

    def _entry(
        self, name: str, options: dict[str, Any], score: float, weights: Weights, tried: int, started: float
    ) -> Entry:
        tasks = self.final(weights)
        seconds = time.perf_counter() - started
        return Entry(name, options, score, _mean(tasks), tasks, tried, seconds)


def _weights(
    model: nn.Module, models: Sequence[ModelOrWeights], base: ModelOrWeights | None, align: Align | None
) -> tuple[list[Weights], Weights | None]:
    if align is not None:
        return aligned(models, align, base=base)
    names = [f"models[{i}]" for i in range(len(models))]
    if base is None:
        return agreeing(models, names, model=model), None
    everyone = on_base(list(models), base if isinstance(base, Mapping) else as_weights(base))  # type: ignore[arg-type]
    *states, origin = agreeing(everyone, [*names, "base"], model=model)
    return states, origin


def _split(validation: Any, test: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tasks to choose by and tasks to report, by name."""
    named = _named(validation)
    if not named:
        raise InputError("validation is empty: expected labelled data, or a mapping of task names to labelled data")
    if test is not None:
        held = _named(test)
        if set(held) != set(named):
            raise InputError(f"test has the tasks {', '.join(held)}; validation has {', '.join(named)}")
        return named, {name: _part(part, "test") for name, part in held.items()}
    kept, held = {}, {}
    for name, part in named.items():
        if is_measure(part):
            return named, {}
        if _part(part, "test") is not part:
            kept[name], held[name] = chosen(part), _part(part, "test")
        else:
            kept[name], held[name] = (_every_second(part, name, start) for start in (0, 1))
    return kept, held


def _named(data: Any) -> dict[str, Any]:
    """Data of several tasks by name; those of a single one, which may be a mapping of tensors or of splits, as "all"."""
    if splits(data):
        return {"all": SimpleNamespace(**data)}
    tasks = isinstance(data, Mapping) and not any(isinstance(value, Tensor) for value in data.values())
    return dict(data) if tasks else {"all": data}


def _part(data: Any, split: str) -> Any:
    """A split of a data set, with its task; data that are none as they are."""
    if isinstance(data, TaskData):
        part = _part(data.data, split)
        return data if part is data.data else data.task.on(part)
    return masked(data).get(split) or getattr(data, split, data)


def _every_second(data: Any, name: str, start: int) -> Any:
    """Every second example of data given whole, with their task."""
    if isinstance(data, TaskData):
        return data.task.on(_every_second(data.data, name, start))
    index = slice(start, None, 2)
    parts = list(batches(data, name, limit=None, size=1 << 40))
    cut = [cuttable(inputs, tensors(inputs)[0] if targets is None else targets) for inputs, targets in parts]
    if len(parts) > 1 and not all(cut):  # graphs
        return parts[index]
    inputs, targets = parts[0] if len(parts) == 1 else gather(data, name)
    if targets is not None and not all(cut):  # one graph: every second of the nodes that count
        if targets.is_floating_point():
            raise InputError(f"validation {name!r}: one call of the module cannot be split; pass test= as well")
        places = (targets != IGNORED).nonzero()[index].unbind(1)
        kept = torch.full_like(targets, IGNORED)
        kept[places] = targets[places]
        return [(inputs, kept)]
    if len(tensors(inputs)[0]) < 2:
        raise InputError(f"validation {name!r}: one example cannot be split; pass test= as well")
    return as_came(data, take(inputs, index), None if targets is None else take(targets, index))


def _together(tasks: Mapping[str, Any]) -> Any:
    """The data of all tasks as batches, for methods that learn from labels."""
    if any(is_measure(part) for part in tasks.values()):
        return None
    judged = next((part.task for part in tasks.values() if isinstance(part, TaskData)), None)
    plain = {name: part.data if isinstance(part, TaskData) else part for name, part in tasks.items()}
    batches = [as_came(part, *gather(part, name)) for name, part in plain.items()]
    return batches if judged is None else judged.on(batches)


def _untried(name: str, note: str) -> Entry:
    return Entry(name, {}, math.nan, math.nan, {}, 0, 0.0, note)


def _spread(options: Sequence[Any]) -> list[Any]:
    """In an order whose beginnings cover all of it: the middle, then the middles of what is beside, and so on."""
    order, todo = [], deque([(0, len(options))])
    while todo:
        start, stop = todo.popleft()
        if start < stop:
            middle = (start + stop) // 2
            order.append(options[middle])
            todo += [(start, middle), (middle + 1, stop)]
    return order


def _mean(scores: Mapping[str, float]) -> float:
    """The mean over tasks; NaN without any."""
    return math.nan if not scores else sum(scores.values()) / len(scores)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
