"""Layers of a merged network fitted to the activations of the two it was made of (PLeaS, arXiv:2407.02447, section 3.2)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmc.core.progress import tqdm
from lmc.merge.partial.pair import Pair
from lmc.merge.partial.units import BOTH, Axis, MergedUnits, Stretch, owners, zipped_axis
from lmc.network.layers import as_matrix, as_weight, fits, rows
from lmc.weights import Weights


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
    return fitted, report


def _layers(pair: Pair) -> dict[str, nn.Module]:
    tied = set(pair.spec.aliases) | set(pair.spec.aliases.values())
    found = {f"{path}.weight".removeprefix("."): module for path, module in pair.network.module.named_modules()}
    return {name: m for name, m in found.items() if name in pair.a and name not in tied and fits(m)}


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
        self.channel = 1 if isinstance(module, nn.Conv2d) else -1
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
        return f"{self.name.removesuffix('weight')}bias"

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
