"""Adaptive model averaging: between a model before and after alignment, with a ratio of its own for each depth."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.evaluation.evaluation import Objective
from lmc.merge.engine.aligning import alignable
from lmc.merge.engine.assembly import Merged, Mixture
from lmc.merge.engine.call import matches
from lmc.merge.engine.tensors import weight_sets
from lmc.merge.with_data.judge import chosen
from lmc.network.task import Loss, Task
from lmc.weights import ModelOrWeights, as_weights, fitted
from lmc.weights.state import model_depths

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class AmaReport(Result):
    """Share of the base in each group of tensors, shallow to deep (their mean is fixed), and the loss of each step."""

    shares: tuple[float, ...]
    losses: tuple[float, ...]

    def to_frame(self) -> "pd.DataFrame":
        """A row for each group of tensors, shallow to deep: share of the base."""
        return require("pandas").DataFrame({"share": self.shares}).rename_axis("group")

    def __str__(self) -> str:
        shares = "  ".join(f"{share:.3f}" for share in self.shares)
        return f"share of the base, shallow to deep: {shares}\nloss {self.losses[0]:.4f} -> {self.losses[-1]:.4f}"


@own_context
@alignable
def ama(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    data: Any,
    *,
    base: ModelOrWeights,
    mean: float = 0.2,
    epsilon: float = 0.2,
    loss: Loss | Task | None = None,
    groups: int | Sequence[str] = 3,
    steps: int = 200,
    lr: float = 0.02,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Merged[AmaReport]:
    """Adaptive model averaging (Lin et al. 2024, 2309.06256): `alpha_k base + (1 - alpha_k) tuned` by layers.

    `alpha_k = mean K (sigmoid(a_k) + epsilon) / sum_j (sigmoid(a_j) + epsilon)` keeps the mean share of the base, here
    as in the authors' code the model *before* alignment, at `mean`; `a` is learned with Adam on the cross-entropy of
    `data`. The paper takes samples of high reward (best of n) and lr 2e-5 for one epoch; its code also pulls shares
    towards `mean`, most in the middle layers, with a weight of 1e-4, which is left out. Tensors outside the groups
    (embeddings, head) have `mean`.

    Args:
        model: the architecture; its weights are not used and not touched.
        models: the tuned model, in a list; of several, their average.
        data: labelled data as for `greedy_soup`.
        base: the model before tuning.
        loss: as for `greedy_soup` (default: cross-entropy).
        groups: name patterns, or how many groups of blocks of equal depth (numbered modules, or where none are numbered
            all modules in the model's order); with fewer blocks there are fewer groups.
        steps, lr, batch_size, seed: of Adam, and of the order of examples.
        device: where to compute (default: where the weights are).
        progress: show a bar if it takes longer than two seconds.
    """
    if not 0.0 <= mean <= 1.0 or epsilon <= 0.0 or steps < 1:
        raise InputError(f"mean must be in [0, 1], epsilon positive, steps at least 1; got {mean}, {epsilon}, {steps}")
    sets = weight_sets(models, base, module=model)
    place = _groups(sets.weights, groups, model)
    count = max(place.values()) + 1
    objective = Objective(
        model, fitted(model, as_weights(base), "base"), chosen(data), loss=loss, device=device, name="base"
    )
    device = objective.network.device
    outside = -1  # the group of tensors in none
    mixture = Mixture(
        sets,
        lambda name: sets.stack(name).mean(0),
        lambda name: (sets.base_tensor(name) - sets.stack(name).mean(0))[None],
        {name: place.get(name, outside) for name in sets.weights},
        ([(1.0 - mean) / len(sets)] * len(sets), mean),
        device,
    )
    logits = torch.zeros(count, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr)

    def shares() -> dict[Any, Tensor]:
        raw = torch.sigmoid(logits) + epsilon
        learned = mean * count * raw / raw.sum()
        return {outside: torch.full((1,), mean, device=device)} | {k: learned[k : k + 1] for k in range(count)}

    objective.network.load(mixture.whole(shares()))
    generator = torch.Generator().manual_seed(seed)
    batches: Iterator[Any] = iter(())
    losses = []
    for _ in tqdm(range(steps), desc="AMA", disable=not progress):
        batch = next(batches, None)
        if batch is None:
            batches = objective.split.shuffled(batch_size, generator)
            batch = next(batches)
        value = objective(mixture(shares()), batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    found = shares()
    return Merged(mixture.whole(found), AmaReport(tuple(found[k].item() for k in range(count)), tuple(losses)))


def _groups(names: Sequence[str], groups: int | Sequence[str], model: nn.Module) -> dict[str, int]:
    """The group of each name that is in one; no group is empty."""
    if isinstance(groups, int):
        if groups < 1:
            raise InputError(f"groups must be at least 1, got {groups}")
        found = {name: min(int(depth * groups), groups - 1) for name, depth in model_depths(model, names).items()}
        used = sorted(set(found.values()))  # fewer blocks than groups leave some without tensors
        return {name: used.index(group) for name, group in found.items()}
    found = {}
    for k, pattern in enumerate(groups):
        inside = [name for name in names if matches(name, pattern)]
        if not inside:
            raise InputError(f"groups: no tensor fits the pattern {pattern!r}")
        found |= dict.fromkeys(inside, k)
    return found
