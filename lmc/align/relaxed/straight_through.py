"""Straight-through matching: the permutation whose midpoint has the lowest loss (Ainsworth et al. 2023, section 3.3)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmc.align.relaxed.soft import TaskLoss
from lmc.align.weight_matching.algorithm import Descent
from lmc.align.weight_matching.blocks import UnitBlock, build_blocks
from lmc.align.weight_matching.matching import matched, weight_matching
from lmc.core.context import own_context, warn
from lmc.core.progress import Budget, tqdm
from lmc.errors import InputError
from lmc.network.derived import gauged
from lmc.network.network import pick_device
from lmc.network.task import Loss, Task
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, Weights, agreeing, lerp

_SWEEPS = 20


@own_context
def straight_through_matching(
    spec: PermutationSpec | UnboundSpec,
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    data: Any,
    *,
    epochs: int = 40,
    lr: float = 0.3,
    momentum: float = 0.9,
    batch_size: int = 256,
    patience: int = 10,
    start: Permutation | None = None,
    budget: float | None = None,
    loss: Loss | Task | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Permutation:
    """Learn a permutation of B by gradient descent on the loss of the midpoint `(A + pi(B)) / 2`.

    Latent weights start at A. In each step, pi is the projection of the latent weights onto the permutations of B (weight
    matching, from the last pi); the gradient of the midpoint's loss passes straight through to the latent weights, as if
    they were pi(B). What counts is the loss over all the data, measured after each epoch; the best pi is returned. The
    first one measured is the start, so the result is never worse than it on these data.

    Args:
        spec: the symmetries of the architecture.
        model: the architecture; not touched.
        a, b: modules or state dicts on one device; neither is changed.
        data: labelled: `(inputs, targets)`, an iterable of such batches, or an object with `.train`.
        epochs: passes over the data, at most.
        lr, momentum: of SGD on the latent weights (the authors: 0.01 for 250 epochs of MNIST).
        batch_size: examples in a step, where the data are given whole.
        patience: end after this many epochs without a better permutation.
        start: where to begin (default: weight matching's permutation).
        budget: seconds after which the best so far is returned (default: any).
        loss: of outputs and targets, or an `lmc.Task` (default: cross-entropy).
        seed: decides the order of the data.
        device: where to run (default: where the weights are).
        progress: show a bar when it takes longer than two seconds.

    Returns:
        The permutation. `.objective` is minus the loss at the midpoint; `.info["losses"]` has it for every epoch, from
        the start on. An interrupt ends the search with a warning and returns the best so far.

    Raises:
        MismatchError: `a` and `b` differ in keys, shapes or device.
        SpecError: the spec does not fit them.
        DataError: no labelled data.
        WeightsError: weights that are not finite.

    Example:
        >>> import lmc
        >>> data, model = lmc.data.digits(), lmc.data.checkpoint("digits-mlp64").model()
        >>> spec = lmc.permutation_spec(model, data.test[0][:2])
        >>> b = spec.random(seed=0).apply(model)  # the same network, its units in another order
        >>> pi = lmc.straight_through_matching(spec, model, model, b, data, epochs=1)
        >>> lmc.weights.distance(model, pi.apply(b))
        0.0
    """
    if epochs < 1 or patience < 1 or batch_size < 2 or lr <= 0:
        raise InputError(f"{epochs=}, {patience=}, {batch_size=}, {lr=}: expected at least 1, 1, 2, and lr above 0")
    clock, interrupted = Budget(budget), False
    a, b = agreeing([a, b], "ab", model=model)
    spec = spec.bind(a)
    chosen = pick_device(device, a)
    a, b = (gauged({name: tensor.to(chosen) for name, tensor in weights.items()}, model) for weights in (a, b))
    task = TaskLoss(model, a, data, loss, batch_size, chosen)
    generator = torch.Generator().manual_seed(seed)

    latent = {name: tensor.clone() for name, tensor in matched(spec, a).items()}
    blocks = build_blocks(spec, latent)
    optimizer = torch.optim.SGD(list(latent.values()), lr=lr, momentum=momentum)
    pi = weight_matching(spec, a, b, progress=False) if start is None else start
    best, losses, stale = pi, [task.mean(lerp(a, pi.apply(b), 0.5))], 0
    try:
        for _ in tqdm(range(epochs), desc="straight-through", disable=not progress):
            for batch in task.epoch(generator):
                _step(task, batch, a, pi.apply(b), latent, optimizer)
                pi = _project(spec, blocks, latent, b, pi)
                if clock.over:
                    break
            losses.append(task.mean(lerp(a, pi.apply(b), 0.5)))
            stale = 0 if losses[-1] < min(losses[:-1]) else stale + 1
            best = pi if stale == 0 else best
            if stale >= patience or clock.over:
                break
    except KeyboardInterrupt:
        interrupted = True
        warn(f"interrupted: the best of {len(losses)} permutations is returned")
    info = {
        "method": "straight_through_matching",
        "seed": seed,
        "losses": losses,
        "interrupted": interrupted,
        "seconds": clock.spent,
    }
    return Permutation(spec, best.indices, -min(losses), info)


def _step(
    task: TaskLoss, batch: Any, a: Weights, moved: Weights, latent: Weights, optimizer: torch.optim.Optimizer
) -> None:
    """One step of the latent weights along the gradient of the midpoint's loss by `pi(B)`."""
    middle = lerp(a, moved, 0.5)
    leaves = {name: middle[name].requires_grad_() for name in latent}
    gradients = torch.autograd.grad(
        task(middle, batch), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    for tensor, gradient in zip(latent.values(), gradients, strict=True):
        gradient = torch.view_as_real(gradient) if gradient.is_complex() else gradient
        tensor.grad = (0.5 * gradient).to(tensor.dtype)
    optimizer.step()


def _project(
    spec: PermutationSpec, blocks: list[UnitBlock], latent: Mapping[str, Tensor], b: Weights, last: Permutation
) -> Permutation:
    """The permutation of B that is closest to the latent weights, looked for from the last one."""
    moving = matched(spec, last.apply(b))
    descent = Descent(spec, blocks, latent, moving, last.indices).run(_SWEEPS)
    return Permutation(spec, spec.identity().indices | descent.pi)
