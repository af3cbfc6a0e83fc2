"""The loss of a batch as something to be differentiated."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from lmc.errors import DataError
from lmc.landscape.evaluation.scores import IGNORED, check_classes, class_last
from lmc.network.batches import Split, take, to_device
from lmc.network.network import Network
from lmc.weights import Weights

# (outputs, targets) of a batch -> one value for each example along axis 0, or their mean.
Loss = Callable[[Tensor, Tensor], Tensor]


def mean_loss(outputs: Tensor, targets: Tensor, loss: Loss | None) -> Tensor:
    """The mean of a loss (None: cross-entropy) over a batch, where autograd follows it."""
    if loss is not None:
        return loss(outputs, targets).mean()
    logits = class_last(outputs[None], targets)
    assert logits is not None  # checked on the first batch
    return F.cross_entropy(logits[0], targets.reshape(-1).long(), ignore_index=IGNORED)


def check_training_data(network: Network, weights: Weights, split: Split, loss: Loss | None) -> None:
    """Raise `DataError` for inputs or targets that do not fit the network, before a step is made."""
    network.load(weights)
    inputs, targets = next(split.iterate(8))
    network.check_inputs(weights, inputs, split.name)
    outputs = network(to_device(take(inputs, slice(8)), network.device))
    if loss is not None:
        return
    logits = class_last(outputs[None], targets[:8])
    if logits is None:
        raise DataError(
            f"{split.name}: outputs {tuple(outputs.shape)} and targets {targets.dtype} {tuple(targets.shape)} are no "
            "classification; pass loss="
        )
    for _inputs, goal in split.batches if split.held else []:
        check_classes(goal, logits.shape[-1], split.name)
