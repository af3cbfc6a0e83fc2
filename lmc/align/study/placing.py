"""A permutation carried out bit by bit, and how alike the units of two networks are on the way."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmc.align.weight_matching.blocks import UnitBlock
from lmc.symmetry.spec import Permutation, PermutationSpec
from lmc.weights import Weights

FIELD_BYTES = 300_000  # of the pictures of one group, which are made smaller where they take more


def partial(index: Tensor, order: Tensor, count: int) -> Tensor:
    """The index vector after `count` swaps, each of which puts the right unit in the next place of `order`.

    With all places in order it is `index`; with none, the identity. Every one is a permutation.
    """
    now = list(range(len(index)))
    where = list(range(len(index)))  # of each unit
    for place in order[:count].tolist():
        unit = int(index[place])
        other, old = now[place], where[unit]
        now[place], now[old] = unit, other
        where[unit], where[other] = place, old
    return torch.tensor(now)


def placed(permutation: Permutation, orders: dict[str, Tensor], share: float) -> Permutation:
    """The permutation with a share of the places of every group filled rightly, in the given orders."""
    indices = {
        name: partial(index, orders.get(name, torch.arange(len(index))), round(share * len(index)))
        for name, index in permutation.items()
    }
    return Permutation(permutation.spec, indices)


def alikeness(block: UnitBlock, ours: Weights, theirs: Weights) -> Tensor:
    """`(n, n)` cosines between all that A's unit i owns and all that B's unit j owns; 0 for units that own nothing.

    The numerator is the gain that weight matching assigns by: the inner products summed over all places of the block.
    """
    gain = torch.zeros(block.size, block.size, dtype=torch.float64)
    squares = [torch.zeros(block.size, dtype=torch.float64) for _ in range(2)]
    for place in block.places:
        a, b = (place.features(weights[place.tensor]).to("cpu", torch.float64) for weights in (ours, theirs))
        gain += a @ b.T
        for total, features in zip(squares, (a, b), strict=True):
            total += features.square().sum(1)
    norms = squares[0].sqrt()[:, None] * squares[1].sqrt()
    return torch.where(norms > 0, gain / norms.clamp_min(1e-300), 0.0)


def receptive_fields(
    spec: PermutationSpec, group: str, weights: Weights, image_shape: Sequence[int] | None
) -> npt.NDArray[np.float32] | None:
    """`(n, height, width)`: what feeds each unit, as pictures; None where the units are fed by no picture.

    Looked for is a tensor whose rows are the units and whose columns no group moves: a linear layer on flattened pictures
    or a convolution kernel; several channels are averaged. Without an `image_shape` (channels, height, width) the inputs
    of a linear layer are taken for a square picture, if their number is a square of at least 4.
    """
    for name, tables in spec.groups[group].tables.items():
        tensor = weights[name]
        alone = len(spec.tables_by_tensor[name]) == 1 and tables[0].dims == (0,) and tables[0].rows.shape[1] == 1
        if not alone or tensor.ndim not in (2, 4) or len(tensor) != spec.groups[group].size:
            continue
        if tensor.ndim == 4 and min(tensor.shape[2:]) > 1:
            return _small(tensor.float().mean(1).cpu().numpy())
        if tensor.ndim == 2:
            side = math.isqrt(tensor.shape[1])
            shape = tuple(image_shape) if image_shape is not None else (1, side, side)
            if len(shape) == 3 and math.prod(shape) == tensor.shape[1] and min(shape[1:]) >= 4:
                return _small(tensor.float().reshape(-1, *shape).mean(1).cpu().numpy())
    return None


def _small(pictures: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The pictures, halved in size as often as it takes."""
    while pictures.size > FIELD_BYTES and min(pictures.shape[1:]) >= 8:
        n, height, width = pictures.shape
        even = pictures[:, : height // 2 * 2, : width // 2 * 2]
        pictures = even.reshape(n, height // 2, 2, width // 2, 2).mean((2, 4))
    return pictures
