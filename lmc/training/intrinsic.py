"""Intrinsic dimension: in how many random directions a network must be free to move to solve its task."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.network.batches import Split, as_splits, to_device
from lmc.network.copies import fresh_copy
from lmc.network.network import Network, pick_device, whole
from lmc.network.task import Loss, Outputs, Task, measured
from lmc.training.run import Judge, batches_of, check_model, device_of, examples, given, initialised
from lmc.weights import ModelOrWeights, Weights

if TYPE_CHECKING:
    import pandas as pd

Kind: TypeAlias = Literal["dense", "sparse", "fastfood"]
MOST_DENSE = 1 << 28  # entries of a dense projection: 1 GB in float32
TEST_BATCH = 1024


@dataclass(frozen=True)
class Projection:
    """A linear map P from `dimension` numbers to the parameters of a network, its columns of norm 1 over all of these.

    Attributes:
        dimension: of its argument.
        shapes: name -> shape of the parameters.
        forward: (d,) -> (D,), all parameters one behind the other.
        adjoint: (D,) -> (d,), the transpose.
    """

    dimension: int
    shapes: dict[str, torch.Size]
    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]

    def __call__(self, vector: Tensor) -> Weights:
        """The parameters that a vector (d,) stands for."""
        flat = self.forward(vector).split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), flat, strict=True)}


@own_context
def projection(
    shapes: Mapping[str, Sequence[int]],
    dimension: int,
    *,
    kind: Kind = "fastfood",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Projection:
    """A random projection into the parameters of a network (Li et al. 2018, arXiv:1804.08838, section 2 and its code).

    "dense": Gaussian entries. "sparse": in a tensor of n entries each is nonzero with probability `1 / sqrt(n)`, with a
    random sign and magnitude `n^(1/4)`, so that all tensors have entries of one variance. Of both, every column is
    divided by its norm over all tensors. "fastfood" (Le et al. 2013): signs, Hadamard transform, permutation, Gaussian
    scales, Hadamard transform, of the next power of two L >= max(D, d), of which the first D entries are kept: columns of
    norm 1 in the mean, at the cost of `L log L` and the memory of L.

    Args:
        shapes: name -> shape of the parameters.
        dimension: d, at least 1 and at most all of them.
        kind, seed: of the projection; the same seed gives the same one on every device.
        dtype, device: of its numbers.

    Raises:
        InputError: an unknown kind, a dimension out of range, or a dense projection that would not fit into memory.
    """
    sizes = {name: torch.Size(shape) for name, shape in shapes.items()}
    total = sum(math.prod(shape) for shape in sizes.values())
    if kind not in get_args(Kind):
        raise InputError(f"kind={kind!r}; expected one of {', '.join(get_args(Kind))}")
    if not (isinstance(dimension, int) and 1 <= dimension <= total):
        raise InputError(f"dimension={dimension!r}; expected a whole number from 1 to the {total} parameters")
    if kind == "dense" and total * dimension > MOST_DENSE:
        raise InputError(f"a dense projection of {total} x {dimension} entries is too large; use kind='fastfood'")
    generator = torch.Generator().manual_seed(seed)
    if kind == "fastfood":
        return _fastfood(dimension, sizes, total, generator, dtype, device)
    if kind == "dense":
        matrix = torch.randn(total, dimension, generator=generator, dtype=torch.float64)
        matrix /= matrix.norm(dim=0)
    else:
        matrix = _sparse(sizes, dimension, generator)
    matrix = matrix.to(device, dtype)
    return Projection(dimension, sizes, lambda v: matrix @ v, lambda v: matrix.T @ v)


def _sparse(shapes: Mapping[str, torch.Size], dimension: int, generator: torch.Generator) -> Tensor:
    rows, columns, values, first = [], [], [], 0
    for shape in shapes.values():
        n = math.prod(shape)
        chance = 1.0 / math.sqrt(n) if n else 0.0
        count = int(torch.binomial(torch.tensor(float(n * dimension)), torch.tensor(chance), generator=generator))
        places = _distinct(n * dimension, count, generator)
        signs = 2 * torch.randint(2, (len(places),), generator=generator) - 1
        rows.append(first + places // dimension)
        columns.append(places % dimension)
        values.append(signs * n**0.25)
        first += n
    at, to, entries = torch.cat(rows), torch.cat(columns), torch.cat(values).double()
    norms = torch.zeros(dimension, dtype=torch.float64).index_add_(0, to, entries.square()).sqrt()
    entries = entries / norms.clamp_min(torch.finfo(torch.float64).tiny)[to]
    return torch.sparse_coo_tensor(torch.stack([at, to]), entries, (first, dimension), check_invariants=True).coalesce()


def _distinct(size: int, count: int, generator: torch.Generator) -> Tensor:
    """So many different numbers below `size`, ascending, each set of them as likely as any other."""
    if 2 * count > size:
        return torch.randperm(size, generator=generator)[:count].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:  # some are drawn twice
        more = torch.randint(size, (count - len(found),), generator=generator)
        found = torch.cat([found, more]).unique()
    return found


def _fastfood(
    dimension: int,
    shapes: dict[str, torch.Size],
    total: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Projection:
    length = 1 << (max(total, dimension) - 1).bit_length()  # exact, where a rounded logarithm may overshoot
    signs = (2 * torch.randint(2, (length,), generator=generator) - 1).to(device, dtype)
    order = torch.randperm(length, generator=generator).to(device)
    scales = torch.randn(length, generator=generator, dtype=torch.float64)
    # sqrt(L sum G^2) makes every column of the square transform a unit vector; of its L entries D are kept
    scale = 1.0 / (math.sqrt(length * float(scales.square().sum())) * math.sqrt(total / length))
    gaussian = (scales * scale).to(device, dtype)

    def forward(vector: Tensor) -> Tensor:
        mixed = hadamard(F.pad(vector, (0, length - dimension)) * signs)
        return hadamard(mixed[order] * gaussian)[:total]

    def adjoint(vector: Tensor) -> Tensor:
        mixed = hadamard(F.pad(vector, (0, length - total))) * gaussian
        return (hadamard(torch.empty_like(mixed).index_copy(0, order, mixed)) * signs)[:dimension]

    return Projection(dimension, shapes, forward, adjoint)


def hadamard(vector: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of a vector whose length is a power of two, without normalisation."""
    step, length = 1, len(vector)
    while step < length:
        pairs = vector.view(-1, 2, step)
        vector = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1).view(-1)
        step *= 2
    return vector


@dataclass(frozen=True, eq=False)
class IntrinsicDimension(Result):
    """Test accuracies of networks that were trained inside random subspaces.

    Attributes:
        dimensions: (d,) ascending.
        accuracies: (d, seeds) on the test split.
        baseline: the accuracy that counts as a full solution.
        share: of the baseline that must be passed.
        kind: of the projection.
        parameters: D, all that could be trained.
    """

    dimensions: tuple[int, ...]
    accuracies: np.ndarray
    baseline: float
    share: float
    kind: str
    parameters: int

    @property
    def value(self) -> int | None:
        """The first dimension whose mean accuracy lies strictly above the share of the baseline; None if none does."""
        above = self.accuracies.mean(1) > self.share * self.baseline
        return next((d for d, enough in zip(self.dimensions, above, strict=True) if enough), None)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each dimension: dimension, mean and standard deviation of the accuracy."""
        columns = {"accuracy": self.accuracies.mean(1), "std": self.accuracies.std(1)}
        return require("pandas").DataFrame({"dimension": self.dimensions, **columns})

    def __str__(self) -> str:
        found = f"d_int{round(100 * self.share)} = {self.value}" if self.value else "not reached"
        return (
            f"IntrinsicDimension of {self.parameters:,} parameters, {self.kind} projections, baseline {self.baseline:.3f}: "
            f"{found}; tried {', '.join(map(str, self.dimensions))}, up to {self.accuracies.mean(1).max():.3f}"
        )

    __repr__ = __str__


@own_context
def intrinsic_dimension(
    model: nn.Module,
    data: Any,
    dimensions: Iterable[int],
    *,
    baseline: float,
    share: float = 0.9,
    kind: Kind = "fastfood",
    loss: Loss | Task | None = None,
    outputs: Outputs = None,
    init: ModelOrWeights | None = None,
    seeds: Iterable[int] = (0, 1, 2),
    epochs: int = 20,
    lr: float = 1e-2,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> IntrinsicDimension:
    """The intrinsic dimension of a task for an architecture (Li et al. 2018, arXiv:1804.08838).

    `theta = theta_0 + P v` with fixed random P and trained v (from 0, by Adam with betas 0.9 and 0.99); `d_int90` is the
    first dimension whose mean test accuracy lies strictly above 90 % of the baseline. State which baseline: that of this
    architecture, trained directly, or a global one. From `init`, the dimension of fine-tuning. The network runs in eval
    mode: dropout is off, and batch normalisation keeps the statistics that it starts with.

    Args:
        model: the architecture.
        data, loss, outputs: as for `train`, with a test split and a task that has an accuracy.
        dimensions: d to try.
        baseline: the accuracy of a full solution, 0 to 1.
        share: of it.
        kind: of the projection, see `projection`.
        init: theta_0 (default: each seed initialises its own).
        seeds: of initialisation, projection and order of the data.
        epochs, lr, batch_size: of the training of v.
        device, progress: as for `train`.

    Raises:
        InputError: dimensions, baseline or share out of range, no seed, a model without what training needs.
        DataError: unusable data, or data without a test split.
    """
    wanted, drawn = sorted(set(dimensions)), list(seeds)
    if not wanted or not drawn:
        raise InputError("dimensions and seeds: at least one of each is needed")
    for name, number in (("baseline", baseline), ("share", share)):
        if not 0.0 < number <= 1.0:
            raise InputError(f"{name}={number}; expected a number above 0, at most 1")
    place = pick_device(device_of(model) if device is None else device, {})
    task = Task.of(data, loss, outputs=outputs)
    if len(as_splits(data, task.targets)) < 2:
        raise InputError("data: a test split is needed, on which the accuracy is measured")
    split, test = examples(data, task, place), examples(data, task, place, -1)
    task = task.fitted(model, split)
    blank = fresh_copy(model).to(place)
    check_model(blank, task, split, place)
    judge = Judge.of(task, split)
    trained = [name for name, p in blank.named_parameters() if p.requires_grad]
    network = Network(blank, place, whole)
    scores = np.zeros((len(wanted), len(drawn)))
    with tqdm(total=len(wanted) * len(drawn), desc="subspaces", unit="run", disable=not progress) as bar:
        for column, seed in enumerate(drawn):
            start = initialised(blank, seed) if init is None else given(blank, init)
            shapes = {name: start[name].shape for name in trained}
            for row, dimension in enumerate(wanted):
                onto = projection(shapes, dimension, kind=kind, seed=seed, dtype=start[trained[0]].dtype, device=place)
                weights = _train_inside(network, start, onto, judge, split, seed, epochs, lr, batch_size)
                scores[row, column] = _accuracy(network, weights, task, test)
                bar.update()
    parameters = sum(math.prod(blank.get_parameter(name).shape) for name in trained)
    return IntrinsicDimension(tuple(wanted), scores, baseline, share, kind, parameters)


@torch.no_grad()
def _accuracy(network: Network, weights: Weights, task: Task, split: Split) -> float:
    total = count = 0.0
    for inputs, targets in split.iterate(TEST_BATCH):
        inputs, targets = to_device(inputs, network.device), targets.to(network.device)
        outputs = task.read(network.outputs(weights, task.call(inputs, targets)))
        rows, flat = task.logits(outputs, targets), targets.reshape(-1)
        if rows is not None:
            total += int(
                ((rows.argmax(-1) == flat) & (flat != task.ignore)).sum()
            )  # exact: it is held against a threshold
        elif (measure := task.metrics.get("accuracy")) is not None:
            total += task.weight(targets) * float(
                measured(measure, "accuracy", outputs, targets, inputs).double().mean()
            )
        else:
            raise InputError(
                "loss: the intrinsic dimension needs an accuracy, among the metrics of the task or of classes"
            )
        count += task.weight(targets)
    return total / count


def _train_inside(
    network: Network,
    start: Weights,
    onto: Projection,
    judge: Judge,
    split: Split,
    seed: int,
    epochs: int,
    lr: float,
    batch_size: int,
) -> Weights:
    """The weights `start + P v` after v was trained."""
    v = torch.zeros(onto.dimension, dtype=next(iter(start.values())).dtype, device=network.device, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)

    def moved() -> Weights:
        return {**start, **{name: start[name] + part for name, part in onto(v).items()}}

    for _ in range(epochs):
        for inputs, targets in batches_of(split, network.device, batch_size, generator, drop_last=False):
            loss = judge(network.outputs(moved(), judge.task.call(inputs, targets)), targets, inputs)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return moved()
