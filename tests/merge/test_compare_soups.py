"""Soups side by side, averages along a run, the line of WiSE-FT, and the recipes that train their ingredients."""

import copy
import math

import numpy as np
import pytest
import torch
from support import blobs, classifier
from torch import nn

import lmc
import lmc.merge as merge
from lmc.errors import InputError, MismatchError
from lmc.landscape.evaluation.evaluator import evaluate

TRAIN, VALIDATION, TEST = (blobs(count, seed, spread=0.9) for count, seed in ((200, 0), (80, 1), (80, 2)))


def tuned(weights, seed, steps=15, data=TRAIN):
    """A module trained from `weights` on batches drawn with `seed`."""
    model = classifier(0)
    model.load_state_dict(weights)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        index = torch.randint(len(data[1]), (32,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(data[0][index]), data[1][index]).backward()
        optimiser.step()
    return model


MODEL = classifier(0)
BASE = tuned(MODEL.state_dict(), 0).state_dict()
RUNS = [tuned(BASE, seed, steps=25).state_dict() for seed in (1, 2, 3)]


def loss(weights, data):
    return evaluate(MODEL, weights, data)["data"].loss


@pytest.fixture(scope="module")
def soups():
    spoiled = {k: torch.full_like(v, math.nan) for k, v in BASE.items()}
    stranger = tuned(classifier(5).state_dict(), 7, steps=20).state_dict()
    models = [*RUNS, stranger, spoiled]
    names = ["one", "two", "three", "stranger", "spoiled"]
    return models, merge.compare_soups(
        MODEL, models, VALIDATION, test=TEST, names=names, metric="loss", epochs=30, progress=False
    )


def test_shares_say_how_the_soups_are_mixed(soups):
    models, found = soups
    rows = {row.name: row for row in found.ingredients}
    for soup in ("uniform", "greedy", "learned"):
        shares = [rows[name].shares[soup] for name in ("one", "two", "three", "stranger")]
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)
        expected = lmc.weights.mean(models[:4], (np.array(shares) / sum(shares)).tolist())
        for key, tensor in found.weights[soup].items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-4)
    assert rows["stranger"].shares["learned"] < rows["one"].shares["learned"]
    assert rows["stranger"].shares["greedy"] == 0.0 and "worsens" in rows["stranger"].reason
    assert set(rows["spoiled"].shares.values()) == {0.0} and "NaN" in rows["spoiled"].reason
    assert set(found.layers) == {"0", "2"} and all(
        sum(s) == pytest.approx(1.0, abs=1e-5) for s in found.layers.values()
    )


def test_soups_are_judged_on_both_sets(soups):
    models, found = soups
    for soup, weights in found.weights.items():
        assert found.scores[soup]["validation"]["loss"] == pytest.approx(loss(weights, VALIDATION), rel=1e-5)
        assert found.scores[soup]["test"]["loss"] == pytest.approx(loss(weights, TEST), rel=1e-5)
    best = min(models[:4], key=lambda weights: loss(weights, VALIDATION))
    assert found.scores["best model"]["test"]["loss"] == pytest.approx(loss(best, TEST), rel=1e-5)
    greedy, alone = (found.scores[soup]["validation"]["loss"] for soup in ("greedy", "best model"))
    assert greedy <= alone + 1e-6


def test_the_table_of_ingredients_prints_and_plots(soups):
    _, found = soups
    frame = found.to_frame()
    assert list(frame.columns) == ["alone", "uniform", "greedy", "learned", "learned per layer", "reason"]
    assert list(found.scores_frame().index) == ["best model", *found.weights]
    assert "best on its own" in str(found) and "learned per layer: validation loss" in str(found)
    heat = found.plot().data[0]
    np.testing.assert_allclose(heat.z, frame[list(heat.x)].to_numpy())
    learned = merge.learned_soup(MODEL, RUNS, VALIDATION, per="layer", progress=False).report.to_frame()
    assert learned.shape == (2, 3) and np.allclose(learned.sum(axis=1), 1.0)
    with pytest.raises(InputError, match="3 different names"):
        merge.compare_soups(MODEL, RUNS, VALIDATION, names=["a", "a", "b"])


def test_averages_along_a_run_are_those_of_the_checkpoints_so_far():
    states = [tuned(MODEL.state_dict(), 0, steps=k).state_dict() for k in (1, 4, 8, 12, 16)]
    before = copy.deepcopy(states)
    found = merge.trajectory_averages(
        MODEL, states, TEST, steps=[1, 4, 8, 12, 16], start=1, window=2, decay=0.5, progress=False
    )
    expected = {
        "checkpoint": lambda t: states[t],
        "SWA": lambda t: merge.swa(states[1 : t + 1]) if t else states[0],
        "LAWA": lambda t: merge.lawa(states[: t + 1], window=2),
        "EMA": lambda t: merge.ema(states[: t + 1], decay=0.5),
    }
    for name, make in expected.items():
        direct = [loss(make(t), TEST) for t in range(5)]
        np.testing.assert_allclose(found.values[name]["data"]["loss"], direct, rtol=1e-5)
        assert all(torch.equal(found.last[name][k], v) for k, v in make(4).items())
    assert len(found.to_frame()) == 20 and "SWA at the end" in str(found)
    assert [trace.name for trace in found.plot().data[:4]] == list(expected)
    assert all(torch.equal(x[k], y[k]) for x, y in zip(before, states, strict=True) for k in x)
    for options, message in (({"steps": [1, 2]}, "steps"), ({"start": 5}, "start=5")):
        with pytest.raises(InputError, match=message):
            merge.trajectory_averages(MODEL, states, TEST, **options)
    with pytest.raises(InputError, match="at least one"):
        merge.trajectory_averages(MODEL, [], TEST)


def test_the_line_of_wise_ft_is_evaluated_on_every_set():
    shifted = {
        "reference": TEST,
        "left": blobs(80, 3, spread=0.9, shift=-0.5),
        "right": blobs(80, 4, spread=0.9, shift=0.5),
    }
    line = merge.wise_ft_line(MODEL, RUNS[0], shifted, base=BASE, alphas=5, progress=False)
    for name, data in shifted.items():
        for i, alpha in enumerate(line.alphas):
            merged = merge.wise_ft([RUNS[0]], base=BASE, alpha=float(alpha))
            assert line.accuracies[name][i] == pytest.approx(evaluate(MODEL, merged, data)["data"].accuracy)
    np.testing.assert_allclose(line.shifted, (line.accuracies["left"] + line.accuracies["right"]) / 2)
    assert line.gain()["left"] == pytest.approx(100 * (line.accuracies["left"][2] - line.accuracies["left"][4]))
    assert line.gain(1.0) == {"reference": 0.0, "left": 0.0, "right": 0.0}
    assert list(line.to_frame().columns) == ["alpha", "reference", "left", "right"] and "left: accuracy" in str(line)
    assert [trace.name for trace in line.plot().data] == ["left", "right", "mean of the shifts"]
    with pytest.raises(InputError, match="at least one shift"):
        merge.wise_ft_line(MODEL, RUNS[0], {"reference": TEST}, base=BASE)


def test_diwa_averages_runs_from_one_start():
    before = copy.deepcopy(BASE)
    soup = merge.diwa(MODEL, BASE, fine_tune=tuned, runs=3, progress=False)
    made = [tuned(BASE, run).state_dict() for run in range(3)]
    assert all(torch.equal(soup[k], v) for k, v in merge.average(made).items())
    assert [run.reason for run in soup.report.runs] == ["all are taken"] * 3 and math.isnan(soup.report.score)
    single = merge.diwa(MODEL, BASE, VALIDATION, fine_tune=tuned, runs=1, progress=False)
    assert all(torch.equal(single[k], v) for k, v in made[0].items())
    assert single.report.score == pytest.approx(evaluate(MODEL, made[0], VALIDATION)["data"].accuracy)
    assert all(torch.equal(BASE[k], v) for k, v in before.items())


def test_restricted_diwa_is_the_greedy_soup_of_its_runs():
    def uneven(weights, run):  # the second run is ruined
        return tuned(weights, run) if run != 1 else {k: torch.randn_like(v) for k, v in weights.items()}

    soup = merge.diwa(
        MODEL, BASE, VALIDATION, fine_tune=uneven, runs=3, select="restricted", metric="loss", progress=False
    )
    assert [run.taken for run in soup.report.runs][1] is False and "worsens" in soup.report.runs[1].reason
    assert soup.report.score <= min(run.score for run in soup.report.runs)
    assert list(soup.report.to_frame()["start"]) == [0, 0, 0]


def test_ratatouille_takes_trunks_in_turn_and_the_head_of_the_base():
    started = []

    def watched(weights, run):
        started.append({k: v.clone() for k, v in weights.items()})
        for tensor in weights.values():
            tensor.add_(run)  # the start may be changed at will
        return weights

    other = {**RUNS[1], "2.weight": torch.zeros(9, 12), "2.bias": torch.zeros(9)}  # a head of another task
    soup = merge.ratatouille(MODEL, [RUNS[0], other], base=BASE, fine_tune=watched, head="2", runs=3, progress=False)
    for start, trunk in zip(started, (RUNS[0], other, RUNS[0]), strict=True):
        assert all(torch.equal(start[k], trunk[k]) for k in ("0.weight", "0.bias"))
        assert all(torch.equal(start[k], BASE[k]) for k in ("2.weight", "2.bias"))
    expected = (2 * RUNS[0]["0.bias"] + other["0.bias"]) / 3 + 1.0
    torch.testing.assert_close(soup["0.bias"], expected)
    assert [run.start for run in soup.report.runs] == [0, 1, 0]


def test_ratatouille_from_the_base_alone_is_diwa():
    one = merge.ratatouille(MODEL, [BASE], base=BASE, fine_tune=tuned, head="2", runs=2, progress=False)
    two = merge.diwa(MODEL, BASE, fine_tune=tuned, runs=2, progress=False)
    assert all(torch.equal(one[k], two[k]) for k in two)


def test_recipes_name_what_they_cannot_use():
    cases = [
        (InputError, "runs=0", lambda: merge.diwa(MODEL, BASE, fine_tune=tuned, runs=0)),
        (InputError, "select='all'", lambda: merge.diwa(MODEL, BASE, fine_tune=tuned, select="all")),  # type: ignore[arg-type]
        (InputError, "pass validation=", lambda: merge.diwa(MODEL, BASE, fine_tune=tuned, select="restricted")),
        (InputError, "fits 0 of 4", lambda: merge.ratatouille(MODEL, RUNS, base=BASE, fine_tune=tuned, head="fc")),
        (InputError, "fits 4 of 4", lambda: merge.ratatouille(MODEL, RUNS, base=BASE, fine_tune=tuned, head="*")),
        (InputError, "at least one model", lambda: merge.ratatouille(MODEL, [], base=BASE, fine_tune=tuned, head="2")),
        (MismatchError, "run 0", lambda: merge.diwa(MODEL, BASE, fine_tune=lambda w, run: {}, progress=False)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
