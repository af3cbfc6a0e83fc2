"""Activation matching: units that do the same on the same inputs (Li et al. 2015; Ainsworth et al. 2023, section 3.1).

Groups are sorted by what their matching depends on: alone, or together with others that own the same channels.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lmc.align.activations.collect import CrossMoments, Site, Tap, choose, collect, groups_at, live_taps
from lmc.align.weight_matching.algorithm import Descent
from lmc.align.weight_matching.blocks import UnitBlock, build_blocks
from lmc.align.weight_matching.gains import assign, inner_product, opening_prices
from lmc.align.weight_matching.matching import matched
from lmc.core.context import own_context, warn
from lmc.errors import InputError
from lmc.network.inputs import first_of, input_batches
from lmc.network.network import Network, pick_device
from lmc.symmetry.groups.action import act, permute_tensor
from lmc.symmetry.groups.group import Group, Table
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, Weights, agreeing

_SWEEPS = 100
Method = Literal["correlation", "cross-product"]


@own_context
def activation_matching(
    spec: PermutationSpec | UnboundSpec,
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    inputs: Any,
    *,
    method: Method = "correlation",
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Permutation:
    """The permutation under which B's units act most like A's on the same inputs, group by group.

    For each group, `p` maximises `sum_i G[i, p[i]]`. With "cross-product", `G = Z_A^T Z_B`, which makes `|Z_A - Z_B[p]|`
    smallest (Ainsworth et al. 2023, eq. 1); with "correlation", G holds the Pearson correlations (Li et al. 2015, used by
    REPAIR, Jordan et al. 2023), which do not see the scale of a unit. Positions of a convolution, or of a sequence, are
    samples. One pass over the inputs, both networks in eval mode; groups do not depend on each other.

    A group is looked at where its units enter the modules that consume them (after the nonlinearity), at all such places
    of a residual stream; where there is none, as for queries and keys, where they leave the modules that produce them.
    Units nested in others (within heads) are matched for every pair of these. Units that are constant in both networks,
    dead or saturated, are matched by their weights, and so are, with a warning, groups whose units pass no module that we
    know (parameters used by functions alone). Where positions themselves may be permuted (an array of latents), samples
    of the two networks do not correspond, and weight matching is the better choice.

    Args:
        spec: the symmetries of the architecture.
        model: the architecture; neither changed nor read for weights.
        a, b: modules or state dicts on one device; neither is changed.
        inputs: a tensor `(N, ...)`, a mapping of keyword tensors, a tuple of tensors, an object with `.train`, or an
            iterable of such batches. A pair is `(inputs, targets)`; targets are not used.
        method: what to maximise.
        batch_size: examples at a time, where `inputs` is not cut into batches already.
        device: where to run (default: where the weights are).
        progress: show a bar when it takes longer than two seconds.

    Returns:
        The permutation, with `.objective` (the sum over the groups that were seen) and, in `.info`, the taps, samples and
        constant units of each group and the groups that were matched by weights.

    Raises:
        MismatchError: `a` and `b` differ in keys, shapes or device.
        SpecError: the spec does not fit them.
        DataError: no inputs, or activations that are not finite.
        WeightsError: weights that are not finite.

    Example:
        >>> import lmc
        >>> data, model = lmc.data.digits(), lmc.data.checkpoint("digits-mlp64").model()
        >>> spec = lmc.permutation_spec(model, data.test[0][:2])
        >>> b = spec.random(seed=0).apply(model)  # the same network, its units in another order
        >>> pi = lmc.activation_matching(spec, model, model, b, data.train)
        >>> lmc.weights.distance(model, pi.apply(b))
        0.0
    """
    if method not in get_args(Method):
        raise InputError(f"method={method!r}: expected one of {', '.join(map(repr, get_args(Method)))}")
    started = time.perf_counter()
    a, b = agreeing([a, b], "ab", model=model)
    spec = spec.bind(a)
    network = Network(model, pick_device(device, a))
    network.check(a, "a")
    a, b = ({name: tensor.to(network.device) for name, tensor in weights.items()} for weights in (a, b))

    network.load(a)
    batches = input_batches(model, inputs, batch_size)
    first = next(batches)
    probe = first_of(first, 2)
    network.check_inputs(a, probe, "inputs")
    taps = choose(spec, live_taps(spec, network.module, lambda: network.result(probe)))
    seen, unseen = clusters(spec, taps)
    sites = [site for cluster in seen for site in cluster.sites(spec)]
    moments = collect((network, network), (a, b), sites, chain([first], batches), progress)
    _warn_if_few(moments)
    scores = {name: m.correlation() if method == "correlation" else m.cross_product() for name, m in moments.items()}

    indices = spec.identity().indices
    objective = naive = 0.0
    for cluster in seen:
        found, value, stay = cluster.match(spec, scores)
        indices |= found
        objective, naive = objective + value, naive + stay
    fixed, moving = matched(spec, a), matched(spec, b)
    indices = match_silent(spec, scores, fixed, moving, indices)
    by_weights = [name for cluster in unseen for name in cluster.groups]
    if by_weights:
        indices = match_unseen(spec, by_weights, fixed, moving, indices)
    info = {
        "method": "activation_matching",
        "statistic": method,
        "objective_at_identity": naive,
        "samples": {name: m.samples for name, m in moments.items()},
        "constant_units": {name: [int(c.sum()) for c in m.constant()] for name, m in moments.items()},
        "taps": {name: [site.tap.name for site in sites if site.target == name] for name in moments},
        "by_weights": by_weights,
        "seconds": time.perf_counter() - started,
    }
    return Permutation(spec, indices, objective, info)


def _warn_if_few(moments: Mapping[str, CrossMoments]) -> None:
    few = [name for name, m in moments.items() if m.samples < len(m.product)]
    if few:
        m = moments[few[0]]
        warn(
            f"{few[0]}: {m.samples} samples for {len(m.product)} units leave the matching open"
            + (f" (and {len(few) - 1} more groups)" if len(few) > 1 else "")
            + "; pass more inputs"
        )


def match_unseen(
    spec: PermutationSpec, names: Sequence[str], fixed: Weights, moving: Weights, indices: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The indices with the named groups matched by their weights, all others staying in place. Says so in a warning."""
    warn(
        f"no module takes in or gives out the units of {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}: "
        "these groups are matched by their weights"
    )
    blocks = [block for block in build_blocks(spec, fixed) if block.name in names]
    return Descent(spec, blocks, fixed, act(spec, indices, moving), indices).grow_outwards().run(_SWEEPS).pi


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
    state = act(spec, found, moving)
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


_STAY = 1e-9


@dataclass(frozen=True)
class Cluster:
    """Groups that are matched together: one within another, or two that order the same channels.

    Attributes:
        groups: their names; a single one is matched by one assignment.
        taps: where they are seen.
    """

    groups: tuple[str, ...]
    taps: tuple[Tap, ...]

    @property
    def name(self) -> str:
        return self.groups[0]

    def sites(self, spec: PermutationSpec) -> list[Site]:
        """The channels to observe: the units of a lone group, else all channels of each tap."""
        if len(self.groups) == 1:
            return [
                Site(tap, self.name, torch.from_numpy(table.rows), torch.from_numpy(table.rows))
                for tap in self.taps
                for table in spec.groups[self.name].tables[tap.tensor]
                if table.dims == (tap.axis,)
            ]
        every = {tap: torch.arange(spec.shapes[tap.tensor][tap.axis])[:, None] for tap in self.taps}
        return [Site(tap, tap.name, rows, rows) for tap, rows in every.items()]

    def match(self, spec: PermutationSpec, scores: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float, float]:
        """The best permutations for the scores `(n, n)` of the sites: (indices, their score, the score of the identity)."""
        if len(self.groups) > 1:
            return self._match_together(spec, scores)
        score = scores[self.name]
        favoured = score.clone()
        favoured.diagonal().add_(_STAY * max(map(abs, score.aminmax())))
        index, _ = assign(favoured, opening_prices(favoured))
        stay = float(score.diagonal().sum())
        value = float(score.gather(1, index[:, None].to(score.device)).sum())
        return {self.name: index}, value, stay

    def _match_together(
        self, spec: PermutationSpec, scores: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], float, float]:
        """Weight matching of the scores, as a tensor that only B's channels move along.

        `sum_k G[k, p[k]]` is the inner product of G with the identity matrix whose rows are permuted by p.
        """
        tensors = {tap.name: scores[tap.name] for tap in self.taps}
        groups = {name: self._observed(spec, spec.groups[name]) for name in self.groups}
        small = PermutationSpec(groups, {name: tuple(score.shape) for name, score in tensors.items()})
        still = {name: torch.eye(len(score), dtype=score.dtype, device=score.device) for name, score in tensors.items()}
        favoured = {name: score + _STAY * score.abs().max() * still[name] for name, score in tensors.items()}
        descent = Descent(small, build_blocks(small, tensors), favoured, still).grow_outwards().run(_SWEEPS)
        return dict(descent.pi), inner_product(tensors, descent.state), inner_product(tensors, still)

    def _observed(self, spec: PermutationSpec, group: Group) -> Group:
        tables = {
            tap.name: found
            for tap in self.taps
            if (found := tuple(Table((0,), t.rows) for t in group.tables.get(tap.tensor, ()) if t.dims == (tap.axis,)))
        }
        return Group(group.name, group.size, tables, group.family, group.within)


def clusters(spec: PermutationSpec, taps: Sequence[Tap]) -> tuple[list[Cluster], list[Cluster]]:
    """All groups of the spec in clusters: those that are seen at the taps, and those of which some group is not."""
    leader = {name: name for name in spec.groups}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    def join(names: Iterable[str]) -> None:
        first, *others = map(find, names)
        for other in others:
            leader[find(other)] = find(first)

    for group in spec.groups.values():
        join([group.name, *(parent for parent, _ in group.within)])
    seen_at: dict[str, list[Tap]] = {}
    for tap in taps:
        for name in groups_at(spec, tap):
            seen_at.setdefault(name, []).append(tap)
        for names in _sharing(spec, tap):
            join(names)
    members: dict[str, list[str]] = {}
    for name in spec.groups:
        members.setdefault(find(name), []).append(name)
    seen, unseen = [], []
    for names in members.values():
        at = tuple(dict.fromkeys(tap for name in names for tap in seen_at.get(name, ())))
        (seen if all(name in seen_at for name in names) else unseen).append(Cluster(tuple(names), at))
    return seen, unseen


def _sharing(spec: PermutationSpec, tap: Tap) -> list[list[str]]:
    """Pairs of groups that own a channel of the tap in common."""
    owner = np.full(spec.shapes[tap.tensor][tap.axis], -1)
    names: list[str] = []
    pairs = []
    for name, table in spec.tables_by_tensor[tap.tensor]:
        if table.dims == (tap.axis,):
            pairs += [[names[k], name] for k in np.unique(owner[table.rows]) if k >= 0 and names[k] != name]
            owner[table.rows] = len(names)
            names.append(name)
    return pairs
