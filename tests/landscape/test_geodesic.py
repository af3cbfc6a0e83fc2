"""Geodesics: the laws of the divergence, of energy and length, and a chain between trained networks."""

import functools
import math

import numpy as np
import pytest
import torch
from support import classifier, same, splits, trained
from torch import nn

import lmc
from lmc.errors import DataError, InputError
from lmc.landscape import geodesic_path, loss_path
from lmc.landscape.curves.geodesic import divergence

DATA = splits(160, 80)
network = functools.partial(classifier, dropout=0.0)
SOME = {"points": 6, "batch_size": 32, "progress": False}


@pytest.fixture(scope="module")
def pair():
    return tuple(trained(network(seed), DATA.train, 60).state_dict() for seed in (1, 2))


@pytest.fixture(scope="module")
def found(pair):
    return geodesic_path(network(0), *pair, DATA, epochs=30, lr=5e-3, **SOME)


def test_the_divergence():
    torch.manual_seed(0)
    one, two = torch.randn(2, 40, 5, dtype=torch.float64) * 4
    p, q = one.log_softmax(-1), two.log_softmax(-1)
    m = 0.5 * (p.exp() + q.exp())
    formula = 0.5 * (p.exp() * (p.exp() / m).log() + q.exp() * (q.exp() / m).log()).sum(-1)
    torch.testing.assert_close(divergence(p, q), formula)
    torch.testing.assert_close(divergence(p, q), divergence(q, p))
    torch.testing.assert_close(divergence((one + 3.0).log_softmax(-1), q), divergence(p, q))  # logits are shifted
    shuffled = torch.randperm(5)
    torch.testing.assert_close(divergence(p[:, shuffled], q[:, shuffled]), divergence(p, q))  # classes are renamed
    for dtype in (torch.float64, torch.float32):
        assert float(divergence(p.to(dtype), p.to(dtype)).abs().max()) == 0.0
    apart = torch.tensor([[0.0, -800.0], [-800.0, 0.0]])  # probabilities of exactly 0 make no NaN
    assert float(divergence(apart[0], apart[1])) == pytest.approx(math.log(2.0), rel=1e-6)


def test_energy_falls_and_is_least_where_steps_are_equal(found):
    assert found.energy < 0.8 * found.straight.sum() and found.length < found.straight_length
    for divergences, length in ((found.straight, found.straight_length), (found.divergences, found.length)):
        assert length == pytest.approx(math.sqrt(8.0) * np.sqrt(divergences).sum())
        least = length**2 / (8 * len(divergences))
        assert divergences.sum() >= least * (1 - 1e-9)
    # nearer to constant speed than the straight line
    spread = [np.sqrt(steps).std() / np.sqrt(steps).mean() for steps in (found.straight, found.divergences)]
    assert spread[1] < spread[0]


def test_small_steps_never_raise_the_energy(pair):
    """The whole split as one batch: the energy that is trained is the energy that is measured."""
    inputs, targets = DATA.train
    whole = {**SOME, "batch_size": len(targets)}
    energies = geodesic_path(network(0), *pair, DATA, epochs=25, lr=1e-4, **whole).losses
    assert (np.diff(energies) < 0).all()
    assert energies[0] == pytest.approx(geodesic_path(network(0), *pair, DATA, epochs=0, **whole).energy, rel=1e-5)


def test_ends_stay_bit_by_bit_and_neighbours_start_evenly(pair, found):
    assert same(found.at(0.0), pair[0]) and same(found.at(1.0), pair[1]) and len(found.controls) == 6
    straight = geodesic_path(network(0), *pair, DATA, epochs=0, **SOME)
    for i, control in enumerate(straight.controls):
        for name, tensor in lmc.weights.lerp(*pair, i / 5).items():
            torch.testing.assert_close(control[name], tensor)
    np.testing.assert_array_equal(straight.straight, straight.divergences)


def test_between_equal_networks_nothing_moves(pair):
    found = geodesic_path(network(0), pair[0], pair[0], DATA, epochs=3, **SOME)
    assert found.energy == 0.0 == found.length
    for control in found.controls:
        for name, tensor in control.items():
            torch.testing.assert_close(tensor, pair[0][name], rtol=1e-6, atol=1e-7)


def test_an_uneven_start_has_more_energy_than_an_even_one(pair):
    """The last of n + 1 gaps tripled, as a chain that starts at i / (n + 1) has it."""
    even = geodesic_path(network(0), pair[0], pair[1], DATA, epochs=0, points=9, progress=False).straight
    uneven = np.array([*even[:5], (np.sqrt(even[5:]).sum()) ** 2])
    assert uneven.sum() > even.sum()


def test_classes_renamed_change_nothing(pair, found):
    order = [2, 0, 3, 1]
    place = torch.tensor([order.index(c) for c in range(4)])
    renamed = [{name: t[order] if name.startswith("3.") else t for name, t in weights.items()} for weights in pair]
    again = geodesic_path(network(0), *renamed, (DATA.train[0], place[DATA.train[1]]), epochs=3, **SOME)
    plain = geodesic_path(network(0), *pair, DATA, epochs=3, **SOME)
    np.testing.assert_allclose(again.divergences, plain.divergences, rtol=1e-3)
    for one, two in zip(again.controls, plain.controls, strict=True):
        torch.testing.assert_close(one["0.weight"], two["0.weight"], rtol=1e-3, atol=1e-4)


def test_labels_are_not_used_and_nothing_of_the_callers_changes():
    model = network(0, norm=True, dropout=0.5).eval()
    a, b = network(1, norm=True).state_dict(), network(2, norm=True).state_dict()
    before = [{name: t.clone() for name, t in state.items()} for state in (model.state_dict(), a, b)]
    random = torch.get_rng_state()
    inputs, targets = DATA.train
    one, two = (geodesic_path(model, a, b, (inputs, y), epochs=2, **SOME) for y in (targets, targets.flip(0)))
    assert all(same(p, q) for p, q in zip(one.controls, two.controls, strict=True))
    assert not model.training and torch.equal(random, torch.get_rng_state())
    assert all(same(kept, now) for kept, now in zip(before, (model.state_dict(), a, b), strict=True))


def test_an_interrupt_returns_the_chain_as_it_is(pair, monkeypatch):
    steps, calls = torch.optim.Adam.step, []

    def step(self, *args):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return steps(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.warns(UserWarning, match="interrupted: the geodesic was trained for 2 epochs"):
        found = geodesic_path(network(0), *pair, DATA, epochs=9, **SOME)
    assert found.interrupted and len(found.losses) == 2 and "interrupted" in str(found)


def test_bad_input(pair):
    with pytest.raises(InputError, match="points=2; expected a whole number, at least 3"):
        geodesic_path(network(0), *pair, DATA, points=2)
    with pytest.raises(InputError, match="lower rate"):
        geodesic_path(network(0), *pair, DATA, lr=1e30, epochs=9, **SOME)
    regression = (DATA.train[0], torch.zeros(160, 4))
    with pytest.raises(DataError, match="no classification"):
        geodesic_path(network(0), *pair, regression, **SOME)
    with pytest.raises(DataError):
        geodesic_path(nn.Linear(8, 1), nn.Linear(8, 1), nn.Linear(8, 1), lmc.Task.regression().on(regression), **SOME)


def test_a_stored_pair_gets_a_lower_barrier_without_a_label():
    stored, data = lmc.data.checkpoint("digits-mlp32"), lmc.data.digits()
    found = geodesic_path(stored.model(), *stored, data, points=9, epochs=20, lr=2e-3, progress=False)
    straight = loss_path(stored.model(), *stored, data.test, progress=False)
    assert found.length < 0.5 * found.straight_length
    assert found.path(data.test, progress=False).barrier < 0.5 * straight.barrier


@pytest.mark.parametrize("follow", [geodesic_path, lmc.bezier_curve])
def test_half_precision_is_trained_in(follow, pair):
    """Adam divides by a number that is 0 in float16 where a gradient vanishes, as it does on the first dead unit."""
    data = {"train": (DATA.train[0].half(), DATA.train[1])}
    dead = [{n: x.half() for n, x in weights.items()} for weights in pair]
    for weights in dead:
        next(iter(weights.values()))[0] = 0.0
    options = {"points": 4} if follow is geodesic_path else {}
    curve = follow(network(0).half(), *dead, data, epochs=2, batch_size=32, progress=False, **options)
    for weights in curve.controls:
        assert all(bool(x.isfinite().all()) and x.dtype == torch.float16 for x in weights.values())
