"""Averages of weights: arithmetic, along a trajectory, on the sphere, towards a base, and of unrelated models.

None needs data. After any of them, BatchNorm statistics want a re-estimation (`lmc.recalibrate_batchnorm`).
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.errors import InputError
from lmc.merge.engine.call import coefficients
from lmc.merge.engine.chunks import Cut
from lmc.merge.engine.method import linear, on_tensors
from lmc.merge.engine.tensors import weight_sets
from lmc.merge.rules.task_vectors import weighed_sum
from lmc.network.derived import gauged, settled
from lmc.network.moments import Moments, precise
from lmc.weights import ModelOrWeights, StateDict, Weights, as_weights, check_compatible
from lmc.weights.state import wide


@linear
def average(count: int, *, weights: Sequence[float] | None = None) -> list[float]:
    """The weighted mean `sum_i w_i theta_i / sum_i w_i` (default: all equal), as `numpy.average` does it.

    With equal weights it is the uniform soup (Wortsman et al. 2022, 2203.05482, section 2), checkpoint averaging over
    snapshots or runs (Schmidt et al. 2023, 2305.16834) and the fused base of Choshen et al. (2022, 2204.03044).
    Negative weights extrapolate. `weights={"*": [0.5, 0.5], "layers.3": [1, 0]}` sets them per layer.

    Raises:
        InputError: not one finite weight per model, or weights that sum to 0.
    """
    values = coefficients(weights, count)
    if abs(sum(values)) < 1e-12:
        raise InputError(f"weights: {values} sum to 0, so that their average is not defined")
    return [value / sum(values) for value in values]


@on_tensors(elementwise=True, alone=True)
def weighted_sum(tensors: Tensor, *, weights: Sequence[float] | None = None) -> Tensor:
    """`sum_i w_i theta_i`, the weights as they are: they need not sum to 1 (default: all 1).

    What other tools call "linear" without normalisation and, of one model, "passthrough" with a factor: with weight 0 on
    the last projection of a residual branch the branch is skipped.
    """
    return weighed_sum(tensors, weights)


@linear
def metrics_weighted(
    count: int, *, losses: Sequence[float] | None = None, scores: Sequence[float] | None = None, power: float = 1.0
) -> list[float]:
    """An average with weights `q_i^power / sum_j q_j^power` from one metric per model: `q = 1 / loss` or `q = score`.

    After metrics-weighted averaging (Wang, Choi 2025, 2504.18580), which weights the checkpoints of one run by training
    loss or by step (give the steps as scores). The paper's exact rule, with its penalty factor, could not be obtained:
    this family with one exponent stands for it. `power=0` is the plain mean; a large power picks the best model.

    Raises:
        InputError: not exactly one of `losses` and `scores`, not one value per model, or a value that is not positive.
    """
    if (losses is None) == (scores is None):
        raise InputError("give either losses= (smaller is better) or scores= (larger is better)")
    what, given = ("losses", losses) if losses is not None else ("scores", scores)
    values = torch.tensor(coefficients(given, count, what), dtype=torch.float64)
    if not bool((values > 0).all()):
        raise InputError(f"{what}: {values.tolist()} must all be positive")
    return torch.softmax(values.log() * (-power if losses is not None else power), 0).tolist()


@own_context
def swa(checkpoints: Iterable[ModelOrWeights]) -> StateDict:
    """Stochastic weight averaging: the running mean of the checkpoints (Izmailov et al. 2018, 1803.05407, Algorithm 1).

    `checkpoints` is any iterable, read once: one copy of the weights is held, so a training loop may yield its model.
    Integer tensors come from the last checkpoint.
    """
    return _running(checkpoints, lambda t: 1.0 / t)


@own_context
def ema(checkpoints: Iterable[ModelOrWeights], *, decay: float = 0.999, bias_correction: bool = False) -> StateDict:
    """The exponential moving average `m <- decay m + (1 - decay) theta` over any iterable, read once.

    It starts at the first checkpoint; with `bias_correction`, at zero, divided by `1 - decay^t` (as Adam's moments).
    The window is about `1 / (1 - decay)` checkpoints; `decay=0` gives the last one.
    """
    if not 0.0 <= decay < 1.0:
        raise InputError(f"decay must be in [0, 1), got {decay}")
    if bias_correction:
        return _running(checkpoints, lambda t: (1.0 - decay) / (1.0 - decay**t))
    return _running(checkpoints, lambda t: 1.0 if t == 1 else 1.0 - decay)


@own_context
def lawa(checkpoints: Iterable[ModelOrWeights], *, window: int = 6) -> StateDict:
    """The mean of the `window` latest checkpoints (LAWA: Kaddour 2022, 2209.14981; the paper's default is 6)."""
    if window < 1:
        raise InputError(f"window must be at least 1, got {window}")
    latest: deque[Weights] = deque(maxlen=window)
    for checkpoint in checkpoints:
        latest.append({name: tensor.clone() for name, tensor in as_weights(checkpoint).items()})
    return average(latest)


def _running(checkpoints: Iterable[ModelOrWeights], step: Callable[[int], float]) -> StateDict:
    """`m <- m + step(t) (theta_t - m)` for t = 1, 2, ...; step(1) = 1."""
    total: Weights = {}
    last: Weights = {}
    ties: Mapping[str, str] = {}
    for t, checkpoint in enumerate(checkpoints, start=1):
        module = checkpoint if isinstance(checkpoint, nn.Module) else None
        previous, last = last, gauged(as_weights(checkpoint), module)
        sets = weight_sets([last])
        if t == 1:
            total = {name: torch.zeros_like(last[name], dtype=wide(last[name].dtype)) for name in sets.names}
            previous, ties = last, sets.ties
        check_compatible(previous, last, (f"checkpoint {t - 1}", f"checkpoint {t}"))
        for name in total:
            tensor = sets.stack(name)[0]
            total[name] = total[name].to(widest := wide(tensor.dtype, total[name].dtype))
            total[name].lerp_(tensor.to(widest), step(t))
    if not last:
        raise InputError("no checkpoints: the iterable is empty")
    result = StateDict(like=last)
    for name, tensor in last.items():
        if name in ties:
            result[name] = result[ties[name]]
        else:
            result[name] = total[name].to(tensor.dtype) if name in total else tensor.clone()
    return settled(result, last)


@on_tensors(shares=lambda t, **_: [1.0 - t, t], elementwise=True)
def slerp(
    tensors: Tensor,
    *,
    moments: Callable[[], Moments],
    t: float = 0.5,
    lerp_above: float = 0.9995,
    base: Tensor | None = None,
) -> Tensor:
    """Spherical interpolation of two models: at `t=0` the first, at `t=1` the second, tensor by tensor.

    `sin((1-t) W)/sin(W) u + sin(t W)/sin(W) v` with the angle W between the flattened tensors (Shoemake 1985). Tensors
    that are parallel or opposite up to `|cos| > lerp_above`, or zero, are interpolated linearly, as other merging tools
    do; `lerp_above=1` leaves only those where the formula is undefined. With a base, the task vectors are interpolated
    and added to it.

    Raises:
        InputError: more or fewer than two models.
    """
    if len(tensors) != 2:
        raise InputError(f"slerp takes exactly 2 models, got {len(tensors)}; karcher_mean takes any number")
    if t in (0.0, 1.0):
        return tensors[int(t)]
    u, v = tensors if base is None else tensors - base
    first, second = _on_the_arc(moments().gram, t, lerp_above)
    move = torch.add(u * first, v, alpha=second)
    return move if base is None else base + move


def _on_the_arc(gram: Tensor, t: float, lerp_above: float) -> tuple[float, float]:
    """SLERP's coefficients from the `(2, 2)` inner products of two tensors."""
    norms = math.sqrt(gram[0, 0] * gram[1, 1])
    if norms > 0.0:
        cosine = float(gram[0, 1]) / norms
        sine = math.sqrt(max(0.0, 1.0 - cosine * cosine))
        if abs(cosine) <= lerp_above and sine >= 1e-6:
            angle = math.atan2(sine, cosine)
            return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine
    return 1 - t, t


@on_tensors(elementwise=True)
def karcher_mean(
    tensors: Tensor,
    *,
    moments: Callable[[], Moments],
    weights: Sequence[float] | None = None,
    iterations: int = 10,
    tolerance: float = 1e-5,
) -> Tensor:
    """The Karcher (Frechet) mean on the sphere, tensor by tensor: SLERP for any number of models.

    The flattened tensors are normalised; `m <- exp_m(sum_i w_i log_m(v_i))` from their normalised mean until the step
    is shorter than `tolerance`; the result has the weighted mean of their norms. Two models of equal norm give
    `slerp(t=w_2)`. Tensors that are all zero have no direction and count only in the norm.

    Raises:
        InputError: weights that sum to 0, also those of the tensors that are not zero.
    """
    share = torch.tensor(average.method.rule(len(tensors), weights=weights), dtype=torch.float64)
    gram = moments().gram
    norms = gram.diagonal().sqrt()
    alive = (norms > 0) & (share != 0)
    if not bool(alive.any()):
        return torch.zeros_like(tensors[0])
    whole = share[alive].sum()
    if abs(float(whole)) < 1e-12:
        raise InputError("karcher_mean: the weights of the tensors that are not zero sum to 0")
    pull = share[alive] / whole
    mean = _on_the_sphere(gram[alive][:, alive] / torch.outer(norms[alive], norms[alive]), pull, iterations, tolerance)
    factors = torch.zeros_like(share)
    factors[alive] = mean / norms[alive] * (share @ norms)
    return torch.einsum("m,m...->...", factors.to(tensors), tensors)


def _on_the_sphere(cosines: Tensor, pull: Tensor, iterations: int, tolerance: float) -> Tensor:
    """`(models,)`: coefficients of the Karcher mean in unit vectors with these `(models, models)` inner products.

    It is in their span, as do all steps towards it, so that no vector is needed.
    """

    def length(vector: Tensor) -> Tensor:
        return (vector @ cosines @ vector).clamp_min(0.0).sqrt()

    mean = pull / length(pull)
    if length(pull) <= 1e-6:  # opposite points: stay at the heaviest
        mean = torch.zeros_like(pull)
        mean[pull.argmax()] = 1.0
    for _ in range(iterations):
        cosine = (cosines @ mean).clamp(-1.0, 1.0)
        sine = (1.0 - cosine.square()).sqrt()
        turn = (torch.atan2(sine, cosine) / sine).where(sine > 1e-7, (cosine > 0).to(sine))  # opposite: no direction
        towards = pull * turn
        step = towards - (towards @ cosine) * mean
        size = length(step)
        if size < tolerance or size == 0.0:
            break
        mean = size.cos() * mean + size.sin() * step / size
        mean = mean / length(mean)
    return mean


def _stock_cut(*, filter_wise: bool = False, row_wise: bool = False, **_: object) -> Cut:
    if filter_wise and row_wise:
        raise InputError("filter_wise and row_wise: choose one")
    return "filters" if filter_wise else "rows" if row_wise else "entries"


@on_tensors(cut=_stock_cut)
def model_stock(
    tensors: Tensor,
    *,
    moments: Callable[[], Moments],
    base: Tensor,
    filter_wise: bool = False,
    row_wise: bool = False,
    signed: bool = False,
) -> Tensor:
    """Model Stock (Jang, Yun, Han 2024, 2403.19522): between the mean of N fine-tuned models and their base.

    `t mean_i theta_i + (1-t) base` with `t = N cos / (1 + (N-1) cos)` (equation 6), cos the mean cosine between two
    task vectors: per tensor; with `filter_wise` per filter, what is at one place of the first axis; with `row_wise` per
    row of the last axis, which mergekit calls filter-wise and which of a convolution is a few entries. A vector is one
    filter and one row. `t` is 0 where the cosine is not positive (the formula has a pole at `-1/(N-1)`) and 1 where a task
    vector is zero; with `signed`, as in mergekit, it becomes negative there, and a task vector of zero has cosine 0. A
    lone model is given back.
    """
    deltas = tensors - base
    count = len(deltas)
    shape = deltas.shape[1:-1] if row_wise else deltas.shape[1:2] if filter_wise and deltas.ndim > 2 else (1,)
    rows = deltas.reshape(count, math.prod(shape), -1)
    if filter_wise or row_wise:
        filters = precise(rows)
        gram = torch.einsum("irn,krn->rik", filters, filters)
    else:
        gram = moments().gram[None]
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    cosines = gram / (norms[:, :, None] * norms[:, None, :]).clamp_min(1e-60)
    cosine = (cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))
    pole = 1 + (count - 1) * cosine
    t = (count * cosine / pole).where(pole.abs() >= 1e-6, 0.0)
    if not signed:
        t = t.clamp(0, 1).where(cosine > 0, 0.0).where((norms > 0).all(1), 1.0)
    t = t.to(rows)
    move = (rows.mean(0) * t[:, None]).reshape(base.shape)
    return base + move


@on_tensors(cut="rows")  # vectors, which are averaged plainly, are never cut
def variance_corrected(
    tensors: Tensor, *, moments: Callable[[], Moments], weights: Sequence[float] | None = None
) -> Tensor:
    """The mean of unrelated models, with the variance that averaging took away given back.

    `(W - m) sqrt(v / Var(W)) + m` for matrices and kernels, where W is the mean of the N tensors, m its mean value and
    v the mean of their N variances (Tian et al. 2024, 2404.04616): averaging N uncorrelated tensors divides the
    variance by N. Not for models of one basin, where a smaller variance is noise removed. Vectors (biases, norms) are
    averaged plainly.
    """
    share = torch.tensor(average.method.rule(len(tensors), weights=weights), dtype=torch.float64)
    mean = torch.einsum("m,m...->...", share.to(tensors), tensors)
    if mean.ndim < 2:
        return mean
    found = moments()
    remaining = float(share @ found.covariances @ share)
    if remaining <= 0.0:
        return mean
    centre = float(share @ found.means)
    return (mean - centre) * math.sqrt(float(found.covariances.diagonal().mean()) / remaining) + centre


@own_context
def mix_experts(models: Sequence[ModelOrWeights], *, beta: float) -> list[StateDict]:
    """Each expert takes a share of all others: `(1 - beta) E_i + beta / (E - 1) sum_{j != i} E_j`.

    Done after every optimiser step while training (Huang et al. 2023, 2308.06093), with a small, growing `beta`; at the
    end the experts are replaced by their `average`. The normalisation of the mix is ours: the paper's could not be
    read. With `beta = (E - 1) / E` all experts become their mean at once.

    Raises:
        InputError: no models, or a `beta` outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise InputError(f"beta must be in [0, 1], got {beta}")
    count = len(models)
    if count < 2:
        return [average(models)]
    shares = [[1.0 - beta if i == j else beta / (count - 1) for j in range(count)] for i in range(count)]
    return [average(models, weights=row) for row in shares]


def _rows_or_whole(*, row_wise: bool = False, **_: object) -> Cut:
    return "rows" if row_wise else "whole"


@on_tensors(cut=_rows_or_whole)
def nuslerp(
    tensors: Tensor, *, weights: Sequence[float] | None = None, row_wise: bool = False, base: Tensor | None = None
) -> Tensor:
    """SLERP of two models by weights, `t = w_2 / (w_1 + w_2)`, of whole tensors or of each row (mergekit's `nuslerp`).

    With a base, task vectors are interpolated and added to it. Rows are along the last axis; a vector is one row. (What
    mergekit calls row-wise normalises along axis 0.) Parallel, opposite and zero rows are interpolated linearly.

    Raises:
        InputError: more or fewer than two models.
    """
    if len(tensors) != 2:
        raise InputError(f"nuslerp takes exactly 2 models, got {len(tensors)}; multislerp takes any number")
    first, second = coefficients(weights, 2)
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    u, v = tensors if base is None else tensors - base
    shape = u.shape
    if not (row_wise and u.ndim > 1):
        u, v = u.reshape(1, -1), v.reshape(1, -1)
    norms = u.norm(dim=-1, keepdim=True) * v.norm(dim=-1, keepdim=True)
    cosine = ((u * v).sum(-1, keepdim=True) / norms.clamp_min(1e-30)).clamp(-1.0, 1.0)
    angle = cosine.acos()
    sine = angle.sin()
    arc = (norms > 0) & (sine > 1e-6)
    sine = sine.where(arc, 1.0)
    a = torch.where(arc, ((1.0 - t) * angle).sin() / sine, 1.0 - t)
    b = torch.where(arc, (t * angle).sin() / sine, t)
    move = (a * u + b * v).reshape(shape)
    return move if base is None else base + move


@on_tensors(elementwise=True)
def multislerp(
    tensors: Tensor,
    *,
    moments: Callable[[], Moments],
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """The weighted mean of the directions of any number of models, at their mean length (mergekit's `multislerp`).

    `normalise(sum_i w_i v_i / |v_i|) sum_i w_i |v_i|` tensor by tensor: two models with equal weights and norms give
    `slerp(t=0.5)`; the intrinsic mean of more is `karcher_mean`. With a base, task vectors are averaged so. Tensors that
    are zero have no direction.

    Raises:
        InputError: directions that cancel out, of more than two models; of two the plain mean is taken.
    """
    share = torch.tensor(average.method.rule(len(tensors), weights=weights), dtype=torch.float64)
    gram = moments().gram
    norms = gram.diagonal().clamp_min(0.0).sqrt()
    pull = (share / norms).where(norms > 0, 0.0)
    length = float((pull @ gram @ pull).clamp_min(0.0).sqrt())
    if length < 1e-8:
        if len(tensors) > 2 and bool((pull != 0).any()):
            raise InputError("multislerp: the directions of the models cancel out; use average or karcher_mean")
        pull, length, norms = share, 1.0, torch.ones_like(norms)
    factors = (pull / length * float(share @ norms)).to(tensors)
    steps = tensors if base is None else tensors - base
    move = torch.einsum("m,m...->...", factors, steps)
    return move if base is None else base + move
