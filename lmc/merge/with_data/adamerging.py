"""AdaMerging: coefficients of task vectors that make the merged network's predictions confident."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import DataError, InputError
from lmc.merge.engine.aligning import alignable
from lmc.merge.engine.assembly import Merged, Mixture
from lmc.merge.engine.call import Pass
from lmc.merge.engine.tensors import WeightSets, weight_sets
from lmc.merge.rules.ties import thresholds, trim
from lmc.merge.with_data.judge import each, gather, pieces
from lmc.network.batches import take, tensors, to_device
from lmc.network.network import Network, pick_device
from lmc.network.task import Task
from lmc.weights import ModelOrWeights, Weights, as_weights, fitted
from lmc.weights.state import wide

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class AdaMergingReport(Result):
    """The learned coefficients.

    Attributes:
        coefficients: for each weight (or "*" with `per="task"`) one coefficient per task.
        entropies: `(steps, tasks)` mean prediction entropy in nats of each step's batches.
        predicted: for each task the share of its examples given to each class at the end. A task whose predictions all
            fall on one class has collapsed: entropy is small there too.
    """

    coefficients: dict[str, tuple[float, ...]]
    entropies: tuple[tuple[float, ...], ...]
    predicted: tuple[tuple[float, ...], ...]

    def to_frame(self) -> "pd.DataFrame":
        """A row for each weight (or for all): a coefficient for each task."""
        return require("pandas").DataFrame.from_dict(self.coefficients, orient="index").add_prefix("task ")

    def __str__(self) -> str:
        lines = ["task  coefficient (mean)  entropy first -> last  most predicted class"]
        for t, shares in enumerate(self.predicted):
            values = [row[t] for row in self.coefficients.values()]
            column = [row[t] for row in self.entropies]
            change = f"{column[0]:.3f} -> {column[-1]:.3f}" if column else "not trained"
            top = max(range(len(shares)), key=shares.__getitem__)
            lines.append(f"{t:>4}  {sum(values) / len(values):>18.3f}  {change:>21}  {top} ({shares[top]:.0%})")
        return "\n".join(lines)


@own_context
@alignable
def adamerging(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    inputs: Sequence[Any],
    *,
    base: ModelOrWeights,
    per: Literal["tensor", "task"] = "tensor",
    heads: Sequence[Mapping[str, Tensor]] | None = None,
    density: float = 1.0,
    initial: float = 0.3,
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 16,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Merged[AdaMergingReport]:
    """AdaMerging (Yang et al. 2024, 2310.02575): `theta_0 + sum_t lambda_t tau_t` of least prediction entropy.

    The coefficients, one per task and tensor (layer-wise, the better one) or per task, start at `initial` and are moved
    by Adam to minimise the sum over tasks of the mean entropy of predictions on unlabelled examples; they are kept in
    [0, 1]. The paper uses the test inputs: say so (transductive) where you report a score on them. `density < 1` trims
    the task vectors as TIES does first (AdaMerging++, 0.2). Entropy is also small where one class takes all: look at
    the report.

    Args:
        model: the architecture; its weights are not used and not touched.
        models: the fine-tuned models.
        inputs: for each model unlabelled inputs of its task, as `data` of `fisher`.
        base: the weights the models were fine-tuned from.
        heads: for each task tensors (of its own classifier) that replace the merged ones when its examples are run.
        steps, lr, batch_size: of Adam; the batch is per task and step.
        seed: of the order of examples.
        device: where to compute (default: where the weights are).
        progress: show a bar if it takes longer than two seconds.

    Returns:
        The merged weights, a state dict whose `.report` holds coefficients and entropies. Statistics are averaged.
    """
    if per not in ("tensor", "task"):
        raise InputError(f"per must be 'tensor' or 'task', got {per!r}")
    if heads is not None and len(heads) != len(models):
        raise InputError(f"heads: {len(heads)} for {len(models)} models; give the tensors of one for each")
    sets = weight_sets(models, base, module=model)
    parts = each(inputs, len(sets), "inputs")
    network = Network(model, pick_device(device, fitted(model, as_weights(base), "base")), Task.of(parts[0]).read)
    deltas = _deltas(sets, density)
    groups = {name: name if per == "tensor" else "*" for name in sets.weights}
    equal = ([1.0 / len(sets)] * len(sets), 0.0)
    mixture = Mixture(sets, sets.base_tensor, deltas.__getitem__, groups, equal, network.device)
    scales = {g: torch.full((len(sets),), initial, device=network.device, requires_grad=True) for g in groups.values()}
    network.load(mixture.whole(scales))
    optimizer = torch.optim.Adam(list(scales.values()), lr=lr)
    streams = [_Examples(part, f"inputs[{t}]", batch_size, seed + t, model) for t, part in enumerate(parts)]

    def weights(task: int) -> Weights:
        head = {} if heads is None else {name: tensor.to(network.device) for name, tensor in heads[task].items()}
        return mixture(scales) | head

    history = []
    for _ in tqdm(range(steps), desc="AdaMerging", disable=not progress):
        optimizer.zero_grad()
        row = []
        for t, stream in enumerate(streams):
            loss = _entropy(network.outputs(weights(t), to_device(stream.draw(), network.device)))
            loss.backward()  # one task's graph at a time
            row.append(loss.item())
        optimizer.step()
        with torch.no_grad():
            for scale in scales.values():
                scale.clamp_(0.0, 1.0)
        history.append(tuple(row))

    with torch.no_grad():
        predicted = tuple(_predicted(network, weights(t), stream) for t, stream in enumerate(streams))
    found = {group: tuple(scale.detach().tolist()) for group, scale in scales.items()}
    return Merged(mixture.whole(scales), AdaMergingReport(found, tuple(history), predicted))


def _deltas(sets: WeightSets, density: float) -> Weights:
    if density == 1.0:
        return {name: sets.deltas(name) for name in sets.weights}
    deltas = Pass(sets, lambda name, part: (sets.deltas(name, part),), "entries")
    limits = thresholds(deltas, density, len(sets), deltas.size)
    return {name: trim(sets.deltas(name), limits) for name in sets.weights}


def _entropy(outputs: Any) -> Tensor:
    """The mean over examples (and positions) of the entropy of softmax outputs `(..., C)`, in nats."""
    if not isinstance(outputs, Tensor):
        raise DataError("entropies are those of one tensor of outputs: say which with lmc.Task(outputs=...).on(inputs)")
    if outputs.shape[-1] < 2:
        raise DataError(
            f"outputs {tuple(outputs.shape)} have one class, whose entropy is 0 for any weights: AdaMerging needs class "
            "scores; for a single output use regmean, or fisher with likelihood="
        )
    logs = outputs.to(wide(outputs.dtype)).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def _predicted(network: Network, weights: Weights, stream: "_Examples") -> tuple[float, ...]:
    outputs = network.outputs(weights, to_device(stream.inputs, network.device))
    classes = outputs.argmax(-1).flatten()
    return tuple((torch.bincount(classes, minlength=outputs.shape[-1]) / len(classes)).tolist())


class _Examples:
    """Draws batches of inputs without end, each example once per round, in an order fixed by the seed."""

    def __init__(self, data: Any, what: str, batch_size: int, seed: int, model: nn.Module) -> None:
        self.inputs, targets = gather(data, what, model)
        self.cuttable = pieces(self.inputs, targets)  # a graph is one example
        self.count = len(tensors(self.inputs)[0])
        self.batch_size = min(batch_size, self.count)
        self.generator = torch.Generator().manual_seed(seed)
        self.queue: list[int] = []

    def draw(self) -> Any:
        if len(self.queue) < self.batch_size:
            self.queue = torch.randperm(self.count, generator=self.generator).tolist()
        index = torch.tensor([self.queue.pop() for _ in range(self.batch_size)])
        return take(self.inputs, index) if self.cuttable else self.inputs
