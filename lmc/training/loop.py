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
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from lmc.core.context import forked, own_context, warn
from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.network.batches import Batch, Split, take
from lmc.network.copies import fresh_copy
from lmc.network.inputs import arguments
from lmc.network.network import pick_device
from lmc.network.task import Loss, Outputs, Task
from lmc.training.run import (
    ORDER_STREAM,
    History,
    Judge,
    Recipe,
    Steps,
    Trained,
    aliases,
    at_least_one,
    batches_of,
    check_model,
    device_of,
    epochs_to_keep,
    examples,
    given,
    initialised,
    steps_of,
    trained_names,
)
from lmc.weights import ModelOrWeights, StateDict, Weights
from lmc.weights.state import least_divisor

Stack: TypeAlias = dict[str, Tensor]  # name -> (seeds, *shape)
# parameters, fixed tensors, inputs and targets, all stacked (seeds, ...) if the step is vectorised, else of one seed
#   -> gradients of the parameters (seeds, *shape), (loss (seeds,), accuracy (seeds,))
Step: TypeAlias = Callable[[Stack, Stack, Any, Tensor], tuple[Stack, tuple[Tensor, Tensor]]]


def record(model: nn.Module, judge: Judge, parameters: Stack, fixed: Stack, inputs: Any, targets: Tensor) -> Step:
    """The step over all stacked seeds, recorded on one batch of the shapes that every later batch has.

    Batch statistics and the updates of running ones are per seed, since the buffers are stacked too. Raises
    whatever `vmap` or the recorder raises for a model they cannot take (one that draws random numbers, or whose
    control flow depends on data): use `one_by_one` then.
    """

    def objective(p: Stack, f: Stack, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        args, kwargs = arguments(model, judge.task.call(x, y))
        return judge(functional_call(model, (p, f), args, kwargs), y, x)

    def gradients(p: Stack, f: Stack, x: Any, y: Tensor) -> tuple[Stack, tuple[Tensor, Tensor]]:
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


def one_by_one(model: nn.Module, judge: Judge) -> Step:
    """The same step for one seed, for models and batches that cannot be vectorised."""

    def step(parameters: Stack, fixed: Stack, inputs: Any, targets: Tensor):
        leaves = {name: tensor[0].detach().requires_grad_() for name, tensor in parameters.items()}
        views = {name: tensor[0] for name, tensor in fixed.items()}  # updates in place reach the stack
        args, kwargs = arguments(model, judge.task.call(inputs, targets))
        with torch.enable_grad():
            loss, accuracy = judge(functional_call(model, (leaves, views), args, kwargs), targets, inputs)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        stacked = {name: gradient[None] for name, gradient in zip(parameters, found, strict=True)}
        return stacked, (loss.detach()[None], accuracy[None])

    return step


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
    loss: Loss | Task | None = None,
    outputs: Outputs = None,
    init: ModelOrWeights | None = None,
    keep: int | Iterable[int] | None = None,
    record: bool = False,
    start: int = 0,
    together: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Trained:
    """Train `model`'s architecture once for each of `seeds`, by cross-entropy or another loss; `model` itself is not touched.

    A seed decides the initial weights (each layer's `reset_parameters`) and the order of the data, and gives
    the same weights, to rounding, whichever other seeds are trained beside it. All seeds advance together, as
    one vectorised step over stacked weights, at most `together` at a time (default: all); batch normalisation
    keeps statistics per seed. A model that cannot be vectorised, for example because of dropout, is trained
    one seed after the other. No global random state is read or changed.

    Interrupting (Ctrl-C, or the notebook's stop button) ends training with a warning and returns what there is,
    with `interrupted=True`.

    Args:
        data: as for `lmc.landscape.evaluate`, of several splits the first, which is the training split; with a task as
            `task.on(data)`. An epoch visits each example once, less the incomplete last batch. Batches of an iterable are put
            together and cut anew by `batch_size`; those that cannot be (graphs, sequences padded to different lengths) are
            a step each, in random order, and those of a loader of more than 1 GiB come as it gives them, read again in each
            epoch.
        optimizer: "adam", "adamw" (decoupled weight decay) or "sgd" (with `momentum`).
        schedule: "cosine" from `lr` down to 0 over all steps, or "constant".
        loss, outputs: as for `lmc.loss_path`; batches with "labels" that the module's forward asks for are trained by its own
            loss. Of batches that are a step each, one in which no target counts changes nothing but momentum.
        init: weights that every seed starts from, so that only the order of the data differs.
        keep: keep the weights along the way: a number of epochs between them, or the epochs themselves (0: before
            the first step); found in `trajectory`.
        record: keep the weights before the first step and after every one, in `steps`: what `lmc.landscape.telescope` takes.
            Every step holds a copy of all weights.
        start: epochs that `init` has behind it, so that the schedule goes on from there and `epochs` counts from the beginning:
            a branch of a run, see `branches`. The optimiser starts afresh.
        device: where to train (default: where `model` is); the weights stay there.

    Raises:
        InputError: arguments outside their range, a layer that cannot initialise itself, or inputs that the model does not
            take.
        DataError: unusable data, or targets that do not fit the outputs.
    """
    began = time.perf_counter()
    recipe = Recipe(
        optimizer, lr, schedule, epochs, batch_size, weight_decay, momentum, "fresh" if init is None else "given"
    )
    seeds = recipe.checked(seeds)
    if together is not None:
        at_least_one("together", together)
    home = device_of(model)
    device = pick_device(home if device is None else device, {})
    task = Task.of(data, loss, outputs=outputs)
    split = examples(data, task, device)
    task = task.fitted(model, split)
    blank = fresh_copy(model).to(device).train()
    check_model(blank, task, split, device)
    kept = epochs_to_keep(keep, epochs)
    if not 0 <= start < epochs or (start and init is None):
        raise InputError(
            f"start={start}: expected a number of epochs below epochs={epochs}, with init= weights to go on from"
        )
    runs: list[_Run] = []
    interrupted = False
    with tqdm(total=(epochs - start) * len(seeds), desc="training", unit="epoch", disable=not progress) as bar:
        waiting, vectorise = list(seeds), split.whole
        size = (together or len(waiting)) if vectorise else 1
        try:
            while waiting:
                run = _Run.start(blank, waiting[:size], recipe, init, task, split, device, vectorise)
                if not run.vectorised and vectorise:  # alone, so that random draws do not depend on the company
                    size, vectorise = 1, False
                    if len(run.seeds) > 1:
                        continue
                waiting = waiting[size:]
                runs.append(run)
                _finish(run, recipe, kept, bar, start, record)
        except KeyboardInterrupt:
            if not runs:
                raise
            interrupted = True
    return _collect(runs, model, data, recipe, time.perf_counter() - began, interrupted, start, task.unit)


@dataclass
class _Run:
    """Some seeds on their way: stacked weights, their optimiser, and what they went through so far."""

    model: nn.Module
    judge: Judge
    split: Split
    device: torch.device
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
    def start(
        cls, blank: nn.Module, seeds: list[int], recipe: Recipe, init: ModelOrWeights | None, task: Task, split: Split,
        device: torch.device, vectorise: bool,
    ) -> "_Run":  # fmt: skip
        states = [initialised(blank, seed) if init is None else given(blank, init) for seed in seeds]
        trained = trained_names(blank)
        stack = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        parameters = {name: stack.pop(name) for name in trained}
        judge = Judge.of(task, split)
        step, vectorised = one_by_one(blank, judge), False
        if vectorise:
            inputs, targets = next(iter(split.batches))
            example = torch.arange(min(recipe.batch_size, len(targets)), device=device).expand(len(seeds), -1)
            # Whatever stops vectorising; an error of the model itself shows again one by one.
            with contextlib.suppress(Exception):
                step, vectorised = (
                    record(blank, judge, parameters, stack, take(inputs, example), targets[example]),
                    True,
                )
        orders = [torch.Generator().manual_seed(seed + ORDER_STREAM) for seed in seeds]
        return cls(blank, judge, split, device, seeds, parameters, stack, step, vectorised, orders)

    def epoch(self, batch_size: int) -> Iterator[Batch]:
        """The batches of one epoch, each seed's in its own order: stacked (seeds, batch, ...) if the step is vectorised."""
        if not self.vectorised:
            yield from batches_of(self.split, self.device, batch_size, self.orders[0])
            return
        inputs, targets = next(iter(self.split.batches))
        order = torch.stack([torch.randperm(len(targets), generator=g) for g in self.orders]).to(self.device)
        for i in range(steps_of(self.split, batch_size)):
            chosen = order[:, i * batch_size : (i + 1) * batch_size]
            yield take(inputs, chosen), targets[chosen]

    def counts(self, targets: Tensor) -> Tensor:
        """By how much a batch counts in the means of an epoch, for each seed."""
        task = self.judge.task
        parts = targets if self.vectorised else targets[None]
        return torch.tensor([float(self.judge.all_count or task.counted(part)) for part in parts], device=self.device)

    def weights(self) -> list[Weights]:
        """Full state dicts, tied tensors under each of their names."""
        stack = self.parameters | self.fixed
        alias = aliases(self.model)
        names = [(name, alias.get(name, name)) for name in self.model.state_dict()]
        return [StateDict((name, stack[source][i].clone()) for name, source in names) for i in range(len(self.seeds))]


def _finish(run: _Run, recipe: Recipe, kept: set[int], bar: tqdm, start: int, recorded: bool) -> None:
    """Train a run to its end; when interrupted, the run holds what was reached."""
    optimizer = _optimizer(recipe, run.parameters)
    steps = steps_of(run.split, recipe.batch_size)
    with forked(run.device, run.seeds[0]), torch.no_grad():
        if start in kept:
            run.snapshots[start] = run.weights()
        if recorded:
            run.steps.append(run.weights())
        for epoch in range(start, recipe.epochs):
            totals, weights = torch.zeros(2, len(run.seeds), device=run.device), 0.0
            for i, (inputs, targets) in enumerate(run.epoch(recipe.batch_size)):
                optimizer.param_groups[0]["lr"] = _rate(recipe, epoch * steps + i, recipe.epochs * steps)
                gradients, scores = run.step(run.parameters, run.fixed, inputs, targets)
                found, counts = torch.stack(scores), 1.0
                if not run.judge.all_count:
                    counts = run.counts(targets)
                    empty = counts == 0  # a mean over nothing, which is no number
                    found = found.masked_fill(empty, 0)
                    if bool(empty.any()):
                        at = empty.nonzero()[:, 0]
                        gradients = {name: gradient.index_fill(0, at, 0) for name, gradient in gradients.items()}
                for name, parameter in run.parameters.items():
                    # fused optimisers walk through memory, so parameter and gradient must be laid out alike
                    parameter.grad = gradients[name].contiguous()
                optimizer.step()
                totals += counts * found
                weights = weights + counts
                if recorded:
                    run.steps.append(run.weights())
            loss, accuracy = (totals / weights).cpu()
            run.history.append((loss.tolist(), accuracy.tolist()))
            if epoch + 1 in kept:
                run.snapshots[epoch + 1] = run.weights()
            bar.update(len(run.seeds))


def _collect(
    runs: list[_Run],
    model: nn.Module,
    data: object,
    recipe: Recipe,
    seconds: float,
    interrupted: bool,
    start: int,
    unit: str,
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
    return Trained(type(model).__name__, name, *groups, recipe, seconds, interrupted, Steps(steps), start, unit)


def _optimizer(recipe: Recipe, parameters: Stack) -> torch.optim.Optimizer:
    tensors: Sequence[Tensor] = list(parameters.values())
    fused = all(p.device.type in ("cpu", "cuda") for p in tensors)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            tensors, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=fused
        )
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(tensors, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused, eps=least_divisor(tensors))


def _rate(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate of a step; the cosine goes from `lr` to 0 (Loshchilov and Hutter 2016, eq. 5, no restarts)."""
    if recipe.schedule == "constant":
        return recipe.lr
    return 0.5 * recipe.lr * (1 + math.cos(math.pi * step / steps))
