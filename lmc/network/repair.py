"""REPAIR: give the units of an averaged network the spread that they have in its endpoints (Jordan et al. 2023).

Units of aligned networks are correlated, not equal, so their average varies less than either, the more so the deeper
(arXiv:2211.08403, section 3). Every layer's output is rescaled and shifted per channel to the endpoints' mean and standard
deviation, averaged, which its weight and bias can express: the architecture stays.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lmc.core.context import own_context
from lmc.core.progress import tqdm
from lmc.errors import DataError, InputError
from lmc.network.batchnorm import Recalibrator, has_batchnorm
from lmc.network.derived import gauged, settled
from lmc.network.inputs import first_of, input_batches
from lmc.network.layers import Layer, rescalable, run_seen
from lmc.network.moments import ChannelMoments
from lmc.network.network import Network, pick_device, whole
from lmc.weights import ModelOrWeights, StateDict, Weights, as_weights, check_compatible, check_finite, fitted, mean

Method = Literal["passes", "closed_form"]

# Channels that vary less than this are dead: there is nothing to rescale.
_DEAD = 1e-6


@own_context
def repair(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    inputs: Any,
    shares: Sequence[float] | None = None,
    *,
    method: Method = "passes",
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Weights:
    """The average of several aligned networks, with the statistics of its layers repaired (REPAIR).

    The output of every linear or convolutional layer that has a bias, the last one excepted, gets per channel the mean
    and the standard deviation of the networks that are averaged, themselves averaged by their shares. Where a layer has no
    bias, the normalisation behind it has one: its output is repaired instead, or, if it is batch normalisation, its
    running statistics are estimated anew, to the same end.

    Args:
        model: the architecture; not touched.
        models: the networks to average, aligned: modules or state dicts; none is changed.
        inputs: a tensor, a tuple or mapping of tensors, an object with `.train`, or an iterable of such batches; targets
            are not used. A few thousand training examples are enough.
        shares: of each network in the average, summing to 1 (default: equal). A share of 1 gives that network back.
        method: "passes" measures the average itself, all layers in one pass, each on inputs that are already right.
            "closed_form" derives its variance from the networks' covariance, which is exact for the first layer.
        batch_size: examples at a time, where `inputs` is not cut into batches already.
        device: where to compute (default: where the weights are).
        progress: show a bar when it takes longer than two seconds.

    Raises:
        MismatchError: networks of different architectures. DataError: no inputs. InputError: a bad argument.
        WeightsError: NaN or infinity in the weights.

    Example:
        >>> import lmc
        >>> stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
        >>> model, (a, b) = stored.model(), stored.weights
        >>> spec = lmc.permutation_spec(model, data.test[0][:2])
        >>> moved = lmc.weight_matching(spec, a, b).apply(b)
        >>> soups = lmc.weights.mean([a, moved]), lmc.repair(model, [a, moved], data.train)
        >>> plain, repaired = (lmc.landscape.evaluate(model, soup, data.test)["data"].loss for soup in soups)
        >>> repaired < plain
        True
    """
    if method not in get_args(Method):
        raise InputError(f"method={method!r}: expected one of {', '.join(map(repr, get_args(Method)))}")
    states = [fitted(model, as_weights(other), f"models[{k}]") for k, other in enumerate(models)]
    if not states:
        raise InputError("repair of no models at all: pass at least one")
    network = Network(model, pick_device(device, states[0]), whole)
    equal = [1.0 / len(states)] * len(states)
    renormalizer = Renormalizer(network, states, inputs, method, batch_size, progress)
    return renormalizer(equal if shares is None else shares)


class Renormalizer:
    """`repair` for many averages of the same networks: their statistics are collected once.

    Args:
        network: the architecture, where to compute.
        models, inputs, method, progress: as for `repair`.
        batch_size: examples at a time; None where `inputs` is a list of calls of the module, to be used as they are.

    Attributes:
        layers: names of the modules that are repaired.
    """

    def __init__(
        self,
        network: Network,
        models: Sequence[Weights],
        inputs: Any,
        method: Method = "passes",
        batch_size: int | None = 256,
        progress: bool = False,
    ) -> None:
        for k, state in enumerate(models):
            network.check(state, f"models[{k}]")
            check_compatible(models[0], state, ("models[0]", f"models[{k}]"))
            check_finite(state, f"models[{k}]")
        self.network, self.models, self.method = network, [gauged(state, network.module) for state in models], method
        self.batches = list(inputs if batch_size is None else input_batches(network.module, inputs, batch_size))
        network.load(self.models[0])
        self._layers = rescalable(network, first_of(self.batches[0], 2))
        self.layers = [layer.module for layer in self._layers]
        self._endpoints = self._measure_endpoints(progress)

    def __call__(self, shares: Sequence[float]) -> StateDict:
        """The repaired average, on the device that the networks are on."""
        average = settled(mean(self.models, shares), self.models[0])
        if 1.0 in shares:
            return average
        if self.method == "closed_form":
            scales = [moments.closed_form(shares) for (moments,) in self._endpoints]
        else:
            scales = self._measure_average(average, shares)
        for layer, (scale, before, after) in zip(self._layers, scales, strict=True):
            self._rescale(average, layer, scale, before, after)
        if has_batchnorm(self.network.module):
            average = Recalibrator(self.network, self.batches)(average)
        return average

    def _measure_endpoints(self, progress: bool) -> "list[list[LayerMoments]]":
        """The statistics of every layer, in every network, or, for the closed form, of all and between them."""
        together = self.method == "closed_form"
        moments = [[LayerMoments() for _ in (self.models[:1] if together else self.models)] for _ in self._layers]
        places = [(layer.module, layer.channel) for layer in self._layers]
        for call in tqdm(self.batches, desc="repair", unit=" batches", disable=not progress):
            seen: list[list[Tensor]] = [[] for _ in self._layers]

            def note(at: int, values: Tensor, seen=seen) -> None:
                seen[at].append(values)

            for k, state in enumerate(self.models):
                self.network.load(state)
                run_seen(self.network, call, places, note)
                if not together:
                    for found, values in zip(moments, seen, strict=True):
                        found[k].update(values.pop()[None])
            if together:
                for (found,), values in zip(moments, seen, strict=True):
                    found.update(torch.stack(values))
        return moments

    def _measure_average(self, average: Weights, shares: Sequence[float]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """One pass over the average in which each layer passes on what it will give once repaired."""
        moments = [LayerMoments() for _ in self._layers]
        places = [(layer.module, layer.channel) for layer in self._layers]
        targets = [target(found, shares) for found in self._endpoints]

        def correct(at: int, values: Tensor) -> Tensor:
            batch = LayerMoments()
            batch.update(values[None])
            moments[at].join(batch)
            scale, before, after = batch.towards(*targets[at])
            return values.sub_(before[:, None]).mul_(scale[:, None]).add_(after[:, None])

        norms = [module for module in self.network.module.modules() if isinstance(module, _BatchNorm)]
        self.network.load(average)
        try:
            for norm in norms:
                norm.train()
            for call in self.batches:
                run_seen(self.network, call, places, correct)
        except ValueError as error:
            raise DataError(f"inputs: batch statistics cannot be estimated: {error}") from error
        finally:
            for norm in norms:
                norm.eval()
        return [found.towards(*target) for found, target in zip(moments, targets, strict=True)]

    def _rescale(self, weights: Weights, layer: Layer, scale: Tensor, before: Tensor, after: Tensor) -> None:
        """Make the layer give `(output - before) scale + after`."""
        weight, bias = weights[f"{layer.module}.weight"], weights[f"{layer.module}.bias"]
        scale, before, after = (x.to(bias.device) for x in (scale, before, after))
        along = [-1 if axis == layer.axis else 1 for axis in range(weight.ndim)]
        weights[f"{layer.module}.weight"] = (weight.double() * scale.view(along)).to(weight.dtype)
        weights[f"{layer.module}.bias"] = ((bias.double() - before) * scale + after).to(bias.dtype)


class LayerMoments(ChannelMoments):
    """Moments of the channels of one layer in the networks, and what brings an average of them to theirs."""

    def towards(self, center: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, before, after) with which the one network measured here gets a mean and a deviation, dead channels not."""
        return _scale(self.mean[0], self.deviation[0], center, deviation)

    def closed_form(self, shares: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, before, after) for the average of the networks, its statistics taken from theirs."""
        weights = torch.tensor(shares, dtype=torch.float64, device=self.mean.device)
        variance = torch.einsum("k,l,kln->n", weights, weights, self.covariance)
        center, deviation = target([self], shares)
        return _scale(center, variance.clamp_min(0.0).sqrt(), center, deviation)


def target(networks: Sequence[LayerMoments], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean (n,) and standard deviation (n,) of the repaired layer (section 4 of the paper), from those of the networks."""
    means, deviations = (torch.cat(found) for found in zip(*((m.mean, m.deviation) for m in networks), strict=True))
    weights = torch.tensor(shares, dtype=torch.float64, device=means.device)
    return weights @ means, weights @ deviations


def _scale(center: Tensor, deviation: Tensor, wanted: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    alive = (deviation > _DEAD) & (spread > _DEAD)
    scale = torch.where(alive, spread / deviation.clamp_min(_DEAD), 1.0)
    return scale, torch.where(alive, center, 0.0), torch.where(alive, wanted, 0.0)
