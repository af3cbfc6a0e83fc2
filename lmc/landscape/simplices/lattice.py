"""The lattice of shares on a simplex: its points, the order from coarse to fine, and values between them."""

from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt

from lmc.landscape.evaluation.measured import Values

Counts = npt.NDArray[np.int64]


def lattice(models: int, resolution: int) -> Counts:
    """(P, K) all ways to write `resolution` as a sum of K whole numbers: shares in steps of 1 / resolution."""
    bars = np.array(list(combinations(range(resolution + models - 1), models - 1)), dtype=np.int64)
    edges = np.concatenate(
        [
            np.full((len(bars), 1), -1),
            bars.reshape(len(bars), models - 1),
            np.full((len(bars), 1), resolution + models - 1),
        ],
        axis=1,
    )
    return (np.diff(edges, axis=1) - 1)[::-1]


def lattice_size(models: int, resolution: int) -> int:
    """The number of points of `lattice`."""
    return comb(resolution + models - 1, models - 1)


def coarse_to_fine(counts: Counts) -> list[int]:
    """The rows of a lattice: the corners, then the points of ever finer lattices (those where every count is divisible
    by a large power of two come first)."""
    total = counts.sum(1, keepdims=True)
    parts = np.where(counts == 0, total, counts)
    power = (parts & -parts).min(1)
    corner = (counts == total).any(1)
    return np.lexsort((-power, ~corner)).tolist()


def around(shares: Values, resolution: int) -> tuple[Counts, Values]:
    """For mixtures (M, K) the lattice points around each, (M, K, K), and their weights (M, K), which sum to 1.

    In the partial sums u_j = resolution * (s_j + ... + s_K), j = 2..K, the lattice is a part of the integer grid, and its
    cubes are cut into simplices by the order of the fractional parts (Freudenthal 1942): the corners of the simplex of u
    are floor(u) and what comes of raising the coordinates one by one, largest fraction first. Where a weight is 0 the
    corner may lie outside the lattice.
    """
    sums = resolution * np.cumsum(shares[:, :0:-1], axis=1)[:, ::-1]
    sums = np.where(np.abs(sums - np.round(sums)) < 1e-9, np.round(sums), sums)
    base = np.floor(sums)
    fraction = sums - base
    rank = np.argsort(np.argsort(-fraction, axis=1, kind="stable"), axis=1)
    raised = rank[:, None, :] < np.arange(shares.shape[1])[None, :, None]  # (M, K, K - 1)
    edge = np.full((len(shares), shares.shape[1], 1), float(resolution))
    levels = np.concatenate([edge, base[:, None, :] + raised, np.zeros_like(edge)], axis=2)
    one = np.ones((len(shares), 1))
    heights = np.concatenate([one, -np.sort(-fraction, axis=1), 0 * one], axis=1)
    return -np.diff(levels, axis=2).astype(np.int64), -np.diff(heights, axis=1)


def interpolate(counts: Counts, values: Values, shares: Values) -> Values:
    """(M,) values at mixtures (M, K), linear between the points of a lattice with `values` (P,)."""
    resolution = int(counts[0].sum())
    corners, weights = around(shares, resolution)
    digits = (resolution + 1) ** np.arange(counts.shape[1])
    codes = counts @ digits
    order = np.argsort(codes)
    rows = order[np.searchsorted(codes, (corners * (weights > 0)[..., None]) @ digits, sorter=order) % len(counts)]
    return np.where(weights > 0, weights * values[rows], 0.0).sum(1)
