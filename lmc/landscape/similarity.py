"""Similarity of what two networks compute: representations layer by layer, and predictions."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import DataError, InputError
from lmc.landscape.evaluation.evaluator import Evaluator
from lmc.landscape.evaluation.scores import joined
from lmc.network.batches import Split, head, take, to_device
from lmc.network.network import Network, pick_device
from lmc.network.task import Outputs
from lmc.weights import ModelOrWeights, Weights, agreeing

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Similarity(Result):
    """Two classifiers a and b on the same examples; all but `cka` are fractions of them.

    Attributes:
        split: whose examples they are.
        count: their number.
        errors: what a and b get wrong. Their difference and their sum bound the disagreement from below and above.
        disagreement: predicted classes that differ.
        lost: right in a, wrong in b.
        won: wrong in a, right in b.
        cka: layer -> linear CKA of its outputs in a and b, 0 to 1.
    """

    split: str
    count: int
    errors: tuple[float, float]
    disagreement: float
    lost: float
    won: float
    cka: dict[str, float] = field(repr=False)

    @property
    def normalised_disagreement(self) -> float:
        """Disagreement as a share of the most that the two errors allow; NaN where neither network errs."""
        most = sum(self.errors)
        return self.disagreement / most if most else float("nan")

    def to_frame(self) -> "pd.DataFrame":
        """A row for each layer: layer, cka."""
        return require("pandas").DataFrame({"layer": list(self.cka), "cka": list(self.cka.values())})

    def __str__(self) -> str:
        a, b = self.errors
        lines = [
            f"Similarity on {self.count} examples ({self.split}): {100 * self.disagreement:.1f} % predicted differently",
            f"  errors {100 * a:.1f} % and {100 * b:.1f} %; {100 * self.lost:.1f} % lost, {100 * self.won:.1f} % won",
        ]
        return "\n".join([*lines, *(f"  CKA of {layer}: {value:.3f}" for layer, value in self.cka.items())])

    __repr__ = __str__


@own_context
def similarity(
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights,
    data: Any,
    *,
    examples: int = 512,
    outputs: Outputs = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> Similarity:
    """Compare what two networks of one architecture compute, in eval mode.

    Linear CKA (Kornblith et al. 2019, arXiv:1905.00414, section 3) does not change when units are permuted, so that it
    bounds what alignment could achieve; it does not prove that equal units are in equal places. With fewer examples than
    about ten times the units of a layer it comes out too high.

    Args:
        model: the architecture.
        a, b: its weights; modules or state dicts.
        data: as for `evaluate`; of several splits the test split.
        examples: how many are used for CKA, at once; predictions are compared on all.
        outputs, batch_size, device: as for `evaluate`.

    Raises:
        MismatchError: a, b and the model are not of one architecture, dtype and device.
        WeightsError: weights that are not finite.
        DataError: data that are unusable or no classification.
        InputError: fewer than 2 examples asked for.
    """
    if not (isinstance(examples, int) and examples >= 2):
        raise InputError(f"examples={examples!r}; expected a whole number, at least 2")
    a, b = agreeing([a, b], "ab", model=model)
    evaluator = Evaluator(
        model, data, outputs=outputs, batch_size=batch_size, device=pick_device(device, a), predictions=True
    )
    scores = list(evaluator([a, b]))
    split = evaluator.splits[-1]
    first, second = (score[split.name].predictions for score in scores)
    if first is None or second is None:
        raise DataError(f"{split.name}: predictions can be compared for targets (N,) that are classes only")
    targets = torch.cat([goal for _inputs, goal in split.iterate(len(first))]).cpu()
    counted = targets != evaluator.task.ignore
    first, second, targets = first[counted], second[counted], targets[counted]
    inputs = to_device(_some(split, examples), evaluator.device)
    left, right = (_grams(evaluator.network, state, inputs) for state in (a, b))
    cka = {layer: value for layer in left if (value := _alignment(left[layer], right[layer])) is not None}

    def share(which: Tensor) -> float:
        return float(which.double().mean())

    return Similarity(
        split.name,
        len(targets),
        (share(first != targets), share(second != targets)),
        share(first != second),
        share((first == targets) & (second != targets)),
        share((first != targets) & (second == targets)),
        cka,
    )


@own_context
def linear_cka(x: Tensor, y: Tensor) -> float:
    """`|Y'X|^2 / (|X'X| |Y'Y|)` of features (N, p) and (N, q) of the same N examples, centred; NaN for constant ones.

    Raises:
        InputError: features of other shapes.
    """
    if x.ndim < 2 or y.ndim < 2 or len(x) != len(y):
        raise InputError(f"features {tuple(x.shape)} and {tuple(y.shape)}: expected (N, ...) of the same N examples")
    value = _alignment(_gram(x), _gram(y))
    return float("nan") if value is None else value


def _alignment(k: Tensor, m: Tensor) -> float | None:
    """The cosine between two Gram matrices (N, N), which is CKA: `|Y'X|^2 = <XX', YY'>`. None where one is zero."""
    lengths = float(k.norm() * m.norm())
    return float((k * m).sum()) / lengths if lengths > 0.0 else None


def _gram(features: Tensor) -> Tensor:
    """Inner products (N, N) between the features of examples, centred, in float64 on the CPU."""
    flat = features.flatten(1).double()
    centred = flat - flat.mean(0)
    return (centred @ centred.T).cpu()


def _grams(network: Network, weights: Weights, inputs: Any) -> dict[str, Tensor]:
    """The Gram matrix of what each leaf module puts out; of one that is called again, the last."""
    found: dict[str, Tensor] = {}

    def noting(name: str) -> Any:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim > 1 and output.is_floating_point() and len(output) == count:
                found[name] = _gram(output)

        return note

    network.load(weights)
    count = len(network(inputs))
    leaves = [(n, module) for n, module in network.module.named_modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(noting(name)) for name, module in leaves]
    try:
        network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _some(split: Split, examples: int) -> Any:
    """Evenly spaced inputs of a split given whole, else those of its first batches; of batches that cannot be joined or
    cut, the first."""
    if split.whole:
        inputs, targets = next(iter(split.batches))
        step = -(-len(targets) // examples)
        return head((take(inputs, slice(None, None, step)), take(targets, slice(None, None, step))), examples)[0]
    parts: list[Any] = []
    goals: list[Tensor] = []
    for inputs, targets in split.batches:
        parts.append(inputs)
        goals.append(targets)
        if sum(map(len, goals)) >= examples:
            break
    try:
        return head((joined(parts), torch.cat(goals)), examples)[0]
    except (RuntimeError, TypeError):  # sequences of several lengths, graphs
        return head((parts[0], goals[0]), examples)[0]
