"""Task arithmetic and its sparse relatives: what to keep of each task vector, and how to add up the rest.

A task vector is `tau_t = theta_t - theta_0` (fine-tuned model minus base). Every method here is called
`method([a, b, ...], base=base, scale=1.0, ...)` and gives `base + scale * merged(tau)`. `density` is the share of
entries kept. Scaling is the common trap: a *sum* over T tasks wants a scale near `1/T` (0.3 for 8 tasks, 0.4 to 0.5 for
2 to 4), the *mean* over agreeing tasks of TIES wants about 1.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lmc.core.context import own_context
from lmc.errors import InputError
from lmc.merge.engine.call import Parts, Uniform, coefficients
from lmc.merge.engine.chunks import Cut
from lmc.merge.engine.method import on_task_vectors
from lmc.merge.engine.tensors import weight_sets
from lmc.weights import ModelOrWeights, StateDict

Combine = Literal["sum", "mean", "ties", "ties-sum"]
Normalize = Literal["weights", "count", "none"]
Together = Literal["filter", "row", "tensor"]
Rescale = Literal["keep", "l1", "l2", "none"]

STRETCH = 512  # numbers that are added up in their own dtype before float64


@own_context
def task_vector(weights: ModelOrWeights, *, base: ModelOrWeights) -> StateDict:
    """`weights - base` for every weight, in float32 or wider; not for statistics, integers and aliases of a tied tensor.

    Ilharco et al. 2023 (2212.04089), section 2.
    """
    sets = weight_sets([weights], base)
    return StateDict((name, sets.deltas(name)[0]) for name in sets.weights)


@on_task_vectors(elementwise=True)
def task_arithmetic(deltas: Tensor, *, weights: Sequence[float] | None = None) -> Tensor:
    """`theta_0 + scale * sum_t w_t tau_t` (Ilharco et al. 2023, 2212.04089).

    Adding: `scale` 0.3 for eight tasks in the paper, chosen on validation data from 0, 0.05, ..., 1. Forgetting: a
    negative scale. Analogies: `task_arithmetic([c, b, a], base=base, weights=[1, 1, -1])`. `scale=1/T` is the mean of
    the models.
    """
    return combine(deltas, "sum", weights)


def _rows_or_whole(*, rescale: Rescale = "keep", **_: object) -> Cut:
    """Whole tensors where `rescale` asks for their norms."""
    return "rows" if rescale in ("keep", "none") else "whole"


@on_task_vectors(elementwise=True)
def dare(
    deltas: Tensor,
    *,
    uniform: Uniform,
    parts: Parts,
    density: float | Sequence[float] = 0.5,
    rescale: Rescale = "keep",
    combine_by: Combine = "sum",
    weights: Sequence[float] | None = None,
) -> Tensor:
    """DARE (Yu et al. 2024, 2311.03099): drop entries at random, divide the rest by `density`, so that the mean stays.

    Each entry of each task vector is kept with probability `density = 1 - p`, one for all or one per model. It works while task vectors are small
    (about 0.005). Each model's mask depends on `seed`, the tensor's name and its place in the list. To leave tensors
    whole, as the authors do with classifier heads: `density={"*": 0.1, "head": 1.0}`. `combine_by="ties"` is DARE-TIES
    ("ties-sum" without its normalisation, mergekit's default). Where another tool rescales to the old L1 norm of each tensor,
    that is `rescale="l1"`, which goes through each tensor twice.
    """
    shares = densities(density, len(deltas))
    if rescale in ("l1", "l2"):
        order = 1 if rescale == "l1" else 2
        factors, masks = parts.once(lambda whole: _restoring(whole, uniform, shares, order))
        kept = deltas * _unpacked(masks[uniform.chunk and uniform.chunk.start], deltas)
        return combine(kept * per_model(factors, kept), combine_by, weights)
    kept = deltas * as_numbers(uniform(deltas) < per_model(shares, deltas))
    return combine(_rescale(kept, deltas, per_model(shares, deltas), rescale), combine_by, weights)


def _restoring(
    parts: Parts, uniform: Uniform, shares: Sequence[float], order: int
) -> tuple[Tensor, dict[int | None, np.ndarray]]:
    """`(models,)`: the norm of each whole tensor over that of what is kept of it; and what is kept, a bit for each entry, by
    the starts of chunks."""
    before, after = torch.zeros(2, len(shares), dtype=torch.float64)
    masks: dict[int | None, np.ndarray] = {}
    for chunk, deltas in parts:
        keep = uniform.at(chunk)(deltas) < per_model(shares, deltas)
        masks[chunk and chunk.start] = np.packbits(keep.cpu().numpy())
        sizes = deltas.abs().reshape(len(deltas), -1)
        for norms, values in ((before, sizes), (after, sizes * as_numbers(keep).reshape(sizes.shape))):
            norms += _sums(values) if order == 1 else values.double().square().sum(1).cpu()
    return (before / after).pow(1 / order).where(after.pow(1 / order) > 1e-7, 1.0), masks


def _sums(values: Tensor) -> Tensor:
    """`(models,)`: the sums of `(models, entries)` in float64, those of short stretches first, in their own dtype."""
    whole = values.shape[1] // STRETCH * STRETCH
    short = torch.cat([values[:, :whole].reshape(len(values), -1, STRETCH).sum(-1), values[:, whole:]], 1)
    return short.sum(1, dtype=torch.float64).cpu()


def as_numbers(mask: Tensor) -> Tensor:
    """A mask as 0 and 1: products with these take half the time of products with booleans, and `where` many times as long."""
    return mask.view(torch.uint8)


def _unpacked(bits: np.ndarray, like: Tensor) -> Tensor:
    """A mask of bits in the shape of a tensor."""
    found = torch.from_numpy(np.unpackbits(bits, count=like.numel()))
    return found.view(like.shape).to(like.device)


@on_task_vectors(cut=_rows_or_whole)
def della(
    deltas: Tensor,
    *,
    uniform: Uniform,
    density: float | Sequence[float] = 0.7,
    epsilon: float | Sequence[float] = 0.07,
    rescale: Rescale = "keep",
    combine_by: Combine = "ties",
    weights: Sequence[float] | None = None,
) -> Tensor:
    """DELLA (Deep et al. 2024, 2406.11617): drop small entries more often than large ones, then elect signs as in TIES.

    MagPrune: within each row (last axis; a vector is one row) the chance to survive rises linearly with the rank of
    `|tau|`, from `density - epsilon` to `density + epsilon`; survivors are divided by their own chance. `epsilon` is
    half the paper's window (0.14); both are one number or one per model. Rows of one entry have chance `density`. `epsilon=0` is DARE; `rescale="l1"`
    restores the L1 norm of each tensor instead, which is biased entry by entry and holds whole tensors in memory.

    Raises:
        InputError: chances that leave (0, 1].
    """
    kept, window = densities(density, len(deltas)), each(epsilon, len(deltas), "epsilon")
    if any(e < 0 or d - e <= 0 or d + e > 1 for d, e in zip(kept, window, strict=True)):
        raise InputError(f"density {density} +- epsilon {epsilon} must be in (0, 1]")
    length = deltas.shape[-1] if deltas.ndim > 1 else 1
    middle, half = per_model(kept, deltas), per_model(window, deltas)
    rank = _ranks(deltas.abs())
    chance = middle + half * (2.0 * rank / (length - 1) - 1.0) if length > 1 else middle.expand_as(deltas)
    keep = uniform(deltas) < chance
    return combine(_rescale(deltas * keep, deltas, chance, rescale), combine_by, weights)


_CUTS: dict[str, Cut] = {"filter": "filters", "row": "rows", "tensor": "whole"}


def _together(*, scope: Together = "filter", **_: object) -> Cut:
    if scope not in _CUTS:
        raise InputError(f"scope must be 'filter', 'row' or 'tensor', got {scope!r}")
    return _CUTS[scope]


@on_task_vectors(cut=_together)
def breadcrumbs(
    deltas: Tensor,
    *,
    name: str,
    density: float | Sequence[float] = 0.15,
    outliers: float | Sequence[float] = 0.006,
    scope: Together = "filter",
    combine_by: Combine = "sum",
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Model Breadcrumbs (Davari, Belilovsky 2024, 2312.06795): drop the smallest entries and the largest outliers.

    By `|tau|`, of the top share `density` (the authors' beta) the top share `outliers` (gamma) is dropped, so
    `density - outliers` is kept, both counts rounded but one entry at least; both are one number or one per model. The authors' script uses 0.15, 0.006 and
    scale 0.2.

    Ranked together is a `"filter"` (what is at one place of the first axis; the row of a matrix; a vector is one), which
    is what the authors do for matrices. `scope="row"` is their code taken literally: the last axis of every tensor,
    which of a 3 x 3 kernel is three entries, of which 0.15 rounds to none and is refused. `scope="tensor"` ranks whole
    tensors as mergekit does, whose density d and gamma g are `density=d + g, outliers=g` here.

    Raises:
        InputError: unless 0 <= outliers <= density <= 1, or rows that are too short to keep anything.
    """
    shares, dropped = densities(density, len(deltas)), each(outliers, len(deltas), "outliers")
    for share, drop in zip(shares, dropped, strict=True):
        if not 0.0 <= drop <= share:
            raise InputError(f"outliers must be in [0, density = {share}], got {drop}")
    # (models, groups, entries): what is ranked together; a vector is one group
    groups = (1,) if deltas.ndim < 3 or scope == "tensor" else deltas.shape[1 : -1 if scope == "row" else 2]
    rows = deltas.reshape(len(deltas), math.prod(groups), -1)
    crumbs = torch.zeros_like(rows)
    for own, crumb, share, drop in zip(rows, crumbs, shares, dropped, strict=True):
        length = rows.shape[-1]
        last, first = round(share * length), round(drop * length)
        if last <= first and share > drop:
            if scope == "row" and deltas.ndim > 2:
                raise InputError(
                    f"{name}: density {share} keeps no entry of rows of {length}; rank filters instead, scope='filter'"
                )
            last = first + 1 if first < length else length
            first = last - 1
        top = own.abs().topk(last, dim=-1).indices[..., first:]
        crumb.scatter_(-1, top, own.gather(-1, top))
    return combine(crumbs.reshape(deltas.shape), combine_by, weights)


def combine(deltas: Tensor, how: Combine, weights: Sequence[float] | None = None) -> Tensor:
    """`(models, *shape)` task vectors into one.

    Their weighted sum; their weighted mean, `sum_t w_t tau_t / sum_t w_t`; or, of the entries that agree with the
    elected sign (TIES), the weighted mean ("ties") or the weighted sum ("ties-sum").
    """
    if how not in ("sum", "mean", "ties", "ties-sum"):
        raise InputError(f"combine_by must be 'sum', 'mean', 'ties' or 'ties-sum', got {how!r}")
    if how in ("ties", "ties-sum"):
        return elect(deltas, weights, normalize="weights" if how == "ties" else "none")
    total = weighed_sum(deltas, weights)
    if how == "sum":
        return total
    whole = sum(coefficients(weights, len(deltas)))
    if abs(whole) < 1e-12:
        raise InputError(f"weights: {weights} sum to 0, so that their mean is not defined")
    return total / whole


def summed(tensors: Tensor) -> Tensor:
    """The sum over the models, one after the other, which for few is faster than `sum(0)`."""
    total = tensors[0] + tensors[1] if len(tensors) > 1 else tensors[0]
    for tensor in tensors[2:]:
        total = total.add_(tensor)
    return total


def weighed_sum(tensors: Tensor, weights: Sequence[float] | None) -> Tensor:
    """The sum over the models of each times its weight, with fewer roundings and in less time than `weigh` and a sum."""
    values = coefficients(weights, len(tensors))
    if all(value == 1.0 for value in values):
        return summed(tensors)
    total = tensors[0] * values[0]
    for tensor, value in zip(tensors[1:], values[1:], strict=True):
        total = total.add_(tensor, alpha=value)
    return total


def weigh(deltas: Tensor, weights: Sequence[float] | None) -> Tensor:
    """Each of `(models, *shape)` times its weight."""
    values = coefficients(weights, len(deltas))
    return deltas if all(value == 1.0 for value in values) else deltas * per_model(values, deltas)


def per_model(values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """One number per model, shaped `(models, 1, ..., 1)` to go with `(models, *shape)`."""
    tensor = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return tensor.reshape(-1, *[1] * (like.ndim - 1))


def elect(
    deltas: Tensor, weights: Sequence[float] | None = None, undecided: float = 0.0, normalize: Normalize = "weights"
) -> Tensor:
    """The mean over the entries that have the sign of their sum; zeros do not count (TIES, Algorithm 1, steps 2 and 3).

    Args:
        deltas: `(models, *shape)`, already trimmed.
        weights: one number per model; signs are elected by the weighted task vectors.
        undecided: the sign (-1, 0 or 1) for positions whose sum is exactly zero; with 0 they stay zero.
        normalize: the sum over the models that agree is divided by the sum of their weights (absolute values), by
            their number, or by nothing.
    """
    if normalize not in ("weights", "count", "none"):
        raise InputError(f"normalize must be 'weights', 'count' or 'none', got {normalize!r}")
    weighted = weigh(deltas, weights)
    sign = summed(weighted).sign_() if len(deltas) > 1 else weighted[0].sign()
    if undecided:
        sign.add_(1.0 - sign.abs(), alpha=undecided)
    agreeing = (weighted * sign).relu_()  # magnitudes
    total = summed(agreeing) * sign
    if normalize == "none":
        return total
    votes = agreeing.sign_()
    if normalize == "weights" and weights is not None:
        votes = votes * per_model(coefficients(weights, len(deltas)), deltas).abs()
    divisor = summed(votes).clamp_min(torch.finfo(votes.dtype).tiny)  # where none agrees the total is 0
    return total / divisor


def _rescale(kept: Tensor, deltas: Tensor, chance: float | Tensor, how: Rescale) -> Tensor:
    if how == "keep":
        return kept / chance
    if how == "none":
        return kept
    if how not in ("l1", "l2"):
        raise InputError(f"rescale must be 'keep', 'l1', 'l2' or 'none', got {how!r}")
    order = 1 if how == "l1" else 2
    before, after = (x.reshape(len(x), -1).norm(order, dim=1) for x in (deltas, kept))
    return kept * per_model((before / after).where(after > 1e-7, 1.0), kept)


def _ranks(values: Tensor) -> Tensor:
    """The rank (0 = smallest; equal values in order of position) of each entry within its row, the last axis."""
    if values.ndim == 1:  # one number per model: each is a row of its own
        return torch.zeros_like(values)
    order = values.argsort(dim=-1, stable=True)
    places = torch.arange(values.shape[-1], dtype=values.dtype, device=values.device).expand_as(values)
    return torch.empty_like(values).scatter_(-1, order, places)


def check_task(task: int, count: int) -> None:
    """Raise `InputError` unless `task` is the place of one of `count` models."""
    if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < count:
        raise InputError(f"task must be the place of a model, 0 to {count - 1}, got {task!r}")


def densities(density: float | Sequence[float], count: int) -> list[float]:
    """The share of entries kept of each model, checked."""
    found = each(density, count, "density")
    if not all(0.0 < share <= 1.0 for share in found):
        raise InputError(f"density, the share of entries kept, must be in (0, 1], got {density}")
    return found


def each(value: float | Sequence[float], count: int, what: str) -> list[float]:
    """One number for all models, or one for each, as a list."""
    return coefficients([value] * count if isinstance(value, int | float) else value, count, what)
