"""Mixtures of K models on a regular lattice of shares, and linear interpolation between its points."""

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
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


def interpolation(shares: Sequence[float], resolution: int) -> list[tuple[tuple[int, ...], float]]:
    """Lattice points `(counts, weight)` around a mixture: at most K of them, weights that sum to 1.

    In the partial sums u_j = resolution * (s_j + ... + s_K), j = 2..K, the lattice is a part of the integer grid, and its
    cubes are cut into simplices by the order of the fractional parts (Freudenthal 1942): the corners of the simplex of u
    are floor(u) and what comes of raising the coordinates one by one, largest fraction first.
    """
    sums = resolution * np.cumsum(np.asarray(shares, dtype=np.float64)[:0:-1])[::-1]
    sums = np.where(np.abs(sums - np.round(sums)) < 1e-9, np.round(sums), sums)
    base = np.floor(sums).astype(np.int64)
    fraction = sums - base
    order = np.argsort(-fraction, kind="stable")
    levels = [1.0, *fraction[order].tolist(), 0.0]
    found = []
    for k in range(len(order) + 1):
        if k:
            base[order[k - 1]] += 1
        weight = levels[k] - levels[k + 1]
        if weight > 0.0:
            edges = [resolution, *base.tolist(), 0]
            found.append((tuple(edges[j] - edges[j + 1] for j in range(len(edges) - 1)), weight))
    return found
