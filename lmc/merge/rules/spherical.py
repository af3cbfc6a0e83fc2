"""Relatives of SLERP as mergekit has them: for weights of two models, and for any number of models."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmc.errors import InputError
from lmc.merge.engine.chunks import Cut
from lmc.merge.engine.method import on_tensors
from lmc.merge.engine.options import coefficients
from lmc.merge.rules.averaging import average
from lmc.network.moments import Moments


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
        if len(tensors) > 2 and bool((norms > 0).any()):
            raise InputError("multislerp: the directions of the models cancel out; use average or karcher_mean")
        pull, length, norms = share, 1.0, torch.ones_like(norms)
    factors = (pull / length * float(share @ norms)).to(tensors)
    steps = tensors if base is None else tensors - base
    move = torch.einsum("m,m...->...", factors, steps)
    return move if base is None else base + move
