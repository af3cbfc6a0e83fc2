"""`train`: many seeds of one architecture, each with its own initialisation and its own order of the data.

The seeds' weights are stacked along a new first axis and the loss and its gradient are vectorised over that axis. Doing
so through autograd and `vmap` in each step again costs more than the arithmetic of a small network, so the operations are
recorded once and replayed: the same kernels, without the dispatch.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from lmc.core.context import own_context, warn
from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.network.copies import fresh_copy
from lmc.network.network import pick_device
from lmc.training.run import (
    History,
    Recipe,
    Trained,
    aliases,
    check_model,
    device_of,
    epochs_to_keep,
    given,
    initialised,
    training_tensors,
)
from lmc.weights import ModelOrWeights, StateDict, Weights

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

    # Recording runs the step once, so buffers are cloned to keep it from counting. What was recorded is run once too: not
    # every recording can be (of recurrent layers in two directions some cannot).
    scratch = {name: tensor.clone() for name, tensor in fixed.items()}
    step = _without_idle_views(make_fx(gradients)(parameters, scratch, inputs, targets)).forward
    with torch.no_grad():
        step(parameters, scratch, inputs, targets)
    return step


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


OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("cosine", "constant")
ORDER_STREAM = 1 << 40  # added to a seed, so that the order of the data does not repeat the draws of the init


@own_context
def train(
    model: nn.Module,
    data: object,
    *,
    seeds: Iterable[int] = range(8),
    epochs: int = 20,
    optimizer: str = "adam",
    lr: float = 3e-3,
    schedule: str = "cosine",
    batch_size: int = 64,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    init: ModelOrWeights | None = None,
    keep: int | Iterable[int] | None = None,
    record: bool = False,
    start: int = 0,
    together: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Trained:
    """Train `model`'s architecture once for each of `seeds` by cross-entropy; `model` itself is not touched.

    A seed decides the initial weights (each layer's `reset_parameters`) and the order of the data, and gives
    the same weights, to rounding, whichever other seeds are trained beside it. All seeds advance together, as
    one vectorised step over stacked weights, at most `together` at a time (default: all); batch normalisation
    keeps statistics per seed. A model that cannot be vectorised, for example because of dropout, is trained
    one seed after the other. No global random state is read or changed.

    Interrupting (Ctrl-C, or the notebook's stop button) ends training with a warning and returns what there is,
    with `interrupted=True`.

    Args:
        data: a data set with `.train`, a pair `(inputs, targets)`, or an iterable of such batches. Inputs are
            `(N, ...)`, targets class numbers `(N,)`, or `(N, T)` for logits `(N, T, classes)`. An epoch visits each
            sample once, less the incomplete last batch.
        optimizer: "adam", "adamw" (decoupled weight decay) or "sgd" (with `momentum`).
        schedule: "cosine" from `lr` down to 0 over all steps, or "constant".
        init: weights that every seed starts from, so that only the order of the data differs.
        keep: keep the weights along the way: a number of epochs between them, or the epochs themselves (0: before
            the first step); found in `trajectory`.
        record: keep the weights before the first step and after every one, in `steps`: what `lmc.landscape.telescope` takes.
            Every step holds a copy of all weights.
        start: epochs that `init` has behind it, so that the schedule goes on from there and `epochs` counts from the beginning:
            a branch of a run, see `branches`. The optimiser starts afresh.
        device: where to train (default: where `model` is); the weights stay there.

    Raises:
        InputError: arguments outside their range, a layer that cannot initialise itself, or logits that do not fit the
            targets.
        DataError: unusable data.
    """
    began = time.perf_counter()
    recipe = Recipe(
        optimizer, lr, schedule, epochs, batch_size, weight_decay, momentum, "fresh" if init is None else "given"
    )
    seeds = _checked(recipe, seeds, together)
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected an nn.Module, got {type(model).__name__}")
    device = pick_device(device_of(model) if device is None else device, {})
    inputs, targets = training_tensors(data, device)
    blank = fresh_copy(model).to(device).train()
    check_model(blank, inputs, targets)
    kept = epochs_to_keep(keep, epochs)
    if not 0 <= start < epochs or (start and init is None):
        raise InputError(
            f"start={start}: expected a number of epochs below epochs={epochs}, with init= weights to go on from"
        )
    runs: list[_Run] = []
    interrupted = False
    with tqdm(total=(epochs - start) * len(seeds), desc="training", unit="epoch", disable=not progress) as bar:
        waiting = list(seeds)
        size = together or len(waiting)
        try:
            while waiting:
                run = _Run.start(blank, waiting[:size], recipe, init, inputs, targets)
                if not run.vectorised and size > 1:  # alone, so that random draws do not depend on the company
                    size = 1
                    continue
                waiting = waiting[size:]
                runs.append(run)
                _finish(run, recipe, inputs, targets, kept, bar, start, record)
        except KeyboardInterrupt:
            if not runs:
                raise
            interrupted = True
    return _collect(runs, model, data, recipe, time.perf_counter() - began, interrupted, start)


@dataclass
class _Run:
    """Some seeds on their way: stacked weights, their optimiser, and what they went through so far."""

    model: nn.Module
    seeds: list[int]
    parameters: Stack
    fixed: Stack
    step: Step
    vectorised: bool
    orders: list[torch.Generator]
    history: list[tuple[list[float], list[float]]] = field(default_factory=list)  # of each epoch, loss and accuracy
    snapshots: dict[int, list[Weights]] = field(default_factory=dict)
    steps: list[list[Weights]] = field(default_factory=list)

    @classmethod
    def start(cls, blank: nn.Module, seeds: list[int], recipe: Recipe, init, inputs: Tensor, targets: Tensor) -> "_Run":
        states = [initialised(blank, seed) if init is None else given(blank, init) for seed in seeds]
        trained = [name for name, p in blank.named_parameters() if p.requires_grad]
        stack = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        parameters = {name: stack.pop(name) for name in trained}
        batch = min(recipe.batch_size, len(inputs))
        example = torch.arange(batch, device=inputs.device).expand(len(seeds), -1)
        try:
            step, vectorised = record(blank, parameters, stack, inputs[example], targets[example]), True
        except Exception:  # whatever stops vectorising; an error of the model itself shows again one by one
            step, vectorised = one_by_one(blank), False
        orders = [torch.Generator().manual_seed(seed + ORDER_STREAM) for seed in seeds]
        return cls(blank, seeds, parameters, stack, step, vectorised, orders)

    def weights(self) -> list[Weights]:
        """Full state dicts, tied tensors under each of their names."""
        stack = self.parameters | self.fixed
        alias = aliases(self.model)
        names = [(name, alias.get(name, name)) for name in self.model.state_dict()]
        return [StateDict((name, stack[source][i].clone()) for name, source in names) for i in range(len(self.seeds))]


def _finish(
    run: _Run, recipe: Recipe, inputs: Tensor, targets: Tensor, kept: set[int], bar: tqdm, start: int, recorded: bool
) -> None:
    """Train a run to its end; when interrupted, the run holds what was reached."""
    optimizer = _optimizer(recipe, run.parameters)
    batch = min(recipe.batch_size, len(inputs))
    steps = len(inputs) // batch
    with _own_randomness(run.seeds[0], inputs.device), torch.no_grad():
        if start in kept:
            run.snapshots[start] = run.weights()
        if recorded:
            run.steps.append(run.weights())
        for epoch in range(start, recipe.epochs):
            order = torch.stack([torch.randperm(len(inputs), generator=g) for g in run.orders]).to(inputs.device)
            totals = torch.zeros(2, len(run.seeds), device=inputs.device)
            for i in range(steps):
                optimizer.param_groups[0]["lr"] = _rate(recipe, epoch * steps + i, recipe.epochs * steps)
                chosen = order[:, i * batch : (i + 1) * batch]
                gradients, scores = run.step(run.parameters, run.fixed, inputs[chosen], targets[chosen])
                for name, parameter in run.parameters.items():
                    # fused optimisers walk through memory, so parameter and gradient must be laid out alike
                    parameter.grad = gradients[name].contiguous()
                optimizer.step()
                totals += torch.stack(scores)
                if recorded:
                    run.steps.append(run.weights())
            loss, accuracy = (totals / steps).cpu()
            run.history.append((loss.tolist(), accuracy.tolist()))
            if epoch + 1 in kept:
                run.snapshots[epoch + 1] = run.weights()
            bar.update(len(run.seeds))


def _collect(
    runs: list[_Run], model: nn.Module, data: object, recipe: Recipe, seconds: float, interrupted: bool, start: int
) -> Trained:
    seeds, weights, history, trajectory, steps = [], [], [], [], []
    for run in runs:
        for i, (seed, state) in enumerate(zip(run.seeds, run.weights(), strict=True)):
            losses = tuple(loss[i] for loss, _ in run.history)
            seeds.append(seed)
            weights.append(state)
            history.append(History(losses, tuple(accuracy[i] for _, accuracy in run.history)))
            trajectory.append({epoch: states[i] for epoch, states in run.snapshots.items()})
            if run.steps:
                steps.append([states[i] for states in run.steps])
            if losses and not math.isfinite(losses[-1]):
                warn(f"seed {seed} diverged: its loss is {losses[-1]}; try a smaller lr")
    if interrupted:
        done = start + max(len(run.history) for run in runs)
        warn(f"training interrupted after {done} of {recipe.epochs} epochs")
    name = str(getattr(data, "name", "data"))
    groups = (tuple(seeds), tuple(weights), tuple(history), tuple(trajectory))
    return Trained(type(model).__name__, name, *groups, recipe, seconds, interrupted, tuple(steps), start)


def _optimizer(recipe: Recipe, parameters: Stack) -> torch.optim.Optimizer:
    tensors: Sequence[Tensor] = list(parameters.values())
    fused = all(p.device.type in ("cpu", "cuda") for p in tensors)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            tensors, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=fused
        )
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(tensors, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)


def _rate(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate of a step; the cosine goes from `lr` to 0 (Loshchilov and Hutter 2016, eq. 5, no restarts)."""
    if recipe.schedule == "constant":
        return recipe.lr
    return 0.5 * recipe.lr * (1 + math.cos(math.pi * step / steps))


@contextlib.contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """A random state of our own for layers that draw (dropout); the caller's is put back."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _checked(recipe: Recipe, seeds: Iterable[int], together: int | None) -> list[int]:
    if not isinstance(seeds, Iterable):
        raise InputError(f"seeds={seeds!r}: expected the seeds themselves, for example range({seeds!r})")
    chosen = list(seeds)
    if not chosen or not all(isinstance(seed, int) and 0 <= seed < ORDER_STREAM for seed in chosen):
        raise InputError(f"seeds={chosen}: expected at least one, each an integer from 0 on")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"seeds={chosen}: the same seed twice gives the same weights twice")
    for argument, options in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if getattr(recipe, argument) not in options:
            raise InputError(f"{argument}={getattr(recipe, argument)!r}: expected one of {', '.join(options)}")
    for argument, value in (("epochs", recipe.epochs), ("batch_size", recipe.batch_size), ("together", together)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{argument}={value!r}: expected a positive integer")
    for argument in ("lr", "weight_decay", "momentum"):
        value = getattr(recipe, argument)
        if not math.isfinite(value) or value < 0:
            raise InputError(f"{argument}={value!r}: expected a finite number, zero or more")
    return chosen
