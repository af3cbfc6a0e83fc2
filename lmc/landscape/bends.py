"""Training of the bends of a curve between two networks (Garipov et al. 2018, arXiv:1802.10026, section 3)."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lmc.core.context import warn
from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.landscape.evaluation.measured import Values
from lmc.landscape.evaluation.objective import Objective
from lmc.weights import Weights, tied_names


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
        for name, least in (("epochs", 0), ("batch_size", 1)):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= least):
                raise InputError(f"{name}={getattr(self, name)!r}; expected a whole number, at least {least}")
        if not (math.isfinite(self.lr) and self.lr > 0.0):
            raise InputError(f"lr={self.lr}; expected a positive number")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise InputError(f"weight_decay={self.weight_decay}; expected a number, at least 0")

    def rate(self, epoch: int) -> float:
        """The learning rate in an epoch: constant for half of them, then linearly down to 1 % at 90 %."""
        return self.lr * float(np.interp(epoch / self.epochs, [0.5, 0.9], [1.0, 0.01]))


@dataclass(frozen=True)
class Bends:
    """Trained bends, the mean loss in each epoch, and whether training ended early."""

    bends: tuple[Weights, ...]
    losses: Values
    interrupted: bool


def train_bends(
    objective: Objective,
    controls: Sequence[Weights],
    shares: Callable[[float], Sequence[float]],
    schedule: Schedule,
) -> Bends:
    """Train all of `controls` but the first and last, so that `sum_j shares(t)[j] controls[j]` has a low loss for every t.

    One t and one batch a step: an unbiased estimate of the gradient of the mean loss over t (equation 1 with the uniform
    distribution of equation 2). The network is left in train mode with statistics of its own.
    """
    network = objective.network
    names = [name for name, parameter in network.module.named_parameters() if parameter.is_floating_point()]
    points = [{name: weights[name].to(network.device, copy=True) for name in names} for weights in controls]
    free = [tensor.requires_grad_() for bend in points[1:-1] for tensor in bend.values()]
    optimiser = torch.optim.Adam(free, schedule.lr)
    generator = torch.Generator().manual_seed(schedule.seed)
    losses: list[float] = []
    interrupted = False
    network.load(controls[0])
    network.module.train()
    with (
        forked(network.device, schedule.seed),
        tqdm(total=schedule.epochs, desc="curve", unit="epoch", disable=not schedule.progress) as bar,
    ):
        try:
            for epoch in range(schedule.epochs):
                optimiser.param_groups[0]["lr"] = schedule.rate(epoch)
                seen = []
                for batch in objective.split.shuffled(schedule.batch_size, generator, drop_last=True):
                    at = shares(float(torch.rand((), generator=generator)))
                    weights = {name: _sum(c * p[name] for c, p in zip(at, points, strict=True)) for name in names}
                    loss = objective(weights, batch)
                    optimiser.zero_grad()
                    (loss + 0.5 * schedule.weight_decay * _sum(w.square().sum() for w in weights.values())).backward()
                    optimiser.step()
                    seen.append(loss.detach())
                losses.append(finite_loss(torch.stack(seen).mean().item(), epoch, schedule))
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
            warn(f"interrupted: the curve was trained for {len(losses)} epochs")
    bends = [with_parameters(old, new, network.module) for old, new in zip(controls[1:-1], points[1:-1], strict=True)]
    return Bends(tuple(bends), np.array(losses), interrupted)


@contextlib.contextmanager
def forked(device: torch.device, seed: int) -> Iterator[None]:
    """The global random state, which dropout draws from, starts at `seed` inside and is as it was afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return sum(terms, start=torch.zeros(()))


def finite_loss(loss: float, epoch: int, schedule: Schedule) -> float:
    """The loss, or `InputError` if it is no number."""
    if not math.isfinite(loss):
        raise InputError(f"the loss became {loss} in epoch {epoch}; try a lower rate than lr={schedule.lr}")
    return loss


def with_parameters(old: Weights, new: Weights, module: nn.Module) -> Weights:
    """`old` with its parameters replaced, aliases of tied ones included, on the device that it was on."""
    state = {name: (new[name].detach() if name in new else old[name]).to(old[name].device) for name in old}
    return state | {alias: state[name] for alias, name in tied_names(module).items()}
