"""Taps: the places where units of a group can be seen in a forward pass, found from the modules, without a graph.

A tap is the input or the output of a module, and the axis of it that counts channels. The channels are the positions of
one axis of one of the module's parameters: the columns of `Linear.weight` are the channels of its input, its rows those
of its output. So the tables of a group on that axis say which channels belong to which unit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmc.network.layers import Side, sides
from lmc.symmetry.spec import PermutationSpec

# Parametrised weights (weight norm, pruning) keep a tensor of the weight's shape under another name.
_WEIGHT_NAMES = (
    "weight",
    "weight_v",
    "weight_orig",
    "parametrizations.weight.original1",
    "parametrizations.weight.original",
)


@dataclass(frozen=True)
class Tap:
    """The channels of a module's input or output.

    Attributes:
        module: name of the module.
        side: whether its input or its output is looked at.
        channel: the axis of the activation that counts channels.
        tensor, axis: the parameter, and the axis of it, whose positions are these channels.
    """

    module: str
    side: Side
    channel: int
    tensor: str
    axis: int

    @property
    def name(self) -> str:
        return f"{self.side} of {self.module}"


def candidates(spec: PermutationSpec, model: nn.Module) -> list[Tap]:
    """Every tap of the model on whose channels some group of the spec has units."""
    found = []
    for name, module in model.named_modules():
        for tensor in (f"{name}.{own}" if name else own for own in _WEIGHT_NAMES):
            tables = spec.tables_by_tensor.get(tensor, ())
            moving = {table.dims[0] for _, table in tables if len(table.dims) == 1}
            found += [Tap(name, side, channel, tensor, axis) for axis, side, channel in sides(module) if axis in moving]
    return found


class Watch:
    """Hooks that hand the activations at some taps to `see(tap, activation)` during every forward pass, while open."""

    def __init__(self, model: nn.Module, taps: list[Tap], see: Callable[[Tap, Tensor], None]) -> None:
        modules = dict(model.named_modules())
        self._handles = []
        for tap in taps:
            module = modules[tap.module]
            if tap.side == "input":
                hook = module.register_forward_pre_hook(_input_hook(tap, see), with_kwargs=True)
            else:
                hook = module.register_forward_hook(_output_hook(tap, see))
            self._handles.append(hook)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _input_hook(tap: Tap, see: Callable[[Tap, Tensor], None]):
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(tap, args[0] if args else next(iter(kwargs.values())))

    return hook


def _output_hook(tap: Tap, see: Callable[[Tap, Tensor], None]):
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        see(tap, output)

    return hook


@torch.no_grad()
def live_taps(spec: PermutationSpec, model: nn.Module, run: Callable[[], object]) -> list[Tap]:
    """The candidates that a forward pass `run` of the model really passes, each activation once.

    A module whose parameters are used without calling it is not passed. Where several modules read one and the same
    tensor through the same tables (query, key and value maps), only the first is kept.
    """
    seen: dict[Tap, list[Tensor]] = {}

    def see(tap: Tap, activation: Any) -> None:
        length = spec.shapes[tap.tensor][tap.axis]
        if isinstance(activation, Tensor) and activation.ndim >= -tap.channel:
            if activation.ndim > tap.channel and activation.shape[tap.channel] == length:
                seen.setdefault(tap, []).append(activation)

    taps = candidates(spec, model)
    with Watch(model, taps, see):
        run()
    kept: list[Tap] = []
    for tap in taps:
        twins = (other for other in kept if other.side == tap.side and _same(seen[tap], seen[other]))
        if tap in seen and not any(_rows(spec, tap) == _rows(spec, other) for other in twins):
            kept.append(tap)
    return kept


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(x is y for x, y in zip(left, right, strict=True))


def _rows(spec: PermutationSpec, tap: Tap) -> list[tuple[str, bytes]]:
    return [
        (name, table.rows.tobytes()) for name, table in spec.tables_by_tensor[tap.tensor] if table.dims == (tap.axis,)
    ]


def groups_at(spec: PermutationSpec, tap: Tap) -> list[str]:
    """The groups that have units among the channels of a tap."""
    tables = spec.tables_by_tensor[tap.tensor]
    return list(dict.fromkeys(name for name, table in tables if table.dims == (tap.axis,)))


def choose(spec: PermutationSpec, taps: list[Tap], prefer: Side = "input") -> list[Tap]:
    """For each family the taps on the preferred side, or those on the other side where it has none.

    Inputs of the modules that consume the units are activations after the nonlinearity, what Git Re-Basin matches
    (Ainsworth et al. 2023, section 3.1); outputs of the modules that produce them are taken before it, as in OT fusion.
    """
    families = {tap: {spec.groups[name].family for name in groups_at(spec, tap)} for tap in taps}
    first = [tap for tap in taps if tap.side == prefer]
    seen = {family for tap in first for family in families[tap]}
    return [tap for tap in taps if tap.side == prefer or families[tap] - seen]
