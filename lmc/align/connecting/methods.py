"""The ways to move B onto A that `connect` tries, one after the other."""

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lmc.align.activations.matching import activation_matching
from lmc.align.connecting.elements import Freedom, FreeElement, names_of
from lmc.align.connecting.judge import inputs_of
from lmc.align.connecting.learned import learn
from lmc.align.connecting.starts import by_activations, by_weights
from lmc.align.relaxed.sinkhorn import sinkhorn_matching
from lmc.align.relaxed.soft import TaskLoss
from lmc.align.relaxed.straight_through import straight_through_matching
from lmc.align.rotations.folding import NORMS, fold_norms
from lmc.align.rotations.rotatable import rotatable_groups
from lmc.align.rotations.whole_group import group_matching
from lmc.align.weight_matching.matching import weight_matching
from lmc.core.progress import Budget
from lmc.errors import SpecError
from lmc.network.network import Network
from lmc.network.task import Task
from lmc.symmetry.continuous import ContinuousSymmetries
from lmc.symmetry.spec import Permutation, PermutationSpec
from lmc.weights import Weights

MODULO = "matching modulo the group"
BATCH = 128  # examples in a step of learning
POSITIONS = 1024  # targets in a step of learning, where examples have many


@dataclass(frozen=True)
class Pair:
    """Two networks of one architecture, and what may be learned from.

    Attributes:
        learn: labelled examples: a batch, or a list of batches.
        example: two inputs.
        task: how outputs are judged.
        progress: whether bars are shown.
    """

    model: nn.Module
    a: Weights
    b: Weights
    spec: PermutationSpec
    learn: Any
    example: Any
    task: Task
    device: torch.device
    seed: int
    progress: bool

    @cached_property
    def inputs(self) -> Any:
        """The inputs of what may be learned from."""
        return inputs_of(self.model, self.learn)

    @cached_property
    def gains(self) -> list[str]:
        """The gains of the normalisations of streams."""
        names = (f"{name}.weight" for name, module in self.model.named_modules() if isinstance(module, NORMS))
        return [name for name in names if name in self.spec.tables_by_tensor]

    @property
    def turns(self) -> bool:
        """Whether there are heads, or normalisations between which a stream might rotate."""
        return bool(self.gains) or any(group.within for group in self.spec.groups.values())

    @property
    def batch_size(self) -> int:
        """Examples in a step of learning: fewer where each has many targets."""
        targets = (self.learn if isinstance(self.learn, tuple) else self.learn[0])[1]
        return max(8, min(BATCH, POSITIONS // max(1, targets[0].numel())))


@dataclass
class Candidate:
    """One way to move B, and what was said of it.

    Attributes:
        a, weights: A, and B moved.
        permutation: the move, where it is one.
        barrier: on the held-out examples; NaN: not judged yet.
        repaired: judged with the statistics between the ends repaired.
        interrupted: whether it was ended from outside.
    """

    method: str
    a: Weights
    weights: Weights
    permutation: Permutation | None = None
    barrier: float = math.nan
    note: str = ""
    repaired: bool = False
    interrupted: bool = False


@dataclass(frozen=True)
class Folded:
    """Both networks with folded norms, and the groups that may be rotated: whether the vector of ones must stay."""

    a: Weights
    b: Weights
    rotated: dict[str, bool]
    note: str


def match_weights(pair: Pair, seconds: float | None) -> Candidate:
    """B permuted by `lmc.weight_matching`."""
    pi = weight_matching(pair.spec, pair.a, pair.b, seed=pair.seed, budget=seconds, progress=False)
    return Candidate("weight matching", pair.a, pi.apply(pair.b), pi)


def match_activations(pair: Pair, inputs: Any) -> Candidate:
    """B permuted by `lmc.activation_matching`."""
    pi = activation_matching(
        pair.spec, pair.model, pair.a, pair.b, inputs, device=pair.device, progress=False
    )  # fmt: skip
    return Candidate("activation matching", pair.a, pi.apply(pair.b), pi)


def match_modulo_group(
    pair: Pair, start: Candidate, symmetries: ContinuousSymmetries, seconds: float | None
) -> Candidate | None:
    """A start moved by signs and mixings as well; None where nothing admits them."""
    if not any(kind.signs or kind.mixing != "none" for kind in symmetries.kinds.values()):
        return None
    spec = replace(pair.spec, continuous=symmetries)
    found = group_matching(spec, pair.model, start.a, start.weights, budget=seconds, progress=False)
    return Candidate(f"{start.method}, {MODULO}", dict(found.a), dict(found.weights))


def fold(pair: Pair, seconds: float | None) -> Folded | None:
    """Both with folded norms; None where that lets nothing rotate."""
    a, b, note = pair.a, pair.b, ""
    try:
        a, b = (fold_norms(pair.spec, pair.model, weights, pair.example) for weights in (a, b))
    except SpecError as error:  # what is inside heads may be mixed all the same
        note = f"not folded: {error}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of groups that cannot be verified, and so are not rotated
        rotated = rotatable_groups(pair.spec, pair.model, b, pair.example, seed=pair.seed, budget=seconds)
    return Folded(a, b, dict(rotated), note) if rotated else None


def rotate_by_activations(pair: Pair, folded: Folded, inputs: Any) -> Candidate:
    """B rotated onto A, both with folded norms, by what they hold on the same inputs."""
    network = Network(pair.model, pair.device)
    moved = by_activations(pair.spec, network, folded.a, folded.b, inputs, folded.rotated)
    return Candidate("rotations by activations", folded.a, moved)


def rotate_by_weights(pair: Pair, folded: Folded) -> Candidate:
    """B rotated onto A, both with folded norms, by their weights."""
    moved = by_weights(pair.spec, folded.a, folded.b, folded.rotated)
    return Candidate("rotations by weights", folded.a, moved)


def pass_straight_through(pair: Pair, start: Candidate, seconds: float | None) -> Candidate:
    """A start permuted by `lmc.straight_through_matching`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an interrupt is told once, at the end
        pi = straight_through_matching(
            pair.spec, pair.model, start.a, start.weights, pair.learn, start=pair.spec.identity(), loss=pair.task,
            budget=seconds, seed=pair.seed, device=pair.device, progress=pair.progress,
        )  # fmt: skip
    return _permuted(pair, start, pi, "straight-through")


def relax(pair: Pair, start: Candidate, steps: int, seconds: float | None) -> Candidate:
    """A start permuted as its relaxation finds from there (`lmc.sinkhorn_matching`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an interrupt is told once, at the end
        pi = sinkhorn_matching(
            pair.spec, pair.model, start.a, start.weights, pair.learn, loss=pair.task, budget=seconds, steps=steps,
            seed=pair.seed, device=pair.device, progress=pair.progress,
        )  # fmt: skip
    return _permuted(pair, start, pi, "Sinkhorn")


def _permuted(pair: Pair, start: Candidate, pi: Permutation, by: str) -> Candidate:
    """A start permuted once more; as one permutation of B, where that is all."""
    method, interrupted = f"{start.method}, {by}", pi.info.get("interrupted", False)
    if pi == pair.spec.identity():
        return replace(start, method=method, interrupted=interrupted)
    if start.permutation is None:
        return Candidate(method, start.a, pi.apply(start.weights), interrupted=interrupted)
    whole = pi.compose(start.permutation)
    return Candidate(method, start.a, whole.apply(pair.b), whole, interrupted=interrupted)


def learn_elements(
    pair: Pair,
    start: Candidate,
    free: dict[str, Freedom],
    *,
    steps: int,
    budget: Budget,
) -> Candidate:
    """All but permutations of the whole group, learned from a candidate."""
    found = learn(
        TaskLoss(pair.model, start.a, pair.learn, pair.task, pair.batch_size, pair.device),
        start.a,
        FreeElement(pair.spec, free, start.weights),
        steps=steps,
        budget=budget,
        generator=torch.Generator().manual_seed(pair.seed),
        progress=pair.progress,
    )
    note = f"{found.steps} steps" + (", interrupted" if found.interrupted else "")
    method = f"{start.method}, then {names_of(free)} learned"
    return Candidate(method, start.a, found.weights, note=note, interrupted=found.interrupted)
