"""What paths, planes and curves share: statistics re-estimated at every point, and runs over points that can break off."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.landscape.evaluation.scores import Score
from lmc.network.batches import Split, take
from lmc.network.batchnorm import Recalibrator, equal_batches, has_batchnorm
from lmc.network.repair import Method, Renormalizer
from lmc.weights import Weights

STATISTICS_EXAMPLES = 2048  # inputs that statistics are estimated from at every point
STATISTICS_BATCH = 256

REPAIRS: dict[str, Method] = {"repair": "passes", "closed_form": "closed_form"}


def preparation(evaluator: Evaluator, repair: str | None, inputs: Any, stacklevel: int = 4) -> Recalibrator | None:
    """What is done to averaged weights before they are evaluated; a warning names the caller `stacklevel` calls up.

    Raises:
        InputError: `repair` is neither "auto" nor None.
    """
    if repair not in ("auto", None):
        raise InputError(f'repair={repair!r}; expected "auto" or None')
    if not has_batchnorm(evaluator.network.module):
        return None
    if repair is None:
        warnings.warn(
            "this model has batch normalisation and repair=None: averaged running statistics fit neither network, and "
            "the barrier mostly looks higher than it is; leave repair='auto' to re-estimate them",
            stacklevel=stacklevel,
        )
        return None
    return Recalibrator(evaluator.network, _inputs(evaluator, inputs), STATISTICS_BATCH)


def renormalizer(
    evaluator: Evaluator, controls: Sequence[Weights], repair: str, inputs: Any, progress: bool
) -> Renormalizer:
    """Averages of `controls` with the statistics of all their layers repaired, for `repair` one of `REPAIRS`."""
    calls = equal_batches(_inputs(evaluator, inputs), STATISTICS_BATCH)
    return Renormalizer(evaluator.network, controls, calls, REPAIRS[repair], batch_size=None, progress=progress)


def _inputs(evaluator: Evaluator, given: Any) -> Any:
    return some_inputs(evaluator.splits[0]) if given is None else given


def some_inputs(split: Split) -> Any:
    """Evenly spaced inputs of a split given whole, else its first batches: about `STATISTICS_EXAMPLES` of them."""
    if split.whole:
        inputs, targets = next(iter(split.batches))
        return take(inputs, slice(None, None, -(-len(targets) // STATISTICS_EXAMPLES)))
    found, count = [], 0
    for inputs, targets in split.batches:
        if len(targets) > 1:  # a loader's last batch may be one example, which has no variance
            found.append(inputs)
        count += len(targets)
        if count >= STATISTICS_EXAMPLES:
            break
    return found


def run(
    evaluator: Evaluator, states: Iterable[Weights], order: Sequence[int], name: str, progress: bool, fewest: int = 1
) -> dict[int, dict[str, Score]]:
    """The scores of `states` by the indices in `order`; fewer where an interrupt came first.

    Args:
        name: of what is evaluated, for the bar.
        fewest: an interrupt before so many points are done is passed on.
    """
    scores: dict[int, dict[str, Score]] = {}
    with tqdm(total=len(order), desc=name, unit="point", disable=not progress) as bar:
        try:
            for i, score in zip(order, evaluator(states), strict=True):
                scores[i] = score
                bar.update()
        except KeyboardInterrupt:
            if len(scores) < fewest:
                raise
            warnings.warn(
                f"interrupted: {len(scores)} of {len(order)} points were evaluated, the others are NaN", stacklevel=4
            )
    return scores
