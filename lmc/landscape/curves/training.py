"""Training of the bends of a curve between two networks (Garipov et al. 2018, arXiv:1802.10026, section 3)."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.landscape.evaluation.objective import Loss, mean_loss
from lmc.landscape.planes.grid import Values
from lmc.network.batches import Batch, Split, take, to_device
from lmc.network.network import Network
from lmc.weights import Weights, tied_names


@dataclass(frozen=True)
class Recipe:
    """How bends are trained; the arguments of `bezier_curve`."""

    epochs: int
    lr: float
    weight_decay: float
    loss: Loss | None
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
    network: Network,
    controls: Sequence[Weights],
    shares: Callable[[float], Sequence[float]],
    split: Split,
    recipe: Recipe,
) -> Bends:
    """Train all of `controls` but the first and last, so that `sum_j shares(t)[j] controls[j]` has a low loss for every t.

    One t and one batch a step: an unbiased estimate of the gradient of the mean loss over t (equation 1 with the uniform
    distribution of equation 2). `network` is left in train mode with statistics of its own.
    """
    names = [name for name, parameter in network.module.named_parameters() if parameter.is_floating_point()]
    points = [{name: weights[name].to(network.device, copy=True) for name in names} for weights in controls]
    free = [tensor.requires_grad_() for bend in points[1:-1] for tensor in bend.values()]
    optimiser = torch.optim.Adam(free, recipe.lr)
    generator = torch.Generator().manual_seed(recipe.seed)
    losses: list[float] = []
    interrupted = False
    network.load(controls[0])
    network.module.train()
    with (
        forked(network.device, recipe.seed),
        tqdm(total=recipe.epochs, desc="curve", unit="epoch", disable=not recipe.progress) as bar,
    ):
        try:
            for epoch in range(recipe.epochs):
                optimiser.param_groups[0]["lr"] = recipe.rate(epoch)
                seen = []
                for inputs, targets in shuffled(split, recipe.batch_size, generator):
                    at = shares(float(torch.rand((), generator=generator)))
                    weights = {name: _sum(c * p[name] for c, p in zip(at, points, strict=True)) for name in names}
                    outputs = network.outputs(weights, to_device(inputs, network.device))
                    loss = mean_loss(outputs, targets.to(network.device), recipe.loss)
                    optimiser.zero_grad()
                    (loss + 0.5 * recipe.weight_decay * _sum(w.square().sum() for w in weights.values())).backward()
                    optimiser.step()
                    seen.append(loss.detach())
                losses.append(finite_loss(torch.stack(seen).mean().item(), epoch, recipe))
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
            warnings.warn(f"interrupted: the curve was trained for {len(losses)} epochs", stacklevel=4)
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


def shuffled(split: Split, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """The batches of one epoch in random order; an iterable that is not held comes in its own."""
    if split.whole:
        inputs, targets = next(iter(split.batches))
        order = torch.randperm(len(targets), generator=generator)
        for start in range(0, max(len(order) - batch_size, 0) + 1, batch_size):
            index = order[start : start + batch_size]
            yield take(inputs, index.to(targets.device)), targets[index.to(targets.device)]
    elif isinstance(split.batches, list):
        for i in torch.randperm(len(split.batches), generator=generator).tolist():
            yield split.batches[i]
    else:
        yield from split.iterate(batch_size)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return sum(terms, start=torch.zeros(()))


def finite_loss(loss: float, epoch: int, recipe: Recipe) -> float:
    """The loss, or `InputError` if it is no number."""
    if not math.isfinite(loss):
        raise InputError(f"the loss became {loss} in epoch {epoch}; try a lower rate than lr={recipe.lr}")
    return loss


def with_parameters(old: Weights, new: Weights, module: nn.Module) -> Weights:
    """`old` with its parameters replaced, second names of tied ones included, on the device that it was on."""
    state = {name: (new[name].detach() if name in new else old[name]).to(old[name].device) for name in old}
    return state | {alias: state[name] for alias, name in tied_names(module).items()}
