"""Common ground of paths, planes and mixtures: values of measures at their points, predictions kept small enough to travel
into a page, and further points evaluated live."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmc.errors import InputError, WeightsError
from lmc.landscape.evaluation.evaluation import Evaluation
from lmc.landscape.evaluation.scores import Score
from lmc.network.batches import Split
from lmc.weights import Weights

MOST_CLASSES = 50
IMAGE_BYTES = 96_000  # for the examples that are drawn


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predicted classes at every point of a path.

    Attributes:
        split: whose examples these are.
        confusion: (P, C, C) int64, `[point, true class, predicted class]`, over all examples; 0 where not evaluated.
        index: (S,) which examples are shown below: those ever predicted wrong first, as many as stay small.
        targets: (S,) their classes.
        predicted: (P, S) their predicted classes, -1 where not evaluated.
        images: (S, H, W) or (S, H, W, 3) uint8, the examples as pictures; None where inputs are no images.
    """

    split: str
    confusion: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    images: npt.NDArray[np.uint8] | None


def collect(split: Split, predicted: Sequence[Tensor | None], *, unlike_first: bool = False) -> Predictions | None:
    """From the predictions (N,) at each point (None: not evaluated); None where there is nothing to show.

    Args:
        unlike_first: keep the examples on which a point differs from the first one, not those that are wrong.
    """
    known = [row for row in predicted if row is not None]
    if not known or not split.held:
        return None
    targets = torch.cat([batch[1] for batch in split.batches]).cpu().long().numpy()
    count = len(targets)
    classes = int(max(targets.max(), *(int(row.max()) for row in known))) + 1
    if classes > MOST_CLASSES or targets.min() < 0:
        return None
    table = np.full((len(predicted), count), -1, dtype=np.int64)
    confusion = np.zeros((len(predicted), classes, classes), dtype=np.int64)
    for point, row in enumerate(predicted):
        if row is not None:
            table[point] = row.numpy()
            pairs = np.bincount(targets * classes + table[point], minlength=classes * classes)
            confusion[point] = pairs.reshape(classes, classes)
    inputs = _inputs(split)
    index = np.sort(
        _choose(table[0] if unlike_first else targets, table, 1 if inputs is None else math.prod(inputs.shape[1:]))
    )
    images = None if inputs is None else as_images(inputs, index)
    return Predictions(split.name, confusion, index, targets[index], table[:, index], images)


def as_images(inputs: Tensor, index: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.uint8] | None:
    """Inputs (N, D) with D a square number, (N, H, W), (N, 1, H, W) or (N, 3, H, W) as bytes, channels last.

    The smallest value of each channel becomes 0, the largest 255. None for anything that is no picture.

    Args:
        index: which of the inputs are wanted (default: all).
    """
    pictures = _channels_first(inputs)
    if pictures is None:
        return None
    low, high = (edge(dim=(0, 2, 3), keepdim=True).float() for edge in (pictures.amin, pictures.amax))
    pixels = (pictures if index is None else pictures[torch.from_numpy(index)]).float()
    shades = (255.0 * (pixels - low) / (high - low).clamp_min(1e-12)).round().to(torch.uint8).numpy()
    return shades[:, 0] if shades.shape[1] == 1 else shades.transpose(0, 2, 3, 1)


def _channels_first(inputs: Tensor) -> Tensor | None:
    """Inputs as (S, 1 or 3, H, W), or None."""
    if inputs.dtype not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return None
    if inputs.ndim == 2:
        side = math.isqrt(inputs.shape[1])
        if side < 4 or side * side != inputs.shape[1]:
            return None
        inputs = inputs.reshape(len(inputs), side, side)
    if inputs.ndim == 3:
        inputs = inputs[:, None]
    if inputs.ndim != 4 or inputs.shape[1] not in (1, 3) or min(inputs.shape[2:]) < 4:
        return None
    return inputs.detach().cpu()


def _inputs(split: Split) -> Tensor | None:
    parts = [batch[0] for batch in split.batches]
    if not all(isinstance(part, Tensor) for part in parts) or as_images(parts[0][:1]) is None:
        return None
    return torch.cat([part.cpu() for part in parts])


def _choose(targets: npt.NDArray[np.int64], table: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Examples to show, `size` bytes each: first those that few networks decide otherwise than `targets`, which are the ones
    to look at near the ends, then those that many do, last the ones that none does."""
    wrong = ((table != targets) & (table >= 0)).sum(0)
    rank = np.where(wrong > 0, wrong, np.iinfo(np.int64).max)
    return np.argsort(rank, kind="stable")[: max(IMAGE_BYTES // size, 16)]


Values = npt.NDArray[np.float64]


class Measured:
    """A result that holds `values`: split -> measure -> one value per point, in the shape of its points.

    Attributes:
        unit: of the loss; empty where it is not known.
        higher: the measures of which higher values are better.
    """

    values: dict[str, dict[str, Values]]
    unit: str
    higher: tuple[str, ...]

    @property
    def split(self) -> str:
        """The split that counts unless another is named: "test" where there is one."""
        return "test" if "test" in self.values else next(iter(self.values))

    @property
    def losses(self) -> dict[str, Values]:
        """split -> mean loss at each point."""
        return {split: measures["loss"] for split, measures in self.values.items()}

    @property
    def accuracies(self) -> dict[str, Values]:
        """split -> fraction classified correctly at each point; empty where targets are no classes."""
        return {split: measures["accuracy"] for split, measures in self.values.items() if "accuracy" in measures}


class Surveyed(Protocol):
    """A result whose points are evaluated one after the other; see `Plane` and `Simplex`."""

    @property
    def values(self) -> dict[str, dict[str, Values]]: ...
    @property
    def own(self) -> Mapping[str, Mapping[str, Sequence[float]]]: ...
    @property
    def done(self) -> npt.NDArray[np.bool_]: ...
    @property
    def recalibrated(self) -> bool: ...


def take_over(fresh: Surveyed, earlier: Surveyed, known: npt.NDArray[np.bool_], same_points: bool, what: str) -> None:
    """Copy the points that an earlier result of the same arguments knows.

    Raises:
        InputError: it is of other models, data, measures or points.
    """
    same = same_points and fresh.values.keys() == earlier.values.keys() and fresh.recalibrated == earlier.recalibrated
    for split, measures in fresh.own.items():
        others = earlier.own.get(split, {})
        same = same and measures.keys() == others.keys()
        same = same and all(np.allclose(measures[m], others[m], rtol=1e-4, equal_nan=True) for m in measures)
    if not same:
        raise InputError(f"resume: {what} of other models, data, measures or points; pass it with the same arguments")
    fresh.done[:] = known
    for split, measures in fresh.values.items():
        for measure, values in measures.items():
            values[:] = np.where(known, earlier.values[split][measure], math.nan)


class Live:
    """Scores a place of the landscape that was not among the evaluated points: `live(alpha)`, `live(x, y)`.

    It refers to the networks and data that were given and copies none of them; whoever changes the weights afterwards is
    refused. It stays behind when a result is saved, copied or pickled.

    Args:
        evaluation: how the result was evaluated; made again at the first place asked for.
        weights_at: the weights of a place, ready to be evaluated: `weights_at(evaluation, *place)`.
    """

    def __init__(self, evaluation: Evaluation, weights_at: Callable[..., Weights]) -> None:
        self._again, self._weights_at = evaluation.again, weights_at
        self._evaluation: Evaluation | None = None
        self._seen = [(tensor, tensor._version) for state in evaluation.given for tensor in state.values()]
        self._last: tuple[tuple[float, ...], dict[str, Score]] | None = None
        self._decided: dict[tuple[float, ...], Tensor | None] = {}  # at the places that others are compared with

    def __call__(self, *place: float) -> dict[str, Score]:
        """The scores of every split.

        Raises:
            WeightsError: the weights have been changed since.
            DataError: the data can be read only once.
        """
        return self._at(place)[0]

    def predictions(self, *place: float, unlike: Sequence[float] | None = None) -> Predictions | None:
        """The classes that the network there predicts on the last split; None where there are none to show.

        Args:
            unlike: another place, which then is the first of two points; kept are examples that the two decide differently.
        """
        scores, split = self._at(place)
        found: Tensor | None = scores[split.name].predictions
        if unlike is None:
            return collect(split, [found])
        other = tuple(unlike)
        if other not in self._decided:
            self._decided[other] = self._at(other)[0][split.name].predictions
        return collect(split, [self._decided[other], found], unlike_first=True)

    def _at(self, place: tuple[float, ...]) -> tuple[dict[str, Score], Split]:
        if any(tensor._version != version for tensor, version in self._seen):
            raise WeightsError("the weights have been changed since this was evaluated; evaluate it again")
        if self._evaluation is None:
            with warnings.catch_warnings():  # what there is to warn of was said when the result was made
                warnings.simplefilter("ignore")
                self._evaluation = self._again()
                self._evaluation.evaluator.predictions = True
        evaluator = self._evaluation.evaluator
        if self._last is None or self._last[0] != place:
            self._last = place, next(evaluator([self._weights_at(self._evaluation, *place)]))
        return self._last[1], evaluator.splits[-1]

    def __reduce__(self) -> Any:
        return type(None), ()
