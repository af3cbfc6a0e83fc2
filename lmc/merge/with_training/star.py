"""Star models: one network with low lines to all others (Sonthalia et al. 2024, arXiv:2403.07968)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lmc.align.weight_matching.matching import weight_matching
from lmc.core.codec import UNSAVED
from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.curves.training import Draw, Schedule, Settling, lower, with_parameters
from lmc.landscape.evaluation.evaluation import Objective, some_inputs
from lmc.landscape.path import Path, Values, loss_path
from lmc.network.batchnorm import has_batchnorm, recalibrate_batchnorm
from lmc.network.copies import fresh_copy
from lmc.network.derived import gauged, settled
from lmc.network.task import Loss, Outputs, Task
from lmc.symmetry.spec import PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, StateDict, Weights, agreeing, as_weights, mean

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Star(Result, Mapping[str, Tensor]):
    """The centre of a star: a mapping, to be used wherever weights are.

    Attributes:
        weights: the centre.
        sources: the solutions that it was trained on, their units in the order of the centre's where there is a spec.
        losses: (E,) mean training loss in each epoch, over random points of the lines.
        interrupted: training ended early.
        spec: the symmetries by which solutions are brought closer; None: they are taken as they are.
        model: a private copy of the architecture.
        unit: of the loss.
    """

    weights: Weights
    sources: tuple[Weights, ...]
    losses: Values
    interrupted: bool
    spec: PermutationSpec | None = field(repr=False)
    model: nn.Module = field(repr=False, metadata=UNSAVED)
    unit: str = "nats"

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    @own_context
    def paths(
        self, data: Any, *, held_out: Sequence[ModelOrWeights] = (), alphas: int = 11, **options: Any
    ) -> "StarPaths":
        """The lines from the centre to its sources, to solutions that it has not seen, and between ordinary pairs.

        Args:
            data, alphas, options: as for `lmc.loss_path`.
            held_out: solutions that were not trained on; matched to the centre where there is a spec.
        """
        if isinstance(held_out, nn.Module | Mapping):
            raise InputError("held_out: expected a list of models, got a single one; write [model]")
        unseen = [_matched(self.spec, self.weights, as_weights(other)) for other in held_out]
        everyone = [*self.sources, *unseen]
        pairs = [(a, _matched(self.spec, a, b)) for a, b in zip(everyone[:-1], everyone[1:], strict=True)]

        def paths(ends: Sequence[tuple[Weights, Weights]]) -> tuple[Path, ...]:
            return tuple(loss_path(self.model, a, b, data, alphas=alphas, **options) for a, b in ends)

        centre = self.weights
        return StarPaths(
            paths([(centre, source) for source in self.sources]), paths([(centre, x) for x in unseen]), paths(pairs)
        )

    def to_frame(self) -> "pd.DataFrame":
        """A row for each epoch of its training: epoch, loss."""
        return require("pandas").DataFrame({"epoch": np.arange(1, len(self.losses) + 1), "loss": self.losses})

    def __str__(self) -> str:
        trained = f"trained for {len(self.losses)} epochs" + (", interrupted" if self.interrupted else "")
        last = f", training loss {self.losses[0]:.3f} to {self.losses[-1]:.3f}" if len(self.losses) else ""
        matched = "matched by weights" if self.spec is not None else "as they are"
        return f"Star of {len(self.sources)} sources, {matched}, {trained}{last}"

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class StarPaths(Result):
    """Losses along the lines of a star, each from the centre outwards, and between ordinary solutions.

    Attributes:
        sources, held_out: from the centre to each.
        regular: between neighbours in the list of all sources and held-out solutions.
    """

    sources: tuple[Path, ...]
    held_out: tuple[Path, ...]
    regular: tuple[Path, ...]

    @property
    def kinds(self) -> dict[str, tuple[Path, ...]]:
        """The paths by kind, kinds without any left out."""
        found = {"regular": self.regular, "source": self.sources, "held out": self.held_out}
        return {kind: paths for kind, paths in found.items() if paths}

    @property
    def barriers(self) -> dict[str, Values]:
        """kind -> the loss barrier of each path."""
        return {kind: np.array([path.barrier for path in paths]) for kind, paths in self.kinds.items()}

    def to_frame(self) -> "pd.DataFrame":
        """A row for each path: kind, index, barrier (loss) and error_barrier (percentage points)."""
        pd = require("pandas")
        rows = [
            {"kind": kind, "index": i, "barrier": path.barrier, "error_barrier": path.error_barrier}
            for kind, paths in self.kinds.items()
            for i, path in enumerate(paths)
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        lines = ["Star paths, mean barrier (largest):"]
        for kind, values in self.barriers.items():
            unit = self.kinds[kind][0].unit
            lines.append(
                f"  {kind}: {values.mean():.3f} ({values.max():.3f})" + f" {unit} over {len(values)}".replace("  ", " ")
            )
        return "\n".join(lines)

    __repr__ = __str__


@own_context
def star_model(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    data: Any,
    *,
    spec: PermutationSpec | UnboundSpec | None = None,
    start: ModelOrWeights | None = None,
    span: tuple[float, float] = (0.0, 1.0),
    epochs: int = 30,
    lr: float = 3e-3,
    weight_decay: float = 0.0,
    loss: Loss | Task | None = None,
    outputs: Outputs = None,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Star:
    """Train a network whose lines to several solutions are all low (Starlight, algorithm 1).

    Every step draws a source, a point t and a batch, and lowers the loss at `(1 - t) centre + t source`; the gradient
    reaches the centre with the factor 1 - t. With a spec, sources are matched to the moving centre by weights at the
    start of every epoch. Adam, with the schedule of `lmc.bezier_curve`. Batch normalisation and dropout are in train mode;
    running statistics of the centre are re-estimated at the end. Nothing of the caller's is touched.

    Args:
        model: the architecture.
        models: several solutions; modules or state dicts on one device.
        data: `(inputs, targets)`, an iterable of such batches, or an object with `.train`.
        spec: the symmetries of the architecture.
        start: where training begins (default: the mean of the models, matched to the first).
        span: the interval that t is drawn from; (0, 0) is ordinary training.
        epochs, lr, weight_decay, loss, outputs, batch_size, seed, device, progress: as for `lmc.bezier_curve`.

    An interrupt ends training with a warning and returns the star as it is.

    Raises:
        MismatchError: models, start and architecture are not of one architecture, dtype and device.
        WeightsError: weights that are not finite.
        DataError: unusable data.
        SpecError: the spec does not fit.
        InputError: no models, an unusable argument, or a loss that became NaN or infinite.
    """
    if isinstance(models, nn.Module | Mapping) or not len(models):
        raise InputError("models: expected a list of models, at least one")
    if not (len(span) == 2 and 0.0 <= span[0] <= span[1] <= 1.0):
        raise InputError(f"span={span}: expected two numbers, 0 <= first <= second <= 1")
    schedule = Schedule(epochs, lr, weight_decay, batch_size, seed, progress)
    states = [gauged(state, model) for state in agreeing(models, model=model)]
    known = spec.bind(states[0]) if spec is not None else None
    objective = Objective(model, states[0], data, loss=loss, outputs=outputs, device=device)
    network = objective.network
    states = [states[0], *(_matched(known, states[0], state) for state in states[1:])]
    centre = settled(mean(states), states[0])
    if start is not None:
        centre = gauged(agreeing([states[0], start], ["models[0]", "start"], model=model)[1], model)
    centre, losses, interrupted = _train(objective, centre, states, known, span, schedule)
    if has_batchnorm(network.module):
        centre = recalibrate_batchnorm(model, centre, some_inputs(objective.split), device=network.device)
    moved = tuple({n: x.clone() for n, x in _matched(known, centre, state).items()} for state in states)
    return Star(StateDict(centre), moved, losses, interrupted, known, fresh_copy(model), objective.task.unit)


def _matched(spec: PermutationSpec | None, fixed: Weights, other: Weights) -> Weights:
    return other if spec is None else weight_matching(spec, fixed, other, progress=False).apply(other)


def _train(
    objective: Objective,
    start: Weights,
    sources: Sequence[Weights],
    spec: PermutationSpec | None,
    span: tuple[float, float],
    schedule: Schedule,
) -> tuple[Weights, Values, bool]:
    """The trained centre, the loss in each epoch, and whether training ended early."""
    network, settle = objective.network, Settling(start)
    names = settle.trained(network.module)
    centre = {name: start[name].to(network.device, copy=True).requires_grad_() for name in names}

    def draws() -> Draw:
        now = settle(with_parameters(start, centre, network.module))
        moved = (_matched(spec, now, source) for source in sources)
        ends = [{name: weights[name].to(network.device) for name in names} for weights in moved]

        def draw(generator: torch.Generator) -> Weights:
            end = ends[int(torch.randint(len(ends), (), generator=generator))]
            t = span[0] + (span[1] - span[0]) * float(torch.rand((), generator=generator))
            return {name: (1.0 - t) * centre[name] + t * end[name] for name in names}

        return draw

    losses, interrupted = lower(objective, start, centre.values(), draws, settle, schedule, "star")
    return settle(with_parameters(start, centre, network.module)), losses, interrupted
