"""Planes: their geometry, points that equal direct evaluations, gaps, and planes that break off."""

import itertools
import math

import numpy as np
import pytest
import torch
from support import classifier, splits, trained
from torch import nn

from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.landscape.evaluation.evaluator import evaluate
from lmc.landscape.planes.plane import loss_plane, random_plane
from lmc.landscape.planes.plane_result import Plane
from lmc.landscape.planes.span import Frame, PlaneSpan, ThroughThree, axis, coarse_to_fine, filter_normalised
from lmc.network.batchnorm import recalibrate_batchnorm
from lmc.weights import distance, mean

DATA = splits(90, 60, classes=3, dims=6, spread=0.7)
SIZES = (6, 8, 3)


@pytest.fixture(scope="module")
def three():
    return tuple(trained(classifier(seed, SIZES), DATA.train).state_dict() for seed in (1, 2, 3))


@pytest.fixture(scope="module")
def plane(three):
    return loss_plane(classifier(0, SIZES), three, DATA, resolution=9)


def node(plane, name):
    """Row and column of a model."""
    x, y = plane.places[name]
    return int(np.flatnonzero(plane.y == y)[0]), int(np.flatnonzero(plane.x == x)[0])


# ---- geometry


def test_the_triangle_keeps_all_distances(three):
    triangle = ThroughThree.of(three, "ABC", three[0])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        flat = math.dist(triangle.places[i], triangle.places[j])
        assert flat == pytest.approx(distance(three[i], three[j]), rel=1e-9)
    assert triangle.places[0] == (0.0, 0.0) and triangle.places[2][1] == 0.0 and triangle.height > 0


def shares_in(triangle, x, y):
    """What the first, second and third model have in the point (x, y)."""
    third, second = Frame(PlaneSpan({}, [{}, {}]), [], triangle.units).inside(x, y)
    return 1.0 - second - third, second, third


def test_shares_are_exact_at_the_models_and_sum_to_one(three):
    triangle = ThroughThree.of(three, "ABC", three[0])
    assert [shares_in(triangle, *place) for place in triangle.places] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    for x, y in ((-3.0, 1.5), (2.0, -0.7)):
        shares = shares_in(triangle, x, y)
        assert sum(shares) == pytest.approx(1.0)
        places = np.array(triangle.places)
        np.testing.assert_allclose(shares @ places, (x, y), atol=1e-12)  # the point is the mixture of the places


def test_points_of_the_plane_are_as_far_apart_as_they_are_drawn(three):
    triangle = ThroughThree.of(three, "ABC", three[0])
    p, q = (-0.3, 0.9), (1.7, 2.2)
    states = [mean(three, shares_in(triangle, *point)) for point in (p, q)]
    assert distance(*states) == pytest.approx(math.dist(p, q), rel=1e-5)


def test_axes_pass_through_the_places():
    points = axis(-0.2, 1.2, 9, [0.0, 1.0, 0.01])
    assert len(points) == 9 and {0.0, 0.01, 1.0} <= set(points) and (np.diff(points) > 0).all()
    assert points[0] == -0.2 and points[-1] == 1.2
    assert axis(0.0, 1.0, 5, [0.0, 1.0]).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_the_order_visits_everything_once_and_coarse_meshes_first():
    order = coarse_to_fine(9, 12)
    assert sorted(order) == list(range(108))
    coarse = {row * 12 + column for row in (0, 4, 8) for column in (0, 4, 8)}
    assert set(order[: len(coarse)]) == coarse


@pytest.mark.parametrize("share", [0.5, 0.0, 1.0, -2.0, 7.0])
def test_collinear_models_are_refused_by_name(three, share):
    between = mean([three[0], three[2]], [1 - share, share])
    with pytest.raises(InputError, match="collinear"):
        loss_plane(classifier(0, SIZES), (three[0], between, three[2]), DATA)


def test_models_that_coincide_are_refused(three):
    with pytest.raises(InputError, match="left, middle, right are collinear .left and right are the same"):
        loss_plane(classifier(0, SIZES), (three[0], three[1], three[0]), DATA, names=("left", "middle", "right"))


# ---- the plane through three models


def test_the_models_score_what_a_direct_evaluation_gives(plane, three):
    for i, (name, state) in enumerate(zip("ABC", three, strict=True)):
        for split, score in evaluate(classifier(0, SIZES), state, DATA).items():
            assert plane.losses[split][node(plane, name)] == pytest.approx(score.loss, rel=1e-6)
            assert plane.accuracies[split][node(plane, name)] == score.accuracy
            assert plane.own[split]["loss"][i] == plane.losses[split][node(plane, name)]


def test_corners_of_the_grid_equal_a_direct_evaluation(plane, three):
    """Each corner by its definition, origin + x u + y v with orthonormal u and v, in float64."""
    w0, w1, w2 = (torch.cat([t.flatten().double() for t in state.values()]) for state in three)
    u = (w2 - w0) / (w2 - w0).norm()
    v = (w1 - w0) - (w1 - w0) @ u * u
    v /= v.norm()
    for row in (0, -1):
        for column in (0, -1):
            flat, state = (w0 + plane.x[column] * u + plane.y[row] * v).float(), {}
            for name, tensor in three[0].items():
                state[name], flat = flat[: tensor.numel()].reshape(tensor.shape), flat[tensor.numel() :]
            score = evaluate(classifier(0, SIZES), state, DATA)["test"]
            assert plane.losses["test"][row, column] == pytest.approx(score.loss, rel=1e-4)
            assert plane.accuracies["test"][row, column] == pytest.approx(score.accuracy, abs=1 / 60)


def test_a_mirrored_order_gives_the_mirrored_plane(plane, three):
    mirrored = loss_plane(classifier(0, SIZES), three[::-1], DATA, resolution=9, names=("C", "B", "A"))
    assert mirrored.places["B"][1] == pytest.approx(plane.places["B"][1])
    assert mirrored.places["B"][0] == pytest.approx(plane.places["C"][0] - plane.places["B"][0])
    np.testing.assert_allclose(mirrored.losses["test"][:, ::-1], plane.losses["test"], rtol=1e-3)


def test_margin_zero_ends_at_the_models(three):
    plane = loss_plane(classifier(0, SIZES), three, DATA.test, resolution=5, margin=0.0)
    assert (plane.y[0], plane.y[-1]) == (0.0, plane.places["B"][1]) and plane.split == "data"


def test_nothing_of_the_callers_changes(three):
    model = classifier(0, SIZES).train()
    before = [{name: t.clone() for name, t in state.items()} for state in (model.state_dict(), *three)]
    random = torch.get_rng_state()
    loss_plane(model, three, DATA, resolution=5)
    random_plane(model, None, DATA, resolution=5)
    assert model.training and torch.equal(random, torch.get_rng_state())
    for kept, state in zip(before, (model.state_dict(), *three), strict=True):
        assert all(torch.equal(t, kept[name]) for name, t in state.items())


def test_statistics_are_estimated_anew_at_every_point():
    models = [trained(classifier(seed, SIZES, norm=True), DATA.train) for seed in (1, 2, 3)]
    plane = loss_plane(classifier(0, SIZES, norm=True), models, DATA, resolution=5)
    assert plane.recalibrated and "re-estimated" in str(plane)
    fresh = recalibrate_batchnorm(models[1], None, DATA.train[0])
    at_b = evaluate(models[1], fresh, DATA)["test"].loss
    assert plane.losses["test"][node(plane, "B")] == pytest.approx(at_b, rel=1e-5)
    assert plane.own["test"]["loss"][1] == pytest.approx(evaluate(models[1], None, DATA)["test"].loss, rel=1e-5)
    with pytest.warns(UserWarning, match="batch normalisation"):
        stale = loss_plane(classifier(0, SIZES, norm=True), models, DATA, resolution=5, repair=None)
    assert not np.allclose(stale.losses["test"], plane.losses["test"], rtol=1e-3)


# ---- random planes


def test_filters_of_a_direction_are_as_long_as_those_of_the_network(three):
    direction = filter_normalised(three[0], three[0], torch.Generator().manual_seed(0))
    assert direction.keys() == {"0.weight", "2.weight"}  # biases stay
    for name, tensor in direction.items():
        torch.testing.assert_close(tensor.norm(dim=1), three[0][name].norm(dim=1))


def test_the_middle_of_a_random_plane_is_the_network(three):
    plane = random_plane(classifier(0, SIZES), three[0], DATA, resolution=5, seed=3)
    score = evaluate(classifier(0, SIZES), three[0], DATA)["test"]
    assert plane.losses["test"][2, 2] == pytest.approx(score.loss, rel=1e-6) and plane.places == {"A": (0.0, 0.0)}
    again = random_plane(classifier(0, SIZES), three[0], DATA, resolution=5, seed=3)
    other = random_plane(classifier(0, SIZES), three[0], DATA, resolution=5, seed=4)
    np.testing.assert_array_equal(plane.losses["test"], again.losses["test"])
    assert not np.allclose(plane.losses["test"], other.losses["test"])


def test_filters_before_batch_normalisation_may_have_any_scale():
    """Li et al.: with filters normalised, a network and its rescaled twin have the same surface."""
    model = trained(classifier(1, SIZES, norm=True), DATA.train)
    model[1].eps = 1e-12
    twin = {name: t.clone() for name, t in model.state_dict().items()}
    scale = torch.linspace(0.5, 4.0, 8)
    twin["0.weight"] *= scale[:, None]
    twin["0.bias"] *= scale
    one, two = (random_plane(model, weights, DATA, resolution=5) for weights in (None, twin))
    np.testing.assert_allclose(one.losses["test"], two.losses["test"], rtol=1e-3)


# ---- gaps, interrupts, files


def test_a_metric_that_is_nan_somewhere_leaves_counted_gaps(three):
    def spread(outputs, targets):
        value = outputs.std()
        return value if value < 6.0 else torch.tensor(math.nan)

    plane = loss_plane(classifier(0, SIZES), three, DATA.test, resolution=7, margin=1.0, metrics={"spread": spread})
    gaps = int(np.isnan(plane.values["data"]["spread"]).sum())
    assert 0 < gaps < 49 and plane.gaps == {"loss": 0, "accuracy": 0, "spread": gaps}
    assert plane.complete and f"{gaps} where spread is NaN" in str(plane)


def test_gaps_of_the_loss_are_not_drawn(three):
    def picky(outputs, targets):
        loss = nn.functional.cross_entropy(outputs, targets)
        return loss if loss < 2.0 else torch.tensor(math.nan)

    plane = loss_plane(classifier(0, SIZES), three, DATA.test, resolution=7, margin=1.0, loss=picky)
    drawn = plane.plot().data[0]
    assert plane.gaps["loss"] > 0 and np.isnan(np.array(drawn.z, dtype=float)).sum() == plane.gaps["loss"]


class Stopping(nn.Module):
    """A network whose user presses Stop at a certain forward pass."""

    def __init__(self, seed, limit=-1):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(seed))
        self.left = iter(range(limit - 1)) if limit > 0 else itertools.count()

    def forward(self, x):
        if next(self.left, None) is None:
            raise KeyboardInterrupt
        return self.linear(x)


def test_an_interrupt_keeps_what_is_done_and_the_plane_is_resumed(monkeypatch):
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MOST_AT_ONCE", 1)
    models = [Stopping(seed).state_dict() for seed in (1, 2, 3)]
    with pytest.warns(UserWarning, match="interrupted: .* of 22 points"):
        part = loss_plane(Stopping(0, 16), models, DATA.test, resolution=5)
    assert not part.complete and 5 < part.done.sum() < 25 and "not evaluated" in str(part)
    assert (np.isnan(part.losses["data"]) == ~part.done).all() and part.gaps["loss"] == 0
    assert part.done[0, 0] and part.done[4, 4]  # the widest mesh comes first
    assert len(part.plot().data) == 4
    calls = Stopping(0)
    whole = loss_plane(calls, models, DATA.test, resolution=5, resume=part)
    straight = loss_plane(Stopping(0), models, DATA.test, resolution=5)
    np.testing.assert_array_equal(whole.losses["data"], straight.losses["data"])
    assert whole.complete and not part.complete
    with pytest.raises(InputError, match="resume"):
        loss_plane(Stopping(0), models[::-1], DATA.test, resolution=5, resume=part)


def test_resuming_evaluates_only_what_is_missing(plane, three):
    marked = Plane(
        **{**vars(plane), "values": {s: {m: v.copy() for m, v in ms.items()} for s, ms in plane.values.items()}}
    )
    marked.values["test"]["loss"][0, 0] = 77.0
    again = loss_plane(classifier(0, SIZES), three, DATA, resolution=9, resume=marked)
    assert again.losses["test"][0, 0] == 77.0


def test_a_saved_plane_comes_back(plane, tmp_path):
    plane.save(tmp_path / "plane.json")
    again = Plane.load(tmp_path / "plane.json")
    assert str(again) == str(plane) and again.places == plane.places and again.own == plane.own
    for split, measures in plane.values.items():
        for measure, values in measures.items():
            np.testing.assert_array_equal(again.values[split][measure], values)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match="other.json"):
        Plane.load(tmp_path / "other.json")


def test_to_frame_has_a_row_for_each_point_and_split(plane):
    frame = plane.to_frame()
    assert list(frame.columns) == ["x", "y", "split", "loss", "accuracy"] and len(frame) == 2 * 81
    x, y = plane.places["B"]
    row = frame[(frame.x == x) & (frame.y == y) & (frame.split == "test")]
    assert row.loss.item() == plane.own["test"]["loss"][1]


def test_the_plot_shows_losses_and_the_models_in_their_places(plane):
    fig = plane.plot()
    contours = [trace for trace in fig.data if trace.type == "contour"]
    np.testing.assert_allclose(10 ** np.array(contours[0].z, dtype=float), plane.losses["test"])
    np.testing.assert_allclose(contours[1].z, 100 * plane.accuracies["test"])
    models = next(trace for trace in fig.data if trace.type == "scatter")
    assert list(zip(models.x, models.y, strict=True)) == list(plane.places.values())
    assert [note.text for note in fig.layout.annotations if note.text.startswith("<b>")] == [
        "<b>A</b>",
        "<b>B</b>",
        "<b>C</b>",
    ] * 2
    with pytest.raises(InputError, match="split='validation'"):
        plane.plot("validation")


def test_the_cost_of_a_long_plane_is_told(three, monkeypatch, capsys):
    monkeypatch.setattr("lmc.core.progress.LONG", 0.0)
    monkeypatch.delenv("TQDM_DISABLE")
    loss_plane(classifier(0, SIZES), three, DATA, resolution=5)
    assert "plane: 22 points to evaluate: about" in capsys.readouterr().err
    loss_plane(classifier(0, SIZES), three, DATA, resolution=5, progress=False)
    assert "points to evaluate" not in capsys.readouterr().err


# ---- bad input


def test_mismatched_networks_are_named(three):
    with pytest.raises(DataError, match="float32, the weights torch.float64"):  # the widest dtype is taken
        loss_plane(classifier(0, SIZES), (three[0], classifier(0, SIZES).double(), three[2]), DATA)
    with pytest.raises(WeightsError, match="0.bias of C"):
        loss_plane(classifier(0, SIZES), (*three[:2], three[2] | {"0.bias": torch.full((8,), math.nan)}), DATA)
    with pytest.raises(MismatchError, match="in model"):
        loss_plane(nn.Linear(6, 3), three, DATA)


@pytest.mark.parametrize(
    "options",
    [{"resolution": 4}, {"resolution": 9.5}, {"margin": -0.1}, {"margin": math.nan}, {"names": "AB"}, {"names": "AAB"}]
    + [{"repair": "yes"}],
)
def test_unusable_arguments_are_refused(three, options):
    with pytest.raises(InputError, match=next(iter(options))):
        loss_plane(classifier(0, SIZES), three, DATA, **options)


@pytest.mark.parametrize("options", [{"resolution": 6}, {"radius": 0.0}, {"radius": math.inf}])
def test_unusable_arguments_of_random_planes_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        random_plane(classifier(0, SIZES), None, DATA, **options)


def test_two_models_make_no_plane(three):
    with pytest.raises(InputError, match="three networks, got 2"):
        loss_plane(classifier(0, SIZES), three[:2], DATA)
