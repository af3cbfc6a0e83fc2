"""Mixtures of networks and what was measured of them: in print, as tables, and between the points of the lattice of shares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lmc.core.codec import UNSAVED
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.evaluation.measured import Live, Measured, Values

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


if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Mixture:
    """One mixture of models.

    Attributes:
        shares: name of a model -> its share; they sum to 1.
        values: split -> measure -> value.
    """

    shares: dict[str, float]
    values: dict[str, dict[str, float]]

    def __str__(self) -> str:
        mixed = " + ".join(f"{share:.3g} {name}" for name, share in self.shares.items() if share)
        scores = [
            f"{split} loss {found['loss']:.3f}"
            + (f", accuracy {100 * found['accuracy']:.1f} %" if "accuracy" in found else "")
            for split, found in self.values.items()
        ]
        return f"{mixed}: {'; '.join(scores)}"

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class Simplex(Measured, Result):
    """Losses and accuracies of mixtures `sum_i s_i theta_i` of K models, s on a lattice.

    Attributes:
        names: what the models are called.
        counts: (P, K) whole numbers; the shares of a point are `counts / resolution`.
        values: split -> measure -> (P,): "loss", "accuracy" (a fraction) and any further metric; NaN where it is
            not known.
        own: split -> measure -> the value of each model as it was given. With batch statistics re-estimated they may
            differ from the corners of the lattice, otherwise they agree.
        uniform: the mixture of equal shares, which need not lie on the lattice.
        done: (P,) which points were evaluated; all, unless an interrupt came first.
        recalibrated: batch statistics were re-estimated at every point.
        unit: of the loss.
        higher: the measures of which higher values are better.
        exact: evaluates any other mixture, `exact(*shares)[split].loss`; it keeps models and data alive. None for a
            result that was read from a file.
    """

    names: tuple[str, ...]
    counts: Counts
    values: dict[str, dict[str, Values]]
    own: dict[str, dict[str, tuple[float, ...]]]
    uniform: Mixture
    done: npt.NDArray[np.bool_]
    recalibrated: bool = False
    unit: str = "nats"
    higher: tuple[str, ...] = ("accuracy",)
    exact: Live | None = field(default=None, repr=False, metadata=UNSAVED)

    @property
    def resolution(self) -> int:
        """Steps along each edge."""
        return int(self.counts[0].sum())

    @property
    def shares(self) -> Values:
        """(P, K) the share of each model at each point; rows sum to 1."""
        return self.counts / self.resolution

    @property
    def complete(self) -> bool:
        """No point is missing."""
        return bool(self.done.all())

    @property
    def gaps(self) -> dict[str, int]:
        """measure -> number of points that were evaluated and gave NaN, in any split."""
        measures = self.values[self.split]
        nans = {m: np.any([np.isnan(values[m]) for values in self.values.values()], axis=0) for m in measures}
        return {measure: int((nan & self.done).sum()) for measure, nan in nans.items()}

    @property
    def best(self) -> Mixture:
        """The evaluated point of lowest loss on `split`. A choice by test data is no fair estimate of its quality: for
        that, choose on one split and read the value of another."""
        return self.best_on(self.split)

    def best_on(self, split: str) -> Mixture:
        """The evaluated point of lowest loss on a split.

        Raises:
            InputError: a split that there is not, or no point with a loss.
        """
        if split not in self.values:
            raise InputError(f"split={split!r}; these mixtures have {', '.join(self.values)}")
        losses = self.losses[split]
        if np.isnan(losses).all():
            raise InputError(f"no point has a loss on {split}: none was evaluated, or all are NaN")
        return self.mixture(int(np.nanargmin(losses)))

    def mixture(self, point: int) -> Mixture:
        """One evaluated point: a row of `counts`."""
        shares = dict(zip(self.names, (self.counts[point] / self.resolution).tolist(), strict=True))
        return Mixture(shares, {s: {m: float(v[point]) for m, v in ms.items()} for s, ms in self.values.items()})

    def interpolate(self, shares: npt.ArrayLike, measure: str = "loss", split: str | None = None) -> Any:
        """A measure at a mixture (K,), or at many (M, K), linear between the points around it; exact at the points.

        `exact` evaluates instead.

        Raises:
            InputError: not one share of at least 0 for each model, shares that do not sum to 1, or a split or a measure that
                there is not.
        """
        split = self.split if split is None else split
        if measure not in self.values.get(split, {}):
            known = "; ".join(f"{name}: {', '.join(measures)}" for name, measures in self.values.items())
            raise InputError(f"{split=}, {measure=}; these mixtures have {known}")
        given = np.asarray(shares, dtype=np.float64)
        rows = np.atleast_2d(given)
        fits = given.ndim in (1, 2) and rows.shape[1] == len(self.names)
        if not fits or not (rows >= -1e-9).all() or not (np.abs(rows.sum(1) - 1.0) < 1e-6).all():
            raise InputError(f"shares: expected {len(self.names)} numbers, at least 0, that sum to 1, got {shares}")
        found = interpolate(self.counts, self.values[split][measure], rows)
        return found if given.ndim == 2 else float(found[0])

    def to_frame(self) -> "pd.DataFrame":
        """A row for each point and split: the share of each model, split, loss, accuracy and metrics."""
        pd = require("pandas")

        shares = {f"share of {name}": self.shares[:, i] for i, name in enumerate(self.names)}
        frames = [pd.DataFrame({**shares, "split": split, **measures}) for split, measures in self.values.items()]
        return pd.concat(frames, ignore_index=True)

    @classmethod
    def _from_older(cls, form: str, content: dict[str, Any], tensors: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if form != "lmc mixtures 1":
            return super()._from_older(form, content, tensors)
        names = content["names"]  # and the resolution, from which the counts followed
        counts = lattice(len(names), content["resolution"]).tolist()
        return f"lmc {'triangle' if len(names) == 3 else 'simplex'} 1", {**content, "counts": counts}

    def __str__(self) -> str:
        head = f"{type(self).__name__} of {len(self.counts)} mixtures of {', '.join(self.names)}"
        if not self.complete:
            head += f", {int((~self.done).sum())} not evaluated"
        head += "".join(f", {count} where {measure} is NaN" for measure, count in self.gaps.items() if count)
        lines = [head + (", batch statistics re-estimated at each" if self.recalibrated else "")]
        for split in self.values:
            models = ", ".join(f"{v:.3f} at {n}" for n, v in zip(self.names, self.own[split]["loss"], strict=True))
            lines.append(f"  {split}: loss {models}; {self.uniform.values[split]['loss']:.3f} at the uniform soup")
        if np.isfinite(self.losses[self.split]).any():
            lines.append(f"  lowest {self.split} loss: {self.best}")
        return "\n".join(lines)

    __repr__ = __str__


class Triangle(Simplex):
    """The mixtures of three models: a triangle with a model in each corner."""
