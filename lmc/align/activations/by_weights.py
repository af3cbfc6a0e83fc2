"""Decisions by weights that activations leave open: groups that no activation shows, and units that never change."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lmc.align.weight_matching.algorithm import Descent
from lmc.align.weight_matching.assignment import assign, opening_prices
from lmc.align.weight_matching.blocks import UnitBlock, build_blocks
from lmc.core.context import warn
from lmc.symmetry.groups.actions import permute_tensor
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights

_SWEEPS = 100


def match_unseen(
    spec: PermutationSpec, names: Sequence[str], fixed: Weights, moving: Weights, indices: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The indices with the named groups matched by their weights, all others staying in place. Says so in a warning."""
    warn(
        f"no module takes in or gives out the units of {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}: "
        "these groups are matched by their weights"
    )
    blocks = [block for block in build_blocks(spec, fixed) if block.name in names]
    return Descent(spec, blocks, fixed, permuted(spec, moving, indices), indices).grow_outwards().run(_SWEEPS).pi


def match_silent(
    spec: PermutationSpec,
    scores: Mapping[str, Tensor],
    fixed: Weights,
    moving: Weights,
    indices: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The indices in which units that score 0 with all others, in either network, are ordered among themselves by weights.

    Such units are constant: dead, or saturated. Activations do not tell them apart, but weights do.
    """
    found = dict(indices)
    silent = {name: _silent(score, found[name]) for name, score in scores.items() if name in found}
    todo = {name: units for name, units in silent.items() if len(units) > 1}
    if not todo:
        return found
    state = permuted(spec, moving, found)
    for block in build_blocks(spec, fixed):
        if block.name in todo:
            units = todo[block.name]
            gain = _gain(block, fixed, state, units)
            step = torch.arange(block.size)
            step[units] = units[assign(gain, opening_prices(gain))[0]]
            for name, tables in spec.groups[block.name].tables.items():
                if name in state:
                    pairs = [(block.name, table) for table in tables]
                    state[name] = permute_tensor(state[name], pairs, {block.name: step})
            found[block.name] = found[block.name][step]
    return found


def permuted(spec: PermutationSpec, tensors: Weights, indices: Mapping[str, Tensor]) -> Weights:
    """The tensors with all groups permuted."""
    tables = spec.tables_by_tensor
    return {name: permute_tensor(tensor, tables.get(name, ()), indices) for name, tensor in tensors.items()}


def _silent(score: Tensor, index: Tensor) -> Tensor:
    """The units of A that score 0 with all of B and have been given such a unit of B."""
    ours, theirs = (score == 0).all(1).cpu(), (score == 0).all(0).cpu()
    return (ours & theirs[index]).nonzero().flatten()


def _gain(block: UnitBlock, fixed: Weights, state: Weights, units: Tensor) -> Tensor:
    total = torch.zeros(len(units), len(units), dtype=torch.float64)
    for place in block.places:
        ours, theirs = (place.features(tensors[place.tensor])[units] for tensors in (fixed, state))
        total += (ours @ theirs.T).to("cpu", torch.float64)
    return total
