"""PLeaS: two networks in one of a chosen size (Nasery, Hayase, Koh and Oh 2025, arXiv:2407.02447).

Well-matched units are merged, the others kept from both networks; how many in which group is decided under a budget of
parameters; then every layer is fitted to what the two networks do.
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.merge.partial.growth import Zipped, widened
from lmc.merge.partial.pair import Pair, per_group, prepare
from lmc.merge.partial.units import BOTH, Axis, MergedUnits, Stretch, owners, paired, zipped_axis
from lmc.merge.partial.zipit import likeness
from lmc.network.batches import to_device
from lmc.network.batchnorm import has_batchnorm, recalibrate_batchnorm
from lmc.network.derived import settled
from lmc.network.layers import as_matrix, as_weight, channel_axis, matrices, rows
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.symmetry.tracing.outputs import in_one_row
from lmc.weights import ModelOrWeights, Weights


class Fit(NamedTuple):
    """The sum of squared errors of a layer on the inputs it was fitted to."""

    before: float
    after: float


def fit_layers(
    pair: Pair, units: Mapping[str, MergedUnits], weights: Weights, ridge: float, progress: bool
) -> tuple[Weights, dict[str, Fit]]:
    """Linear layers and convolutions that answer merged inputs with merged outputs, in the least-squares sense.

    A unit that stands for several has their mean activation, before and behind the layer; an own unit its own. The
    change of a layer W minimises `|X (W + D) - Y|² + ridge mean(diag X^T X) |D|²`; between what is A's alone and what
    is B's alone it stays 0. Errors at the level of rounding are left as they are.
    """
    layers = {name: _Layer(pair, units, weights, name, module) for name, module in _layers(pair).items()}
    for call in tqdm(pair.batches, desc="least squares", unit=" batches", disable=not progress):
        seen = [_run(pair, state, layers, call) for state in (pair.a, pair.b)]
        for name, layer in layers.items():
            for ours, theirs in zip(seen[0][name], seen[1][name], strict=True):
                layer.update(ours, theirs)
    fitted = dict(weights)
    report = {}
    for name, layer in layers.items():
        if layer.samples:
            report[name] = layer.solve(fitted, ridge)
    return settled(fitted, weights), report


def _layers(pair: Pair) -> dict[str, nn.Module]:
    tied = set(pair.spec.aliases) | set(pair.spec.aliases.values())
    return {name: m for name, m in matrices(pair.network.module, pair.a).items() if name not in tied}


@torch.no_grad()
def _run(pair: Pair, weights: Weights, layers: Mapping[str, "_Layer"], call: Any) -> dict[str, list[list[Tensor]]]:
    """The inputs and outputs of every call of each layer."""
    seen: dict[str, list[list[Tensor]]] = {name: [] for name in layers}
    pair.network.load(weights)

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        # Copies: layers further on may work in place.
        return lambda _module, args, output: seen[name].append([args[0].clone(), output.clone()])

    hooks = [layer.module.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        pair.network.result(call)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class _Layer:
    """The normal equations of one layer; the last row of the matrix is the bias, if there is one."""

    def __init__(
        self, pair: Pair, units: Mapping[str, MergedUnits], weights: Weights, name: str, module: nn.Module
    ) -> None:
        self.module, self.units, self.name = module, units, name
        self.shape = weights[name].shape
        self.biased = getattr(module, "bias", None) is not None
        self.channel = channel_axis(module)
        sides = {axis.reads: axis for axis in pair.growth.axes.get(name, ())}
        lengths = pair.a[name].shape
        transposed = type(module).__name__ == "Conv1D"
        self.inputs = self._axis(sides.get(True), lengths[0 if transposed else 1])
        self.outputs = self._axis(sides.get(False), lengths[1 if transposed else 0])
        self.matrix = as_matrix(module, weights[name]).double()
        if self.biased:
            self.matrix = torch.cat([self.matrix, weights[self._bias][None].double()])
        count, out = self.matrix.shape
        self.gram = self.matrix.new_zeros(count, count)
        self.pull = self.matrix.new_zeros(count, out)
        self.error = self.matrix.new_zeros(out)
        self.size = self.matrix.new_zeros(out)
        self.samples = 0

    @property
    def _bias(self) -> str:
        return f"{re.sub(r'(parametrizations.)?weight[^.]*([.]original1?)?$', '', self.name)}bias"

    def _axis(self, axis: Axis | None, length: int) -> Axis:
        pieces = axis.pieces if axis is not None else (Stretch(0, length, None),)
        return Axis(self.channel, pieces, reads=False)

    def _merged(self, ours: Tensor, theirs: Tensor, axis: Axis) -> Tensor:
        wide = torch.promote_types(ours.dtype, torch.float32)
        return zipped_axis(ours.to(wide), axis, self.units, 0) + zipped_axis(theirs.to(wide), axis, self.units, 1)

    def update(self, ours: list[Tensor], theirs: list[Tensor]) -> None:
        """Take in the inputs and outputs of one call in either network."""
        x = rows(self.module, self._merged(ours[0], theirs[0], self.inputs))
        y = self._merged(ours[1], theirs[1], self.outputs).movedim(self.channel, -1).flatten(0, -2)
        if self.biased:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        left = y - x @ self.matrix.to(x.dtype)
        self.gram += (x.T @ x).double()
        self.pull += (x.T @ left).double()
        self.error += left.double().square().sum(0)
        self.size += y.double().square().sum(0)
        self.samples += len(x)
        self.rounding = 100.0 * torch.finfo(x.dtype).eps

    def solve(self, weights: Weights, ridge: float) -> Fit:
        """Put the fitted layer into `weights`."""
        each = (len(self.matrix) - self.biased) // len(owners(self.inputs, self.units))
        into = owners(self.inputs, self.units).repeat_interleave(each)
        into = torch.cat([into, torch.full((int(self.biased),), BOTH)])
        out = owners(self.outputs, self.units)
        off = (self.error > self.rounding**2 * self.size).cpu()
        change = torch.zeros_like(self.matrix)
        for owner in (0, 1, BOTH):
            columns = ((out == owner) & off).nonzero().flatten().to(self.gram.device)
            if not len(columns):
                continue
            used = ((into == owner) | (into == BOTH) | (owner == BOTH)).nonzero().flatten().to(self.gram.device)
            gram = self.gram[used[:, None], used]
            gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            change[used[:, None], columns] = torch.linalg.solve(gram, self.pull[used[:, None], columns])
        fitted = self.matrix + change
        like = weights[self.name]
        count = len(fitted) - self.biased
        weights[self.name] = as_weight(self.module, fitted[:count], self.shape).to(like.dtype).contiguous()
        if self.biased:
            weights[self._bias] = fitted[-1].to(like.dtype)
        after = self.error.sum() - 2.0 * (change * self.pull).sum() + (change * (self.gram @ change)).sum()
        return Fit(float(self.error.sum()), max(float(after), 0.0))


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
            both.append(in_one_row(pair.network(call)).double())
        goal.append(0.5 * (both[0] + both[1]))

    def distance(separate: str | None) -> float:
        ratios = {name: float(name == separate) for name in alike}
        weights = pair.zipped(_units(alike, ratios))
        module = widened(pair.network.module, weights)
        if has_batchnorm(module):
            module.load_state_dict(recalibrate_batchnorm(module, weights, few))
        network = pair.network.alike(module)
        squares = [(in_one_row(network(call)).double() - y).square() for call, y in zip(few, goal, strict=True)]
        return float(torch.cat(squares).mean())

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
