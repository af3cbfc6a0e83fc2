"""Averages: identities of each formula on plain tensors, and the running averages over trajectories."""

import copy
import math

import pytest
import torch
from support import close
from torch import Tensor, nn

import lmc.merge as merge
from lmc.errors import InputError, MismatchError


def random_states(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def state() -> dict[str, Tensor]:
        shapes = {"w": (7, 5), "b": (7,), "k": (4, 3, 2, 2), "s": ()}
        return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}

    return [state() for _ in range(count)]


def test_average_is_the_weighted_mean() -> None:
    a, b, c = random_states(3)
    assert close(merge.average([a, b, c]), {k: (a[k] + b[k] + c[k]) / 3 for k in a})
    weighted = merge.average([a, b, c], weights=[1, 2, 1])
    assert close(weighted, {k: (a[k] + 2 * b[k] + c[k]) / 4 for k in a})
    assert close(merge.average([a, b], weights=[-0.5, 1.5]), {k: 1.5 * b[k] - 0.5 * a[k] for k in a})


def test_average_of_many_half_precision_models_is_summed_in_float32() -> None:
    models = [{"w": torch.full((4,), 1.0 + i / 128, dtype=torch.bfloat16)} for i in range(64)]
    expected = torch.stack([m["w"].float() for m in models]).mean(0).bfloat16()
    assert torch.equal(merge.average(models)["w"], expected)


@pytest.mark.parametrize("name", ["average", "karcher_mean", "variance_corrected", "model_stock", "wise_ft"])
def test_equal_models_give_that_model(name: str) -> None:
    base, a = random_states(2)
    options = {"alpha": 1.0} if name == "wise_ft" else {}
    assert close(getattr(merge, name)([a, a, a], base=base, **options), a, 1e-12)


@pytest.mark.parametrize("name", ["average", "karcher_mean", "slerp", "model_stock", "variance_corrected"])
def test_scaling_all_models_scales_the_result(name: str) -> None:
    base, a, b = random_states(3)
    five = [{k: 5 * v for k, v in m.items()} for m in (base, a, b)]
    method = getattr(merge, name)
    assert close(method(five[1:], base=five[0]), {k: 5 * v for k, v in method([a, b], base=base).items()}, 1e-11)


def test_wise_ft_endpoints_are_bitwise_and_the_middle_is_linear() -> None:
    base, tuned = random_states(2, dtype=torch.float32)
    for alpha, end in ((0.0, base), (1.0, tuned)):
        result = merge.wise_ft([tuned], base=base, alpha=alpha)
        assert all(torch.equal(result[k], end[k]) for k in end)
    quarter = merge.wise_ft([tuned], base=base, alpha=0.25)
    assert close(quarter, {k: 0.75 * base[k] + 0.25 * tuned[k] for k in base}, 1e-6)
    with pytest.raises(InputError, match="pass base="):
        merge.wise_ft([tuned], alpha=0.5)


def test_slerp() -> None:
    a, b = random_states(2)
    for t in (0.0, 1.0):
        assert all(torch.equal(merge.slerp([a, b], t=t)[k], (a, b)[int(t)][k]) for k in a)
    assert close(merge.slerp([a, b], t=0.3), merge.slerp([b, a], t=0.7))
    units = [{"w": m["w"] / m["w"].norm()} for m in (a, b)]
    middle = merge.slerp(units, t=0.3)["w"]
    assert math.isclose(float(middle.norm()), 1.0, abs_tol=1e-12)
    angle = math.acos(float((units[0]["w"] * units[1]["w"]).sum()))
    assert math.isclose(math.acos(float((units[0]["w"] * middle).sum())), 0.3 * angle, abs_tol=1e-9)
    with pytest.raises(InputError, match="exactly 2 models"):
        merge.slerp([a, b, a])


def test_slerp_of_degenerate_pairs_is_finite_and_linear() -> None:
    v = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    for u, limit in ((-v, 1.0), (-v, 0.9995), (2 * v, 1.0), (torch.zeros_like(v), 0.9995)):
        result = merge.slerp([{"w": v}, {"w": u}], t=0.25, lerp_above=limit)["w"]
        assert torch.allclose(result, 0.75 * v + 0.25 * u, atol=1e-6)


def test_slerp_with_a_base_turns_task_vectors() -> None:
    base, a, b = random_states(3)
    moved = merge.slerp([{k: base[k] + v for k, v in m.items()} for m in (a, b)], base=base, t=0.4)
    assert close(moved, {k: base[k] + v for k, v in merge.slerp([a, b], t=0.4).items()})


def test_karcher_mean_of_two_unit_tensors_is_slerp() -> None:
    a, b = ({k: v / v.norm() for k, v in m.items() if k != "s"} for m in random_states(2))
    for weight in (0.5, 0.2):
        mean = merge.karcher_mean([a, b], weights=[1 - weight, weight], tolerance=1e-12, iterations=50)
        assert close(mean, merge.slerp([a, b], t=weight, lerp_above=1.0), 1e-9)


def test_karcher_mean_has_the_mean_norm_and_balances_the_tangent_vectors() -> None:
    states = random_states(5)
    mean = merge.karcher_mean(states, tolerance=1e-12, iterations=200)["w"]
    points = torch.stack([s["w"].flatten() for s in states])
    assert math.isclose(float(mean.norm()), float(points.norm(dim=1).mean()), rel_tol=1e-9)
    m, v = mean.flatten() / mean.norm(), points / points.norm(dim=1, keepdim=True)
    across = v - (v @ m)[:, None] * m
    logs = across / across.norm(dim=1, keepdim=True) * torch.atan2(across.norm(dim=1), v @ m)[:, None]
    assert float(logs.sum(0).norm()) < 1e-6


def test_karcher_mean_of_opposite_or_zero_tensors_is_finite() -> None:
    v = torch.randn(6, generator=torch.Generator().manual_seed(0))
    for tensors in ([v, -v], [v, torch.zeros(6)], [torch.zeros(6)] * 2):
        assert torch.isfinite(merge.karcher_mean([{"w": t} for t in tensors])["w"]).all()


def test_model_stock_between_base_and_mean() -> None:
    base = {"w": torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    step = torch.zeros(4, 3, dtype=torch.float64)
    right, up = step.clone(), step.clone()
    right[0, 0], up[1, 1] = 1.0, 1.0
    models = [{"w": base["w"] + d} for d in (right, up)]
    assert close(merge.model_stock(models, base=base), base)  # orthogonal task vectors: the base
    opposite = [{"w": base["w"] + d} for d in (right, -right, up)]
    assert close(merge.model_stock(opposite, base=base), base)  # negative cosine: no pole, no overshoot
    half = [{"w": base["w"] + d} for d in (right, 0.5 * right + math.sqrt(0.75) * up)]  # cos 1/2: t = 2/3
    assert close(
        merge.model_stock(half, base=base), {"w": base["w"] + 2 / 3 * (0.75 * right + 0.5 * math.sqrt(0.75) * up)}
    )
    still = [{"w": base["w"] + right}, base]  # a task vector of zero has no angle: plain mean
    assert close(merge.model_stock(still, base=base), {"w": base["w"] + 0.5 * right})


def test_model_stock_finds_the_centre_of_a_shell() -> None:
    generator = torch.Generator().manual_seed(0)
    centre = 0.5 * torch.randn(4000, generator=generator) / math.sqrt(4000)
    base = {"w": torch.zeros(4000)}
    models = [{"w": centre + torch.randn(4000, generator=generator) / math.sqrt(4000)} for _ in range(3)]
    mean = merge.average(models)["w"]
    stock = merge.model_stock(models, base=base)["w"]
    oracle = float(mean @ centre / (mean @ mean))
    assert math.isclose(float(stock.norm() / mean.norm()), oracle, abs_tol=0.05)
    assert (stock - centre).norm() < (mean - centre).norm()


def test_model_stock_filter_wise_treats_rows_alone() -> None:
    base, a, b = random_states(3)
    result = merge.model_stock([a, b], base=base, filter_wise=True)
    for row in range(7):
        alone = merge.model_stock([{"w": m["w"][row : row + 1]} for m in (a, b)], base={"w": base["w"][row : row + 1]})
        assert torch.allclose(result["w"][row], alone["w"][0], atol=1e-12)


def test_model_stock_takes_a_vector_as_one_filter_and_rows_by_the_last_axis() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = {"b": torch.randn(50, generator=generator), "conv": torch.randn(4, 3, 2, 5, generator=generator)}
    models = [{k: v + torch.randn(v.shape, generator=generator) for k, v in shared.items()} for _ in range(3)]
    base = {k: torch.zeros_like(v) for k, v in shared.items()}

    def between(rows: list[torch.Tensor]) -> torch.Tensor:
        cosine = sum(float(torch.cosine_similarity(rows[i], rows[j], 0)) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
        return max(0.0, 3 * cosine / (1 + 2 * cosine)) * torch.stack(rows).mean(0)

    for options in ({"filter_wise": True}, {"row_wise": True}):
        found = merge.model_stock(models, base=base, **options)
        assert torch.allclose(found["b"], between([m["b"] for m in models]), atol=1e-5)
        length = 30 if "filter_wise" in options else 5
        rows = [m["conv"].reshape(-1, length) for m in models]
        expected = torch.stack([between([r[i] for r in rows]) for i in range(len(rows[0]))])
        assert torch.allclose(found["conv"].reshape(-1, length), expected, atol=1e-5)
    with pytest.raises(InputError, match="choose one"):
        merge.model_stock(models, base=base, filter_wise=True, row_wise=True)


def test_variance_correction_restores_the_variance_and_keeps_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    models = [{"w": 0.3 + torch.randn(200, 100, generator=generator, dtype=torch.float64)} for _ in range(8)]
    plain, corrected = merge.average(models)["w"], merge.variance_corrected(models)["w"]
    wanted = torch.stack([m["w"].var(correction=0) for m in models]).mean()
    assert math.isclose(float(plain.var(correction=0) / wanted), 1 / 8, rel_tol=0.05)
    assert math.isclose(float(corrected.var(correction=0) / wanted), 1.0, rel_tol=1e-12)
    assert math.isclose(float(corrected.mean()), float(plain.mean()), rel_tol=1e-12)
    vectors = [{"b": m["w"][0]} for m in models]
    assert close(merge.variance_corrected(vectors), merge.average(vectors))


def test_metrics_weighted() -> None:
    states = random_states(3)
    assert close(merge.metrics_weighted(states, losses=[0.4, 0.4, 0.4]), merge.average(states))
    a = merge.metrics_weighted(states, losses=[1.0, 2.0, 4.0])
    assert close(a, merge.average(states, weights=[4, 2, 1]))
    assert close(a, merge.metrics_weighted(states, losses=[10.0, 20.0, 40.0]))
    assert close(a, merge.metrics_weighted(states, scores=[4.0, 2.0, 1.0]))
    assert close(merge.metrics_weighted(states, losses=[1.0, 2.0, 4.0], power=0.0), merge.average(states))
    assert close(merge.metrics_weighted(states, losses=[1.0, 2.0, 4.0], power=200.0), states[0])
    with pytest.raises(InputError, match="must all be positive"):
        merge.metrics_weighted(states, losses=[1.0, 0.0, 1.0])
    with pytest.raises(InputError, match="either"):
        merge.metrics_weighted(states)


def test_running_averages_of_a_trajectory() -> None:
    states = random_states(9, dtype=torch.float32)
    assert close(merge.swa(iter(states)), merge.average(states), 1e-6)
    assert close(merge.lawa(iter(states), window=4), merge.average(states[-4:]), 1e-6)
    assert close(merge.lawa(states, window=1), states[-1], 0)
    assert close(merge.ema(states, decay=0.0), states[-1], 0)
    powers = [0.8 ** (8 - i) * 0.2 for i in range(9)]
    started = [0.8**8, *powers[1:]]
    assert close(merge.ema(states, decay=0.8), merge.average(states, weights=started), 1e-6)
    assert close(merge.ema(states, decay=0.8, bias_correction=True), merge.average(states, weights=powers), 1e-6)
    for constant in (merge.swa, merge.ema, merge.lawa):
        assert close(constant([states[0]] * 5), states[0], 0)
    with pytest.raises(InputError, match="empty"):
        merge.swa([])
    with pytest.raises(MismatchError, match="checkpoint 2"):
        merge.swa([states[0], {"w": states[0]["w"]}])


@pytest.mark.parametrize("method", [merge.swa, merge.lawa, merge.ema])
def test_a_training_loop_may_yield_its_own_model(method) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    seen = []

    def train():
        for i in range(3):
            with torch.no_grad():
                for tensor in [*model.parameters(), model[1].running_mean]:
                    tensor += 0.1 * (i + 1)
                model[1].num_batches_tracked += 1
            seen.append(copy.deepcopy(model.state_dict()))
            yield model

    options = {"decay": 0.5} if method is merge.ema else {}
    live = method(train(), **options)
    later = method(seen, **options)
    assert all(torch.equal(live[k], later[k]) for k in live) and not torch.equal(live["0.weight"], seen[-1]["0.weight"])


def test_swa_beats_the_last_iterate_of_noisy_descent_on_a_quadratic() -> None:
    generator = torch.Generator().manual_seed(0)
    curvature = torch.linspace(0.1, 1.0, 20)
    w, trajectory = torch.zeros(20), []
    for _ in range(200):
        w = w - 0.5 * (curvature * w + torch.randn(20, generator=generator))
        trajectory.append({"w": w})
    loss = lambda state: float((curvature * state["w"] ** 2).sum() / 2)  # noqa: E731
    last = sum(map(loss, trajectory[-20:])) / 20
    assert loss(merge.swa(trajectory[50:])) < 0.2 * last


def test_tensors_of_zeros_and_weights_of_zero_have_no_direction() -> None:
    a, b, c = random_states(3)
    still = {name: torch.zeros_like(tensor) for name, tensor in a.items()}
    for method in (merge.karcher_mean, merge.multislerp):
        assert close(method([still, a], weights=[1, 0]), still)
        assert close(method([still, a, b], weights=[1, 0, 0]), still)
        assert close(method([a, still, b], weights=[1, 0, 0]), a)
    with pytest.raises(InputError, match="sum to 0"):
        merge.karcher_mean([still, a, b], weights=[1, 1, -1])
    # a task vector of zero has cosine 0 with all others, and that alone is the mean cosine of two
    assert close(merge.model_stock([a, b], base=a, signed=True), a)
    assert not close(merge.model_stock([a, b, c], base=a, signed=True), a)


def test_statistics_of_weights_that_sum_to_zero_stay_within_the_models() -> None:
    a, b = ({"n.running_mean": torch.tensor([1.0 + 2 * i]), "w": torch.ones(1)} for i in range(2))
    for method, options, expected in (
        (merge.weighted_sum, {"weights": [1, -1]}, 2.0),
        (merge.weighted_sum, {"weights": [0, 0]}, 2.0),
        (merge.nuslerp, {"weights": [3, -3]}, 2.0),
        (merge.weighted_sum, {"weights": [2, 0]}, 1.0),
    ):
        assert float(method([a, b], **options)["n.running_mean"]) == expected


def test_no_experts_cannot_be_mixed() -> None:
    with pytest.raises(InputError, match="empty"):
        merge.mix_experts([], beta=0.1)
