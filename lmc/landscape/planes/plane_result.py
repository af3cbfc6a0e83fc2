"""The result of evaluating a plane in weight space."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lmc.core.codec import UNSAVED
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.evaluation.measured import Live, Measured, Values
from lmc.landscape.planes.span import Frame
from lmc.weights import ModelOrWeights

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Plane(Measured, Result):
    """Losses and accuracies over a plane in weight space.

    Attributes:
        x, y: (X,) and (Y,) ascending, the columns and rows of the grid; the models lie on nodes of it.
        values: split -> measure -> (Y, X): "loss", "accuracy" (a fraction) and any further metric; NaN where it is
            not known.
        places: name of a model -> its (x, y).
        own: split -> measure -> the value of each model, in the order of `places`, as it was given. With batch
            statistics re-estimated they may differ from the plane at its place, otherwise they agree.
        done: (Y, X) which points are known; all, unless an interrupt came first.
        axes: what x and y are.
        recalibrated: batch statistics were re-estimated at every point.
        tracks: name -> (K, 2), curves to be drawn in the plane; see `with_tracks`.
        labels: name of a track -> what its K points are called.
        distances: name of a track -> (K,) how far its weights are off the plane.
        interpolated: (Y, X) which points were not evaluated but interpolated (see `tolerance` of `loss_plane`); none
            where this is a single False.
        error: split -> measure -> the largest error of interpolation at points that were held out to measure it.
        explained: of the plane of a trajectory, the share of the squared distances to its end along each axis.
        unit: of the loss.
        higher: the measures of which higher values are better.
        frame: the plane in weight space, which `project` measures in; None for a plane that was read from a file.
        exact: evaluates any other point, `exact(x, y)[split].loss`; it keeps the networks and data alive. None for a plane
            that was read from a file.
    """

    x: Values
    y: Values
    values: dict[str, dict[str, Values]]
    places: dict[str, tuple[float, float]]
    own: dict[str, dict[str, tuple[float, ...]]]
    done: npt.NDArray[np.bool_]
    axes: tuple[str, str]
    recalibrated: bool = False
    tracks: dict[str, Values] = field(default_factory=dict, repr=False)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    distances: dict[str, Values] = field(default_factory=dict, repr=False)
    interpolated: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((), dtype=bool))
    error: dict[str, dict[str, float]] = field(default_factory=dict)
    explained: tuple[float, float] | None = None
    unit: str = "nats"
    higher: tuple[str, ...] = ("accuracy",)
    frame: Frame | None = field(default=None, repr=False, metadata=UNSAVED)
    exact: Live | None = field(default=None, repr=False, metadata=UNSAVED)

    @property
    def complete(self) -> bool:
        """No point is missing."""
        return bool(self.done.all())

    @property
    def evaluated(self) -> npt.NDArray[np.bool_]:
        """(Y, X) which points were evaluated as they are."""
        return self.done & ~self.interpolated

    @property
    def gaps(self) -> dict[str, int]:
        """measure -> number of points that are known to be NaN, in any split."""
        measures = self.values[self.split]
        nans = {m: np.any([values[m] != values[m] for values in self.values.values()], axis=0) for m in measures}
        return {measure: int((nan & self.done).sum()) for measure, nan in nans.items()}

    def project(self, weights: ModelOrWeights) -> tuple[float, float, float]:
        """x and y of the point of the plane that is nearest to `weights`, and the distance of the weights off the plane.

        Distances are Euclidean, over parameters; in the plane of `random_plane` x and y are in lengths of filters.

        Raises:
            InputError: a plane that was read from a file, without its models.
            MismatchError: weights of another architecture.
        """
        if self.frame is None:
            raise InputError(
                "this plane was read from a file, without its models: evaluate it again to project weights"
            )
        return self.frame.project(weights)

    def with_tracks(self, tracks: Mapping[str, Mapping[int, ModelOrWeights] | Sequence[ModelOrWeights]]) -> "Plane":
        """This plane with further curves, for example the checkpoints of a run: `{"run": checkpoints}`.

        Args:
            tracks: name -> weights from start to end, projected onto the plane; or epoch -> weights, which labels them.

        Raises:
            InputError: a plane that was read from a file, without its models.
            MismatchError: weights of another architecture.
        """
        found, labels, distances = dict(self.tracks), dict(self.labels), dict(self.distances)
        for name, run in tracks.items():
            states = dict(run) if isinstance(run, Mapping) else dict(enumerate(run))
            places = np.array([self.project(state) for state in states.values()], dtype=np.float64).reshape(-1, 3)
            found[name], distances[name] = places[:, :2], places[:, 2]
            labels[name] = tuple(map(str, states))
        return replace(self, tracks=found, labels=labels, distances=distances)

    def _off(self, split: str, measure: str) -> float:
        """The error of interpolation as a share of the range."""
        known = self.values[split][measure][np.isfinite(self.values[split][measure])]
        return self.error[split][measure] / max(float(np.ptp(known)), 1e-30) if len(known) else 0.0

    def to_frame(self) -> "pd.DataFrame":
        """A row for each point and split: x, y, split, loss, accuracy and metrics; where points were interpolated, also
        which were evaluated."""
        pd = require("pandas")

        x, y = (grid.ravel() for grid in np.meshgrid(self.x, self.y))
        frames = [
            pd.DataFrame({"x": x, "y": y, "split": split, **{name: grid.ravel() for name, grid in measures.items()}})
            for split, measures in self.values.items()
        ]
        flags = {"evaluated": self.evaluated.ravel()} if self.interpolated.any() else {}
        return pd.concat([frame.assign(**flags) for frame in frames], ignore_index=True)

    def __str__(self) -> str:
        head = f"Plane of {len(self.x)} x {len(self.y)} points"
        if not self.complete:
            head += f", {int((~self.done).sum())} not evaluated"
        head += "".join(f", {count} where {measure} is NaN" for measure, count in self.gaps.items() if count)
        lines = [head + (", batch statistics re-estimated at each" if self.recalibrated else "")]
        if self.explained is not None:
            lines.append(f"  axes explain {self.explained[0]:.1%} and {self.explained[1]:.1%} of the trajectory")
        if self.interpolated.any():
            worst = {m: max(self._off(split, m) for split in self.values) for m in self.values[self.split]}
            told = ", ".join(f"{measure} {share:.2%}" for measure, share in worst.items())
            count = f"{int(self.evaluated.sum())} evaluated, the others interpolated"
            lines.append(f"  {count}; largest error where it was checked, as a share of the range: {told}")
        for split, loss in self.losses.items():
            known = loss[~np.isnan(loss)]
            models = ", ".join(f"{v:.3f} at {n}" for n, v in zip(self.places, self.own[split]["loss"], strict=True))
            span = f", {known.min():.3f} to {known.max():.3f} over the plane" if len(known) else ""
            lines.append(f"  {split}: loss {models}{span}")
        return "\n".join(lines)

    __repr__ = __str__
