"""Training of weights between two networks, whichever way leads there: the loop over random points, its schedule, tensors that
follow from others, a random state of its own."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lmc.core.context import forked, warn
from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluation import Objective
from lmc.landscape.evaluation.measured import Values
from lmc.network.derived import following, settled
from lmc.weights import Weights, tied_names
from lmc.weights.state import least_divisor


def whole(name: str, value: Any, least: int) -> None:
    """Raise `InputError` unless an argument is a whole number, at least `least`."""
    if not (isinstance(value, int) and value >= least):
        raise InputError(f"{name}={value!r}; expected a whole number, at least {least}")


def positive(name: str, value: float) -> None:
    """Raise `InputError` unless an argument is a positive number."""
    if not (math.isfinite(value) and value > 0.0):
        raise InputError(f"{name}={value}; expected a positive number")


@dataclass(frozen=True)
class Schedule:
    """The schedule by which bends are trained; arguments of `bezier_curve`."""

    epochs: int
    lr: float
    weight_decay: float
    batch_size: int
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        whole("epochs", self.epochs, 0)
        whole("batch_size", self.batch_size, 1)
        positive("lr", self.lr)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise InputError(f"weight_decay={self.weight_decay}; expected a number, at least 0")

    def rate(self, epoch: int) -> float:
        """The learning rate in an epoch: constant for half of them, then linearly down to 1 % at 90 %."""
        return self.lr * float(np.interp(epoch / self.epochs, [0.5, 0.9], [1.0, 0.01]))


Draw: TypeAlias = Callable[[torch.Generator], Weights]


def lower(
    objective: Objective,
    start: Weights,
    free: Iterable[Tensor],
    draws: Callable[[], Draw],
    settle: "Settling",
    schedule: Schedule,
    what: str,
) -> tuple[Values, bool]:
    """Train the tensors `free` by Adam until the points that are made of them have a low loss.

    One point and one batch a step: an unbiased estimate of the gradient of the mean loss over all points. The L2 penalty is
    that of the point. The network is left in train mode with statistics of its own, an interrupt ends training with a warning.

    Args:
        start: the weights that give the network its buffers.
        draws: asked at the start of every epoch for what draws the points of its steps, from a generator.
        what: is trained, for the bar and the warning.

    Returns:
        The mean loss in each epoch, and whether training ended early.

    Raises:
        InputError: a loss that became NaN or infinite.
    """
    network = objective.network
    free = list(free)
    optimiser = torch.optim.Adam(free, schedule.lr, eps=least_divisor(free))
    generator = torch.Generator().manual_seed(schedule.seed)
    losses: list[float] = []
    interrupted = False
    network.load(start)
    network.module.train()
    with (
        forked(network.device, schedule.seed),
        tqdm(total=schedule.epochs, desc=what, unit="epoch", disable=not schedule.progress) as bar,
    ):
        try:
            for epoch in range(schedule.epochs):
                optimiser.param_groups[0]["lr"] = schedule.rate(epoch)
                draw, seen = draws(), []
                for batch in objective.split.shuffled(schedule.batch_size, generator, drop_last=True):
                    point = draw(generator)
                    loss = objective(settle(point), batch)
                    penalty = total(x.square().sum() for x in point.values())
                    optimiser.zero_grad()
                    (loss + 0.5 * schedule.weight_decay * penalty).backward()
                    optimiser.step()
                    seen.append(loss.detach())
                losses.append(finite_loss(torch.stack(seen).mean().item(), f"epoch {epoch}", schedule.lr))
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
            warn(f"interrupted: the {what} was trained for {len(losses)} epochs")
    return np.array(losses), interrupted


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of tensors, 0 of none."""
    return sum(terms, start=torch.zeros(()))


class Settling:
    """Brings derived tensors of mixtures of gauged weights in line (`lmc.network.derived`); else it changes nothing.

    Args:
        like: one of the gauged weights.
    """

    def __init__(self, like: Weights) -> None:
        self._like = like
        self._derived = {name: like[name] for name in following(like)}

    def trained(self, module: nn.Module) -> list[str]:
        """The names of the parameters that are trained: those that follow from others are not."""
        return [n for n, p in module.named_parameters() if p.is_floating_point() and n not in self._derived]

    def __call__(self, weights: Weights) -> Weights:
        if not self._derived:
            return weights
        device = next(iter(weights.values())).device
        rest = {name: tensor.to(device) for name, tensor in self._derived.items() if name not in weights}
        return settled(weights | rest, self._like)


def finite_loss(loss: float, when: str, lr: float) -> float:
    """The loss, or `InputError` if it is no number."""
    if not math.isfinite(loss):
        raise InputError(f"the loss became {loss} in {when}; try a lower rate than lr={lr}")
    return loss


def with_parameters(old: Weights, new: Weights, module: nn.Module) -> Weights:
    """`old` with its parameters replaced, aliases of tied ones included, on the device that it was on."""
    state = {name: (new[name].detach() if name in new else old[name]).to(old[name].device) for name in old}
    return state | {alias: state[name] for alias, name in tied_names(module).items()}
