"""Optimal-transport fusion: B's units spread over A's, then averaged (Singh and Jaggi 2020, arXiv:1910.05653)."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lmc.align.transport.layerwise import Problem, check_alone, guess_inputs
from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.network.batches import reread, to_device
from lmc.network.derived import gauged, settled
from lmc.network.inputs import first_of, input_batches
from lmc.network.network import Network, pick_device
from lmc.symmetry.find import permutation_spec
from lmc.symmetry.spec import PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, StateDict, Weights, agreeing, as_weights, mean
from lmc.weights.state import inexact, wide

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Fusion(Result, Mapping[str, Tensor]):
    """Fused weights in the widths of A: a mapping, to be used wherever weights are.

    Attributes:
        weights: the average of A and the transported models.
        transported: each B in the units of A, before averaging.
        couplings: for each B the plans (n_b, n_a) by group; `family[j->i]` between what is nested in two units.
        info: how they were made.
    """

    weights: Weights
    transported: tuple[Weights, ...]
    couplings: tuple[dict[str, Tensor], ...]
    info: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each transported model and group: model, group, its units, those of A, and the largest share of a
        unit's mass that goes to one unit of A, averaged over units (1: the plan is a matching)."""
        rows = [
            (i, group, *plan.shape, float((plan.amax(1) / plan.sum(1)).mean()))
            for i, plans in enumerate(self.couplings)
            for group, plan in plans.items()
        ]
        return require("pandas").DataFrame(rows, columns=["model", "group", "units", "units of A", "largest share"])

    def __repr__(self) -> str:
        return f"Fusion({len(self.transported) + 1} models, by {self.info.get('metric')}, {len(self)} tensors)"


@own_context
def ot_fusion(
    model: nn.Module,
    a: ModelOrWeights,
    b: ModelOrWeights | Sequence[ModelOrWeights],
    inputs: Any = None,
    *,
    spec: PermutationSpec | UnboundSpec | None = None,
    share: float | None = None,
    regularization: float = 0.0,
    squared: bool = False,
    standardize: bool = False,
    importance: Literal["l1", "l2"] | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Fusion:
    """Fuse B into the units of A, the anchor: same depth, widths may differ.

    For each group of units a coupling T (n_b, n_a), by default of uniform marginals, makes the transport cost least. With
    `inputs`, the cost is the distance between what units do, before the nonlinearity; without, between their incoming
    weights, the inputs of B already expressed in units of A, group after group from the inputs on. Where a unit is
    computed, it becomes the mean of B's units by its column of T; where it is consumed, B's outgoing weights are split by
    rows of T. For equal widths that is the paper's formula, and exact couplings are permutations. Residual streams have
    one coupling, heads nested ones. Running statistics are transported too, but belong to neither network after
    averaging: re-estimate them with `lmc.recalibrate_batchnorm`.

    Args:
        model: a module with A's architecture, which is the result's; not touched.
        a: the anchor: a module or state dict.
        b: one model or several. A module where widths differ and `inputs` are given, else a state dict is enough.
        inputs: as in `activation_matching`; a few hundred examples are enough.
        spec: the symmetries of A; default: those that `permutation_spec` finds on the inputs, or on made-up ones.
        share: of A in the average; default: all models equally.
        regularization: 0 for exact couplings; above, entropic ones, relative to the median cost (0.05 is soft).
        squared: costs are squared distances.
        standardize: compare activations after bringing each to mean 0 and variance 1. The authors compare them as they
            are, and so does the default.
        importance: masses of units in proportion to the l1 or l2 norm of their incoming weights; default: all equal.
        batch_size, device, progress: as in `activation_matching`.

    Raises:
        MismatchError: different depths or kinds of layers.
        InputError: a bad argument.
        MissingPackageError: POT is not installed; unequal widths, `regularization` and `importance` need it.
        SpecError: a spec that does not fit, or symmetries that transport cannot follow.
        DataError: unusable inputs.

    Example:
        >>> import lmc
        >>> data, model = lmc.data.digits(), lmc.data.checkpoint("digits-mlp64").model()
        >>> spec = lmc.permutation_spec(model, data.test[0][:2])
        >>> b = spec.random(seed=0).apply(model)  # the same network, its units in another order
        >>> fused = lmc.ot_fusion(model, model, b, data.train[0][:400], spec=spec)
        >>> lmc.weights.distance(model, fused.weights) < 1e-5
        True
    """
    started = time.perf_counter()
    several = isinstance(b, Sequence)
    sources = list(b) if several else [b]
    if not sources or regularization < 0 or (share is not None and not 0 <= share <= 1):
        raise InputError(f"{len(sources)} models, {regularization=}, {share=}: expected at least 1, >= 0, and 0 to 1")
    if importance not in (None, "l1", "l2"):
        raise InputError(f"{importance=}: expected 'l1', 'l2', or None for equal masses")
    inputs = reread(inputs)
    anchor = agreeing([a], ["a"], model=model)[0]
    chosen = pick_device(device, anchor)
    network = Network(model, chosen)
    anchor, states = widest(anchor, [as_weights(source) for source in sources])
    anchor = StateDict(((name, tensor.to(chosen)) for name, tensor in anchor.items()), like=anchor)
    anchor = gauged(anchor, network.module)
    network.load(anchor)
    spec = (_found(model, network, inputs, progress) if spec is None else spec).bind(anchor)
    check_alone(spec)

    transported, couplings = [], []
    for k, source in enumerate(sources):
        name = f"b[{k}]" if several else "b"
        problem = Problem(spec, network, anchor, states[k], source, name, regularization, squared, importance)
        problem.solve(None if inputs is None else problem.distances(inputs, standardize, batch_size, progress))
        transported.append(settled(problem.transported(), anchor))
        couplings.append({n: t for coupling in problem.solved.values() for n, t in coupling.plans().items()})
    rest = (1.0 - share) / len(sources) if share is not None else 1.0 / (len(sources) + 1)
    weights = settled(mean([anchor, *transported], [1.0 - rest * len(sources), *([rest] * len(sources))]), anchor)
    info = {
        "method": "ot_fusion",
        "metric": "weights" if inputs is None else "activations",
        "regularization": regularization,
        "importance": importance,
        "share": 1.0 - rest * len(sources),
        "seconds": time.perf_counter() - started,
    }
    return Fusion(weights, tuple(transported), tuple(couplings), info)


def widest(anchor: Weights, others: Sequence[Weights]) -> tuple[Weights, list[Weights]]:
    """All with each floating-point tensor in the widest dtype that it has anywhere, as `agreeing` makes them."""
    everyone = [StateDict(state, like=state) for state in (anchor, *others)]
    for name, tensor in anchor.items():
        having = [state for state in everyone if name in state and inexact(state[name])]
        if inexact(tensor) and len(dtypes := {state[name].dtype for state in having}) > 1:
            for state in having:
                state[name] = state[name].to(wide(*dtypes))
    return everyone[0], list(everyone[1:])


def _found(model: nn.Module, network: Network, inputs: Any, progress: bool) -> PermutationSpec:
    """The symmetries of the caller's module, found on the device where it is, whatever the device of the weights."""
    if inputs is None:
        example = guess_inputs(network.module)
    else:
        example = first_of(next(input_batches(model, inputs, 2)), 2)
    home = pick_device(None, as_weights(model))
    return permutation_spec(model, to_device(example, home), progress=progress)
