"""Task vectors of matrices, merged by their singular values and vectors.

Matrices are merged as they are, kernels of convolutions as matrices (filters, rest), which is an addition to the papers;
all other tensors (biases, norms) by the mean of their task vectors unless said otherwise. Embeddings count as matrices:
leave them out by `scale={"*": 1.0, "embed": 0.0}`.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lmc.errors import InputError
from lmc.merge.engine.method import on_task_vectors


@on_task_vectors
def tsv_m(deltas: Tensor) -> Tensor:
    """TSV-M (Gargiulo et al. 2025, 2412.00081): leading singular vectors of every task, whitened together.

    Of each of T task vectors the `min(out, in) // T` leading triples are kept; left and right vectors of all tasks are
    replaced by the nearest orthonormal ones (polar factors), the singular values kept. Where vectors of tasks coincide,
    the factor is a partial isometry, so that identical tasks give their truncated task vector. Tensors of fewer rows or
    columns than tasks are averaged.
    """

    def merged(tasks: Tensor) -> Tensor:
        kept = min(tasks.shape[1:]) // len(tasks)
        if kept == 0:
            return tasks.mean(0)
        triples = [_leading(task, kept) for task in tasks]
        left = _polar(torch.cat([u for u, _, _ in triples], 1))
        right = _polar(torch.cat([v for _, _, v in triples], 0))
        return (left * torch.cat([s for _, s, _ in triples])) @ right

    return _by_matrices(deltas, merged)


@on_task_vectors
def iso_c(deltas: Tensor) -> Tensor:
    """Iso-C (Marczak et al. 2025, 2502.04959): the sum of task vectors with all its singular values replaced by their mean.

    Directions that the sum does not have (singular values at the level of rounding) stay out, and out of the mean. The
    authors tune the scale, from 1.0 to 1.5 for eight tasks.
    """

    def merged(tasks: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(tasks.sum(0), full_matrices=False)
        used = _used(s, tasks.shape)
        return s[used].mean() * u[:, used] @ v[used] if bool(used.any()) else torch.zeros_like(tasks[0])

    return _by_matrices(deltas, merged)


@on_task_vectors
def iso_cts(deltas: Tensor, *, common: float = 0.8) -> Tensor:
    """Iso-CTS (Marczak et al. 2025, 2502.04959): a common subspace of the sum, and for every task some directions of its own.

    Of the r = min(out, in) directions the share `common`, rounded so that the rest divides among the T tasks, are the
    leading ones of the sum; each task adds the leading ones of what is outside their left space. All are made
    orthonormal (polar factors) and have the mean of their singular values.

    Raises:
        InputError: `common` outside [0, 1].
    """
    if not 0.0 <= common <= 1.0:
        raise InputError(f"common must be in [0, 1], got {common}")

    def merged(tasks: Tensor) -> Tensor:
        rank = min(tasks.shape[1:])
        own = (rank - int(common * rank)) // len(tasks)
        triples = [_leading(tasks.sum(0), rank - own * len(tasks))]
        shared = triples[0][0]
        triples += [_leading(task - shared @ (shared.T @ task), own) for task in tasks]
        left = _polar(torch.cat([u for u, _, _ in triples], 1))
        right = _polar(torch.cat([v for _, _, v in triples], 0))
        return torch.cat([s for _, s, _ in triples]).mean() * left @ right

    return _by_matrices(deltas, merged)


@on_task_vectors
def wudi(deltas: Tensor, *, rest: Literal["base", "mean"] = "base") -> Tensor:
    """WUDI-Merging (Cheng et al. 2025, 2503.08099): the matrix that disturbs the tasks least, on inputs that tau_t stands for.

    Minimises `sum_t |(tau - tau_t) tau_t^T|^2 / |tau_t|^2` in closed form, `tau = (sum_t tau_t G_t) (sum_t G_t)^+` with
    `G_t = tau_t^T tau_t / |tau_t|^2`, which is RegMean with task vectors in place of inputs. The authors take some
    hundred steps of Adam from the sum, which tends to it. Other tensors stay at the base, as theirs do, or are averaged
    (`rest="mean"`).

    Raises:
        InputError: an unknown `rest`.
    """
    if rest not in ("base", "mean"):
        raise InputError(f"rest must be 'base' or 'mean', got {rest!r}")

    def merged(tasks: Tensor) -> Tensor:
        wide = tasks.double()
        size = wide.square().sum((1, 2), keepdim=True)
        grams = wide.mT @ wide / size.where(size > 0, 1.0)
        return ((wide @ grams).sum(0) @ torch.linalg.pinv(grams.sum(0), hermitian=True)).to(tasks)

    return _by_matrices(deltas, merged, 0.0 if rest == "base" else 1.0)


def _by_matrices(deltas: Tensor, merged: Callable[[Tensor], Tensor], otherwise: float = 1.0) -> Tensor:
    """`merged` of `(models, out, in)`; of vectors `otherwise` times the mean. A lone task vector is left as it is."""
    if len(deltas) == 1 and (deltas.ndim > 2 or otherwise):
        return deltas[0]
    if deltas.ndim < 3:
        return otherwise * deltas.mean(0)
    return merged(deltas.flatten(2)).reshape(deltas.shape[1:])


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples: `(out, count)`, `(count,)`, `(count, in)`."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :count], s[:count], v[:count]


def _polar(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are 1, or 0 where the matrix has none: its partial polar factor."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    used = _used(s, matrix.shape)
    return u[:, used] @ v[used]


def _used(values: Tensor, shape: torch.Size) -> Tensor:
    """A mask of the singular values above the rounding of a matrix of that shape."""
    return values > values[:1] * max(shape) * torch.finfo(values.dtype).eps
