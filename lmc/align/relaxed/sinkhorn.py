"""Sinkhorn re-basin: permutations learned as doubly stochastic matrices (Peña et al. 2023, arXiv:2212.12042)."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lmc.align.relaxed.soft import SoftMoves, TaskLoss, doubly_stochastic, sinkhorn
from lmc.align.weight_matching.gains import assign
from lmc.align.weight_matching.matching import in_form_of, matched
from lmc.core.context import own_context, warn
from lmc.core.progress import Budget, tqdm
from lmc.errors import DataError, InputError
from lmc.network.derived import gauged
from lmc.network.network import Network, pick_device
from lmc.network.task import Loss, Task
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, Weights, agreeing, lerp

Target = Literal["l2", "l1", "cosine", "midpoint", "random"]
Matrices = dict[str, Tensor]

_NOISE = 0.1
_UNEVEN = 0.25


@own_context
def sinkhorn_matching(
    spec: PermutationSpec | UnboundSpec,
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    data: Any = None,
    *,
    target: Target | None = None,
    tau: float = 1.0,
    iterations: int = 20,
    lr: float = 0.1,
    steps: int = 300,
    measure_every: int = 10,
    patience: int = 10,
    batch_size: int = 256,
    budget: float | None = None,
    loss: Loss | Task | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Permutation:
    """Learn all permutations of B at once by gradient descent, each relaxed to `S = Sinkhorn(exp(X / tau))`.

    Training is soft, what is kept is hard: every few steps the assignment that is best for X is measured, and the best
    one is returned, the identity being the first. X starts at the identity plus noise and is trained by AdamW.

    Args:
        spec: the symmetries of the architecture.
        model: the architecture; not touched.
        a, b: modules or state dicts on one device; neither is changed.
        data: labelled, for "midpoint" and "random": `(inputs, targets)`, an iterable of such batches, or an object with
            `.train`.
        target: what is made small. "l2", "l1", "cosine": a distance between A and pi(B), without data. "midpoint": the
            loss at `(A + pi(B)) / 2`; "random": the loss at a random point between them. Default: "midpoint" with data,
            "l2" without.
        tau: temperature; the smaller, the nearer to permutations, and the fainter the gradients.
        iterations: scalings of rows and columns.
        lr: of AdamW on X.
        steps: at most.
        measure_every: steps between two measurements.
        patience: end after this many measurements without a better permutation.
        batch_size: examples in a step, where the data are given whole.
        budget: seconds after which the best so far is returned (default: any).
        loss: of outputs and targets, or an `lmc.Task` (default: cross-entropy).
        seed: decides the noise, the order of the data and the random points.
        device: where to run (default: where the weights are).
        progress: show a bar when it takes longer than two seconds.

    Returns:
        The permutation. `.objective` is minus the best value measured; `.info["values"]` has them all. An interrupt ends
        the search with a warning and returns the best so far.

    Warns when the matrices at the end are not doubly stochastic, which makes training soft on something else.

    Raises:
        MismatchError: `a` and `b` differ in keys, shapes or device.
        SpecError: the spec does not fit them.
        DataError: no data for a target that needs them.
        WeightsError: weights that are not finite.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> spec = lmc.permutation_spec(model, data.test[0][:2])
        >>> pi = lmc.sinkhorn_matching(spec, model, a, b, data, steps=60)
        >>> naive, aligned = (lmc.loss_path(model, a, end, data.test).barrier for end in (b, pi.apply(b)))
        >>> aligned < naive / 2
        True
    """
    target = target or ("l2" if data is None else "midpoint")
    _check(target, data, tau, iterations, lr, steps, measure_every, patience)
    clock, interrupted = Budget(budget), False
    a, b = agreeing([a, b], "ab", model=model)
    spec = spec.bind(a)
    chosen = pick_device(device, a)
    Network(model, chosen).check(a, "a")
    a, b = (gauged({name: tensor.to(chosen) for name, tensor in weights.items()}, model) for weights in (a, b))
    generator = torch.Generator().manual_seed(seed)
    step_loss, measure = _objective(spec, model, a, b, data, target, loss, batch_size, generator)
    if not spec.groups:  # nothing may move
        return Permutation(spec, {}, -measure(spec.identity()), {"method": "sinkhorn_matching", "target": target})

    scores = {name: _near_identity(group.size, generator).to(chosen) for name, group in spec.groups.items()}
    optimizer = torch.optim.AdamW([x.requires_grad_() for x in scores.values()], lr=lr)
    best = spec.identity()
    values, stale, taken = [measure(best)], 0, 0
    try:
        for taken in tqdm(range(1, steps + 1), desc="sinkhorn", disable=not progress):
            optimizer.zero_grad()
            step_loss(doubly_stochastic({name: x / tau for name, x in scores.items()}, iterations)).backward()
            optimizer.step()
            if taken % measure_every == 0 or taken == steps or clock.over:
                pi = Permutation(spec, {name: assign(x)[0] for name, x in scores.items()})
                values.append(measure(pi))
                stale = 0 if values[-1] < min(values[:-1]) else stale + 1
                best = pi if stale == 0 else best
                if stale >= patience or clock.over:
                    break
    except KeyboardInterrupt:
        interrupted = True
        warn(f"interrupted: the best of {len(values)} permutations is returned")
    uneven = max(_unevenness(x.detach() / tau, iterations) for x in scores.values())
    if uneven > _UNEVEN:
        warn(
            f"Sinkhorn has not converged: after {iterations} iterations at tau={tau:g} a column sums to 1 only within "
            f"{uneven:.2g}; raise iterations or tau, or lower lr"
        )
    info = {
        "method": "sinkhorn_matching",
        "target": target,
        "seed": seed,
        "steps": taken,
        "values": values,
        "unevenness": uneven,
        "interrupted": interrupted,
        "seconds": clock.spent,
    }
    return Permutation(spec, best.indices, -min(values), info)


def _check(target: str, data: Any, tau: float, iterations: int, lr: float, *counts: int) -> None:
    if target not in get_args(Target):
        raise InputError(f"target={target!r}: expected one of {', '.join(map(repr, get_args(Target)))}")
    if target in ("midpoint", "random") and data is None:
        raise DataError(f"target={target!r} needs labelled data; without data choose 'l2', 'l1' or 'cosine'")
    if tau <= 0 or lr <= 0 or iterations < 1 or min(counts) < 1:
        raise InputError(f"{tau=}, {lr=}, {iterations=}, steps, measure_every or patience: expected positive numbers")


def _objective(
    spec: PermutationSpec,
    model: nn.Module,
    a: Weights,
    b: Weights,
    data: Any,
    target: Target,
    loss: Loss | Task | None,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[Callable[[Matrices], Tensor], Callable[[Permutation], float]]:
    """The loss of a training step, as a function of soft matrices, and the measure of a permutation."""
    ours, theirs = matched(spec, a), matched(spec, b)
    mix = SoftMoves(spec, theirs, next(iter(b.values())).device)
    if target in ("l2", "l1", "cosine"):
        return (
            lambda matrices: distance(ours, mix(matrices, theirs), target),
            lambda pi: float(distance(ours, matched(spec, pi.apply(b)), target)),
        )
    task = TaskLoss(model, a, data, loss, batch_size, next(iter(b.values())).device)
    batches = task.epochs(generator)

    def step_loss(matrices: Matrices) -> Tensor:
        alpha = 0.5 if target == "midpoint" else float(torch.rand((), generator=generator))
        mixed = mix(matrices, theirs)
        between = {name: in_form_of(a[name], torch.lerp(x, mixed[name], alpha)) for name, x in ours.items()}
        return task(a | between, next(batches))

    return step_loss, lambda pi: task.mean(lerp(a, pi.apply(b), 0.5))


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], target: Target) -> Tensor:
    """Between all tensors as one vector each: squared "l2" or "l1", as a share of that norm of A, or 1 - cosine."""
    left = torch.cat([tensor.flatten() for tensor in a.values()])
    right = torch.cat([b[name].flatten() for name in a])
    if target == "cosine":
        return 1.0 - torch.nn.functional.cosine_similarity(left, right, dim=0)
    if target == "l1":
        return (left - right).abs().sum() / left.abs().sum().clamp_min(torch.finfo(left.dtype).tiny)
    return (left - right).square().sum() / left.square().sum().clamp_min(torch.finfo(left.dtype).tiny)


def _near_identity(size: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(size, size, generator=generator, dtype=torch.float32)
    return torch.eye(size, dtype=torch.float32) + _NOISE * noise


def _unevenness(log_scores: Tensor, iterations: int) -> float:
    return float((sinkhorn(log_scores, iterations).sum(0) - 1.0).abs().max())
