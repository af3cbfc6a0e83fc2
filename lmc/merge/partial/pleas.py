"""PLeaS: two networks in one of a chosen size (Nasery, Hayase, Koh and Oh 2025, arXiv:2407.02447).

Well-matched units are merged, the others kept from both networks; how many in which group is decided under a budget of
parameters; then every layer is fitted to what the two networks do.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.merge.partial.least_squares import fit_layers
from lmc.merge.partial.pair import Pair, per_group, prepare
from lmc.merge.partial.units import MergedUnits, paired
from lmc.merge.partial.widening import Zipped, widened
from lmc.merge.partial.zipit import likeness
from lmc.network.batches import to_device
from lmc.network.batchnorm import has_batchnorm, recalibrate_batchnorm
from lmc.network.network import Network
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights


@own_context
def pleas(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    inputs: Any = None,
    *,
    spec: PermutationSpec | UnboundSpec | None = None,
    budget: float = 1.2,
    ratio: float | Mapping[str, float] | None = None,
    fit: bool = True,
    ridge: float = 1e-3,
    heads: Sequence[str] = (),
    permutation: Permutation | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Zipped:
    """Two networks in one module of a size between theirs and twice that.

    1. B's units are matched to A's, by activations (`inputs` given) or by weights.
    2. Of each group's n pairs, the share `ratio` that is least alike is kept separate, so that `n (1 + ratio)` units are
       left. Under a `budget` the ratios maximise `sum_g w_g r_g` while parameters other than the zeros between the two
       networks stay within it, `sum n n' ((1 + r)(1 + r') - 2 r r')` over the layers (section 3.3). What a group is worth,
       w_g, is how much closer the outputs come to the ensemble's when this group alone is kept separate; without inputs,
       how unlike its pairs are. (The paper takes accuracies, which need labels.)
    3. With inputs and `fit`, layers are fitted by least squares (section 3.2), here in closed form.

    Ratio 0 without fitting is permuting and averaging; ratio 1 is the ensemble, the mean of both outputs. Running
    statistics are re-estimated on the inputs where any units were merged.

    Args:
        model: the architecture; neither changed nor read for weights.
        models: A and B, modules or state dicts on one device; neither is changed.
        inputs: unlabelled, as in `lmc.activation_matching`; None: units are matched by weights and nothing is fitted.
        spec: as in `lmc.merge.zipit`.
        budget: parameters relative to one network, 1 to 2.
        ratio: instead of a budget, the ratio of all groups, or of each (names, which may hold wildcards; 0 for others).
        fit: whether to fit layers to activations.
        ridge: how much a fitted layer is held back, relative to the mean square of its inputs.
        heads: as in `lmc.merge.zipit`; they are not fitted.
        permutation: how B's units are matched, if that is known.
        batch_size, device, progress: as in `lmc.activation_matching`.

    Returns:
        The module; `.info` has the ratios and, for each layer that was fitted, its squared error before and after.

    Raises:
        InputError: not two models, a budget outside 1 to 2, or a ratio outside 0 to 1 or for a group that cannot grow.
        MismatchError, SpecError, DataError, WeightsError: as in `lmc.activation_matching`.
    """
    started = time.perf_counter()
    if not 1.0 <= budget <= 2.0 or not ridge >= 0.0:
        raise InputError(f"budget={budget}, ridge={ridge}: expected a budget from 1 to 2 and a ridge of at least 0")
    pair = prepare(spec, model, models, inputs, permutation, batch_size, device, progress)
    own = pair.head_tensors(heads)
    alike = _alike(pair, progress)
    worth = {}
    if ratio is not None:
        ratios = per_group(ratio, pair.growth)
    elif budget == 1.0:
        ratios = dict.fromkeys(pair.growth.sizes, 0.0)
    elif cost(pair, list(alike))(np.ones(len(alike))) <= budget:
        ratios = dict.fromkeys(pair.growth.sizes, 1.0)
    else:
        worth = _worth(pair, alike, progress)
        ratios = spend(pair, worth, budget)
    units = _units(alike, ratios)
    weights, errors = pair.zipped(units), {}
    if fit and pair.batches:
        weights, errors = fit_layers(pair, units, weights, ridge, progress)
    info = {"method": "pleas", "ratio": ratios, "worth": worth, "least_squares": errors}
    info |= {"permutation": pair.permutation, "seconds": time.perf_counter() - started}
    return pair.finish(units, weights, info, own)


def _units(alike: Mapping[str, Tensor], ratios: Mapping[str, float]) -> dict[str, MergedUnits]:
    """The pairs of units, but for those that are least alike, a share of them rounded down."""
    found = {}
    for name, likenesses in alike.items():
        separate = math.floor(ratios[name] * len(likenesses) + 1e-9)
        found[name] = paired(len(likenesses), torch.argsort(likenesses, stable=True)[:separate].tolist())
    return found


def _alike(pair: Pair, progress: bool) -> dict[str, Tensor]:
    """For each group (n,) the correlation of matched units, or where they are not seen the cosine of their weights."""
    seen = pair.observe(progress) if pair.batches else {}
    found = {}
    for name, size in pair.growth.sizes.items():
        if name in seen:
            found[name] = likeness(seen[name])[torch.arange(size), torch.arange(size) + size]
            continue
        total = torch.zeros(3, size, dtype=torch.float64)
        for tensor, axes in pair.growth.axes.items():
            for axis in axes if tensor not in pair.spec.buffers else ():
                sides = [weights[tensor].movedim(axis.axis, 0).double().cpu() for weights in (pair.a, pair.b)]
                for start, stop, group in axis.pieces:
                    if group == name:
                        x, y = (side[start:stop].reshape(size, -1) for side in sides)
                        total += torch.stack([(x * y).sum(1), x.square().sum(1), y.square().sum(1)])
        found[name] = total[0] / (total[1] * total[2]).sqrt().clamp_min(1e-30)
    return found


@torch.no_grad()
def _worth(pair: Pair, alike: Mapping[str, Tensor], progress: bool) -> dict[str, float]:
    """For each group how much closer to the ensemble its separation alone brings the outputs; see `pleas`."""
    if not pair.batches:
        return {name: float((1.0 - likenesses).sum()) for name, likenesses in alike.items()}
    few = (
        pair.batches[: max(1, 1024 // len(pair.batches[0]))]
        if isinstance(pair.batches[0], Tensor)
        else pair.batches[:4]
    )
    few = [to_device(call, pair.network.device) for call in few]
    goal = []
    for call in few:
        both = []
        for weights in (pair.a, pair.b):
            pair.network.load(weights)
            both.append(pair.network(call).double())
        goal.append(0.5 * (both[0] + both[1]))

    def distance(separate: str | None) -> float:
        ratios = {name: float(name == separate) for name in alike}
        weights = pair.zipped(_units(alike, ratios))
        module = widened(pair.network.module, weights)
        if has_batchnorm(module):
            module.load_state_dict(recalibrate_batchnorm(module, weights, few))
        network = Network(module, pair.network.device)
        squares = [(network(call).double() - y).square() for call, y in zip(few, goal, strict=True)]
        return float(torch.cat([square.flatten() for square in squares]).mean())

    merged = distance(None)
    names = tqdm(alike, desc="groups", disable=not progress)
    return {name: max(merged - distance(name), 1e-6 * merged) for name in names}


def spend(pair: Pair, worth: Mapping[str, float], budget: float) -> dict[str, float]:
    """Ratios that maximise `sum_g w_g r_g` within a budget of parameters; the best of several local optima.

    The quadratic constraint is not convex, so the programme is solved from several starting points.
    """
    from scipy.optimize import minimize  # slow to import

    names = list(worth)
    if not names:
        return {}
    gain = np.array([worth[name] for name in names])
    gain = gain / max(gain.sum(), 1e-30)
    price = cost(pair, names)
    constraint = {"type": "ineq", "fun": lambda r: budget - price(r)}
    best, value = np.zeros(len(names)), 0.0
    for start in (np.zeros(len(names)), np.full(len(names), 0.5), gain / max(gain.max(), 1e-30)):
        found = np.clip(
            minimize(lambda r: -gain @ r, start, bounds=[(0, 1)] * len(names), constraints=[constraint]).x, 0, 1
        )
        while price(found) > budget + 1e-9:  # a solution at the bound may be off by rounding
            found = found * 0.999
        if gain @ found > value:
            best, value = found, float(gain @ found)
    return dict(zip(names, best.tolist(), strict=True))


def cost(pair: Pair, names: Sequence[str]) -> Callable[[np.ndarray], float]:
    """Parameters that need not be zero, relative to those of one network, as a function of the ratios of the groups."""
    position = {name: k for k, name in enumerate(names)}
    parts: list[tuple[float, list[tuple[bool, float, np.ndarray]]]] = []
    total = 0
    for tensor, _ in pair.network.module.named_parameters():
        shape = pair.a[tensor].shape
        total += math.prod(shape)
        rest, axes = float(math.prod(shape)), []
        for axis in pair.growth.axes.get(tensor, ()):
            lengths = np.zeros(len(names))
            for start, stop, group in axis.pieces:
                if group is not None:
                    lengths[position[group]] += stop - start
            rest /= shape[axis.axis]
            axes.append((axis.reads, float(shape[axis.axis]), lengths))
        parts.append((rest, axes))

    def price(ratios: np.ndarray) -> float:
        found = 0.0
        for rest, axes in parts:
            numbers = math.prod(length + lengths @ ratios for _, length, lengths in axes)
            if len({reads for reads, _, _ in axes}) == 2:
                numbers -= 2.0 * math.prod(lengths @ ratios for _, _, lengths in axes)
            found += rest * numbers
        return float(found / total)

    return price
