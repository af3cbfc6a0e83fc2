"""Barriers between two training runs, epoch by epoch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lmc.align.weight_matching.matching import weight_matching
from lmc.core.context import own_context, warn
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.core.workers import spread
from lmc.errors import InputError, WorkerError
from lmc.landscape.path import Path, Repair, Values, loss_path
from lmc.network.batches import reread
from lmc.symmetry.spec import PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, as_weights

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Epochs(Result):
    """Paths between two runs at several epochs of their training.

    Attributes:
        epochs: (E,) ascending; 0 is before the first step.
        paths: "naive", and "aligned" where the second run was moved onto the first -> the path at each epoch.
    """

    epochs: tuple[int, ...]
    paths: dict[str, tuple[Path, ...]]

    def __post_init__(self) -> None:
        if not self.epochs or any(len(each) != len(self.epochs) for each in self.paths.values()):
            raise InputError(f"{len(self.epochs)} epochs, paths for {[len(each) for each in self.paths.values()]}")

    def __getitem__(self, epoch: int) -> dict[str, Path]:
        """The paths at one epoch.

        Raises:
            InputError: an epoch that is not among them.
        """
        if epoch not in self.epochs:
            raise InputError(f"epoch {epoch} was not evaluated; there are {', '.join(map(str, self.epochs))}")
        return {name: paths[self.epochs.index(epoch)] for name, paths in self.paths.items()}

    @property
    def barriers(self) -> dict[str, Values]:
        """name -> (E,) loss barrier, in the loss's unit; NaN where an end has no loss."""
        return {name: np.array([_barrier(path, "loss") for path in paths]) for name, paths in self.paths.items()}

    @property
    def error_barriers(self) -> dict[str, Values]:
        """name -> (E,) barrier of the classification error in percentage points; NaN where targets are no classes."""
        return {name: np.array([_barrier(path, "error") for path in paths]) for name, paths in self.paths.items()}

    def to_frame(self) -> "pd.DataFrame":
        """A row for each epoch and path: epoch, path, barrier, error_barrier, and the loss of both ends."""
        pd = require("pandas")

        loss, error = self.barriers, self.error_barriers
        rows = [
            {"epoch": epoch, "path": name, "barrier": loss[name][i], "error_barrier": error[name][i]}
            | dict(zip(("loss_a", "loss_b"), paths[i].own[paths[i].split]["loss"], strict=True))
            for i, epoch in enumerate(self.epochs)
            for name, paths in self.paths.items()
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        lines = [f"Epochs {self.epochs[0]} to {self.epochs[-1]} ({len(self.epochs)}) of two runs"]
        for name, found in self.barriers.items():
            top = "no barrier known" if np.isnan(found).all() else f"highest {np.nanmax(found):.3f} at epoch "
            top += "" if np.isnan(found).all() else str(self.epochs[int(np.nanargmax(found))])
            lines.append(f"  {name}: barrier {found[0]:.3f} at first, {found[-1]:.3f} at last, {top}")
        return "\n".join(lines)

    __repr__ = __str__


@own_context
def barrier_over_time(
    model: nn.Module,
    a: Mapping[int, ModelOrWeights],
    b: Mapping[int, ModelOrWeights],
    data: Any,
    *,
    spec: PermutationSpec | UnboundSpec | None = None,
    epochs: Sequence[int] | None = None,
    alphas: int | Sequence[float] = 25,
    seed: int = 0,
    repair: Repair = "auto",
    inputs: Any = None,
    batch_size: int | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Epochs:
    """The paths between two runs at each epoch, as they are and, given `spec`, with the units of the second run in the order
    that fits those of the first at this epoch best.

    Barriers between runs from different seeds appear within the first epochs and stay; alignment removes more of them the
    longer the networks have trained (Ainsworth et al. 2023, arXiv:2209.04836, section 5 and figure 3). For runs that
    share their first epochs this is the instability analysis of Frankle et al. (2020, arXiv:1912.05671).

    Args:
        model: the architecture.
        a, b: epoch -> weights, for example `trained.trajectory[0]` of training with `keep=1`.
        data: as for `loss_path`.
        spec: the symmetries of the model; runs are then aligned by `weight_matching`.
        epochs: which to evaluate (default: all that both runs have).
        alphas, repair, inputs, batch_size: as for `loss_path`.
        seed: of `weight_matching`.
        executor: a `concurrent.futures.Executor` or a dask `Client` whose workers take the epochs (default: here). Their
            paths have no `exact`.
        progress: show a bar when it takes more than about two seconds.

    An interrupt returns the epochs that are done, with a warning, once there is one; so does an executor that loses its
    workers.

    Raises:
        InputError: runs without a common epoch, an epoch that one of them lacks, or what `loss_path` raises.
    """
    chosen = _common(a, b, epochs)
    options: dict[str, Any] = {"alphas": alphas, "repair": repair, "inputs": inputs, "batch_size": batch_size}
    shared = {"model": model, "a": a, "b": b, "data": reread(data), "spec": spec, "seed": seed, "options": options}
    found: dict[int, dict[str, Path]] = {}
    with tqdm(total=len(chosen), desc="epochs", unit="epoch", disable=not progress) as bar:
        try:
            for i, paths in spread(executor, _at, shared, chosen):
                found[chosen[i]] = paths
                bar.update()
        except (KeyboardInterrupt, WorkerError) as error:
            if not found:
                raise
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            warn(f"{why}: {len(found)} of {len(chosen)} epochs were evaluated")
    kept = tuple(sorted(found))
    return Epochs(kept, {name: tuple(found[epoch][name] for epoch in kept) for name in found[kept[0]]})


def _at(
    model: nn.Module,
    a: Mapping[int, ModelOrWeights],
    b: Mapping[int, ModelOrWeights],
    data: Any,
    spec: PermutationSpec | UnboundSpec | None,
    seed: int,
    options: dict[str, Any],
) -> Callable[[int], dict[str, Path]]:
    """A worker's task for an epoch."""

    def paths(epoch: int) -> dict[str, Path]:
        start, end = as_weights(a[epoch]), as_weights(b[epoch])
        ends = {"naive": end}
        if spec is not None:
            ends["aligned"] = weight_matching(spec, start, end, seed=seed, progress=False).apply(end)
        return {n: loss_path(model, start, other, data, progress=False, **options) for n, other in ends.items()}

    return paths


def _common(a: Any, b: Any, epochs: Sequence[int] | None) -> list[int]:
    """The epochs to evaluate, ascending."""
    for name, run in (("a", a), ("b", b)):
        if not isinstance(run, Mapping) or not all(isinstance(epoch, int) for epoch in run):
            raise InputError(
                f"{name}: expected a mapping epoch -> weights, got {type(run).__name__}; training with keep= leaves one "
                "for each seed in `.trajectory`"
            )
    common = sorted(a.keys() & b.keys())
    if not common:
        raise InputError(f"the runs share no epoch: a has {sorted(a)}, b {sorted(b)}")
    if epochs is None:
        return common
    wanted = sorted(set(epochs))
    missing = [epoch for epoch in wanted if epoch not in common]
    if missing or not wanted:
        raise InputError(f"epochs={list(epochs)}; the runs share {common}")
    return wanted


def _barrier(path: Path, measure: str) -> float:
    try:
        return path.barrier_of(measure).value
    except InputError:  # an end that is not a number, or targets that are no classes
        return math.nan
