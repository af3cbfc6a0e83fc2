import pytest
import torch
from alignment_cases import CASES, digits

import lmc
from lmc.align.relaxed import soft
from lmc.align.relaxed.sinkhorn import distance, sinkhorn_matching
from lmc.align.relaxed.soft import sinkhorn
from lmc.align.weight_matching.gains import assign
from lmc.errors import DataError, InputError, MismatchError


def scores(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rows_and_columns_sum_to_one():
    for seed in range(5):
        matrix = sinkhorn(scores(9, seed), 50)
        assert (matrix >= 0).all()
        torch.testing.assert_close(matrix.sum(0), torch.ones(9, dtype=torch.float64), atol=1e-3, rtol=0)
        torch.testing.assert_close(matrix.sum(1), torch.ones(9, dtype=torch.float64), atol=1e-9, rtol=0)


def test_large_scores_do_not_overflow():
    matrix = sinkhorn(1e4 * scores(6).float(), 50)
    assert torch.isfinite(matrix).all()


def test_low_temperatures_lead_to_the_assignment():
    gain = scores(7, 1)
    index, _ = assign(gain)
    best = gain[torch.arange(7), index].sum()
    gaps = [float(best - (sinkhorn(gain / tau, 5000) * gain).sum()) for tau in (1.0, 0.1, 0.01)]
    assert gaps[0] > gaps[1] > gaps[2] > -1e-6 and gaps[2] < 0.01 * gaps[0]


def test_the_derivative_of_sinkhorn_is_that_of_its_steps():
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 10), scores(4).requires_grad_())


@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_scaling_numbers_and_scaling_logarithms_are_the_same(spread: float, monkeypatch: pytest.MonkeyPatch):
    given = torch.stack([spread * scores(6, seed) for seed in range(3)]).requires_grad_()
    weights = torch.stack([scores(6, seed + 3) for seed in range(3)])
    results = []
    for reach in (soft._RANGE, 0.0):
        monkeypatch.setattr(soft, "_RANGE", reach)
        matrices = sinkhorn(given, 7)
        results.append((matrices, *torch.autograd.grad((weights * matrices).sum(), given)))
    for numbers, logarithms in zip(*results, strict=True):
        torch.testing.assert_close(numbers, logarithms, atol=1e-11, rtol=1e-9)


def test_groups_of_one_size_are_scaled_together():
    given = {"a": scores(5, 0), "b": scores(3, 1), "c": scores(5, 2)}
    together = soft.doubly_stochastic(given, 10)
    assert list(together) == ["a", "b", "c"]
    for name, one in given.items():
        torch.testing.assert_close(together[name], sinkhorn(one, 10), atol=1e-14, rtol=0)


@pytest.mark.parametrize("target", ["l2", "l1", "cosine"])
def test_a_planted_permutation_is_found(target: str):
    case = CASES["cnn"]()
    planted = case.spec.random(3)
    pi = sinkhorn_matching(
        case.spec, case.model, case.model, planted.apply(case.model), target=target, steps=150, progress=False
    )
    assert pi == planted.inverse() and pi.objective == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["mlp", "vgg-bn", "gpt"])
def test_a_planted_permutation_is_found_in_every_family(name: str):
    case = CASES[name]()
    planted = case.spec.random(1)
    moved = planted.apply(case.model)
    pi = sinkhorn_matching(case.spec, case.model, case.model, moved, lr=0.3, steps=60, patience=3, progress=False)
    back = pi.apply(moved)
    assert all(torch.equal(back[k], v) for k, v in case.model.state_dict().items())


@pytest.mark.parametrize("target", ["midpoint", pytest.param("random", marks=pytest.mark.thorough)])
def test_trained_networks_come_closer(target: str):
    trained = digits()
    a, b = trained.weights[:2]
    pi = sinkhorn_matching(
        trained.spec, trained.model, a, b, trained.data, target=target, steps=150, seed=1, progress=False
    )
    assert trained.barrier(a, pi.apply(b)) < trained.barrier(a, b) / 3
    assert -pi.objective == min(pi.info["values"]) < pi.info["values"][0]


def test_distances_are_shares_of_the_first():
    a = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([[4.0]])}
    b = {"x": torch.tensor([0.0, 0.0]), "y": torch.tensor([[4.0]])}
    assert float(distance(a, a, "l2")) == float(distance(a, a, "l1")) == 0.0
    assert float(distance(a, b, "l2")) == pytest.approx(9 / 25)
    assert float(distance(a, b, "l1")) == pytest.approx(3 / 7)
    assert float(distance(a, b, "cosine")) == pytest.approx(1 - 4 / 5)


def test_batch_norm_networks_can_learn_from_data():
    case = CASES["resnet-bn"]()
    data = (case.inputs, case.targets)
    pi = sinkhorn_matching(
        case.spec, case.model, case.model, case.other(2), data, steps=12, measure_every=4, progress=False
    )
    assert len(pi.info["values"]) == 4 and pi.info["target"] == "midpoint"


def test_the_same_seed_gives_the_same_result_and_nothing_of_the_callers_changes():
    case = CASES["mlp"]()
    other = case.other(2)
    kept, state = {k: v.clone() for k, v in other.items()}, torch.get_rng_state()

    def run(seed: int):
        return sinkhorn_matching(case.spec, case.model, case.model, other, steps=40, seed=seed, progress=False)

    first = run(1)
    assert run(1) == first and run(1).info["values"] == first.info["values"] != run(2).info["values"]
    assert all(torch.equal(kept[k], other[k]) for k in kept) and torch.equal(state, torch.get_rng_state())


def test_matrices_that_are_not_doubly_stochastic_are_said():
    case = CASES["mlp"]()
    data = (case.inputs, case.targets)
    with pytest.warns(UserWarning, match="not converged: after 2 iterations at tau=0.1.*raise iterations or tau"):
        pi = sinkhorn_matching(
            case.spec,
            case.model,
            case.model,
            case.other(1),
            data,
            tau=0.1,
            iterations=2,
            lr=1.0,
            steps=60,
            progress=False,
        )
    assert pi.info["unevenness"] > 0.5


def test_it_stops_when_nothing_gets_better():
    case = CASES["mlp"]()
    pi = sinkhorn_matching(
        case.spec, case.model, case.model, case.model, lr=1e-9, patience=2, measure_every=1, progress=False
    )
    assert pi.info["steps"] == 2 and pi.is_identity()


def test_the_budget_ends_it():
    case = CASES["mlp"]()
    pi = sinkhorn_matching(case.spec, case.model, case.model, case.other(1), budget=1e-9, progress=False)
    assert pi.info["steps"] == 1 and not pi.info["interrupted"]


def test_bad_input():
    case = CASES["mlp"]()
    a, b = case.model, case.other(1)
    with pytest.raises(InputError, match="target='l3'"):
        sinkhorn_matching(case.spec, case.model, a, b, target="l3")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="target='midpoint' needs labelled data"):
        sinkhorn_matching(case.spec, case.model, a, b, target="midpoint")
    with pytest.raises(InputError, match="tau=0"):
        sinkhorn_matching(case.spec, case.model, a, b, tau=0.0)
    with pytest.raises(MismatchError):
        sinkhorn_matching(case.spec, case.model, a, lmc.models.mlp(12, [16, 9], 5))
