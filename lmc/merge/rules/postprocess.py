"""Postprocessing of any method on task vectors: LiNeS scales it by depth, TALL-masks keep what tasks agree on.

A rule here is given the merged task vector of another method, `method=` (default task arithmetic; further options go to
it), and the task vectors it was made of:

    @on_merged
    def shrink(merged, deltas, *, limit=0.1):
        return merged.clamp(-limit, limit)

    shrink([a, b], base=base, method=ties, density=0.3)
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lmc.core.context import own_context
from lmc.errors import InputError
from lmc.merge.engine.call import Pass, coefficients, matches
from lmc.merge.engine.chunks import Cut
from lmc.merge.engine.method import Delta, MergeFunction, Method, Rule, Survey, lift
from lmc.merge.engine.tensors import WeightSets, weight_sets
from lmc.merge.rules.task_vectors import check_task, per_model, task_arithmetic
from lmc.weights import ModelOrWeights
from lmc.weights.state import numbered_depths


@dataclass(frozen=True)
class OnMerged(Method):
    """A method whose rule takes the merged task vector of another method besides the task vectors."""

    @property
    def signature(self) -> inspect.Signature:
        own = list(super().signature.parameters.values())
        method = inspect.Parameter("method", inspect.Parameter.KEYWORD_ONLY, default=task_arithmetic)
        return inspect.Signature([*own, method, inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)])

    def cuts(self, options: Mapping[str, Any]) -> Cut:
        if super().cuts(options) != "entries":
            return "whole"
        return _method(options.get("method", task_arithmetic)).cuts(options)

    def deltas(self, sets: WeightSets, **options: Any) -> Delta:
        cut = self.cuts(options)
        inner = _method(options.pop("method", task_arithmetic))
        own = {key: options.pop(key) for key in [*self.parameters, "scale"] if key in options}
        merged = inner.deltas(sets, **options)
        return self._scaled(sets, own, lambda name, part: (merged(name, part), sets.deltas(name, part)), cut)


def on_merged(rule: Rule | None = None, *, survey: Survey | None = None, elementwise: bool = False) -> Any:
    """Lift `rule(merged, deltas, *, ...) -> delta`: from `(*shape)` and `(models, *shape)` to `(*shape)`.

    `elementwise`: the rule treats every entry alike, so that it may be given parts of flattened tensors.
    """
    if rule is None:
        return partial(on_merged, survey=survey, elementwise=elementwise)
    return lift(OnMerged(rule, "task vectors", survey, cut="entries" if elementwise else "whole"))


@dataclass(frozen=True)
class Depths:
    """LiNeS' first pass: the depth of each block from 0 to 1, and the scale of the first block."""

    blocks: Mapping[str, float]
    alpha: float


def _survey_lines(tensors: Pass, *, alpha: float | None, blocks: Sequence[str] | None, **_: Any) -> Depths:
    found = _depths(tensors.sets.weights, blocks)
    if alpha is None:
        norms = [(float(d.sum(0).abs().sum()), float(m.abs().sum())) for m, d in tensors]
        total, merged = (sum(column) for column in zip(*norms, strict=True))
        alpha = total / merged / len(tensors.sets) if merged > 0 else 1.0
    return Depths(found, alpha)


@on_merged(survey=_survey_lines, elementwise=True)
def lines(
    merged: Tensor,
    deltas: Tensor,
    *,
    survey: Depths,
    name: str,
    alpha: float | None = None,
    beta: float = 1.0,
    blocks: Sequence[str] | None = None,
) -> Tensor:
    """LiNeS (Wang et al. 2025, 2410.17146): scale a task vector by depth, little in shallow blocks, more in deep ones.

    Block l of L is scaled by `alpha + beta l / (L - 1)`; tensors outside the blocks (embeddings, final norm, head) by
    `alpha`, as in the authors' code. For several tasks `alpha` defaults to the paper's
    `||sum_t tau_t||_1 / (T ||tau_merged||_1)` and `beta` is tuned; for one task give `alpha` in [0, 1] and
    `beta = 1 - alpha`. `beta=0` scales uniformly.

    Args (besides those of `method=`):
        blocks: name patterns of the blocks, shallow to deep; by default the numbered modules (`layers.0`, `layers.1`,
            ...; `fc1`, `fc2`, ...). The order of keys counts for nothing.

    Raises:
        InputError: blocks that cannot be told from the names, or a pattern that fits nothing.
    """
    return merged * (survey.alpha + beta * survey.blocks.get(name, 0.0))


@on_merged(elementwise=True)
def consensus(merged: Tensor, deltas: Tensor, *, threshold: float | Sequence[float] = 0.4, agree: int = 2) -> Tensor:
    """Consensus merging (Wang et al. 2024, 2405.07813): keep the entries that at least `agree` tasks use.

    Task t uses an entry where its TALL-mask is set, `|tau_t| > threshold_t |tau_merged - tau_t|`; thresholds from 0.2
    to 0.6 are chosen per task on validation data. `agree=2` removes what one task alone uses and what none uses.
    """
    return merged * (_tall_masks(merged, deltas, threshold).sum(0) >= agree)


@on_merged(elementwise=True)
def tall_mask(merged: Tensor, deltas: Tensor, *, task: int, threshold: float = 0.4) -> Tensor:
    """The merged task vector under the TALL-mask of one task: nearly that task's own model (2405.07813, section 4).

    With the merged vector and one bit per entry and task, all tasks can be kept.
    """
    check_task(task, len(deltas))
    return merged * _tall_masks(merged, deltas, threshold)[task]


@own_context
def tall_masks(
    models: Sequence[ModelOrWeights],
    *,
    base: ModelOrWeights,
    method: MergeFunction = task_arithmetic,
    threshold: float | Sequence[float] = 0.4,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """The TALL-mask of every task: for each weight a boolean tensor, true where the task uses the merged vector."""
    sets = weight_sets(models, base)
    merged = _method(method).deltas(sets, **options)
    masks = {name: _tall_masks(merged(name), sets.deltas(name), threshold) for name in sets.weights}
    return [{name: mask[t] for name, mask in masks.items()} for t in range(len(sets))]


def _method(function: Any) -> Method:
    if not hasattr(function, "method"):
        raise InputError(f"method: expected a method on task vectors, such as lmc.merge.ties, got {function!r}")
    return function.method


def _tall_masks(merged: Tensor, deltas: Tensor, threshold: float | Sequence[float]) -> Tensor:
    """`(models, *shape)` booleans."""
    limits = coefficients([threshold] * len(deltas) if isinstance(threshold, (int, float)) else threshold, len(deltas))
    return deltas.abs() > per_model(limits, deltas) * (merged - deltas).abs()


def _depths(names: Sequence[str], blocks: Sequence[str] | None) -> dict[str, float]:
    """For each name inside a block the depth of that block, from 0 (first) to 1 (last)."""
    if blocks is None:
        try:
            return numbered_depths(names)
        except InputError as error:
            raise InputError(f"{error}: pass blocks=[pattern, ...], shallow to deep") from error
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or len(blocks) < 2:
        raise InputError(f"blocks={blocks!r}: give a list of at least two patterns, shallow to deep")
    found: dict[str, float] = {}
    for i, pattern in enumerate(blocks):
        inside = [name for name in names if matches(name, pattern)]
        if not inside:
            raise InputError(f"blocks: no tensor fits the pattern {pattern!r}")
        found |= {name: i / (len(blocks) - 1) for name in inside}
    return found
