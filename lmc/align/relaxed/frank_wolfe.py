"""Cycle-consistent matching of many models by Frank-Wolfe (C2M3: Crisostomi et al. 2024, arXiv:2405.17897).

Each model p gets one move into a common order, the universe. Here it is the order of the first model, which does not
move: this loses no solution, and without it the relaxed problem has a whole family of optima for each, which slows it
down and rounds worse. Relaxed to doubly stochastic matrices, the objective

    f = sum_{p<q} <u_p, u_q> = (|sum_p u_p|² - sum_p |u_p|²) / 2,    u_p: the weights of model p, mixed by its matrices

has the gradient `sum_{q != p} u_q` at u_p, which costs no pairs of models. Each step goes towards the vertex that is best
for the gradient, as far as an exact line search says: along a segment, f is a polynomial.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmc.align.relaxed.soft import SoftMoves, as_matrices, degree, sinkhorn
from lmc.align.weight_matching.assignment import assign, opening_prices
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights

Indices = dict[str, Tensor]
Matrices = dict[str, Tensor]

_PATIENCE = 5
_NOISE = 0.1


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
