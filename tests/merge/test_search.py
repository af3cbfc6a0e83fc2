"""Coefficients that are learned or searched: AdaMerging, evolution, combinations of checkpoints."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from support import same
from torch import Tensor, nn

import lmc.merge as merge
from lmc.errors import InputError


@pytest.fixture(scope="module")
def tasks() -> tuple[nn.Module, nn.Module, list[nn.Module], list[Tensor]]:
    """A base network, two fine-tuned ones and inputs of their tasks."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    models, data = [], []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(120, 5, generator=generator) + seed
        y = torch.randint(3, (120,), generator=generator)
        x[torch.arange(120), y] += 3.0
        tuned = copy.deepcopy(base)
        optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(tuned(x), y).backward()
            optimizer.step()
        models.append(tuned)
        data.append(x)
    return copy.deepcopy(base), base, models, data


@pytest.mark.parametrize("per", ["tensor", "task"])
def test_adamerging_lowers_entropy_within_its_bounds(per: str, tasks) -> None:
    model, base, models, data = tasks
    before = [copy.deepcopy(m.state_dict()) for m in (model, base, *models)]
    found = merge.adamerging(model, models, data, base=base, per=per, steps=60, lr=0.02)
    report = found.report
    assert sum(report.entropies[-1]) < sum(report.entropies[0])
    assert len(report.coefficients) == (4 if per == "tensor" else 1)
    assert all(0.0 <= c <= 1.0 for row in report.coefficients.values() for c in row)
    expected = merge.task_arithmetic(
        models,
        base=base,
        weights={name: list(c) for name, c in report.coefficients.items()},
    )
    assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected)
    assert all(math.isclose(sum(row), 1.0, abs_tol=1e-5) for row in report.predicted) and "entropy" in str(report)
    assert all(same(a, m.state_dict()) for a, m in zip(before, (model, base, *models), strict=True))
    assert same(found, merge.adamerging(model, models, data, base=base, per=per, steps=60, lr=0.02))


def test_adamerging_that_does_not_learn_is_task_arithmetic(tasks) -> None:
    model, base, models, data = tasks
    found = merge.adamerging(model, models, data, base=base, steps=3, lr=0.0)
    expected = merge.task_arithmetic(models, base=base, scale=0.3)
    assert all(torch.allclose(found[k], expected[k], atol=1e-7) for k in expected)
    trimmed = merge.adamerging(model, models, data, base=base, steps=0, density=0.2, initial=1.0)
    alone = [merge.ties([m], base=base, density=0.2) for m in models]
    expected = merge.task_arithmetic(alone, base=base)
    assert all(torch.allclose(trimmed[k], expected[k], atol=1e-6) for k in expected)


def test_adamerging_follows_the_gradient_of_the_entropy(tasks) -> None:
    model, base, models, data = tasks

    def entropy(scale: list[float]) -> float:
        merged = merge.task_arithmetic(models, base=base, weights=scale)
        total = 0.0
        for x in data:
            p = torch.func.functional_call(model, merged, (x,)).softmax(-1)
            total += float(-(p * p.log()).sum(-1).mean().detach())
        return total

    step = 1e-4  # Adam's first step has the sign of the gradient
    found = merge.adamerging(model, models, data, base=base, per="task", steps=1, lr=step, batch_size=120)
    moved = [c - 0.3 for c in found.report.coefficients["*"]]
    for t in range(2):
        up, down = ([0.3 + s * 1e-2 * (i == t) for i in range(2)] for s in (1, -1))
        slope = (entropy(up) - entropy(down)) / 2e-2
        assert math.isclose(moved[t], -math.copysign(step, slope), rel_tol=1e-2)


def test_adamerging_with_a_head_per_task(tasks) -> None:
    model, base, models, data = tasks
    heads = [{k: v for k, v in m.state_dict().items() if k.startswith("2.")} for m in models]
    one = merge.adamerging(model, models, data, base=base, heads=heads, steps=1, lr=0.1)
    with pytest.raises(InputError, match="heads"):
        merge.adamerging(model, models, data, base=base, heads=heads[:1], steps=1)
    assert one.report.coefficients["2.weight"] == pytest.approx((0.3, 0.3))  # their head does not depend on it
    assert one.report.coefficients["0.weight"] != pytest.approx((0.3, 0.3))
    with pytest.raises(InputError, match="per"):
        merge.adamerging(model, models, data, base=base, per="layer")  # type: ignore[arg-type]


def test_ama_keeps_the_mean_share_of_the_base(tasks) -> None:
    model, base, models, data = tasks
    teacher = merge.average([base, models[0]], weights={"0": [1.0, 0.0], "2": [0.0, 1.0]})
    targets = torch.func.functional_call(model, teacher, (data[0],)).argmax(1)
    options = {"base": base, "mean": 0.5, "groups": ["0", "2"]}
    found = merge.ama(model, models[:1], (data[0], targets), lr=0.1, **options)
    first, second = found.report.shares
    assert math.isclose((first + second) / 2, 0.5, abs_tol=1e-6) and first > second + 0.2
    expected = merge.average([base, models[0]], weights={"0": [first, 1 - first], "2": [second, 1 - second]})
    assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected)
    assert sum(found.report.losses[-20:]) < sum(found.report.losses[:20])
    even = merge.ama(model, models[:1], (data[0], targets), lr=0.0, steps=1, **options)
    for one in (even, merge.ama(model, models[:1], (data[0], targets), base=base, mean=0.5, groups=["*"], steps=5)):
        plain = merge.wise_ft(models[:1], base=base, alpha=0.5)
        assert all(torch.allclose(one[k], plain[k], atol=1e-6) for k in plain)
    by_depth = merge.ama(model, models[:1], (data[0], targets), base=base, groups=2, steps=1)
    assert len(by_depth.report.shares) == 2
    with pytest.raises(InputError, match="groups: no tensor fits"):
        merge.ama(model, models[:1], (data[0], targets), base=base, groups=["1"])


def test_balanced_batches_tame_a_fine_tuned_model(tasks) -> None:
    _, base, _, data = tasks
    generator = torch.Generator().manual_seed(0)
    x, y = data[0], torch.arange(120) % 3
    plain = merge.balanced_batch(x, y, classes=3, smoothing=0.0, mixup=0.0, generator=generator)
    assert torch.equal(plain[0], x) and torch.equal(plain[1], nn.functional.one_hot(y, 3).float())
    mixed, labels = merge.balanced_batch(x, y, classes=3, generator=generator)
    assert torch.allclose(labels.sum(1), torch.ones(120)) and torch.allclose(mixed.mean(0), x.mean(0), atol=1e-5)

    def confidence(smoothing: float) -> float:
        tuned = copy.deepcopy(base)
        optimizer = torch.optim.Adam(tuned.parameters(), lr=3e-2)
        for _ in range(80):
            inputs, goal = merge.balanced_batch(x, y, classes=3, smoothing=smoothing, mixup=0.0, generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(tuned(inputs), goal).backward()
            optimizer.step()
        return float(tuned(x).norm(dim=1).mean().detach())

    assert confidence(0.0) > confidence(0.1) > confidence(0.5)


def test_evolution_tunes_scale_and_density(tasks) -> None:
    model, base, models, _ = tasks
    target = merge.ties(models, base=base, density=0.6, scale=0.7)

    def likeness(weights: dict[str, Tensor]) -> float:
        return -sum(float((weights[k] - target[k]).square().sum()) for k in target)

    state = np.random.get_state()[1].copy()
    options = {"base": base, "space": {"density": (0.1, 1.0), "scale": (0.0, 2.0)}, "evaluations": 120}
    found = merge.evolve(model, models, likeness, method=merge.ties, **options)
    assert (np.random.get_state()[1] == state).all()
    report = found.report
    assert likeness(found) == report.score == max(t.score for t in report.trials) > -1e-2
    assert math.isclose(report.options["scale"], 0.7, abs_tol=0.05)
    assert same(found, merge.ties(models, base=base, **report.options))
    assert report.trials[0].options == {"density": 0.55, "scale": 1.0} and len(report.to_frame()) == len(report.trials)
    assert same(found, merge.evolve(model, models, likeness, method=merge.ties, **options))


def test_a_genome_is_the_method_called_by_hand(tasks) -> None:
    model, base, models, _ = tasks
    found = merge.evolve(
        model,
        models,
        lambda w: 0.0,
        method=merge.dare,
        base=base,
        space={"density": (0.0, 1.0), "weights": (0.0, 2.0)},
        evaluations=1,
        combine_by="ties",
        seed=3,
    )
    assert same(found, merge.dare(models, base=base, density=0.5, weights=[1.0, 1.0], combine_by="ties"))


def test_groups_have_options_of_their_own(tasks) -> None:
    model, base, models, _ = tasks
    only_first = merge.task_arithmetic(models, base=base, scale={"0": 1.0, "2": 0.0})

    def likeness(weights: dict[str, Tensor]) -> float:
        return -sum(float((weights[k] - only_first[k]).square().sum()) for k in only_first)

    found = merge.evolve(
        model, models, likeness, method=merge.task_arithmetic, base=base, space={"scale": (0, 2)}, groups=["0", "2"]
    )
    assert found.report.options["scale"]["0"] == pytest.approx(1.0, abs=0.1)
    assert found.report.options["scale"]["2"] == pytest.approx(0.0, abs=0.1)
    assert "scale: 0 " in str(found.report)


def test_merges_that_fail_count_as_the_worst(tasks) -> None:
    model, base, models, _ = tasks
    space = {"density": (-0.5, 0.9)}
    found = merge.evolve(model, models, lambda w: 1.0, method=merge.ties, base=base, space=space, evaluations=40)
    assert found.report.score == 1.0 and any(math.isnan(t.score) for t in found.report.trials)
    with pytest.raises(InputError, match="density"):
        merge.evolve(
            model, models, lambda w: 1.0, method=merge.ties, base=base, space={"density": (-2, -1)}, evaluations=10
        )
    with pytest.raises(InputError, match="space"):
        merge.evolve(model, models, lambda w: 1.0, method=merge.ties, base=base, space={"density": (1, 1)})


def test_lcsc_finds_the_least_squares_combination() -> None:
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(1, 12, generator=generator, dtype=torch.float64) for _ in range(4)]
    target = torch.randn(1, 12, generator=generator, dtype=torch.float64)
    model = nn.Linear(12, 1, bias=False).double()
    checkpoints = [{"weight": p} for p in points]

    def score(weights: dict[str, Tensor]) -> float:
        return -float((weights["weight"] - target).square().sum())

    found = merge.lcsc(model, checkpoints, score, evaluations=800)
    steps = torch.cat(points[:3]) - points[3]
    best = torch.linalg.lstsq(steps.T, (target - points[3]).T).solution.flatten().tolist()
    assert found.report.options["weights"] == pytest.approx([*best, 1 - sum(best)], abs=1e-2)
    assert same(found, merge.average(checkpoints, weights=found.report.options["weights"]))


def test_lcsc_is_never_worse_than_the_best_checkpoint() -> None:
    checkpoints = [{"weight": torch.full((1, 1), float(i))} for i in range(5)]
    spike = merge.lcsc(nn.Linear(1, 1, bias=False), checkpoints, lambda w: float(w["weight"] == 2.0), evaluations=30)
    assert spike.report.score == 1.0 and float(spike["weight"]) == 2.0
    alone = merge.lcsc(nn.Linear(1, 1, bias=False), checkpoints[:1], lambda w: 1.0, evaluations=30)
    assert same(alone, checkpoints[0])
    two = merge.lcsc(nn.Linear(1, 1, bias=False), checkpoints[:2], lambda w: -abs(float(w["weight"]) - 3.0))
    assert float(two["weight"]) == pytest.approx(3.0, abs=1e-3)  # an extrapolation


def test_without_cma_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(InputError, match=r"pip install 'lmc-lab\[search\]'"):
        merge.lcsc(nn.Linear(1, 1), [nn.Linear(1, 1)], lambda w: 1.0)


def test_no_more_merges_are_tried_than_allowed() -> None:
    model, models = nn.Linear(2, 1), [nn.Linear(2, 1) for _ in range(2)]
    for evaluations in (1, 5, 20):
        found = merge.evolve(
            model, models, lambda w: 1.0, method=merge.average, space={"weights": (0.1, 1.0)}, evaluations=evaluations
        )
        assert len(found.report.trials) == evaluations
