"""The common base of methods that merge two networks into a module of another width: ZipIt and PLeaS."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmc.align.activations.collect import (
    CrossMoments,
    Site,
    Tap,
    Watch,
    centred,
    choose,
    groups_at,
    live_taps,
    unit_values,
)
from lmc.align.activations.matching import activation_matching
from lmc.align.transport.layerwise import guess_inputs
from lmc.align.weight_matching.matching import weight_matching
from lmc.core.progress import tqdm
from lmc.errors import InputError, WeightsError
from lmc.merge.partial.growth import Growth, Zipped, growth, widened
from lmc.merge.partial.units import BOTH, MergedUnits, numbers, zipped_weights
from lmc.network.batches import tensors
from lmc.network.batchnorm import has_batchnorm, recalibrate_batchnorm
from lmc.network.derived import Derived, Orthogonal, Spectral, derived_in, gauged, settled
from lmc.network.inputs import Call, first_of, input_batches, plain
from lmc.network.network import Network, pick_device, whole
from lmc.symmetry.find import permutation_spec
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, Weights, agreeing


@dataclass(frozen=True, eq=False)
class Pair:
    """Two networks of one architecture, B's units in A's order.

    Attributes:
        a, b: weights on the device that computes; `home` is where they came from.
        permutation: what was done to B.
        growth: which groups may change their number of units.
        batches: inputs; empty where the method works without.
    """

    spec: PermutationSpec
    network: Network
    a: Weights
    b: Weights
    permutation: Permutation
    growth: Growth
    batches: list[Call]
    home: torch.device

    def watch(self, taps: Sequence[Tap], see: Callable[[int, Tap, Tensor], None], progress: bool) -> Iterable[None]:
        """Run both networks on each batch in turn; `see(network, tap, activation)`, then control for every batch."""
        for call in tqdm(self.batches, desc="activations", unit=" batches", disable=not progress):
            for k, weights in enumerate((self.a, self.b)):
                self.network.load(weights)
                with torch.no_grad(), Watch(self.network.module, list(taps), lambda tap, x, k=k: see(k, tap, x)):
                    self.network.result(call)
            yield

    def taps(self) -> list[Tap]:
        """All taps that a forward pass goes through."""
        self.network.load(self.a)
        probe = first_of(self.batches[0], 2)
        run = lambda: self.network.result(probe)  # noqa: E731
        return live_taps(self.spec, self.network.module, run)

    def observe(self, progress: bool) -> dict[str, CrossMoments]:
        """For each group that may change its size and is seen, moments between all 2n units, A's first."""
        chosen = choose(self.spec, self.taps())
        sites: dict[Tap, list[Site]] = {}
        moments: dict[str, CrossMoments] = {}
        for tap in chosen:
            for name in set(groups_at(self.spec, tap)) & set(self.growth.sizes):
                size = self.growth.sizes[name]
                moments.setdefault(name, CrossMoments(2 * size, 2 * size, self.network.device))
                for table in self.spec.groups[name].tables[tap.tensor]:
                    if table.dims == (tap.axis,):
                        rows = torch.from_numpy(table.rows)
                        sites.setdefault(tap, []).append(Site(tap, name, rows, rows))
        values: dict[Site, list[list[Tensor]]] = {site: [[], []] for found in sites.values() for site in found}

        def see(network: int, tap: Tap, activation: Tensor) -> None:
            for site in sites[tap]:
                values[site][network].append(unit_values(activation, tap.channel, site.rows_a).clone())

        for _ in self.watch(list(sites), see, progress):
            for site, (ours, theirs) in values.items():
                for x, y in zip(ours, theirs, strict=True):
                    both = centred(torch.cat([x, y]))
                    moments[site.target].update(site, both, both)
                ours.clear()
                theirs.clear()
        for name, found in moments.items():
            found.check_finite(name, ("the two networks", "the two networks"))
        return moments

    def head_tensors(self, patterns: Sequence[str]) -> list[str]:
        """The tensors that patterns name. Raises `InputError` for none, and for tensors that compute merged units."""
        found = []
        for pattern in patterns:
            matches = fnmatch.filter(self.a, pattern)
            computing = [name for name in matches if any(not axis.reads for axis in self.growth.axes.get(name, ()))]
            if not matches or computing:
                what = f"{computing[0]} computes units that are merged" if computing else "no tensor is called so"
                raise InputError(f"heads: {pattern!r}: {what}; expected tensors of the last layer, such as 'head.*'")
            found += matches
        return list(dict.fromkeys(found))

    def heads(self, units: Mapping[str, MergedUnits], names: Sequence[str]) -> tuple[Weights, Weights]:
        """Tensors of either network alone, reading the merged units."""

        def of(network: int) -> Weights:
            # Tensors that only read are halves of both networks': twice the one and nothing of the other.
            twice = [
                {name: (2.0 * (k == network)) * state[name] for name in names}
                for k, state in enumerate((self.a, self.b))
            ]
            found = settled(zipped_weights(self.growth.axes, units, twice[0], twice[1]), self.a)
            return {name: tensor.to(self.home) for name, tensor in found.items()}

        return of(0), of(1)

    def finish(
        self, units: dict[str, MergedUnits], weights: Weights, info: dict[str, Any], heads: Sequence[str] = ()
    ) -> Zipped:
        """The merged module; running statistics are re-estimated where any units were merged and inputs are there."""
        module = widened(self.network.module, weights)
        merged = bool(self.growth.kept) or any(bool((found.owner == BOTH).any()) for found in units.values())
        if merged and self.batches and has_batchnorm(module):
            module.load_state_dict(recalibrate_batchnorm(module, weights, _with_variance(self.batches)))
        module = module.to(self.home).eval()
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        names = [name for name, _ in self.network.module.named_parameters()]
        whole = sum(self.a[name].numel() for name in names)
        stored, used = numbers(self.growth.axes, units, self.a, names)
        return Zipped(module, units, self.growth.kept, (stored / whole, used / whole), self.heads(units, heads), info)

    def zipped(self, units: Mapping[str, MergedUnits]) -> Weights:
        return settled(zipped_weights(self.growth.axes, units, self.a, self.b), self.a)


def prepare(
    spec: PermutationSpec | UnboundSpec | None,
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    inputs: Any,
    permutation: Permutation | None,
    batch_size: int,
    device: torch.device | str | None,
    progress: bool,
) -> Pair:
    """Check everything, match B's units to A's unless a permutation is given, and try which groups may grow."""
    if isinstance(models, nn.Module | Mapping) or len(models) != 2:
        count = "a single one" if isinstance(models, nn.Module | Mapping) else len(models)
        raise InputError(f"models: expected two, A and B, got {count}")
    a, b = agreeing(models, model=model)
    _check_scales(derived_in(a, model))
    a, b = gauged(a, model), gauged(b, model)
    if complex_ := next((name for name, tensor in a.items() if tensor.is_complex()), ""):
        raise WeightsError(f"{complex_}: complex weights; this method takes none, those without data do")
    network = Network(model, pick_device(device, a), whole)
    network.check(a, "a")
    home = next((tensor.device for tensor in a.values()), network.device)
    a, b = ({name: tensor.to(network.device) for name, tensor in weights.items()} for weights in (a, b))
    batches = [] if inputs is None else list(input_batches(model, inputs, batch_size))
    for call in batches[:1]:
        network.check_inputs(a, call, "inputs")
    example = plain(network.module, first_of(batches[0], 2)) if batches else guess_inputs(network.module)
    spec = permutation_spec(network.module, example, progress=progress) if spec is None else spec.bind(a)
    if permutation is None and batches:
        permutation = activation_matching(spec, model, a, b, batches, device=network.device, progress=progress)
    elif permutation is None:
        permutation = weight_matching(spec, a, b, progress=progress)
    moved = permutation.apply(b)
    return Pair(spec, network, a, moved, permutation, growth(spec, model, a, example), batches, home)


def _check_scales(found: Sequence[Derived]) -> None:
    """Raise `InputError` for layers that cannot hold sums over units: those that fix the scale of their weights."""
    for kind in found:
        if isinstance(kind, Spectral | Orthogonal):
            name = kind.weight if isinstance(kind, Spectral) else kind.coordinates
            what = "a spectral normalisation" if isinstance(kind, Spectral) else "an orthogonal parametrization"
            raise InputError(
                f"{name}: {what} fixes the scale of the weight, so that it holds no sums over merged units; make the weight "
                "a plain one first: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or "
                "torch.nn.utils.remove_spectral_norm(layer) where it was made with hooks"
            )


def per_group(ratio: float | Mapping[str, float], grown: Growth) -> dict[str, float]:
    """The ratio of each group that may change its size; of patterns that match a group the last one counts.

    Raises:
        InputError: a ratio outside [0, 1], a name that no group has, or a positive ratio for a group that cannot grow.
    """
    given = {"*": ratio} if not isinstance(ratio, Mapping) else dict(ratio)
    found = dict.fromkeys(grown.sizes, 0.0)
    for pattern, value in given.items():
        check_share(f"ratio of {pattern!r}" if isinstance(ratio, Mapping) else "ratio", value)
        matches = fnmatch.filter([*grown.sizes, *grown.kept], pattern)
        if not matches and isinstance(ratio, Mapping):
            raise InputError(
                f"ratio: no group is called {pattern!r}; there are {', '.join([*grown.sizes, *grown.kept])}"
            )
        for name in matches:
            if name in grown.sizes:
                found[name] = float(value)
            elif value > 0 and pattern == name:
                raise InputError(f"ratio of {name!r}: its units can only be merged one to one: {grown.kept[name]}")
    if isinstance(ratio, Mapping) or not ratio or grown.sizes:
        return found
    raise InputError(f"ratio={ratio}: no group can have more units; {next(iter(grown.kept.items()), 'there is none')}")


def check_share(name: str, value: Any) -> None:
    """Raise `InputError` for anything but a number from 0 to 1."""
    if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise InputError(f"{name}: expected a number from 0 to 1, got {value!r}")


def _with_variance(batches: list[Call]) -> list[Call]:
    """The batches of two examples or more, if there are any."""
    return [call for call in batches if len(tensors(call)[0]) > 1] or batches
