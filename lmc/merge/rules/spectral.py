"""Task vectors of matrices, merged by their singular values and vectors.

Matrices are merged as they are, kernels of convolutions as matrices (filters, rest), which is an addition to the papers;
all other tensors (biases, norms) by the mean of their task vectors unless said otherwise. Embeddings count as matrices:
leave them out by `scale={"*": 1.0, "embed": 0.0}`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lmc.errors import InputError
from lmc.merge.engine.call import Pass, coefficients
from lmc.merge.engine.method import on_task_vectors
from lmc.merge.rules.task_vectors import Combine, combine, elect, weigh
from lmc.merge.rules.ties import Scope, Trim, survey_ties, trim


@on_task_vectors
def tsv_m(deltas: Tensor) -> Tensor:
    """TSV-M (Gargiulo et al. 2025, 2412.00081): leading singular vectors of every task, whitened together.

    Of each of T task vectors the `min(out, in) // T` leading triples are kept; left and right vectors of all tasks are
    replaced by the nearest orthonormal ones (polar factors), the singular values kept. Where vectors of tasks coincide,
    the factor is a partial isometry, so that identical tasks give their truncated task vector. Tensors of fewer rows or
    columns than tasks are averaged. FusionBench's function agrees to rounding where the vectors of tasks are independent; its
    polar factors fill directions that are missing with arbitrary ones.
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
    authors tune the scale, from 1.0 to 1.5 for eight tasks. FusionBench's function agrees to rounding on sums of full rank;
    of adapters it gives the arbitrary directions beside their sum as much weight as those in it, and counts their zeros in the
    mean.
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
    orthonormal (polar factors) and have the mean of their singular values. FusionBench's function agrees to rounding where
    the directions of all tasks are independent, and fills missing ones with arbitrary ones.

    Raises:
        InputError: `common` outside [0, 1].
    """
    if not 0.0 <= common <= 1.0:
        raise InputError(f"common must be in [0, 1], got {common}")

    def merged(tasks: Tensor) -> Tensor:
        rank = min(tasks.shape[1:])
        own = min(round((rank - int(common * rank)) / len(tasks)), rank // len(tasks))
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


@dataclass(frozen=True)
class Parts:
    """The aligned parts of all matrices, `(models, k, in)`, one after the other, as a `Pass` has the task vectors."""

    deltas: Pass

    @property
    def sets(self) -> Any:
        return self.deltas.sets

    @cached_property
    def size(self) -> int:
        """The number of values of the parts of each model."""
        return sum(part[0].numel() for part in self)

    def __iter__(self) -> Iterator[Tensor]:
        for delta in self.deltas:
            if delta.ndim > 2:
                yield _aligned(delta.flatten(2))[1]

    def of(self, name: str) -> "Parts":
        """Those of one tensor alone."""
        return Parts(self.deltas.of(name))


def _survey_knots(deltas: Pass, *, density: Any, weights: Any, scope: Any, **_: Any) -> Trim:
    return survey_ties(Parts(deltas), density=density, weights=weights, scope=scope)


@on_task_vectors(survey=_survey_knots)
def knots(
    deltas: Tensor,
    *,
    survey: Trim,
    name: str,
    density: float | Sequence[float] = 0.2,
    weights: Sequence[float] | None = None,
    scope: Scope = "model",
    combine_by: Combine = "ties",
) -> Tensor:
    """KnOTS (Stoica et al. 2025, 2410.19735): task vectors merged in the common coordinates of their outputs; for adapters.

    With `[tau_1 ... tau_T] = U S [V_1^T ... V_T^T]` the parts `S V_t^T` of all tasks are aligned; their entries are trimmed
    and merged as by `ties` (or added, `combine_by="sum"`, which is task arithmetic), and `tau = U merged`. The share
    `density` is kept over the parts of the whole model, as in the paper, or of each matrix (`scope="tensor"`). Directions
    below 1e-5 of the largest singular value are dropped (FusionBench drops those below 1e-4, whatever the largest is, and with
    them task vectors that are small). The paper's scale is 0.6. Where singular values are equal, the
    coordinates, and so the result, are not unique.
    """

    def merged(tasks: Tensor) -> Tensor:
        frame, parts = _aligned(tasks)
        if not parts.numel():
            return torch.zeros_like(tasks[0])
        limits = survey.limits(name, density)
        parts = trim(parts, limits)
        if combine_by != "ties":
            return frame @ combine(parts, combine_by, weights)
        summed = weigh(parts, weights)
        open_ = bool(((summed.sum(0) == 0) & (summed.abs().sum(0) > 0)).any())
        return frame @ elect(parts, weights, survey.majority(name, limits, weights) if open_ else 0.0)

    if deltas.ndim > 2:
        return merged(deltas.flatten(2)).reshape(deltas.shape[1:])
    return combine(deltas, "sum" if combine_by == "sum" else "mean", weights)


def _aligned(tasks: Tensor) -> tuple[Tensor, Tensor]:
    """`(out, k)` and `(models, k, in)`: the left singular vectors of all tasks side by side, and the tasks in them."""
    wide = tasks.double()
    values, vectors = torch.linalg.eigh(torch.einsum("toi,tpi->op", wide, wide))
    used = values > values[-1:].clamp_min(0.0) * 1e-10
    frame = vectors[:, used & (values > 0.0)]
    return frame.to(tasks), (frame.T @ wide).to(tasks)


@on_task_vectors
def twin(
    deltas: Tensor,
    *,
    weights: Sequence[float],
    shared: float = 0.3,
    density: float = 0.2,
    compress: Literal["svd", "magnitude", "none"] = "svd",
) -> Tensor:
    """Twin-Merging (Lu et al. 2024, 2406.15479): a shared expert, and what each task has beyond it, weighted for the input.

    `shared sum_t tau_t + sum_t w_t C(tau_t - shared sum_s tau_s)`, where C keeps the share `density` of the singular values
    of a matrix, or of the largest entries; vectors stay as they are. The weights are what a router says of the inputs at
    hand: they sum to 1, and one model stands for each kind of input. Without compression a lone weight of 1 gives that
    task's model and equal weights the mean, whatever is shared. The authors' factor is 0.29.

    Raises:
        InputError: weights that do not sum to 1, an unknown way to compress, or a density outside (0, 1].
    """
    values = coefficients(weights, len(deltas))
    if abs(sum(values) - 1.0) > 1e-6:
        raise InputError(f"weights: {values} should sum to 1, as those of a router do")
    if compress not in ("svd", "magnitude", "none"):
        raise InputError(f"compress must be 'svd', 'magnitude' or 'none', got {compress!r}")
    if not 0.0 < density <= 1.0:
        raise InputError(f"density, the share that is kept, must be in (0, 1], got {density}")
    common = shared * deltas.sum(0)
    own = [w * _compressed(delta - common, density, compress) for w, delta in zip(values, deltas, strict=True) if w]
    return common + torch.stack(own).sum(0)


def _compressed(delta: Tensor, density: float, how: str) -> Tensor:
    if how == "none" or density == 1.0 or delta.ndim < 2:
        return delta
    matrix = delta.flatten(1)
    if how == "svd":
        u, s, v = _leading(matrix, max(1, int(density * min(matrix.shape))))
        return ((u * s) @ v).reshape(delta.shape)
    flat = matrix.flatten()
    top = flat.abs().topk(max(1, int(density * len(flat)))).indices
    return torch.zeros_like(flat).scatter_(0, top, flat[top]).reshape(delta.shape)


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
