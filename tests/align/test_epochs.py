"""Barriers over the epochs of two runs."""

import json
import math

import numpy as np
import pytest
import traitlets

import lmc
from lmc.align.study.epochs import Epochs, barrier_over_time
from lmc.errors import DataError, InputError
from lmc.landscape.path import loss_path
from lmc.symmetry.find import permutation_spec
from lmc.views.widgets.epochs import state

EPOCHS = (0, 1, 5, 20)


@pytest.fixture(scope="module")
def bench():
    stored, data = lmc.data.checkpoint("digits-mlp64-trajectory"), lmc.data.digits()
    runs = [{epoch: stored.at(seed, epoch) for epoch in EPOCHS} for seed in (0, 1)]
    return stored.model(), runs, data


@pytest.fixture(scope="module")
def result(bench) -> Epochs:
    model, runs, data = bench
    spec = permutation_spec(model, data.train[0][:2])
    return barrier_over_time(model, *runs, data, spec=spec, alphas=9, progress=False)


def test_barriers_of_stored_runs(result):
    naive, aligned = result.barriers["naive"], result.barriers["aligned"]
    assert result.epochs == EPOCHS
    assert naive[0] < 0.01 and naive[-1] > 1.2  # nothing to climb over before training
    assert (aligned[1:] < 0.6 * naive[1:]).all() and aligned[-1] < 0.3
    assert result.error_barriers["naive"][-1] > 30.0


def test_each_epoch_is_the_path_between_the_runs_then(bench, result):
    model, (run_a, run_b), data = bench
    direct = loss_path(model, run_a[5], run_b[5], data, alphas=9)
    np.testing.assert_allclose(result[5]["naive"].losses["test"], direct.losses["test"], rtol=1e-6)
    # Aligning b changes nothing at the ends.
    for epoch in EPOCHS:
        ends = [result[epoch][name].losses["test"][[0, -1]] for name in ("naive", "aligned")]
        np.testing.assert_allclose(*ends, rtol=1e-4)


def test_runs_that_are_one_have_no_barrier(bench):
    model, (run, _), data = bench
    same = barrier_over_time(model, run, run, data, alphas=3, epochs=[20, 1])
    assert same.epochs == (1, 20) and list(same.paths) == ["naive"]
    np.testing.assert_allclose(same.barriers["naive"], 0.0, atol=1e-6)


def test_the_frame_has_a_row_for_each_epoch_and_path(result):
    frame = result.to_frame()
    assert len(frame) == 8 and list(frame["epoch"][:2]) == [0, 0]
    row = frame[(frame["epoch"] == 20) & (frame["path"] == "aligned")].iloc[0]
    assert row["barrier"] == result.barriers["aligned"][-1]
    assert row["loss_a"] == result[20]["aligned"].own["test"]["loss"][0]


def test_it_prints_and_plots(result):
    text = str(result)
    assert text.startswith("Epochs 0 to 20 (4) of two runs") and "at epoch" in text
    figure = result.plot()
    np.testing.assert_array_equal(figure.data[0].y, result.barriers["naive"])
    assert len(figure.data) == 2 + 2 * 4


def test_an_end_that_diverged_is_a_gap(bench):
    model, (run_a, run_b), data = bench
    huge = {name: 1e30 * tensor for name, tensor in run_b[20].items()}
    result = barrier_over_time(model, run_a, {5: run_b[5], 20: huge}, data, alphas=3)
    assert math.isnan(result.barriers["naive"][1]) and result.barriers["naive"][0] > 0
    assert "nan at last" in str(result)
    content = state(result)
    assert content["data"]["runs"][0]["barriers"][1] is None
    json.dumps(content, allow_nan=False)


def test_an_interrupt_keeps_the_epochs_that_are_done(bench, monkeypatch):
    model, runs, data = bench
    calls = []

    def breaks(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss_path(*args, **options)

    monkeypatch.setattr("lmc.align.study.epochs.loss_path", breaks)
    with pytest.warns(UserWarning, match="2 of 4 epochs"):
        result = barrier_over_time(model, *runs, data, alphas=3, progress=False)
    assert result.epochs == (0, 1) and len(result.paths["naive"]) == 2


def test_bad_input_is_told(bench, result):
    model, (run_a, run_b), data = bench
    with pytest.raises(InputError, match="share no epoch"):
        barrier_over_time(model, {0: run_a[0]}, {1: run_b[1]}, data)
    with pytest.raises(InputError, match="epochs=\\[3\\]; the runs share \\[0, 1, 5, 20\\]"):
        barrier_over_time(model, run_a, run_b, data, epochs=[3])
    with pytest.raises(InputError, match="b: expected a mapping epoch -> weights, got list"):
        barrier_over_time(model, run_a, [run_b[0]], data)
    with pytest.raises(InputError, match="epoch 3 was not evaluated"):
        result[3]


def test_the_explorer_holds_what_the_result_holds(result, tmp_path):
    content = state(result)
    runs = content["data"]["runs"]
    np.testing.assert_allclose(runs[1]["barriers"], result.barriers["aligned"], atol=1e-5)
    series = runs[0]["paths"][2]["series"]["test"]
    np.testing.assert_allclose(series["loss"], result[5]["naive"].losses["test"], atol=1e-5)
    assert (content["epoch"], content["alpha"], content["active"]) == (20, 0.5, "naive")
    result.save_html(tmp_path / "epochs.html")
    assert (tmp_path / "epochs.html").stat().st_size < 150_000


def test_the_widget_follows_and_stays_in_step(result):
    first, second = result.explore(), result.explore()
    assert repr(first) == "EpochsExplorer(naive, aligned; 4 epochs)"
    first.epoch, first.active = 5, "aligned"
    assert (second.epoch, second.active) == (5, "aligned")
    with pytest.raises(traitlets.TraitError, match="epoch=3; expected one of 0, 1, 5, 20"):
        first.epoch = 3
    told = first.answer(["aligned", 5, 0.3])
    assert told["values"]["loss"] == result[5]["aligned"].exact(0.3)["test"].loss


def test_weights_may_be_modules(bench):
    model, (run_a, run_b), data = bench
    module = lmc.data.checkpoint("digits-mlp64-trajectory").model()
    module.load_state_dict(run_b[5])
    found = barrier_over_time(model, {5: run_a[5]}, {5: module}, data, alphas=3)
    assert found.barriers["naive"][0] == pytest.approx(loss_path(model, run_a[5], run_b[5], data, alphas=3).barrier)


def test_saved_epochs_come_back(result, tmp_path):
    result.save(tmp_path / "epochs.json")
    back = Epochs.load(tmp_path / "epochs.json")
    assert back.epochs == result.epochs and list(back.paths) == list(result.paths)
    for name, found in result.barriers.items():
        np.testing.assert_array_equal(back.barriers[name], found)
    assert back[back.epochs[1]]["naive"].own == result[result.epochs[1]]["naive"].own


@pytest.mark.parametrize(
    "text",
    ["no json", "[]", '{"format": "lmc path 1"}', '{"format": "lmc epochs 1", "epochs": [0]}',
     '{"format": "lmc epochs 1", "epochs": [], "paths": {}}',
     '{"format": "lmc epochs 1", "epochs": [0], "paths": {"naive": []}}',
     '{"format": "lmc epochs 1", "epochs": [0], "paths": {"naive": [{}]}}'],
)  # fmt: skip
def test_other_files_hold_no_epochs(text, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(DataError, match="file"):
        Epochs.load(tmp_path / "file")
