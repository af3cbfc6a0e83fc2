"""The loss on labelled data as a differentiable function of a network's weights."""

from typing import Any

import torch
from torch import Tensor, nn

from lmc.network.batches import Batch, as_splits, head, to_device
from lmc.network.network import Network, pick_device
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import Weights


class Objective:
    """The mean loss of a batch at any weights, `objective(weights, batch)`, where autograd follows it.

    Args:
        model: the architecture; not touched.
        weights: what the data are tried on before a step is made.
        data: as for `lmc.landscape.evaluate`; of several splits the first, which is the training split.
        loss, outputs, device: as for `lmc.landscape.evaluate`.
        name: how messages call the weights.

    Attributes:
        network: a private copy of the module, in eval mode.
        split, task: the data, and how they are judged.

    Raises:
        MismatchError: weights of another architecture.
        DataError: data that are unusable or do not fit the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        data: Any,
        *,
        loss: Loss | Task | None = None,
        outputs: Outputs = None,
        device: torch.device | str | None = None,
        name: str = "weights",
    ) -> None:
        task = Task.of(data, loss, outputs=outputs)
        self.split = as_splits(data, task.targets)[0]
        self.task = task.fitted(model, self.split)
        self.network = Network(model, pick_device(device, weights), self.task.read)
        self.network.check(weights, name)
        self.network.load(weights)
        inputs, targets = head(next(self.split.iterate(8)), 8)
        self.network.check_inputs(weights, inputs, self.split.name)
        call, targets = self._call((inputs, targets))
        self.task.check(self.network, self.split, self.network(call), targets)

    def __call__(self, weights: Weights, batch: Batch) -> Tensor:
        """The mean loss of one batch; a tensor that is not among `weights` keeps what the network has."""
        call, targets = self._call(batch)
        return self.task.mean_loss(self.network.outputs(weights, call), targets, call)

    def _call(self, batch: Batch) -> tuple[Any, Tensor]:
        inputs, targets = to_device(batch[0], self.network.device), batch[1].to(self.network.device)
        return self.task.call(inputs, targets), targets
