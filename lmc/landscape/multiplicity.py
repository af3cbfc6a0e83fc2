"""Predictive multiplicity: how differently models of about the same quality decide, example by example."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import DataError, InputError
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.landscape.evaluation.measured import Values
from lmc.network.batches import to_device
from lmc.network.network import pick_device
from lmc.network.task import Outputs
from lmc.weights import ModelOrWeights, agreeing

if TYPE_CHECKING:
    import pandas as pd

BATCH = 256
STEPS, GAP = 1000, 1e-8  # of Blahut and Arimoto's iteration: the most, and the nats between its bounds at the end


@dataclass(frozen=True, eq=False)
class Multiplicity(Result):
    """The decisions of K classifiers on N examples. All shares are fractions of the examples.

    Attributes:
        names: what the models are called.
        split: whose examples they are.
        reference: the model that the others are compared with, by name.
        kept: (K,) models whose loss is within the tolerance of the reference; only they count below.
        losses: (K,) in nats.
        errors: (K,) share of wrong decisions.
        churn: (K, K) share of examples that two models decide differently; NaN for models that are not kept.
        ambiguity: share on which some kept model differs from the reference.
        discrepancy: the largest share on which one kept model differs from the reference.
        viable_range: (N,) largest difference of the probability of the reference's class between kept models.
        capacity: (N,) Rashomon capacity `2^C`, from 1 (all agree) to the smaller of models and classes.
        decisions: (K, N) predicted classes.
        targets: (N,) true classes.
    """

    names: tuple[str, ...]
    split: str
    reference: str
    kept: tuple[bool, ...]
    losses: Values
    errors: Values
    churn: Values
    ambiguity: float
    discrepancy: float
    viable_range: Values
    capacity: Values
    decisions: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]

    @property
    def undecided(self) -> npt.NDArray[np.int64]:
        """The examples on which kept models disagree, those of the highest capacity first."""
        kept = self.decisions[np.array(self.kept)]
        changing = np.flatnonzero((kept != kept[0]).any(0))
        return changing[np.argsort(-self.capacity[changing], kind="stable")]

    def to_frame(self) -> "pd.DataFrame":
        """A row for each model: model, kept, loss, error, churn against the reference."""
        row = self.names.index(self.reference)
        columns = {"model": self.names, "kept": self.kept, "loss": self.losses, "error": self.errors}
        return require("pandas").DataFrame({**columns, "churn": self.churn[row]})

    def __str__(self) -> str:
        return (
            f"Multiplicity of {sum(self.kept)} of {len(self.names)} models on {len(self.targets)} examples ({self.split}), "
            f"against {self.reference}: ambiguity {100 * self.ambiguity:.1f} %, discrepancy {100 * self.discrepancy:.1f} %, "
            f"capacity {self.capacity.mean():.3f} on average, at most {self.capacity.max():.2f}"
        )

    __repr__ = __str__


@own_context
def multiplicity(
    model: nn.Module,
    models: Iterable[ModelOrWeights],
    data: Any,
    *,
    names: Sequence[str] | None = None,
    reference: int = 0,
    tolerance: float | None = None,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> Multiplicity:
    """Compare the decisions of several weight sets of one architecture: checkpoints, points of a path, ingredients of a soup.

    Ambiguity and discrepancy after Marx et al. 2020 (arXiv:1909.06677), here against a reference model, not against the
    labels; churn is discrepancy between any two (Watson-Daniels et al. 2024, arXiv:2402.07745); Rashomon capacity after
    Hsu and Calmon 2022 (arXiv:2206.01295).

    Args:
        model: the architecture.
        models: at least two weight sets; modules or state dicts.
        data: labelled classes, as for `evaluate`; of several splits the test split.
        names: what the models are called (default: "0", "1", ...).
        reference: the number of the model to compare with.
        tolerance: only models with a loss of at most `(1 + tolerance)` times the reference's count (default: all do).
        outputs, batch_size, device: as for `evaluate`.

    Raises:
        InputError: fewer than two models, an unusable reference, tolerance or number of names.
        MismatchError: models of several architectures, dtypes or devices.
        WeightsError: weights that are not finite.
        DataError: data that are unusable or no classification.
    """
    models = list(models)
    called = [str(i) for i in range(len(models))] if names is None else list(names)
    if len(models) < 2 or len(called) != len(models) or len(set(called)) != len(called):
        raise InputError(f"{len(models)} models, names {called}; expected at least two models, each with its own name")
    states = agreeing(models, called, model=model)
    if not (isinstance(reference, int) and 0 <= reference < len(states)):
        raise InputError(f"reference={reference!r}; expected the number of a model, 0 to {len(states) - 1}")
    if tolerance is not None and not (isinstance(tolerance, Real) and tolerance >= 0.0):
        raise InputError(f"tolerance={tolerance}; expected a share of the reference's loss, at least 0")
    evaluator = Evaluator(model, data, outputs=outputs, batch_size=batch_size, device=pick_device(device, states[0]))
    list(evaluator([states[reference]]))  # checks that data and outputs fit
    split, task = evaluator.splits[-1], evaluator.task
    logs, targets = [], torch.empty(0, dtype=torch.long)
    for state in states:
        evaluator.network.load(state)
        rows, goals = [], []
        for inputs, goal in split.iterate(batch_size or BATCH):
            output = evaluator.network(task.call(to_device(inputs, evaluator.device), goal.to(evaluator.device)))
            logits = task.logits(output, goal.to(evaluator.device))
            if logits is None:
                raise DataError(f"{split.name}: decisions can be compared for targets that are classes only")
            flat = goal.flatten().cpu()
            counted = flat != task.ignore
            rows.append(logits.flatten(0, -2).cpu().double().log_softmax(-1)[counted])
            goals.append(flat[counted])
        logs.append(torch.cat(rows))
        targets = torch.cat(goals)
    probabilities = torch.stack(logs).exp()  # (K, N, C)
    decisions = probabilities.argmax(-1)
    losses = -torch.stack(logs).gather(-1, targets.expand(len(states), -1).unsqueeze(-1)).mean((1, 2))
    limit = math.inf if tolerance is None else float(losses[reference]) * (1.0 + tolerance)
    kept = losses <= limit
    kept[reference] = True
    apart = decisions[:, None] != decisions[None]
    churn = apart.double().mean(-1)
    churn[~kept], churn[:, ~kept] = math.nan, math.nan
    differing = apart[reference][kept]
    chosen = probabilities[kept].gather(-1, decisions[reference].expand(int(kept.sum()), -1).unsqueeze(-1)).squeeze(-1)
    return Multiplicity(
        tuple(called),
        split.name,
        called[reference],
        tuple(kept.tolist()),
        losses.numpy(),
        (decisions != targets).double().mean(-1).numpy(),
        churn.numpy(),
        float(differing.any(0).double().mean()),
        float(differing.double().mean(-1).max()),
        (chosen.amax(0) - chosen.amin(0)).numpy(),
        _capacity(probabilities[kept].transpose(0, 1)).numpy(),
        decisions.numpy(),
        targets.numpy(),
    )


def _capacity(channels: Tensor) -> Tensor:
    """`2^C` (N,) for the capacities C, in bits, of channels (N, m, c) whose rows are distributions.

    Blahut 1972 and Arimoto 1972: with the weights r of the rows, `q_k|c ~ r_k p_c|k`, then `r_k ~ exp(sum_c p_c|k log q_k|c)`.
    """
    found = torch.empty(len(channels), dtype=channels.dtype)
    left, p = torch.arange(len(channels)), channels
    r = torch.full(p.shape[:2], 1.0 / p.shape[1], dtype=p.dtype)
    apart = _divergence(p, r)
    pace = torch.ones(len(p), 1, dtype=p.dtype)
    for _ in range(STEPS):
        lower, upper = (r * apart).sum(-1), apart.amax(-1)  # the capacity lies between them
        found[left] = lower.clamp_min(0.0).exp()
        going = upper - lower > GAP
        if not going.any():
            break
        left, p, r, apart, pace, lower = left[going], p[going], r[going], apart[going], pace[going], lower[going]
        # log r_k + sum_c p_c|k log(p_c|k / output_c): the two steps in one, as the output normalises q. Where rows are
        # alike it creeps; longer steps are taken as long as they do not lose, a step of pace 1 never does.
        longer = (r.clamp_min(torch.finfo(p.dtype).tiny).log() + pace * apart).softmax(-1)
        there = _divergence(p, longer)
        gained = ((longer * there).sum(-1) >= lower).unsqueeze(-1) | (pace <= 1.0)
        r, apart = torch.where(gained, longer, r), torch.where(gained, there, apart)
        pace = torch.where(gained, 2.0 * pace, (pace / 4.0).clamp_min(1.0))
    return found


def _divergence(p: Tensor, r: Tensor) -> Tensor:
    """Kullback-Leibler divergences (N, m), in nats, of the rows from their mixture with weights r."""
    output = (r.unsqueeze(-1) * p).sum(1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, output)).sum(-1)
