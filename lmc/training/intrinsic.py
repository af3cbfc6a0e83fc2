"""Intrinsic dimension: in how many random directions a network must be free to move to solve its task."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc.core.context import own_context, warn
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.network.batches import Split, as_splits, to_device
from lmc.network.copies import fresh_copy
from lmc.network.network import Network, pick_device, whole
from lmc.network.task import Loss, Outputs, Task, measured
from lmc.training.run import (
    Judge,
    Recipe,
    batches_of,
    check_model,
    device_of,
    examples,
    given,
    initialised,
    is_whole,
    trained_names,
    whole_numbers,
)
from lmc.weights import ModelOrWeights, Weights
from lmc.weights.state import least_divisor

if TYPE_CHECKING:
    import pandas as pd

Kind: TypeAlias = Literal["dense", "sparse", "fastfood"]
Linear: TypeAlias = Callable[[Tensor], Tensor]
MOST_DENSE = 1 << 28  # entries of a dense projection: 1 GB in float32
TEST_BATCH = 1024
HADAMARD_BLOCK = 64  # a few products with matrices of this size are faster than a sum for each bit of the index


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
    forward: Linear
    adjoint: Linear

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
        InputError: an unknown kind, a dimension out of range, whole numbers as dtype, or a dense projection that would not fit
            into memory.
    """
    if not isinstance(shapes, Mapping):
        raise InputError(f"shapes: expected a mapping from names to shapes, got {type(shapes).__name__}")
    sizes = {name: torch.Size(shape) for name, shape in shapes.items()}
    total = sum(math.prod(shape) for shape in sizes.values())
    check_projection(kind, dimension, total)
    if not (dtype.is_floating_point or dtype.is_complex):
        raise InputError(f"dtype={dtype}; the entries of a projection are no whole numbers")
    generator = torch.Generator().manual_seed(seed)
    if kind == "fastfood":
        forward, adjoint = _fastfood(dimension, total, generator, dtype, device)
    elif kind == "sparse":
        matrix = _sparse(sizes, dimension, generator).to(device, dtype)
        (rows, columns), entries = matrix.indices(), matrix.values()
        forward, adjoint = _spread(columns, entries, rows, total), _spread(rows, entries, columns, dimension)
    else:
        matrix = torch.randn(total, dimension, generator=generator, dtype=torch.float64)
        matrix /= matrix.norm(dim=0)  # in place: it is the largest thing here
        matrix = matrix.to(device, dtype)
        forward, adjoint = matrix.mv, matrix.T.mv
    return Projection(dimension, sizes, _of_length(dimension, forward), _of_length(total, adjoint))


def check_projection(kind: Any, dimension: Any, total: int) -> None:
    """Raise `InputError` for a kind or a number of dimensions that no projection into so many parameters has."""
    if kind not in get_args(Kind):
        raise InputError(f"kind={kind!r}; expected one of {', '.join(get_args(Kind))}")
    if not (is_whole(dimension) and 1 <= dimension <= total):
        raise InputError(f"dimension={dimension!r}; expected a whole number from 1 to the {total} parameters")
    if kind == "dense" and total * dimension > MOST_DENSE:
        raise InputError(f"a dense projection of {total} x {dimension} entries is too large; use kind='fastfood'")


def _of_length(length: int, function: Linear) -> Linear:
    """The function, of vectors of one length alone, as gathering and padding would take others, too; and in their dtype."""

    def checked(vector: Tensor) -> Tensor:
        if vector.shape != (length,):
            raise InputError(f"vector: expected shape ({length},), got {tuple(vector.shape)}")
        with torch.autocast(vector.device.type, enabled=False):
            return function(vector)

    return checked


def _spread(at: Tensor, entries: Tensor, to: Tensor, size: int) -> Linear:
    """The product with a sparse matrix of `size` rows, whose entries stand in the columns `at` and the rows `to`.

    Gathered and summed: torch's product of a matrix in coordinates with a vector takes ten times as long on a CPU.
    """
    return lambda vector: vector.new_zeros(size).index_add(0, to, vector.index_select(0, at) * entries)


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
    dimension: int, total: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> tuple[Linear, Linear]:
    length = 1 << (max(total, dimension) - 1).bit_length()  # exact, where a rounded logarithm may overshoot
    signs = (2 * torch.randint(2, (length,), generator=generator) - 1).to(device, dtype)
    order = torch.randperm(length, generator=generator).to(device)
    scales = torch.randn(length, generator=generator, dtype=torch.float64)
    # sqrt(L sum G^2) makes every column of the square transform a unit vector; of its L entries D are kept
    scale = 1.0 / (math.sqrt(length * float(scales.square().sum())) * math.sqrt(total / length))
    gaussian = (scales * scale).to(device, dtype)

    def forward(vector: Tensor) -> Tensor:
        mixed = hadamard(F.pad(vector, (0, length - dimension)) * signs)
        return hadamard(mixed.index_select(0, order) * gaussian)[:total]

    def adjoint(vector: Tensor) -> Tensor:
        mixed = hadamard(F.pad(vector, (0, length - total))) * gaussian
        return (hadamard(torch.empty_like(mixed).index_copy(0, order, mixed)) * signs)[:dimension]

    return forward, adjoint


def hadamard(vector: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of a vector whose length is a power of two, without normalisation.

    The matrix is a Kronecker product of small ones, which are applied one after the other, each to its own digit of the index.
    """
    done = 1
    while done < len(vector):
        size = min(HADAMARD_BLOCK, len(vector) // done)
        block = _hadamard_matrix(size, vector)
        digits = vector.view(-1, size, done)
        vector = (digits[..., 0] @ block if done == 1 else block @ digits).reshape(-1)
        done *= size
    return vector


def _hadamard_matrix(size: int, like: Tensor) -> Tensor:
    """(size, size) entries of +1 and -1, symmetric."""
    matrix = like.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@dataclass(frozen=True, eq=False)
class IntrinsicDimension(Result):
    """Test accuracies of networks that were trained inside random subspaces.

    Attributes:
        dimensions: (d,) ascending.
        accuracies: (d, seeds) on the test split; NaN for a run that diverged.
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
            f"{found}; tried {', '.join(map(str, self.dimensions))}, up to {np.fmax.reduce(self.accuracies.mean(1)):.3f}"
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
    wanted = sorted(set(whole_numbers("dimensions", dimensions)))
    recipe = Recipe("adam", lr, "constant", epochs, batch_size, 0.0, 0.9, "fresh" if init is None else "given")
    drawn = recipe.checked(seeds)
    for name, number in (("baseline", baseline), ("share", share)):
        if not isinstance(number, Real) or not 0.0 < number <= 1.0:
            raise InputError(f"{name}={number}; expected a number above 0, at most 1")
    place = pick_device(device_of(model) if device is None else device, {})
    task = Task.of(data, loss, outputs=outputs)
    if len(as_splits(data, task.targets)) < 2:
        raise InputError("data: a test split is needed, on which the accuracy is measured")
    split, test = examples(data, task, place), examples(data, task, place, -1)
    task = task.fitted(model, split)
    blank = fresh_copy(model).to(place)
    for each in (split, test):
        check_model(blank, task, each, place)
    judge = Judge.of(task, split)
    trained = trained_names(blank)
    parameters = sum(blank.get_parameter(name).numel() for name in trained)
    for dimension in wanted:  # all of them before the first is trained
        check_projection(kind, dimension, parameters)
    network = Network(blank, place, whole)
    scores = np.zeros((len(wanted), len(drawn)))
    with tqdm(total=len(wanted) * len(drawn), desc="subspaces", unit="run", disable=not progress) as bar:
        for column, seed in enumerate(drawn):
            start = initialised(blank, seed) if init is None else given(blank, init)
            shapes = {name: start[name].shape for name in trained}
            for row, dimension in enumerate(wanted):
                onto = projection(shapes, dimension, kind=kind, seed=seed, dtype=start[trained[0]].dtype, device=place)
                weights = _train_inside(network, start, onto, judge, split, seed, recipe)
                if all(bool(weights[name].isfinite().all()) for name in trained):
                    scores[row, column] = _accuracy(network, weights, task, test)
                else:
                    scores[row, column] = math.nan
                    warn(
                        f"seed {seed} diverged in {dimension} dimensions, which counts as no solution; try a smaller lr"
                    )
                bar.update()
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
    recipe: Recipe,
) -> Weights:
    """The weights `start + P v` after v was trained."""
    v = torch.zeros(onto.dimension, dtype=next(iter(start.values())).dtype, device=network.device, requires_grad=True)
    optimizer = torch.optim.Adam([v], recipe.lr, betas=(0.9, 0.99), eps=least_divisor([v]))
    generator = torch.Generator().manual_seed(seed)

    def moved() -> Weights:
        return {**start, **{name: start[name] + part for name, part in onto(v).items()}}

    for _ in range(recipe.epochs):
        for inputs, targets in batches_of(split, network.device, recipe.batch_size, generator, drop_last=False):
            loss = judge(network.outputs(moved(), judge.task.call(inputs, targets)), targets, inputs)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return moved()
