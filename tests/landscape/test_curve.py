"""Curves: their ends and shape, training that lowers the loss between two networks, and curves that break off."""

import functools
import math

import numpy as np
import pytest
import torch
from support import classifier, same, splits, trained
from torch import nn

from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.landscape.curves.curve import bezier_curve, polygonal_chain
from lmc.landscape.curves.geodesic import geodesic_path
from lmc.landscape.curves.low_loss import low_loss_path
from lmc.landscape.evaluation.evaluator import evaluate
from lmc.landscape.path import Path, loss_path
from lmc.weights import distance, lerp

DATA = splits(160, 80)
network = functools.partial(classifier, dropout=0.0)


@pytest.fixture(scope="module")
def pair():
    """Two networks of one function whose units are mirrored: an average of them is far from either."""
    a = trained(network(1), DATA.train, 60).state_dict()
    b = {"0.weight": a["0.weight"].flip(0), "0.bias": a["0.bias"].flip(0), "3.weight": a["3.weight"].flip(1)}
    return a, b | {"3.bias": a["3.bias"]}


@pytest.fixture(scope="module")
def curve(pair):
    return bezier_curve(network(0), *pair, DATA, epochs=25, lr=1e-2, batch_size=32)


# ---- shape


@pytest.mark.parametrize("make", [bezier_curve, polygonal_chain])
@pytest.mark.parametrize("bends", [1, 2, 3])
def test_ends_are_the_networks_bit_by_bit(pair, make, bends):
    curve = make(network(0), *pair, DATA, bends=bends, epochs=1, lr=0.1)
    assert same(curve.at(0.0), pair[0]) and same(curve.at(1.0), pair[1])
    assert len(curve.controls) == bends + 2
    for t in (0.0, 0.13, 0.5, 0.99, 1.0):
        assert sum(curve.shares(t)) == pytest.approx(1.0, abs=1e-12) and min(curve.shares(t)) >= 0


def test_ends_keep_their_counters():
    a, b = trained(network(1, norm=True), DATA.train, 60), network(2, norm=True)
    curve = bezier_curve(a, a, b, DATA, epochs=1)
    assert same(curve.at(0.0), a.state_dict()) and same(curve.at(1.0), b.state_dict())
    assert curve.at(1.0)["1.num_batches_tracked"] == 0


@pytest.mark.parametrize("make", [bezier_curve, polygonal_chain])
@pytest.mark.parametrize("bends", [1, 2])
def test_untrained_curves_are_straight(pair, make, bends):
    curve = make(network(0), *pair, DATA, bends=bends, epochs=0)
    for t in (0.2, 0.5, 0.7):
        for name, tensor in lerp(*pair, t).items():
            torch.testing.assert_close(curve.at(t)[name], tensor)


def test_a_chain_passes_through_its_bends_and_a_bezier_curve_does_not(pair):
    chain = polygonal_chain(network(0), *pair, DATA, bends=3, epochs=2, lr=0.05)
    for j in range(5):
        assert same(chain.at(j / 4), chain.controls[j])
    bezier = bezier_curve(network(0), *pair, DATA, epochs=2, lr=0.05)
    w0, w1, w2 = bezier.controls
    for name, tensor in bezier.at(0.5).items():
        torch.testing.assert_close(tensor, 0.25 * w0[name] + 0.5 * w1[name] + 0.25 * w2[name])
    assert distance(bezier.at(0.5), w1) > 0.1


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_points_beyond_the_ends_are_refused(curve, t):
    with pytest.raises(InputError, match="expected a number from 0 to 1"):
        curve.at(t)


# ---- training


@pytest.mark.parametrize("make", [bezier_curve, polygonal_chain])
def test_the_curve_goes_round_the_barrier(pair, make):
    straight = loss_path(network(0), *pair, DATA)
    path = make(network(0), *pair, DATA, epochs=25, lr=1e-2, batch_size=32).path(DATA)
    assert straight.barrier > 0.1
    assert path.barrier_of("loss", "train").value < 0.4 * straight.barrier_of("loss", "train").value
    assert path.barrier < 0.5 * straight.barrier


def test_the_gradient_reaches_the_bend_by_its_share():
    """One step on a quadratic, from the formula: the bend moves along the gradient at phi(t) of the drawn t."""
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])
    model = nn.Linear(1, 1, bias=False)
    a, b = {"weight": torch.tensor([[0.0]])}, {"weight": torch.tensor([[10.0]])}
    found = bezier_curve(model, a, b, (x, y), epochs=1, lr=1e-3, loss=nn.MSELoss())
    generator = torch.Generator().manual_seed(0)
    torch.randperm(2, generator=generator)
    t = float(torch.rand((), generator=generator))
    w = 2 * t * (1 - t) * 5.0 + t * t * 10.0
    assert found.losses[0] == pytest.approx(float(((w * x - y) ** 2).mean()), rel=1e-5)
    uphill = float((2 * (w * x - y) * x).mean())
    # The first step of Adam has the length of its rate and the sign of the gradient.
    assert found.controls[1]["weight"].item() == pytest.approx(5.0 - 1e-3 * np.sign(uphill), abs=1e-5)


def test_weight_decay_acts_on_the_curve_not_on_its_bend():
    """From 1 over w to 1, the mean of phi(t)^2 is least at w = -3/2: 0 = E[s (1 + s (w - 1))] with s = 2 t (1 - t)."""
    model, one = nn.Linear(1, 1, bias=False), {"weight": torch.ones(1, 1)}
    data, recipe = (torch.ones(1, 1), torch.ones(1, 1)), {"epochs": 400, "lr": 0.05, "weight_decay": 1.0}
    curve = bezier_curve(model, one, one, data, **recipe, loss=lambda outputs, targets: 0.0 * outputs)
    assert curve.controls[1]["weight"].item() == pytest.approx(-1.5, abs=0.15)


def test_seeds_decide_everything(pair):
    one, two, three = (
        bezier_curve(network(0, dropout=0.2), *pair, DATA, epochs=2, batch_size=32, seed=seed) for seed in (5, 5, 6)
    )
    assert same(one.controls[1], two.controls[1]) and not same(one.controls[1], three.controls[1])
    np.testing.assert_array_equal(one.losses, two.losses)


def test_nothing_of_the_callers_changes(pair):
    model = network(0, norm=True, dropout=0.5).eval()
    a, b = network(1, norm=True).state_dict(), network(2, norm=True).state_dict()
    before = [{name: t.clone() for name, t in state.items()} for state in (model.state_dict(), a, b)]
    random = torch.get_rng_state()
    curve = bezier_curve(model, a, b, DATA, epochs=2)
    curve.controls[0]["0.weight"].zero_()
    assert not model.training and torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(same(kept, now) for kept, now in zip(before, (model.state_dict(), a, b), strict=True))


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).relu())

    a, b = Tied(), Tied()
    bend = bezier_curve(a, a, b, DATA, epochs=2, lr=0.1).controls[1]
    assert torch.equal(bend["first.weight"], bend["second.weight"])
    assert not torch.allclose(bend["first.weight"], lerp(a, b, 0.5)["first.weight"])


def test_batches_of_an_iterable_are_trained_on(pair):
    inputs, targets = DATA.train
    loader = [(inputs[i : i + 40], targets[i : i + 40]) for i in range(0, 160, 40)]
    curve = bezier_curve(network(0), *pair, loader, epochs=10, lr=1e-2)
    assert len(curve.losses) == 10 and curve.losses[-1] < curve.losses[0]


# ---- paths and planes of curves


def test_the_path_holds_the_losses_of_its_points(curve, pair):
    path = curve.path(DATA, alphas=[0.3])
    assert isinstance(path, Path) and path.alphas.tolist() == [0.0, 0.3, 1.0]
    for i, t in enumerate(path.alphas):
        for split, score in evaluate(network(0), curve.at(t), DATA).items():
            assert path.losses[split][i] == pytest.approx(score.loss, rel=1e-5)
            assert path.accuracies[split][i] == score.accuracy
    naive = loss_path(network(0), *pair, DATA, alphas=5)
    fig = naive.plot(curve=curve.path(DATA, alphas=5))
    assert {trace.legendgroup for trace in fig.data} >= {"path", "curve"}
    with pytest.raises(InputError, match="0 to 1 only"):
        curve.path(DATA, alphas=[-0.5, 0.5])


def test_statistics_are_estimated_anew_along_the_curve():
    a, b = trained(network(1, norm=True), DATA.train, 60), trained(network(2, norm=True), DATA.train, 60)
    curve = bezier_curve(a, a, b, DATA, epochs=5)
    path = curve.path(DATA, alphas=3)
    assert path.recalibrated
    assert path.own["test"]["loss"][1] == pytest.approx(evaluate(b, None, DATA)["test"].loss, rel=1e-5)
    with pytest.warns(UserWarning, match="batch normalisation"):
        stale = curve.path(DATA, alphas=3, repair=None)
    assert stale.losses["test"][1] != pytest.approx(path.losses["test"][1], rel=1e-3)


def test_the_plane_of_a_curve_shows_it_where_it_lies(curve, pair):
    plane = curve.plane(DATA.test, resolution=5)
    assert list(plane.places) == ["A", "bend", "B"] and list(plane.tracks) == ["curve", "naive"]
    track = plane.tracks["curve"]
    np.testing.assert_allclose(track[[0, -1]], [plane.places["A"], plane.places["B"]], atol=1e-9)
    for i, t in ((25, 0.25), (60, 0.6)):  # as far from the ends as in weight space
        assert math.dist(track[i], plane.places["A"]) == pytest.approx(distance(curve.at(t), pair[0]), rel=1e-4)
        assert math.dist(track[i], plane.places["B"]) == pytest.approx(distance(curve.at(t), pair[1]), rel=1e-4)
    assert {trace.name for trace in plane.plot().data} >= {"curve", "naive"}
    with pytest.raises(InputError, match="2 bends"):
        bezier_curve(network(0), *pair, DATA, bends=2, epochs=0).plane(DATA)


def test_a_curve_says_what_it_is(curve, pair):
    assert str(curve).startswith("Bezier curve with 1 bend, ") and "trained for 25 epochs" in str(curve)
    straight = bezier_curve(network(0), *pair, DATA, epochs=0)
    assert f"{distance(*pair):.3g} long (straight: {distance(*pair):.3g})" in str(straight)


# ---- breaking off and bad input


def test_an_interrupt_returns_the_curve_as_it_is(pair):
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.warns(UserWarning, match="interrupted: the curve was trained for 2 epochs"):
        curve = bezier_curve(network(0), *pair, DATA, epochs=9, batch_size=32, loss=loss)
    assert curve.interrupted and len(curve.losses) == 2 and "interrupted" in str(curve)
    assert same(curve.at(1.0), pair[1]) and curve.path(DATA, alphas=3).complete


def test_a_loss_that_explodes_names_the_rate(pair):
    with pytest.raises(InputError, match="lower rate than lr=0.5"):
        bezier_curve(network(0), *pair, DATA, lr=0.5, loss=lambda outputs, targets: outputs.sum() * math.inf)


def test_mismatches_and_unusable_data_are_named(pair):
    with pytest.raises(DataError, match="float32, the weights torch.float64"):  # the widest dtype is taken
        bezier_curve(network(0), pair[0], network(0).double(), DATA)
    with pytest.raises(MismatchError, match="in model"):
        bezier_curve(nn.Linear(8, 4), *pair, DATA)
    with pytest.raises(WeightsError, match="0.bias of b"):
        bezier_curve(network(0), pair[0], pair[1] | {"0.bias": torch.full((12,), math.nan)}, DATA)
    with pytest.raises(DataError, match="targets from 0 to 9"):
        bezier_curve(network(0), *pair, (torch.zeros(20, 8), torch.arange(20) % 10))
    with pytest.raises(DataError, match="no classification"):
        bezier_curve(network(0), *pair, (torch.zeros(20, 8), torch.zeros(20, 4)))
    with pytest.raises(DataError, match="float64"):
        bezier_curve(network(0), *pair, (torch.zeros(20, 8).double(), torch.arange(20) % 4))


@pytest.mark.parametrize(
    "options",
    [
        {"bends": 0},
        {"bends": 1.5},
        {"epochs": -1},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"weight_decay": -1.0},
    ],
)
def test_unusable_arguments_are_refused(pair, options):
    with pytest.raises(InputError, match=next(iter(options))):
        bezier_curve(network(0), *pair, DATA, **options)


@pytest.mark.parametrize("norm", [False, True])
def test_saved_curves_come_back_bit_by_bit(tmp_path, norm):
    made = bezier_curve(
        network(0, norm=norm), network(0, norm=norm), network(1, norm=norm), DATA, epochs=2, progress=False
    )
    made.save(tmp_path / "curve.safetensors")
    back = type(made).load(tmp_path / "curve.safetensors", network(5, norm=norm))
    for one, two in zip(made.controls, back.controls, strict=True):
        assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)
    assert (back.kind, back.interrupted) == (made.kind, made.interrupted) and (back.losses == made.losses).all()
    assert (back.path(DATA, alphas=5).losses["test"] == made.path(DATA, alphas=5).losses["test"]).all()
    with pytest.raises(MismatchError):
        type(made).load(tmp_path / "curve.safetensors", nn.Linear(8, 4))


def test_other_files_hold_no_curve(tmp_path, curve):
    from safetensors.torch import save_file

    curve.save(tmp_path / "good")
    content = (tmp_path / "good").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    (tmp_path / "text").write_text("no curve")
    save_file({"0/w": torch.zeros(2)}, tmp_path / "other")
    for name in ("cut", "text", "other"):
        with pytest.raises(DataError):
            type(curve).load(tmp_path / name, curve.model)


def test_batches_in_which_no_target_counts_are_left_out_and_a_split_without_any_is_refused():
    model, (inputs, targets) = classifier(0), (part[:40] for part in DATA.train)
    some, ends = targets.where(torch.arange(40) < 4, -100), (classifier(1), classifier(2))
    options = {"batch_size": 4, "progress": False}
    found = (
        bezier_curve(model, *ends, (inputs, some), epochs=2, **options),
        geodesic_path(model, *ends, (inputs, some), points=3, epochs=2, **options),
        low_loss_path(model, *ends, (inputs, some), ticks=1, rounds=(1, 3), **options),
    )
    assert all(np.isfinite(curve.losses).all() for curve in found) and np.isfinite(found[1].divergences).all()
    with pytest.raises(DataError, match="data: no target counts"):
        geodesic_path(model, *ends, (inputs, torch.full((40,), -100)), progress=False)
