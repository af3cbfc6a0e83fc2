"""The judge of what is chosen: a part of the training data held out from all that is learned."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from lmc.errors import DataError
from lmc.landscape.evaluation.evaluation import Evaluation
from lmc.landscape.path import loss_path
from lmc.network.batches import Batch, as_splits, cuttable, take
from lmc.network.inputs import first_of, with_decoder
from lmc.network.task import Task
from lmc.weights import Weights, mean

SHARE = 5  # one example in so many is held out
MOST = 2048  # examples that are held out
STATISTICS = 512  # examples that batch statistics are estimated from,
FEW = 4  # or batches
BATCHES = 64  # that are taken of data which are not held in memory
ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
MIXED = 0.2  # of another input in each that is judged by,
SEED = 0  # which is drawn


def held_out(data: Any, task: Task, seed: int) -> tuple[Any, Any, int]:
    """The training split of the data in two parts, to learn from and to judge by, and the examples in the second.

    Every fifth example is held out, 2048 at most, drawn at random where the data are given whole. Of batches that cannot
    be cut (graphs) every fifth is held out; a single one serves for both.
    """
    split = as_splits(data, task.targets)[0]
    batches = list(split.batches) if split.held else list(islice(split.batches, BATCHES))
    if len(batches) == 1 and cuttable(*batches[0]) and len(batches[0][1]) >= 2 * SHARE:
        inputs, targets = batches[0]
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).to(targets.device)
        count = min(len(targets) // SHARE, MOST)
        held, learn = order[:count].sort().values, order[count:].sort().values
        return (take(inputs, learn), targets[learn]), (take(inputs, held), targets[held]), count
    if len(batches) >= SHARE:
        held = batches[:: len(batches) // max(1, len(batches) // SHARE)]
        learn = [batch for batch in batches if not any(batch is other for other in held)]
    else:
        cut = list(_cut(batches))
        learn, held = [first for first, _ in cut], [second for _, second in cut]
    return learn, held, sum(len(targets) for _, targets in held)


def inputs_of(model: nn.Module, part: Any) -> Any:
    """The inputs of a part: of one batch, or a list of those of several; with those of a decoder, made of the targets."""
    return with_decoder(model, *part) if isinstance(part, tuple) else [with_decoder(model, *batch) for batch in part]


def _cut(batches: list[Batch]) -> Iterator[tuple[Batch, Batch]]:
    """Each batch in two parts, or twice where it is too short or cannot be cut."""
    for inputs, targets in batches:
        if cuttable(inputs, targets) and len(targets) >= 2 * SHARE:
            end = len(targets) - len(targets) // SHARE
            yield (take(inputs, slice(end)), targets[:end]), (take(inputs, slice(end, None)), targets[end:])
        else:
            yield (inputs, targets), (inputs, targets)


def mixed(part: Any, generator: torch.Generator, share: float = MIXED) -> Any:
    """The examples of a part, a share of another one's input mixed into each where inputs are real numbers; targets stay."""
    if isinstance(part, list):
        return [mixed(batch, generator, share) for batch in part]
    inputs, targets = part
    if not (isinstance(inputs, torch.Tensor) and inputs.is_floating_point()):
        return part
    others = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    return torch.lerp(inputs, inputs[others], share), targets


class Judge:
    """The barrier between A and B moved on held-out examples, at a few points.

    Networks have learned their training examples by heart, those held out here among them: on these, scales that were
    learned look better than they are on new ones. So they are judged between the examples, by inputs with a share of
    another mixed in, as Zhang et al. (2018, arXiv:1710.09412) made them to train on; the targets stay.

    Args:
        model, a, b: the pair; whatever is judged computes what they compute.
        held: the examples to judge by.
        inputs: from which batch statistics are estimated.
        task: how outputs are judged.

    Attributes:
        unit: of the loss.
    """

    def __init__(
        self, model: nn.Module, a: Weights, b: Weights, held: Any, inputs: Any, task: Task, device: torch.device
    ) -> None:
        held = mixed(held, torch.Generator().manual_seed(SEED))
        inputs = inputs[:FEW] if isinstance(inputs, list) else first_of(inputs, STATISTICS)
        self._evaluation = Evaluation(
            model, (a, b), held, names="ab", inputs=inputs, loss=task, device=device, progress=False
        )
        self._repaired = partial(
            loss_path, model, alphas=ALPHAS, repair="repair", inputs=inputs, loss=task, device=device, progress=False
        )
        self._held = held
        self.unit = self._evaluation.evaluator.task.unit
        self._ends = [self._loss(self._evaluation.ready(state)) for state in self._evaluation.states]
        if not all(map(torch.isfinite, map(torch.tensor, self._ends))):
            raise DataError(f"the losses of a and b, {self._ends}, are no numbers: there is nothing to connect")

    def __call__(self, a: Weights, moved: Weights) -> float:
        """The barrier above the line between the ends, in the unit of the loss; infinite where a loss is no number."""
        start, end = self._ends
        highest = 0.0
        for alpha in ALPHAS:
            loss = self._loss(self._evaluation.ready(mean([a, moved], (1.0 - alpha, alpha))))
            highest = max(highest, loss - (1.0 - alpha) * start - alpha * end) if loss == loss else float("inf")
        return highest

    def repaired(self, a: Weights, moved: Weights) -> float:
        """The same, every layer between the ends given the statistics that it has in the ends."""
        return self._repaired(a, moved, self._held).barrier

    def _loss(self, weights: Weights) -> float:
        return next(iter(next(self._evaluation.evaluator([weights])).values())).loss
