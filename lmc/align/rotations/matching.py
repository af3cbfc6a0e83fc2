"""Matching with rotations, where a group admits more than permutations (Theus et al. 2025, arXiv:2506.22712).

No elementwise function acts on a residual stream, or on the queries, keys and values inside a head, so every orthogonal
matrix mixes their units without changing what the network computes; a stream's once its normalisations are folded
(`fold_norms`). Hidden units and heads are permuted as ever.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmc.align.relaxed.soft import SoftMoves, TaskLoss
from lmc.align.rotations.folding import fold_norms
from lmc.align.rotations.procrustes import Ascent
from lmc.align.rotations.rotatable import rotatable_groups
from lmc.align.weight_matching.matching import matched
from lmc.core.context import own_context, warn
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.network.batches import reread
from lmc.network.derived import gauged, settled
from lmc.network.task import Loss, Task
from lmc.symmetry.spec import PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, Weights, agreeing, lerp

if TYPE_CHECKING:
    import pandas as pd

Matrices = dict[str, Tensor]

BETWEEN = (0.4, 0.6)
_MEASURE_EVERY = 25
_CONVERGED = 1e-12


@dataclass(frozen=True, eq=False)
class RotationMatching(Result):
    """B moved onto A by permutations and rotations.

    Attributes:
        a: A with its normalisations folded; computes what A computes.
        weights: B folded and moved; computes what B computes. Interpolate between these two.
        matrices: for each group the orthogonal `(n, n)` float64 by which B's units were mixed: new unit i is
            `sum_j M[i, j]` old unit j; a permutation matrix for groups that are not in `rotated`.
        rotated: the groups that were rotated.
        objective: `sum <a, weights>` over the parameters.
        info: sweeps, steps, and with learning the midpoint's loss along the way ("losses").
    """

    a: Weights
    weights: Weights
    matrices: dict[str, Tensor]
    rotated: frozenset[str]
    objective: float
    info: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each group: group, units, whether it was rotated, and the mean square of what stays in its place (1:
        nothing moves)."""
        rows = [
            (group, len(matrix), group in self.rotated, float(matrix.diagonal().square().mean()))
            for group, matrix in self.matrices.items()
        ]
        return require("pandas").DataFrame(rows, columns=["group", "units", "rotated", "stays"])

    def __repr__(self) -> str:
        learned = f", {self.info['steps']} steps of learning" if self.info["steps"] else ""
        return (
            f"RotationMatching({len(self.rotated)} groups rotated, {len(self.matrices) - len(self.rotated)} permuted"
            f"{learned}, objective {self.objective:.6g})"
        )


@own_context
def rotation_matching(
    spec: PermutationSpec | UnboundSpec,
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    data: Any,
    *,
    steps: int = 300,
    lr: float = 0.02,
    batch_size: int = 128,
    max_sweeps: int = 100,
    loss: Loss | Task | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RotationMatching:
    """Match B with A by permutations and, where the network allows them, rotations; then learn the rotations on data.

    Normalisations are folded in both, `rotatable_groups` says what may be rotated, and coordinate ascent maximises
    `sum <A, g(B)>`: assignments for hidden units, Procrustes problems for streams, assignments of Procrustes problems for
    heads (Theus et al. 2025, weight matching). From there the rotations are learned (`learn_rotations`): the loss at points
    near the middle is made small. With `steps=0` that is left out, and labels are not needed.

    Args:
        spec: the symmetries of the architecture.
        model: the architecture; not touched.
        a, b: modules or state dicts on one device, where all is computed; neither is changed.
        data: labelled: `(inputs, targets)`, an iterable of such batches, or an object with `.train`. Two inputs show what
            may be folded and rotated.
        steps: of learning.
        lr: of Adam on the generators of the rotations.
        batch_size: examples in a step, where the data are given whole.
        max_sweeps: bound on the passes over all groups.
        loss: of outputs and targets, or an `lmc.Task` (default: cross-entropy).
        seed: decides the trial of rotations, the order of the data and the random points.
        progress: show a bar when it takes longer than two seconds.

    Returns:
        Both networks in their new form: `lmc.loss_path(model, found.a, found.weights, data)`. An interrupt ends learning with a
        warning and returns the best so far.

    Raises:
        MismatchError: `a` and `b` differ in keys, shapes or device.
        SpecError: the spec does not fit them, or the norms cannot be folded.
        DataError: no labels to learn from.
        WeightsError: weights that are not finite.
    """
    if steps < 0 or lr <= 0 or batch_size < 2 or max_sweeps < 1:
        raise InputError(f"{steps=}, {lr=}, {batch_size=}, {max_sweeps=}: expected at least 0, above 0, 2 and 1")
    started = time.perf_counter()
    a, b = agreeing([a, b], "ab", model=model)
    spec = spec.bind(a)
    data = reread(data)
    a, b = (gauged(fold_norms(spec, model, weights, data), model) for weights in (a, b))
    rotated = rotatable_groups(spec, model, b, data, seed=seed)
    ours, theirs = ({name: tensor.double() for name, tensor in matched(spec, w).items()} for w in (a, b))
    ascent = Ascent(spec, rotated, ours, theirs)
    sweeps, before = 0, float("-inf")
    while sweeps < max_sweeps and ascent.value - before > _CONVERGED * abs(ascent.value):
        before = ascent.value
        ascent.sweep()
        sweeps += 1
    matrices, losses, taken = ascent.matrices, [], 0
    if steps and rotated:  # else there is nothing to learn
        task = TaskLoss(model, a, data, loss, batch_size, next(iter(a.values())).device)
        matrices, losses, taken = learn_rotations(
            spec, task, a, b, matrices, rotated, steps=steps, lr=lr, seed=seed, progress=progress
        )
    mixed = SoftMoves(spec, theirs, next(iter(a.values())).device)(matrices, theirs)
    moved = b | {name: tensor.to(b[name].dtype) for name, tensor in mixed.items()}
    moved = settled(moved, b)
    moved |= {second: moved[first] for second, first in spec.aliases.items()}
    info = {
        "method": "rotation_matching",
        "sweeps": sweeps,
        "steps": taken,
        "losses": losses,
        "seed": seed,
    }
    info["seconds"] = time.perf_counter() - started
    objective = sum(float((x.double() * moved[name].double()).sum()) for name, x in ours.items())
    return RotationMatching(a, moved, matrices, frozenset(rotated), objective, info)


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
) -> tuple[Matrices, list[float], int]:
    """Rotations under which points half way between A and B have a small loss; permutations stay what they are.

    Each rotation is `expm(K) start` with a skew-symmetric K, 0 at first. In each step the loss of a batch at a random point
    near the middle is made smaller by Adam, its rate falling to 0 along a cosine. What is returned is the best by the loss
    of the midpoint on all the data, measured every 25 steps, the start being the first, all that was measured, and how many
    steps were made.
    """
    generator = torch.Generator().manual_seed(seed)
    names = {tensor for group in rotated for tensor in spec.groups[group].tables if tensor in b}
    mix = SoftMoves(spec, names, task.network.device)
    theirs = {name: b[name].double() for name in names}
    free = {name: torch.zeros_like(start[name], requires_grad=True) for name in rotated}

    def moved(matrices: Matrices) -> Weights:
        return b | {name: tensor.to(b[name].dtype) for name, tensor in mix(matrices, theirs).items()}

    def current() -> Matrices:
        return start | {name: torch.matrix_exp(skew(x, rotated[name])) @ start[name] for name, x in free.items()}

    optimizer = torch.optim.Adam(list(free.values()), lr=lr)
    best, values, taken = start, [task.mean(lerp(a, moved(start), 0.5))], 0
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
            taken = step
            if step % _MEASURE_EVERY == 0 or step == steps:
                with torch.no_grad():
                    found = current()
                    values.append(task.mean(lerp(a, moved(found), 0.5)))
                best = found if values[-1] < min(values[:-1]) else best
    except KeyboardInterrupt:
        warn(f"interrupted: the best of {len(values)} matchings is returned")
    return best, values, taken


def skew(x: Tensor, ones: bool) -> Tensor:
    """`x - x^T` of one or several matrices, with `ones` restricted to what maps the vector of ones to 0."""
    skew = x - x.mT
    if ones:
        skew = skew - skew.mean(-2, keepdim=True)
        skew = skew - skew.mean(-1, keepdim=True)
    return skew
