"""Rotations learned on labelled data, from a matching on (Theus et al. 2025, arXiv:2506.22712, learned matching)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lmc.align.relaxed.soft import SoftMoves
from lmc.align.relaxed.task_loss import TaskLoss
from lmc.core.context import warn
from lmc.core.progress import tqdm
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights, lerp

Matrices = dict[str, Tensor]

BETWEEN = (0.4, 0.6)
_MEASURE_EVERY = 25


def learn_rotations(
    spec: PermutationSpec,
    task: TaskLoss,
    a: Weights,
    b: Weights,
    start: Matrices,
    rotated: Mapping[str, bool],
    *,
    steps: int,
    lr: float,
    seed: int,
    progress: bool,
) -> tuple[Matrices, list[float]]:
    """Rotations under which points half way between A and B have a small loss; permutations stay what they are.

    Each rotation is `expm(K) start` with a skew-symmetric K, 0 at first. In each step the loss of a batch at a random point
    near the middle is made smaller by Adam, its rate falling to 0 along a cosine. What is returned is the best by the loss
    of the midpoint on all the data, measured every 25 steps, the start being the first, and all that was measured.
    """
    generator = torch.Generator().manual_seed(seed)
    names = {tensor for group in rotated for tensor in spec.groups[group].tables if tensor in b}
    mix = SoftMoves(spec, names, task.network.device)
    theirs = {name: b[name].double() for name in names}
    free = {name: torch.zeros_like(start[name], requires_grad=True) for name in rotated}

    def moved(matrices: Matrices) -> Weights:
        return b | {name: tensor.to(b[name].dtype) for name, tensor in mix(matrices, theirs).items()}

    def current() -> Matrices:
        return start | {name: torch.matrix_exp(_skew(x, rotated[name])) @ start[name] for name, x in free.items()}

    optimizer = torch.optim.Adam(list(free.values()), lr=lr)
    best, values = start, [task.mean(lerp(a, moved(start), 0.5))]
    batches = task.epochs(generator)
    try:
        for step in tqdm(range(1, steps + 1), desc="rotations", disable=not progress):
            optimizer.param_groups[0]["lr"] = 0.5 * lr * (1.0 + math.cos(math.pi * (step - 1) / steps))
            low, high = BETWEEN
            alpha = low + (high - low) * float(torch.rand((), generator=generator))
            theirs_now = moved(current())
            between = {name: torch.lerp(a[name], theirs_now[name], alpha) for name in a if a[name].is_floating_point()}
            optimizer.zero_grad()
            task(a | between, next(batches)).backward()
            optimizer.step()
            if step % _MEASURE_EVERY == 0 or step == steps:
                with torch.no_grad():
                    found = current()
                    values.append(task.mean(lerp(a, moved(found), 0.5)))
                best = found if values[-1] < min(values[:-1]) else best
    except KeyboardInterrupt:
        warn(f"interrupted: the best of {len(values)} matchings is returned")
    return best, values


def _skew(x: Tensor, ones: bool) -> Tensor:
    """`x - x^T`, with `ones` restricted to what maps the vector of ones to 0."""
    skew = x - x.T
    if ones:
        skew = skew - skew.mean(0, keepdim=True)
        skew = skew - skew.mean(1, keepdim=True)
    return skew
