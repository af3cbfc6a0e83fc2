"""The loss of a network on labelled data as a differentiable function of its parameters."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lmc.network.batches import Batch, as_splits, check_numbers, take, to_device
from lmc.network.network import Network
from lmc.weights import Weights

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class TaskLoss:
    """One architecture and one training set; the caller's module is not touched.

    Dropout is off. Batch normalisation uses the statistics of the batch: those that a mixture of two networks would
    inherit belong to neither.

    Args:
        data: `(inputs, targets)`, an iterable of such batches, or an object with `.train`.
        loss: of outputs and targets; default: cross-entropy of outputs (N, C), or (N, ..., C) for targets (N, ...).

    Raises:
        DataError: data that are empty, malformed or hold NaN.
    """

    def __init__(self, model: nn.Module, data: Any, loss: Loss | None, batch_size: int, device: torch.device) -> None:
        self.network = Network(model, device)
        for module in self.network.module.modules():
            if isinstance(module, _BatchNorm):
                module.train()
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
                module.num_batches_tracked = None
        self.device, self.batch_size = device, batch_size
        self._split = as_splits(data)[0]
        if self._split.held:
            for inputs, _ in self._split.batches:
                check_numbers(inputs, self._split.name)
        self._loss = loss or cross_entropy
        module = self.network.module
        self._names = set(dict(module.named_parameters()) | dict(module.named_buffers()))

    def __call__(self, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The loss of the weights on one batch."""
        inputs, targets = to_device(batch[0], self.device), batch[1].to(self.device)
        used = {name: tensor for name, tensor in weights.items() if name in self._names}
        return self._loss(self.network.outputs(used, inputs), targets)

    @torch.no_grad()
    def mean(self, weights: Weights) -> float:
        """The loss over all the data, batches weighted by their examples."""
        total = seen = 0.0
        for batch in self._split.iterate(self.batch_size):
            total += float(self(weights, batch)) * len(batch[1])
            seen += len(batch[1])
        return total / seen

    def shuffled(self, generator: torch.Generator) -> Iterator[Batch]:
        """The batches of one epoch: in random order where the data are given whole, else as they come."""
        if not self._split.whole:
            yield from self._split.iterate(self.batch_size)
            return
        inputs, targets = next(iter(self._split.batches))
        for part in torch.randperm(len(targets), generator=generator).split(self.batch_size):
            if len(part) > 1:  # a single example has no batch statistics
                where = part.to(targets.device)
                yield take(inputs, where), targets[where]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N, C), (N, C, ...) or, one per position, (N, ..., C)."""
    if outputs.ndim > 2 and outputs.shape[:-1] == targets.shape:
        outputs, targets = outputs.flatten(0, -2), targets.flatten()
    return F.cross_entropy(outputs, targets)
