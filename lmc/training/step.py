"""One gradient step for many seeds of one architecture.

The seeds' weights are stacked along a new first axis and the loss and its gradient are vectorised over that
axis. Doing so through autograd and `vmap` anew in each step costs more than the arithmetic of a small network,
so the operations are recorded once and replayed: the same kernels, without the dispatch.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

Stack: TypeAlias = dict[str, Tensor]  # name -> (seeds, *shape)
# parameters, fixed tensors, inputs (seeds, batch, ...), targets (seeds, batch, ...)
#   -> gradients of the parameters, (loss (seeds,), accuracy (seeds,))
Step: TypeAlias = Callable[[Stack, Stack, Tensor, Tensor], tuple[Stack, tuple[Tensor, Tensor]]]


def loss_and_accuracy(output: object, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (nats) and accuracy of logits `(..., classes)` against class numbers `(...)`."""
    logits: Tensor = getattr(output, "logits", output)  # type: ignore[assignment]
    # Spelled out: for ten classes torch's log_softmax kernel takes twice as long on a CPU as these operations, and
    # F.cross_entropy records twenty operations more to provide for ignored targets.
    shifted = logits - logits.detach().amax(dim=-1, keepdim=True)
    chosen = shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    loss = (shifted.exp().sum(dim=-1).log() - chosen).mean()
    return loss, (logits.detach().argmax(dim=-1) == targets).to(loss.dtype).mean()


def record(model: nn.Module, parameters: Stack, fixed: Stack, inputs: Tensor, targets: Tensor) -> Step:
    """The step over all stacked seeds, recorded on one batch of the shapes that every later batch has.

    Batch statistics and the updates of running ones are per seed, since the buffers are stacked too. Raises
    whatever `vmap` or the recorder raises for a model they cannot take (one that draws random numbers, or whose
    control flow depends on data): use `one_by_one` then.
    """

    def objective(p: Stack, f: Stack, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return loss_and_accuracy(functional_call(model, (p, f), (x,)), y)

    def gradients(p: Stack, f: Stack, x: Tensor, y: Tensor) -> tuple[Stack, tuple[Tensor, Tensor]]:
        return vmap(grad_and_value(objective, has_aux=True), randomness="error")(p, f, x, y)

    # Recording runs the step once, so buffers are cloned to keep it from counting.
    scratch = {name: tensor.clone() for name, tensor in fixed.items()}
    return _without_idle_views(make_fx(gradients)(parameters, scratch, inputs, targets)).forward


def _without_idle_views(recorded: GraphModule) -> GraphModule:
    """The same operations less the reshapes to the shape that a tensor already has (a third of all calls)."""
    reshapes = {torch.ops.aten.expand.default, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}
    for node in recorded.graph.nodes:
        if node.target in reshapes and node.meta["val"].shape == node.args[0].meta["val"].shape:
            node.replace_all_uses_with(node.args[0])
            recorded.graph.erase_node(node)
    recorded.recompile()
    return recorded


def one_by_one(model: nn.Module) -> Step:
    """The same step as a plain loop over the seeds, for models that cannot be vectorised."""

    def step(parameters: Stack, fixed: Stack, inputs: Tensor, targets: Tensor):
        gradients, losses, accuracies = [], [], []
        for seed in range(len(inputs)):
            leaves = {name: tensor[seed].detach().requires_grad_() for name, tensor in parameters.items()}
            views = {name: tensor[seed] for name, tensor in fixed.items()}  # updates in place reach the stack
            with torch.enable_grad():
                output = functional_call(model, (leaves, views), (inputs[seed],))
                loss, accuracy = loss_and_accuracy(output, targets[seed])
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            gradients.append(found)
            losses.append(loss.detach())
            accuracies.append(accuracy)
        stacked = {name: torch.stack([found[i] for found in gradients]) for i, name in enumerate(parameters)}
        return stacked, (torch.stack(losses), torch.stack(accuracies))

    return step
