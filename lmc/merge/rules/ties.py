"""TIES and PCB-Merging: task vectors trimmed by thresholds of the whole model.

Both look at all tensors before they merge the first one, so they read the models more than once.
"""

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from lmc.errors import InputError
from lmc.merge.engine.call import Pass, varies
from lmc.merge.engine.chunks import Latest
from lmc.merge.engine.method import on_task_vectors
from lmc.merge.engine.quantiles import kth_smallest
from lmc.merge.rules.task_vectors import Normalize, densities, elect, per_model, weigh

Scope = Literal["model", "tensor"]


@dataclass
class Trim:
    """TIES' first pass: each model's threshold, and, once a sum is exactly zero, the majority sign.

    For the whole model (`thresholds`), or, where that is None, for one tensor after the other.
    """

    deltas: Any  # a `Pass`, or what is iterated like one
    thresholds: Tensor | None
    _latest: Latest = field(default_factory=Latest)
    _whole: dict[str, float] = field(default_factory=dict)  # the majority sign of the whole model
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def limits(self, name: str, density: float | Sequence[float]) -> Tensor:
        """`(models,)`: the thresholds for the tensor `name`."""
        if self.thresholds is not None:
            return self.thresholds
        own = self.deltas.of(name)
        return self._latest(name, "limits", lambda: thresholds(own, density, len(own.sets), own.size, more=0))

    def majority(self, name: str, limits: Tensor, weights: Sequence[float] | None) -> float:
        """The sign that most entries elect, of the whole model or of the tensor; -1 when there are as many of both."""

        def found(deltas: Any) -> float:
            votes = sum(float(weigh(trim(d, limits), weights).sum(0).sign_().sum()) for d in deltas)
            return 1.0 if votes > 0 else -1.0

        if self.thresholds is None:
            return self._latest(name, "majority", lambda: found(self.deltas.of(name)))
        with self._lock:
            if "sign" not in self._whole:
                self._whole["sign"] = found(self.deltas)
            return self._whole["sign"]


def survey_ties(deltas: Any, *, density: Any, weights: Any, scope: Scope, **_: Any) -> Trim:
    """The thresholds of the whole model, or the way to those of each tensor; `deltas` are iterated as a `Pass` is."""
    if scope not in ("model", "tensor"):
        raise InputError(f"scope must be 'model' or 'tensor', got {scope!r}")
    if scope == "tensor":
        return Trim(deltas, None)
    if varies(density) or varies(weights):
        raise InputError(
            "density and weights per name pattern need scope='tensor': scope='model' ranks all tensors at once"
        )
    return Trim(deltas, thresholds(deltas, density, len(deltas.sets), deltas.size))


@on_task_vectors(survey=survey_ties, elementwise=True)
def ties(
    deltas: Tensor,
    *,
    survey: Trim,
    name: str,
    density: float | Sequence[float] = 0.2,
    weights: Sequence[float] | None = None,
    scope: Scope = "model",
    undecided: Literal["majority", "positive", "drop"] = "majority",
    normalize: Normalize = "weights",
) -> Tensor:
    """TIES (Yadav et al. 2023, 2306.01708, Algorithm 1): trim, elect signs, merge what agrees.

    1. Of each task vector keep the share `density` (one for all, or one per model) largest by magnitude, over the whole
       flattened model.
    2. Elect for each entry the sign of the sum of the trimmed (and weighted) vectors.
    3. Take the weighted mean over the models that have this sign; entries trimmed to zero do not count.

    The recommended `scale` without validation data is 1. Details follow the authors' code: of n entries
    `floor(density n) + 1` survive and all that equal the last of them. An entry whose sum is exactly zero takes the
    majority sign of the whole model (negative if there is none); in the paper's formula it is dropped
    (`undecided="drop"`).

    The paper has no weights. As in mergekit's `ties`, the sum in step 3 is divided by the weights of the models that
    agree, so that weights all doubled change nothing; `normalize="count"` divides by their number, so that weights
    scale the task vectors; `"none"` is the disjoint sum (FusionBench's default, with scale 0.3). mergekit trims each
    tensor on its own, keeps `floor(density n)` entries (one at least) and takes undecided entries as positive:
    `scope="tensor", undecided="positive"`.
    """
    if undecided not in ("majority", "positive", "drop"):
        raise InputError(f"undecided must be 'majority', 'positive' or 'drop', got {undecided!r}")
    limits = survey.limits(name, density)
    trimmed = trim(deltas, limits)
    sign = 1.0 if undecided == "positive" else 0.0
    if undecided == "majority":
        weighted = weigh(trimmed, weights)
        if ((weighted.sum(0) == 0) & (weighted.abs().sum(0) > 0)).any():
            sign = survey.majority(name, limits, weights)
    return elect(trimmed, weights, sign, normalize)


def trim(deltas: Tensor, limits: Tensor) -> Tensor:
    """Zero all entries of `(models, *shape)` whose magnitude is below the limit of their model."""
    limits = limits.to(deltas.dtype)
    below = torch.nextafter(limits, torch.zeros_like(limits)).tolist()  # hardshrink keeps what is above its bound
    return torch.stack([hardshrink(d, low) if low > 0 else d for d, low in zip(deltas, below, strict=True)])


def thresholds(
    deltas: Iterable[Tensor], density: float | Sequence[float], models: int, size: int, more: int = 1
) -> Tensor:
    """`(models,)`: the smallest of the `floor(density size) + more` largest magnitudes among all entries of a model."""
    sample = (lambda: (d.abs() for d in deltas.sample())) if isinstance(deltas, Pass) else None
    ranks = [min(size, max(1, size + 1 - more - int(share * size))) for share in densities(density, models)]
    return kth_smallest(lambda: (d.abs() for d in deltas), ranks, size, sample)


@dataclass(frozen=True)
class Competition:
    """PCB's first passes, `(models,)` each: the range that ``|tau|`` is clipped to, and that of the balance kept."""

    low: Tensor
    high: Tensor
    least: Tensor
    most: Tensor


def _survey_pcb(deltas: Pass, *, density: Any, **_: Any) -> Competition:
    if varies(density) or not isinstance(density, int | float) or not 0.0 < density <= 1.0:
        raise InputError(f"density must be one number in (0, 1]: PCB ranks the whole model; got {density!r}")
    count = len(deltas.sets)
    highest = torch.full((count,), -math.inf, dtype=deltas.sets.dtype)

    def quantiles(values: Callable[[Tensor], Tensor], *shares: float) -> list[Tensor]:
        """`(models,)` for each share, all in one pass."""
        ranks = [1 + int(share * (deltas.size - 1)) for share in shares for _ in range(count)]
        passes, sample = (lambda: map(values, deltas)), (lambda: map(values, deltas.sample()))
        return list(kth_smallest(passes, ranks, deltas.size, sample).split(count))

    low, high = quantiles(torch.abs, 1e-4, 1 - 1e-4)

    def balance(deltas: Tensor) -> Tensor:
        found = _balance(deltas, low, high)
        torch.maximum(highest, found.reshape(count, -1).amax(1).cpu(), out=highest)  # on the way
        return found

    (least,) = quantiles(balance, 1.0 - density)
    return Competition(low, high, least, highest)


@on_task_vectors(survey=_survey_pcb, elementwise=True)
def pcb(deltas: Tensor, *, survey: Competition, density: float = 0.1, weights: Sequence[float] | None = None) -> Tensor:
    """PCB-Merging (Du et al. 2024, 2410.02396): entries compete within their task and with those of the other tasks.

    Over the flattened model, per task: `a` is ``|tau|`` clipped to its quantiles 1e-4 and 1 - 1e-4; intra-balancing
    `exp(T minmax(a)^2)`; inter-balancing `tanh(tau * sum_t tau)`; of their product the top share `density` is kept and
    scaled to [0, 1] as s. The result is `sum_t w_t sgn(tau_t) a_t s_t / sum_t s_t`. The authors' scale (or weights) is
    1.2 for density 0.1. `density=1` keeps all but the minimum. Where nothing competes (two opposite task vectors, whose
    balance is zero everywhere) s is 0, where the authors' code divides 0 by 0.
    """
    score = _balance(deltas, survey.low, survey.high)
    kept = _minmax(score, survey.least, survey.most)
    clipped = deltas.sign() * _clip(deltas, survey.low, survey.high)
    return (weigh(clipped, weights) * kept).sum(0) / kept.sum(0).clamp_min(1e-12)


def _balance(deltas: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Intra-balancing times inter-balancing, `(models, *shape)`."""
    spread = _minmax(deltas.abs(), low, high)
    return torch.exp(len(deltas) * spread.square()) * torch.tanh(deltas * deltas.sum(0))


def _clip(deltas: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return deltas.abs().clamp(per_model(low, deltas), per_model(high, deltas))


def _minmax(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clipped to each model's [low, high] and scaled to [0, 1]; 0 where the range is empty."""
    low, high = per_model(low, values), per_model(high, values)
    return ((values.clamp(low, high) - low) / (high - low)).where(high > low, 0.0)
