"""Further points of a path or plane, evaluated while its networks and data are still at hand."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lmc.errors import WeightsError
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.landscape.evaluation.predictions import Predictions, collect
from lmc.landscape.evaluation.scores import Score
from lmc.network.batchnorm import Recalibrator
from lmc.weights import Weights

# What evaluates, what is done to the weights of a point before, and the weights of a point.
Bench = tuple[Evaluator, Recalibrator | None, Callable[..., Weights]]


class Live:
    """Scores a place of the landscape that was not among the evaluated points: `live(alpha)`, `live(x, y)`.

    It refers to the networks and data that were given and copies none of them; whoever changes the weights afterwards is
    told. It stays behind when a result is saved, copied or pickled.

    Args:
        make: called once, at the first place asked for.
        weights: what must not have changed since.
    """

    def __init__(self, make: Callable[[], Bench], weights: Sequence[Weights]) -> None:
        self._make = make
        self._bench: Bench | None = None
        self._seen = [(tensor, tensor._version) for state in weights for tensor in state.values()]
        self._last: tuple[tuple[float, ...], dict[str, Score], Predictions | None] | None = None

    def __call__(self, *place: float) -> dict[str, Score]:
        """The scores of every split.

        Raises:
            WeightsError: the weights have been changed since. DataError: the data can be read only once.
        """
        return self._at(place)[0]

    def predictions(self, *place: float) -> Predictions | None:
        """What the network there predicts on the last split; None where there is nothing to show."""
        return self._at(place)[1]

    def _at(self, place: tuple[float, ...]) -> tuple[dict[str, Score], Predictions | None]:
        if any(tensor._version != version for tensor, version in self._seen):
            raise WeightsError("the weights have been changed since this was evaluated; evaluate it anew")
        if self._last is None or self._last[0] != place:
            if self._bench is None:
                with warnings.catch_warnings():  # what there is to warn of was said when the result was made
                    warnings.simplefilter("ignore")
                    self._bench = self._make()
            evaluator, prepare, state_at = self._bench
            evaluator.predictions = True
            state = state_at(*place)
            scores = next(evaluator([state if prepare is None else prepare(state)]))
            shown = evaluator.splits[-1]
            predicted: list[Tensor | None] = [scores[shown.name].predictions]
            self._last = place, scores, collect(shown, predicted)
        return self._last[1:]

    def __reduce__(self) -> Any:
        return type(None), ()
