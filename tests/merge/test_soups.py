"""Greedy and learned soups: guarantees, the report, and networks trained on digits."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import same
from torch import Tensor, nn

import lmc
import lmc.merge as merge
from lmc.errors import InputError, WeightsError

Data = tuple[Tensor, Tensor]


def train(model: nn.Module, data: Data, steps: int, lr: float, seed: int) -> nn.Module:
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        index = torch.randint(len(data[1]), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(data[0][index]), data[1][index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def digits() -> dict[str, Data]:
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts = {"train": order[:600], "validation": order[600:1100], "test": order[1100:]}
    return {name: (x[index], y[index]) for name, index in parts.items()}


@pytest.fixture(scope="module")
def kitchen(digits: dict[str, Data]) -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(0)
    base = train(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), digits["train"], 60, 1e-2, 0)
    rates = [1e-3, 3e-3, 1e-3, 1e-2, 0.5]  # the last one is ruined
    return base, [train(base, digits["train"], 80, lr, seed) for seed, lr in enumerate(rates, start=1)]


def accuracy(model: nn.Module, weights: dict[str, Tensor], data: Data) -> float:
    outputs = torch.func.functional_call(model, weights, (data[0],))
    return float((outputs.argmax(1) == data[1]).float().mean())


def test_greedy_soup_on_digits(kitchen: tuple[nn.Module, list[nn.Module]], digits: dict[str, Data]) -> None:
    base, models = kitchen
    before = copy.deepcopy(base.state_dict())
    soup = merge.greedy_soup(base, models, digits["validation"])
    alone = [accuracy(base, m.state_dict(), digits["validation"]) for m in models]
    assert math.isclose(soup.report.score, accuracy(base, soup, digits["validation"]), abs_tol=1e-6)
    assert soup.report.score >= max(alone)
    assert [row.score for row in soup.report.ingredients] == pytest.approx(sorted(alone, reverse=True))
    last = soup.report.ingredients[-1]
    assert last.model == 4 and not last.taken and "worsens" in last.reason
    uniform = accuracy(base, merge.uniform_soup(models), digits["test"])
    assert accuracy(base, soup, digits["test"]) > uniform + 0.1
    assert same(base.state_dict(), before)
    text = str(soup.report)
    assert "best on its own" in text and f"{len(soup.report.taken)} of 5 models" in text and text in repr(soup)
    assert list(soup.report.to_frame().columns) == ["model", "score", "soup", "taken", "reason"]


def test_greedy_soup_does_not_depend_on_the_order_given(kitchen, digits: dict[str, Data]) -> None:
    base, models = kitchen
    forward = merge.greedy_soup(base, models, digits["validation"], metric="loss")
    backward = merge.greedy_soup(base, models[::-1], digits["validation"], metric="loss")
    assert same(forward, backward)
    assert forward.report.taken == tuple(4 - i for i in backward.report.taken)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), strict=st.booleans())
def test_greedy_soup_is_never_worse_than_its_best_ingredient_whatever_the_score(seed: int, strict: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    models = [{"weight": torch.randn(1, 2, generator=generator)} for _ in range(5)]
    target = torch.randn(1, 2, generator=generator)

    def noisy(weights: dict[str, Tensor]) -> float:  # any function of the weights, rounded so that ties occur
        return round(float(torch.sin(9 * weights["weight"] - target).sum()), 1)

    soup = merge.greedy_soup(nn.Linear(2, 1, bias=False), models, noisy, strict=strict, progress=False)
    assert noisy(soup) == soup.report.score >= max(map(noisy, models))
    assert same(soup, merge.average([models[i] for i in soup.report.taken]))


def test_accepting_ties_follows_the_paper_and_strict_the_code() -> None:
    model = nn.Linear(2, 1)
    models = [copy.deepcopy(model).state_dict() for _ in range(3)]
    models[1]["bias"] = models[1]["bias"] + 1
    assert merge.greedy_soup(model, models, lambda w: 1.0).report.taken == (0, 1, 2)
    assert merge.greedy_soup(model, models, lambda w: 1.0, strict=True).report.taken == (0,)
    assert merge.greedy_soup(model, models, lambda w: 1.0, min_gain=0.1).report.taken == (0,)
    with pytest.raises(InputError, match="min_gain"):
        merge.greedy_soup(model, models, lambda w: 1.0, min_gain=-0.1)


def test_one_or_equal_ingredients_give_that_model(kitchen, digits: dict[str, Data]) -> None:
    base, models = kitchen
    for ingredients in ([models[0]], [models[0]] * 3):
        assert same(merge.greedy_soup(base, ingredients, digits["validation"]), models[0].state_dict())


def test_models_that_are_not_finite_are_named_and_left_out(kitchen, digits: dict[str, Data]) -> None:
    base, models = kitchen
    spoiled = copy.deepcopy(models[1].state_dict())
    spoiled["2.weight"][3, 4] = float("nan")
    soup = merge.greedy_soup(base, [models[0], spoiled], digits["validation"])
    assert soup.report.taken == (0,) and "2.weight" in soup.report.ingredients[-1].reason
    with pytest.raises(WeightsError, match=r"no ingredient can be used.*models\[0\]: 2.weight"):
        merge.greedy_soup(base, [spoiled], digits["validation"])
    with pytest.raises(InputError, match="metric"):
        merge.greedy_soup(base, models, digits["validation"], metric="f1")  # type: ignore[arg-type]


def test_greedy_soup_with_batchnorm_recalibrates_before_it_scores(digits: dict[str, Data]) -> None:
    models = []
    for seed in (1, 2):  # unrelated: their average has statistics of its own
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
        models.append(train(net, digits["train"], 150, 1e-2, seed))
    plain = merge.greedy_soup(net, models, digits["validation"], metric="loss")
    renewed = merge.greedy_soup(net, models, digits["validation"], metric="loss", inputs=digits["train"][0])
    tried = lmc.recalibrate_batchnorm(net, merge.average(models), digits["train"][0])
    for soup, weights in ((plain, merge.average(models)), (renewed, tried)):
        expected = _loss(net, weights, digits["validation"])
        assert math.isclose(soup.report.ingredients[1].soup, expected, abs_tol=1e-5)
    assert renewed.report.ingredients[1].soup < plain.report.ingredients[1].soup - 0.05


def _loss(model: nn.Module, weights: dict[str, Tensor], data: Data) -> float:
    evaluated = copy.deepcopy(model).eval()
    evaluated.load_state_dict(weights)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(evaluated(data[0]), data[1]))


def test_a_soup_is_a_state_dict_that_can_be_saved(kitchen, digits: dict[str, Data]) -> None:
    base, models = kitchen
    soup = merge.greedy_soup(base, models[:2], digits["validation"])
    buffer = io.BytesIO()
    torch.save(soup, buffer)
    buffer.seek(0)
    assert same(torch.load(buffer, weights_only=True), soup)
    copy.deepcopy(base).load_state_dict(soup)


def test_data_sets_are_scored_on_validation_or_train_never_on_test(kitchen, digits: dict[str, Data]) -> None:
    base, models = kitchen

    class Set:
        train, test = digits["train"], (digits["test"][0], torch.full_like(digits["test"][1], 999))

    soup = merge.greedy_soup(base, models, Set())
    assert soup.report.score == pytest.approx(accuracy(base, soup, digits["train"]))
    Set.validation = digits["validation"]  # type: ignore[attr-defined]
    assert merge.greedy_soup(base, models, Set()).report == merge.greedy_soup(base, models, digits["validation"]).report


@pytest.mark.parametrize("per", ["model", "layer", "tensor"])
def test_learned_soup(per: str, kitchen, digits: dict[str, Data]) -> None:
    base, models = kitchen
    noise = torch.Generator().manual_seed(9)
    spoiled = {k: v + 0.3 * torch.randn(v.shape, generator=noise) for k, v in base.state_dict().items()}
    ingredients = [*models[:4], spoiled]
    state = torch.get_rng_state()
    soup = merge.learned_soup(base, ingredients, digits["validation"], per=per, epochs=20)
    assert torch.equal(state, torch.get_rng_state())
    for share in soup.report.coefficients.values():
        assert math.isclose(sum(share), 1.0, abs_tol=1e-5)
    assert min(share[4] for share in soup.report.coefficients.values()) < 0.05  # hardly anything of the spoiled one
    assert len(soup.report.coefficients) == {"model": 1, "layer": 2, "tensor": 4}[per]
    uniform = merge.uniform_soup(ingredients)
    assert _loss(base, soup, digits["test"]) < _loss(base, uniform, digits["test"])
    assert soup.report.losses[-1] < soup.report.losses[0]
    again = merge.learned_soup(base, ingredients, digits["validation"], per=per, epochs=20)
    assert same(soup, again)


def test_learned_soup_that_learns_nothing_is_the_uniform_soup(kitchen, digits: dict[str, Data]) -> None:
    base, models = kitchen
    uniform = merge.uniform_soup(models)
    for options in ({"epochs": 0}, {"epochs": 2, "lr": 0.0}):
        soup = merge.learned_soup(base, models, digits["validation"], **options)
        assert all(torch.allclose(soup[k], uniform[k], atol=1e-6) for k in uniform)
    assert same(merge.learned_soup(base, models[:1], digits["validation"]), models[0].state_dict())
