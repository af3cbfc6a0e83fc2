"""Mixtures of three and more networks: lattices, points that equal direct evaluation, resuming, files and drawings."""

import json
import math

import numpy as np
import pytest
import torch
from support import classifier, splits

import lmc
from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.landscape.evaluation.evaluator import Evaluator, evaluate
from lmc.landscape.simplices.simplex import loss_simplex, loss_triangle
from lmc.landscape.simplices.simplex_result import Simplex, Triangle, coarse_to_fine, interpolate, lattice, lattice_size
from lmc.network.batchnorm import recalibrate_batchnorm
from lmc.weights import mean

DATA = splits(90, 60, classes=3, dims=6, spread=0.7)
SIZES = (6, 8, 3)


def random_states(count, model):
    generator = torch.Generator().manual_seed(5)
    return [
        {k: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v for k, v in weights.items()}
        for weights in [model.state_dict()] * count
    ]


MODEL = classifier(0, SIZES)
STATES = random_states(5, MODEL)


@pytest.fixture(scope="module")
def triangle() -> Triangle:
    return loss_triangle(MODEL, STATES[:3], DATA, resolution=6, names=("one", "two", "three"))


@pytest.mark.parametrize(("models", "resolution"), [(2, 5), (3, 6), (4, 4), (6, 2)])
def test_a_lattice_holds_every_share_once(models, resolution):
    counts = lattice(models, resolution)
    assert counts.shape == (lattice_size(models, resolution), models)
    assert (counts.sum(1) == resolution).all() and counts.min() == 0
    assert len({tuple(row) for row in counts.tolist()}) == len(counts)


@pytest.mark.parametrize(("models", "resolution"), [(2, 5), (3, 6), (4, 4), (6, 2)])
def test_interpolation_is_exact_at_points_and_for_linear_functions(models, resolution):
    counts = lattice(models, resolution)
    rng = np.random.default_rng(0)
    values = rng.normal(size=len(counts))
    np.testing.assert_array_equal(interpolate(counts, values, counts / resolution), values)
    slope, shares = rng.normal(size=models), rng.dirichlet(np.ones(models), 200)
    np.testing.assert_allclose(interpolate(counts, counts / resolution @ slope, shares), shares @ slope, atol=1e-12)
    found = interpolate(counts, values, shares)
    assert (found >= values.min()).all() and (found <= values.max()).all() and found.std() > 0


def test_interpolation_needs_only_the_points_around():
    counts = lattice(3, 4)
    values = np.where((counts == 4).any(1), math.nan, 1.0)  # corners unknown
    assert interpolate(counts, values, np.array([[0.5, 0.25, 0.25]])) == [1.0]
    assert np.isnan(interpolate(counts, values, np.array([[0.9, 0.05, 0.05]]))).all()


def test_lattices_are_visited_from_coarse_to_fine():
    counts = lattice(3, 8)
    order = coarse_to_fine(counts)
    assert sorted(order) == list(range(len(counts)))
    assert {tuple(counts[i]) for i in order[:3]} == {(8, 0, 0), (0, 8, 0), (0, 0, 8)}
    assert all((counts[i] % 4 == 0).all() for i in order[: lattice_size(3, 2)])
    assert all((counts[i] % 2 == 0).all() for i in order[: lattice_size(3, 4)])


def test_every_point_equals_a_direct_evaluation(triangle):
    assert isinstance(triangle, Triangle) and triangle.complete and triangle.resolution == 6
    for point in (0, 5, 13, 27):
        score = evaluate(MODEL, mean(STATES[:3], triangle.shares[point].tolist()), DATA)
        for split in ("train", "test"):
            assert triangle.losses[split][point] == pytest.approx(score[split].loss, rel=1e-6)
            assert triangle.accuracies[split][point] == pytest.approx(score[split].accuracy)
    for i, state in enumerate(STATES[:3]):
        corner = int(np.flatnonzero(triangle.counts[:, i] == 6)[0])
        own = evaluate(MODEL, state, DATA)["test"].loss
        assert triangle.losses["test"][corner] == pytest.approx(own, rel=1e-6)
        assert triangle.own["test"]["loss"][i] == pytest.approx(own, rel=1e-6)
    soup = evaluate(MODEL, mean(STATES[:3]), DATA)["test"].loss
    assert triangle.uniform.values["test"]["loss"] == pytest.approx(soup, rel=1e-6)
    shares = [0.11, 0.25, 0.64]
    assert triangle.exact(*shares)["test"].loss == pytest.approx(
        evaluate(MODEL, mean(STATES[:3], shares), DATA)["test"].loss
    )


def test_the_best_point_is_the_lowest(triangle):
    assert triangle.best.values["test"]["loss"] == triangle.losses["test"].min()
    shares = list(triangle.best_on("train").shares.values())
    assert triangle.interpolate(shares, "loss", "train") == pytest.approx(triangle.losses["train"].min())
    assert "lowest test loss" in str(triangle) and "28 mixtures of one, two, three" in str(triangle)


def test_batch_statistics_are_estimated_at_every_point():
    model = classifier(0, SIZES, norm=True)
    states = random_states(3, model)
    for state in states:
        state["1.running_var"].abs_()
    for i, state in enumerate(states):
        state["1.running_mean"] += i
    made = loss_triangle(model, states, DATA, resolution=2)
    assert made.recalibrated
    middle = int(np.flatnonzero((made.counts == (1, 1, 0)).all(1))[0])
    renewed = recalibrate_batchnorm(model, mean(states, [0.5, 0.5, 0.0]), DATA.train[0])
    expected = evaluate(model, renewed, DATA)["test"].loss
    assert made.losses["test"][middle] == pytest.approx(expected, rel=1e-5)
    corner = int(np.flatnonzero(made.counts[:, 2] == 2)[0])
    assert abs(made.losses["test"][corner] - made.own["test"]["loss"][2]) > 1e-4


def test_an_interrupt_keeps_what_is_done_and_can_be_resumed(triangle, monkeypatch):
    plain = Evaluator.__call__

    def breaks(self, states):
        for i, score in enumerate(plain(self, states)):
            if i == 10:
                raise KeyboardInterrupt
            yield score

    monkeypatch.setattr(Evaluator, "__call__", breaks)
    with pytest.warns(UserWarning, match="interrupted: 10 of 28"):
        part = loss_triangle(MODEL, STATES[:3], DATA, resolution=6, names=("one", "two", "three"))
    monkeypatch.undo()
    assert part.done.sum() == 10 and not part.complete and "18 not evaluated" in str(part)
    with pytest.raises(InputError, match="resume: mixtures of other"):
        loss_triangle(MODEL, STATES[1:4], DATA, resolution=6, resume=part)
    part.losses["test"][np.flatnonzero(part.done)[0]] = 123.0  # taken over, not evaluated again
    whole = loss_triangle(MODEL, STATES[:3], DATA, resolution=6, names=("one", "two", "three"), resume=part)
    assert whole.complete and (whole.losses["test"] == 123.0).sum() == 1
    same = whole.losses["test"] != 123.0
    np.testing.assert_allclose(whole.losses["test"][same], triangle.losses["test"][same], rtol=1e-6)


def test_more_models_make_a_simplex_of_few_enough_points():
    made = loss_simplex(MODEL, STATES[:4], DATA.test)
    assert (
        type(made) is Simplex
        and made.resolution == 12
        and len(made.counts) == 455
        and made.names == ("A", "B", "C", "D")
    )
    half = made.interpolate([0.5, 0, 0.5, 0])
    assert half == pytest.approx(evaluate(MODEL, mean([STATES[0], STATES[2]]), DATA.test)["data"].loss, rel=1e-6)
    assert loss_simplex(MODEL, STATES[:2], DATA.test, resolution=4).counts.tolist() == [
        [4, 0],
        [3, 1],
        [2, 2],
        [1, 3],
        [0, 4],
    ]


def test_files_keep_all_but_the_models(tmp_path):
    triangle = loss_triangle(MODEL, STATES[:3], DATA, resolution=2, names=("one", "two", "three"))
    triangle.losses["test"][3] = math.nan
    triangle.save(tmp_path / "t.json")
    read = Simplex.load(tmp_path / "t.json")
    assert isinstance(read, Triangle) and read.exact is None and read.names == triangle.names
    assert read.own == triangle.own and read.uniform == triangle.uniform and (read.done == triangle.done).all()
    np.testing.assert_array_equal(read.counts, triangle.counts)
    for split in ("train", "test"):
        np.testing.assert_array_equal(read.losses[split], triangle.losses[split])
    assert read.gaps == {"loss": 1, "accuracy": 0} and "1 where loss is NaN" in str(read)
    (tmp_path / "u.json").write_text(json.dumps({"format": "other"}))
    for name in ("u.json", "t2.json"):
        (tmp_path / "t2.json").write_text("[]")
        with pytest.raises(DataError):
            Simplex.load(tmp_path / name)


def test_frames_and_figures(triangle):
    frame = triangle.to_frame()
    assert list(frame.columns) == ["share of one", "share of two", "share of three", "split", "loss", "accuracy"]
    assert len(frame) == 56 and np.allclose(frame.iloc[:, :3].sum(axis=1), 1.0)
    figure = triangle.plot()
    contour = next(trace for trace in figure.data if trace.type == "contour")
    assert np.nanmin(contour.customdata) == pytest.approx(np.nanmin(triangle.losses["test"]), rel=0.05)
    assert {"uniform soup", "lowest loss"} <= {trace.name for trace in figure.data}
    more = loss_simplex(MODEL, STATES[:4], DATA, resolution=2)
    heat = next(trace for trace in more.plot("train").data if trace.type == "heatmap")
    assert heat.text[0][2] == pytest.approx(evaluate(MODEL, mean([STATES[0], STATES[2]]), DATA)["train"].loss, rel=1e-6)
    with pytest.raises(InputError, match="split='valid'"):
        more.plot("valid")


def test_unusable_arguments_are_named():
    spoiled = {k: v * math.nan for k, v in STATES[0].items()}
    cases = [
        (InputError, "expected three networks, got 2", lambda: loss_triangle(MODEL, STATES[:2], DATA)),
        (InputError, "resolution=1", lambda: loss_triangle(MODEL, STATES[:3], DATA, resolution=1)),
        (InputError, "3 different names", lambda: loss_triangle(MODEL, STATES[:3], DATA, names=("A", "A", "B"))),
        (InputError, "at least two", lambda: loss_simplex(MODEL, STATES[:1], DATA)),
        (WeightsError, "C", lambda: loss_triangle(MODEL, [*STATES[:2], spoiled], DATA, resolution=2)),
        (MismatchError, "0.weight", lambda: loss_triangle(MODEL, [*STATES[:2], {}], DATA, resolution=2)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_shares_that_are_no_mixture_are_refused(triangle):
    for shares in ([0.5, 0.5], [0.5, 0.5, 0.5], [math.nan, 0.5, 0.5]):
        with pytest.raises(InputError, match="shares"):
            triangle.exact(*shares)
        with pytest.raises(InputError, match="shares"):
            triangle.interpolate(shares)
    with pytest.raises(InputError, match="at least 0"):
        triangle.interpolate([1.5, -0.5, 0.0])
    for options in ({"split": "other"}, {"measure": "other"}):
        with pytest.raises(InputError, match="other"):
            triangle.interpolate([0.5, 0.5, 0.0], **options)


def test_nothing_of_the_callers_is_touched():
    model = classifier(0, SIZES).train()
    before = [{k: v.clone() for k, v in state.items()} for state in (model.state_dict(), *STATES[:3])]
    random = torch.get_rng_state()
    lmc.loss_triangle(model, STATES[:3], DATA, resolution=2)
    assert model.training and torch.equal(random, torch.get_rng_state())
    for old, new in zip(before, (model.state_dict(), *STATES[:3]), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)
