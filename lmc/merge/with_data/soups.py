"""Soups: averages of models fine-tuned from one base with one head initialisation (Wortsman et al. 2022, 2203.05482).

The uniform soup is `average`. `compare_soups.py` makes all soups of the same models and compares them; recipes that
train their ingredients (DiWA, model ratatouille) are in `with_training/trained_soups.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError, WeightsError
from lmc.landscape.evaluation.evaluation import Objective
from lmc.merge.engine.aligning import alignable
from lmc.merge.engine.assembly import Merged, Mixture
from lmc.merge.engine.method import linear
from lmc.merge.engine.tensors import weight_sets
from lmc.merge.rules.averaging import average
from lmc.merge.with_data.judge import Judge, chosen, finite
from lmc.network.batches import to_device
from lmc.network.task import Loss, Task
from lmc.weights import ModelOrWeights, as_weights

uniform_soup = average


@linear
def wise_ft(count: int, *, alpha: float = 0.5) -> list[float]:
    """WiSE-FT (Wortsman, Ilharco, Kim et al. 2022, 2109.01903): `(1 - alpha) base + alpha model`, head included.

    `base` is the zero-shot model, `models` the fine-tuned one; of several, their mean. `alpha` weights the fine-tuned
    side; the paper's choice without target validation data is 0.5. `alpha=0` and `1` are the endpoints, bit for bit.
    """
    return [alpha / count] * count


@dataclass(frozen=True)
class Ingredient:
    """One model on its way into the soup.

    Attributes:
        model: its place in the list given.
        score: its own validation score; NaN if it was not evaluated.
        soup: score of the soup with it; NaN if it was not tried.
        taken: whether it is in the soup.
        reason: why, in words.
    """

    model: int
    score: float
    soup: float
    taken: bool
    reason: str


@dataclass(frozen=True)
class SoupReport(Result):
    """The ingredients that a greedy soup took, in the order in which they were tried, and the validation score it ends with.

    Attributes:
        ingredients: the best on its own first.
        score: of the soup.
        measure: what scores are: "accuracy" (a share), "loss", or a metric.
    """

    ingredients: tuple[Ingredient, ...]
    score: float
    measure: str = "accuracy"

    @property
    def taken(self) -> tuple[int, ...]:
        """The places of the models in the soup, best first."""
        return tuple(row.model for row in self.ingredients if row.taken)

    def to_frame(self) -> Any:
        """A pandas data frame, one row per ingredient."""
        pandas = require("pandas")

        return pandas.DataFrame([vars(row) for row in self.ingredients])

    def __str__(self) -> str:
        lines = [f"{'model':>5}  {'alone':>8}  {'soup':>8}  {'taken':5}  reason"]
        for row in self.ingredients:
            taken = "yes" if row.taken else "no"
            lines.append(f"{row.model:>5}  {row.score:>8.4f}  {row.soup:>8.4f}  {taken:5}  {row.reason}")
        return "\n".join(
            [*lines, f"{len(self.taken)} of {len(self.ingredients)} models, {self.measure} {self.score:.4f}"]
        )


@own_context
@alignable
def greedy_soup(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    validation: Any,
    *,
    metric: str | None = None,
    loss: Loss | Task | None = None,
    strict: bool = False,
    min_gain: float = 0.0,
    inputs: Any = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Merged[SoupReport]:
    """Add models to the average, best first, as long as it does not get worse on validation data (Recipe 1).

    The paper takes an ingredient if the score is at least the best so far, the authors' code only if it is higher
    (`strict=True`). The result is never worse on the validation data than the best ingredient; report its quality on
    other data. Models that are not finite are left out and named in the report.

    Args:
        model: the architecture; its weights are not used and not touched.
        models: the ingredients.
        validation: labelled data as for `lmc.loss_path` (of a data set `.validation`, or its `.train`; never its
            `.test`), or a function from weights to a score, larger being better (smaller with `metric="loss"`).
        metric: "accuracy", "loss" or a metric of the task (default: the accuracy where targets are classes, else the
            loss).
        loss: how outputs are judged, as for `lmc.loss_path`: a function of outputs and targets, or an `lmc.Task`.
        strict: take only what improves the score.
        min_gain: how much an ingredient must add at least.
        inputs: unlabelled; BatchNorm statistics of every soup are re-estimated from them before it is evaluated.
        device: where to evaluate (default: where the weights are).
        progress: show a bar if it takes longer than two seconds.

    Returns:
        The soup, a state dict whose `.report` is the table of ingredients.

    Raises:
        InputError: a negative `min_gain`.
        WeightsError: no model is finite.
    """
    if not min_gain >= 0.0:
        raise InputError(f"min_gain={min_gain}; expected a number of at least 0")
    states = [as_weights(state) for state in weight_sets(models, module=model, pairs=True).states]
    judge = Judge(model, validation, metric, loss=loss, inputs=inputs, device=device, models=states)
    faults = [finite(state) for state in states]
    bar = tqdm(total=2 * len(states) - 1, desc="greedy soup", disable=not progress)
    alone = [math.nan] * len(states)
    for i, state in enumerate(states):
        if not faults[i]:
            alone[i] = judge(state)
            faults[i] = "" if math.isfinite(alone[i]) else f"{judge.measure} {alone[i]}"
        bar.update()
    order = sorted((i for i in range(len(states)) if not faults[i]), key=lambda i: -judge.gain(alone[i]))
    if not order:
        raise WeightsError("no ingredient can be used: " + "; ".join(f"models[{i}]: {f}" for i, f in enumerate(faults)))

    first = order[0]
    rows = [Ingredient(first, alone[first], alone[first], True, "best on its own")]
    best, soup = alone[first], {name: tensor.clone() for name, tensor in states[first].items()}
    taken = [first]
    for i in order[1:]:
        candidate = judge.renew(average([states[j] for j in [*taken, i]]))
        found = judge(candidate)
        gain = judge.gain(found) - judge.gain(best)
        accept = gain > min_gain if strict else gain >= min_gain
        word = "improves" if gain > 0 else "keeps" if gain == 0 else "worsens"
        reason = f"{word} the {judge.measure} of the soup from {best:.4f} to {found:.4f}"
        rows.append(Ingredient(i, alone[i], found, accept, reason))
        if accept:
            best, soup, taken = found, candidate, [*taken, i]
        bar.update()
    bar.close()
    rows += [Ingredient(i, alone[i], math.nan, False, fault) for i, fault in enumerate(faults) if fault]
    return Merged(soup, SoupReport(tuple(rows), best, judge.measure or ""))


Per = Literal["model", "layer", "tensor"]


@dataclass(frozen=True)
class LearnedReport(Result):
    """The coefficients a soup was learned with.

    Attributes:
        coefficients: for each group of tensors one share per model; they sum to 1. One group "*" with `per="model"`.
        losses: mean training loss of each epoch.
        temperature: what the logits were multiplied by in the loss; not part of the weights.
    """

    coefficients: dict[str, tuple[float, ...]]
    losses: tuple[float, ...]
    temperature: float

    def to_frame(self) -> Any:
        """A pandas data frame: a row for each group of tensors, a column for each model."""
        pandas = require("pandas")

        return pandas.DataFrame.from_dict(self.coefficients, orient="index").add_prefix("model ")

    def __str__(self) -> str:
        width = max(map(len, self.coefficients))
        rows = [f"{k:{width}}  " + "  ".join(f"{c:6.3f}" for c in v) for k, v in self.coefficients.items()]
        losses = f"loss {self.losses[0]:.4f} -> {self.losses[-1]:.4f}" if self.losses else "not trained"
        return "\n".join(["share of each model", *rows, f"{losses}, temperature {self.temperature:.3f}"])


@own_context
@alignable
def learned_soup(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    validation: Any,
    *,
    per: Per = "model",
    loss: Loss | Task | None = None,
    epochs: int = 5,
    lr: float = 0.05,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Merged[LearnedReport]:
    """Learn the shares of the models by gradient descent on validation data (2203.05482, appendix I).

    Minimises the cross-entropy of `beta f(x; sum_i softmax(a)_i theta_i)` over logits `a`, which start equal, and the
    temperature `beta`, which starts at 1 and stays there under a loss of your own, with Adam. `per="layer"` learns shares for each module,
    `"tensor"` for each tensor. All models are held in memory at once. BatchNorm statistics are averaged equally.

    Args:
        validation: labelled data as for `greedy_soup`; not a function.
        loss: as for `greedy_soup`.
        epochs: passes over the data; 0 gives the uniform soup.
        seed: of the order of examples.

    Returns:
        The soup, a state dict whose `.report` holds the learned shares.
    """
    if per not in ("model", "layer", "tensor"):
        raise InputError(f"per must be 'model', 'layer' or 'tensor', got {per!r}")
    sets = weight_sets(models, module=model)
    objective = Objective(
        model, as_weights(sets.states[0]), chosen(validation), loss=loss, device=device, name="models[0]"
    )
    network, split, task = objective.network, objective.split, objective.task
    classes = task.loss is None and task.labels is None
    names = {name: {"model": "*", "layer": name.rpartition(".")[0], "tensor": name}[per] for name in sets.weights}
    equal = ([1.0 / len(sets)] * len(sets), 0.0)
    mixture = Mixture(
        sets,
        lambda name: sets.tensor(name, 0),
        lambda name: sets.stack(name) - sets.tensor(name, 0),
        names,
        equal,
        network.device,
    )
    logits = {group: torch.zeros(len(sets), device=network.device, requires_grad=True) for group in names.values()}
    network.load(mixture.whole(_softmax(logits)))
    beta = torch.ones((), device=network.device, requires_grad=True)
    optimizer = torch.optim.Adam([*logits.values(), beta], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in tqdm(range(epochs), desc="learned soup", disable=not progress):
        seen = []
        for inputs, goal in split.shuffled(batch_size, generator):
            goal = goal.to(network.device)
            call = task.call(to_device(inputs, network.device), goal)
            outputs = network.outputs(mixture(_softmax(logits)), call)
            value = task.mean_loss(beta * outputs if classes else outputs, goal, call)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            seen.append((value.item(), len(goal)))
        losses.append(sum(value * count for value, count in seen) / sum(count for _, count in seen))
    shares = _softmax({group: a.detach() for group, a in logits.items()})
    report = LearnedReport({g: tuple(a.tolist()) for g, a in shares.items()}, tuple(losses), float(beta.detach()))
    return Merged(mixture.whole(shares), report)


def _softmax(logits: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    return {group: torch.softmax(a, 0) for group, a in logits.items()}
