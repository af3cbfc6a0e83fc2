import dataclasses
import re

import numpy as np
import pytest
import torch
from alignment_cases import CASES, digits
from torch import nn

import lmc
from lmc.align.study.compare import METHODS, compare
from lmc.core import progress as budgets
from lmc.errors import InputError


@pytest.fixture(scope="module")
def comparison():
    trained = digits()
    a, b = trained.weights[:2]
    return compare(trained.spec, trained.model, a, b, trained.data, alphas=5, progress=False)


def test_every_method_brings_trained_networks_closer(comparison):
    assert list(comparison) == list(METHODS)
    naive = comparison["naive"]
    for method in set(METHODS) - {"naive"}:
        found = comparison[method]
        assert found.barrier < naive.barrier / 3
        assert found.objective > naive.objective and found.distance < naive.distance and found.cosine > naive.cosine
        assert found.r > naive.r


def test_repair_lowers_the_barrier_of_the_naive_average(comparison):
    naive = comparison["naive"]
    assert naive.barrier_repaired < naive.barrier and naive.midpoint_repaired < naive.midpoint


def test_what_is_measured_is_that_of_the_moved_weights(comparison):
    trained = digits()
    a, b = trained.weights[:2]
    found = comparison["weight matching"]
    moved = lmc.weight_matching(trained.spec, a, b, progress=False).apply(b)
    assert all(torch.equal(found.weights[k], moved[k]) for k in moved)
    assert found.distance == pytest.approx(lmc.weights.distance(a, moved))
    path = lmc.loss_path(trained.model, a, moved, trained.data, alphas=5, progress=False)
    assert found.barrier == path.barrier and comparison.split == path.split == "test"
    assert found.midpoint == path.losses["test"][2]


def test_it_prints_tabulates_and_plots(comparison):
    frame = comparison.to_frame()
    assert list(frame.index) == list(METHODS) and np.isfinite(frame.to_numpy(dtype=float)).all()
    assert "9 methods; lowest barrier" in repr(comparison) and "<table" in comparison._repr_html_()
    figure = comparison.plot()
    assert list(figure.data[0].x) == [comparison[m].barrier for m in list(METHODS)[::-1]]


def test_names_of_the_seconds_do_not_touch(comparison):
    def ticks(*seconds: float) -> tuple[float, ...] | None:
        rows = zip(METHODS, seconds, strict=False)
        timed = {method: dataclasses.replace(comparison[method], seconds=taken) for method, taken in rows}
        return dataclasses.replace(comparison, alignments=timed).plot().layout.xaxis3.tickvals

    assert ticks(0.02, 0.03) is None and ticks(0.02, 3.0) is None  # plotly finds them
    assert ticks(0.0, 0.02, 0.4) == pytest.approx((0.001, 0.1))
    assert ticks(0.002, 0.02, 400.0) == pytest.approx((0.01, 10.0))


def test_methods_of_ones_own_and_batches_that_can_be_read_once():
    case = CASES["vgg-bn"]()
    a, b = case.model.state_dict(), case.spec.random(1).apply(case.model)
    own = {"inverse": lambda spec, model, a, b, data: case.spec.random(1).inverse(), "as it is": lambda *_: b}
    data = iter([(case.inputs, case.targets)])
    found = compare(case.spec, case.model, a, b, data, methods=own, alphas=3, progress=False)
    assert found["inverse"].distance == 0 and found["inverse"].r == pytest.approx(1.0)
    assert found["inverse"].permutation is not None and found["as it is"].permutation is None
    assert found.split == "data"


def test_bad_input():
    case = CASES["mlp"]()
    with pytest.raises(InputError, match="'magic' is none of 'naive', 'weight matching'"):
        compare(case.spec, case.model, case.model, case.model, (case.inputs, case.targets), methods=["magic"])


def test_running_statistics_count_for_nothing():
    stored = lmc.data.checkpoint("digits-resnet20")
    model, (a, b) = stored.model(), stored
    data = lmc.data.digits(flat=False)
    spec = lmc.permutation_spec(model, data.test[0][:2])
    loud = {name: 100.0 * t if "running" in name else t for name, t in b.items()}
    rows = [
        lmc.align.compare(spec, model, a, other, data.test, methods=["naive"], alphas=3, progress=False)["naive"]
        for other in (b, loud)
    ]
    assert rows[0].objective == rows[1].objective and rows[0].distance == rows[1].distance
    assert rows[0].objective == pytest.approx(lmc.weight_matching(spec, a, b).info["objective_at_identity"], rel=1e-5)


def test_a_method_that_refuses_the_architecture_is_skipped_unless_it_is_named(monkeypatch):
    stored = lmc.data.checkpoint("digits-mlp32")
    model, (a, b), data = stored.model(), stored, lmc.data.digits()
    spec = lmc.permutation_spec(model, data.test[0][:2])

    def refuse(*_):
        raise lmc.SpecError("shared channels")

    few = {"naive": lmc.align.METHODS["naive"], "OT, weights": refuse}
    monkeypatch.setattr("lmc.align.study.compare.METHODS", few)
    found = lmc.align.compare(spec, model, a, b, data, alphas=3, progress=False)
    assert list(found) == ["naive"] and found.skipped == {"OT, weights": "shared channels"}
    assert "without OT, weights: shared channels" in repr(found)
    with pytest.raises(lmc.SpecError, match="shared channels"):
        lmc.align.compare(spec, model, a, b, data, methods=["OT, weights"], alphas=3, progress=False)


def test_no_method_is_begun_after_the_budget(monkeypatch):
    times = iter(range(100))
    monkeypatch.setattr(budgets, "clock", lambda: next(times))
    world = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
    a, b = ({"weight": torch.randn(2, 3, generator=torch.Generator().manual_seed(s))} for s in (1, 2))
    spec = lmc.PermutationSpec.from_patterns({"weight": ". ."}, a)
    found = lmc.align.compare(
        spec, nn.Linear(3, 2, bias=False), a, b, world, methods=["naive", "weight matching"], budget=1.5, progress=False
    )
    assert list(found) == ["naive"] and found.skipped == {"weight matching": "no time left of 1.5 s"}


def test_a_long_comparison_says_beforehand_how_long_at_least(monkeypatch, capsys):
    trained = digits()
    a, b = trained.weights[:2]
    arguments = (trained.spec, trained.model, a, b, trained.data.test)
    monkeypatch.setattr("lmc.core.progress.LONG", 0.0)
    compare(*arguments, methods=["naive", "weight matching"], alphas=3)
    assert capsys.readouterr().err == ""  # bars are switched off
    monkeypatch.delenv("TQDM_DISABLE")
    compare(*arguments, methods=["naive", "weight matching"], alphas=3, budget=600.0)
    said = r"compare: the ways of 1 methods more, .*: at least \d+ (s|minutes), budget 10 minutes"
    assert re.search(said, capsys.readouterr().err)
    compare(*arguments, methods=["naive", "weight matching"], alphas=3, progress=False)
    assert capsys.readouterr().err == ""
