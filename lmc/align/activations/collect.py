"""Second moments between the units of two networks on the same inputs, streamed over batches in one pass.

A tap is the input or the output of a module, and the axis of it that counts channels. The channels are the positions of
one axis of one of the module's parameters: the columns of `Linear.weight` are the channels of its input, its rows those
of its output. So the tables of a group on that axis say which channels belong to which unit.

Products of centred values are made in the dtype of the activations and summed in float64, where a few batches at a time
are added (`lmc.network.moments.joined`). What is kept is one matrix per group, on the device that runs the networks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmc.core.progress import tqdm
from lmc.errors import DataError
from lmc.network.inputs import Call
from lmc.network.layers import Side, sides
from lmc.network.moments import joined
from lmc.network.network import Network
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights

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


# A unit whose spread is below this share of its mean square has no variance beyond rounding: it is constant.
_ROUNDING = 1e-12
# So many samples are summed up in the dtype of the activations before the sum goes over into float64.
_SAMPLES_AT_A_TIME = 8192


@dataclass(frozen=True, eq=False)
class Site:
    """Channels of a tap that belong to the units of one target.

    Attributes:
        tap: where to look.
        target: the name under which statistics are summed (a group, or the tap itself).
        rows_a, rows_b: `(n_a, m)` and `(n_b, m)` channels of each unit in either network; each column is a sample more.
    """

    tap: Tap
    target: str
    rows_a: Tensor
    rows_b: Tensor


class CrossMoments:
    """Centred second moments of `n_a` units of one network and `n_b` of another, over all sites of a target.

    Attributes:
        square_a, square_b: `(n_a,)`, `(n_b,)`, `sum (z - mean)²`.
        samples: examples times positions over which the sums run.
    """

    def __init__(self, n_a: int, n_b: int, device: torch.device) -> None:
        self._product = torch.zeros(n_a, n_b, dtype=torch.float64, device=device)
        self._recent: Tensor | None = None  # what the last batches add to it, in their dtype
        self._recent_samples = 0
        self.square_a = torch.zeros(n_a, dtype=torch.float64, device=device)
        self.square_b = torch.zeros(n_b, dtype=torch.float64, device=device)
        self.samples = 0
        self._means: dict[Site, tuple[int, Tensor, Tensor]] = {}

    def update(self, site: Site, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
        """Take in one batch: for either network the centred values `(n, samples)` and the mean `(n,)` in float64."""
        (values_a, mean_a), (values_b, mean_b) = a, b
        new = values_a.shape[1]
        before, old_a, old_b = self._means.get(site, (0, torch.zeros_like(mean_a), torch.zeros_like(mean_b)))
        mean_a, shift_a, weight = joined(before, old_a, new, mean_a)
        mean_b, shift_b, _ = joined(before, old_b, new, mean_b)
        if self._recent is None:
            self._recent = values_a @ values_b.T
        else:
            self._recent.addmm_(values_a, values_b.T)
        self._recent_samples += new
        if self._recent_samples >= _SAMPLES_AT_A_TIME:
            self._fold()
        if before:
            self._product.addr_(shift_a, shift_b, alpha=weight)
        self.square_a += values_a.square().sum(1) + weight * shift_a.square()
        self.square_b += values_b.square().sum(1) + weight * shift_b.square()
        self._means[site] = (before + new, mean_a, mean_b)
        self.samples += new

    def _fold(self) -> None:
        if self._recent is not None:
            self._product += self._recent
            self._recent, self._recent_samples = None, 0

    @property
    def product(self) -> Tensor:
        """`(n_a, n_b)` float64: `sum (z_a - mean) (z_b - mean)`; means are those of each site."""
        self._fold()
        return self._product

    def cross_product(self) -> Tensor:
        """`(n_a, n_b)`: the uncentred `sum z_a z_b`."""
        total = self.product.clone()
        for count, mean_a, mean_b in self._means.values():
            total.addr_(mean_a, mean_b, alpha=count)
        return total

    def uncentred_squares(self) -> tuple[Tensor, Tensor]:
        """`(n_a,)` and `(n_b,)`: the uncentred `sum z²`."""
        square_a, square_b = self.square_a.clone(), self.square_b.clone()
        for count, mean_a, mean_b in self._means.values():
            square_a += count * mean_a.square()
            square_b += count * mean_b.square()
        return square_a, square_b

    def constant(self) -> tuple[Tensor, Tensor]:
        """`(n_a,)` and `(n_b,)` bool: units that have one value on all inputs."""
        whole_a, whole_b = self.uncentred_squares()
        return self.square_a <= _ROUNDING * whole_a, self.square_b <= _ROUNDING * whole_b

    def correlation(self) -> Tensor:
        """`(n_a, n_b)`: Pearson correlations; 0 for constant units."""
        still_a, still_b = self.constant()
        scale_a = torch.where(still_a, 0.0, self.square_a.clamp_min(torch.finfo(torch.float64).tiny).rsqrt())
        scale_b = torch.where(still_b, 0.0, self.square_b.clamp_min(torch.finfo(torch.float64).tiny).rsqrt())
        return scale_a[:, None] * self.product * scale_b

    def check_finite(self, target: str, names: tuple[str, str]) -> None:
        """Raise `DataError` if the activations held NaN or infinity."""
        if not bool(torch.isfinite(self.square_a.sum() + self.square_b.sum())):
            which = names[0] if not bool(torch.isfinite(self.square_a.sum())) else names[1]
            where = ", ".join(sorted({site.tap.name for site in self._means}))
            raise DataError(
                f"{target}: activations of {which} hold NaN or infinity (seen at {where}); check the inputs"
            )


def collect(
    networks: tuple[Network, Network],
    weights: tuple[Weights, Weights],
    sites: Sequence[Site],
    batches: Iterable[Call],
    progress: bool,
    names: tuple[str, str] = ("a", "b"),
) -> dict[str, CrossMoments]:
    """Run both networks over the batches and sum up what the sites show; the networks may be one and the same object.

    `names` are what messages call the two.
    """
    device = networks[0].device
    moments: dict[str, CrossMoments] = {}
    for site in sites:
        if site.target not in moments:
            moments[site.target] = CrossMoments(len(site.rows_a), len(site.rows_b), device)
    bar = tqdm(batches, desc="activations", unit=" batches", disable=not progress)
    for call in bar:
        seen_a = _run(networks[0], weights[0], [(site, site.rows_a) for site in sites], call)
        seen_b = _run(networks[1], weights[1], [(site, site.rows_b) for site in sites], call)
        for site in sites:
            for a, b in zip(seen_a[site], seen_b[site], strict=True):
                moments[site.target].update(site, a, b)
    for target, found in moments.items():
        found.check_finite(target, names)
    return moments


@torch.no_grad()
def _run(
    network: Network, weights: Weights, sites: Sequence[tuple[Site, Tensor]], call: Call
) -> Mapping[Site, list[tuple[Tensor, Tensor]]]:
    """For each site the centred values and the mean, once for every time its module is called in the forward pass."""
    at: dict[Tap, list[tuple[Site, Tensor]]] = {}
    for site, rows in sites:
        at.setdefault(site.tap, []).append((site, rows))
    seen: dict[Site, list[tuple[Tensor, Tensor]]] = {site: [] for site, _ in sites}

    def see(tap: Tap, activation: Tensor) -> None:
        for site, rows in at[tap]:
            seen[site].append(centred(unit_values(activation, tap.channel, rows)))

    network.load(weights)
    with Watch(network.module, list(at), see):
        network.result(call)
    return seen


def unit_values(activation: Tensor, channel: int, rows: Tensor) -> Tensor:
    """`(n, samples)`: the values of each unit, all its channels and all other axes being samples; float32 at least.

    In the order of memory that the activation has, where that is possible. Real and imaginary parts are two samples.
    """
    if activation.is_complex():
        channel, activation = channel % activation.ndim, torch.view_as_real(activation.resolve_conj())
    if channel in (-1, activation.ndim - 1):
        values = activation.reshape(-1, activation.shape[-1]).T
    else:
        values = activation.movedim(channel, 0).flatten(1)
    values = values.to(torch.promote_types(activation.dtype, torch.float32))
    if not _is_arange(rows, len(values)):
        values = values.index_select(0, rows.flatten().to(values.device))
    return values.reshape(len(rows), -1)


def centred(values: Tensor) -> tuple[Tensor, Tensor]:
    """A fresh copy of the values without their mean, and the mean: layers that work in place cannot spoil it."""
    mean = values.mean(1)
    return values - mean[:, None], mean.double()


def _is_arange(rows: Tensor, length: int) -> bool:
    return rows.numel() == length and bool((rows.flatten() == torch.arange(length)).all())
