"""Low-loss paths: what a tick does, by formula, and a path between trained networks."""

import functools
import math

import numpy as np
import pytest
import torch
from support import classifier, same, splits, trained
from torch import nn

import lmc
from lmc.errors import InputError
from lmc.landscape import loss_path, low_loss_path
from lmc.landscape.curves.low_loss import towards, with_variances
from lmc.weights import distance

DATA = splits(160, 80)
network = functools.partial(classifier, dropout=0.0)
UNTRAINED = {"lr": 1e-30, "rounds": (1, 1), "batch_size": 32, "progress": False}


@pytest.fixture(scope="module")
def pair():
    """Two networks of one function whose units are mirrored: an average of them is far from either."""
    a = trained(network(1), DATA.train, 60).state_dict()
    b = {"0.weight": a["0.weight"].flip(0), "0.bias": a["0.bias"].flip(0), "3.weight": a["3.weight"].flip(1)}
    return a, b | {"3.bias": a["3.bias"]}


# ---- the laws of a tick


@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 0.5, None])
def test_scaling_keeps_the_mean_and_gives_the_variance_of_the_formula(epsilon):
    torch.manual_seed(0)
    point = {"weight": torch.randn(9, 7) * 3 + 2, "bias": torch.randn(5), "one": torch.randn(1)}
    wanted = {"weight": torch.tensor(0.04), "bias": torch.tensor(2.0)}
    found = with_variances(point, wanted, epsilon)
    for name, variance in wanted.items():
        old, extra = point[name].var(), 1e-6 * variance if epsilon is None else epsilon
        torch.testing.assert_close(found[name].mean(), point[name].mean())
        torch.testing.assert_close(found[name].var(), old * (variance + extra) / (old + extra))
    assert torch.equal(found["one"], point["one"])
    constant = with_variances({"bias": torch.ones(4)}, {"bias": torch.tensor(0.0)}, 0.0)
    assert torch.equal(constant["bias"], torch.ones(4))


def test_a_layer_moves_by_its_share_at_least_the_shortest_step_and_never_too_far():
    point, end = {"w": torch.zeros(3), "b": torch.zeros(1)}, {"w": torch.tensor([3.0, 0, 0]), "b": torch.tensor([4.0])}
    joined = towards(point, end, [["w", "b"]], 0.1, 0.0)
    assert math.dist(torch.cat(list(joined.values())).tolist(), [0.0] * 4) == pytest.approx(0.5)
    alone = towards(point, end, [["w"]], 0.1, 0.0)
    assert alone["w"][0] == pytest.approx(0.3) and torch.equal(alone["b"], point["b"])
    longer = towards(point, end, [["w"], ["b"]], 0.1, 1.0)
    assert longer["w"][0] == pytest.approx(1.0) and longer["b"][0] == pytest.approx(1.0)
    assert same(towards(point, end, [["w"], ["b"]], 0.1, 9.0), end) and same(towards(end, end, [["w"]], 0.1, 1.0), end)


def test_between_equal_networks_the_path_is_a_point(pair):
    found = low_loss_path(network(0), pair[0], pair[0], DATA, ticks=2, **UNTRAINED)
    for point in found.controls:
        for name, tensor in point.items():
            torch.testing.assert_close(tensor, pair[0][name], rtol=1e-5, atol=1e-6)
    assert found.remaining.tolist() == [0.0] * 4


def test_whole_steps_without_training_lead_to_b_up_to_its_variances(pair):
    b = {name: 2.0 * tensor + 0.3 for name, tensor in pair[1].items()}
    (point,) = low_loss_path(
        network(0), pair[0], b, DATA, ticks=1, step=1.0, layers={"all": list(b)}, **UNTRAINED
    ).controls[1:-1]
    for name, tensor in point.items():
        torch.testing.assert_close(tensor.mean(), b[name].mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tensor.var(), pair[0][name].var(), rtol=1e-4, atol=1e-6)
        direction = torch.corrcoef(torch.stack([tensor.flatten(), b[name].flatten()]))[0, 1]
        assert float(direction) == pytest.approx(1.0, abs=1e-5)


def test_layers_approach_geometrically_one_after_the_other(pair):
    """Mirrored layers have equal variances; where the scaling is switched off by a large epsilon, `(1 - a)^k` is left."""
    found = low_loss_path(network(0), *pair, DATA, ticks=3, step=0.2, epsilon=1e12, **UNTRAINED)
    a, b = pair
    for k, point in enumerate(found.controls[1:-1], start=1):
        for layer, ticks in (("0", k), ("3", max(0, k - 3))):
            name = f"{layer}.weight"
            torch.testing.assert_close(point[name] - b[name], 0.8**ticks * (a[name] - b[name]), rtol=1e-4, atol=1e-5)
    assert found.stages == ("0",) * 3 + ("3",) * 3
    np.testing.assert_allclose(
        found.remaining, [distance(p, b) / distance(a, b) for p in found.controls[1:-1]], rtol=1e-5
    )


# ---- towards the origin


class Normed(nn.Module):
    """A layer with a norm behind it, so that its length means nothing, and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(8, 12, bias=False), nn.LayerNorm(12, eps=0.0), nn.Linear(12, 4)

    def forward(self, inputs):
        return self.head(torch.relu(self.norm(self.first(inputs))))


@pytest.fixture(scope="module")
def normed():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return trained(Normed(), DATA.train, 20)


ORIGIN = {"layers": {"first": ["first.weight"]}, "batch_size": 32, "lr": 0.3, "rounds": (4, 4), "progress": False}


def test_layers_shrink_geometrically_and_only_those_with_two_axes_or_those_asked_for(pair):
    found = low_loss_path(network(0), pair[0], "origin", DATA, ticks=2, step=0.25, **UNTRAINED)
    a = pair[0]
    for k, point in enumerate(found.controls[1:], start=1):
        for layer, ticks in (("0", k), ("3", max(0, k - 2))):
            torch.testing.assert_close(point[f"{layer}.weight"], 0.75**ticks * a[f"{layer}.weight"])
            torch.testing.assert_close(point[f"{layer}.bias"], a[f"{layer}.bias"])
    weights = [{name: p[name] for name in ("0.weight", "3.weight")} for p in found.controls]
    zero = {name: torch.zeros_like(tensor) for name, tensor in weights[0].items()}
    np.testing.assert_allclose(
        found.remaining, [distance(p, zero) / distance(weights[0], zero) for p in weights[1:]], rtol=1e-5
    )
    assert len(found.between) == len(found.losses) == 4 and len(found.to_frame()) == 4
    assert f"shrunk to {100 * found.remaining[-1]:.0f} % of its length" in str(found)
    asked = low_loss_path(
        network(0), a, "origin", DATA, layers={"out": ["3.bias"]}, ticks=1, step=0.5, **UNTRAINED
    ).controls[-1]
    torch.testing.assert_close(asked["3.bias"], 0.5 * a["3.bias"])
    torch.testing.assert_close(asked["3.weight"], a["3.weight"])


def test_where_a_norm_follows_shells_of_every_size_are_walked_alike(normed):
    """Rates fall with the square of the length, so steps turn a layer by angles that its length does not change."""
    a = normed.state_dict()
    found = low_loss_path(normed, a, "origin", DATA, ticks=3, step=0.5, threshold=0.0, **ORIGIN)
    unshrunk = low_loss_path(normed, a, "origin", DATA, ticks=3, step=1e-7, threshold=0.0, **ORIGIN)
    assert float(found.controls[-1]["first.weight"].norm()) < 0.2 * float(a["first.weight"].norm())
    for k, (point, other) in enumerate(zip(found.controls, unshrunk.controls, strict=True)):
        torch.testing.assert_close(2.0**k * point["first.weight"], other["first.weight"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(point["head.weight"], other["head.weight"], rtol=1e-3, atol=1e-4)
    moved = unshrunk.controls[-1]["first.weight"] - a["first.weight"]
    assert float(moved.norm()) > 0.01 * float(a["first.weight"].norm())


def test_a_layer_shrinks_at_low_loss_where_scaling_it_does_not(pair):
    """Without a norm the rest of the network has to make up for it, and learns to."""
    a, layers = pair[0], {"first": ["0.weight"]}
    found = low_loss_path(
        network(0), a, "origin", DATA, layers=layers, ticks=8, step=0.2, batch_size=32, lr=0.2, progress=False
    )
    scaled = {**a, "0.weight": found.remaining[-1] * a["0.weight"]}
    start, *_, straight = loss_path(network(0), a, scaled, DATA, alphas=3, progress=False).losses["train"]
    assert found.remaining[-1] < 0.4 and found.highest < start + 0.25 * (straight - start)
    assert same(found.at(0.0), a) and same(found.at(1.0), found.controls[-1])


def test_an_interrupt_before_the_first_point_leaves_no_path_to_the_origin(pair):
    def loss(outputs, targets):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        low_loss_path(network(0), pair[0], "origin", DATA, threshold=1.0, loss=loss, progress=False)
    calls = []

    def later(outputs, targets):
        calls.append(1)
        if len(calls) == 100:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.warns(UserWarning, match=r"interrupted: the path has \d points, and ends there"):
        found = low_loss_path(network(0), pair[0], "origin", DATA, loss=later, batch_size=32, progress=False)
    assert found.interrupted and len(found.controls) == len(found.stages) + 1 == len(found.between) + 1


# ---- paths


@pytest.fixture(scope="module")
def path(pair):
    return low_loss_path(network(0), *pair, DATA, ticks=12, step=0.2, batch_size=32, lr=0.2, progress=False)


def test_the_path_stays_low_where_the_straight_line_does_not(pair, path):
    straight = loss_path(network(0), *pair, DATA, progress=False).barrier_of("loss", "train").value
    ends_and_middles = path.path(DATA, alphas=2 * len(path.controls) - 1, progress=False)
    found = ends_and_middles.barrier_of("loss", "train").value
    assert straight > 0.1 and found < 0.4 * straight
    assert same(path.at(0.0), pair[0]) and same(path.at(1.0), pair[1])
    losses = ends_and_middles.losses["train"]
    np.testing.assert_allclose(path.losses, losses[2:-1:2], rtol=0.2)  # means over ten batches
    np.testing.assert_allclose(path.between, losses[1::2], rtol=0.2)
    assert path.highest == max(path.losses.max(), path.between.max())
    assert 10 <= path.rounds.min() and path.rounds.max() <= 200
    assert f"{len(path.stages)} points, 2 layers" in str(path) and len(path.to_frame()) == 24


def test_with_the_whole_split_as_a_batch_its_losses_are_exact(pair):
    found = low_loss_path(network(0), *pair, DATA, ticks=2, rounds=(1, 3), batch_size=160, progress=False)
    losses = found.path(DATA, alphas=2 * len(found.controls) - 1, progress=False).losses["train"]
    np.testing.assert_allclose(found.losses, losses[2:-1:2], rtol=1e-4)
    np.testing.assert_allclose(found.between, losses[1::2], rtol=1e-4)


def test_seeds_decide_everything_and_nothing_of_the_callers_changes(pair):
    model = network(0, norm=True, dropout=0.5).eval()
    a, b = network(1, norm=True).state_dict(), network(2, norm=True).state_dict()
    before = [{name: t.clone() for name, t in state.items()} for state in (model.state_dict(), a, b)]
    random = torch.get_rng_state()
    one, two, three = (
        low_loss_path(model, a, b, DATA, ticks=1, rounds=(2, 4), seed=seed, progress=False) for seed in (5, 5, 6)
    )
    assert same(one.controls[1], two.controls[1]) and not same(one.controls[1], three.controls[1])
    assert not model.training and torch.equal(random, torch.get_rng_state())
    assert all(same(kept, now) for kept, now in zip(before, (model.state_dict(), a, b), strict=True))
    # running statistics followed the training, counters too
    assert int(one.controls[1]["1.num_batches_tracked"]) > int(a["1.num_batches_tracked"])
    assert one.path(DATA, alphas=3, progress=False).recalibrated


def test_an_interrupt_returns_the_points_found(pair):
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        if len(calls) == 100:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.warns(UserWarning, match="interrupted: the path has . points"):
        found = low_loss_path(network(0), *pair, DATA, ticks=9, loss=loss, batch_size=32, progress=False)
    assert found.interrupted and 0 < len(found.stages) < 18 and len(found.controls) == len(found.stages) + 2
    assert same(found.at(1.0), pair[1]) and "interrupted" in str(found)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"ticks": 0}, "ticks=0; expected a whole number, at least 1"),
        ({"step": 0.0}, "step=0.0; expected a positive number"),
        ({"rounds": (5, 2)}, "rounds="),
        ({"rounds": 3}, "rounds=3; expected the fewest and the most batches"),
        ({"rounds": (1.5, 2)}, "rounds="),
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"threshold": math.nan}, "threshold=nan; expected a loss"),
        ({"threshold": "low"}, "threshold='low'; expected a loss"),
        ({"layers": {"x": ["no.such"]}}, "no tensor 'no.such'"),
        ({"lr": 1e30, "ticks": 1}, "lower rate than lr=1e"),
        ({"b": "orgin"}, "b='orgin'; expected weights, or 'origin'"),
    ],
)
def test_unusable_arguments(pair, options, words):
    ends = dict(zip("ab", pair, strict=True))
    with pytest.raises(InputError, match=words):
        low_loss_path(network(0), data=DATA, progress=False, **ends | options)


def test_a_stored_pair_is_connected():
    stored, data = lmc.data.checkpoint("digits-mlp32"), lmc.data.digits()
    found = low_loss_path(stored.model(), *stored, data, ticks=6, step=0.3, progress=False)
    halves = found.path(data, alphas=2 * len(found.controls) - 1, progress=False)
    straight = loss_path(stored.model(), *stored, data, progress=False)
    assert straight.barrier > 1.0 and halves.barrier < 0.35 * straight.barrier
