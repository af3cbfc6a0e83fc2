"""Loss and accuracy of mixtures: a triangle between three networks, a simplex between more."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lmc.core.codec import UNSAVED
from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.core.workers import spread
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluation import Evaluation
from lmc.landscape.evaluation.measured import Live, Measured, Values
from lmc.landscape.evaluation.scores import Score
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import ModelOrWeights, Weights

if TYPE_CHECKING:
    import pandas as pd


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
            InputError: not one share of at least 0 for each model, or shares that do not sum to 1.
        """
        given = np.asarray(shares, dtype=np.float64)
        rows = np.atleast_2d(given)
        fits = given.ndim in (1, 2) and rows.shape[1] == len(self.names)
        if not fits or not (rows >= -1e-9).all() or not (np.abs(rows.sum(1) - 1.0) < 1e-6).all():
            raise InputError(f"shares: expected {len(self.names)} numbers, at least 0, that sum to 1, got {shares}")
        found = interpolate(self.counts, self.values[self.split if split is None else split][measure], rows)
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


MOST_POINTS = 500  # of a lattice whose resolution is not given


@own_context
def loss_triangle(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    data: Any,
    *,
    resolution: int = 40,
    names: Sequence[str] = ("A", "B", "C"),
    resume: Simplex | None = None,
    repair: Literal["auto"] | None = "auto",
    inputs: Any = None,
    loss: Loss | Task | None = None,
    metrics: Mapping[str, Loss] | None = None,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Triangle:
    """Evaluate the soups `s_1 a + s_2 b + s_3 c` of three networks, s >= 0 with sum 1, in eval mode.

    Shares go in steps of 1 / `resolution`; the networks themselves are the corners and the lines between them the edges.
    Points are evaluated from coarse to fine; an interrupt returns what is done (the rest NaN, with a warning), and
    `resume` goes on from there. Nothing of the caller's is touched.

    Args:
        model: the architecture.
        models: three weight sets of it; modules or state dicts.
        data: as for `loss_path`.
        resolution: steps along each edge, at least 2: (resolution + 1) (resolution + 2) / 2 points.
        names: what the three are called in print and in plots.
        resume: an unfinished triangle of the same arguments, whose points are taken over.
        repair, inputs, loss, metrics, outputs, batch_size, device: as for `loss_path`.
        executor: a `concurrent.futures.Executor` or a dask `Client` whose workers take the points; models and data are sent
            once to each (default: here).
        progress: show a bar, and the cost of a long survey before it starts.

    Raises:
        InputError: an unusable argument.
        MismatchError: models of different architectures, dtypes or devices.
        WeightsError: weights that are not finite.
        DataError: unusable data.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> spec = lmc.permutation_spec(model, data.test[0][:2])
        >>> moved = lmc.weight_matching(spec, a, b).apply(b)
        >>> lmc.loss_triangle(model, [a, b, moved], data.test, names=["A", "B", "B moved"], resolution=4)
        Triangle of 15 mixtures of A, B, B moved
          data: loss 0.157 at A, 0.137 at B, 0.137 at B moved; 1.295 at the uniform soup
          lowest data loss: ...
    """
    if isinstance(models, Mapping) or len(models) != 3:
        raise InputError(f"models: expected three networks, got {len(models)}; for more use loss_simplex")
    names = _checked_names(names, models)
    evaluation = Evaluation(
        model,
        models,
        data,
        names=names,
        repair=repair,
        inputs=inputs,
        loss=loss,
        metrics=metrics,
        outputs=outputs,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    return Triangle(**vars(_survey(evaluation, names, resolution, resume, executor)))


@own_context
def loss_simplex(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    data: Any,
    *,
    resolution: int | None = None,
    names: Sequence[str] | None = None,
    resume: Simplex | None = None,
    repair: Literal["auto"] | None = "auto",
    inputs: Any = None,
    loss: Loss | Task | None = None,
    metrics: Mapping[str, Loss] | None = None,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Simplex:
    """Evaluate the soups `sum_i s_i theta_i` of any number of networks on a lattice of shares.

    As `loss_triangle`, for two networks or more. The points grow fast with the networks: without a `resolution` it is
    the largest even number (so that the middle of every pair is a point) that makes no more than 500.

    Args:
        model: the architecture.
        models: at least two weight sets of it.
        names: default "A", "B", ...
        data, resolution, resume, repair, inputs, loss, metrics, outputs, batch_size, device, executor, progress: as for
            `loss_triangle`.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> lmc.loss_simplex(model, [a, b], data.test, resolution=4)
        Simplex of 5 mixtures of A, B
          data: loss 0.157 at A, 0.137 at B; 1.678 at the uniform soup
          lowest data loss: 1 B: data loss 0.137, accuracy 95.7 %
    """
    if isinstance(models, Mapping) or len(models) < 2:
        raise InputError(f"models: expected at least two networks, got {len(models)}")
    names = _checked_names(names, models)
    evaluation = Evaluation(
        model,
        models,
        data,
        names=names,
        repair=repair,
        inputs=inputs,
        loss=loss,
        metrics=metrics,
        outputs=outputs,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    return _survey(evaluation, names, resolution, resume, executor)


def _survey(
    evaluation: Evaluation, names: Sequence[str], resolution: int | None, resume: Simplex | None, executor: Any
) -> Simplex:
    """Evaluate the mixtures on a lattice, from coarse to fine."""
    simplex = _blank(evaluation, names, lattice(len(names), _resolution(len(names), resolution)))
    if resume is not None:
        _take_over(simplex, resume)
    order = [i for i in coarse_to_fine(simplex.counts) if not simplex.done[i]]
    shares: list[list[float]] = simplex.shares.tolist()
    if executor is None:
        evaluation.tell(
            "mixtures", len(order), lambda: evaluation.seconds_for(lambda: evaluation.mixed(shares[order[0]]))
        )
        scored = evaluation.run((evaluation.mixed(shares[i]) for i in order), order, "mixtures")
    else:
        shared = {"again": evaluation.again, "shares": shares}
        parts = spread(executor, _elsewhere, shared, evaluation.evaluator.chunks(order))
        scored = evaluation.collect((found for _, part in parts for found in part), len(order), "mixtures")
    for i, score in scored.items():
        simplex.done[i] = True
        for split, measures in simplex.values.items():
            for measure, values in measures.items():
                values[i] = score[split].values[measure]
    return simplex


def _elsewhere(
    again: Callable[[], Evaluation], shares: Sequence[Sequence[float]]
) -> Callable[[Sequence[int]], list[tuple[int, dict[str, Score]]]]:
    """What a worker does for some mixtures."""
    evaluation = again()
    next(evaluation.evaluator([evaluation.states[0]]))
    return lambda order: list(zip(order, evaluation.evaluator(evaluation.mixed(shares[i]) for i in order), strict=True))


def _checked_names(names: Sequence[str] | None, models: Sequence[Any]) -> list[str]:
    found = [_letter(i) for i in range(len(models))] if names is None else list(names)
    if len(found) != len(models) or len(set(found)) != len(found):
        raise InputError(f"names={found!r}; expected {len(models)} different names")
    return found


def _resolution(models: int, given: int | None) -> int:
    if given is not None:
        if not isinstance(given, int) or isinstance(given, bool) or given < 2:
            raise InputError(f"resolution={given!r}; expected a whole number, at least 2")
        return given
    found = 2
    while lattice_size(models, found + 2) <= MOST_POINTS:
        found += 2
    return found


def _letter(i: int) -> str:
    return chr(ord("A") + i) if i < 26 else f"model {i}"


def _blank(evaluation: Evaluation, names: Sequence[str], counts: np.ndarray) -> Simplex:
    """Mixtures of which no point is known, but the models themselves and the uniform soup."""
    own = evaluation.own()
    kept = {
        split: {m: tuple(score[split].values[m] for score in own) for m in own[0][split].values} for split in own[0]
    }
    values = {s: {m: np.full(len(counts), math.nan) for m in measures} for s, measures in kept.items()}
    equal = [1.0 / len(names)] * len(names)
    score = next(evaluation.evaluator([evaluation.mixed(equal)]))
    uniform = Mixture(
        dict(zip(names, equal, strict=True)), {split: dict(found.values) for split, found in score.items()}
    )
    return Simplex(
        tuple(names),
        counts,
        values,
        kept,
        uniform,
        np.zeros(len(counts), dtype=bool),
        evaluation.recalibrated,
        evaluation.evaluator.task.unit,
        tuple(evaluation.evaluator.task.higher),
        Live(evaluation, _mixture),
    )


def _mixture(evaluation: Evaluation, *shares: float) -> Weights:
    """The weights of a mixture, for `Simplex.exact`.

    Raises:
        InputError: not one finite share for each model, or shares that do not sum to 1.
    """
    count = len(evaluation.states)
    if len(shares) != count or not all(map(math.isfinite, shares)) or abs(sum(shares) - 1.0) > 1e-6:
        raise InputError(f"shares={list(shares)}: expected {count} finite numbers that sum to 1")
    return evaluation.mixed(shares)


def _take_over(fresh: Simplex, earlier: Simplex) -> None:
    """Copy the points that earlier mixtures know.

    Raises:
        InputError: they are of other models, data, measures or points.
    """
    same = fresh.values.keys() == earlier.values.keys() and fresh.recalibrated == earlier.recalibrated
    same = same and np.array_equal(fresh.counts, earlier.counts)
    for split, measures in fresh.own.items():
        others = earlier.own.get(split, {})
        same = same and measures.keys() == others.keys()
        same = same and all(np.allclose(measures[m], others[m], rtol=1e-4, equal_nan=True) for m in measures)
    if not same:
        raise InputError("resume: mixtures of other models, data, measures or points; pass it with the same arguments")
    fresh.done[:] = earlier.done
    for split, measures in fresh.values.items():
        for measure, values in measures.items():
            values[:] = earlier.values[split][measure]
