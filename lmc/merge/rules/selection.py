"""Task vectors of which single entries are chosen: by closeness, size, uniqueness, variance or importance.

All are called `method([a, b, ...], base=base, scale=1.0, ...)`; none needs data.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lmc.errors import InputError
from lmc.merge.engine.call import Parts, Pass, varies
from lmc.merge.engine.chunks import Latest
from lmc.merge.engine.method import on_task_vectors
from lmc.merge.engine.quantiles import kth_smallest
from lmc.merge.rules.task_vectors import as_numbers, check_task, per_model, summed


@on_task_vectors(elementwise=True)
def nearswap(deltas: Tensor, *, t: float) -> Tensor:
    """Every entry of the base moved towards another model by `t` at most: `base + clip(model - base, -t, t)`.

    After mergekit's `nearswap`, where t is about 1e-4 for large language models. `t=0` gives the base, a `t` of at least
    the largest difference the model.

    Raises:
        InputError: more or fewer than one model besides the base, or a negative `t`.
    """
    if len(deltas) != 1:
        raise InputError(f"nearswap takes exactly one model and a base, got {len(deltas)} models")
    if not t >= 0.0:
        raise InputError(f"t must not be negative, got {t}")
    return deltas[0].clamp(-t, t)


@on_task_vectors(elementwise=True)
def magmax(deltas: Tensor) -> Tensor:
    """MagMax (Marczak et al. 2024, 2407.06322): each entry from the task vector in which it is largest by magnitude.

    Of entries that are equally large the later model's counts. The paper's scale is 0.5.
    """
    largest = deltas[0]
    for delta in deltas[1:]:
        largest = torch.where(delta.abs() >= largest.abs(), delta, largest)
    return largest


@dataclass(frozen=True)
class Overlap:
    """RAM+'s first pass: by how much entries that one model alone changes are enlarged, of all tensors or of each.

    Attributes:
        deltas: the task vectors.
        ratio: `(models,)` for the whole model; None where each tensor has its own.
    """

    deltas: Pass
    ratio: Tensor | None
    _latest: Latest = field(default_factory=Latest)

    def factors(self, name: str, epsilon: float, boost: float, cap: float) -> Tensor:
        """`(models,)`: for the tensor `name`."""
        ratio = self.ratio
        if ratio is None:
            ratio = self._latest(name, "ratio", lambda: _ratio(self.deltas.of(name), epsilon))
        return 1.0 + boost * ratio.clamp(0.0, cap)


def _survey_ram(deltas: Pass, *, epsilon: Any, boost: Any, cap: Any, scope: Any, **_: Any) -> Overlap | None:
    if scope not in ("model", "tensor"):
        raise InputError(f"scope must be 'model' or 'tensor', got {scope!r}")
    if scope == "tensor":
        return Overlap(deltas, None)
    if boost == 0.0:
        return None
    if any(map(varies, (epsilon, boost, cap))):
        raise InputError("epsilon, boost and cap must be numbers where scope='model': they hold for the whole model")
    return Overlap(deltas, _ratio(deltas, epsilon))


def _ratio(deltas: Pass, epsilon: float) -> Tensor:
    """`(models,)`: the number of entries that a model shares with others for each that it changes alone."""
    shared, unique = torch.zeros(2, len(deltas.sets), dtype=torch.float64)
    for tensor in deltas:
        used = tensor.reshape(len(tensor), -1).abs() > epsilon
        several = used.sum(0) > 1
        shared += (used & several).sum(1).cpu()
        unique += (used & ~several).sum(1).cpu()
    return (shared / unique).where(unique > 0, 0.0)


@on_task_vectors(survey=_survey_ram, elementwise=True)
def ram(
    deltas: Tensor,
    *,
    survey: Overlap | None,
    name: str,
    epsilon: float = 1e-5,
    boost: float = 0.0,
    cap: float = 0.2,
    scope: Literal["model", "tensor"] = "model",
) -> Tensor:
    """RAM and RAM+ (Yuan et al. 2026, 2601.13572): what one task alone changes is kept, what several change is averaged.

    A task changes an entry where `|tau| > epsilon`; entries changed by several are the mean over those. `boost` (the
    paper's r, 0.1 for RAM+) multiplies what is model t's alone by `1 + boost clip(shared_t / unique_t, 0, cap)`, counted
    over the whole model, or over each tensor (`scope="tensor"`, mergekit's `ramplus_tl`, which takes the cap itself where
    nothing is the model's alone; here it is 0).
    """
    used = deltas.abs() > epsilon
    count = used.sum(0)
    kept = deltas * used
    if survey is not None and boost != 0.0:
        kept = kept * torch.where(count == 1, per_model(survey.factors(name, epsilon, boost, cap), deltas), 1.0)
    return kept.sum(0) / count.clamp_min(1)


@on_task_vectors(elementwise=True)
def sce(deltas: Tensor, *, parts: Parts, select: float = 1.0, dense: bool = False, least: float = 0.0) -> Tensor:
    """SCE (Wan et al. 2024, FuseChat, 2408.07990): select, calculate, erase, tensor by tensor.

    1. Select the share `select` of the positions whose variance over the models is not zero, the largest variances.
    2. Calculate the share of each model in proportion to its mean square there.
    3. Erase the entries that disagree with the sign of the sum; the rest is averaged with these shares.

    Of equal variances at the edge all are selected. As in mergekit, what is not selected stays at the base; with `dense=True`, as in the authors' script, the selection
    decides the shares alone. Where nothing is selected (identical models and `select < 1`) shares are equal, and so they
    are where the mean squares sum to no more than `least`: mergekit has 1e-6, below which those of fine-tuned language
    models usually are.

    Raises:
        InputError: `select` outside [0, 1].
    """
    if not 0.0 <= select <= 1.0:
        raise InputError(f"select, the share of positions, must be in [0, 1], got {select}")
    limit, share = parts.once(lambda whole: _calculated(whole, select, least, len(deltas)))
    chosen = deltas if select == 1.0 else deltas * as_numbers(variance(deltas) >= limit)
    acting = deltas if dense else chosen
    sign = (summed(acting) >= 0).to(acting).mul_(2.0).sub_(1.0)
    votes = as_numbers(acting * sign > 0) * per_model(share, acting)
    return summed(votes * acting) / summed(votes).clamp_min(torch.finfo(votes.dtype).tiny)  # where none agrees, 0


def variance(tensors: Tensor) -> Tensor:
    """Over the models, `(*shape)` of `(models, *shape)`; `tensor.var(0)` takes a hundred times as long for few of them."""
    if len(tensors) == 2:
        return (tensors[0] - tensors[1]).square_().mul_(0.25)
    mean = summed(tensors).div(len(tensors))
    total = torch.zeros_like(mean)
    for tensor in tensors:
        off = tensor - mean
        total.addcmul_(off, off)
    return total.div_(len(tensors))


def _calculated(parts: Parts, select: float, least: float, models: int) -> tuple[float, Tensor]:
    """The smallest variance that is selected, and `(models,)` the share of each model, of a whole tensor."""
    limit, size = 0.0, parts.size
    if select < 1.0:

        def variances(sample: bool = False) -> Iterator[Tensor]:
            for deltas in parts.sample() if sample else (values for _, values in parts):
                yield variance(deltas).reshape(1, -1)

        count = int(select * sum(int(torch.count_nonzero(found)) for found in variances()))
        found = kth_smallest(variances, [size + 1 - count], size, lambda: variances(True)) if count else None
        limit = math.inf if found is None else float(found[0])
    energy = torch.zeros(models, dtype=torch.float64)
    for _, deltas in parts:
        chosen = deltas if select == 1.0 else deltas * as_numbers(variance(deltas) >= limit)
        rows = chosen.reshape(models, -1)
        energy += torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square().cpu() / size
    total = float(energy.sum())
    return limit, energy / total if total > least else torch.full_like(energy, 1.0 / models)


@on_task_vectors
def arcee_fusion(deltas: Tensor, *, base: Tensor) -> Tensor:
    """The important entries of one model in place of the base's, all others of the base (mergekit's `arcee_fusion`).

    An entry's importance is `|b - a| KL(softmax(b) || softmax(a))`, the softmax and its divergence over its row (last
    axis); important is what reaches the median plus 1.5 times the distance of the quartiles within the tensor. Quantiles
    are exact here, where mergekit draws two samples of large tensors. Every entry is one of the two models'.

    Raises:
        InputError: more or fewer than one model besides the base.
    """
    if len(deltas) != 1:
        raise InputError(f"arcee_fusion takes exactly one model and a base, got {len(deltas)} models")
    delta = deltas[0]
    if delta.ndim == 0:
        return delta * 0.0
    p, q = ((x.softmax(-1) + 1e-8) for x in (base + delta, base))
    importance = delta.abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    low, middle, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return torch.where(importance >= middle + 1.5 * (high - low), delta, 0.0)


def _survey_emr(deltas: Pass, *, task: Any, **_: Any) -> Tensor:
    """`(models,)`: the sums over tensors of the mean `|tau_t|`, relative to those of what its mask leaves."""
    own, left = torch.zeros(2, len(deltas.sets), dtype=torch.float64)
    for name in deltas.sets.weights:
        size = deltas.sets.shells[name].numel()
        for tensor in deltas.of(name):
            united, masks = _united(tensor)
            own += tensor.abs().reshape(len(tensor), -1).sum(1).cpu() / size
            left += (united.abs() * masks).reshape(len(tensor), -1).sum(1).cpu() / size
    return (own / left).where(left > 0, 1.0)


@on_task_vectors(survey=_survey_emr, elementwise=True)
def emr(deltas: Tensor, *, survey: Tensor, task: int) -> Tensor:
    """EMR-Merging (Huang et al. 2024, 2405.17461): one united task vector under the mask and scale of one task.

    Elected is the sign of the mean (a mean of 0 counts as negative), united the largest magnitude that agrees with it.
    Task t's mask is where its own sign agrees; its scale restores the mean magnitude of its task vector. To keep all
    tasks, one vector, a bit per entry and task, and a number per task are stored.

    Args (besides those of all methods):
        task: the place of the model.

    Raises:
        InputError: a task that there is not.
    """
    check_task(task, len(deltas))
    united, masks = _united(deltas)
    return float(survey[task]) * united * masks[task]


def _united(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """The united task vector `(*shape)` and where each task agrees with it, `(models, *shape)`."""
    sign = torch.where(deltas.mean(0) > 0, 1.0, -1.0).to(deltas)
    masks = deltas * sign > 0
    return sign * (deltas.abs() * masks).amax(0), masks
