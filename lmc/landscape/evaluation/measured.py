"""Common ground of paths, planes and mixtures: values of measures at their points, and further points evaluated live."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lmc.errors import WeightsError
from lmc.landscape.evaluation.evaluation import Evaluation
from lmc.landscape.evaluation.predictions import Predictions, collect
from lmc.landscape.evaluation.scores import Score
from lmc.weights import Weights

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
        self._last: tuple[tuple[float, ...], dict[str, Score], Predictions | None] | None = None

    def __call__(self, *place: float) -> dict[str, Score]:
        """The scores of every split.

        Raises:
            WeightsError: the weights have been changed since.
            DataError: the data can be read only once.
        """
        return self._at(place)[0]

    def predictions(self, *place: float) -> Predictions | None:
        """The classes that the network there predicts on the last split; None where there are none to show."""
        return self._at(place)[1]

    def _at(self, place: tuple[float, ...]) -> tuple[dict[str, Score], Predictions | None]:
        if any(tensor._version != version for tensor, version in self._seen):
            raise WeightsError("the weights have been changed since this was evaluated; evaluate it again")
        if self._last is None or self._last[0] != place:
            if self._evaluation is None:
                with warnings.catch_warnings():  # what there is to warn of was said when the result was made
                    warnings.simplefilter("ignore")
                    self._evaluation = self._again()
                    self._evaluation.evaluator.predictions = True
            evaluator = self._evaluation.evaluator
            scores = next(evaluator([self._weights_at(self._evaluation, *place)]))
            shown = evaluator.splits[-1]
            predicted: list[Tensor | None] = [scores[shown.name].predictions]
            self._last = place, scores, collect(shown, predicted)
        return self._last[1:]

    def __reduce__(self) -> Any:
        return type(None), ()
