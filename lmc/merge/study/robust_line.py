"""The line of WiSE-FT: from a zero-shot model to its fine-tuned one, on the data it was tuned for and on shifted data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.path import Path, loss_path
from lmc.weights import ModelOrWeights

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class WiseLine(Result):
    """Accuracy along `(1 - alpha) base + alpha tuned` on several data sets.

    Attributes:
        paths: data set -> the path; the first is the reference, what the model was tuned for, the others are shifts.
    """

    paths: dict[str, Path]

    @property
    def reference(self) -> str:
        return next(iter(self.paths))

    @property
    def alphas(self) -> np.ndarray:
        """(P,) the points that were evaluated, 0 and 1 among them."""
        return self.paths[self.reference].alphas

    @property
    def accuracies(self) -> dict[str, np.ndarray]:
        """data set -> (P,) fraction classified correctly."""
        return {name: path.accuracies[path.split] for name, path in self.paths.items()}

    @property
    def shifted(self) -> np.ndarray:
        """(P,) the mean accuracy over the shifts."""
        return np.mean([values for name, values in self.accuracies.items() if name != self.reference], axis=0)

    def gain(self, alpha: float = 0.5) -> dict[str, float]:
        """data set -> percentage points of accuracy above the fine-tuned model, at the point nearest to `alpha`."""
        at = int(np.argmin(np.abs(self.alphas - alpha)))
        end = int(np.argmin(np.abs(self.alphas - 1.0)))
        return {name: 100.0 * float(values[at] - values[end]) for name, values in self.accuracies.items()}

    def to_frame(self) -> "pd.DataFrame":
        """A row for each point: alpha and the accuracy on each data set."""
        pd = require("pandas")

        return pd.DataFrame({"alpha": self.alphas, **self.accuracies})

    def __str__(self) -> str:
        lines = []
        for name, values in self.accuracies.items():
            best = int(np.nanargmax(values))
            ends = [100 * values[int(np.argmin(np.abs(self.alphas - end)))] for end in (0.0, 1.0)]
            lines.append(
                f"{name}: accuracy {ends[0]:.1f} % (base) to {ends[1]:.1f} % (tuned), {self.gain()[name]:+.1f} points at "
                f"alpha 0.5, highest {100 * values[best]:.1f} % at {self.alphas[best]:.2g}"
            )
        return "\n".join(lines)

    __repr__ = __str__


@own_context
def wise_ft_line(
    model: nn.Module,
    weights: ModelOrWeights,
    data: Mapping[str, Any],
    *,
    base: ModelOrWeights,
    alphas: int = 11,
    inputs: Any = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> WiseLine:
    """Evaluate the way from a base model to a fine-tuned one on the data it was tuned for and on shifted data (Wortsman,
    Ilharco, Kim et al. 2022, 2109.01903, figure 1). The head must be that of the base, fine-tuned too.

    Args:
        model: the architecture.
        weights: fine-tuned from `base`.
        data: name -> classification data, as for `lmc.loss_path`; first the reference, then one shift or more.
        base: the weights before fine-tuning.
        alphas: an odd number of points.
        inputs, device, progress: as for `lmc.loss_path`.

    Raises:
        InputError: fewer than two data sets, or data that are no classification. Others as `lmc.loss_path`.
    """
    if not isinstance(data, Mapping) or len(data) < 2:
        found = list(data) if isinstance(data, Mapping) else type(data).__name__
        raise InputError(f"data: expected a mapping of the reference and at least one shift, got {found}")
    options: dict[str, Any] = {"inputs": inputs, "device": device, "progress": progress}
    paths = {name: loss_path(model, base, weights, each, alphas=alphas, **options) for name, each in data.items()}
    for name, path in paths.items():
        if path.split not in path.accuracies:
            raise InputError(f"data[{name!r}]: targets are no classes, so that there is no accuracy")
    return WiseLine(paths)
