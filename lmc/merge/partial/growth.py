"""Modules of another width: the groups that may get units of their own from either network, tried out in float64.

MergedUnits can be added where they neither disturb others nor meet a size written into the code. Both is seen by doing it:
with units that compute anything and that nothing reads, and with every unit twice, the module must compute the same."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from lmc.align.activations.collect import candidates
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError, LmcError
from lmc.merge.partial.units import Axes, Axis, Member, MergedUnits, Stretch, zipped_weights
from lmc.network.batches import to_device
from lmc.network.copies import fresh_copy
from lmc.network.derived import settled
from lmc.network.inputs import Call
from lmc.network.network import Network
from lmc.symmetry.groups.group import Group, Table
from lmc.symmetry.spec import PermutationSpec
from lmc.symmetry.tracing.outputs import in_one_row
from lmc.weights import StateDict, Weights, as_weights

if TYPE_CHECKING:
    import pandas as pd


def widened(module: nn.Module, weights: Weights) -> nn.Module:
    """A copy of a module that holds `weights`, which may have other shapes, with the sizes that its layers remember.

    Sizes that a module of one's own has written into its forward are not known here: whether it runs is to be tried.
    """
    wide = fresh_copy(module)
    for name, tensor in weights.items():
        path, _, leaf = name.rpartition(".")
        owner = wide.get_submodule(path)
        old = getattr(owner, leaf)
        if old.shape == tensor.shape:
            old.data = tensor.clone()
        elif isinstance(old, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(tensor.clone(), requires_grad=old.requires_grad))
        else:
            setattr(owner, leaf, tensor.clone())
    for layer in wide.modules():
        for attribute, value in _sizes(layer).items():
            setattr(layer, attribute, value)
    return wide


def _sizes(layer: Any) -> dict[str, Any]:
    """The attributes in which a layer of torch remembers sizes, as its tensors have them."""
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.RNNBase):
        tensors = dict(layer.named_parameters())
        return {"input_size": tensors["weight_ih_l0"].shape[1], "hidden_size": tensors["weight_hh_l0"].shape[1]}
    if isinstance(layer, _BatchNorm | _InstanceNorm):
        known = weight if weight is not None else layer.running_mean
        return {} if known is None else {"num_features": len(known)}
    if not isinstance(weight, Tensor):
        return {}
    shape = tuple(weight.shape)
    if isinstance(layer, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(layer, _ConvTransposeNd):
        return {"in_channels": shape[0], "out_channels": shape[1] * layer.groups}
    if isinstance(layer, _ConvNd):  # in groups: one filter, or several, for each channel
        groups = 1 if layer.groups == 1 else shape[0] * layer.groups // layer.out_channels
        return {"out_channels": shape[0], "groups": groups, "in_channels": shape[1] * groups}
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": shape}
    if isinstance(layer, nn.GroupNorm):
        return {"num_channels": shape[0]}
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(layer, nn.PReLU):
        return {"num_parameters": weight.numel()}
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # GPT-2's linear layer, weight (in, out)
        return {"nf": shape[1]}
    return {}


@dataclass(frozen=True, eq=False)
class Zipped(Result):
    """Two networks in one module, which may be wider than either.

    Attributes:
        module: computes; in eval mode, on the device and in the dtype of the networks.
        units: for each group that may change its size, which units of A and of B (in A's order) each new unit stands for.
        kept: the other groups, whose units were averaged one to one -> why.
        heads: tensors that either network answers with alone, where that was asked for; see `answering`.
        parameters: (stored, used): the parameters of `module` relative to those of one network, and without the zeros
            between what is A's alone and what is B's alone.
        info: how it was made.
    """

    module: nn.Module = field(repr=False)
    units: dict[str, MergedUnits]
    kept: dict[str, str]
    parameters: tuple[float, float]
    heads: tuple[Weights, Weights] = field(default=({}, {}), repr=False)
    info: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def weights(self) -> StateDict:
        """The state dict of the module."""
        return as_weights(self.module)

    def answering(self, network: int) -> nn.Module:
        """A copy of the module with the heads of A (0) or of B (1) on the merged body.

        Raises:
            InputError: another number, or no heads were named when the networks were merged.
        """
        if network not in (0, 1) or not self.heads[0]:
            raise InputError(f"network={network!r}: expected 0 or 1, and heads=[...] named when merging")
        return widened(self.module, self.weights | self.heads[network]).eval()

    def to_frame(self) -> "pd.DataFrame":
        """A row for each group that may change its size: group, and its units made of both networks', of A's and of B's."""
        rows = [(group, *units.counts) for group, units in self.units.items()]
        return require("pandas").DataFrame(rows, columns=["group", "of both", "of A", "of B"])

    @classmethod
    def load(cls, file: str | Path, model: nn.Module) -> "Zipped":
        """Read what `save` wrote, weights into a copy of `model` (the architecture of one network) that is made to fit.

        Raises:
            DataError: a file that holds something else.
        """
        found = super().load(file)
        return replace(found, module=widened(model, cast(Weights, found.module)).eval())  # written as its weights

    def __str__(self) -> str:
        stored, used = self.parameters
        lines = [
            f"Zipped by {self.info.get('method')}: {used:.2f} times the parameters of one network "
            f"({stored:.2f} with the zeros between the two)"
        ]
        lines += [f"  {name}: {units!r}" for name, units in self.units.items()]
        for reason in dict.fromkeys(self.kept.values()):
            names = [name for name, why in self.kept.items() if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {', '.join(names[:3])}{more}: one to one, {reason}")
        return "\n".join(lines)

    __repr__ = __str__


_TOLERANCE = 1e-9
_ADDED = 2


@dataclass(frozen=True)
class Growth:
    """The places of the units of a spec, and the groups whose sizes may differ from the spec's.

    Attributes:
        axes: for each tensor the axes on which groups that may grow have units.
        sizes: those groups with the number of their units.
        kept: the other groups -> why their units can only be merged one to one.
    """

    axes: Axes
    sizes: dict[str, int]
    kept: dict[str, str]


@torch.no_grad()
def growth(spec: PermutationSpec, module: nn.Module, weights: Weights, example: Call) -> Growth:
    """The groups of a module that may grow, each tried out on an example with the given weights."""
    device = next(iter(weights.values())).device
    wide = fresh_copy(module).double().eval().to(device)
    state = settled({name: x.double() if x.is_floating_point() else x for name, x in weights.items()}, weights)
    example = _double(to_device(example, device))
    network = Network(wide, device, in_one_row)
    network.load(state)
    reference = network(example)
    sides = _sides(spec, module)
    kept: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for group in spec.groups.values():
        reason = _unfit(spec, group)
        if reason is None:
            axes = _axes(spec, sides, {group.name})
            reason = _computes_two(axes) or _fails(network, wide, state, axes, group, example, reference)
        if reason is None:
            sizes[group.name] = group.size
        else:
            kept[group.name] = reason
    axes = _axes(spec, sides, set(sizes))
    return Growth(axes, sizes, kept)


def _double(example: Call) -> Call:
    if isinstance(example, Mapping):
        return {name: x.double() if x.is_floating_point() else x for name, x in example.items()}
    if isinstance(example, Tensor):
        return example.double() if example.is_floating_point() else example
    return tuple(x.double() if x.is_floating_point() else x for x in example)


def _sides(spec: PermutationSpec, module: nn.Module) -> dict[tuple[str, int], bool]:
    """Whether units are consumed along an axis; outside the modules we know, matrices have their inputs second."""
    known = {(tap.tensor, tap.axis): tap.side == "input" for tap in reversed(candidates(spec, module))}
    return {
        (tensor, axis): known.get((tensor, axis), axis == 1 and len(shape) == 2)
        for tensor, shape in spec.shapes.items()
        for axis in range(len(shape))
    }


def _unfit(spec: PermutationSpec, group: Group) -> str | None:
    """The reason in the spec for which a group cannot grow; None where that has to be tried."""
    if group.within:
        return f"its units are within those of {group.within[0][0]}"
    if any(parent == group.name for other in spec.groups.values() for parent, _ in other.within):
        return "other groups are within its units"
    shared = set(spec.aliases) | set(spec.aliases.values())
    for tensor, tables in group.tables.items():
        if tensor in shared:
            return f"{tensor} is used in two places"
        for table in tables:
            if len(table.dims) != 1 or blocks(table) is None:
                return f"its units are in no regular order in {tensor}"
            taken = [
                rows.rows
                for name, rows in spec.tables_by_tensor[tensor]
                if rows is not table and rows.dims == table.dims and name != group.name
            ]
            if any(np.isin(table.rows, rows).any() for rows in taken):
                return f"its units share positions of {tensor} with another group"
    return None


def blocks(table: Table) -> list[tuple[int, int]] | None:
    """The runs `(start, stop)` of an axis in which all units follow one another, each with equally many positions.

    Pixels of a channel in a row are one run; gates that are stacked are one run for each. None if there are none.
    """
    rows = np.sort(table.rows, axis=1)
    n, m = rows.shape
    step = int(rows[1, 0] - rows[0, 0])
    starts = rows[0, ::step] if 0 < step <= m and m % step == 0 else np.empty(0, dtype=int)
    expected = starts[None, :, None] + step * np.arange(n)[:, None, None] + np.arange(step)
    if not len(starts) or not np.array_equal(expected.reshape(n, m), rows) or (table.rows != rows).any():
        return None
    return [(int(start), int(start) + n * step) for start in starts]


def _axes(
    spec: PermutationSpec, sides: Mapping[tuple[str, int], bool], groups: set[str]
) -> dict[str, tuple[Axis, ...]]:
    """The axes with units of these groups, cut into pieces."""
    found: dict[str, tuple[Axis, ...]] = {}
    for tensor, tables in spec.tables_by_tensor.items():
        at: dict[int, list[Stretch]] = {}
        for name, table in tables:
            if name in groups:
                at.setdefault(table.dims[0], []).extend(Stretch(*run, name) for run in blocks(table) or ())
        found[tensor] = tuple(
            Axis(axis, _filled(sorted(pieces), spec.shapes[tensor][axis]), sides[tensor, axis])
            for axis, pieces in sorted(at.items())
        )
    return {tensor: axes for tensor, axes in found.items() if axes}


def _filled(pieces: list[Stretch], length: int) -> tuple[Stretch, ...]:
    """The pieces with those between them that belong to no group."""
    found, at = [], 0
    for piece in (*pieces, Stretch(length, length, None)):
        if piece.start > at:
            found.append(Stretch(at, piece.start, None))
        if piece.stop > piece.start:
            found.append(piece)
        at = piece.stop
    return tuple(found)


def _computes_two(axes: Axes) -> str | None:
    for tensor, found in axes.items():
        if sum(not axis.reads for axis in found) > 1:
            return f"{tensor} computes its units along two axes"
    return None


def _fails(
    network: Network,
    module: nn.Module,
    weights: Weights,
    axes: Axes,
    group: Group,
    example: Call,
    reference: Tensor,
) -> str | None:
    """The reason for which the module does not compute the same with more units in a group; None if it does."""
    generator = torch.Generator().manual_seed(0)
    computing = {name for name, found in axes.items() if any(not axis.reads for axis in found)}
    reading = set(axes) - computing
    ours: list[Member] = [((i,), ()) for i in range(group.size)]
    theirs: list[Member] = [((), (i,)) for i in range(group.size)]
    idle = MergedUnits(group.size, (*ours, *theirs[:_ADDED]))
    twice = MergedUnits(group.size, (*ours, *theirs))
    doubled = {name: 2.0 * x if name in reading else x for name, x in weights.items()}
    anything = {
        name: torch.zeros_like(x) if name in reading else _changed(x, generator) if name in computing else x
        for name, x in weights.items()
    }
    for units, a, b, what in (
        (idle, doubled, anything, "its units act on one another (as in layer normalisation)"),
        (twice, weights, weights, "it is not clear where its units are computed and where they are consumed"),
    ):
        try:
            larger = widened(module, settled(zipped_weights(axes, {group.name: units}, a, b), weights))
            outputs = network.alike(larger)(example)
        except (LmcError, RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"the module does not run with more units ({str(error).splitlines()[0][:100]})"
        if outputs.shape != reference.shape:
            return f"with more units the module returns {tuple(outputs.shape)}, not {tuple(reference.shape)}"
        off = float((outputs - reference).abs().max())
        if not off <= _TOLERANCE * max(1.0, float(reference.abs().max())):
            return what
    return None


def _changed(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The tensor with each value off by up to a quarter: variances stay positive, dead units may come alive."""
    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
    return tensor * (0.75 + 0.5 * noise) + (0.1 * noise if bool((tensor >= 0).all()) else 0.2 * noise - 0.1)
