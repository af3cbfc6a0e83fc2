"""Linear connectivity layer by layer: what it costs to move single layers, or the first so many, from a to b."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluation import Evaluation, Repair
from lmc.landscape.evaluation.measured import Values
from lmc.landscape.path import points_of
from lmc.network.task import Loss, Outputs, Task
from lmc.weights import ModelOrWeights, Weights, tied_names
from lmc.weights.arithmetic import mixture
from lmc.weights.state import inexact, tensors_by_module

if TYPE_CHECKING:
    import pandas as pd

Order: TypeAlias = Literal["input", "output", "random", "minimal"]


@dataclass(frozen=True, eq=False)
class LayerwiseBarriers(Result):
    """Barriers of the lines on which some layers move from a to b and all others stay.

    Attributes:
        layers: the layers moved: one after the other, or in the order in which they join (`cumulative`).
        from_a: (L,) barrier where the others are those of a.
        from_b: (L,) the same where the others are those of b.
        losses: (2,) of a and of b.
        full: the barrier with all layers moved: linear mode connectivity.
        split: the data on which all of this was measured.
        cumulative: "" where each layer moves alone; else the order in which further layers join those before.
        unit: of the loss.
    """

    layers: tuple[str, ...]
    from_a: Values
    from_b: Values
    losses: Values
    full: float
    split: str
    cumulative: str = ""
    unit: str = "nats"

    def to_frame(self) -> "pd.DataFrame":
        """A row for each layer: layer, from_a, from_b."""
        return require("pandas").DataFrame({"layer": self.layers, "from_a": self.from_a, "from_b": self.from_b})

    def __str__(self) -> str:
        worst = int(np.argmax(np.maximum(self.from_a, self.from_b)))
        how = f"joining from the {self.cumulative}" if self.cumulative in ("input", "output") else self.cumulative
        text = f"LayerwiseBarriers of {len(self.layers)} layers on {self.split}" + (
            f", cumulative ({how})" if how else ""
        )
        return (
            f"{text}: all at once {self.full:.3f} {self.unit}; highest at {self.layers[worst]}, "
            f"{self.from_a[worst]:.3f} into a and {self.from_b[worst]:.3f} into b"
        )

    __repr__ = __str__


@own_context
def layerwise_barriers(
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    data: Any,
    *,
    cumulative: Order | None = None,
    layers: Mapping[str, Sequence[str]] | None = None,
    alphas: int | Sequence[float] = 5,
    seed: int = 0,
    repair: Repair = "auto",
    inputs: Any = None,
    loss: Loss | Task | None = None,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> LayerwiseBarriers:
    """The barriers of lines on which only some layers move (Adilova et al. 2024, arXiv:2307.06966, definition 3).

    `max_alpha L(theta^S(alpha)) - (L(a) + L(b)) / 2`, where the layers S are `(1 - alpha) a + alpha b` and all others stay
    those of a, or of b. Negative values are possible: a single layer of b may do in a. As in the paper, the mean of the
    two ends' losses is what is taken off, at every alpha; `full` is measured the same way.

    Args:
        model: the architecture.
        a, b: its weights; modules or state dicts.
        data: as for `loss_path`; of several splits the last, a test split, is reported.
        cumulative: None moves each layer alone. "input" and "output" let layers join from that side, "random" in a random
            order, "minimal" by their barrier alone, low ones first; the last value is `full`.
        layers: name -> the tensors that move together (default: those of each module, weight and bias). A tied tensor
            moves in all its places.
        alphas: points on each line, as for `loss_path`. The paper's scripts take three, which bounds barriers from below.
        seed: of the random order.
        repair, inputs, loss, outputs, batch_size, device, progress: as for `loss_path`.

    Raises:
        InputError: an unknown order, layers that name a tensor that there is not.
        MismatchError: a, b and the model are not of one architecture, dtype and device.
        WeightsError: weights that are not finite.
        DataError: unusable data.
    """
    if cumulative not in (None, *get_args(Order)):
        raise InputError(f"cumulative={cumulative!r}; expected None, {', '.join(map(repr, get_args(Order)))}")
    evaluation = Evaluation(
        model,
        (a, b),
        data,
        names=("a", "b"),
        repair=repair,
        inputs=inputs,
        loss=loss,
        outputs=outputs,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    ties = tied_names(model)
    every = [name for name, tensor in evaluation.states[0].items() if inexact(tensor) and name not in ties]
    parts = tensors_by_module(model, every) if layers is None else checked_layers(layers, evaluation.states[0])
    every, parts = _whole(every, ties), {layer: _whole(names, ties) for layer, names in parts.items()}
    grid = points_of(alphas)
    split = evaluation.evaluator.splits[-1].name
    ends = np.array([score[split].loss for score in evaluation.evaluator(map(evaluation.ready, evaluation.states))])
    level = float(ends.mean())
    full = _barriers(evaluation, [every], grid, level, "all layers")[0][0]
    alone = cumulative is None or cumulative == "minimal"
    rows = _barriers(evaluation, list(parts.values()), grid, level, "layers") if alone else []
    order = list(parts)
    if cumulative is not None:
        if cumulative == "minimal":
            low = [max(row) for row in rows]
            order = [order[i] for i in np.argsort(low, kind="stable")]
        elif cumulative == "output":
            order.reverse()
        elif cumulative == "random":
            order = [order[i] for i in torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
        joined = [[name for layer in order[: k + 1] for name in parts[layer]] for k in range(len(order))]
        rows = _barriers(evaluation, joined, grid, level, "layers")
    from_a, from_b = np.array(rows).T
    return LayerwiseBarriers(
        tuple(order), from_a, from_b, ends, full, split, cumulative or "", evaluation.evaluator.task.unit
    )


def checked_layers(layers: Mapping[str, Sequence[str]], weights: Weights) -> dict[str, list[str]]:
    """The tensors of each layer, which must be among `weights`."""
    if not isinstance(layers, Mapping) or not layers:
        raise InputError("layers: expected a mapping from names of layers to the tensors of each, at least one")
    for layer, names in layers.items():
        if isinstance(names, str) or not names:
            raise InputError(f"layers: expected the names of the tensors of {layer!r} in a list, got {names!r}")
        if unknown := [name for name in names if name not in weights]:
            raise InputError(f"layers: {layer!r} names {unknown[0]!r}, and there is no tensor {unknown[0]!r} to move")
    return {layer: list(names) for layer, names in layers.items()}


def _whole(names: Sequence[str], ties: Mapping[str, str]) -> list[str]:
    """The names, and all others of the same tensors, which move with them."""
    chosen = dict.fromkeys(ties.get(name, name) for name in names)
    return [*chosen, *(name for name, first in ties.items() if first in chosen)]


def _barriers(
    evaluation: Evaluation, parts: Sequence[Sequence[str]], grid: Values, level: float, what: str
) -> list[tuple[float, float]]:
    """For each set of tensors, the barriers above a level of moving it inside a and inside b."""
    split = evaluation.evaluator.splits[-1].name
    a, b = evaluation.states
    inside = [float(alpha) for alpha in grid if 0.0 <= alpha <= 1.0]
    points = [(names, home, alpha) for names in parts for home in (a, b) for alpha in inside]

    def weights() -> Any:
        for names, home, alpha in points:
            moved = mixture([{name: state[name] for name in names} for state in (a, b)], [1.0 - alpha, alpha])
            yield evaluation.ready({**home, **moved})

    scores = evaluation.run(weights(), list(range(len(points))), what, fewest=len(points))
    losses = np.array([scores[i][split].loss for i in range(len(points))]).reshape(len(parts), 2, len(inside))
    rises = losses.max(-1) - level
    return [(float(rise[0]), float(rise[1])) for rise in rises]
