"""A training run: what it starts from, checked, and what it gives back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmc.core.extras import require
from lmc.errors import DataError, InputError
from lmc.network.batches import as_splits
from lmc.network.copies import fresh_copy
from lmc.weights import ModelOrWeights, Weights, agreeing, as_weights, tied_names

if TYPE_CHECKING:
    import pandas


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


@dataclass(frozen=True)
class History:
    """Mean training loss (nats) and accuracy (0 to 1) of one seed over each finished epoch, while it trained."""

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True, repr=False, eq=False)
class Trained(Sequence[Weights]):
    """Trained weights, one dict per seed, in the order of `seeds`; `a, b = train(..., seeds=(0, 1))` unpacks them.

    `trajectory[i]` maps an epoch (0: before the first step) to the weights of seed `seeds[i]` after it, for the
    epochs asked for by `keep`; `steps[i]` holds the weights before the first step and after each, where they were recorded.
    When `interrupted`, the weights are those of the last step, seeds that had not
    begun are missing, and histories hold the finished epochs. `start` is the number of epochs that had gone before.
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
    steps: tuple[Sequence[Weights], ...] = ()
    start: int = 0

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
                last = f"train loss {history.loss[-1]:.4f}, accuracy {history.accuracy[-1]:.4f}"
                lines.append(f"  seed {seed}: {last}")
        if self.interrupted:
            lines.append("  interrupted: the weights are those of the last step")
        return "\n".join(lines)


def initialised(model: nn.Module, seed: int) -> Weights:
    """Parameters and buffers of a fresh initialisation of `model`, the same on every device.

    Draws on the CPU in a forked random state: `reset_parameters` of each layer, inner layers before outer ones.
    Raises `InputError` naming a layer that has parameters of its own and no `reset_parameters`.
    """
    device = device_of(model)
    fresh = fresh_copy(model).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, layer in reversed(list(fresh.named_modules())):  # a layer comes after everything within it
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if reset is not None:
                reset()
            elif next(layer.parameters(recurse=False), None) is not None:
                raise InputError(
                    f"layer {name or 'model'} ({type(layer).__name__}) has parameters and no reset_parameters method: "
                    "add one that initialises them, or pass init= weights to start from"
                )
    return own_tensors(fresh.to(device))


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
    first = next(model.parameters(), None)
    if first is None:
        raise InputError(f"model ({type(model).__name__}) has no parameters: nothing to train")
    return first.device


def training_tensors(data: object, device: torch.device) -> tuple[Tensor, Tensor]:
    """All inputs and targets of the (training) split on `device`; `DataError` for what cannot be trained on."""
    split = as_splits(data)[0]
    parts, goals = zip(*split.batches, strict=True)
    if other := next((type(part).__name__ for part in parts if not isinstance(part, Tensor)), None):
        raise DataError(f"{split.name}: inputs are a {other}; training takes a single tensor")
    inputs, targets = (pieces[0] if split.whole else torch.cat(pieces) for pieces in (parts, goals))
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise DataError(f"{split.name}: targets are {targets.dtype}; expected class numbers of an integer type")
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        first = tuple(int(i) for i in (~torch.isfinite(inputs)).nonzero()[0])
        raise DataError(f"{split.name}: inputs hold NaN or infinity, first at {first}")
    return inputs.to(device), targets.to(device).long()


def check_model(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Raise `InputError` unless `model` answers `inputs` with logits that fit `targets`."""
    was_training = model.training
    try:
        with torch.no_grad():
            output = model.eval()(inputs[:2])
    except Exception as error:
        shape, dtype = tuple(inputs.shape), inputs.dtype
        raise InputError(f"model ({type(model).__name__}) fails on inputs {shape} {dtype}: {error}") from error
    finally:
        model.train(was_training)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != targets[:2].shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"model ({type(model).__name__}) gives {found} for 2 inputs; expected logits "
            f"{(*targets[:2].shape, 'classes')} to go with targets {tuple(targets.shape)}"
        )
    lowest, highest = int(targets.min()), int(targets.max())
    if lowest < 0 or highest >= logits.shape[-1]:
        raise InputError(f"targets go from {lowest} to {highest}, the model has {logits.shape[-1]} classes")


def epochs_to_keep(keep: int | Iterable[int] | None, epochs: int) -> set[int]:
    """The epochs whose weights are kept: every `keep`-th and both ends, the listed ones, or none."""
    if keep is None:
        return set()
    if isinstance(keep, int):
        if keep < 1:
            raise InputError(f"keep={keep}: expected a positive number of epochs, or the epochs themselves")
        return {*range(0, epochs + 1, keep), epochs}
    chosen = set(keep)
    outside = sorted(epoch for epoch in chosen if not isinstance(epoch, int) or not 0 <= epoch <= epochs)
    if outside:
        raise InputError(f"keep: {outside} outside 0 to {epochs} epochs")
    return chosen
