"""Curves of low loss between two networks (Garipov et al. 2018, arXiv:1802.10026)."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from lmc.core.codec import UNSAVED
from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.curves.training import Schedule, Settling, lower, total, with_parameters
from lmc.landscape.evaluation.evaluation import Evaluation, Objective
from lmc.landscape.evaluation.measured import Values
from lmc.landscape.path import Path, mixture_path, points_of
from lmc.landscape.planes.plane import loss_plane
from lmc.landscape.planes.plane_result import Plane
from lmc.network.copies import fresh_copy
from lmc.network.derived import gauged, settled
from lmc.network.network import Network
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import ModelOrWeights, StateDict, Weights, agreeing, distance, lerp, mean

if TYPE_CHECKING:
    import pandas as pd


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
    """Train all of `controls` but the first and last, so that `sum_j shares(t)[j] controls[j]` has a low loss for every t,
    with t from the uniform distribution of equation 2."""
    network, settle = objective.network, Settling(controls[0])
    names = settle.trained(network.module)
    points = [{name: weights[name].to(network.device, copy=True) for name in names} for weights in controls]
    free = [tensor.requires_grad_() for bend in points[1:-1] for tensor in bend.values()]

    def draw(generator: torch.Generator) -> Weights:
        at = shares(float(torch.rand((), generator=generator)))
        return {name: total(c * p[name] for c, p in zip(at, points, strict=True)) for name in names}

    losses, interrupted = lower(objective, controls[0], free, lambda: draw, settle, schedule, "curve")
    bends = [
        settle(with_parameters(old, new, network.module)) for old, new in zip(controls[1:-1], points[1:-1], strict=True)
    ]
    return Bends(tuple(bends), losses, interrupted)


Kind: TypeAlias = Literal["bezier", "chain"]


@dataclass(frozen=True, eq=False)
class Curve(Result):
    """A curve `phi(t)`, t from 0 to 1, between two networks.

    Attributes:
        controls: a, the bends, b. The curve starts at a and ends at b; a Bezier curve is drawn towards its bends, a chain
            passes through them.
        kind: "bezier" or "chain".
        losses: (E,) mean training loss in each epoch, over random points of the curve.
        interrupted: training ended early.
        model: a private copy of the architecture.
        unit: of the loss.
    """

    version = 2

    controls: tuple[Weights, ...]
    kind: Kind
    losses: Values
    interrupted: bool
    model: nn.Module = field(repr=False, metadata=UNSAVED)
    unit: str = field(default="nats", kw_only=True)

    def shares(self, t: float) -> tuple[float, ...]:
        """The share of each control in `phi(t)`; they sum to 1."""
        last = len(self.controls) - 1
        if self.kind == "chain":
            return tuple(max(0.0, 1.0 - abs(t * last - j)) for j in range(last + 1))
        return tuple(math.comb(last, j) * t**j * (1.0 - t) ** (last - j) for j in range(last + 1))

    @own_context
    def at(self, t: float) -> StateDict:
        """The weights `phi(t)`, bit by bit those of a at 0 and of b at 1; where weights are normalised, pruned or orthogonal,
        what a and b compute, written as averages need it.

        Between the controls running statistics of batch normalisation are only averaged; see `recalibrate_batchnorm`.

        Raises:
            InputError: t outside [0, 1].
        """
        if not 0.0 <= t <= 1.0:
            raise InputError(f"t={t}; expected a number from 0 to 1")
        shares = self.shares(t)
        if 1.0 in shares:
            control = self.controls[shares.index(1.0)]
            return StateDict(((name, tensor.clone()) for name, tensor in control.items()), like=control)
        return settled(mean(self.controls, shares), self.controls[0])

    @own_context
    def path(
        self,
        data: Any,
        *,
        alphas: int | Sequence[float] = 25,
        repair: Literal["auto"] | None = "auto",
        inputs: Any = None,
        loss: Loss | Task | None = None,
        metrics: Mapping[str, Loss] | None = None,
        outputs: Outputs = None,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> Path:
        """Losses along the curve, alpha being t: `straight.plot(curve=curve.path(data))` draws both.

        All arguments as for `loss_path`, but that points lie in [0, 1].
        """
        if not isinstance(alphas, int) and not all(0.0 <= alpha <= 1.0 for alpha in np.ravel(alphas)):
            raise InputError(f"alphas={alphas}; a curve has points from 0 to 1 only")
        bends = [f"bend {j}" for j in range(1, len(self.controls) - 1)]
        evaluation = Evaluation(
            self.model,
            self.controls,
            data,
            names=("a", *bends, "b"),
            repair=repair,
            inputs=inputs,
            loss=loss,
            metrics=metrics,
            outputs=outputs,
            batch_size=batch_size,
            device=device,
            progress=progress,
            predictions=True,
        )
        return mixture_path(evaluation, self.shares, points_of(alphas))

    @own_context
    def plane(self, data: Any, *, resolution: int = 41, **options: Any) -> Plane:
        """The plane that holds the curve, with the curve and the straight line drawn in it.

        Args:
            data, resolution, options: as for `loss_plane`.

        Raises:
            InputError: a curve with several bends, which lies in no plane, or what `loss_plane` raises.
        """
        if len(self.controls) != 3:
            raise InputError(f"a curve with {len(self.controls) - 2} bends lies in no plane; train one with bends=1")
        plane = loss_plane(
            self.model, self.controls, data, resolution=resolution, **{"names": ("A", "bend", "B"), **options}
        )
        corners = np.array(list(plane.places.values()))
        track = np.array([self.shares(t) for t in np.linspace(0.0, 1.0, 101)]) @ corners
        return replace(plane, tracks={"curve": track, "naive": corners[[0, 2]]})

    def to_frame(self) -> "pd.DataFrame":
        """A row for each epoch of its training: epoch, loss."""
        return require("pandas").DataFrame({"epoch": np.arange(1, len(self.losses) + 1), "loss": self.losses})

    @classmethod
    @own_context
    def load(cls, file: str | FilePath, model: nn.Module) -> "Curve":
        """Read a curve of the architecture `model` that `save` wrote; weights are on the CPU.

        Raises:
            DataError: a file that holds something else.
            MismatchError: a curve of another architecture.
        """
        found = super().load(file, model=fresh_copy(model))
        network = Network(model, next(iter(found.controls[0].values())).device)
        for i, control in enumerate(found.controls):
            network.check(control, f"control {i} of the file")
        return found

    @classmethod
    def _from_older(cls, form: str, content: dict[str, Any], tensors: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if form != "lmc curve 1":
            return super()._from_older(form, content, tensors)
        names = json.loads(content["names"])  # of the tensors of each control, in their order
        controls = [{n: {"tensor": f"{i}/{n}"} for n in names} for i in range(len(tensors) // max(len(names), 1))]
        return "lmc curve 2", {**json.loads(content["curve"]), "controls": controls}

    def __str__(self) -> str:
        kind, bends = {"bezier": "Bezier curve", "chain": "Polygonal chain"}[self.kind], len(self.controls) - 2
        points = self.controls if self.kind == "chain" else [self.at(t) for t in np.linspace(0.0, 1.0, 33)]
        length = sum(distance(p, q) for p, q in zip(points[:-1], points[1:], strict=True))
        straight = distance(points[0], points[-1])
        trained = f"trained for {len(self.losses)} epochs" + (", interrupted" if self.interrupted else "")
        last = f", training loss {self.losses[0]:.3f} to {self.losses[-1]:.3f}" if len(self.losses) else ""
        return f"{kind} with {bends} bend{'s' * (bends > 1)}, {length:.3g} long (straight: {straight:.3g}), {trained}{last}"

    __repr__ = __str__


@own_context
def bezier_curve(
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    data: Any,
    *,
    bends: int = 1,
    epochs: int = 30,
    lr: float = 3e-3,
    weight_decay: float = 0.0,
    loss: Loss | Task | None = None,
    outputs: Outputs = None,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Curve:
    """Train a Bezier curve from a to b whose points all have a low loss (Garipov et al. 2018, section 3).

    With fixed ends, the bends minimise the mean loss at `phi(t)`, t uniform in [0, 1]: every step draws one t and one
    batch, and sends the gradient at `phi(t)` to the bends by their shares. They start evenly spaced on the straight line.
    Adam, with the paper's schedule: a constant rate for half of the steps, then down to 1 % of it at 90 %. Batch
    normalisation and dropout are in train mode, as when networks are trained. Nothing of the caller's is touched.

    Args:
        model: the architecture.
        a, b: its weights at both ends; modules or state dicts.
        data: as for `lmc.landscape.evaluate`; of several splits the training split is used.
        bends: control points between the ends.
        epochs: passes over the data.
        lr: rate of Adam.
        weight_decay: L2 penalty ``(weight_decay / 2) |phi(t)|^2`` on the point of the curve, not on the bends.
        loss, outputs: as for `lmc.landscape.evaluate`.
        batch_size: examples in a step, where the data are given whole; an incomplete last batch is left out.
        seed: of the order of the data, of t and of dropout.
        device: where to train (default: where a is); the bends come back to where a is.
        progress: show a bar.

    An interrupt ends training with a warning and returns the curve as it is.

    Raises:
        MismatchError: a, b and the model are not of one architecture, dtype and device.
        WeightsError: weights that are not finite.
        DataError: unusable data.
        InputError: an unusable argument, or a loss that became NaN or infinite.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> curve = lmc.bezier_curve(model, a, b, data, epochs=4)
        >>> curve.path(data.test).barrier < lmc.loss_path(model, a, b, data.test).barrier / 2
        True
    """
    schedule = Schedule(epochs, lr, weight_decay, batch_size, seed, progress)
    return _curve("bezier", model, a, b, data, bends, schedule, loss, outputs, device)


@own_context
def polygonal_chain(
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    data: Any,
    *,
    bends: int = 1,
    epochs: int = 30,
    lr: float = 3e-3,
    weight_decay: float = 0.0,
    loss: Loss | Task | None = None,
    outputs: Outputs = None,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Curve:
    """Train a chain of straight segments from a over the bends to b; all else is as for `bezier_curve`.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> chain = lmc.polygonal_chain(model, a, b, data, epochs=4)
        >>> chain.path(data.test).barrier < lmc.loss_path(model, a, b, data.test).barrier / 2
        True
    """
    schedule = Schedule(epochs, lr, weight_decay, batch_size, seed, progress)
    return _curve("chain", model, a, b, data, bends, schedule, loss, outputs, device)


def _curve(
    kind: Kind,
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    data: Any,
    bends: int,
    schedule: Schedule,
    loss: Loss | Task | None,
    outputs: Outputs,
    device: torch.device | str | None,
) -> Curve:
    a, b = agreeing([a, b], "ab", model=model)
    if not (isinstance(bends, int) and bends >= 1):
        raise InputError(f"bends={bends!r}; expected a whole number, at least 1")
    objective = Objective(model, a, data, loss=loss, outputs=outputs, device=device, name="a")
    a, b = ({name: tensor.clone() for name, tensor in gauged(end, model).items()} for end in (a, b))
    between = [settled(lerp(a, b, j / (bends + 1)), a) for j in range(1, bends + 1)]
    start = Curve((a, *between, b), kind, np.empty(0), False, fresh_copy(model), unit=objective.task.unit)
    found = train_bends(objective, start.controls, start.shares, schedule)
    return replace(start, controls=(a, *found.bends, b), losses=found.losses, interrupted=found.interrupted)
