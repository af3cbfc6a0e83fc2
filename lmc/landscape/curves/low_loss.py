"""Paths of low loss between independently trained networks, or to the origin, layer by layer (Tian et al. 2026)."""

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lmc.core.context import forked, own_context, warn
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.landscape.curves.curve import Curve
from lmc.landscape.curves.training import Settling, finite_loss, positive, whole, with_parameters
from lmc.landscape.evaluation.evaluation import Objective
from lmc.landscape.evaluation.measured import Values
from lmc.landscape.layerwise import checked_layers
from lmc.network.batches import Batch
from lmc.network.copies import fresh_copy
from lmc.network.derived import gauged
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import ModelOrWeights, Weights, agreeing, distance
from lmc.weights.arithmetic import mixture
from lmc.weights.state import tensors_by_module

if TYPE_CHECKING:
    import pandas as pd

WINDOW = 10  # batches over which a loss is averaged
RISE = 0.02  # of the straight line's, which points may have where no threshold is given
HALF = (0.5, 0.5)
GUARD = 1e-6  # of a tensor's variance, added where nothing else is given


@dataclass(frozen=True, eq=False)
class LowLossPath(Curve):
    """A chain of networks of low training loss from a to b, `low_loss_path`; t counts its segments, not their lengths.

    A path to the origin ends at its last point: what is said of b below then falls away.

    Attributes:
        controls: a, the K points found, b.
        kind: "chain".
        losses: (K,) training loss of each point; all losses here are means over a few batches, see `path` for exact ones.
        interrupted: the search ended early, and the last segment is a long one.
        model: a private copy of the architecture.
        stages: (K,) the layer that joined last before each point.
        rounds: (K,) batches that each point was trained for.
        remaining: (K,) distance of each point to b, as a share of that of a; or length of what shrinks.
        between: (K+1,) training loss in the middle of each segment; the last one leads to b.
        threshold: the loss at which training of a point ended.
    """

    version = 1

    stages: tuple[str, ...]
    rounds: npt.NDArray[np.int64]
    remaining: Values
    between: Values
    threshold: float

    @property
    def highest(self) -> float:
        """The highest training loss of the points and of the middles of segments."""
        return float(np.concatenate([self.losses, self.between]).max())

    def to_frame(self) -> "pd.DataFrame":
        """A row for each point: stage, loss, rounds, remaining, and the loss halfway to it, between."""
        columns = {"stage": self.stages, "loss": self.losses, "rounds": self.rounds, "remaining": self.remaining}
        return require("pandas").DataFrame({**columns, "between": self.between[: len(self.losses)]})

    def __str__(self) -> str:
        layers = len(set(self.stages))
        left = f"{100 * (self.remaining[-1] if len(self.remaining) else 1.0):.0f} %"
        to_b = len(self.between) > len(self.losses)
        return (
            f"LowLossPath of {len(self.stages)} points, {layers} layer{'s' * (layers != 1)} joining one after the other"
            f"{', interrupted' * self.interrupted}: training loss at most {self.highest:.3f} (sought {self.threshold:.3f}) after "
            f"{self.rounds.sum()} batches; "
            + (f"{left} of the way left to the last segment" if to_b else f"shrunk to {left} of its length")
        )

    __repr__ = __str__


@own_context
def low_loss_path(
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights | Literal["origin"],
    data: Any,
    *,
    layers: Mapping[str, Sequence[str]] | None = None,
    ticks: int = 20,
    step: float = 0.15,
    shortest: float = 0.0,
    threshold: float | None = None,
    rounds: tuple[int, int] = (WINDOW, 200),
    lr: float = 0.05,
    epsilon: float | None = None,
    loss: Loss | Task | None = None,
    outputs: Outputs = None,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> LowLossPath:
    """Walk from a to b over networks of low training loss, layer by layer (Tian et al. 2026, arXiv:2505.02604).

    A network that starts at a takes a step towards b in the layers that have joined, gets back the variance that each tensor
    had in a, is trained until its loss is low again, and is kept: a point of the path. After so many ticks the next layer
    joins; those before go on. Steps are a share of what is left, so b is approached and never reached: the last segment
    leads there, and `between` says what the loss is on it. No permutation is needed. Training is gradient descent without
    momentum, in train mode: batch normalisation and dropout are as when networks are trained. Nothing of the caller's is
    touched.

    Towards the origin layers shrink and get no variance back. The rate of each falls with the square of its length: where a
    norm makes the length of a layer meaningless, steps turn it by equal angles, and shells of every size are walked alike.
    Without a norm layers that have not joined may grow to make up for those that shrink.

    Args:
        model: the architecture.
        a, b: its weights at both ends; modules or state dicts. "origin" for b: weights of zero.
        data: as for `lmc.landscape.evaluate`; of several splits the training split is used.
        layers: name -> the tensors that join together, in this order (default: those of each module, in the model's order,
            and towards the origin those with two or more axes alone; the authors take blocks, or all at once).
        ticks: points made before the next layer joins.
        step: the share of its distance to b that a layer moves in a tick.
        shortest: the shortest step, an absolute distance; with one, layers arrive at b.
        threshold: the loss at which training of a point ends (default: that of the worse end, of a alone towards the origin,
            and 2 % of what the loss rises above it in the middle of the straight line).
        rounds: the fewest and the most batches that a point is trained for.
        lr: rate of gradient descent.
        epsilon: added to both variances before a tensor is scaled by the root of their ratio; the authors add 1e-4, which
            is not small beside the variances of wide layers (default: a millionth of the variance in a).
        loss, outputs: as for `lmc.landscape.evaluate`.
        batch_size: examples in a batch, where the data are given whole; an incomplete last one is left out.
        seed: of the order of the data and of dropout.
        device: where to train (default: where a is); the points come back to where a is.
        progress: show a bar.

    An interrupt ends the search with a warning and returns the points found.

    Raises:
        MismatchError: a, b and the model are not of one architecture, dtype and device.
        WeightsError: weights that are not finite.
        DataError: unusable data.
        InputError: an unusable argument, layers that name a tensor that is not trained, or a loss that became NaN or
            infinite.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp32"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> found = lmc.landscape.low_loss_path(model, a, b, data, ticks=6, step=0.3)
        >>> found.path(data.test).barrier < lmc.loss_path(model, a, b, data.test).barrier / 2
        True
    """
    whole("ticks", ticks, 1)
    whole("batch_size", batch_size, 1)
    positive("lr", lr)
    positive("step", step)
    pair = isinstance(rounds, tuple | list) and len(rounds) == 2 and all(isinstance(count, int) for count in rounds)
    if not pair or not 1 <= rounds[0] <= rounds[1]:
        raise InputError(f"rounds={rounds}; expected the fewest and the most batches, at least 1")
    if not (epsilon is None or epsilon >= 0.0) or not shortest >= 0.0:
        raise InputError(f"epsilon={epsilon}, shortest={shortest}; expected numbers, at least 0")
    if not (threshold is None or (isinstance(threshold, Real) and not math.isnan(threshold))):
        raise InputError(f"threshold={threshold!r}; expected a loss")
    if isinstance(b, str) and b != "origin":
        raise InputError(f"b={b!r}; expected weights, or 'origin'")
    given = [a] if isinstance(b, str) else [a, b]
    to_origin = len(given) == 1
    a, *ends = agreeing(given, "ab"[: len(given)], model=model)
    objective = Objective(model, a, data, loss=loss, outputs=outputs, device=device, name="a")
    a, *ends = ({name: tensor.clone() for name, tensor in gauged(each, model).items()} for each in (a, *ends))
    walk = _Walk(objective, a, batch_size, seed)
    start = point = walk.placed(a)
    if layers is None:
        names = [name for name in walk.names if not to_origin or point[name].ndim >= 2]
        parts: Mapping[str, Sequence[str]] = tensors_by_module(model, names)
    else:
        parts = checked_layers(layers, point)
    if to_origin:
        moving = {name for part in parts.values() for name in part}
        end = {name: torch.zeros_like(tensor) if name in moving else tensor for name, tensor in point.items()}
        wanted = {}
    else:
        moving, end = set(point), walk.placed(ends[0])
        wanted = {name: tensor.var() for name, tensor in point.items() if tensor.numel() > 1}
    straight = _left(point, end, moving)
    points: list[Weights] = []
    found: list[tuple[str, float, int, float, float]] = []
    interrupted = False
    with (
        forked(objective.network.device, seed),
        tqdm(total=ticks * len(parts), desc="low-loss path", unit="point", disable=not progress) as bar,
    ):
        if threshold is None:
            worse = walk.loss(point) if to_origin else max(walk.loss(point), walk.loss(end))
            threshold = worse + RISE * max(0.0, walk.loss(mixture((point, end), HALF)) - worse)
        try:
            for k, layer in enumerate(parts):
                for _ in range(ticks):
                    moved = towards(point, end, list(parts.values())[: k + 1], step, shortest)
                    rates = {name: lr * _shrunk(moved[name], start[name]) for name in moving} if to_origin else {}
                    trained, batches = walk.trained(
                        with_variances(moved, wanted, epsilon), lr, rates, rounds, threshold
                    )
                    new = with_variances(trained, wanted, epsilon)
                    left = _left(new, end, moving) / straight if straight else 0.0
                    found.append((layer, walk.loss(new), batches, left, walk.loss(mixture((point, new), HALF))))
                    points.append(walk.kept(new))
                    point = new
                    bar.set_postfix(layer=layer, loss=f"{found[-1][1]:.3f}", refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            if to_origin and not points:
                raise
            interrupted = True
            rest = "ends there" if to_origin else "leads straight to b from the last"
            warn(f"interrupted: the path has {len(points)} points, and {rest}")
        last = [] if to_origin else [walk.loss(mixture((point, end), HALF))]
    stages, losses, counts, remaining, between = zip(*found, strict=True) if found else ((), (), (), (), ())
    return LowLossPath(
        (a, *points, *ends),
        "chain",
        np.array(losses, dtype=np.float64),
        interrupted,
        fresh_copy(model),
        tuple(stages),
        np.array(counts, dtype=np.int64),
        np.array(remaining, dtype=np.float64),
        np.array([*between, *last]),
        threshold,
    )


class _Walk:
    """A network in train mode, and the batches that go by."""

    def __init__(self, objective: Objective, a: Weights, batch_size: int, seed: int) -> None:
        self.objective, self.a, self.settle = objective, a, Settling(a)
        self.network = objective.network
        self.names = self.settle.trained(self.network.module)
        self.network.load(a)
        self.network.module.train()
        self._batches = self._endless(batch_size, torch.Generator().manual_seed(seed))

    def _endless(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield from self.objective.split.shuffled(batch_size, generator, drop_last=True)

    def placed(self, weights: Weights) -> Weights:
        """The tensors that are trained, as copies where they are trained."""
        return {name: weights[name].to(self.network.device, copy=True) for name in self.names}

    def kept(self, point: Weights) -> Weights:
        """All tensors of a point, where a is, with the running statistics that training left."""
        new = {name: tensor.clone() for name, tensor in point.items()}
        return self.settle(with_parameters({**self.a, **self._statistics()}, new, self.network.module))

    def _statistics(self) -> Weights:
        buffers = self.network.buffers()
        return {name: tensor.clone().to(self.a[name].device) for name, tensor in buffers.items()}

    @torch.no_grad()
    def loss(self, point: Weights) -> float:
        """The mean loss of a point over the next batches."""
        settled = self.settle(point)
        losses = [self.objective(settled, next(self._batches)) for _ in range(WINDOW)]
        return float(np.mean(torch.stack(losses).tolist()))

    def trained(
        self, point: Weights, lr: float, rates: Mapping[str, float], rounds: tuple[int, int], threshold: float
    ) -> tuple[dict[str, torch.Tensor], int]:
        """A point after gradient descent until the mean of the last losses is low enough, and the number of batches.

        `rates`: of tensors whose rate is not `lr`.
        """
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in point.items()}
        optimiser = torch.optim.SGD([{"params": [leaf], "lr": rates.get(name, lr)} for name, leaf in leaves.items()])
        last: deque[float] = deque(maxlen=WINDOW)
        count, unread = 0, []
        while count < rounds[1]:
            loss = self.objective(self.settle(leaves), next(self._batches))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            count += 1
            unread.append(loss.detach())
            if count >= rounds[0]:  # before that nothing depends on the losses
                for i, value in enumerate(torch.stack(unread).tolist(), count + 1 - len(unread)):
                    last.append(finite_loss(value, f"batch {i} of a point", lr))
                unread = []
                if sum(last) <= threshold * len(last):
                    break
        return {name: tensor.detach() for name, tensor in leaves.items()}, count


def towards(
    point: Weights, end: Weights, layers: Sequence[Sequence[str]], step: float, shortest: float
) -> dict[str, torch.Tensor]:
    """A point whose layers have moved towards an end by a share of their distance, or by `shortest`, never beyond it."""
    moved = dict(point)
    for names in layers:
        part = {name: point[name] for name in names}
        length = distance(part, {name: end[name] for name in names})
        share = min(1.0, max(shortest, step * length) / length) if length else 0.0
        moved |= {name: torch.lerp(tensor, end[name], share) for name, tensor in part.items()}
    return moved


def with_variances(point: Weights, wanted: Weights, epsilon: float | None) -> dict[str, torch.Tensor]:
    """A point whose tensors, spread about their means, have the variances `wanted`: `V (wanted + e) / (V + e)`."""
    spread = dict(point)
    for name, variance in wanted.items():
        tensor, extra = point[name], GUARD * variance if epsilon is None else epsilon
        ratio = (variance + extra) / (tensor.var() + extra)
        matched = tensor.mean() + ratio.sqrt() * (tensor - tensor.mean())
        spread[name] = torch.where(ratio.isfinite(), matched, tensor)
    return spread


def _left(point: Weights, end: Weights, names: Collection[str]) -> float:
    return distance({name: point[name] for name in names}, {name: end[name] for name in names})


def _shrunk(tensor: torch.Tensor, start: torch.Tensor) -> float:
    """The square of a tensor's length, as a share of what it was; 1 where there was none, or where it has grown."""
    length = float(start.square().sum())
    return min(1.0, float(tensor.square().sum()) / length) if length else 1.0
