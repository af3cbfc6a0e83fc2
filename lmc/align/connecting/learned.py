"""An element of the whole group of B learned by the loss along the line from A (Theus et al. 2025, arXiv:2506.22712, section 4)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lmc.align.connecting.elements import FreeElement
from lmc.align.relaxed.soft import TaskLoss
from lmc.core.progress import Budget, tqdm
from lmc.weights import Weights

RATES = {"rotation": 0.02, "scale": 0.01}
BETWEEN = (0.1, 0.9)  # the paper's 0.4 to 0.6 leaves barriers beside the middle
WARM = 0.05  # share of the steps in which rates rise
PROBES = 5  # steps by which their number is set
MEASURES = 20  # of the judge, at most
TIME_TO_JUDGE = 0.2  # share of the time


@dataclass
class Learned:
    """The best of what was measured.

    Attributes:
        weights: B moved.
        barrier: what the judge says of it.
        steps: that were made.
        barriers: all that was measured, the start first.
        interrupted: whether it was ended from outside.
    """

    weights: Weights
    barrier: float
    steps: int = 0
    barriers: list[float] = field(default_factory=list)
    interrupted: bool = False


def learn(
    task: TaskLoss,
    a: Weights,
    element: FreeElement,
    judge: Callable[[Weights], float],
    *,
    steps: int,
    pace: float,
    budget: Budget,
    generator: torch.Generator,
    progress: bool,
) -> Learned:
    """Make the loss at random points between A and B moved small, by Adam with rates that rise and fall along a cosine.

    What counts is what the judge says, measured along the way, the start included: so often that it takes no more than a
    part of the time, where that is limited. `pace` multiplies the rates. Where the budget is short there are fewer steps, so
    that the rates still fall to 0.
    """
    start = element.exact()
    found = Learned(start, judge(start))
    found.barriers.append(found.barrier)
    judging = max(budget.spent, 1e-9)
    optimizer = torch.optim.Adam(
        [
            {"params": parameters, "lr": RATES[kind], "rate": RATES[kind]}
            for kind, parameters in element.parameters.items()
            if parameters
        ]
    )
    batches = task.epochs(generator)
    begun, measured = budget.spent, 0
    try:
        with tqdm(total=steps, desc="learning", unit=" steps", disable=not progress) as bar:
            step = 0
            while step < steps and (spent := budget.spent) < budget.seconds:
                if step == PROBES:
                    each = (budget.spent - begun) / step
                    affordable = (1.0 - TIME_TO_JUDGE) * budget.left / max(each, 1e-9)
                    steps = bar.total = step + int(min(steps - step, affordable))
                for group in optimizer.param_groups:
                    group["lr"] = pace * group["rate"] * _rate(step, steps)
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
                found.steps = step
                bar.update()
                due = step >= (measured + 1) * max(1, steps // MEASURES) and (
                    math.isinf(budget.seconds) or judging * (measured + 1) < TIME_TO_JUDGE * (spent - begun)
                )
                if due or step >= steps:
                    measured += 1
                    _measure(found, element.exact(), judge)
            if step and step < steps:
                _measure(found, element.exact(), judge)
    except KeyboardInterrupt:
        found.interrupted = True
    return found


def _measure(found: Learned, weights: Weights, judge: Callable[[Weights], float]) -> None:
    found.barriers.append(judge(weights))
    if found.barriers[-1] < found.barrier:
        found.weights, found.barrier = weights, found.barriers[-1]


def _rate(step: int, steps: int) -> float:
    rising = min(1.0, (step + 1) / max(1.0, WARM * steps))
    return rising * 0.5 * (1.0 + math.cos(math.pi * step / max(1, steps)))
