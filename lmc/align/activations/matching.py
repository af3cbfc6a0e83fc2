"""Activation matching: units that do the same on the same inputs (Li et al. 2015; Ainsworth et al. 2023, section 3.1)."""

import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lmc.align.activations.clusters import clusters
from lmc.align.activations.collect import CrossMoments, collect
from lmc.align.activations.taps import choose, live_taps
from lmc.align.weight_matching.algorithm import Descent
from lmc.align.weight_matching.blocks import UnitBlock, build_blocks
from lmc.align.weight_matching.gains import assign, opening_prices
from lmc.align.weight_matching.parameters import matched
from lmc.core.context import own_context, warn
from lmc.errors import InputError
from lmc.network.inputs import first_of, input_batches
from lmc.network.network import Network, pick_device
from lmc.symmetry.groups.actions import act, permute_tensor
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
    probe = first_of(first, 1)
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
