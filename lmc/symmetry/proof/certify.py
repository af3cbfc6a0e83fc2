"""The proof by numbers: the same outputs, to rounding, in float64; and other outputs when a group is broken on purpose.

A wrong permutation changes outputs by 1e-3 or more of their size; a right one by 1e-15. Equal outputs prove nothing about
a group that the outputs do not depend on, so each family of groups is broken once: it moves, but one of the tensors that
it touches is left behind. Where that changes nothing, other tensors and then other weights are tried. Of many families
(a group for each head of each layer) a single gradient shows what an infinitesimal breakage of each would do; only those
of which it shows nothing are broken one by one.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lmc.errors import CertificateError, InputError
from lmc.symmetry.groups.group import Table
from lmc.symmetry.groups.symmetries import (
    VISIBLE,
    Certificate,
    Evidence,
    Indices,
    Symmetries,
    act,
    identity_indices,
    permute_tensor,
    random_indices,
)
from lmc.symmetry.proof.probe import Probe, draw
from lmc.symmetry.tracing.outputs import Inputs, OutputSelector, as_call, tensors_in
from lmc.weights import ModelOrWeights, Weights, as_weights

FURTHER_DRAWS = 2
PLACES = 3
LOUD = 1e6  # times the median
MANY = 16  # families, from which on a gradient is cheaper than as many forward passes


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
    spec.check(model)
    probe = Probe(model, outputs)
    examples = [inputs] if also is None else [inputs, also]
    power = dict.fromkeys(spec.families, 0.0)
    turns = {
        family: {name: torch.arange(spec.groups[name].size).roll(1) for name in names}
        for family, names in spec.families.items()
    }
    worst = moved = 0.0
    trial = 0
    while trial < trials or (trial < trials + FURTHER_DRAWS and _unseen(power, tolerance)):
        weights = draw(model, trial, seed)
        indices = random_indices(spec, seed + trial)
        references = [probe.outputs_of(example, weights) for example in examples]
        permuted = act(spec, indices, weights)
        moved = max(moved, _moved_share(spec, indices))
        for example, reference in zip(examples, references, strict=True):
            # without groups there is nothing to compare, not even where these weights give NaN
            error = relative_error(reference, probe.outputs_of(example, permuted)) if spec.groups else 0.0
            if not error <= tolerance:
                found = _guilty(spec, probe, example, weights, reference, indices, tolerance)
                raise CertificateError(
                    f"the spec does not keep the function: outputs change by {error:.1e} of their size "
                    f"(tolerance {tolerance:.0e}). Guilty groups: {found}"
                )
            worst = max(worst, error)
        for example, reference in zip(examples, references, strict=True):
            if len(_unseen(power, tolerance)) > MANY:
                slopes = probe.slopes(example, weights, seed + trial)
                for family in _unseen(power, tolerance):
                    power[family] = max(power[family], _first_order(spec, turns[family], weights, slopes))
            for family in _unseen(power, tolerance):
                seen = _power(spec, turns[family], probe, example, weights, reference, tolerance)
                power[family] = max(power[family], seen)
        trial += 1
    families = {family: Evidence(worst, power[family]) for family in spec.families}
    shapes = tuple(_shapes(example) for example in examples)
    return Certificate(worst, tolerance, trial, len(spec.groups), moved, shapes, probe.dtype, families, probe.names)


def certify_permutation(
    spec: Symmetries,
    indices: Indices,
    model: nn.Module,
    inputs: Inputs,
    *,
    weights: ModelOrWeights | None,
    outputs: OutputSelector,
    tolerance: float,
) -> Certificate:
    """See `Permutation.certify`: this very permutation, on the weights as they are."""
    own = as_weights(model if weights is None else weights)
    spec.check(own)
    probe = Probe(model, outputs)
    reference = probe.outputs_of(inputs, own)
    error = relative_error(reference, probe.outputs_of(inputs, act(spec, indices, own)))
    if not error <= tolerance:
        raise CertificateError(
            f"the permuted weights compute another function: outputs differ by {error:.1e} of their size "
            f"(tolerance {tolerance:.0e}); call spec.certify(model, inputs) to see which group is wrong"
        )
    families = {}
    for family, names in spec.families.items():
        moving = {name: indices[name] for name in names if not _stays(indices[name])}
        if moving:
            power = _power(spec, moving, probe, inputs, own, reference, tolerance)
            families[family] = Evidence(error, power)
    moved = _moved_share(spec, indices)
    shapes = (_shapes(inputs),)
    return Certificate(error, tolerance, 1, len(indices), moved, shapes, probe.dtype, families, probe.names)


def _unseen(power: Mapping[str, float], tolerance: float) -> list[str]:
    return [family for family, seen in power.items() if not seen > VISIBLE * tolerance]


def _power(
    spec: Symmetries,
    moving: Indices,
    probe: Probe,
    inputs: Inputs,
    weights: Weights,
    reference: list[Tensor],
    tolerance: float,
) -> float:
    """The change of the outputs, relative to their size, when a family moves but for one place that it touches."""
    most = 0.0
    for broken in _broken(spec, moving, weights):
        most = max(most, relative_error(reference, probe.outputs_of(inputs, broken)))
        if most > VISIBLE * tolerance:
            break
    return most


def _broken(spec: Symmetries, moving: Indices, weights: Weights) -> Iterator[Weights]:
    """The weights after a family has moved everywhere but in one place, the largest first.

    Where a function is symmetric in each place alone, as in a sum of units, that keeps it: so at last one unit is
    overwritten by another, which it survives only if it does not depend on the units.
    """
    tables, sizes = _places(spec, moving, weights)
    for left in sorted(sizes, key=lambda place: -sizes[place])[: PLACES if len(sizes) > 1 else 0]:
        yield weights | {
            tensor: permute_tensor(weights[tensor], kept, moving)
            for tensor, found in tables.items()
            if (kept := [item for item in found if (spec.aliases.get(tensor, tensor), item[1].dims) != left])
        }
    overwritten = {name: torch.arange(len(index)).clamp(min=1) for name, index in moving.items()}
    yield weights | {t: permute_tensor(weights[t], found, overwritten) for t, found in tables.items() if found}


def _first_order(spec: Symmetries, moving: Indices, weights: Weights, slopes: Weights) -> float:
    """The largest rate at which the outputs change, relative to their size, when one place of a family moves alone."""
    tables, sizes = _places(spec, moving, weights)
    most = 0.0
    for tensor, dims in sizes:
        if tensor in slopes:
            alone = [item for item in tables[tensor] if item[1].dims == dims]
            step = permute_tensor(weights[tensor], alone, moving) - weights[tensor]
            rate = slopes[tensor].conj() * step
            most = max(most, abs(float(rate.real.sum())))
    return most


def _places(
    spec: Symmetries, moving: Indices, weights: Weights
) -> tuple[dict[str, list[tuple[str, Table]]], dict[tuple[str, tuple[int, ...]], int]]:
    """The tables of the moving groups by tensor, and the number of entries of each place. A place is a tensor, under the
    first of its names, and the axes of a table: a group may have two axes of one tensor."""
    tables: dict[str, list[tuple[str, Table]]] = {}
    for name in moving:
        for tensor, found in spec.groups[name].tables.items():
            if tensor in weights:
                tables.setdefault(tensor, []).extend((name, table) for table in found)
    sizes = {
        (spec.aliases.get(tensor, tensor), table.dims): weights[tensor].numel()
        for tensor, found in tables.items()
        for _, table in found
    }
    return tables, sizes


def relative_error(reference: list[Tensor], outputs: list[Tensor]) -> float:
    """The largest difference of two lists of outputs, relative to the largest value of each output.

    Values that are far larger than most (the lowest number there is, where words are ruled out) are compared among
    themselves: beside them no other difference would show.
    """
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
        sizes, differences = x[finite].abs(), (x - y)[finite].abs()
        loud = sizes > LOUD * sizes[sizes > 0].median() if bool(sizes.any()) else sizes > 0
        for part in (loud, ~loud):
            if bool(part.any()):
                scale, difference = float(sizes[part].max()), float(differences[part].max())
                worst = max(worst, difference / scale if scale > 0 else difference)
    return worst


def _stays(index: Tensor) -> bool:
    return torch.equal(index, torch.arange(len(index)))


def _moved_share(spec: Symmetries, indices: Indices) -> float:
    """Share of the entries of all tensors that belong to units which change places."""
    moving = {name: index.numpy() != np.arange(len(index)) for name, index in indices.items()}
    sizes = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in spec.shapes.items()}
    moved = sum(spec.moving_share(name, moving) * sizes[name] for name in spec.tables_by_tensor)
    return moved / max(1, sum(sizes.values()))


def _guilty(
    spec: Symmetries,
    probe: Probe,
    example: Inputs,
    weights: Weights,
    reference: list[Tensor],
    whole: Indices,
    tolerance: float,
) -> str:
    """The families that change the function when they move alone."""
    identity = identity_indices(spec)
    found = []
    for family, members in spec.families.items():
        indices = identity | {name: whole[name] for name in members}
        alone = relative_error(reference, probe.outputs_of(example, act(spec, indices, weights)))
        if not alone <= tolerance:
            group = spec.groups[members[0]]
            found.append(f"{family!r} ({group.size} units in {', '.join(list(group.tables)[:3])}): {alone:.1e}")
    return "; ".join(found) if found else "none alone, only several together"


def _shapes(example: Inputs) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors_in(as_call(example)))
