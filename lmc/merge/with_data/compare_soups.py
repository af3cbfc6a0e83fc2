"""All soups of the same models side by side, with a table of ingredients that says why each is in or out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.merge.rules.averaging import average
from lmc.merge.with_data.judge import chosen, finite
from lmc.merge.with_data.soups import greedy_soup, learned_soup
from lmc.network.batches import reread
from lmc.network.batchnorm import recalibrate_batchnorm
from lmc.network.network import pick_device
from lmc.network.task import Loss, Task
from lmc.weights import ModelOrWeights, Weights, as_weights, fitted

if TYPE_CHECKING:
    import pandas as pd

SOUPS = ("uniform", "greedy", "learned", "learned per layer")


@dataclass(frozen=True)
class SoupIngredient:
    """One model and what each soup makes of it.

    Attributes:
        name: what it is called.
        alone: its own validation score; NaN where it has none.
        shares: soup -> its share, for "learned per layer" the mean over the layers.
        reason: why the greedy soup took it or not.
    """

    name: str
    alone: float
    shares: dict[str, float]
    reason: str


@dataclass(frozen=True, eq=False)
class Soups(Result):
    """Soups of the same models.

    Attributes:
        weights: soup -> its weights.
        ingredients: in the order in which the greedy soup tried them, the best first.
        layers: layer -> the share of each model, in the order given, in the soup learned per layer.
        scores: "best model" and each soup -> "validation" and "test" (where there is such data) -> measure -> value.
        unit: of the loss.
    """

    weights: dict[str, Weights]
    ingredients: tuple[SoupIngredient, ...]
    layers: dict[str, tuple[float, ...]]
    scores: dict[str, dict[str, dict[str, float]]]
    unit: str = "nats"

    def to_frame(self) -> "pd.DataFrame":
        """A row for each ingredient: name, score alone, share in each soup, reason."""
        pd = require("pandas")

        rows = [
            {"ingredient": row.name, "alone": row.alone, **row.shares, "reason": row.reason} for row in self.ingredients
        ]
        return pd.DataFrame(rows).set_index("ingredient")

    def scores_frame(self) -> "pd.DataFrame":
        """A row for each soup and for the best model: loss and accuracy on validation and test data."""
        pd = require("pandas")

        rows = {
            soup: {f"{split} {m}": value for split, found in splits.items() for m, value in found.items()}
            for soup, splits in self.scores.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.ingredients)
        lines = [f"{'':{width}}  {'alone':>8}  " + "  ".join(f"{soup:>{max(7, len(soup))}}" for soup in SOUPS)]
        for row in self.ingredients:
            shares = "  ".join(f"{row.shares[soup]:>{max(7, len(soup))}.3f}" for soup in SOUPS)
            lines.append(f"{row.name:{width}}  {row.alone:>8.4f}  {shares}  {row.reason}")
        for soup, splits in self.scores.items():
            found = [f"{s} {m} {value:.4f}" for s, values in splits.items() for m, value in values.items()]
            lines.append(f"{soup}: {', '.join(found)}")
        return "\n".join(lines)

    __repr__ = __str__


@own_context
def compare_soups(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    validation: Any,
    *,
    test: Any = None,
    names: Sequence[str] | None = None,
    metric: str | None = None,
    loss: Loss | Task | None = None,
    epochs: int = 5,
    lr: float = 0.05,
    seed: int = 0,
    inputs: Any = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Soups:
    """Make the uniform soup, the greedy one and two learned ones (one share per model, and one per model and layer) of
    the same models, and say what each makes of them (Wortsman et al. 2022, 2203.05482).

    Models that are not finite go into none and are named. Nothing is chosen by `test`.

    Args:
        model: the architecture.
        models: the ingredients.
        validation: labelled data that shares are chosen by: `(inputs, targets)`, batches, or a data set, see `greedy_soup`.
        test: labelled data that the soups are judged by.
        names: of the models (default: their places).
        metric, loss: what the greedy soup looks at, and how outputs are judged, as for `greedy_soup`.
        epochs, lr, seed: of the learned soups.
        inputs: unlabelled; BatchNorm statistics of every soup are re-estimated from them.
        device: where to compute (default: where the weights are).
        progress: show bars.

    Raises:
        InputError: names that do not fit.
        WeightsError: no model is finite.
    """
    states = [fitted(model, as_weights(one), f"models[{i}]") for i, one in enumerate(models)]
    names = [f"model {i}" for i in range(len(states))] if names is None else list(names)
    if len(names) != len(states) or len(set(names)) != len(names):
        raise InputError(f"names={names!r}; expected {len(states)} different names")
    options: dict[str, Any] = {"device": device, "progress": progress}
    validation, test, inputs = reread(validation), reread(test), reread(inputs)
    greedy = greedy_soup(model, states, validation, metric=metric, loss=loss, inputs=inputs, **options)
    usable = [i for i, state in enumerate(states) if not finite(state)]
    good = [states[i] for i in usable]
    learning = {"loss": loss, "epochs": epochs, "lr": lr, "seed": seed, **options}
    learned, layered = (learned_soup(model, good, validation, per=per, **learning) for per in ("model", "layer"))
    taken = greedy.report.taken
    per_layer = {layer: _spread(share, usable, len(states)) for layer, share in layered.report.coefficients.items()}
    shares = {
        "uniform": _spread([1.0 / len(good)] * len(good), usable, len(states)),
        "greedy": _spread([1.0 / len(taken)] * len(taken), taken, len(states)),
        "learned": _spread(learned.report.coefficients["*"], usable, len(states)),
        "learned per layer": [sum(column) / len(per_layer) for column in zip(*per_layer.values(), strict=True)],
    }
    weights: dict[str, Weights] = dict(
        zip(SOUPS, (average(good), dict(greedy), dict(learned), dict(layered)), strict=True)
    )
    if inputs is not None:
        weights = {soup: recalibrate_batchnorm(model, found, inputs, device=device) for soup, found in weights.items()}
    rows = tuple(
        SoupIngredient(names[row.model], row.score, {soup: shares[soup][row.model] for soup in SOUPS}, row.reason)
        for row in greedy.report.ingredients
    )
    judged = {"best model": states[taken[0]], **weights}
    scores: dict[str, dict[str, dict[str, float]]] = {soup: {} for soup in judged}
    unit = "nats"
    for split, data in (("validation", chosen(validation)), ("test", test)):
        if data is not None:
            evaluator = Evaluator(model, data, loss=loss, device=pick_device(device, states[0]))
            unit = evaluator.task.unit
            for soup, score in zip(judged, evaluator(judged.values()), strict=True):
                scores[soup][split] = dict(score["data"].values)
    return Soups(weights, rows, {layer: tuple(share) for layer, share in per_layer.items()}, scores, unit)


def _spread(shares: Sequence[float], places: Sequence[int], count: int) -> list[float]:
    """Shares of some of `count` models, 0 for the others."""
    found = [0.0] * count
    for place, share in zip(places, shares, strict=True):
        found[place] = float(share)
    return found
