"""Paths and barriers: the identities a barrier obeys, planted truths, and paths that break off."""

import itertools
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import lmc
from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.landscape import Path, barrier, evaluate, loss_path


def mlp(seed, width=24):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def blobs(count=200, seed=0):
    """Four Gaussian classes in 16 dimensions."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(99))
    targets = torch.arange(count) % 4
    return centres[targets] + 0.6 * torch.randn(count, 16, generator=random), targets


DATA = SimpleNamespace(train=blobs(200, 0), test=blobs(120, 1))


def trained(model, steps=120):
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(DATA.train[0]), DATA.train[1]).backward()
        optimiser.step()
    return model


@pytest.fixture(scope="module")
def pair():
    return trained(mlp(1)), trained(mlp(2))


def permuted(model, seed=0):
    """The same function with the units of both hidden layers in another order."""
    random = torch.Generator().manual_seed(seed)
    p, q = (torch.randperm(24, generator=random) for _ in range(2))
    state = model.state_dict()
    moved = {"0.weight": state["0.weight"][p], "0.bias": state["0.bias"][p]}
    moved |= {"2.weight": state["2.weight"][q][:, p], "2.bias": state["2.bias"][q]}
    return moved | {"4.weight": state["4.weight"][:, q], "4.bias": state["4.bias"]}


# ---- barriers of given curves


def test_a_parabola_has_barrier_one_quarter():
    grid = np.linspace(0, 1, 25)
    found = barrier(grid, grid * (1 - grid))
    assert (found.value, found.alpha, found.midpoint, found.start, found.end) == (0.25, 0.5, 0.25, 0.0, 0.0)


def test_baselines_differ_by_the_slope():
    grid = np.linspace(0, 1, 25)
    line = 1.0 + 2.0 * grid
    assert barrier(grid, line).value == pytest.approx(0.0, abs=1e-12)
    assert barrier(grid, line, baseline="mean").value == pytest.approx(
        1.0
    )  # half the difference of the ends, on a straight line
    bumped = line + grid * (1 - grid)
    assert barrier(grid, bumped, baseline="mean").value >= barrier(grid, bumped).value - 1.0


def test_a_valley_has_no_barrier():
    grid = np.linspace(0, 1, 25)
    assert barrier(grid, -grid * (1 - grid)).value == 0.0


def test_barrier_passes_over_gaps_and_what_lies_outside():
    grid = np.array([-0.5, 0.0, 0.25, 0.5, 1.0, 1.5])
    found = barrier(grid, [9.0, 0.0, math.nan, 1.0, 0.0, 9.0])
    assert (found.value, found.alpha) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("alphas", "values", "baseline"),
    [
        ([0, 1], [1, 2, 3], "linear"),
        ([0, 0.5], [1, 2], "linear"),
        ([0, 1], [1, math.nan], "linear"),
        ([0, 0.5, 1], [1, 2, math.inf], "linear"),
        ([0, 1], [1, 2], "x"),
    ],
)
def test_no_barrier_without_both_ends(alphas, values, baseline):
    with pytest.raises(InputError):
        barrier(alphas, values, baseline=baseline)


# ---- paths


def test_a_path_between_networks_without_a_loss_prints_and_says_why_there_is_no_barrier(pair):
    path = loss_path(*pair[:1], *pair, DATA.test, alphas=3, loss=lambda outputs, targets: outputs.sum() * math.nan)
    assert "loss nan to nan, no barrier" in str(path)
    with pytest.raises(InputError, match="no barrier between ends of .nan, nan."):
        _ = path.barrier


def test_a_network_and_itself_have_no_barrier(pair):
    path = loss_path(mlp(0), pair[0], pair[0], DATA)
    assert path.barrier == pytest.approx(0.0, abs=1e-6) and path.error_barrier == 0.0
    assert np.ptp(path.losses["test"]) < 1e-6


def test_the_ends_are_the_given_networks(pair):
    path = loss_path(mlp(0), *pair, DATA)
    assert len(path.alphas) == 25 and {0.0, 0.5, 1.0} <= set(path.alphas)
    for end, model in zip((0, -1), pair, strict=True):
        for split, score in evaluate(model, None, DATA).items():
            assert path.losses[split][end] == pytest.approx(score.loss, rel=1e-5)
            assert path.accuracies[split][end] == score.accuracy
    assert path.own["test"]["loss"] == pytest.approx((path.losses["test"][0], path.losses["test"][-1]))


def test_every_point_is_the_interpolated_network(pair):
    path = loss_path(mlp(0), *pair, DATA, alphas=[0.3])
    a, b = (model.state_dict() for model in pair)
    between = {name: 0.7 * a[name] + 0.3 * b[name] for name in a}
    assert path.alphas.tolist() == [0.0, 0.3, 1.0]
    assert path.losses["train"][1] == pytest.approx(evaluate(mlp(0), between, DATA)["train"].loss, rel=1e-5)


def test_the_way_back_mirrors_the_way_there(pair):
    there, back = loss_path(mlp(0), *pair, DATA), loss_path(mlp(0), *pair[::-1], DATA)
    np.testing.assert_allclose(there.losses["test"], back.losses["test"][::-1], rtol=1e-4)
    assert there.barrier == pytest.approx(back.barrier, rel=1e-4)


def test_a_convex_loss_has_no_barrier():
    a, b = trained(nn.Linear(16, 4)), trained(nn.Linear(16, 4), steps=10)
    path = loss_path(nn.Linear(16, 4), a, b, DATA)
    assert path.barrier == pytest.approx(0.0, abs=1e-6)


def test_a_permuted_copy_is_apart_until_it_is_permuted_back(pair):
    apart = loss_path(mlp(0), pair[0], permuted(pair[0]), DATA)
    np.testing.assert_allclose(apart.losses["test"][0], apart.losses["test"][-1], rtol=1e-4)
    assert apart.barrier > 0.05
    assert apart.barrier_of("loss").value == apart.barrier


def test_error_is_counted_in_percentage_points(pair):
    path = loss_path(mlp(0), pair[0], permuted(pair[0]), DATA)
    error = 100 * (1 - path.accuracies["test"])
    line = (1 - path.alphas) * error[0] + path.alphas * error[-1]
    assert path.error_barrier == pytest.approx((error - line).max()) and path.error_barrier > 0


def test_barriers_lists_both_baselines_of_both_splits(pair):
    table = loss_path(mlp(0), *pair, DATA).barriers()
    assert list(table.columns) == ["barrier", "alpha", "midpoint", "start", "end"]
    assert len(table) == 2 * 2 * 2 and (table.xs("linear", level="baseline")["barrier"] >= 0).all()


def test_single_sets_and_regression(pair):
    path = loss_path(mlp(0), *pair, DATA.train, alphas=5)
    assert list(path.losses) == ["data"] and path.split == "data"
    inputs = torch.randn(30, 16)
    path = loss_path(
        nn.Linear(16, 1), nn.Linear(16, 1), nn.Linear(16, 1), (inputs, inputs[:, :1]), alphas=5, loss=nn.MSELoss()
    )
    assert math.isnan(path.error_barrier) and path.predictions is None and path.barrier == pytest.approx(0, abs=1e-6)
    assert "error" not in str(path)


def test_confusion_and_predictions_belong_to_the_points(pair):
    path = loss_path(mlp(0), pair[0], permuted(pair[0]), DATA, alphas=5)
    shown = path.predictions
    assert shown is not None and shown.split == "test"
    right = np.array([np.trace(table) for table in shown.confusion]) / 120
    np.testing.assert_allclose(right, path.accuracies["test"], atol=1e-9)
    assert (shown.confusion.sum((1, 2)) == 120).all()
    wrong = (shown.predicted != shown.targets).sum(1)
    np.testing.assert_array_equal(wrong, 120 - 120 * right.round(9))  # all examples are few enough to be kept
    assert shown.images is not None and shown.images.shape == (120, 4, 4)


def test_nothing_of_the_callers_changes(pair):
    model = mlp(0).train()
    before = [{name: t.clone() for name, t in m.state_dict().items()} for m in (model, *pair)]
    random = torch.get_rng_state()
    loss_path(model, *pair, DATA)
    assert model.training and torch.equal(random, torch.get_rng_state())
    for kept, m in zip(before, (model, *pair), strict=True):
        assert all(torch.equal(t, kept[name]) for name, t in m.state_dict().items())


# ---- batch normalisation


def normalised(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return trained(nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4)))


def test_statistics_are_estimated_anew_at_every_point():
    a, b = normalised(1), normalised(2)
    path = loss_path(a, a, b, DATA)
    assert path.recalibrated
    with pytest.warns(UserWarning, match="batch normalisation"):
        stale = loss_path(a, a, b, DATA, repair=None)
    assert not stale.recalibrated
    assert path.barrier < stale.barrier
    # The ends of the curve are re-estimated too; what the networks score by themselves is kept beside it.
    assert path.own["test"]["loss"][0] == pytest.approx(evaluate(a, None, DATA)["test"].loss, rel=1e-5)
    assert path.losses["test"][0] == pytest.approx(path.own["test"]["loss"][0], abs=0.05)
    assert stale.losses["test"][0] == pytest.approx(path.own["test"]["loss"][0], rel=1e-5)


def test_a_last_batch_of_one_example_is_left_out_of_the_statistics():
    a, b = normalised(1), normalised(2)
    inputs, targets = DATA.train[0][:65], DATA.train[1][:65]
    batches = [(inputs[:64], targets[:64]), (inputs[64:], targets[64:])]
    path = loss_path(a, a, b, batches, alphas=3)
    named = loss_path(a, a, b, (inputs, targets), alphas=3, inputs=inputs[:64])
    assert path.losses["data"] == pytest.approx(named.losses["data"], rel=1e-5)


def test_statistics_come_from_the_inputs_that_are_named():
    a, b = normalised(1), normalised(2)
    other = loss_path(a, a, b, DATA, alphas=3, inputs=5.0 * DATA.train[0])
    assert other.losses["test"][1] != pytest.approx(loss_path(a, a, b, DATA, alphas=3).losses["test"][1], rel=1e-3)


def test_no_warning_without_batch_normalisation(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_path(mlp(0), *pair, DATA, alphas=3, repair=None)


# ---- REPAIR along the path


@pytest.mark.parametrize(("repair", "method"), [("repair", "passes"), ("closed_form", "closed_form")])
def test_a_repaired_path_is_the_repaired_average_at_every_point_and_ends_at_the_networks(pair, repair, method):
    path = loss_path(mlp(0), *pair, DATA, alphas=5, repair=repair, inputs=DATA.train[0])
    plain = loss_path(mlp(0), *pair, DATA, alphas=5)
    for k, alpha in enumerate(path.alphas):
        point = lmc.repair(mlp(0), pair, DATA.train[0], (1 - alpha, alpha), method=method, progress=False)
        assert path.losses["test"][k] == pytest.approx(evaluate(mlp(0), point, DATA)["test"].loss, rel=1e-5)
    assert path.losses["test"][[0, -1]].tolist() == plain.losses["test"][[0, -1]].tolist()
    assert path.barrier < plain.barrier and path.repaired == repair and plain.repaired is None
    assert f"repaired between the ends ({repair!r})" in str(path)


def test_repair_leaves_the_ends_of_a_normalised_network_alone_and_mends_the_middle():
    a, b = normalised(1), normalised(2)
    found, auto = (loss_path(a, a, b, DATA, alphas=3, repair=how) for how in ("repair", "auto"))
    assert found.losses["test"][[0, 2]] == pytest.approx(auto.own["test"]["loss"], rel=1e-5)
    assert found.own["test"]["loss"] == pytest.approx(auto.own["test"]["loss"], rel=1e-5)
    with pytest.warns(UserWarning, match="batch normalisation"):
        stale = loss_path(a, a, b, DATA, alphas=3, repair=None)
    assert found.losses["test"][1] < stale.losses["test"][1]


def test_repairing_the_way_between_equal_networks_changes_nothing(pair):
    path = loss_path(mlp(0), pair[0], pair[0], DATA, alphas=5, repair="repair")
    assert np.ptp(path.losses["test"]) < 1e-4


def test_positional_inputs_reach_a_network_of_optional_arguments_whole():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(3)

        def forward(self, x, scale=None):
            return self.net(x if scale is None else x * scale)

    inputs, targets = DATA.train
    data = ((inputs, torch.full((len(inputs), 1), 3.0)), targets)
    models = [{f"net.{k}": v for k, v in mlp(seed).state_dict().items()} for seed in (1, 2)]
    path = loss_path(Scaled(), *models, data, alphas=3, repair="repair")
    tripled = loss_path(mlp(0), mlp(1), mlp(2), (3.0 * inputs, targets), alphas=3, repair="repair")
    assert path.losses["data"] == pytest.approx(tripled.losses["data"], rel=1e-4)


# ---- paths that break off


class Stopping(nn.Module):
    """A network whose user presses Stop at a certain forward pass."""

    def __init__(self, limit):
        super().__init__()
        self.linear = nn.Linear(16, 4)
        self.left = iter(range(limit - 1)) if limit > 0 else itertools.count()

    def forward(self, x):
        if next(self.left, None) is None:
            raise KeyboardInterrupt
        return self.linear(x)


def test_an_interrupt_keeps_the_points_that_are_done(monkeypatch):
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MOST_AT_ONCE", 1)
    model = Stopping(14)
    with pytest.warns(UserWarning, match="interrupted: .* of 25 points"):
        path = loss_path(model, nn.Module.state_dict(model), model.state_dict(), DATA.test)
    done = ~np.isnan(path.losses["data"])
    assert not path.complete and 3 <= done.sum() < 25
    assert done[[0, 12, 24]].all()  # coarse to fine: both ends and the middle come first
    assert path.barrier == pytest.approx(0, abs=1e-6)
    assert "not evaluated" in str(path) and len(path.plot().data) and path.explore() is not None


def test_an_interrupt_before_both_ends_is_passed_on(monkeypatch):
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MOST_AT_ONCE", 1)
    model = Stopping(4)
    with pytest.raises(KeyboardInterrupt):
        loss_path(model, model, model, DATA.test)


def test_a_saved_path_comes_back(pair, tmp_path):
    path = loss_path(mlp(0), pair[0], permuted(pair[0]), DATA, alphas=5, repair="repair")
    path.values["test"]["loss"][1] = math.nan
    path.save(tmp_path / "path.json")
    again = Path.load(tmp_path / "path.json")
    assert str(again) == str(path) and again.own == path.own and again.repaired == "repair"
    for split, measures in path.values.items():
        for measure, values in measures.items():
            np.testing.assert_array_equal(again.values[split][measure], values)
    np.testing.assert_array_equal(again.predictions.images, path.predictions.images)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="other.json"):
        Path.load(tmp_path / "other.json")


def test_to_frame_has_a_row_for_each_point_and_split(pair):
    frame = loss_path(mlp(0), *pair, DATA, alphas=5).to_frame()
    assert list(frame.columns) == ["alpha", "split", "loss", "accuracy"] and len(frame) == 10


# ---- bad input


def test_mismatched_networks_are_named(pair):
    with pytest.raises(MismatchError, match="0.weight: shape"):
        loss_path(mlp(0), pair[0], mlp(0, width=8), DATA)
    with pytest.raises(DataError, match="float32, the weights torch.float64"):  # the widest dtype is taken
        loss_path(mlp(0), pair[0], mlp(0).double(), DATA)
    with pytest.raises(MismatchError, match="in model"):
        loss_path(mlp(0, width=8), *pair, DATA)
    with pytest.raises(WeightsError, match="0.bias of b"):
        loss_path(mlp(0), pair[0], pair[0].state_dict() | {"0.bias": torch.full((24,), math.inf)}, DATA)


@pytest.mark.parametrize("alphas", [1, 2, 24, 0, -3, [], [0.5, math.nan], [[0.0, 1.0]]])
def test_unusable_points_are_refused(pair, alphas):
    with pytest.raises(InputError, match="alphas"):
        loss_path(mlp(0), *pair, DATA, alphas=alphas)


def test_unusable_repair_is_refused(pair):
    with pytest.raises(InputError, match="repair='yes'"):
        loss_path(mlp(0), *pair, DATA, repair="yes")
