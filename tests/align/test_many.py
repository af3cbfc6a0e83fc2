from itertools import pairwise

import handwritten
import numpy as np
import pytest
import torch
from alignment_cases import CASES, Case, cases, digits, random_weights

import lmc
from lmc.align.many import Matchings, _line_search, _value_and_gradients, match_many, objective, start_near_centre
from lmc.align.relaxed.soft import SoftMoves, as_matrices, degree
from lmc.errors import InputError, MismatchError, SpecError, WeightsError
from lmc.models.mlp import mlp
from lmc.symmetry.spec import PermutationSpec

METHODS = ("merge_many", "cycle_consistent")


def unrelated(case: Case, count: int):
    return [random_weights(case.model, seed) for seed in range(11, 11 + count)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", cases("mlp", "resnet-bn", "vit"))
def test_copies_of_one_model_are_put_in_one_order(name: str, method: str):
    case = CASES[name]()
    a, planted = case.model.state_dict(), [case.spec.random(seed) for seed in range(3)]
    models = [pi.apply(a) for pi in planted]
    found = match_many(case.spec, models, method=method, progress=False)
    assert found[0].is_identity()
    assert all(all(torch.equal(w[k], models[0][k]) for k in w) for w in found.apply(models))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", pytest.param("gpt", marks=pytest.mark.thorough)])
def test_going_round_a_cycle_of_models_changes_nothing(name: str, method: str):
    case = CASES[name]()
    found = match_many(case.spec, unrelated(case, 4), method=method, restarts=1, progress=False)
    way = found[0].spec.identity()
    for i, j in pairwise([0, 2, 1, 3, 0]):
        way = way.compose(found.pairwise(i, j))
    assert way.is_identity()
    assert found.pairwise(0, 3) == found[3]


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit"])
def test_merge_many_of_two_is_weight_matching(name: str):
    case = CASES[name]()
    a, b = unrelated(case, 2)
    expected = lmc.weight_matching(case.spec, a, b, progress=False)
    found = match_many(case.spec, [a, b], method="merge_many", restarts=1, progress=False)
    assert found[1] == expected
    assert found.objective == pytest.approx(lmc.weights.dot(a, expected.apply(b)) - still(case, a, b), rel=1e-5)


def still(case: Case, a, b) -> float:
    """The part of `<a, b>` that buffers make up."""
    names = case.spec.buffers
    return sum(float((a[n].double() * b[n].double()).sum()) for n in names if a[n].is_floating_point())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_objective_is_what_it_says_and_no_less_than_before(name: str, method: str):
    case = CASES[name]()
    models = unrelated(case, 3)
    found = match_many(case.spec, models, method=method, restarts=1, progress=False)
    assert found.objective > found.info["objective_at_identity"] == objective(case.spec, models)
    moved = found.apply(models)
    pairs = sum(
        float((moved[i][n].double() * moved[j][n].double()).sum())
        for i in range(3)
        for j in range(i)
        for n in moved[0]
        if n not in case.spec.buffers
    )
    assert found.objective == pytest.approx(pairs, rel=1e-9)


def test_joint_steps_find_more_than_one_group_at_a_time():
    """On unrelated networks, where good matchings are hard to find (40 units wide, eight pairs)."""
    model = mlp(40, [40, 40, 40], 10)
    spec = PermutationSpec.from_patterns(handwritten.mlp(3), model)
    gains = []
    for seed in range(8):
        models = [random_weights(model, 2 * seed), random_weights(model, 2 * seed + 1)]
        joint = match_many(spec, models, method="cycle_consistent", progress=False).objective
        gains.append(joint / match_many(spec, models, method="merge_many", restarts=1, progress=False).objective - 1)
    assert np.mean(gains) > 0 and np.mean(np.array(gains) > 0) >= 0.75


def in_float64(case: Case, count: int):
    """Unrelated models in float64, only what moves, and what mixes them."""
    moving = case.spec.tables_by_tensor
    models = [{k: v.double() for k, v in w.items() if k in moving} for w in unrelated(case, count)]
    return models, SoftMoves(case.spec, moving, torch.device("cpu"))


def value_of(mixed) -> float:
    """`sum_{p<q} <u_p, u_q>`, pair by pair."""
    return sum(float((mixed[p][n] * mixed[q][n]).sum()) for p in range(3) for q in range(p) for n in mixed[0])


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_the_gradient_is_the_slope(name: str):
    case = CASES[name]()
    models, mix = in_float64(case, 3)
    generator = torch.Generator().manual_seed(0)
    now = start_near_centre(case.spec, 3, next(iter(models[0].values())), generator)
    _, gradients = _value_and_gradients(mix, models[0], models[1:], now[1:])

    def value(h: float, group: str, direction: torch.Tensor) -> float:
        moved = now[2] | {group: now[2][group] + h * direction}
        return value_of([models[0], mix(now[1], models[1]), mix(moved, models[2])])

    for group in list(case.spec.groups)[:4]:
        direction = torch.randn(now[2][group].shape, generator=generator, dtype=torch.float64)
        slope = (value(1e-4, group, direction) - value(-1e-4, group, direction)) / 2e-4
        assert slope == pytest.approx(float((gradients[1][group] * direction).sum()), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_the_line_search_finds_the_highest_point_of_the_segment(name: str):
    case = CASES[name]()
    models, mix = in_float64(case, 3)
    like = next(iter(models[0].values()))
    ends = start_near_centre(case.spec, 3, like, torch.Generator().manual_seed(0))
    start = [as_matrices(case.spec.random(seed).indices, like) for seed in range(3)]
    nodes = np.linspace(0, 1, degree(case.spec, list(models[0])) + 1)

    def at(x: float):
        between = [{g: torch.lerp(p[g], q[g], x) for g in p} for p, q in zip(start, ends, strict=True)]
        return [mix(part, w) for part, w in zip(between, models, strict=True)]

    where, value = _line_search(nodes, [at(x) for x in nodes])
    assert value == pytest.approx(value_of(at(where)), rel=1e-8)
    assert value >= max(value_of(at(x)) for x in np.linspace(0, 1, 41)) - 1e-9 * abs(value)


@pytest.mark.parametrize("name", CASES)
def test_mixing_by_permutation_matrices_is_permuting(name: str):
    case = CASES[name]()
    weights = case.model.state_dict()
    pi = case.spec.random(4)
    mixed = SoftMoves(case.spec, weights, torch.device("cpu"))(as_matrices(pi.indices, torch.zeros(())), weights)
    expected = pi.apply(weights)
    assert all(torch.equal(mixed[name], expected[name]) for name in expected)


def test_the_same_seed_gives_the_same_result_and_leaves_the_callers_things_alone():
    case = CASES["mlp"]()
    models = unrelated(case, 3)
    kept, state = [{k: v.clone() for k, v in w.items()} for w in models], torch.get_rng_state()
    for method in METHODS:
        first, second = (match_many(case.spec, models, method=method, seed=5, progress=False) for _ in range(2))
        assert all(x == y for x, y in zip(first, second, strict=True))
    assert all(torch.equal(w[k], old[k]) for w, old in zip(models, kept, strict=True) for k in w)
    assert torch.equal(state, torch.get_rng_state())


def test_it_prints_and_is_a_sequence():
    case = CASES["mlp"]()
    found = match_many(case.spec, unrelated(case, 2), restarts=1, progress=False)
    assert isinstance(found, Matchings) and len(found) == 2 and found[-1] is found.permutations[1]
    assert repr(found).startswith("Matchings(2 models, objective ") and "cycle_consistent" in repr(found)


def test_bad_input():
    case = CASES["mlp"]()
    a, b = unrelated(case, 2)
    with pytest.raises(InputError, match="method='all'.*'merge_many', 'cycle_consistent'"):
        match_many(case.spec, [a, b], method="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 models"):
        match_many(case.spec, [a])
    with pytest.raises(InputError, match="restarts=0"):
        match_many(case.spec, [a, b], restarts=0)
    with pytest.raises(MismatchError, match="models\\[1\\]"):
        match_many(case.spec, [a, mlp(12, [16, 11], 5)])
    with pytest.raises(SpecError):
        match_many(CASES["cnn"]().spec, [a, b])
    with pytest.raises(WeightsError, match="of models\\[1\\]"):
        match_many(case.spec, [a, b | {"fc1.bias": torch.full((16,), torch.nan)}])


@pytest.mark.parametrize("method", METHODS)
def test_three_trained_networks_can_be_averaged(method: str):
    trained = digits()
    moved = match_many(trained.spec, trained.weights, method=method, restarts=1, progress=False).apply(trained.weights)

    def worst(networks) -> float:
        return max(trained.barrier(networks[i], networks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))

    assert worst(moved) < worst(trained.weights) / 3
