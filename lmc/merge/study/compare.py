"""`lmc.merge.compare`: many methods on the same models, tuned on validation data, judged on other data."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError, LmcError
from lmc.merge.engine.aligning import Align, aligned
from lmc.merge.study.candidates import Candidate, MergeTask, chosen, models_of
from lmc.merge.with_data.examples import Metric, gather, scorer
from lmc.network.batches import take, tensors
from lmc.weights import ModelOrWeights, Weights, agreeing

if TYPE_CHECKING:
    import pandas

Judge = Callable[[Weights], dict[str, float]]


@dataclass(frozen=True)
class Entry:
    """One row: a method with the options that did best on validation data.

    Attributes:
        method, options: what was run.
        validation: the score it was chosen by, the mean over tasks; larger is better.
        test: score on data that nothing was chosen by, the mean over tasks; NaN without such data.
        tasks: test score of each task.
        tried: combinations of options.
        seconds: for all of them, evaluation included.
        note: what went wrong, if all failed.
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
        metric: "accuracy" (share) or "loss" (nats, negative, so that larger is better).
    """

    entries: tuple[Entry, ...]
    weights: Weights = field(repr=False)
    metric: Metric

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


def compare(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    validation: Any,
    *,
    base: ModelOrWeights | None = None,
    test: Any = None,
    data: Sequence[Any] | None = None,
    methods: Iterable[str] | Mapping[str, Any] | None = None,
    metric: Metric = "accuracy",
    evaluations: int = 12,
    align: Align | None = None,
    inputs: Any = None,
    device: torch.device | str | None = None,
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
        methods: names (see `lmc.merge.candidates.CANDIDATES`), or a mapping of names to `method(models, base=...,
            **options)` or to pairs `(method, {option: values})`. Default: all that the models allow.
        metric: "accuracy" or "loss".
        evaluations: most combinations of options to try for each method.
        align: bring independently trained models into one order first, as for every method.
        inputs: unlabelled; BatchNorm statistics of every merge are re-estimated from them.
        device: where to evaluate (default: where the weights are).
        progress: show a bar when it takes longer than two seconds.

    Raises:
        InputError: arguments that do not fit, or no method that worked.
        MismatchError: models of different architectures.
    """
    if evaluations < 1:
        raise InputError(f"evaluations={evaluations}; expected at least 1")
    candidates = chosen(methods, base is not None, models_of(models))
    states, origin = _weights(model, models, base, align)
    tasks, held_out = _split(validation, test)
    judge, renew = _judge(model, tasks, metric, inputs, device, states[0])
    final = _judge(model, held_out, metric, None, device, states[0])[0] if held_out else None
    parts = data if data is not None else list(tasks.values()) if len(tasks) == len(states) else None
    labelled = next(iter(tasks.values())) if len(tasks) == 1 else [gather(part, name) for name, part in tasks.items()]
    task = MergeTask(model, states, origin, parts or [labelled] * len(states), labelled, lambda w: _mean(judge(w)))
    trial = _Trial(task, judge, final, renew, evaluations)
    entries, best = trial.references(), (-math.inf, states[0])
    try:
        for name in tqdm(candidates, desc="compare", unit=" methods", disable=not progress):
            entry, weights = trial.run(name, candidates[name])
            entries.append(entry)
            if weights is not None and entry.validation > best[0]:
                best = (entry.validation, weights)
    except KeyboardInterrupt:
        warnings.warn("interrupted: the methods that were not finished are missing", stacklevel=2)
    if best[0] == -math.inf:
        raise InputError("no method worked: " + "; ".join(f"{e.method}: {e.note}" for e in entries if e.note))
    ranked = sorted(entries, key=lambda e: -math.inf if math.isnan(e.validation) else e.validation, reverse=True)
    return MergeComparison(tuple(ranked), best[1], metric)


@dataclass(frozen=True)
class _Trial:
    """How one method is tried."""

    task: MergeTask
    judge: Judge
    final: Judge | None
    renew: Callable[[Weights], Weights]
    evaluations: int

    def references(self) -> list[Entry]:
        """The base, and the model that is best alone on validation data."""
        started = time.perf_counter()
        scores = [self.task.score(state) for state in self.task.models]
        first = max(range(len(scores)), key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i])
        found = [
            self._entry(
                "best single model", {"model": first}, scores[first], self.task.models[first], len(scores), started
            )
        ]
        if self.task.base is not None:
            started = time.perf_counter()
            found.append(self._entry("base", {}, self.task.score(self.task.base), self.task.base, 1, started))
        return found

    def run(self, name: str, candidate: Candidate) -> tuple[Entry, Weights | None]:
        started = time.perf_counter()
        best: tuple[float, dict[str, Any], Weights] | None = None
        note, tried = "", 0
        for options in candidate.options(self.evaluations):
            try:
                weights = self.renew(dict(candidate.run(self.task, **options)))
                score = self.task.score(weights)
            except LmcError as error:
                note = note or str(error)
                continue
            tried += 1
            if math.isfinite(score) and (best is None or score > best[0]):
                best = score, options, weights
        if best is None:
            seconds = time.perf_counter() - started
            return Entry(name, {}, math.nan, math.nan, {}, tried, seconds, note or "no finite score"), None
        return self._entry(name, best[1], best[0], best[2], tried, started), best[2]

    def _entry(
        self, name: str, options: dict[str, Any], score: float, weights: Weights, tried: int, started: float
    ) -> Entry:
        tasks = {} if self.final is None else self.final(weights)
        seconds = time.perf_counter() - started
        return Entry(name, options, score, _mean(tasks) if tasks else math.nan, tasks, tried, seconds)


def _weights(
    model: nn.Module, models: Sequence[ModelOrWeights], base: ModelOrWeights | None, align: Align | None
) -> tuple[list[Weights], Weights | None]:
    if align is not None:
        return aligned(models, align, base=base)
    names = [f"models[{i}]" for i in range(len(models))]
    if base is None:
        return agreeing(models, names, model=model), None
    *states, origin = agreeing([*models, base], [*names, "base"], model=model)
    return states, origin


def _split(validation: Any, test: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tasks to choose by and tasks to report, by name."""
    named = dict(validation) if isinstance(validation, Mapping) else {"all": validation}
    if not named:
        raise InputError("validation is empty: expected labelled data, or a mapping of task names to labelled data")
    if test is not None:
        held = dict(test) if isinstance(test, Mapping) else {"all": test}
        if set(held) != set(named):
            raise InputError(f"test has the tasks {', '.join(held)}; validation has {', '.join(named)}")
        return named, {name: getattr(part, "test", part) for name, part in held.items()}
    kept, held = {}, {}
    for name, part in named.items():
        if callable(part):
            return named, {}
        if hasattr(part, "test"):
            kept[name], held[name] = getattr(part, "validation", part.train), part.test
        else:
            whole = gather(part, name)
            if len(tensors(whole[0])[0]) < 2:
                raise InputError(f"validation {name!r}: one example cannot be split; pass test= as well")
            kept[name], held[name] = (_every_second(whole, start) for start in (0, 1))
    return kept, held


def _every_second(whole: tuple[Any, Any], start: int) -> tuple[Any, Any]:
    index = slice(start, None, 2)
    return take(whole[0], index), None if whole[1] is None else whole[1][index]


def _judge(
    model: nn.Module, tasks: Mapping[str, Any], metric: Metric, inputs: Any, device: Any, weights: Weights
) -> tuple[Judge, Callable[[Weights], Weights]]:
    renew: Callable[[Weights], Weights] = dict
    scores = {}
    for name, part in tasks.items():
        scores[name], renew = scorer(model, part, metric, inputs=inputs, device=device, weights=weights)
    return lambda state: {name: score(state) for name, score in scores.items()}, renew


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
