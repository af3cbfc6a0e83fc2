"""The telescoping lens: what a training run did to the outputs, as a sum of first-order steps; and how fast gradients settle."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.utils import _pytree as pytree

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import DataError, InputError
from lmc.landscape.evaluation.measured import Values
from lmc.network.batches import take, tensors, to_device
from lmc.network.inputs import input_batches, length
from lmc.network.network import Network, attention_written_out, derivatives, pick_device
from lmc.network.task import Outputs, Task
from lmc.weights import ModelOrWeights, Weights, agreeing, as_weights
from lmc.weights.state import tensors_by_module

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Telescope(Result):
    """The outputs of a network over T steps of training, and their first-order account. All in float64.

    Attributes:
        errors: (T + 1,) mean absolute difference between the outputs and the sum of first-order terms up to each step.
        linear: (T + 1,) the same for the linearisation at the start.
        sizes: layer -> (T,) mean absolute change of the outputs that the layer's part of each step makes, to first order.
        moved: layer -> (N, ...) the sum of the layer's terms over all steps.
        start, end: (N, ...) the outputs before the first and after the last step.
    """

    errors: Values
    linear: Values
    sizes: dict[str, Values]
    moved: dict[str, Values]
    start: Values
    end: Values

    @property
    def approximation(self) -> Values:
        """(N, ...) The telescoping model of the last outputs: those at the start, and all terms of all layers."""
        return self.start + sum(self.moved.values())

    def to_frame(self) -> "pd.DataFrame":
        """A row for each step: step, error, linear error, and the size of each layer's term."""
        columns = {"step": np.arange(1, len(self.errors)), "error": self.errors[1:], "linear": self.linear[1:]}
        return require("pandas").DataFrame({**columns, **self.sizes})

    def __str__(self) -> str:
        change = np.abs(self.end - self.start).mean()
        shares = {layer: np.abs(moved).mean() for layer, moved in self.moved.items()}
        most = max(shares, key=lambda layer: shares[layer])
        return (
            f"Telescope over {len(self.errors) - 1} steps and {len(self.start)} examples: outputs change by {change:.3g} on "
            f"average; the sum of first-order steps is off by {self.errors[-1]:.3g}, the linearisation at the start by "
            f"{self.linear[-1]:.3g}; the most is done by {most}"
        )

    __repr__ = __str__


@own_context
def telescope(
    model: nn.Module,
    steps: Iterable[ModelOrWeights],
    inputs: Any,
    *,
    outputs: Outputs = None,
    device: torch.device | str | None = None,
) -> Telescope:
    """Account for what training did to the outputs, step by step and layer by layer.

    `f_T(x) ~ f_0(x) + sum_t grad f_{t-1}(x)' (theta_t - theta_{t-1})` with the steps that were really taken, so that it
    holds for any optimiser (Jeffares, Curth and van der Schaar 2024, arXiv:2411.00247, eq. 5). Each layer's term is a
    forward derivative along its part of the step; they add up. Outputs should be logits: probabilities are never linear.
    Statistics of batch normalisation stay those before the step inside a term, as they move without a gradient; what
    they do to the outputs is part of `errors`.

    Args:
        model: the architecture, run in eval mode.
        steps: the weights before the first and after each step: `Trained.steps[i]` of `lmc.training.train(record=True)`,
            or any iterable; of a generator that trains as it is asked, only two weight sets are held.
        inputs: the examples whose outputs are followed, all at once; of labelled data the inputs, of several splits those
            of the training split.
        outputs: as for `lmc.landscape.evaluate`.
        device: where to compute (default: where the weights are).

    Raises:
        InputError: fewer than two weight sets, or a module that cannot be differentiated by its weights, or not forwards.
        MismatchError: weights of another architecture.
        WeightsError: weights that are not finite.
        DataError: no example.
    """
    if hasattr(steps, "steps"):
        raise InputError(
            "steps: the trained networks of a run each, not the steps of one; train(record=True) leaves those of the first "
            "in .steps[0]"
        )
    if isinstance(steps, nn.Module | Mapping) or not isinstance(steps, Iterable):
        raise InputError(
            f"steps: expected the weights before the first step and after each, one after the other, got {type(steps).__name__}"
        )
    run = iter(steps)
    first = next(run, None)
    if first is None:
        raise InputError("steps: none; expected the weights before the first step and after each: train(record=True)")
    network, call = _double(model, first, inputs, outputs, device)
    origin = before = _prepared(model, first, network)
    layers = _layers(model, before)
    if not layers:
        raise InputError(f"model ({type(model).__name__}) has no parameters: no step moves it")
    start = now = _outputs(network, before, call)
    terms = {layer: torch.zeros_like(start) for layer in layers}
    sizes: dict[str, list[float]] = {layer: [] for layer in layers}
    errors, linear = [0.0], [0.0]
    for given in run:
        after = _prepared(model, given, network)
        delta = {name: after[name] - before[name] for names in layers.values() for name in names}
        for layer, names in layers.items():
            term = _along(network, before, call, {name: delta[name] for name in names})
            terms[layer] += term
            sizes[layer].append(float(term.abs().mean()))
        now = _outputs(network, after, call)
        errors.append(float((now - start - sum(terms.values())).abs().mean()))
        whole = {name: after[name] - origin[name] for names in layers.values() for name in names}
        at_once = _along(network, origin, call, whole)
        linear.append(float((now - start - at_once).abs().mean()))
        before = after
    if len(errors) == 1:
        raise InputError(
            "steps: a single weight set; expected the weights before the first step and after each: train(record=True)"
        )
    return Telescope(
        np.array(errors),
        np.array(linear),
        {layer: np.array(found) for layer, found in sizes.items()},
        {layer: term.cpu().numpy() for layer, term in terms.items()},
        start.cpu().numpy(),
        now.cpu().numpy(),
    )


@own_context
def gradient_change(
    model: nn.Module,
    before: ModelOrWeights,
    after: ModelOrWeights,
    inputs: Any,
    *,
    probes: int = 8,
    seed: int = 0,
    outputs: Outputs = None,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """The change of the gradients of the outputs between two points of a run, for each layer: the lower, the more settled.

    `mean_x mean_p (d_p f(x) after - d_p f(x) before)^2`, averaged over the outputs and over the parameters p of the layer
    (Jeffares et al. 2024, section 4.3 and appendix C.3, where `after` is one epoch later). The mean over C outputs is
    estimated without bias from random directions: `E |J' v|^2 = |J|_F^2` for standard normal v.

    Args:
        model: the architecture, run in eval mode.
        before, after: its weights.
        inputs: examples, as for `telescope`.
        probes: random directions in the space of outputs, for each example.
        seed: of the directions.
        outputs, device: as for `telescope`.

    Returns:
        Layer -> mean squared change.

    Raises:
        InputError: fewer than one probe, or a module that cannot be differentiated by its weights.
        MismatchError: weights of another architecture.
        WeightsError: weights that are not finite.
        DataError: no example.
    """
    if isinstance(probes, bool) or not (isinstance(probes, int) and probes >= 1):
        raise InputError(f"probes={probes!r}; expected a whole number, at least 1")
    network, call = _double(model, before, inputs, outputs, device)
    ends = [_prepared(model, given, network) for given in (before, after)]
    layers = _layers(model, ends[0])
    _outputs(network, ends[0], call)  # a module is examined on its first inputs, which no derivative may go through
    names = [name for found in layers.values() for name in found]
    generator = torch.Generator().manual_seed(seed)
    changes: list[Tensor] = []  # of every example and tensor, on the device: asked for once
    count, outputs_of_one = len(tensors(call)[0]), 1
    for i in range(count):
        one = take(call, slice(i, i + 1))
        directions: Tensor | None = None
        found = []
        for end in ends:
            at = {name: end[name] for name in names}
            with attention_written_out():  # whose derivatives go through many directions at once
                value, back = vjp(lambda p, end=end, one=one: network.outputs({**end, **p}, one), at)[:2]
            if directions is None:
                drawn = torch.randn(probes, value.numel(), generator=generator, dtype=torch.float64)
                directions = drawn.reshape(probes, *value.shape).to(value.device)
                outputs_of_one = value.numel()
            found.append(vmap(lambda v, back=back: back(v)[0])(directions))
        changes += [(found[1][name] - found[0][name]).square().sum() for name in names]
    squares = iter(torch.stack(changes).tolist() if changes else ())
    totals = dict.fromkeys(layers, 0.0)
    for _ in range(count):
        for layer, members in layers.items():
            entries = sum(ends[0][name].numel() for name in members)
            change = sum(next(squares) for _ in members)
            totals[layer] += change / (probes * outputs_of_one * entries * count)
    return totals


def _double(
    model: nn.Module, weights: ModelOrWeights, inputs: Any, outputs: Outputs, device: torch.device | str | None
) -> tuple[Network, Any]:
    """The module and the examples, all in one call, in float64."""
    calls = list(input_batches(model, inputs, sys.maxsize))
    if len(calls) > 1 and any(length(each) is None for each in calls):
        raise DataError("inputs: batches that cannot be joined; pass the examples as a single one")
    joined = calls[0] if len(calls) == 1 else pytree.tree_map(lambda *parts: torch.cat(parts), *calls)
    place = pick_device(device, as_weights(weights))
    network = Network(model, place, Task(outputs=outputs).read, torch.float64)
    wide = pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, to_device(joined, place)
    )
    return network, wide


def _prepared(model: nn.Module, given: ModelOrWeights, network: Network) -> Weights:
    state = agreeing([given], ["steps"], model=model)[0]
    network.check(state, "steps")
    return {
        name: tensor.detach().to(network.device, torch.float64 if tensor.is_floating_point() else None, copy=True)
        for name, tensor in state.items()
    }


def _layers(model: nn.Module, weights: Weights) -> dict[str, list[str]]:
    """The parameters of each module, tied ones once."""
    return tensors_by_module(model, [name for name, _ in model.named_parameters() if name in weights])


def _outputs(network: Network, weights: Weights, call: Any) -> Tensor:
    """The outputs in float64; the ordinary call, whose errors say what is wrong with the inputs."""
    network.load(weights)
    found = network(call)
    if not isinstance(found, Tensor):
        raise InputError(f"outputs: expected a tensor of the module's outputs, got {type(found).__name__}")
    return found.detach()


def _along(network: Network, weights: Weights, call: Any, direction: Weights) -> Tensor:
    """The derivative (N, ...) of the outputs along a direction of some of the parameters."""
    at = {name: weights[name] for name in direction}
    with torch.no_grad(), derivatives(network.module, "forward"):
        return jvp(lambda p: network.outputs({**weights, **p}, call), (at,), (direction,))[1]
