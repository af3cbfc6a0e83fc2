"""From a module to its certified specification in one call."""

from dataclasses import replace

from torch import nn

from lmc.errors import InputError
from lmc.symmetry.discovery.discover import discover
from lmc.symmetry.outputs import Inputs, OutputSelector, as_call, tensors_in
from lmc.symmetry.spec import PermutationSpec


def permutation_spec(
    model: nn.Module,
    inputs: Inputs,
    *,
    outputs: OutputSelector = None,
    certify: bool = True,
    also: Inputs | None = None,
    trials: int = 2,
    seed: int = 0,
    tolerance: float = 1e-9,
    progress: bool = True,
) -> PermutationSpec:
    """The permutation symmetries of a module, read off its operators and proven on the example.

    Args:
        model: any `nn.Module`, on any device and in any precision; it is not changed. On the meta device (shapes without
            numbers) symmetries are found but cannot be certified.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; small shapes with at
            least two examples (and two tokens) are best.
        outputs: which output must stay the same: an attribute or key, a position, or a function of the result; by default
            the tensor itself, the `.logits`, or every tensor of the result but a cache for the next tokens.
        certify: prove the result in float64: `trials` random elements of the whole group on perturbed weights.
        also: a second, larger input to certify on as well.
        tolerance: allowed difference of outputs, relative to their largest value.
        progress: show bars when it takes longer than two seconds.

    Returns:
        The spec, with its `certificate` (None on the meta device or with `certify=False`).

    Raises:
        TraceError: the forward pass cannot be captured as a graph of operators; says where.
        CertificateError: a group that was found does not keep the function; says which. Or the module cannot be computed
            in float64; says where.
        InputError: inputs or `outputs` that the module cannot take.
    """
    _check(model, inputs)
    found = discover(model, inputs, outputs, progress=progress)
    spec = PermutationSpec(found.groups, found.shapes, found.buffers, found.frozen, found.aliases)
    if not certify or any(tensor.is_meta for tensor in model.state_dict().values()):
        return spec
    proof = spec.certify(model, inputs, trials=trials, seed=seed, outputs=outputs, also=also, tolerance=tolerance)
    return replace(spec, certificate=proof)


def _check(model: nn.Module, inputs: Inputs) -> None:
    """Raise `InputError` for what is no module, and for inputs without examples: on them every function is the same."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected an nn.Module, got {type(model).__name__}; weights alone have no operators")
    given = list(tensors_in(as_call(inputs)))
    if given and not any(tensor.numel() for tensor in given):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
        raise InputError(f"inputs: shape {shapes} holds nothing; pass two examples or more along axis 0")
