"""Normalisations folded into the layers that read them, so that a residual stream may be rotated.

    LN(z) = sqrt(D) M z / |M z| * alpha + beta,   M = I - 11^T / D

With alpha and beta taken over by the linear maps behind it, what is left of a layer normalisation commutes with every
orthogonal matrix that leaves the vector of ones alone (Theus et al. 2025, arXiv:2506.22712, who write it as an RMS
normalisation of M z): the rotated network is one of the same architecture.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.errors import DataError, SpecError, WeightsError
from lmc.network.inputs import first_of, input_batches, plain
from lmc.network.network import Network, pick_device
from lmc.symmetry.spec import PermutationSpec, UnboundSpec
from lmc.symmetry.tracing.outputs import in_one_row
from lmc.weights import ModelOrWeights, StateDict, Weights, agreeing

TOLERANCE = 1e-9
EXAMPLES = 8
NORMS = (nn.LayerNorm, nn.RMSNorm)


@own_context
def fold_norms(
    spec: PermutationSpec | UnboundSpec, model: nn.Module, weights: ModelOrWeights, inputs: Any
) -> StateDict:
    """The weights of the same function in which the normalisations of residual streams have scale 1 and, mostly, no shift.

    The linear layers that read a norm take its scale into their columns and its shift into their biases; where one of
    them has no bias, the shift stays, divided by the scale. What is written to a stream loses its mean over the units if
    that changes nothing, as where layer normalisations alone read the stream. Checked in float64.

    Args:
        spec: the symmetries of the architecture.
        model: the architecture; not touched.
        weights: a module or state dict; not changed. The result has its dtypes.
        inputs: labelled or not; the first eight examples are used, and as many made up from them.

    Raises:
        SpecError: the spec does not fit; a scale is 0 whose shift no bias can take; weights are tied (an embedding that
            is the output layer as well); or something other than linear layers reads a norm.
        WeightsError: weights that are not finite, or complex.
        DataError: no inputs, or outputs that are not finite.
    """
    weights = agreeing([weights], ["weights"], model=model)[0]
    spec = spec.bind(weights)
    probe = Probe(model, weights, inputs, torch.Generator().manual_seed(0))
    folded = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    readers = probe.readers(spec)
    for norm, behind in readers.items():
        for name in (f"{layer}.weight" for layer in (norm, *behind)):
            if name in spec.aliases or name in spec.aliases.values():
                raise SpecError(f"{name} is tied to another tensor, so {norm} cannot be folded; use an untied copy")
        _fold(folded, norm, behind)
    if (error := probe.error(folded)) > TOLERANCE:
        raise SpecError(
            f"folding {', '.join(readers)} changes the outputs by {error:.1e} of their size: something other than the "
            "linear layers that were seen reads one of them"
        )
    streams = dict.fromkeys(group for norm in readers for group, _ in spec.tables_by_tensor[f"{norm}.weight"])
    for stream in streams:
        centred = folded | _centred(spec, folded, stream, readers)
        folded = centred if probe.error(centred) <= TOLERANCE else folded
    return StateDict(((name, tensor.to(weights[name].dtype)) for name, tensor in folded.items()), like=weights)


class Probe:
    """An architecture in float64, examples to run it on, and the outputs of some weights as a reference.

    The examples are the first of the caller's and as many made up from them, which the caller did not choose: a unit that
    is off for a few examples hides what it reads. Where the module takes no made-up ones, the caller's alone are used.
    """

    def __init__(self, model: nn.Module, weights: Weights, inputs: Any, generator: torch.Generator) -> None:
        if name := next((name for name, tensor in weights.items() if tensor.is_complex()), None):
            raise WeightsError(f"{name}: complex weights cannot be rotated; match them with weight_matching")
        self.network = Network(model, pick_device(None, weights), in_one_row, torch.float64)
        call = plain(model, first_of(next(input_batches(model, inputs, EXAMPLES)), EXAMPLES))
        self._calls = [_double(call)]
        self._reference = self(weights)
        if not bool(self._reference.isfinite().all()):
            raise DataError("the outputs for the first inputs hold NaN or infinity; check the inputs")
        self._calls.append(_double(_made_up(call, generator)))
        try:
            reference = self(weights)
        except (RuntimeError, ValueError, IndexError, TypeError):
            reference = torch.full((1,), torch.nan)
        if bool(reference.isfinite().all()):
            self._reference = reference
        else:
            del self._calls[1]

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The outputs in float64, those of all examples in one row."""
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        return torch.cat([self.network.outputs(wide, call) for call in self._calls])

    def error(self, weights: Mapping[str, Tensor], reference: Tensor | None = None) -> float:
        """The largest difference to the reference (default: outputs of the weights given first), relative to its largest value."""
        expected = self._reference if reference is None else reference
        scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        return float((self(weights) - expected).abs().max() / scale)

    @torch.no_grad()
    def readers(self, spec: PermutationSpec) -> dict[str, list[str]]:
        """For each norm over a group the linear layers that read its output, or a part of it, unit by unit: not those that
        read it transposed, and so mix its positions."""
        outputs: dict[int, tuple[str, Tensor]] = {}  # by storage; the tensors are held, so that none is used twice
        found: dict[str, list[str]] = defaultdict(list)
        handles = []

        def written(name: str):
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                outputs[output.untyped_storage().data_ptr()] = (name, output)

            return hook

        def read(name: str):
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                source = outputs.get(inputs[0].untyped_storage().data_ptr()) if inputs else None
                along = (inputs[0].shape[-1], inputs[0].stride(-1)) if source is not None else None
                if source is None or along != (source[1].shape[-1], source[1].stride(-1)):
                    return
                if name not in found[source[0]]:
                    found[source[0]].append(name)

            return hook

        for name, module in self.network.module.named_modules():
            if isinstance(module, NORMS) and f"{name}.weight" in spec.tables_by_tensor:
                handles.append(module.register_forward_hook(written(name)))
            elif isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(read(name)))
        try:
            self.network.result(self._calls[0])
        finally:
            for handle in handles:
                handle.remove()
        return dict(found)


def _fold(weights: Weights, norm: str, readers: list[str]) -> None:
    """Take scale and shift of a norm into the linear layers behind it."""
    scale, shift = weights[f"{norm}.weight"], weights.get(f"{norm}.bias")
    biased = all(f"{reader}.bias" in weights for reader in readers)
    if shift is not None and not biased and not bool(scale.all()):
        raise SpecError(f"{norm}.weight is 0 at unit {int((scale == 0).nonzero()[0])}, and its shift has nowhere to go")
    for reader in readers:
        if shift is not None and biased:
            weights[f"{reader}.bias"] = weights[f"{reader}.bias"] + weights[f"{reader}.weight"] @ shift
        weights[f"{reader}.weight"] = weights[f"{reader}.weight"] * scale
    weights[f"{norm}.weight"] = torch.ones_like(scale)
    if shift is not None:
        weights[f"{norm}.bias"] = torch.zeros_like(shift) if biased else shift / scale


def _centred(spec: PermutationSpec, weights: Weights, stream: str, readers: Mapping[str, list[str]]) -> Weights:
    """The tensors on a stream without their mean over its units; norms and readers of shifts that stayed are left out."""
    shifted = {norm for norm in readers if bool(weights.get(f"{norm}.bias", torch.zeros(1)).any())}
    left = {f"{norm}.{own}" for norm in readers for own in ("weight", "bias")}
    left |= {f"{reader}.weight" for norm in shifted for reader in readers[norm]}
    found = {}
    for name, tables in spec.groups[stream].tables.items():
        if name in weights and name not in left:
            found[name] = weights[name]
            for table in tables:
                found[name] = found[name] - found[name].mean(table.dims, keepdim=True)
    return found


def _double(call: Any) -> Any:
    if isinstance(call, Mapping):
        return {name: _double(value) for name, value in call.items()}
    if isinstance(call, tuple):
        return tuple(_double(value) for value in call)
    return call.double() if isinstance(call, Tensor) and call.is_floating_point() else call


def _made_up(call: Any, generator: torch.Generator) -> Any:
    """Other examples of the same kind: integers that occur, elsewhere; real numbers too, with noise as large as their spread."""
    if isinstance(call, Mapping):
        return {name: _made_up(value, generator) for name, value in call.items()}
    if isinstance(call, tuple):
        return tuple(_made_up(value, generator) for value in call)
    mixed = call.flatten()[torch.randperm(call.numel(), generator=generator).to(call.device)].reshape(call.shape)
    if not call.is_floating_point():
        return mixed
    noise = torch.randn(call.shape, generator=generator, dtype=torch.float64).to(call)
    return mixed + call.std(correction=0) * noise
