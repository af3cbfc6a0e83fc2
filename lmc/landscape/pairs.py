"""Barriers between every two of many networks: which of them share a basin."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn

from lmc.core.context import own_context, warn
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.core.workers import spread
from lmc.errors import InputError, WorkerError
from lmc.landscape.evaluation.evaluation import Evaluation, Repair
from lmc.landscape.evaluation.measured import Values
from lmc.landscape.path import mixture_path, points_of
from lmc.network.batches import reread
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import ModelOrWeights, Weights, as_weights

if TYPE_CHECKING:
    import pandas as pd

Move: TypeAlias = Callable[[Weights, Weights], Any]
Pair: TypeAlias = tuple[int, int]

MOST_TASKS = 8192  # handing out a task takes a scheduler some milliseconds, which thousands of workers wait for


@dataclass(frozen=True, eq=False)
class PairwiseBarriers(Result):
    """The barriers between every two of K networks.

    Attributes:
        names: what the networks are called.
        barriers: (K, K) loss barriers, in the unit of the loss; symmetric, 0 on the diagonal, NaN where
            not evaluated, or where an end has no loss.
        error_barriers: (K, K) barriers of the classification error in percentage points; NaN where targets are no
            classes.
        losses: (K,) of each network itself, as its paths begin and end; NaN where no pair of it was evaluated.
        split: of the data, on which all of this was measured.
        unit: of the loss.
        aligned: every second network of a pair was moved onto the first.
    """

    names: tuple[str, ...]
    barriers: Values
    error_barriers: Values
    losses: Values
    split: str
    unit: str = "nats"
    aligned: bool = False

    @property
    def complete(self) -> bool:
        """No pair is missing."""
        return not np.isnan(self.barriers).any()

    @property
    def order(self) -> tuple[int, ...]:
        """The networks in an order that brings those of low barriers together: the leaves of average linkage, turned so
        that neighbours are as near as can be (Bar-Joseph et al. 2001, Bioinformatics 17:S22)."""
        from scipy.cluster.hierarchy import leaves_list, linkage

        if len(self.names) < 3:
            return tuple(range(len(self.names)))
        return tuple(leaves_list(linkage(self._condensed(), "average", optimal_ordering=True)).tolist())

    def basins(self, limit: float) -> list[tuple[str, ...]]:
        """The networks in groups in which every two have a barrier of at most `limit` (complete linkage), larger ones first.

        Pairs that were not evaluated count as apart.
        """
        from scipy.cluster.hierarchy import fcluster, linkage

        numbers = fcluster(linkage(self._condensed(), "complete"), limit, "distance")
        groups = [tuple(name for name, at in zip(self.names, numbers, strict=True) if at == n) for n in set(numbers)]
        return sorted(groups, key=lambda group: (-len(group), self.names.index(group[0])))

    def to_frame(self) -> "pd.DataFrame":
        """A row for each pair: a, b, barrier, error_barrier."""
        rows = [
            (self.names[i], self.names[j], self.barriers[i, j], self.error_barriers[i, j])
            for i, j in combinations(range(len(self.names)), 2)
        ]
        return require("pandas").DataFrame(rows, columns=["a", "b", "barrier", "error_barrier"])

    def __str__(self) -> str:
        above = self.barriers[np.triu_indices(len(self.names), 1)]
        known = above[~np.isnan(above)]
        text = f"PairwiseBarriers of {len(self.names)} networks, {len(known)} of {len(above)} pairs on {self.split}"
        text += ", each pair aligned" if self.aligned else ""
        if not len(known):
            return text
        return text + f"; loss barriers from {known.min():.3f} to {known.max():.3f}, median {np.median(known):.3f}"

    __repr__ = __str__

    def _condensed(self) -> Values:
        """The barriers above the diagonal, row by row; unknown ones larger than all that are known."""
        above = self.barriers[np.triu_indices(len(self.names), 1)]
        return np.where(np.isnan(above), 1.0 + 2.0 * np.nanmax(above, initial=0.0), above)


@own_context
def pairwise_barriers(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    data: Any,
    *,
    names: Sequence[str] | None = None,
    align: Move | None = None,
    alphas: int | Sequence[float] = 11,
    resume: PairwiseBarriers | None = None,
    repair: Repair = "auto",
    inputs: Any = None,
    loss: Loss | Task | None = None,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    executor: Any = None,
    progress: bool = True,
) -> PairwiseBarriers:
    """The barriers of the lines between every two of many networks.

    An interrupt returns what is done (the rest NaN, with a warning), and `resume` goes on from there; so does an executor
    that loses its workers.

    Args:
        model: the architecture.
        models: at least two weight sets of it: modules, state dicts, or opened checkpoints, which each worker reads itself.
        data: as for `loss_path`.
        names: what the networks are called (default: "0", "1", ...).
        align: a function of the weights of two networks that gives those of the second moved onto the first, or a
            permutation that moves them: `functools.partial(lmc.weight_matching, spec, progress=False)`.
        alphas: points on each line, as for `loss_path`.
        resume: an unfinished result of the same arguments, whose pairs are taken over.
        repair, inputs, loss, outputs, batch_size, device: as for `loss_path`.
        executor: a `concurrent.futures.Executor` or a dask `Client` whose workers take the pairs (default: one after the
            other, here). Networks and data are sent once to each worker.
        progress: show a bar when it takes more than about two seconds.

    Raises:
        InputError: an unusable argument.
        MismatchError: networks of different architectures, dtypes or devices.
        WeightsError: weights that are not finite.
        DataError: unusable data.
        WorkerError: an executor that lost its workers before any pair was done.
    """
    if isinstance(models, Mapping) or len(models) < 2:
        raise InputError(f"models: expected at least two networks, got {len(models)}")
    called = tuple(map(str, range(len(models)))) if names is None else tuple(names)
    if len(called) != len(models) or len(set(called)) != len(called):
        raise InputError(f"names={list(called)}; expected {len(models)} different names")
    found = _blank(called, align is not None) if resume is None else _copy(resume, called, align is not None)
    pairs = [pair for pair in combinations(range(len(models)), 2) if np.isnan(found.barriers[pair])]
    shared: dict[str, Any] = {
        "model": model, "models": [weights if isinstance(weights, Mapping) else as_weights(weights) for weights in models],
        "data": reread(data), "names": called, "align": align,
        "alphas": points_of(alphas), "repair": repair, "inputs": inputs, "loss": loss, "outputs": outputs,
        "batch_size": batch_size, "device": device,
    }  # fmt: skip
    total = len(called) * (len(called) - 1) // 2
    done = total - len(pairs)
    with tqdm(total=total, initial=done, desc="pairs", unit="pair", disable=not progress) as bar:
        try:
            together = -(-len(pairs) // MOST_TASKS)
            parts = [pairs[start : start + together] for start in range(0, len(pairs), together or 1)]
            for k, part in spread(executor, _measure, shared, parts):
                for pair, (split, unit, *measured) in zip(parts[k], part, strict=True):
                    found = replace(found, split=split, unit=unit)  # the arrays stay the same
                    _note(found, pair, *measured)
                done += len(part)
                bar.update(len(part))
        except (KeyboardInterrupt, WorkerError) as error:
            if not done:
                raise
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            warn(f"{why}: {done} of {total} pairs were evaluated, the others are NaN; resume= goes on from there")
    return found


def _measure(
    model: nn.Module,
    models: Sequence[Weights],
    data: Any,
    names: Sequence[str],
    align: Move | None,
    alphas: Values,
    **options: Any,
) -> Callable[[Sequence[Pair]], list[tuple[str, str, float, float, float, float]]]:
    """A worker's task for some pairs: of each split, unit, barrier, error barrier and the losses of both ends."""

    def measure(pair: Pair) -> tuple[str, str, float, float, float, float]:
        i, j = pair
        a, b = as_weights(models[i]), as_weights(models[j])  # checkpoints are read once for all that follows
        if align is not None:
            moved = align(a, b)
            b = moved.apply(b) if hasattr(moved, "apply") else as_weights(moved)
        evaluation = Evaluation(
            model, (a, b), data, names=(names[i], names[j]), repairs=True, progress=False, **options
        )
        path = mixture_path(evaluation, lambda alpha: (1.0 - alpha, alpha), alphas)
        start, end = path.losses[path.split][np.isin(path.alphas, (0.0, 1.0))]
        known = math.isfinite(start) and math.isfinite(end)
        rises = (path.barrier, path.error_barrier) if known else (math.nan, math.nan)
        return path.split, path.unit, *rises, float(start), float(end)

    return lambda pairs: [measure(pair) for pair in pairs]


def _blank(names: tuple[str, ...], aligned: bool) -> PairwiseBarriers:
    """Barriers of which only the diagonal is known."""
    grid = np.full((len(names), len(names)), math.nan)
    np.fill_diagonal(grid, 0.0)
    return PairwiseBarriers(names, grid, grid.copy(), np.full(len(names), math.nan), "", aligned=aligned)


def _copy(resume: PairwiseBarriers, names: tuple[str, ...], aligned: bool) -> PairwiseBarriers:
    """Barriers that are known, in arrays of their own.

    Raises:
        InputError: they are of other networks, or otherwise aligned.
    """
    if (resume.names, resume.aligned) != (names, aligned):
        raise InputError("resume: barriers of other networks, or otherwise aligned; pass it with the same arguments")
    arrays = {name: getattr(resume, name).copy() for name in ("barriers", "error_barriers", "losses")}
    return replace(resume, **arrays)


def _note(found: PairwiseBarriers, pair: Pair, barrier: float, error_barrier: float, *ends: float) -> None:
    for place in (pair, pair[::-1]):
        found.barriers[place], found.error_barriers[place] = barrier, error_barrier
    found.losses[list(pair)] = ends
