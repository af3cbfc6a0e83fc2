"""From a module to its certified specification in one call."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lmc.core.context import own_context, warn
from lmc.errors import CertificateError, InputError, TraceError
from lmc.network.batches import to_device
from lmc.network.inputs import plain
from lmc.network.network import renamed_entries
from lmc.symmetry.continuous.find import continuous_symmetries
from lmc.symmetry.discovery.discover import discover
from lmc.symmetry.spec import PermutationSpec
from lmc.symmetry.tracing.failures import LAZY
from lmc.symmetry.tracing.outputs import Inputs, OutputSelector, as_call, kept, tensors_in
from lmc.weights import as_weights


@own_context
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
    continuous: bool = False,
    progress: bool = True,
) -> PermutationSpec:
    """The permutation symmetries of a module, read off its operators and proven on the example.

    Args:
        model: any `nn.Module`, on any device and in any precision; it is not changed. On the meta device (shapes without
            numbers) symmetries are found but cannot be certified.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a data object (a graph) that
            has them; small shapes with at least two examples (and two tokens) are best.
        outputs: the output that must stay the same: an attribute or key, a position, or a function of the result; by
            default every floating-point tensor of the result but caches and records (`past_key_values`,
            `hidden_states`, `attentions` and their kin). The spec's `outputs` names them.
        certify: prove the result in float64: `trials` random elements of the whole group, each on other weights, and each
            group broken on purpose, to see that an error would show.
        also: a second, larger input to certify on as well.
        tolerance: allowed difference of outputs, relative to their largest value; in a module that computes in float32
            alone at least 1e-5, and the certificate says so.
        continuous: look for scales, signs, rotations and invertible mixings as well (`lmc.continuous_symmetries`), and keep
            them as the spec's `continuous`; not on the meta device.
        progress: show bars when it takes longer than two seconds.

    Returns:
        The spec, with its `certificate` (None on the meta device or with `certify=False`). Groups for which an error would
        not have been seen are named by a warning, in `certificate.unverified` and where the spec is printed.

    Raises:
        TraceError: the forward pass cannot be captured as a graph of operators, with the place where it stops.
        CertificateError: a group that was found, given by name, does not keep the function, or the module cannot be computed
            in double precision.
        InputError: inputs or `outputs` that the module cannot take.
        WeightsError: the module has extra state that is no tensor.

    Example:
        >>> import lmc, torch
        >>> spec = lmc.permutation_spec(lmc.models.mlp(64, [32], 10), torch.randn(2, 64))
        >>> dict(spec.patterns)
        {'fc1.weight': 'fc1 .', 'fc1.bias': 'fc1', 'head.weight': '. fc1', 'head.bias': '.'}
    """
    _check(model, inputs)
    inputs, also = plain(model, inputs), None if also is None else plain(model, also)
    if renamed := renamed_entries(model):
        more = f" and {len(renamed) - 2} more" if len(renamed) > 2 else ""
        warn(
            f"{type(model).__name__}: hooks store parameters under other names ({', '.join(renamed[:2])}{more}), so that the "
            "operators cannot be traced to these entries of the state dict: they stay where they are. Take the hooks off "
            "(of each submodule: _state_dict_hooks, _load_state_dict_pre_hooks) to find their symmetries, or write them "
            "down with lmc.PermutationSpec.from_patterns"
        )
    names: dict[str, None] = {}

    def selected(result: Any) -> list[Tensor]:
        chosen = kept(result, outputs)
        names.update(dict.fromkeys(name for name in chosen if name))
        return list(chosen.values())

    found = discover(model, _beside(model, inputs), selected, progress=progress)
    spec = PermutationSpec(
        found.groups,
        found.shapes,
        found.buffers,
        found.frozen,
        found.aliases,
        outputs=tuple(names),
        assumed=found.assumed,
    )
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        return spec
    if continuous:
        beyond = continuous_symmetries(
            spec, model, inputs, outputs=outputs, seed=seed, tolerance=tolerance, progress=progress
        )
        spec = replace(spec, continuous=beyond)
    if not certify:
        return spec
    return proven(spec, model, inputs, trials=trials, seed=seed, outputs=outputs, also=also, tolerance=tolerance)


def proven(spec: PermutationSpec, model: nn.Module, inputs: Inputs, **options: Any) -> PermutationSpec:
    """A spec that was found without a proof, with its certificate; `options` as for `PermutationSpec.certify`.

    Warns of groups of which an error would not have been seen.

    Raises:
        CertificateError: as from `permutation_spec`.
    """
    try:
        proof = spec.certify(model, plain(model, inputs), **options)
    except CertificateError as error:
        if not spec.assumed:
            raise
        raise CertificateError(
            f"{error}. What the forward pass does depends on values ({spec.assumed[0]}): it was recorded on the inputs "
            "given, and with other weights these take another way, on which another symmetry holds; pass more inputs, so that "
            "all ways are taken"
        ) from error
    if proof.unverified:
        more = f" and {len(proof.unverified) - 8} more" if len(proof.unverified) > 8 else ""
        warn(
            f"not verified: {', '.join(proof.unverified[:8])}{more}. These groups follow from the operators, but breaking them on "
            "purpose does not change the outputs on these inputs, so a mistake would not be seen; pass larger inputs, or "
            "outputs= that depend on them"
        )
    return replace(spec, certificate=proof)


def _beside(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs on the device of the module; on the meta device, which has no values, everything stays where it is."""
    home = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    found = {tensor.device for tensor in tensors_in(as_call(inputs))}
    return (
        to_device(inputs, home)
        if found - {home} and not {"meta"} & {device.type for device in found | {home}}
        else inputs
    )


def _check(model: nn.Module, inputs: Inputs) -> None:
    """Raise `InputError` for what is no module, and for inputs without examples: on them every function is the same;
    `TraceError` for a module without weights as yet, and `WeightsError` for one with extra state beside its tensors."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected an nn.Module, got {type(model).__name__}; weights alone have no operators")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise TraceError(f"cannot trace {type(model).__name__}. {LAZY}")
    as_weights(model)
    given = list(tensors_in(as_call(inputs)))
    if given and not any(tensor.numel() for tensor in given):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
        raise InputError(f"inputs: shape {shapes} holds nothing; pass two examples or more along axis 0")
