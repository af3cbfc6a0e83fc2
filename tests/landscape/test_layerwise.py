"""Barriers layer by layer (Adilova et al. 2024)."""

import numpy as np
import pytest
import torch
from support import blobs, classifier, trained
from torch import nn

import lmc

DATA = {"train": blobs(80, 0), "test": blobs(60, 1)}


@pytest.fixture(scope="module")
def pair():
    return [trained(classifier(seed), DATA["train"], 60) for seed in (0, 1)]


def test_equal_networks_have_no_barrier(pair):
    found = lmc.landscape.layerwise_barriers(pair[0], pair[0], pair[0], DATA, progress=False)
    assert found.layers == ("0", "2") and np.abs(found.from_a).max() < 1e-6 and abs(found.full) < 1e-6


def test_all_layers_together_are_the_line_and_the_order_does_not_matter(pair):
    a, b = pair
    path = lmc.loss_path(a, a, b, DATA, alphas=5, progress=False)
    expected = path.barrier_of("loss", "test", "mean").value
    for order in ("input", "output", "random", "minimal"):
        found = lmc.landscape.layerwise_barriers(a, a, b, DATA, cumulative=order, progress=False)
        assert found.full == pytest.approx(expected, abs=1e-6)
        assert found.from_a[-1] == pytest.approx(found.full, abs=1e-6) == found.from_b[-1]
        assert set(found.layers) == {"0", "2"}
    assert found.full > 0.01


def test_a_layer_of_b_in_a_is_all_but_that_layer_of_a_in_b(pair):
    a, b = pair
    alone = lmc.landscape.layerwise_barriers(a, a, b, DATA, alphas=[0.0, 1.0], progress=False)
    other = lmc.landscape.layerwise_barriers(a, b, a, DATA, alphas=[0.0, 1.0], progress=False)
    assert alone.from_a == pytest.approx(other.from_b, abs=1e-6)
    half = (alone.losses[0] - alone.losses[1]) / 2
    mixed = dict(a.state_dict()) | {k: v for k, v in b.state_dict().items() if k.startswith("0.")}
    loss = lmc.landscape.evaluate(a, mixed, DATA)["test"].loss
    assert alone.from_a[0] == pytest.approx(max(loss - alone.losses.mean(), half), abs=1e-5)


def test_a_finer_grid_never_lowers_a_barrier(pair):
    coarse = lmc.landscape.layerwise_barriers(pair[0], *pair, DATA, alphas=3, progress=False)
    fine = lmc.landscape.layerwise_barriers(pair[0], *pair, DATA, alphas=9, progress=False)
    assert (fine.from_a >= coarse.from_a - 1e-9).all() and fine.full >= coarse.full - 1e-9
    assert len(fine.to_frame()) == 2 and "LayerwiseBarriers of 2 layers" in repr(fine)


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.read, self.middle, self.write = nn.Embedding(4, 6), nn.Linear(6, 6), nn.Linear(6, 4, bias=False)
        self.write.weight = self.read.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.write(self.middle(self.read(ids)).tanh())


def test_a_tied_tensor_moves_in_all_its_places():
    a, b = Tied(0), Tied(1)
    ids = torch.arange(40).reshape(10, 4) % 4
    data, moved = (ids, ids.roll(1, 1)), Tied(0)
    moved.read.weight.data.copy_(b.read.weight.data)
    found = lmc.landscape.layerwise_barriers(a, a, b, data, alphas=[0.0, 1.0], progress=False)
    losses = [lmc.landscape.evaluate(a, each, data)["data"].loss for each in (a, b, moved)]
    assert found.layers == ("read", "middle")
    assert found.from_a[0] == pytest.approx(max(losses[0], losses[2]) - sum(losses[:2]) / 2, abs=1e-6)
    for name in ("read.weight", "write.weight"):
        alone = lmc.landscape.layerwise_barriers(a, a, b, data, layers={"x": [name]}, alphas=[0.0, 1.0], progress=False)
        assert alone.from_a[0] == pytest.approx(found.from_a[0], abs=1e-6)


def test_own_layers_and_bad_input(pair):
    a, b = pair
    found = lmc.landscape.layerwise_barriers(a, a, b, DATA, layers={"biases": ["0.bias", "2.bias"]}, progress=False)
    assert found.layers == ("biases",) and found.from_a[0] != found.full
    for layers, match in (
        ({"x": ["c"]}, "no tensor 'c'"),
        ({"x": "0.bias"}, "the tensors of 'x' in a list, got '0.bias'"),
        ({"x": []}, r"the tensors of 'x' in a list, got \[\]"),
        (["0.bias"], "expected a mapping from names of layers"),
        ({}, "at least one"),
    ):
        with pytest.raises(lmc.InputError, match=match):
            lmc.landscape.layerwise_barriers(a, a, b, DATA, layers=layers, progress=False)
    with pytest.raises(lmc.InputError, match="cumulative"):
        lmc.landscape.layerwise_barriers(a, a, b, DATA, cumulative="sideways", progress=False)  # type: ignore[arg-type]
