"""Statistics of averaged networks: an interpolated network has its endpoints' weights, but not their activations."""

import copy
import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lmc.core.context import own_context
from lmc.errors import DataError, InputError
from lmc.network.batches import check_numbers, take, tensors, to_device
from lmc.network.derived import settled
from lmc.network.inputs import input_batches, length
from lmc.network.network import Network, pick_device, whole
from lmc.weights import ModelOrWeights, StateDict, Weights, as_weights, fitted, tied_names


@own_context
def recalibrate_batchnorm(
    model: nn.Module,
    weights: ModelOrWeights | None,
    inputs: Any,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> StateDict:
    """`weights` with the running statistics of every batch normalisation estimated anew from `inputs`.

    After averaging, running means and variances belong to neither network (Jordan et al. 2023, arXiv:2211.08403,
    section 3). They are set to the average of the batch statistics, each batch weighted by its size (the cumulative
    average of SWA, Izmailov et al. 2018, arXiv:1803.05407, section 3.2), in one pass with only the normalisation layers
    in train mode: dropout stays off. A model without batch normalisation gets an equal copy; tied tensors stay tied.

    Args:
        model: the architecture; not touched.
        weights: state dict or module (None: the module's own); not touched.
        inputs: a tensor (N, ...), a tuple or mapping of tensors, a `Dataset`, a loader or list of such batches, a data
            object, or several sets, of which the training set is used; targets are left out.
        batch_size: examples at a time; a tensor is cut into equal batches of at most this size.
        device: where to compute (default: where the weights are). The result lies where the weights were.

    Raises:
        MismatchError: weights of another architecture.
        DataError: no inputs, or a batch with a single value per channel, whose variance is unknown.

    Example:
        >>> import lmc, torch
        >>> model, images = lmc.models.mlp(64, [32], 10, norm="batch"), torch.randn(200, 64)
        >>> weights = lmc.recalibrate_batchnorm(model, None, images)
        >>> bool((weights["norm1.running_var"] != model.state_dict()["norm1.running_var"]).all())
        True
    """
    source = fitted(model, as_weights(model if weights is None else weights))
    network = Network(model, pick_device(device, source), whole)
    network.check(source, "weights")
    if inputs is None:
        raise DataError("inputs: None; pass a tensor (N, ...), a tuple or mapping of such, or a list of batches")
    return Recalibrator(network, calls_in(network.module, inputs, batch_size), batch_size)(source)


class Recalibrator:
    """`recalibrate_batchnorm` for many weight sets: the network and the batches are made once.

    Args:
        network: the architecture, where to compute.
        inputs: from which statistics are estimated; None: they stay as they are.
        batch_size: examples at a time.
        mixed: one of the gauged weights of which averages come, whose derived tensors are made to fit (`lmc.network.derived`).
    """

    def __init__(self, network: Network, inputs: Any, batch_size: int = 256, *, mixed: Weights | None = None) -> None:
        if batch_size < 2:
            raise InputError(f"batch_size={batch_size}; a variance needs at least 2 examples")
        self.network, self.mixed = network, mixed
        self.norms = [] if inputs is None else norms(network.module)
        calls = [] if inputs is None else equal_batches(inputs, batch_size)
        self.batches = [to_device(batch, network.device) for batch in calls]
        for batch in self.batches:
            check_numbers(batch, "inputs")
        if inputs is not None and not self.batches:
            raise DataError("inputs: no examples to estimate batch statistics from")

    def on(self, network: Network) -> "Recalibrator":
        """The same batches for another copy of the network, for another thread."""
        twin = copy.copy(self)
        twin.network, twin.norms = network, norms(network.module) if self.norms else []
        return twin

    def __call__(self, weights: Weights) -> StateDict:
        """The weights with new statistics, on the device they were on."""
        statistics: Weights = {}
        weights = weights if self.mixed is None else settled(weights, self.mixed)
        if self.norms:
            self.network.load(weights)
            self.network.forget_calls(self.batches[0])  # may load them anew, in evaluation mode: before modes are set
            self._estimate()
            statistics = self.network.buffers()
        found = {name: statistics.get(name, tensor).clone().to(tensor.device) for name, tensor in weights.items()}
        return StateDict(found | {alias: found[name] for alias, name in tied_names(weights).items()}, like=weights)

    def _estimate(self) -> None:
        """One pass over the batches, the normalisation layers averaging what they see."""
        seen = dict.fromkeys(self.norms, 0)

        def weigh(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # After this batch of b examples: m <- m + b / (seen + b) * (batch statistic - m).
            count = len(args[0] if args else kwargs["input"])
            seen[module] += count
            module.momentum = count / seen[module]

        hooks = [norm.register_forward_pre_hook(weigh, with_kwargs=True) for norm in self.norms]
        momenta = [norm.momentum for norm in self.norms]
        try:
            for norm in self.norms:
                norm.reset_running_stats()
                norm.train()
            for batch in self.batches:
                self.network(batch)
        except DataError as error:
            raise DataError(
                f"inputs: batch statistics cannot be estimated, {error}. "
                "Pass inputs alone, without targets, at least two examples in each batch"
            ) from error
        finally:
            for hook, norm, momentum in zip(hooks, self.norms, momenta, strict=True):
                hook.remove()
                norm.momentum = momentum
                norm.eval()


def has_batchnorm(model: nn.Module) -> bool:
    """Whether the model keeps running statistics that averaging its weights would spoil."""
    return bool(norms(model))


def norms(model: nn.Module) -> list[_BatchNorm | _InstanceNorm]:
    """The batch and instance normalisation layers that keep running statistics."""
    found = (module for module in model.modules() if isinstance(module, _BatchNorm | _InstanceNorm))
    return [module for module in found if module.track_running_stats and module.running_mean is not None]


class Calls(list[Any]):
    """Calls of a module, from which targets were taken already."""


def calls_in(module: nn.Module, inputs: Any, batch_size: int = 256) -> list[Any]:
    """The calls of the module that inputs of any accepted form stand for: those given whole in equal batches, those of a
    loader as they come, but for single examples, which have no variance."""
    if batch_size < 2:
        raise InputError(f"batch_size={batch_size}; a variance needs at least 2 examples")
    if isinstance(inputs, Calls):
        return inputs
    calls = list(input_batches(module, inputs, sys.maxsize))
    if len(calls) == 1 and not isinstance(inputs, list) and length(calls[0]) is not None:
        return equal_batches(calls[0], batch_size)
    return [call for call in calls if length(call) != 1] or calls


def equal_batches(inputs: Any, batch_size: int) -> list[Any]:
    """Equal batches of at most `batch_size`, so that no last one is too small for a variance."""
    if isinstance(inputs, list):
        return inputs
    leaves = tensors(inputs)
    if not leaves or leaves[0].ndim == 0 or len(leaves[0]) == 0:
        raise DataError(
            "inputs: expected a tensor (N, ...) with N > 0, a tuple or mapping of such, or a list of batches"
        )
    count = len(leaves[0])
    pieces = torch.arange(count).tensor_split(-(-count // batch_size))
    return [take(inputs, slice(int(piece[0]), int(piece[-1]) + 1)) for piece in pieces]
