"""Geodesics: paths along which the predictions change as little as they can (Tan, Long, Zhao, Laine 2023)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc.core.context import own_context, warn
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.errors import DataError
from lmc.landscape.curves.curve import Curve
from lmc.landscape.curves.training import Settling, finite_loss, positive, whole, with_parameters
from lmc.landscape.evaluation.evaluation import STATISTICS_EXAMPLES, Objective
from lmc.landscape.evaluation.measured import Values
from lmc.network.batches import Batch, to_device
from lmc.network.batchnorm import norms
from lmc.network.copies import fresh_copy
from lmc.network.derived import gauged, settled
from lmc.network.task import Outputs
from lmc.weights import ModelOrWeights, Weights, agreeing, lerp
from lmc.weights.state import least_divisor

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Geodesic(Curve):
    """A chain of N networks between whose neighbours predictions change little, `geodesic_path`.

    The squared length of a step is, for short ones, eight times the Jensen-Shannon divergence of the predictions, averaged
    over examples: the metric of Fisher and Rao.

    Attributes:
        controls: (N,) the networks, a and b at the ends.
        kind: "chain".
        losses: (E,) mean energy in each epoch: the sum over neighbours of their divergence, in nats.
        interrupted: training ended early.
        model: a private copy of the architecture.
        straight: (N-1,) divergences of neighbours on the straight line, in nats, at most ln 2.
        divergences: (N-1,) those of the networks found, on the same examples.
    """

    version = 1

    straight: Values
    divergences: Values

    @property
    def energy(self) -> float:
        """The sum of the divergences, in nats; at least `length**2 / (8 (N-1))`, which it is where all steps are equal."""
        return float(self.divergences.sum())

    @property
    def length(self) -> float:
        """`sqrt(8) sum sqrt(JSD)`, the length of the way in the space of predictions."""
        return _length(self.divergences)

    @property
    def straight_length(self) -> float:
        """The same of the straight line."""
        return _length(self.straight)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each step between neighbours: step, straight, divergence."""
        columns = {"step": range(1, len(self.straight) + 1), "straight": self.straight, "divergence": self.divergences}
        return require("pandas").DataFrame(columns)

    def __str__(self) -> str:
        trained = f"trained for {len(self.losses)} epochs" + ", interrupted" * self.interrupted
        return (
            f"Geodesic of {len(self.controls)} networks, {trained}: length {self.straight_length:.3f} on the straight line, "
            f"now {self.length:.3f}; energy {self.straight.sum():.4f}, now {self.energy:.4f} nats"
        )

    __repr__ = __str__


def _length(divergences: Values) -> float:
    return float(np.sqrt(8.0 * divergences).sum())


@own_context
def geodesic_path(
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    data: Any,
    *,
    points: int = 25,
    epochs: int = 20,
    lr: float = 1e-3,
    outputs: Outputs = None,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Geodesic:
    """Bend the straight line from a to b until predictions change least along it (Tan et al. 2023, arXiv:2308.12666).

    Of N networks with fixed ends, evenly spaced on the line at first, all between are trained to minimise the energy
    `sum_i mean_x JSD(p_i(x), p_(i+1)(x))`, the Jensen-Shannon divergence of neighbouring predictions, on batches. Its minimum
    is a geodesic of the metric of Fisher and Rao, walked at constant speed. Labels are not used. The authors match b to a
    first (`lmc.weight_matching`), and take gradient descent at a rate of 0.1, which diverges on small networks: here it is
    Adam. Dropout is off; batch normalisation takes the statistics of the batch. Nothing of the caller's is touched.

    Args:
        model: the architecture, a classifier.
        a, b: its weights at both ends; modules or state dicts.
        data: labelled examples, as for `lmc.landscape.evaluate`; of several splits the training split is used.
        points: N, both ends included.
        epochs: passes over the data.
        lr: rate of Adam.
        outputs: as for `lmc.landscape.evaluate`.
        batch_size: examples in a step, where the data are given whole; an incomplete last batch is left out.
        seed: of the order of the data.
        device: where to train (default: where a is); the networks come back to where a is.
        progress: show a bar.

    An interrupt ends training with a warning and returns the chain as it is.

    Raises:
        MismatchError: a, b and the model are not of one architecture, dtype and device.
        WeightsError: weights that are not finite.
        DataError: unusable data, or targets that are no classes.
        InputError: an unusable argument, or an energy that became NaN or infinite.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> found = lmc.landscape.geodesic_path(model, a, b, data, points=7, epochs=8)
        >>> found.length < 0.8 * found.straight_length
        True
    """
    whole("points", points, 3)
    whole("epochs", epochs, 0)
    whole("batch_size", batch_size, 1)
    positive("lr", lr)
    a, b = agreeing([a, b], "ab", model=model)
    objective = Objective(model, a, data, outputs=outputs, device=device, name="a")
    a, b = ({name: tensor.clone() for name, tensor in gauged(end, model).items()} for end in (a, b))
    between = [settled(lerp(a, b, i / (points - 1)), a) for i in range(1, points - 1)]
    steps = Steps(objective, a)
    first, last = ({n: w[n].to(objective.network.device, copy=True) for n in steps.names} for w in (a, b))
    # Written so that equal networks stay equal to the last bit, and have no gradient.
    shares = [i / (points - 1) for i in range(points)]
    chain = [{n: first[n] + share * (last[n] - first[n]) for n in steps.names} for share in shares[:-1]] + [last]
    straight = steps.measured(chain, batch_size)
    generator, losses, interrupted = torch.Generator().manual_seed(seed), [], False
    free = [tensor.requires_grad_() for weights in chain[1:-1] for tensor in weights.values()]
    optimiser = torch.optim.Adam(free, lr, eps=least_divisor(free))
    with tqdm(total=epochs, desc="geodesic", unit="epoch", disable=not progress) as bar:
        try:
            for epoch in range(epochs):
                seen = []
                for batch in objective.split.shuffled(batch_size, generator, drop_last=True):
                    energy = steps(chain, batch).sum()
                    optimiser.zero_grad()
                    energy.backward()
                    optimiser.step()
                    seen.append(energy.detach())
                losses.append(finite_loss(torch.stack(seen).mean().item(), f"epoch {epoch}", lr))
                bar.set_postfix(energy=f"{losses[-1]:.4f}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
            warn(f"interrupted: the geodesic was trained for {len(losses)} epochs")
    found = [
        steps.settle(with_parameters(old, new, objective.network.module))
        for old, new in zip(between, chain[1:-1], strict=True)
    ]
    measured = steps.measured(chain, batch_size)
    return Geodesic((a, *found, b), "chain", np.array(losses), interrupted, fresh_copy(model), straight, measured)


class Steps:
    """The divergences of the predictions of neighbours in a chain of networks.

    Args:
        objective: the network and the data.
        like: one of the gauged weights.
    """

    def __init__(self, objective: Objective, like: Weights) -> None:
        self.objective, self.settle = objective, Settling(like)
        network = objective.network
        self.names = self.settle.trained(network.module)
        network.load(like)
        for norm in norms(network.module):
            norm.train()

    def __call__(self, chain: Sequence[Weights], batch: Batch) -> Tensor:
        """(N-1,) mean divergences on one batch, in nats, where autograd follows them."""
        network, task, split = self.objective.network, self.objective.task, self.objective.split
        inputs, targets = to_device(batch[0], network.device), batch[1].to(network.device)
        logs = []
        for weights in chain:
            outputs = network.outputs(self.settle(weights), task.call(inputs, targets))
            logits = task.logits(outputs, targets)
            if logits is None:
                raise DataError(f"{split.name}: predictions can be compared for targets that are classes only")
            logs.append(logits[targets.flatten() != task.ignore].log_softmax(-1))
        return torch.stack([divergence(p, q).mean() for p, q in zip(logs[:-1], logs[1:], strict=True)])

    @torch.no_grad()
    def measured(self, chain: Sequence[Weights], batch_size: int) -> Values:
        """(N-1,) mean divergences over the first examples, `STATISTICS_EXAMPLES` or a batch more."""
        total, count = torch.zeros(len(chain) - 1, dtype=torch.float64), 0
        for batch in self.objective.split.iterate(batch_size):
            weight = self.objective.task.weight(batch[1])
            total += weight * self(chain, batch).cpu().double()
            count += weight
            if count >= STATISTICS_EXAMPLES:
                break
        return (total / count).clamp_min(0.0).numpy()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergences (...,), in nats, of distributions given by their logarithms (..., C)."""
    two = math.log(2.0)  # log of the mean of both: p + softplus(q - p) - log 2, which is p exactly where they are equal
    return 0.5 * (p.exp() * (two - F.softplus(q - p)) + q.exp() * (two - F.softplus(p - q))).sum(-1)
