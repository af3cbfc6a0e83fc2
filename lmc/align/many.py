"""Matching more than two models at once, so that all of them can be averaged."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch

from lmc.align.parameters import matched
from lmc.align.relaxed.frank_wolfe import frank_wolfe, start_near_centre
from lmc.align.weight_matching.matching import weight_matching
from lmc.core.context import own_context, warn
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, StateDict, Weights, agreeing, mean

if TYPE_CHECKING:
    import pandas as pd

ManyMethod = Literal["merge_many", "cycle_consistent"]

# A gain below the rounding of float32 sums is none.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Matchings(Result, Sequence[Permutation]):
    """One permutation per model, each into the same common order: that of the first model, whose own is the identity.

    Attributes:
        permutations: `permutations[i].apply(models[i])` are the weights to average.
        objective: `sum_{i<j} <pi_i(theta_i), pi_j(theta_j)>` over parameters.
        info: how they were found.
    """

    permutations: tuple[Permutation, ...]
    objective: float
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.permutations)

    @overload
    def __getitem__(self, index: int) -> Permutation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Permutation]: ...
    def __getitem__(self, index):
        return self.permutations[index]

    def pairwise(self, i: int, j: int) -> Permutation:
        """The permutation that moves model j onto model i. Going round any cycle of models gives the identity, exactly."""
        return self[i].inverse().compose(self[j])

    def apply(self, models: Sequence[ModelOrWeights]) -> list[StateDict]:
        """Each model moved by its permutation."""
        return [pi.apply(model) for pi, model in zip(self, models, strict=True)]

    def to_frame(self) -> "pd.DataFrame":
        """A row for each model and group: model, group, and the share of its units that move."""
        rows = [
            (i, group, float((index != torch.arange(len(index))).double().mean()))
            for i, pi in enumerate(self)
            for group, index in pi.items()
        ]
        return require("pandas").DataFrame(rows, columns=["model", "group", "moved"])

    def __repr__(self) -> str:
        return f"Matchings({len(self)} models, objective {self.objective:.6g}, by {self.info.get('method')})"


@own_context
def match_many(
    spec: PermutationSpec | UnboundSpec,
    models: Sequence[ModelOrWeights],
    *,
    method: ManyMethod = "cycle_consistent",
    seed: int = 0,
    restarts: int = 1,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
    progress: bool = True,
) -> Matchings:
    """Permutations that bring several models into one common order, by their weights.

    Args:
        spec: the symmetries of the architecture.
        models: modules or state dicts of that architecture, two or more; none is changed.
        method: "merge_many" moves one model after the other to the mean of all others by weight matching, until none
            moves (Ainsworth et al. 2023, algorithm 3; with two models, this is weight matching). "cycle_consistent"
            moves all groups of all models at once (C2M3, Crisostomi et al. 2024, arXiv:2405.17897), then, beyond the
            paper, all groups of one model after the other in the same way; also worth trying with two models.
        seed: decides the order of visits and the starting points, near the centre of the polytope.
        restarts: runs, of which the best is kept.
        max_iterations: bound on the sweeps over all models, or on the steps of Frank-Wolfe, in one run.
        tolerance: Frank-Wolfe ends when five steps in a row gain less than this share of the objective.
        progress: show a bar when it takes longer than two seconds.

    Raises:
        InputError: fewer than two models, or an unknown method.
        MismatchError: models of different architectures.
        SpecError: the spec does not fit.
        WeightsError: NaN or infinity in the weights.
    """
    if method not in get_args(ManyMethod):
        raise InputError(f"method={method!r}: expected one of {', '.join(map(repr, get_args(ManyMethod)))}")
    if len(models) < 2 or restarts < 1 or max_iterations < 1:
        raise InputError(f"{len(models)} models, {restarts=}, {max_iterations=}: expected at least 2, 1 and 1")
    started = time.perf_counter()
    states = agreeing(models)
    spec = spec.bind(states[0])
    # Where nothing may move, there is nothing to relax.
    run = _merge_many if method == "merge_many" or not spec.groups else _cycle_consistent
    best, value = [spec.identity()] * len(states), objective(spec, states)
    info: dict[str, Any] = {"method": method, "seed": seed, "objective_at_identity": value, "runs": []}
    bar = tqdm(desc=method, unit=" steps", disable=not progress)
    try:
        for restart in range(restarts):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + restart)
            moves, how = run(spec, states, generator, max_iterations, tolerance, bar)
            found = objective(spec, [pi.apply(state) for pi, state in zip(moves, states, strict=True)])
            info["runs"].append(how | {"objective": found})
            if found > value:
                best, value = moves, found
    except KeyboardInterrupt:
        warn(f"interrupted: the best of {len(info['runs'])} finished runs is returned")
    finally:
        bar.close()
    back = best[0].inverse()
    info["seconds"] = time.perf_counter() - started
    return Matchings(tuple(back.compose(pi) for pi in best), value, info)


def objective(spec: PermutationSpec, states: Sequence[Weights]) -> float:
    """`sum_{i<j} <theta_i, theta_j>` over the parameters that matching looks at, in float64."""
    compared = [matched(spec, state) for state in states]
    total = 0.0
    for name in compared[0]:
        stack = torch.stack([tensors[name].double() for tensors in compared])
        total += float(stack.sum(0).square().sum() - stack.square().sum()) / 2
    return total


def _merge_many(
    spec: PermutationSpec,
    states: Sequence[Weights],
    generator: torch.Generator,
    max_iterations: int,
    _tolerance: float,
    bar: Any,
) -> tuple[list[Permutation], dict[str, Any]]:
    """Each model in turn is matched by weights to the mean of all others, in random order, until none moves."""

    def match(others: Weights, state: Weights) -> Permutation:
        return weight_matching(spec, others, state, progress=False)

    return _one_by_one(spec, states, generator, max_iterations, bar, match)


def _cycle_consistent(
    spec: PermutationSpec,
    states: Sequence[Weights],
    generator: torch.Generator,
    max_iterations: int,
    tolerance: float,
    bar: Any,
) -> tuple[list[Permutation], dict[str, Any]]:
    """Frank-Wolfe over all groups of all models at once, then over all groups of one model at a time."""

    def relaxed(models: Sequence[Weights]) -> tuple[list[Permutation], dict[str, Any]]:
        tensors = [matched(spec, model) for model in models]
        start = start_near_centre(spec, len(models), next(iter(tensors[0].values())), generator)
        moves, how = frank_wolfe(spec, tensors, start, max_iterations, tolerance, bar.update)
        return [Permutation(spec, indices) for indices in moves], how

    def match(others: Weights, state: Weights) -> Permutation:
        pi = relaxed([others, state])[0][1]
        return weight_matching(spec, others, pi.apply(state), progress=False).compose(pi)

    joint, how = relaxed(states)
    moved = [pi.apply(state) for pi, state in zip(joint, states, strict=True)]
    further, improved = _one_by_one(spec, moved, generator, max_iterations, bar, match)
    moves = [pi.compose(first) for pi, first in zip(further, joint, strict=True)]
    return moves, how | improved | {"objective_of_joint_steps": objective(spec, moved)}


def _one_by_one(
    spec: PermutationSpec,
    states: Sequence[Weights],
    generator: torch.Generator,
    max_sweeps: int,
    bar: Any,
    match: Callable[[Weights, Weights], Permutation],
) -> tuple[list[Permutation], dict[str, Any]]:
    """Move each model in turn by `match(mean of all others, model)` where that brings them closer, until none moves."""
    moves, moved = [spec.identity()] * len(states), list(states)
    # Of two models it is enough to move the second: moving the first is the same problem turned round.
    visited = torch.arange(1 if len(states) == 2 else 0, len(states))
    sweeps, settled, value = 0, False, objective(spec, moved)
    while not settled and sweeps < max_sweeps:
        settled, sweeps = True, sweeps + 1
        for i in visited[torch.randperm(len(visited), generator=generator)].tolist():
            pi = match(mean([state for j, state in enumerate(moved) if j != i]), moved[i])
            bar.update()
            trial = [*moved[:i], pi.apply(moved[i]), *moved[i + 1 :]]
            reached = objective(spec, trial)
            if reached > value + _ROUNDING * abs(value):
                moves[i], moved, value, settled = pi.compose(moves[i]), trial, reached, False
    return moves, {"sweeps": sweeps, "converged": settled}
