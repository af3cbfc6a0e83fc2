"""Soft moves: units mixed by a matrix per group, where a permutation would exchange them. Differentiable.

A permutation p is the matrix with `M[i, p[i]] = 1`: new unit i is `sum_j M[i, j]` old unit j. As with permutations, groups
are mixed before the groups within them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lmc.symmetry.group import Table
from lmc.symmetry.spec import PermutationSpec

Matrices = Mapping[str, Tensor]


def mix(tensor: Tensor, table: Table, matrix: Tensor) -> Tensor:
    """The tensor with the units of one table mixed by `matrix` (n, n)."""
    dims = tuple(range(len(table.dims)))
    front = tensor.movedim(table.dims, dims)
    flat = front.reshape(-1, *front.shape[len(dims) :])
    where = torch.from_numpy(table.rows).flatten().to(tensor.device)
    if _in_order(table, len(flat)):
        mixed = (matrix @ flat.reshape(len(matrix), -1)).reshape(front.shape)
    else:
        units = flat.index_select(0, where)
        moved = (matrix @ units.reshape(len(matrix), -1)).reshape(units.shape)
        mixed = flat.index_copy(0, where, moved).reshape(front.shape)
    return mixed.movedim(dims, table.dims)


def mix_all(spec: PermutationSpec, matrices: Matrices, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with all groups mixed; tensors that no group touches are passed on as they are."""
    mixed = dict(weights)
    for name, tables in spec.tables_by_tensor.items():
        if name in weights:
            for group, table in tables:
                mixed[name] = mix(mixed[name], table, matrices[group])
    return mixed


def as_matrices(indices: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """The permutation matrices of index vectors, in the dtype and on the device of `like`."""
    return {name: torch.eye(len(p), dtype=like.dtype, device=like.device)[p] for name, p in indices.items()}


def degree(spec: PermutationSpec, tensors: Sequence[str]) -> int:
    """The degree in the matrices of the mixed tensor that depends on most of them.

    Groups of one family lie apart, so they count once; a group on two axes counts twice.
    """
    largest = 0
    for tensor in tensors:
        slots = {(group.family, k) for group in spec.groups.values() for k in range(len(group.tables.get(tensor, ())))}
        largest = max(largest, len(slots))
    return largest


def sinkhorn(log_scores: Tensor, iterations: int) -> Tensor:
    """The doubly stochastic matrix that scaling rows and columns of `exp(log_scores)` (n, n) leads to.

    Rows are scaled last. Done on logarithms (Mena et al. 2018, arXiv:1802.08665, section 2), so nothing overflows.
    """
    for _ in range(iterations):
        log_scores = log_scores - log_scores.logsumexp(0, keepdim=True)
        log_scores = log_scores - log_scores.logsumexp(1, keepdim=True)
    return log_scores.exp()


def _in_order(table: Table, length: int) -> bool:
    rows = table.rows
    return rows.size == length and bool((rows.ravel()[1:] > rows.ravel()[:-1]).all())
