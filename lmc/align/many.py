"""Matching more than two models at once, so that all of them can be averaged.

One after the other to the mean of the others (Ainsworth et al. 2023, algorithm 3), or all together by Frank-Wolfe (C2M3:
Crisostomi et al. 2024, arXiv:2405.17897). There, each model p gets one move into a common order, the universe. Here it is
the order of the first model, which does not move: this loses no solution, and without it the relaxed problem has a whole
family of optima for each, which slows it down and rounds worse. Relaxed to doubly stochastic matrices, the objective

    f = sum_{p<q} <u_p, u_q> = (|sum_p u_p|² - sum_p |u_p|²) / 2,    u_p: the weights of model p, mixed by its matrices

has the gradient `sum_{q != p} u_q` at u_p, which costs no pairs of models. Each step goes towards the vertex that is best
for the gradient, as far as an exact line search says: along a segment, f is a polynomial.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor

from lmc.align.relaxed.soft import SoftMoves, as_matrices, degree, sinkhorn
from lmc.align.weight_matching.gains import assign, opening_prices
from lmc.align.weight_matching.matching import matched, weight_matching
from lmc.core.context import own_context, warn
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.network.derived import gauged, settled
from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, StateDict, Weights, agreeing, mean

if TYPE_CHECKING:
    import pandas as pd

Indices = dict[str, Tensor]
Matrices = dict[str, Tensor]

_PATIENCE = 5
_NOISE = 0.1
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

    Example:
        >>> import lmc
        >>> data, model = lmc.data.digits(), lmc.data.checkpoint("digits-mlp64").model()
        >>> spec = lmc.permutation_spec(model, data.test[0][:2])
        >>> b = spec.random(seed=0).apply(model)  # the same network, its units in another order
        >>> c = spec.random(seed=1).apply(model)
        >>> first, second, third = lmc.match_many(spec, [model, b, c]).apply([model, b, c])
        >>> lmc.weights.distance(first, second), lmc.weights.distance(first, third)
        (0.0, 0.0)
    """
    if method not in get_args(ManyMethod):
        raise InputError(f"method={method!r}: expected one of {', '.join(map(repr, get_args(ManyMethod)))}")
    if len(models) < 2 or restarts < 1 or max_iterations < 1:
        raise InputError(f"{len(models)} models, {restarts=}, {max_iterations=}: expected at least 2, 1 and 1")
    started = time.perf_counter()
    states = [gauged(state) for state in agreeing(models)]
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
    sweeps, still, value = 0, False, objective(spec, moved)
    while not still and sweeps < max_sweeps:
        still, sweeps = True, sweeps + 1
        for i in visited[torch.randperm(len(visited), generator=generator)].tolist():
            others = [state for j, state in enumerate(moved) if j != i]
            pi = match(settled(mean(others), others[0]), moved[i])
            bar.update()
            trial = [*moved[:i], pi.apply(moved[i]), *moved[i + 1 :]]
            reached = objective(spec, trial)
            if reached > value + _ROUNDING * abs(value):
                moves[i], moved, value, still = pi.compose(moves[i]), trial, reached, False
    return moves, {"sweeps": sweeps, "converged": still}


def frank_wolfe(
    spec: PermutationSpec,
    models: Sequence[Weights],
    start: Sequence[Matrices],
    max_iterations: int,
    tolerance: float,
    on_step: Any,
) -> tuple[list[Indices], dict[str, Any]]:
    """The moves of all models into the order of the first, which stays at its start: (moves, how it went)."""
    moving = [{name: model[name] for name in spec.tables_by_tensor if name in model} for model in models]
    mix = SoftMoves(spec, moving[0], next(iter(moving[0].values())).device)
    nodes = np.linspace(0.0, 1.0, degree(spec, list(moving[0])) + 1)
    first, rest = mix(start[0], moving[0]), moving[1:]
    now, value, stalled, steps = list(start[1:]), -np.inf, 0, 0
    while stalled < _PATIENCE and steps < max_iterations:
        mixed, gradients = _value_and_gradients(mix, first, rest, now)
        best = [_vertex(part) for part in gradients]
        segment = [[first, *mixed]]
        for node in nodes[1:]:
            ends = zip(now, best, rest, strict=True)
            segment.append([first, *(mix(_between(p, q, node), w) for p, q, w in ends)])
        step, reached = _line_search(nodes, segment)
        now = [_between(p, q, step) for p, q in zip(now, best, strict=True)]
        stalled = stalled + 1 if reached <= value + tolerance * abs(reached) else 0
        value, steps = max(reached, value), steps + 1
        on_step()
        if step == 0.0:
            break
    now = [start[0], *now]
    moves = [{name: _best(matrix) for name, matrix in part.items()} for part in now]
    return moves, {"steps": steps, "converged": stalled >= _PATIENCE or steps < max_iterations}


def start_near_centre(spec: PermutationSpec, count: int, like: Tensor, generator: torch.Generator) -> list[Matrices]:
    """Starting points for `count` models: the identity for the first, random ones near the centre for the others."""
    centres = [
        {name: sinkhorn(_noise(group.size, generator), 100).to(like) for name, group in spec.groups.items()}
        for _ in range(count - 1)
    ]
    return [as_matrices(spec.identity().indices, like), *centres]


def _noise(size: int, generator: torch.Generator) -> Tensor:
    return _NOISE * torch.randn(size, size, generator=generator, dtype=torch.float32)


def _value_and_gradients(
    mix: SoftMoves, first: Weights, rest: Sequence[Weights], now: Sequence[Matrices]
) -> tuple[list[Weights], list[Matrices]]:
    """u_p for each model but the first, whose u is given, and the gradient of f by the matrices of each."""
    mixed, leaves = [], []
    for model, matrices in zip(rest, now, strict=True):
        leaf = {name: matrix.detach().requires_grad_() for name, matrix in matrices.items()}
        with torch.enable_grad():
            mixed.append(mix(leaf, model))
        leaves.append(leaf)
    total = {name: tensor + sum(u[name].detach() for u in mixed) for name, tensor in first.items()}
    gradients = []
    for u, leaf in zip(mixed, leaves, strict=True):
        others = [total[name] - tensor.detach() for name, tensor in u.items()]
        found = torch.autograd.grad(
            list(u.values()), list(leaf.values()), others, allow_unused=True, materialize_grads=True
        )
        gradients.append(dict(zip(leaf, found, strict=True)))
    return [{name: tensor.detach() for name, tensor in u.items()} for u in mixed], gradients


def _line_search(nodes: np.ndarray, segment: Sequence[Sequence[Weights]]) -> tuple[float, float]:
    """The point where f is largest on the segment whose u_p are known at the nodes, and its value there.

    The u_p are polynomials that the nodes determine, so f is one of twice their degree, known from the inner products
    of the u_p at all pairs of nodes.
    """
    count = len(nodes)
    products = sum(_pairs(torch.stack([torch.stack([u[n] for u in at]) for at in segment])) for n in segment[0][0])
    fine = np.linspace(0.0, 1.0, 2 * count - 1)
    lagrange = np.array([_lagrange(nodes, x) for x in fine])
    curve = np.polynomial.Polynomial.fit(fine, np.einsum("xk,kl,xl->x", lagrange, products, lagrange), 2 * count - 2)
    roots = curve.deriv().roots()
    inside = [float(r.real) for r in roots if abs(r.imag) < 1e-9 and 0.0 < r.real < 1.0]
    where = max([0.0, 1.0, *inside], key=lambda x: float(curve(x)))
    return where, float(curve(where))


def _lagrange(nodes: np.ndarray, x: float) -> list[float]:
    return [
        float(np.prod([(x - other) / (node - other) for j, other in enumerate(nodes) if j != k]))
        for k, node in enumerate(nodes)
    ]


def _pairs(tensors: Tensor) -> np.ndarray:
    """`sum_{p != q} <u_p(k), u_q(l)> / 2` for tensors (nodes, models, ...), as a matrix over the nodes k, l in float64."""
    each = tensors.flatten(2).double()
    whole = each.sum(1)
    alone = torch.einsum("kpx,lpx->kl", each, each)
    return (0.5 * (whole @ whole.T - alone)).cpu().numpy()


def _vertex(gradients: Mapping[str, Tensor]) -> Matrices:
    """The permutation matrices whose inner product with the gradients is largest."""
    return {
        name: torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)[_best(gradient)]
        for name, gradient in gradients.items()
    }


def _best(gain: Tensor) -> Tensor:
    return assign(gain, opening_prices(gain))[0]


def _between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], step: float) -> Matrices:
    return {name: torch.lerp(matrix, end[name], step) for name, matrix in start.items()}
