"""An element of the whole group of B learned by the loss along the line from A (Theus et al. 2025, arXiv:2506.22712, section 4)."""

import math
from typing import NamedTuple

import torch

from lmc.align.connecting.elements import FreeElement
from lmc.align.relaxed.soft import TaskLoss
from lmc.core.progress import Budget, tqdm
from lmc.weights import Weights

RATES = {"rotation": 0.02, "scale": 0.01}
DECAYS = {"rotation": 0.0, "scale": 0.3}  # of AdamW: where the loss has no more to say, noise would drive scales away
BETWEEN = (0.1, 0.9)  # the paper's 0.4 to 0.6 leaves barriers beside the middle
WARM = 0.05  # share of the steps in which rates rise


class Learned(NamedTuple):
    """B moved, after so many steps; whether it was ended from outside."""

    weights: Weights
    steps: int
    interrupted: bool


def learn(
    task: TaskLoss,
    a: Weights,
    element: FreeElement,
    *,
    steps: int,
    budget: Budget,
    generator: torch.Generator,
    progress: bool,
) -> Learned:
    """Make the loss at random points between A and B moved small, by AdamW with rates that rise and fall along a cosine.

    Where the budget is short the rates fall with the time, so that they end at 0 as well. What they have fallen to is what
    counts: no step before it is chosen by its looks, which would be to learn from the examples that judge.
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": RATES[kind], "rate": RATES[kind], "weight_decay": DECAYS[kind]}
            for kind, parameters in element.parameters.items()
            if parameters
        ]
    )
    batches = task.epochs(generator)
    begun, allowed, step, interrupted = budget.spent, max(budget.left, 1e-9), 0, False
    try:
        with tqdm(total=steps, desc="learning", unit=" steps", disable=not progress) as bar:
            # One more step takes as long as those before it.
            while (done := max(step / steps, (budget.spent - begun) * (step + 1) / max(1, step) / allowed)) < 1.0:
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * _rate(done + 1.0 / steps, done)
                low, high = BETWEEN
                alpha = low + (high - low) * float(torch.rand((), generator=generator))
                moved = element()
                between = {name: torch.lerp(a[name], moved[name].to(a[name].dtype), alpha) for name in moved}
                others = {name: x for name, x in a.items() if name not in moved}
                still = {
                    name: torch.lerp(x, element.weights[name], alpha) if x.is_floating_point() else x
                    for name, x in others.items()
                }
                optimizer.zero_grad()
                task(still | between, next(batches)).backward()
                optimizer.step()
                step += 1
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
    return Learned(element.exact(), step, interrupted)


def _rate(after: float, before: float) -> float:
    """The share of the full rate in a step, by what is done after and before it."""
    return min(1.0, after / WARM) * 0.5 * (1.0 + math.cos(math.pi * before))
