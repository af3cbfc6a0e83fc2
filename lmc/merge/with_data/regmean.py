"""RegMean: each linear layer of the merge answers its models' own inputs as they did, in the least-squares sense."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.merge.engine.aligning import alignable
from lmc.merge.engine.assembly import Merged, assemble
from lmc.merge.engine.tensors import WeightSets, weight_sets
from lmc.merge.with_data.judge import batches, each
from lmc.network.batches import to_device
from lmc.network.layers import as_matrix, as_weight, matrices, rows
from lmc.network.moments import precise
from lmc.network.network import Network, pick_device, whole
from lmc.weights import ModelOrWeights, StateDict, Weights, as_weights

if TYPE_CHECKING:
    import pandas as pd


ROWS = 1 << 14  # of layer inputs that are held in float64 at a time


@dataclass(frozen=True)
class RegMeanReport(Result):
    """The weights that were fitted to activations; all others are plain averages."""

    fitted: tuple[str, ...]
    averaged: tuple[str, ...]

    def to_frame(self) -> "pd.DataFrame":
        """A row for each weight: weight, fitted (or averaged)."""
        rows = [(name, name in self.fitted) for name in (*self.fitted, *self.averaged)]
        return require("pandas").DataFrame(rows, columns=["weight", "fitted"])

    def __str__(self) -> str:
        return f"fitted: {', '.join(self.fitted) or 'none'}\naveraged: {', '.join(self.averaged) or 'none'}"


@own_context
@alignable
def regmean(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    inputs: Sequence[Any],
    *,
    base: ModelOrWeights | None = None,
    shrink: float = 0.9,
    samples: int = 256,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Merged[RegMeanReport]:
    """RegMean (Jin et al. 2023, 2212.09849, equation 2): `W = (sum_t G_t)^-1 sum_t G_t W_t` for every linear layer.

    `G_t = X_t^T X_t / N` are the Gram matrices of the layer's inputs in model t on its own task, their off-diagonal
    entries times `shrink` (alpha in the paper, where it is 0.9). With `shrink=1` the result minimises
    `sum_t |X_t W - X_t W_t|^2`; where the inputs leave it open (features that are always zero), it is the average.
    Linear layers, one- and two-dimensional convolutions without groups (over their patches; an addition to the paper) and the
    Conv1D of GPT-2 are fitted; biases, norms, embeddings, tied weights and layers that are not run as modules (such as
    the projections inside `nn.MultiheadAttention`) are averaged.

    Args:
        model: the architecture; its weights are not used and not touched.
        models: the fine-tuned models.
        inputs: for each model unlabelled inputs of its task, as `data` of `fisher`; targets are not looked at.
        base: not used; taken so that all methods are called alike.
        shrink: from 0 (only diagonals: an average weighted by input features) to 1.
        samples: examples per task.
        batch_size: examples at a time.
        device: where to compute activations (default: where the weights are).
        progress: show a bar if it takes longer than two seconds.

    Returns:
        The merged weights, a state dict whose `.report` names the layers that were fitted.
    """
    job = layer_inputs(model, models, inputs, shrink, samples, batch_size, device)
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    for t in tqdm(range(len(job.sets)), desc="RegMean", disable=not progress):
        job.network.load(as_weights(job.sets.states[t]))
        for name, gram in job.grams(t, list(job.layers)).items():
            pull = gram @ (job.matrix(name, t) - job.mean(name))
            left[name] = left[name] + gram if name in left else gram
            right[name] = right[name] + pull if name in right else pull
    return job.result({name: _fit(job.mean(name), left[name], right[name]) for name in left})


@own_context
@alignable
def regmean_plus_plus(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    inputs: Sequence[Any],
    *,
    base: ModelOrWeights | None = None,
    shrink: float = 0.9,
    samples: int = 256,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Merged[RegMeanReport]:
    """RegMean++ (Nguyen et al. 2025, 2508.03121): as `regmean`, with the inputs that layers have in the merged network.

    Layers are merged in the order in which they run; the Gram matrices of a layer are taken from the network whose
    earlier layers are merged already, run on each task's data. One partial forward pass per layer and task. A network
    with BatchNorm runs on averaged statistics here, which spoils the inputs: networks with LayerNorm suit it.
    Arguments and result as for `regmean`.
    """
    job = layer_inputs(model, models, inputs, shrink, samples, batch_size, device)
    job.network.load(dict(assemble(job.sets, job.plain, job.shares)))
    order = job.order()
    merged: dict[str, Tensor] = {}
    for name in tqdm(order, desc="RegMean++", disable=not progress):
        left = right = torch.zeros(())
        for t in range(len(job.sets)):
            gram = job.grams(t, [name], stop_after=order[name])[name]
            left, right = left + gram, right + gram @ (job.matrix(name, t) - job.mean(name))
        merged[name] = _fit(job.mean(name), left, right)
        job.network.load(dict(assemble(job.sets, lambda n: job.tensor(n, merged), job.shares)))
    return job.result(merged)


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of one call, and the layers to fit: weight name -> module of the private network."""

    sets: WeightSets
    network: Network
    layers: Mapping[str, nn.Module]
    inputs: Sequence[Any]
    shrink: float
    samples: int
    batch_size: int

    def matrix(self, name: str, model: int) -> Tensor:
        """`(inputs, outputs)` float64 on the CPU."""
        return as_matrix(self.layers[name], self.sets.tensor(name, model).double().cpu())

    def mean(self, name: str) -> Tensor:
        first = self.matrix(name, 0)
        return first + sum(self.matrix(name, t) - first for t in range(len(self.sets))) / len(self.sets)

    def batches(self, task: int) -> Iterator[Any]:
        of, model = f"inputs[{task}]", self.network.module
        for batch, _ in batches(self.inputs[task], of, limit=self.samples, size=self.batch_size, model=model):
            yield to_device(batch, self.network.device)

    def grams(self, task: int, names: Sequence[str], stop_after: int | None = None) -> dict[str, Tensor]:
        """Shrunk Gram matrices, per row of layer inputs, of the loaded network on a task's data.

        With `stop_after` each forward pass ends at that call of the (one) layer.
        """
        total: dict[str, Tensor] = {}
        counts = dict.fromkeys(names, 0)
        calls = 0

        def record(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                nonlocal calls
                x = rows(module, args[0])
                # In float64: with fewer rows than inputs the Gram matrix is singular, and the rounding of float32 would
                # pass for directions that the inputs have.
                for chunk in x.split(ROWS):
                    own = precise(chunk)
                    total[name] = total.get(name, 0.0) + (own.T @ own).cpu()
                counts[name] += len(x)
                calls += 1
                if calls == stop_after:
                    raise _EnoughError

            return hook

        hooks = [self.layers[name].register_forward_pre_hook(record(name)) for name in names]
        try:
            for inputs in self.batches(task):
                calls = 0
                try:
                    self.network(inputs)
                except _EnoughError:
                    continue
        finally:
            for hook in hooks:
                hook.remove()
        return {name: _shrink(gram / max(counts[name], 1), self.shrink) for name, gram in total.items()}

    def order(self) -> dict[str, int]:
        """The layers in the order in which they first run, each with its number of calls in one forward pass."""
        calls: dict[str, int] = {}

        def count(name: str) -> Callable[..., None]:
            return lambda module, args: calls.update({name: calls.get(name, 0) + 1})

        hooks = [module.register_forward_pre_hook(count(name)) for name, module in self.layers.items()]
        try:
            self.network(next(self.batches(0)))
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    def plain(self, name: str) -> Tensor:
        return self.sets.combine(name, *self.shares(name))

    def shares(self, name: str) -> tuple[list[float], float]:
        return [1.0 / len(self.sets)] * len(self.sets), 0.0

    def tensor(self, name: str, merged: Mapping[str, Tensor]) -> Tensor:
        if name not in merged:
            return self.plain(name)
        like = self.sets.states[0][name]
        return as_weight(self.layers[name], merged[name], like.shape).to(like.device)

    def result(self, merged: Mapping[str, Tensor]) -> Merged[RegMeanReport]:
        weights: Weights = dict(assemble(self.sets, lambda name: self.tensor(name, merged), self.shares))
        averaged = tuple(name for name in self.sets.weights if name not in merged)
        return Merged(StateDict(weights, like=self.sets.states[0]), RegMeanReport(tuple(merged), averaged))


def layer_inputs(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    inputs: Sequence[Any],
    shrink: float,
    samples: int,
    batch_size: int,
    device: torch.device | str | None,
    base: ModelOrWeights | None = None,
) -> LayerInputs:
    """The linear layers of the models, and the data that they are run on."""
    if not 0.0 <= shrink <= 1.0:
        raise InputError(f"shrink must be in [0, 1], got {shrink}")
    sets = weight_sets(models, base, module=model)
    network = Network(model, pick_device(device, as_weights(sets.states[0])), whole)
    tied = set(sets.ties.values())
    found = matrices(network.module, as_weights(sets.states[0]))
    layers = {n: m for n, m in found.items() if n in sets.weights and n not in tied}
    return LayerInputs(sets, network, layers, each(inputs, len(sets), "inputs"), shrink, samples, batch_size)


class _EnoughError(Exception):
    """Ends a forward pass whose rest is not needed."""


def _fit(mean: Tensor, gram: Tensor, pull: Tensor) -> Tensor:
    """The solution W of `gram (W - mean) = pull` that stays closest to the mean."""
    values, vectors = torch.linalg.eigh(gram)
    usable = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(usable, 1.0 / values, 0.0)
    return mean + vectors @ (inverse[:, None] * (vectors.T @ pull))


def _shrink(gram: Tensor, shrink: float) -> Tensor:
    return shrink * gram + (1.0 - shrink) * torch.diag(gram.diagonal())
