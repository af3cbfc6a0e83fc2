"""The loss of a network on labelled data, as matching by gradients needs it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lmc.landscape.evaluation.evaluation import Objective
from lmc.network.batches import Batch, check_numbers
from lmc.network.derived import derived_in, settled
from lmc.network.task import Loss, Task
from lmc.weights import Weights


class TaskLoss(Objective):
    """One architecture and one training set; the caller's module is not touched.

    Dropout is off. Batch normalisation uses the statistics of the batch: those that a mixture of two networks would
    inherit belong to neither.

    Args:
        model, weights, data, loss, device: as for `Objective`.
        batch_size: examples in a batch, where the data are given whole; one more where an example would be left alone,
            which has no batch statistics.

    Raises:
        DataError: data that are empty, malformed, hold NaN, or do not fit the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        data: Any,
        loss: Loss | Task | None,
        batch_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(model, weights, data, loss=loss, device=device, name="a")
        if self.split.held:
            for inputs, _ in self.split.batches:
                check_numbers(inputs, self.split.name)
        norms = {n: module for n, module in self.network.module.named_modules() if isinstance(module, _BatchNorm)}
        self._statistics = {f"{n}.{own}" for n, module in norms.items() for own, _ in module.named_buffers()}
        for module in norms.values():
            module.train()
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
            module.num_batches_tracked = None
        self._derived = bool(derived_in(weights))
        self._least = 2 if norms else 1
        self.batch_size = batch_size
        if self.split.whole and norms:
            examples = len(next(iter(self.split.batches))[1])
            while 1 < self.batch_size < examples and examples % self.batch_size == 1:
                self.batch_size += 1

    @torch.no_grad()
    def mean(self, weights: Weights) -> float:
        """The loss over all the data, batches weighted by the targets that count."""
        total = seen = 0.0
        for batch in self.split.iterate(self.batch_size):
            count = self.task.weight(batch[1])
            total += float(self(weights, batch)) * count
            seen += count
        return total / seen

    def epochs(self, generator: torch.Generator) -> Iterator[Batch]:
        """Batch after batch in random order, epoch after epoch without end."""
        while True:
            yield from self.epoch(generator)

    def epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        """The batches of one epoch, in random order where the data are held."""
        for batch in self.split.shuffled(self.batch_size, generator):
            if len(batch[1]) >= self._least:
                yield batch

    def __call__(self, weights: Weights, batch: Batch) -> Tensor:
        """The mean loss of one batch at a mixture of gauged weights (`lmc.network.derived`); statistics of batch
        normalisation among them are left aside."""
        weights = settled(weights) if self._derived else weights
        return super().__call__({name: x for name, x in weights.items() if name not in self._statistics}, batch)
