"""ZipIt: units merged across two networks and within either (Stoica et al. 2024, arXiv:2305.03053)."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmc.align.activations.collect import CrossMoments
from lmc.core.context import own_context, warn
from lmc.merge.partial.growth import Zipped
from lmc.merge.partial.pair import check_share, per_group, prepare
from lmc.merge.partial.units import MergedUnits, paired
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights

# Of pairs that are equally alike, the one of units that were matched beforehand is merged first.
_STAY = 1e-9


@own_context
def zipit(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    inputs: Any,
    *,
    spec: PermutationSpec | UnboundSpec | None = None,
    ratio: float | Mapping[str, float] = 0.0,
    alpha: float = 0.1,
    beta: float = 0.125,
    heads: Sequence[str] = (),
    permutation: Permutation | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Zipped:
    """Merge the units of two networks that do alike, across the networks and within them, into a module of any width.

    In each group the two units of A and B together whose activations correlate most become one, again and again, until
    `n (1 + ratio)` of the 2n are left (section 4). A unit that is merged already correlates with others by `alpha` times
    the least correlation of its members. Incoming weights become means over members, outgoing ones sums over what read
    them, and outputs the mean of both networks' outputs. With 0 everywhere the module has the size of one network; with
    1 in the later groups the networks part there (partial zipping), and with 1 everywhere it is their ensemble. Running
    statistics are re-estimated on the inputs where any units were merged.

    Units within heads, heads themselves, and groups whose units act on one another (layer normalisation over them)
    cannot change their number: they are permuted and averaged one to one; `Zipped.kept` says which, and why.

    Args:
        model: the architecture; neither changed nor read for weights.
        models: A and B, modules or state dicts on one device; neither is changed.
        inputs: unlabelled inputs of both tasks, as in `lmc.activation_matching`.
        spec: the symmetries of the architecture (default: found with `lmc.permutation_spec` on two of the inputs).
        ratio: the share of the units that is left unmerged, 0 to 1, or one for each group (names, which may hold
            wildcards; groups not named are merged in full).
        alpha: from 0 (no unit is merged twice) to 1. The paper has 0.1.
        beta: the share of a network's merges that may join units of its own. The paper's code has 0.125.
        heads: tensors, such as ["head.*"], of which networks for different tasks keep their own: `Zipped.answering(0)` is the
            merged body with A's head, `answering(1)` with B's.
        permutation: how B's units are matched to A's beforehand (default: by activations); decides for the groups that
            are kept, and between units that are equally alike, such as dead ones.
        batch_size, device, progress: as in `lmc.activation_matching`.

    Raises:
        InputError: not two models, a ratio, alpha or beta outside 0 to 1, or a ratio above 0 for a group that cannot change its size.
        MismatchError, SpecError, DataError, WeightsError: as in `lmc.activation_matching`.
    """
    started = time.perf_counter()
    check_share("alpha", alpha)
    check_share("beta", beta)
    pair = prepare(spec, model, models, inputs, permutation, batch_size, device, progress)
    own = pair.head_tensors(heads)
    apart = per_group(ratio, pair.growth)
    seen = pair.observe(progress)
    units = {}
    for name, size in pair.growth.sizes.items():
        separate = round(apart[name] * size)
        if name in seen:
            units[name] = greedy(likeness(seen[name]), size - separate, alpha, beta)
        else:
            warn(f"{name}: its units pass no module that we know; they are paired as matched")
            units[name] = paired(size, range(size - separate, size))
    info = {"method": "zipit", "ratio": apart, "alpha": alpha, "beta": beta, "permutation": pair.permutation}
    return pair.finish(units, pair.zipped(units), info | {"seconds": time.perf_counter() - started}, own)


def likeness(moments: CrossMoments) -> Tensor:
    """(2n, 2n) correlations; where matched units are both constant, as dead ones are, nothing is lost by merging them."""
    found, still = moments.correlation().cpu(), moments.constant()[0].cpu()
    n = len(found) // 2
    both = (still[:n] & still[n:]).nonzero().flatten()
    found[both, both + n] = found[both + n, both] = 1.0
    return found


def greedy(correlation: Tensor, merges: int, alpha: float, beta: float) -> MergedUnits:
    """Merge the two most alike of 2n units, A's first, so many times (Stoica et al. 2024, section 4 and appendix B).

    The best partner of every unit is kept up to date, so that a merge costs O(n) but for the units whose partner it was.

    Args:
        correlation: (2n, 2n).
        merges: how many; fewer are made where alpha and beta allow no more.
        alpha: what a merged unit's correlations, the least of its members', are multiplied by; 0: it is not merged again.
        beta: of each network's half of the merges, the share that may join units of that network.
    """
    n = len(correlation) // 2
    score = correlation.to(torch.float64).numpy().copy()
    across = np.arange(n)
    score[across, across + n] += _STAY
    score[across + n, across] += _STAY
    np.fill_diagonal(score, -math.inf)
    members: dict[int, tuple[set[int], set[int]]] = {}
    for unit in range(2 * n):
        members[unit] = ({unit}, set()) if unit < n else (set(), {unit - n})
    has = np.array([[True] * n + [False] * n, [False] * n + [True] * n])  # (network, unit)
    left = [int(beta * merges / 2 + 1e-9)] * 2
    closed = [False, False]
    best = value = np.empty(0)
    for _ in range(merges):
        for k in (0, 1):
            if left[k] <= 0 and not closed[k]:
                score[np.ix_(has[k], has[k])] = -math.inf
                closed[k], best = True, np.empty(0)
        if not len(best):
            best, value = score.argmax(1), score.max(1)
        i = int(value.argmax())
        j = int(best[i])
        if value[i] == -math.inf:
            break
        for k in (0, 1):
            left[k] -= int(has[k, i] and has[k, j])
        has[:, i] |= has[:, j]
        for mine, theirs in zip(members[i], members.pop(j), strict=True):
            mine |= theirs
        _merge_scores(score, i, j, alpha, [has[k] for k in (0, 1) if closed[k]])
        stale = np.flatnonzero((best == i) | (best == j))
        best[[*stale, i, j]], value[[*stale, i, j]] = score[[*stale, i, j]].argmax(1), score[[*stale, i, j]].max(1)
        better = score[:, i] > value
        best[better], value[better] = i, score[better, i]
    found = sorted(members.values(), key=lambda both: (not both[0], sorted(both[0]) + sorted(both[1])))
    return MergedUnits(n, tuple((tuple(sorted(ours)), tuple(sorted(theirs))) for ours, theirs in found))


def _merge_scores(score: np.ndarray, i: int, j: int, alpha: float, closed: list[np.ndarray]) -> None:
    """Unit i stands for i and j from now on, j for nothing; those of `closed` networks do not meet within them."""
    least = np.minimum(score[i], score[j])
    met = np.isfinite(least) if alpha > 0 else np.zeros(len(least), dtype=bool)
    for has in closed:
        met &= ~(has & has[i])
    least = np.where(met, alpha * np.where(met, least, 0.0), -math.inf)
    score[i] = score[:, i] = least
    score[j] = score[:, j] = -math.inf
