"""Fisher merging: each weight is averaged in proportion to how much each model's predictions depend on it.

For every likelihood here the outputs f are natural parameters, so that `d log p(y | f) / d f = y - mean(f)` with the
softmax, the sigmoid or f itself as the mean: one product with the outputs gives every score.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from lmc.core.context import own_context
from lmc.core.progress import tqdm
from lmc.errors import DataError, InputError, MismatchError
from lmc.merge.engine.aligning import alignable
from lmc.merge.engine.assembly import assemble
from lmc.merge.engine.call import coefficients
from lmc.merge.engine.tensors import WeightSets, weight_sets
from lmc.merge.with_data.judge import batches, each
from lmc.network.batches import cuttable, take, tensors, to_device
from lmc.network.derived import derived_names, gauged, settled
from lmc.network.network import Network, pick_device
from lmc.network.task import Task, class_axis, tensor_of
from lmc.weights import ModelOrWeights, StateDict, Weights, as_weights, fitted
from lmc.weights.state import wide

Labels = Literal["expected", "sampled", "true"]
Likelihood = Literal["categorical", "bernoulli", "gaussian"]
GRADIENT_BYTES = 256 << 20  # most memory for the gradients of single examples


@own_context
@alignable
def fisher(
    model: nn.Module,
    models: Sequence[ModelOrWeights],
    data: Sequence[Any],
    *,
    base: ModelOrWeights | None = None,
    weights: Sequence[float] | None = None,
    samples: int = 1024,
    labels: Labels | None = None,
    likelihood: Likelihood | None = None,
    normalize: bool = False,
    floor: float = 1e-6,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Weights:
    """Fisher merging (Matena, Raffel 2022, 2111.09832): `sum_t w_t F_t theta_t / sum_t w_t F_t`, entry by entry.

    `F_t` is the diagonal Fisher information of model t on inputs of its task (`fisher_information`), at least `floor`.
    One model's information is held at a time. Magnitudes can differ by orders between tasks: `normalize` divides each
    by its L2 norm over the whole model. The authors' code can keep the floor to one favoured model; here all have it.

    Args:
        model: the architecture; its weights are not used and not touched.
        models: the fine-tuned models.
        data: for each model inputs of its task: a tensor, `(inputs, targets)`, an iterable of batches, or a data set
            (its `.train`), as they are or with a task, `lmc.Task.binary().on(data)`. Of targets their values are used with
            `labels="true"` only, else which of them count and how outputs are laid out.
        base: not used; taken so that all methods are called alike.
        weights: one number per model (default 1 each).
        samples: examples per task; 256 to 4096 suffice.
        labels, likelihood, seed, device: as for `fisher_information`.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        InputError, DataError: data that do not fit the models, in number or in form.
    """
    states = [as_weights(m) for m in models]
    bar = tqdm(
        zip(states, each(data, len(states), "data"), strict=True), total=len(states), delay=2, disable=not progress
    )
    options = {"samples": samples, "labels": labels, "likelihood": likelihood, "seed": seed, "device": device}
    informations = (fisher_information(model, state, part, **options) for state, part in bar)
    return fisher_weighted(states, informations, weights=weights, normalize=normalize, floor=floor, model=model)


@own_context
def fisher_weighted(
    models: Sequence[ModelOrWeights],
    informations: Iterable[Weights],
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = False,
    floor: float = 1e-6,
    model: nn.Module | None = None,
) -> Weights:
    """`sum_t w_t F_t theta_t / sum_t w_t F_t` for given diagonal curvatures `F_t`, read one after the other.

    For losses that are quadratic with these diagonal Hessians it is the minimum of their sum. Weights without an entry
    in `informations`, and statistics, are averaged with `weights`.
    """
    sets = weight_sets(models, module=model)
    factors = coefficients(weights, len(sets))
    if min(factors) < 0 or sum(factors) == 0 or floor < 0:
        raise InputError(f"weights {factors} and floor {floor} must not be negative, nor all weights zero")
    total: Weights = {}
    moved: Weights = {}
    for t, (information, factor) in enumerate(zip(informations, factors, strict=True)):
        norm = sum(float(f.double().square().sum()) for f in information.values()) ** 0.5 if normalize else 1.0
        for name, f in information.items():
            if name not in sets.weights or f.shape != sets.states[0][name].shape:
                raise MismatchError(f"informations[{t}]: {name} of shape {tuple(f.shape)} fits no weight of the models")
            origin = sets.tensor(name, 0)
            share = (f.to(origin) / (norm or 1.0)).clamp_min(floor) * factor
            # summed as steps from the first model, so that equal models give that model
            moved[name] = moved.get(name, 0.0) + share * (sets.tensor(name, t) - origin)
            total[name] = total.get(name, 0.0) + share
    merged = assemble(sets, lambda name: _divide(sets, name, moved, total, factors), lambda _: _shares(factors))
    return StateDict(merged, like=sets.states[0])


def _divide(sets: WeightSets, name: str, moved: Weights, total: Weights, factors: list[float]) -> Tensor:
    if name not in total:
        return sets.combine(name, *_shares(factors))
    plain = sets.combine(name, *_shares(factors)).to(total[name])  # where no model's predictions depend on an entry
    return torch.where(total[name] > 0, sets.tensor(name, 0) + moved[name] / total[name], plain)


def _shares(factors: list[float]) -> tuple[list[float], float]:
    return [factor / sum(factors) for factor in factors], 0.0


@own_context
def fisher_information(
    model: nn.Module,
    weights: ModelOrWeights | None,
    data: Any,
    *,
    samples: int = 1024,
    labels: Labels | None = None,
    likelihood: Likelihood | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Weights:
    """The diagonal Fisher information `E_x E_y (d log p(y|x) / d theta)^2` of every parameter, in float32 or wider.

    Of weights under a weight or spectral normalisation or a pruning mask it is that of the weight in use, under the name of
    the tensor that has its shape (`weight_v`, `original1`, `weight_orig`); lengths and directions have none of their own.

    `labels="expected"` takes the expectation over y under the model: one backward pass per output. `"sampled"` draws
    one y from it. `"true"` takes the targets (the empirical Fisher, another quantity: it is small where the model
    fits). By default it is "expected" for outputs `(N, C)`, and "sampled" where an example has many positions: `(N, T, C)`,
    or `(N, C, ...)` beside targets `(N, ...)`. The log-probabilities of positions are added up; those whose target does not
    count are left out. The square is of each example's own gradient (of a graph, of each node's), in eval mode.

    The likelihood says what outputs mean: logits of C classes; logits of C independent yes-or-no answers; or means of
    Gaussians with variance 1, for which the expected information is the Gauss-Newton diagonal
    `E_x sum_c (d f_c / d theta)^2`. By default it is that of the task, or read off the targets: Gaussian where they are
    floating-point, Bernoulli where one output meets integer targets, otherwise classes. (The softmax of a single output is
    constant, its information zero.)

    Args:
        weights: where to measure (None: the module's own).
        data: inputs, as for `fisher`.
        samples: at most this many examples, evenly spread over data given whole.
        seed: of drawn labels.
        device: where to compute (default: where the weights are).

    Raises:
        InputError: an unknown `labels` or `likelihood`.
        DataError: outputs or targets that do not fit them, or a single output without targets and `likelihood=`.
    """
    if labels not in (None, "expected", "sampled", "true"):
        raise InputError(f"labels must be 'expected', 'sampled' or 'true', got {labels!r}")
    if likelihood not in (None, "categorical", "bernoulli", "gaussian"):
        raise InputError(f"likelihood must be 'categorical', 'bernoulli' or 'gaussian', got {likelihood!r}")
    state = fitted(model, as_weights(model if weights is None else weights))
    task = Task.of(data)
    network = Network(model, pick_device(device, state), tensor_of if task.labels is not None else task.read)
    network.check(state, "weights")
    derived = derived_names(state, model)
    state = gauged(state, model) if derived else state
    network.load(state)
    sets = weight_sets([state], module=model)
    trained = {name: state[name].to(network.device) for name in sets.weights if name not in derived}
    rest = {name: state[name].to(network.device) for name in derived}
    size = sum(tensor.numel() for tensor in trained.values())
    chunk = max(1, min(samples, 128, GRADIENT_BYTES // (4 * size)))
    generator = torch.Generator().manual_seed(seed)

    def score(parameters: Weights, inputs: Any, pull: Tensor) -> Tensor:
        weights = settled(parameters | rest, state) if derived else parameters
        outputs = network.outputs(weights, inputs)
        return (outputs.to(pull.dtype) * pull).sum()

    gradients = _EachGradient(score, chunk)
    found = {name: torch.zeros_like(tensor, dtype=wide(tensor.dtype)) for name, tensor in trained.items()}
    count = 0
    for inputs, targets in batches(data, "data", limit=samples, size=chunk, model=model):
        inputs = to_device(inputs, network.device)
        outputs = network(inputs)
        if not isinstance(outputs, Tensor):
            raise DataError(
                "the information is that of one tensor of outputs: say which with lmc.Task(outputs=...).on(data)"
            )
        targets = None if targets is None else targets.to(outputs.device)
        rows, back = _classes_last(outputs.to(wide(outputs.dtype)), targets, task.axis)
        kind = _likelihood(rows, targets, task) if likelihood is None else likelihood
        if labels is None:
            taken: Labels = "expected" if rows.ndim == 2 else "sampled"
        else:
            taken = labels
        counts = torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
        if targets is not None and kind == "categorical" and targets.shape == counts.shape:
            counts = targets != task.ignore
        for pull, share in _pulls(rows, targets, kind, taken, generator, counts):
            for part, found_here in gradients(trained, inputs, back(pull)):
                for name, gradient in found_here.items():
                    own = share[part].to(found[name])
                    found[name] += torch.einsum("n,n...->...", own, gradient.to(found[name]).square())
        count += int(counts.reshape(len(counts), -1).any(1).sum())
    return {name: (total / max(count, 1)).to(state[name].device) for name, total in found.items()}


def _classes_last(
    outputs: Tensor, targets: Tensor | None, axis: int | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Outputs (N, ..., C), and the way back to how they came."""
    if targets is not None and class_axis(outputs.shape, targets, axis) == 1:
        return outputs.movedim(1, -1), lambda pull: pull.movedim(-1, 1)
    if targets is None and outputs.ndim > 3:
        raise DataError(
            f"outputs {tuple(outputs.shape)}: targets tell which axis holds the classes; pass (inputs, targets)"
        )
    return outputs, lambda pull: pull


def _likelihood(outputs: Tensor, targets: Tensor | None, task: Task) -> Likelihood:
    """The one that the task or the targets ask for."""
    if task.is_binary:
        return "bernoulli"
    if targets is not None and targets.is_floating_point():
        return "gaussian"
    if outputs.shape[-1] > 1:
        return "categorical"
    if targets is None:
        raise DataError("a single output: give likelihood='bernoulli' (one logit) or 'gaussian' (regression)")
    return "bernoulli"


def _pulls(
    outputs: Tensor,
    targets: Tensor | None,
    likelihood: Likelihood,
    labels: Labels,
    generator: torch.Generator,
    counts: Tensor,
) -> Iterable[tuple[Tensor, Tensor]]:
    """Scores `y - mean(f)` shaped like the outputs, each with the share `(N,)` of every example's square that counts.

    Args:
        counts: (N, ...) whether a position counts; scores are zero where it does not.
    """
    if likelihood == "categorical" and outputs.shape[-1] == 1:
        raise DataError("likelihood='categorical' of a single output has no information; use 'bernoulli' or 'gaussian'")
    mean = {"categorical": lambda: outputs.softmax(-1), "bernoulli": outputs.sigmoid, "gaussian": lambda: outputs}[
        likelihood
    ]()
    ones = torch.ones(len(outputs), device=outputs.device)
    if labels == "expected":
        if outputs.ndim != 2:
            raise DataError(f"labels='expected' needs outputs (N, C), got {tuple(outputs.shape)}; use 'sampled'")
        for c in range(outputs.shape[1]):
            unit = torch.zeros_like(outputs)
            unit[:, c] = 1.0
            if likelihood == "categorical":
                yield unit - mean, mean[:, c] * counts
            else:  # independent outputs: products of different ones have expectation 0
                yield unit, ones if likelihood == "gaussian" else mean[:, c] * (1.0 - mean[:, c])
        return
    if labels == "sampled":
        drawn = _draw(mean.cpu(), likelihood, generator).to(mean)
    else:
        drawn = _as_outputs(targets, outputs, likelihood, counts)
    yield (drawn - mean) * counts[..., None], ones


def _draw(mean: Tensor, likelihood: Likelihood, generator: torch.Generator) -> Tensor:
    """One y for every output, shaped like the outputs; classes as one-hot vectors."""
    if likelihood == "gaussian":
        return mean + torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
    if likelihood == "bernoulli":
        return torch.bernoulli(mean, generator=generator)
    flat = torch.multinomial(mean.reshape(-1, mean.shape[-1]), 1, generator=generator)
    return F.one_hot(flat[:, 0], mean.shape[-1]).reshape(mean.shape)


def _as_outputs(targets: Tensor | None, outputs: Tensor, likelihood: Likelihood, counts: Tensor) -> Tensor:
    """Targets shaped like the outputs; classes as one-hot vectors."""
    classes = likelihood == "categorical" and targets is not None and not targets.is_floating_point()
    shape = outputs.shape[:-1] if classes else outputs.shape
    if targets is not None and not classes and targets.numel() == outputs.numel():
        targets = targets.reshape(shape)  # (N,) for a single output (N, 1)
    if targets is None or targets.shape != shape:
        raise DataError(f"labels='true' needs targets of shape {tuple(shape)}")
    goal = F.one_hot(targets.long().where(counts, 0), outputs.shape[-1]) if classes else targets
    return goal.to(outputs)


class _EachGradient:
    """Gradients `(n, *shape)` of a function of (weights, inputs, pulls) for stretches of n of N examples, each stretch
    with its place.

    Those of a stretch all at once; one after the other for networks that cannot be batched so, whose course depends on the
    data (as where attention masks are looked at). Examples of one call that cannot be cut, the nodes of a graph, are pulled
    at one by one in that call.
    """

    def __init__(self, function: Callable[[Weights, Any, Tensor], Tensor], chunk: int) -> None:
        self.function = function
        self.chunk = chunk
        self.together = True

    def __call__(self, weights: Weights, inputs: Any, pulls: Tensor) -> Iterator[tuple[slice, Weights]]:
        if cuttable(inputs, pulls):
            yield slice(None), self._of(weights, inputs, pulls)
            return
        for start in range(0, len(pulls), self.chunk):
            part = slice(start, start + self.chunk)
            yield part, self._of(weights, None, _one_at_a_time(pulls)[part], whole=inputs)

    def _of(self, weights: Weights, examples: Any, pulls: Tensor, whole: Any = None) -> Weights:
        def one(weights: Weights, example: Any, pull: Tensor) -> Tensor:
            return (
                self.function(weights, _batch_of_one(example), pull[None])
                if whole is None
                else self.function(weights, whole, pull)
            )

        if self.together:
            try:
                return vmap(grad(one), in_dims=(None, None if examples is None else 0, 0))(weights, examples, pulls)
            except RuntimeError:
                self.together = False
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
        rows = []
        for n, pull in enumerate(pulls):
            value = one(leaves, None if examples is None else take(examples, n), pull)
            rows.append(torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True))
        return {name: torch.stack(column) for name, column in zip(leaves, zip(*rows, strict=True), strict=True)}


def _one_at_a_time(pulls: Tensor) -> Tensor:
    """(N, N, ...): the pulls, each alone in its place."""
    return torch.eye(len(pulls), device=pulls.device, dtype=pulls.dtype)[(...,) + (None,) * (pulls.ndim - 1)] * pulls


def _batch_of_one(example: Any) -> Any:
    if isinstance(example, Tensor):
        return example[None]
    if isinstance(example, dict):
        return {key: value[None] for key, value in example.items()}
    return tuple(value[None] for value in tensors(example))
