"""The proof by numbers: the same outputs, to rounding, in float64; and other outputs when a group is broken on purpose.

A wrong permutation changes outputs by 1e-3 or more of their size; a right one by 1e-15, and by 1e-6 where a module computes
in float32 alone, which is then held against 1e-5. Equal outputs prove nothing about
a group that the outputs do not depend on, so each group is broken once: it moves, but one of the tensors that it touches
is left behind. Where that changes nothing, other tensors and then other weights are tried. Of many groups (one for each
head of each layer) a single gradient shows what an infinitesimal breakage of each would do, on every set of weights before
anything is broken; those of which none shows anything are broken together, and by halves where that changes the outputs,
until each that matters was broken alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor, nn

from lmc.errors import CertificateError, InputError
from lmc.symmetry.groups.action import Indices, act, identity_indices, permute_tensor, random_indices
from lmc.symmetry.groups.symmetries import VISIBLE, Certificate, Evidence, Symmetries
from lmc.symmetry.proof.probe import Probe, draw, varied
from lmc.symmetry.tracing.outputs import Inputs, OutputSelector, as_call, tensors_in
from lmc.weights import ModelOrWeights, Weights, as_weights

FURTHER_DRAWS = 2
PLACES = 3
LOUD = 1e6  # times the median
MANY = 16  # groups, from which on a gradient is cheaper than as many forward passes


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
    probe = Probe(model, outputs, or_single=True)
    given = [inputs] if also is None else [inputs, also]
    examples = [*given, *_others(given, probe, model, seed)]
    power = dict.fromkeys(spec.groups, 0.0)
    turns = {name: torch.arange(group.size).roll(1) for name, group in spec.groups.items()}
    worst = moved = 0.0
    trial = 0
    many = len(spec.groups) > MANY
    while trial < trials or (trial < trials + FURTHER_DRAWS and _unseen(power, tolerance)):
        weights = draw(model, trial, seed)
        indices = random_indices(spec, seed + trial)
        references = [probe.outputs_of(example, weights) for example in examples]
        tolerance = probe.tolerance(tolerance)
        permuted = act(spec, indices, weights)
        moved = max(moved, _moved_share(spec, indices))
        for example, reference in zip(examples, references, strict=True):
            # without groups there is nothing to compare, not even where these weights give NaN
            error = relative_error(reference, probe.outputs_of(example, permuted)) if spec.groups else 0.0
            if not error <= tolerance:
                found = _guilty(spec, probe, example, weights, reference, indices, tolerance)
                raise CertificateError(
                    f"the spec does not keep the function: outputs change by {error:.1e} of their size "
                    f"(tolerance {tolerance:.0e}{_rounding(probe)}). Guilty groups: {found}"
                )
            worst = max(worst, error)
        for example, reference in zip(examples, references, strict=True):
            if many:
                _look_at_slopes(spec, turns, probe, example, weights, power, tolerance, seed + trial)
            else:
                _break(spec, turns, probe, example, weights, reference, power, tolerance)
        trial += 1
    for number in range(trial if many else 0):
        if _unseen(power, tolerance):
            weights = draw(model, number, seed)
            for example in examples:
                _break(spec, turns, probe, example, weights, probe.outputs_of(example, weights), power, tolerance)
    families = evidence_of(spec, worst, power)
    shapes = tuple(_shapes(example) for example in given)
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
    probe = Probe(model, outputs, or_single=True)
    reference = probe.outputs_of(inputs, own)
    tolerance = probe.tolerance(tolerance)
    error = relative_error(reference, probe.outputs_of(inputs, act(spec, indices, own)))
    if not error <= tolerance:
        raise CertificateError(
            f"the permuted weights compute another function: outputs differ by {error:.1e} of their size "
            f"(tolerance {tolerance:.0e}{_rounding(probe)}); call spec.certify(model, inputs) to see which group is wrong"
        )
    moving = {name: index for name, index in indices.items() if not _stays(index)}
    power = dict.fromkeys(moving, 0.0)
    if len(moving) > MANY:
        _look_at_slopes(spec, moving, probe, inputs, own, power, tolerance, seed=0)
    _break(spec, moving, probe, inputs, own, reference, power, tolerance)
    families = evidence_of(spec, error, power)
    moved = _moved_share(spec, indices)
    shapes = (_shapes(inputs),)
    return Certificate(error, tolerance, 1, len(indices), moved, shapes, probe.dtype, families, probe.names)


def _rounding(probe: Probe) -> str:
    return (
        " in float32, as the module does not compute in float64; a larger tolerance= allows for more rounding"
        if probe.single
        else ""
    )


def evidence_of(spec: Symmetries, error: float, power: Mapping[str, float]) -> dict[str, Evidence]:
    """The evidence for the groups with a power, by family."""
    found = {family: {n: power[n] for n in names if n in power} for family, names in spec.families.items()}
    return {family: Evidence(error, own) for family, own in found.items() if own}


def _unseen(power: Mapping[str, float], tolerance: float) -> list[str]:
    return [name for name, seen in power.items() if not seen > VISIBLE * tolerance]


def _look_at_slopes(
    spec: Symmetries,
    turns: Indices,
    probe: Probe,
    inputs: Inputs,
    weights: Weights,
    power: dict[str, float],
    tolerance: float,
    seed: int,
) -> None:
    """Note by how much breaking each group of which nothing was seen yet would change the outputs, to first order, relative
    to their size. Arguments as of `_break`; `seed`: of the sum of the outputs that is differentiated."""
    if hidden := _unseen(power, tolerance):
        slopes = probe.slopes(inputs, weights, seed)
        for name in hidden:
            power[name] = max(power[name], _first_order(spec, turns, name, weights, slopes))


def _break(
    spec: Symmetries,
    turns: Indices,
    probe: Probe,
    inputs: Inputs,
    weights: Weights,
    reference: list[Tensor],
    power: dict[str, float],
    tolerance: float,
) -> None:
    """Break every group of which nothing was seen yet, and note by how much the outputs change, relative to their size: one
    after the other, or together where there are many groups, most of which do not show on these weights.

    Args:
        turns: group -> the order in which its units are broken.
        power: group -> the largest change seen so far; written.
    """

    def broken(names: list[str], rank: int) -> None:
        """Groups that show nothing together show nothing alone, for no two breakages cancel on drawn weights."""
        change = relative_error(reference, probe.outputs_of(inputs, _broken(spec, turns, names, weights, rank)))
        if len(names) > 1 and change > VISIBLE * tolerance:
            broken(names[: len(names) // 2], rank)
            broken(names[len(names) // 2 :], rank)
            return
        for name in names:
            power[name] = max(power[name], change)

    many = len(power) > MANY
    for rank in range(PLACES + 1):
        hidden = [n for n in _unseen(power, tolerance) if rank == PLACES or 1 < len(_places(spec, n, weights)) > rank]
        for names in [hidden] if many and hidden else [[name] for name in hidden]:
            broken(names, rank)


def _broken(spec: Symmetries, turns: Indices, names: list[str], weights: Weights, rank: int) -> Weights:
    """The weights after groups have moved everywhere but in one place each, the largest but `rank`.

    Where a function is symmetric in each place alone, as in a sum of units, that keeps it: so at rank `PLACES` one unit of
    each is overwritten by another, which it survives only if it does not depend on the units.
    """
    left = {n: None if rank == PLACES else list(_places(spec, n, weights))[rank] for n in names}
    orders = {n: _overwritten(turns[n]) if rank == PLACES else turns[n] for n in names}
    tensors = dict.fromkeys(tensor for n in names for tensor in spec.groups[n].tables if tensor in weights)
    moving = {
        t: [(n, x) for n, x in spec.tables_by_tensor[t] if n in left and (spec.aliases.get(t, t), x.dims) != left[n]]
        for t in tensors
    }
    return weights | {t: permute_tensor(weights[t], found, orders) for t, found in moving.items() if found}


def _overwritten(order: Tensor) -> Tensor:
    """All units stay but the first that an order moves, which becomes a copy of the one that would take its place."""
    index = torch.arange(len(order))
    first = int((order != index).nonzero()[0])
    index[first] = order[first]
    return index


def _first_order(spec: Symmetries, turns: Indices, name: str, weights: Weights, slopes: Weights) -> float:
    """The largest rate at which the outputs change, relative to their size, when one place of a group moves alone."""
    rates: dict[tuple[str, tuple[int, ...]], float] = {}
    for place in _places(spec, name, weights):
        tensor, dims = place
        for table in spec.groups[name].tables[tensor] if tensor in slopes else ():
            if table.dims == dims:
                own, slope = (
                    x.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)
                    for x in (weights[tensor].detach().cpu(), slopes[tensor])
                )
                rows = torch.from_numpy(table.rows)
                step = own[rows[turns[name]]] - own[rows]
                rates[place] = rates.get(place, 0.0) + float((slope[rows].conj() * step).real.sum())
    return max(map(abs, rates.values()), default=0.0)


def _places(spec: Symmetries, name: str, weights: Weights) -> dict[tuple[str, tuple[int, ...]], int]:
    """The places of a group with their numbers of entries, the largest first. A place is a tensor, under the first of its
    names, and the axes of a table: a group may have two axes of one tensor."""
    sizes = {
        (spec.aliases.get(tensor, tensor), table.dims): weights[tensor].numel()
        for tensor, tables in spec.groups[name].tables.items()
        if tensor in weights
        for table in tables
    }
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


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
        (a, b), same = (x[~finite], y[~finite]), torch.equal(finite, torch.isfinite(y))
        if not same or not bool(((a == b) | (a.isnan() & b.isnan())).all()):
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


def _others(given: list[Inputs], probe: Probe, model: nn.Module, seed: int) -> Iterator[Inputs]:
    """Examples with noise in place of those that are of one value throughout, where the module takes them."""
    for example in given:
        other = varied(example, seed)
        if other is not None:
            with suppress(CertificateError):
                if all(bool(output.isfinite().any()) for output in probe.outputs_of(other, draw(model, 0, seed))):
                    yield other


def _shapes(example: Inputs) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors_in(as_call(example)))
