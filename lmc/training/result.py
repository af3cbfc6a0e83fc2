"""What training gives back: one weight dict per seed, its history, and the recipe it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmc.core.extras import require
from lmc.weights import Weights

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides the architecture, the data and the seed."""

    optimizer: str
    lr: float
    schedule: str
    epochs: int
    batch_size: int
    weight_decay: float
    momentum: float
    init: str  # "fresh": drawn from the seed; "given": the weights passed to `train`

    def __str__(self) -> str:
        text = f"{self.optimizer} {self.lr:g}"
        if self.optimizer == "sgd" and self.momentum:
            text += f" momentum {self.momentum:g}"
        if self.weight_decay:
            text += f" weight decay {self.weight_decay:g}"
        return f"{text}, {self.schedule}, {self.epochs} epochs of batches of {self.batch_size}"


@dataclass(frozen=True)
class History:
    """Mean training loss (nats) and accuracy (0 to 1) of one seed over each finished epoch, while it trained."""

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True, repr=False, eq=False)
class Trained(Sequence[Weights]):
    """Trained weights, one dict per seed, in the order of `seeds`; `a, b = train(..., seeds=(0, 1))` unpacks them.

    `trajectory[i]` maps an epoch (0: before the first step) to the weights of seed `seeds[i]` after it, for the
    epochs asked for by `keep`. When `interrupted`, the weights are those of the last step, seeds that had not
    begun are missing, and histories hold the finished epochs.
    """

    model: str
    data: str
    seeds: tuple[int, ...]
    weights: tuple[Weights, ...]
    history: tuple[History, ...]
    trajectory: tuple[Mapping[int, Weights], ...]
    recipe: Recipe
    seconds: float
    interrupted: bool = False

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index):
        return self.weights[index]

    def to_frame(self) -> "pandas.DataFrame":
        """The histories as a data frame: one row per seed and epoch, columns seed, epoch, loss, accuracy."""
        pandas = require("pandas")

        rows = [
            (seed, epoch, loss, accuracy)
            for seed, history in zip(self.seeds, self.history, strict=True)
            for epoch, (loss, accuracy) in enumerate(zip(history.loss, history.accuracy, strict=True), start=1)
        ]
        return pandas.DataFrame(rows, columns=["seed", "epoch", "loss", "accuracy"])

    def __repr__(self) -> str:
        seeds = "1 seed" if len(self) == 1 else f"{len(self)} seeds"
        lines = [f"Trained({self.model} on {self.data}, {seeds}, {self.recipe}; {self.seconds:.1f} s)"]
        for seed, history in zip(self.seeds, self.history, strict=True):
            if history.loss:
                last = f"train loss {history.loss[-1]:.4f}, accuracy {history.accuracy[-1]:.4f}"
                lines.append(f"  seed {seed}: {last}")
        if self.interrupted:
            lines.append("  interrupted: the weights are those of the last step")
        return "\n".join(lines)
