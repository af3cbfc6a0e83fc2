"""The proof by numbers: the same outputs, to rounding, in float64, on weights where nothing is 0 or 1 by design.

A wrong permutation changes outputs by 1e-3 or more of their size; a right one by 1e-15. Default initialisations
(zero biases, unit norms, fresh statistics) would hide errors, so all parameters and buffers are perturbed first.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lmc.errors import CertificateError, InputError, LmcError
from lmc.network.network import Network
from lmc.symmetry.actions import act, identity_indices, random_indices
from lmc.symmetry.certificate import Certificate
from lmc.symmetry.discovery.tracing.failures import not_computed, quiet
from lmc.symmetry.outputs import Inputs, OutputSelector, as_call, select, tensors_in
from lmc.symmetry.symmetries import Symmetries
from lmc.weights import ModelOrWeights, Weights, as_weights, tied_names

LOW = (torch.float32, torch.float16, torch.bfloat16)


def certify_spec(
    spec: Symmetries,
    model: nn.Module,
    inputs: Inputs,
    *,
    trials: int,
    seed: int,
    outputs: OutputSelector,
    also: Inputs | None,
    tolerance: float,
) -> Certificate:
    """See `PermutationSpec.certify`."""
    if trials < 1:
        raise InputError(f"trials={trials}: at least one permutation must be tried")
    probe = _Probe(model, outputs, seed, perturb=True)
    spec.check(probe.weights)
    examples = [inputs] if also is None else [inputs, also]
    references = [probe.outputs_of(example, probe.weights) for example in examples]
    worst, moved = 0.0, 0.0
    for trial in range(trials):
        permuted = act(spec, random_indices(spec, seed + trial), probe.weights)
        moved = max(moved, _moved_share(probe.weights, permuted))
        for example, reference in zip(examples, references, strict=True):
            error = _relative_error(reference, probe.outputs_of(example, permuted))
            if not error <= tolerance:
                raise CertificateError(_guilty(spec, probe, example, reference, error, tolerance, seed + trial))
            worst = max(worst, error)
    shapes = tuple(_shapes(example) for example in examples)
    return Certificate(worst, tolerance, trials, len(spec.groups), moved, shapes)


def certify_permutation(
    spec: Symmetries,
    indices: Mapping[str, Tensor],
    model: nn.Module,
    inputs: Inputs,
    *,
    weights: ModelOrWeights | None,
    outputs: OutputSelector,
    tolerance: float,
) -> Certificate:
    """See `Permutation.certify`: this very permutation, on the weights as they are."""
    if weights is not None:
        spec.check(weights)
    probe = _Probe(model, outputs, seed=0, perturb=False, weights=weights)
    permuted = act(spec, indices, probe.weights)
    reference = probe.outputs_of(inputs, probe.weights)
    error = _relative_error(reference, probe.outputs_of(inputs, permuted))
    if not error <= tolerance:
        raise CertificateError(
            f"the permuted weights compute another function: outputs differ by {error:.1e} of their size "
            f"(tolerance {tolerance:.0e}); call spec.certify(model, inputs) to see which group is wrong"
        )
    moved = _moved_share(probe.weights, permuted)
    return Certificate(error, tolerance, 1, len(indices), moved, (_shapes(inputs),))


class _Probe:
    """A float64 copy of the module in eval mode, on which weights are tried out; the caller's module is not touched."""

    def __init__(
        self,
        model: nn.Module,
        outputs: OutputSelector,
        seed: int,
        perturb: bool,
        weights: ModelOrWeights | None = None,
    ) -> None:
        if any(tensor.is_meta for tensor in model.state_dict().values()):
            raise CertificateError(
                "the model lies on the meta device, so there are no numbers to certify on: "
                "certify a smaller twin of the same architecture"
            )
        device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))
        if device.type == "mps":  # which has no float64
            device = torch.device("cpu")
        self.network = Network(model, device, dtype=torch.float64)
        self.select = outputs
        self.seed = seed
        given = as_weights(model if weights is None else weights)
        wide = {name: t.to(device, torch.float64 if t.is_floating_point() else t.dtype) for name, t in given.items()}
        self.weights: Weights = {name: t.clone() for name, t in wide.items()}
        self.weights |= {alias: self.weights[name] for alias, name in tied_names(given).items()}
        if perturb:
            _perturb(self.weights, {name for name, _ in model.named_parameters(remove_duplicate=False)}, seed)

    def outputs_of(self, example: Inputs, weights: Weights) -> list[Tensor]:
        self.network.load(weights)
        device = self.network.device
        args, kwargs = tree_map(lambda x: _input(x, device), as_call(example))
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices), quiet(), _float64():
            torch.manual_seed(self.seed)
            try:
                result = self.network.result(kwargs or args)
            except LmcError:
                raise
            except Exception as error:
                raise not_computed(self.network.module, args, kwargs, error) from error
        return [tensor.detach().clone() for tensor in select(result, self.select)]


def _input(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.to(device)
    return value.double() if value.is_floating_point() else value


def _perturb(weights: Weights, parameters: Collection[str], seed: int) -> None:
    """Add noise of a tenth of each tensor's own size (0.1 where it is zero), in place; positive buffers stay positive."""
    generator = torch.Generator().manual_seed(seed)
    tied = tied_names(weights)
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or name in tied:
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        if name not in parameters and bool((tensor >= 0).all()) and bool((tensor > 0).any()):
            tensor.mul_(torch.exp(0.2 * noise))
        else:
            size = float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
            tensor.add_(noise, alpha=0.1 * (size if size > 0 else 1.0))


class _float64(TorchDispatchMode):
    """Turn casts to lower precision inside a model (norms, rotary embeddings) into casts to float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        widened = {k: torch.float64 if k == "dtype" and v in LOW else v for k, v in (kwargs or {}).items()}
        args = tree_map(_wide_dtype, args)
        if str(func).startswith("aten._grouped_mm"):
            return _grouped_product(*args, **widened)
        return func(*args, **widened)


def _grouped_product(
    x: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, **_: Any
) -> Tensor:
    """What torch computes in single precision only: rows of x (t, i) up to `offs[e]` times weight[e] (i, o), one after
    the other, for weights (e, i, o)."""
    if x.ndim != 2 or weight.ndim != 3 or offs is None or bias is not None:
        raise NotImplementedError("a grouped product of other than sorted rows (t, i) and matrices (e, i, o)")
    result = x.new_zeros(len(x), weight.shape[2])
    ends = offs.tolist()
    for start, end, matrix in zip([0, *ends], ends, weight, strict=False):
        result[start:end] = x[start:end] @ matrix
    return result


def _wide_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in LOW else value


def _relative_error(reference: list[Tensor], outputs: list[Tensor]) -> float:
    worst = 0.0
    if not any(x.numel() for x in reference):
        raise CertificateError("the model's outputs are empty on this example: nothing can be compared")
    for x, y in zip(reference, outputs, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if x.numel() == 0:
            continue
        if not x.is_floating_point() and not x.is_complex():
            worst = max(worst, 0.0 if torch.equal(x, y) else 1.0)
            continue
        finite = torch.isfinite(x)
        if not torch.equal(finite, torch.isfinite(y)):
            return float("inf")
        if not bool(finite.any()):
            raise CertificateError("the model's outputs are not finite on this example: nothing can be compared")
        x, y = x[finite], y[finite]
        scale = float(x.abs().max())
        difference = float((x - y).abs().max())
        worst = max(worst, difference / scale if scale > 0 else difference)
    return worst


def _moved_share(before: Weights, after: Weights) -> float:
    changed = sum(int((before[name] != after[name]).sum()) for name in before)
    return changed / max(1, sum(tensor.numel() for tensor in before.values()))


def _guilty(
    spec: Symmetries,
    probe: _Probe,
    example: Inputs,
    reference: list[Tensor],
    error: float,
    tolerance: float,
    seed: int,
) -> str:
    """Try each family alone, and say which ones change the function."""
    whole, identity = random_indices(spec, seed), identity_indices(spec)
    families = dict.fromkeys(group.family for group in spec.groups.values())
    found = []
    for family in families:
        indices = {n: (whole if g.family == family else identity)[n] for n, g in spec.groups.items()}
        alone = _relative_error(reference, probe.outputs_of(example, act(spec, indices, probe.weights)))
        if not alone <= tolerance:
            members = [g for g in spec.groups.values() if g.family == family]
            found.append(
                f"{family!r} ({members[0].size} units in {', '.join(list(members[0].tables)[:3])}): {alone:.1e}"
            )
    which = "; ".join(found) if found else "none alone, only several together"
    return (
        f"the spec does not keep the function: outputs change by {error:.1e} of their size (tolerance {tolerance:.0e}). "
        f"Guilty groups: {which}"
    )


def _shapes(example: Inputs) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors_in(as_call(example)))
