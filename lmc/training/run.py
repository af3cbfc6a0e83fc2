"""A training run: what it starts from, checked, and what it gives back."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lmc.core.context import forked
from lmc.core.extras import require
from lmc.errors import InputError
from lmc.network.batches import Batch, Split, as_splits, check_numbers, cuttable, head, take, tensors, to_device
from lmc.network.copies import fresh_copy
from lmc.network.inputs import arguments
from lmc.network.task import Task, measured
from lmc.weights import ModelOrWeights, Weights, agreeing, as_weights, tied_names

if TYPE_CHECKING:
    import pandas


OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("cosine", "constant")
ORDER_STREAM = 1 << 40  # added to a seed, so that the order of the data does not repeat the draws of the init


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides the architecture, the data and the seed."""

    optimizer: str
    lr: float
    schedule: str
    epochs: int
    batch_size: int
    weight_decay: float
    momentum: float
    init: str  # "fresh": drawn from the seed; "given": the weights passed to `train`

    def __str__(self) -> str:
        text = f"{self.optimizer} {self.lr:g}"
        if self.optimizer == "sgd" and self.momentum:
            text += f" momentum {self.momentum:g}"
        if self.weight_decay:
            text += f" weight decay {self.weight_decay:g}"
        return f"{text}, {self.schedule}, {self.epochs} epochs of batches of {self.batch_size}"

    def checked(self, seeds: Iterable[int]) -> list[int]:
        """The seeds as a list; raises `InputError` for those and for anything here that nothing can be trained by."""
        chosen = whole_numbers("seeds", seeds, ORDER_STREAM)
        if len(set(chosen)) < len(chosen):
            raise InputError(f"seeds={chosen}: the same seed twice gives the same weights twice")
        for argument, options in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, argument) not in options:
                raise InputError(f"{argument}={getattr(self, argument)!r}: expected one of {', '.join(options)}")
        at_least_one("epochs", self.epochs)
        at_least_one("batch_size", self.batch_size)
        for argument in ("lr", "weight_decay", "momentum"):
            value = getattr(self, argument)
            if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
                raise InputError(f"{argument}={value!r}: expected a finite number, zero or more")
        return chosen


def at_least_one(name: str, value: Any) -> None:
    """Raise `InputError` unless an argument is a positive whole number."""
    if not is_whole(value) or value < 1:
        raise InputError(f"{name}={value!r}: expected a positive integer")


def whole_numbers(name: str, values: Iterable[int], below: int | None = None) -> list[int]:
    """The whole numbers of an argument, from 0 on, of which there must be one; or `InputError`."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"{name}={values!r}: expected the numbers themselves, for example range({values!r}) or [{values!r}]")
    found = list(values)
    if not found or not all(is_whole(value) and 0 <= value < (below or math.inf) for value in found):
        most = "on" if below is None else f"to {below - 1}"
        raise InputError(f"{name}={found}: expected at least one, each an integer from 0 {most}")
    return [int(value) for value in found]


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, Python's or numpy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class History:
    """Mean training loss and accuracy (0 to 1; NaN where the task has none) of one seed over each finished epoch, while it
    trained."""

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]


class Steps(tuple[Sequence[Weights], ...]):
    """The recorded steps of each seed; of a run that recorded none, whoever asks for one is told how they are had."""

    def __getitem__(self, index):
        if not self:
            raise InputError("steps: this run recorded none; train(..., record=True) keeps the weights of every step")
        return super().__getitem__(index)


@dataclass(frozen=True, repr=False, eq=False)
class Trained(Sequence[Weights]):
    """Trained weights, one dict per seed, in the order of `seeds`; `a, b = train(..., seeds=(0, 1))` unpacks them.

    `trajectory[i]` maps an epoch (0: before the first step) to the weights of seed `seeds[i]` after it, for the
    epochs asked for by `keep`; `steps[i]` holds the weights before the first step and after each, where they were recorded.
    When `interrupted`, the weights are those of the last step, seeds that had not
    begun are missing, and histories hold the finished epochs. `start` is the number of epochs that had gone before, `unit`
    that of the losses.
    """

    model: str
    data: str
    seeds: tuple[int, ...]
    weights: tuple[Weights, ...]
    history: tuple[History, ...]
    trajectory: tuple[Mapping[int, Weights], ...]
    recipe: Recipe
    seconds: float
    interrupted: bool = False
    steps: Steps = Steps()
    start: int = 0
    unit: str = "nats"

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index):
        return self.weights[index]

    def to_frame(self) -> "pandas.DataFrame":
        """The histories as a data frame: one row per seed and epoch, columns seed, epoch, loss, accuracy."""
        pandas = require("pandas")

        rows = [
            (seed, epoch, loss, accuracy)
            for seed, history in zip(self.seeds, self.history, strict=True)
            for epoch, (loss, accuracy) in enumerate(zip(history.loss, history.accuracy, strict=True), self.start + 1)
        ]
        return pandas.DataFrame(rows, columns=["seed", "epoch", "loss", "accuracy"])

    def __repr__(self) -> str:
        seeds = "1 seed" if len(self) == 1 else f"{len(self)} seeds"
        lines = [f"Trained({self.model} on {self.data}, {seeds}, {self.recipe}; {self.seconds:.1f} s)"]
        for seed, history in zip(self.seeds, self.history, strict=True):
            if history.loss:
                last, right = f"train loss {history.loss[-1]:.4f}", history.accuracy[-1]
                lines.append(f"  seed {seed}: {last}" + ("" if math.isnan(right) else f", accuracy {right:.4f}"))
        if self.interrupted:
            lines.append("  interrupted: the weights are those of the last step")
        return "\n".join(lines)


def initialised(model: nn.Module, seed: int) -> Weights:
    """Parameters and buffers of a fresh initialisation of `model`, the same on every device.

    Draws on the CPU in a forked random state: `reset_parameters` of each layer, inner layers before outer ones, and what
    `_init_weights(layer)` of an outer module does, by which Hugging Face's models initialise theirs.
    Raises `InputError` naming a layer that has parameters of its own which nothing initialises.
    """
    device = device_of(model)
    fresh = fresh_copy(model).cpu()
    rules = [(outer, rule) for outer in fresh.modules() if callable(rule := getattr(outer, "_init_weights", None))]
    with forked(torch.device("cpu"), seed):
        for name, layer in reversed(list(fresh.named_modules())):  # a layer comes after everything within it
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if reset is not None:
                reset()
            missing = set() if reset else {n for n, _ in layer.named_parameters(recurse=False)}
            for outer, rule in rules:
                if layer in outer.modules():
                    missing -= _given_values(layer, rule)
            if missing:
                raise InputError(
                    f"layer {name or 'model'} ({type(layer).__name__}) has parameters and no reset_parameters method: "
                    "add one that initialises them, or pass init= weights to start from"
                )
    return own_tensors(fresh.to(device))


def _given_values(layer: nn.Module, rule: Callable[[nn.Module], Any]) -> set[str]:
    """The layer's own parameters that a rule gives new values; the others are left as they are."""
    own = dict(layer.named_parameters(recurse=False))
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    for parameter in own.values():
        parameter.data.fill_(math.nan)
    rule(layer)
    untouched = {name for name, parameter in own.items() if bool(parameter.isnan().any())}
    for name in untouched:
        own[name].data.copy_(before[name])
    return own.keys() - untouched


def given(model: nn.Module, init: ModelOrWeights) -> Weights:
    start = fresh_copy(model)
    state = {name: tensor.to(device_of(model)) for name, tensor in as_weights(init).items()}
    state = agreeing([model, state], ["model", "init"], model=model)[1]
    start.load_state_dict(state)
    return own_tensors(start)


def own_tensors(model: nn.Module) -> Weights:
    """Every parameter and buffer once, persistent or not."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def aliases(model: nn.Module) -> dict[str, str]:
    """Further names of tied tensors -> the name they are trained under."""
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return tied_names(dict(every))


def device_of(model: nn.Module) -> torch.device:
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected an nn.Module, got {type(model).__name__}")
    first = next(model.parameters(), None)
    if first is None:
        raise InputError(f"model ({type(model).__name__}) has no parameters: nothing to train")
    return first.device


def trained_names(model: nn.Module) -> list[str]:
    """The parameters that are trained: those that require gradients, of which there must be one."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise InputError(
            f"model ({type(model).__name__}): no parameter requires a gradient, so that nothing can be trained"
        )
    return names


def examples(data: object, task: Task, device: torch.device, which: int = 0) -> Split:
    """A split (default: for training), on `device` where it is held: in one piece where its batches can be put together.

    Raises:
        DataError: data that cannot be trained on.
    """
    split = as_splits(data, task.targets)[which]
    if not split.held:
        return split
    batches = []
    for inputs, targets in split.batches:
        check_numbers(inputs, split.name)
        batches.append((to_device(inputs, device), _counted(targets.to(device))))
    whole = batches[0] if split.whole else _together(batches)
    return replace(split, batches=batches if whole is None else [whole], whole=whole is not None)


def batches_of(
    split: Split, device: torch.device, batch_size: int, order: torch.Generator, *, drop_last: bool = True
) -> Iterator[Batch]:
    """The batches of one epoch in an order that the generator decides, on `device`."""
    for inputs, targets in split.shuffled(batch_size, order, drop_last=drop_last):
        yield (inputs, targets) if split.held else (to_device(inputs, device), _counted(targets.to(device)))


def steps_of(split: Split, batch_size: int) -> int:
    """The number of batches of an epoch."""
    if split.whole:
        count = len(next(iter(split.batches))[1])
        return count // min(batch_size, count)
    return sum(1 for _ in split.batches)


def _counted(targets: Tensor) -> Tensor:
    """Class numbers as torch's losses take them, other targets as they are."""
    plain = targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
    return targets if plain else targets.long()


def _together(batches: Sequence[Batch]) -> Batch | None:
    """All batches as one, of which any examples may be taken; None where they differ in more than their length."""
    if not all(cuttable(inputs, targets) for inputs, targets in batches):
        return None
    flat = [tree_flatten((take(inputs, slice(None)), targets)) for inputs, targets in batches]
    form, joined = flat[0][1], []
    if any(other != form for _, other in flat):
        return None
    for parts in zip(*(leaves for leaves, _ in flat), strict=True):
        if isinstance(parts[0], Tensor):
            if any(part.shape[1:] != parts[0].shape[1:] or part.dtype != parts[0].dtype for part in parts):
                return None
            joined.append(torch.cat(parts))
        elif any(part != parts[0] for part in parts):
            return None
        else:
            joined.append(parts[0])
    return tree_unflatten(joined, form)


@dataclass(frozen=True)
class Judge:
    """Mean loss of what a module returned for a batch, and accuracy, NaN where the task knows none.

    Attributes:
        all_count: no target is one that the task ignores.
    """

    task: Task
    all_count: bool

    @classmethod
    def of(cls, task: Task, split: Split) -> "Judge":
        return cls(task, split.held and all(task.counted(targets) == targets.numel() for _, targets in split.batches))

    def __call__(self, output: Any, targets: Tensor, inputs: Any) -> tuple[Tensor, Tensor]:
        task = self.task
        judged = task.read(output)
        rows = task.logits(judged, targets)
        if rows is not None and task.loss is None and task.labels is None:
            loss = self._cross_entropy(rows, targets.reshape(-1))
        else:
            loss = task.mean_loss(judged, targets, inputs)
        if rows is not None:
            accuracy = self._mean(rows.detach().argmax(dim=-1) == targets.reshape(-1), targets.reshape(-1))
        elif (measure := task.metrics.get("accuracy")) is not None:
            accuracy = measured(measure, "accuracy", judged, targets, inputs).detach().to(loss.dtype).mean()
        else:
            accuracy = torch.full_like(loss.detach(), math.nan)
        return loss, accuracy.to(loss.dtype)

    def _cross_entropy(self, rows: Tensor, targets: Tensor) -> Tensor:
        # Spelled out: for ten classes torch's log_softmax kernel takes twice as long on a CPU as these operations, and
        # F.cross_entropy records twenty operations more to provide for ignored targets.
        shifted = rows - rows.detach().amax(dim=-1, keepdim=True)
        classes = targets if self.all_count else targets.where(targets != self.task.ignore, 0)
        chosen = shifted.gather(-1, classes.unsqueeze(-1)).squeeze(-1)
        return self._mean(shifted.exp().sum(dim=-1).log() - chosen, targets)

    def _mean(self, values: Tensor, targets: Tensor) -> Tensor:
        """Of the values at targets that count, 0 where none does."""
        values = values.to(torch.get_default_dtype()) if values.dtype == torch.bool else values
        if self.all_count:
            return values.mean()
        counted = targets != self.task.ignore
        return values.where(counted, 0).sum() / counted.sum().clamp(min=1)


def check_model(model: nn.Module, task: Task, split: Split, device: torch.device) -> None:
    """Raise `InputError` unless `model` answers the inputs, and `DataError` unless its outputs fit the targets."""
    inputs, targets = head(next(iter(split.batches)), 2)
    inputs, targets = to_device(inputs, device), targets.to(device)
    given = task.call(inputs, targets)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            args, kwargs = arguments(model, given)
            result = model(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in tensors(inputs))
        raise InputError(f"model ({type(model).__name__}) fails on inputs {shapes}: {error}") from error
    finally:
        model.train(was_training)
    outputs = task.read(result)
    task.check(split, outputs, targets)
    with torch.no_grad():
        task.mean_loss(outputs, targets, inputs)


def epochs_to_keep(keep: int | Iterable[int] | None, epochs: int) -> set[int]:
    """The epochs whose weights are kept: every `keep`-th and both ends, the listed ones, or none."""
    if keep is None:
        return set()
    if isinstance(keep, int):
        if keep < 1:
            raise InputError(f"keep={keep}: expected a positive number of epochs, or the epochs themselves")
        return {*range(0, epochs + 1, keep), epochs}
    chosen = list(keep)
    outside = sorted(epoch for epoch in chosen if not is_whole(epoch) or not 0 <= epoch <= epochs)
    if outside:
        raise InputError(f"keep: {outside} outside 0 to {epochs} epochs")
    return {int(epoch) for epoch in chosen}
