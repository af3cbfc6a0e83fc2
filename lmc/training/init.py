"""Where training starts: fresh weights from a seed, or weights that were given."""

import torch
from torch import nn

from lmc.errors import InputError
from lmc.network.copies import fresh_copy
from lmc.weights import ModelOrWeights, Weights, agreeing, as_weights, tied_names


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
