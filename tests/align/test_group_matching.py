"""Matching modulo the whole group: planted elements of every kind are found again, and nothing gets worse."""

import functools
import itertools

import pytest
import torch
from torch import Tensor, nn

import lmc
from lmc.align.rotations.procrustes import nearest_invertible
from lmc.core import progress as budgets
from tests.small_models import Attention


class Rotated(nn.Module):
    """Units in front of a root mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        return self.o(h / h.square().mean(-1, keepdim=True).add(1e-5).sqrt())


MODELS = {
    "relu": (lambda: lmc.models.mlp(6, [7, 5], 3), (8, 6)),
    "tanh": (lambda: lmc.models.mlp(6, [7, 5], 3, activation="tanh"), (8, 6)),
    "batch norm": (lambda: lmc.models.mlp(6, [7, 5], 3, norm="batch"), (8, 6)),
    "rotated": (Rotated, (8, 6)),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), (8, 6)),
    "attention": (lambda: Attention(width=6, heads=2, qk=3, v=2), (3, 4, 5)),
    "transformer": (lambda: lmc.models.vit(dim=8, depth=1, heads=2), (2, 1, 8, 8)),
}


@functools.cache
def world(name: str):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    spec = lmc.permutation_spec(model, x, certify=False, continuous=True, progress=False)
    generator = torch.Generator().manual_seed(1)
    a, b = (
        {
            n: t + 0.1 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
            for n, t in state.items()
        }
        for state in (model.state_dict(), model.state_dict())
    )
    return model, x, spec, a, b


def difference(a, b) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a if a[n].is_floating_point())


@pytest.mark.parametrize("name", MODELS)
def test_a_planted_element_is_found_again(name):
    model, x, spec, a, _ = world(name)
    planted = lmc.Element.random(spec, 3).apply(a)
    assert difference(planted, a) > 0.1
    found = lmc.align.group_matching(spec, model, a, planted, progress=False)
    assert found.objective > -1e-18 and difference(found.weights, found.a) < 1e-9
    assert difference(found.element.apply(planted), a) < 1e-9


@pytest.mark.parametrize("name", ["relu", "rotated", "attention"])
def test_of_two_networks_the_objective_never_falls_and_functions_stay(name):
    model, x, spec, a, b = world(name)
    torch.manual_seed(2)
    b = {n: torch.randn_like(t) * 0.4 if t.is_floating_point() else t for n, t in b.items()}
    found = lmc.align.group_matching(spec, model, a, b, progress=False)
    assert found.objective >= found.info["objective_at_identity"]
    steps = torch.tensor(found.info["objectives"])
    assert bool((steps.diff() >= 0).all()) and steps[-1] == pytest.approx(found.objective)
    rest = sum(float((found.a[n] - found.weights[n]).square().sum()) for n, _ in model.named_parameters())
    assert found.objective == pytest.approx(-rest / 2, rel=1e-9)
    for old, new in ((a, found.a), (b, found.weights), (b, found.element.apply(b))):
        outputs = [torch.func.functional_call(model, dict(state), (x,)) for state in (old, new)]
        assert torch.allclose(*outputs, rtol=1e-8, atol=1e-8)


def test_signs_are_worth_more_than_permutations_alone():
    model, _, spec, a, _ = world("tanh")
    b = {n: t + 0.02 * torch.randn_like(t) for n, t in lmc.Element.random(spec, 5).apply(a).items()}
    pi = lmc.weight_matching(spec, a, b, progress=False)
    found = lmc.align.group_matching(spec, model, a, b, progress=False)
    assert lmc.weights.distance(found.a, found.weights) < 0.2 * lmc.weights.distance(a, pi.apply(b))


def test_an_invertible_matrix_is_found_and_the_rest_is_least():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    planted, b, dual = torch.eye(4, dtype=torch.float64) + 0.5 * draw(4, 4), draw(4, 6), draw(4, 7)
    a, dual_a = planted @ b, torch.linalg.inv(planted).T @ dual
    assert torch.allclose(nearest_invertible(a, b, dual_a, dual, 30), planted, atol=1e-9)

    a, dual_a = draw(4, 6), draw(4, 7)
    found = nearest_invertible(a, b, dual_a, dual, 100)

    def rest(m: Tensor) -> Tensor:
        return (a - m @ b).square().sum() + (dual_a - torch.linalg.inv(m).T @ dual).square().sum()

    slope = torch.func.grad(rest)(found)
    assert float(slope.norm()) < 0.05 * float(torch.func.grad(rest)(torch.eye(4, dtype=torch.float64)).norm())
    assert all(rest(found) <= rest(found + 0.05 * draw(4, 4)) for _ in range(20))


def test_what_is_missing_is_said():
    model, x, spec, a, b = world("relu")
    bare = lmc.permutation_spec(model, x, certify=False, progress=False)
    with pytest.raises(lmc.InputError, match="continuous=True"):
        lmc.align.group_matching(bare, model, a, b, progress=False)
    with pytest.raises(lmc.InputError, match="max_sweeps=0"):
        lmc.align.group_matching(spec, model, a, b, max_sweeps=0, progress=False)
    with_inputs = lmc.align.group_matching(bare, model, a, b, inputs=x, progress=False)
    assert "before" in repr(with_inputs) and len(with_inputs.to_frame())


def test_no_group_is_visited_after_the_budget(monkeypatch):
    model, x, spec, a, b = world("relu")
    ticks = itertools.count()
    monkeypatch.setattr(budgets, "clock", lambda: float(next(ticks)))
    short = lmc.align.group_matching(spec, model, a, b, budget=2.0, progress=False)
    assert short.objective >= short.info["objective_at_identity"] and next(ticks) < 6
    with pytest.raises(lmc.InputError, match="budget=-1"):
        lmc.align.group_matching(spec, model, a, b, budget=-1, progress=False)
