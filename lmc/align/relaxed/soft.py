"""Soft moves: units mixed by a matrix per group, where a permutation would exchange them; and the loss that gradients
follow. Differentiable.

A permutation p is the matrix with `M[i, p[i]] = 1`: new unit i is `sum_j M[i, j]` old unit j. As with permutations, groups
are mixed before the groups within them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from lmc.errors import DataError
from lmc.landscape.evaluation.evaluation import Objective
from lmc.network.batches import Batch
from lmc.network.derived import derived_in, settled
from lmc.network.task import Loss, Task
from lmc.symmetry.groups.group import Table
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights

Matrices = Mapping[str, Tensor]
_RANGE = 300.0  # of the logarithms of scores, whose exponentials and their products then stay within those of float64


class SoftMoves:
    """The places of the units of all groups in some tensors, worked out once.

    Calling it with matrices and weights gives the weights with all groups mixed; tensors that no group touches are
    passed on as they are.
    """

    def __init__(self, spec: PermutationSpec, names: Iterable[str], device: torch.device) -> None:
        self._steps: dict[str, list[tuple[str, tuple[int, ...], Tensor | None]]] = {}
        for name in names:
            self._steps[name] = [
                (group, table.dims, _positions(table, spec.shapes[name], device))
                for group, table in spec.tables_by_tensor.get(name, ())
            ]

    def __call__(self, matrices: Matrices, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mixed = dict(weights)
        for name, steps in self._steps.items():
            for group, dims, where in steps:
                mixed[name] = mix(mixed[name], dims, where, matrices[group])
        return mixed


def mix(tensor: Tensor, dims: tuple[int, ...], where: Tensor | None, matrix: Tensor) -> Tensor:
    """The tensor with units mixed by `matrix` (n, n); `where` lists their positions over `dims`, None: all, in order."""
    matrix = matrix.to(tensor.dtype)
    if where is None and dims == (tensor.ndim - 1,) and tensor.shape[-1] == len(matrix):
        return tensor @ matrix.T
    first = tuple(range(len(dims)))
    front = tensor.movedim(dims, first)
    if where is None:
        mixed = (matrix @ front.reshape(len(matrix), -1)).reshape(front.shape)
    else:
        flat = front.reshape(-1, *front.shape[len(dims) :])
        units = flat.index_select(0, where)
        moved = (matrix @ units.reshape(len(matrix), -1)).reshape(units.shape)
        mixed = flat.index_copy(0, where, moved).reshape(front.shape)
    return mixed.movedim(first, dims)


def _positions(table: Table, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    rows = table.rows.ravel()
    every = rows.size == math.prod(shape[d] for d in table.dims) and bool((rows[1:] > rows[:-1]).all())
    return None if every else torch.from_numpy(rows).to(device)


def as_matrices(indices: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """The permutation matrices of index vectors, in the dtype and on the device of `like`."""
    return {name: torch.eye(len(p), dtype=like.dtype, device=like.device)[p] for name, p in indices.items()}


def degree(spec: PermutationSpec, tensors: Sequence[str]) -> int:
    """The degree in the matrices of the mixed tensor that depends on most of them.

    Groups of one family are apart, so they count once; a group on two axes counts twice.
    """
    largest = 0
    for tensor in tensors:
        slots = {(group.family, k) for group in spec.groups.values() for k in range(len(group.tables.get(tensor, ())))}
        largest = max(largest, len(slots))
    return largest


def sinkhorn(log_scores: Tensor, iterations: int) -> Tensor:
    """The doubly stochastic matrices that scaling rows and columns of `exp(log_scores)` (..., n, n) leads to.

    Rows are scaled last. Done on logarithms (Mena et al. 2018, arXiv:1802.08665, section 2), so nothing overflows; on a CPU,
    where an exponential costs as much as many products, on the numbers themselves wherever none can leave the range of float64.
    """
    if log_scores.is_cpu:
        below = log_scores.detach().double()
        below = below - below.amax(-2, keepdim=True)
        rows = below.amax(-1, keepdim=True)
        below -= rows
        if float(below.amin()) > -_RANGE:
            found = _Scaling.apply(log_scores, below, rows, iterations)
            assert isinstance(found, Tensor)
            return found
    for _ in range(iterations):
        log_scores = log_scores - log_scores.logsumexp(-2, keepdim=True)
        log_scores = log_scores - log_scores.logsumexp(-1, keepdim=True)
    return log_scores.exp()


class _Scaling(torch.autograd.Function):
    """`P = diag(u) K diag(v)` with `v = 1 / K^T u` and `u = 1 / K v` by turns: two matrix-vector products for an iteration.

    `below` is X less the maxima of its columns, and then of its rows, so that `K = exp(below)` has a one in each row and entries
    of at least `exp(-_RANGE)`; as `u[i] / u[k]` is at most the reciprocal of that, nothing overflows. Of the columns' maxima P
    does not depend, those of the rows are where u begins.
    """

    @staticmethod
    def forward(ctx: Any, log_scores: Tensor, below: Tensor, rows: Tensor, iterations: int) -> Tensor:
        kernel = below.exp()
        # Rows (..., 1, n): of several matrices, products from the left are the quick ones.
        us, vs = [rows.exp().mT], []
        for _ in range(iterations):
            vs.append((us[-1] @ kernel).reciprocal_())
            us.append((vs[-1] @ kernel.mT).reciprocal_())
        found = us[-1].mT * kernel * vs[-1]
        ctx.save_for_backward(kernel, found, *us, *vs)
        return found.to(log_scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Iteration by iteration backwards, with the derivatives by the logarithms of u and v.

        `log u = -log sum_j K_ij v_j` gives `-du_i u_i K_ij v_j` to X and `-v_j sum_i K_ij u_i du_i` to v, and v likewise to u.
        What all of them give to X is one product of two matrices with 2 columns for each iteration.
        """
        kernel, found, *scalings = ctx.saved_tensors
        count = len(scalings) // 2
        us, vs = scalings[: count + 1], scalings[count + 1 :]
        direct = gradients[0].double() * found
        by_u, by_v = direct.sum(-1).unsqueeze(-2), direct.sum(-2, keepdim=True)
        left, right = [], []
        for t in reversed(range(count)):
            weighted = us[t + 1] * by_u
            by_v = by_v - vs[t] * (weighted @ kernel)
            left += [weighted, us[t]]
            weighted = vs[t] * by_v
            right += [vs[t], weighted]
            by_u, by_v = -us[t] * (weighted @ kernel.mT), torch.zeros_like(by_v)
        direct -= kernel * (torch.cat(left, -2).mT @ torch.cat(right, -2))
        return direct.to(gradients[0].dtype), None, None, None


def doubly_stochastic(log_scores: Matrices, iterations: int) -> dict[str, Tensor]:
    """`sinkhorn` of each group's scores (n, n); groups of one size at once, as a network has many that are small."""
    sizes: dict[int, list[str]] = {}
    for name, scores in log_scores.items():
        sizes.setdefault(len(scores), []).append(name)
    found = {}
    for names in sizes.values():
        found |= zip(names, sinkhorn(torch.stack([log_scores[name] for name in names]), iterations), strict=True)
    return {name: found[name] for name in log_scores}


class TaskLoss(Objective):
    """One architecture and one training set; the caller's module is not touched.

    Dropout is off. Batch normalisation uses the statistics of the batch: those that a mixture of two networks would
    inherit belong to neither.

    Args:
        model, weights, data, loss, device: as for `Objective`.
        batch_size: examples in a batch, where the data are given whole; one more where an example would be left alone,
            which has no batch statistics.

    Raises:
        DataError: data that are empty, malformed, hold NaN, or do not fit the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        data: Any,
        loss: Loss | Task | None,
        batch_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(model, weights, data, loss=loss, device=device, name="a")
        norms = {n: module for n, module in self.network.module.named_modules() if isinstance(module, _BatchNorm)}
        self._statistics = {f"{n}.{own}" for n, module in norms.items() for own, _ in module.named_buffers()}
        for module in norms.values():
            module.train()
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
            module.num_batches_tracked = None
        self._derived = weights if derived_in(weights) else None
        self._least = 2 if norms else 1
        self.batch_size = batch_size
        if self.split.whole and norms:
            examples = len(next(iter(self.split.batches))[1])
            while 1 < self.batch_size < examples and examples % self.batch_size == 1:
                self.batch_size += 1

    @torch.no_grad()
    def mean(self, weights: Weights) -> float:
        """The loss over all the data, batches weighted by the targets that count; without those too short for batch statistics.

        Raises:
            DataError: no batch is left.
        """
        total = seen = 0.0
        for batch in self.split.iterate(self.batch_size):
            if len(batch[1]) >= self._least:
                count = self.task.weight(batch[1])
                total += float(self(weights, batch)) * count
                seen += count
        if not seen:
            raise DataError(
                f"{self.split.name}: no batch has a target that counts and, for batch normalisation, two examples"
            )
        return total / seen

    def epochs(self, generator: torch.Generator) -> Iterator[Batch]:
        """Batch after batch in random order, epoch after epoch without end."""
        while True:
            yield from self.epoch(generator)

    def epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        """The batches of one epoch, in random order where the data are held."""
        for batch in self.split.shuffled(self.batch_size, generator):
            if len(batch[1]) >= self._least:
                yield batch

    def __call__(self, weights: Weights, batch: Batch) -> Tensor:
        """The mean loss of one batch at a mixture of gauged weights (`lmc.network.derived`); statistics of batch
        normalisation among them are left aside."""
        weights = weights if self._derived is None else settled(weights, self._derived)
        return super().__call__({name: x for name, x in weights.items() if name not in self._statistics}, batch)
