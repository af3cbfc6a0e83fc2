"""Scores of merges: as they are measured, with any task, one for each weights, within a budget of time."""

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from support import close
from torch import Tensor, nn

import lmc
import lmc.merge as merge
from lmc.errors import InputError
from lmc.merge.study.compare import _spread
from lmc.network.task import Task


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.top = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.norm(self.body(x)).relu())


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, list[dict[str, Tensor]], Tensor, Tensor]:
    """Three noisy copies of one network and one that is far off; targets are the network's own outputs."""
    torch.manual_seed(0)
    model = Regression().eval()
    x = torch.randn(60, 6)
    y = model(x).detach()
    own = model.state_dict()
    models = [
        {name: t + size * torch.randn_like(t) if "weight" in name else t.clone() for name, t in own.items()}
        for size in (0.02, 0.03, 0.05, 2.0)
    ]
    return model, models, x, y


def error(model: nn.Module, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    return float((torch.func.functional_call(model, weights, (x,)) - y).square().mean())


def test_soups_of_regressors(case) -> None:
    model, models, x, y = case
    for given in ({"loss": nn.functional.mse_loss}, {"loss": Task.regression()}):
        soup = merge.greedy_soup(model, models, (x, y), progress=False, **given)
        assert soup.report.measure == "loss" and not soup.report.ingredients[-1].taken
        assert soup.report.score == pytest.approx(error(model, soup, x, y), rel=1e-4)
        alone = [row.score for row in soup.report.ingredients]
        assert alone == pytest.approx(sorted(error(model, m, x, y) for m in models), rel=1e-4)
        assert "worsens the loss" in soup.report.ingredients[-1].reason and "-" not in str(soup.report.score)
    learned = merge.learned_soup(model, models, Task.regression().on((x, y)), epochs=40, batch_size=20, progress=False)
    assert learned.report.coefficients["*"][3] < 0.05 and learned.report.temperature == 1.0
    assert learned.report.losses[-1] < learned.report.losses[0]
    made = merge.ama(model, models[:1], (x, y), base=models[1], loss=nn.functional.mse_loss, steps=3, progress=False)
    assert made.report.losses[0] > 0
    soups = merge.compare_soups(model, models, (x, y), loss=nn.functional.mse_loss, epochs=2, progress=False)
    assert soups.scores["greedy"]["validation"]["loss"] == pytest.approx(soup.report.score, rel=1e-4)
    with pytest.raises(InputError, match="metric='accuracy': the data have loss; give one of these"):
        merge.greedy_soup(model, models, (x, y), metric="accuracy", loss=nn.functional.mse_loss, progress=False)


def test_merges_of_regressors_are_ranked_by_their_loss(case) -> None:
    model, models, x, y = case
    methods = ["average", "greedy_soup", "learned_soup", "task_arithmetic"]
    options = {"base": models[0], "methods": methods, "loss": Task.regression(), "evaluations": 3}
    found = merge.compare(model, models[:3], (x, y), progress=False, **options)
    scores = [entry.validation for entry in found.entries]
    assert scores == sorted(scores) and not any(entry.note for entry in found.entries)
    assert found.metric == "loss" and not found.higher and found.unit == "squared error"
    assert found.best.validation == pytest.approx(error(model, found.weights, x[::2], y[::2]), rel=1e-4)
    assert "loss (squared error)" in found.plot().layout.xaxis.title.text
    train, test = ((x[k::2].contiguous(), y[k::2].contiguous()) for k in (0, 1))  # as `compare` cuts them
    splits = merge.compare(model, models[:3], {"train": train, "test": test}, progress=False, **options)
    assert [e.test for e in splits.entries] == [e.test for e in found.entries]


def test_a_metric_of_ones_own(case) -> None:
    model, models, x, y = case
    task = Task(nn.functional.mse_loss, metrics={"close": lambda f, t: ((f - t).abs() < 0.05).float()},
                    higher=("close",))  # fmt: skip
    found = merge.greedy_soup(model, models, (x, y), metric="close", loss=task, progress=False)
    near = [float(((torch.func.functional_call(model, m, (x,)) - y).abs() < 0.05).float().mean()) for m in models]
    assert [row.score for row in found.report.ingredients] == pytest.approx(sorted(near, reverse=True))


def test_the_loss_of_a_function_is_better_when_smaller(case) -> None:
    model, models, x, y = case
    by_function = merge.greedy_soup(model, models, lambda w: error(model, w, x, y), metric="loss", progress=False)
    by_data = merge.greedy_soup(model, models, (x, y), loss=nn.functional.mse_loss, progress=False)
    assert [row.model for row in by_function.report.ingredients] == [row.model for row in by_data.report.ingredients]
    least = merge.lcsc(
        model, models[:2], lambda w: error(model, w, x, y), metric="loss", evaluations=20, progress=False
    )
    assert least.report.score == min(trial.score for trial in least.report.trials) > 0


def test_an_unmerged_model_has_one_score_whatever_is_recalibrated(case) -> None:
    model, models, x, y = case
    single = {"first": lambda models, base=None: models[0], "base": lambda models, base=None: base}
    found = merge.compare(
        model, models[:2], (x, y), base=models[2], inputs=3.0 * x, methods=single | {"average": merge.average},
        loss=nn.functional.mse_loss, progress=False,
    )  # fmt: skip
    scores = {entry.method: entry.validation for entry in found.entries}
    assert scores["first"] == pytest.approx(error(model, models[0], x[::2], y[::2]), rel=1e-4)
    assert min(scores["first"], scores["best single model"]) == scores["best single model"]
    mean = lmc.recalibrate_batchnorm(model, merge.average(models[:2]), 3.0 * x)
    assert scores["average"] == pytest.approx(error(model, mean, x[::2], y[::2]), rel=1e-4)
    soup = merge.evolve(
        model, models[:2], (x, y), method=merge.slerp, space={"t": (-1.0, 1.0)}, inputs=3.0 * x, evaluations=1,
        loss=nn.functional.mse_loss, progress=False,
    )  # fmt: skip
    assert soup.report.options == {"t": 0.0} and close(soup, models[0], 0)


def test_tasks_of_different_measures_are_refused(case) -> None:
    model, models, x, y = case
    tasks = {"values": Task.regression().on((x, y)), "signs": Task.binary().on((x, (y > 0).float()))}
    with pytest.raises(InputError, match="measured differently.*metric='loss'"):
        merge.compare(model, models, tasks, methods=["average"], progress=False)
    found = merge.compare(model, models, tasks, methods=["average"], metric="loss", progress=False)
    assert set(found.best.tasks) == set(tasks)


def test_a_budget_leaves_out_what_it_does_not_reach(case, monkeypatch) -> None:
    model, models, x, y = case
    spent = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: spent[0])  # a busy machine must not decide this test
    monkeypatch.setattr(importlib.import_module("lmc.merge.study.compare"), "time", clock)

    def slow(models, base=None, scale=1.0):
        spent[0] += 0.05
        return models[0]

    methods = {name: (slow, {"scale": list(range(8))}) for name in ("one", "two", "three")}
    options = {"loss": nn.functional.mse_loss, "methods": methods, "progress": False}
    found = merge.compare(model, models, (x, y), seconds=0.3, **options)
    tried = [entry.tried for entry in found.entries if entry.method in methods]
    assert len(tried) == 3 and 0 < sum(tried) < 24
    assert all(entry.tried or "the budget of 0.3 s was spent" in entry.note for entry in found.entries)


def test_options_are_tried_from_the_middle_outwards() -> None:
    assert _spread([]) == [] and _spread([1]) == [1]
    for count in range(2, 20):
        order = _spread(list(range(count)))
        assert sorted(order) == list(range(count))
        reached = sorted(order[: count // 2])  # half of it leaves no wide gap
        assert max(b - a for a, b in zip([-1, *reached], [*reached, count], strict=True)) <= 4


def test_what_takes_long_is_said_beforehand(case, capsys, monkeypatch) -> None:
    model, models, x, y = case
    options = {"loss": nn.functional.mse_loss, "methods": ["average", "slerp"], "seconds": 90.0}
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr("lmc.core.progress.LONG", 0.0)
    merge.compare(model, models[:2], (x, y), **options)
    said = r"compare: 4 merges of 2 models by 2 methods: about \d+ (s|minutes), budget 90 s"
    assert re.search(said, capsys.readouterr().err)
    merge.compare(model, models[:2], (x, y), progress=False, **options)
    assert "about" not in capsys.readouterr().err


class CallableGraph:
    """A graph as torch_geometric has it: its entries come by `to_dict`, and it can be called."""

    def __init__(self, **entries):
        self.__dict__.update(entries)

    def to_dict(self):
        return dict(self.__dict__)

    def __call__(self, *names):
        return ((name, getattr(self, name)) for name in names)


class OneLayer(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(4, 3)

    def forward(self, x, edge_index):
        return self.layer(x).index_add(0, edge_index[0], self.layer(x)[edge_index[1]])


def test_models_of_a_graph_are_compared_on_its_masks():
    generator = torch.Generator().manual_seed(0)
    number = torch.arange(30) % 3
    graph = CallableGraph(
        x=torch.randn(30, 4, generator=generator),
        edge_index=torch.randint(30, (2, 60), generator=generator),
        y=torch.randint(3, (30,), generator=generator),
        **{f"{name}_mask": number == i for i, name in enumerate(("train", "val", "test"))},
    )
    models = [OneLayer(1), OneLayer(2)]
    found = merge.compare(models[0], models, graph, methods=["average"], progress=False).to_frame()
    own = lmc.landscape.evaluate(models[0], merge.average(models), graph)
    row = found.loc["average"]
    assert row["validation"] == pytest.approx(own["val"].accuracy) and row["test"] == pytest.approx(
        own["test"].accuracy
    )
    assert merge.greedy_soup(models[0], models, graph, progress=False).keys() == models[0].state_dict().keys()
