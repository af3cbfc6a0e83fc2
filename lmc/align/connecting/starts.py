"""Starting points for learning rotations: streams turned by what they hold, heads and hidden units by what they do and weigh."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch

from lmc.align.activations.collect import choose, collect, live_taps
from lmc.align.activations.matching import clusters
from lmc.align.relaxed.soft import SoftMoves, as_matrices
from lmc.align.rotations.procrustes import Ascent, nearest_rotation
from lmc.align.weight_matching.matching import matched
from lmc.network.inputs import first_of, input_batches
from lmc.network.network import Network
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights

BATCH = 256
SWEEPS = 3


def by_activations(
    spec: PermutationSpec, network: Network, a: Weights, b: Weights, inputs: Any, rotated: Mapping[str, bool]
) -> Weights:
    """B moved onto A, both with folded norms: rotations that make streams most alike on the same inputs, hidden units by
    their correlations, and heads, with what is in them, by their weights.

    The rotation of a stream solves the Procrustes problem of its values at all places where it is read.
    """
    network.load(a)
    batches = input_batches(network.module, inputs, BATCH)
    first = next(batches)
    probe = first_of(first, 2)
    taps = choose(spec, live_taps(spec, network.module, lambda: network.result(probe)))
    seen, _ = clusters(spec, taps)
    alone = [cluster for cluster in seen if len(cluster.groups) == 1]
    sites = [site for cluster in alone for site in cluster.sites(spec)]
    moments = collect((network, network), (a, b), sites, chain([first], batches), False)
    ours, theirs = ({name: x.double() for name, x in matched(spec, w).items()} for w in (a, b))
    start = as_matrices(spec.identity().indices, next(iter(ours.values())))
    for cluster in alone:
        if cluster.name in rotated:
            start[cluster.name] = nearest_rotation(moments[cluster.name].product, rotated[cluster.name])
        else:
            indices, _, _ = cluster.match(spec, {cluster.name: moments[cluster.name].correlation()})
            start |= as_matrices(indices, next(iter(ours.values())))
    ascent = Ascent(spec, rotated, ours, theirs, start)
    return moved(spec, b, swept(ascent, set(start) - {cluster.name for cluster in alone}).matrices)


def by_weights(spec: PermutationSpec, a: Weights, b: Weights, rotated: Mapping[str, bool]) -> Weights:
    """B moved onto A by rotations and permutations that bring the weights close (`lmc.align.rotation_matching`)."""
    ours, theirs = ({name: x.double() for name, x in matched(spec, w).items()} for w in (a, b))
    ascent = Ascent(spec, rotated, ours, theirs)
    return moved(spec, b, swept(ascent, set(spec.groups)).matrices)


def swept(ascent: Ascent, groups: set[str]) -> Ascent:
    """The ascent after a few sweeps over some groups."""
    for _ in range(SWEEPS):
        ascent.sweep(groups)
    return ascent


def moved(spec: PermutationSpec, weights: Weights, matrices: Mapping[str, torch.Tensor]) -> Weights:
    """The weights with all groups mixed, in their own dtypes."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in weights.items()}
    mixed = SoftMoves(spec, wide, next(iter(weights.values())).device)(matrices, wide)
    found = {name: x.to(weights[name].dtype) for name, x in mixed.items()}
    return found | {second: found[first] for second, first in spec.aliases.items()}
