"""Points of a plane as sums, first layers mixed from products, and points taken by several threads."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import lmc
from lmc.landscape.evaluation import Evaluator, evaluate
from lmc.landscape.plane import loss_plane, random_plane
from lmc.landscape.span import FirstLayer, Products, Span, find_first_layer
from lmc.landscape.workers import Workers
from lmc.network import Network
from lmc.weights import mean

CPU = torch.device("cpu")


def mlp(seed, *, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3)).to(dtype)


def cnn(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(150, 3))


def data(*shape, count=40, dtype=torch.float32):
    random = torch.Generator().manual_seed(5)
    return torch.randn(count, *shape, generator=random, dtype=dtype), torch.arange(count) % 3


def test_a_span_gives_the_mean_of_its_three_weight_sets():
    states = [cnn(seed).state_dict() for seed in (1, 2, 3)]
    span = Span.through(*states)
    for u, v in ((0.0, 0.0), (0.3, 0.6), (-0.4, 1.2)):
        for name, tensor in mean(states, [1 - u - v, u, v]).items():
            torch.testing.assert_close(span(u, v)[name], tensor, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in span(0.0, 0.0).items())


def test_what_has_no_direction_stays_and_dtypes_are_kept():
    state = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.float64), "n": torch.tensor(7)}
    moved = Span(state, [{"a": torch.full((3,), 2.0)}, {}])(0.5, 3.0)
    assert moved["a"].tolist() == [2.0] * 3 and moved["b"] is state["b"] and moved["n"] is state["n"]
    assert moved["a"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (mlp(0), torch.zeros(5, 4, 5), "1"),
        (cnn(0), torch.zeros(5, 4, 5, 5), "0"),
        (nn.Sequential(nn.Conv2d(1, 6, 3)), torch.zeros(5, 1, 5, 5), None),  # 9 inputs: mixing does not pay
        (nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, 3)), torch.zeros(5, 20), None),  # not the raw inputs
        (mlp(0, dtype=torch.bfloat16), torch.zeros(5, 20, dtype=torch.bfloat16), None),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(20, 3))), torch.zeros(5, 20), None),
        (nn.Sequential(nn.Embedding(9, 20), nn.Linear(20, 3)), torch.zeros(5, dtype=torch.long), None),
    ],
)
def test_the_first_layer_is_found_where_it_sees_the_raw_inputs(model, inputs, expected):
    assert find_first_layer(Network(model, CPU), inputs) == expected


def test_a_layer_that_is_called_twice_is_left_alone():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(20, 20)

        def forward(self, x):
            return self.layer(self.layer(x))

    assert find_first_layer(Network(Siamese(), CPU), torch.zeros(5, 20)) is None


@pytest.mark.parametrize("make", [mlp, cnn])
def test_mixed_products_are_what_the_layer_puts_out(make):
    inputs, _ = data(4, 5) if make is mlp else data(4, 5, 5)
    span = Span.through(*(make(seed).double().state_dict() for seed in (1, 2, 3)))
    inputs = inputs.double()
    plain, network = Network(make(0).double(), CPU), Network(make(0).double(), CPU)
    name = find_first_layer(network, inputs)
    first = FirstLayer(network, Products(span, name, network.module.get_submodule(name), [inputs]))
    for u, v in ((0.2, 0.9), (-1.0, 0.4)):
        first.place = (u, v)
        for other in (plain, network):
            other.load(span(u, v))
        torch.testing.assert_close(network(inputs), plain(inputs), rtol=1e-10, atol=1e-10)
        other_inputs = inputs + 1.0  # no view of the data: computed as always
        torch.testing.assert_close(network(other_inputs), plain(other_inputs), rtol=0, atol=0)


def test_products_are_made_once_and_within_the_memory(monkeypatch):
    inputs, _ = data(20)
    span, layer = Span.through(*(mlp(seed).state_dict() for seed in (1, 2, 3))), mlp(0)[1]
    products = Products(span, "1", layer, [inputs])
    found = products.of(inputs[:8])
    assert len(found) == 3 and products.of(inputs[:8]) is found
    assert products.of(inputs.clone()) is None
    monkeypatch.setattr("lmc.landscape.span.PRODUCT_BYTES", 0)
    assert Products(span, "1", layer, [inputs]).of(inputs) is None


def random_points(model, split, **options):
    return random_plane(model, None, split, 5, progress=False, **options)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_planes_with_mixed_layers_equal_direct_evaluations(monkeypatch, batch_size):
    monkeypatch.setattr("lmc.landscape.evaluation.MOST_AT_ONCE", 1)
    used = []
    of = Products.of
    monkeypatch.setattr(Products, "of", lambda self, inputs: used.append(of(self, inputs)) or used[-1])
    model, split = mlp(0).double(), data(20, dtype=torch.float64)
    plane = random_points(model, split, batch_size=batch_size)
    assert len(used) >= 24 and all(found is not None for found in used)
    monkeypatch.setattr("lmc.landscape.span.FEWEST_INPUTS", 10**6)
    made = len(used)
    plain = random_points(model, split, batch_size=batch_size)
    assert len(used) == made
    np.testing.assert_allclose(plane.losses["data"], plain.losses["data"], rtol=1e-6)


def test_batch_statistics_see_the_mixed_layer_too(monkeypatch):
    monkeypatch.setattr("lmc.landscape.evaluation.MOST_AT_ONCE", 1)
    models, split = [cnn(seed).double() for seed in (1, 2, 3)], data(4, 5, 5, dtype=torch.float64)
    planes = []
    for fewest in (16, 10**6):
        monkeypatch.setattr("lmc.landscape.span.FEWEST_INPUTS", fewest)
        planes.append(loss_plane(cnn(0).double(), models, split, 5, progress=False))
    assert planes[0].recalibrated
    np.testing.assert_allclose(planes[0].losses["data"], planes[1].losses["data"], rtol=1e-6)


# ---- threads


@pytest.fixture
def three_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr("lmc.landscape.evaluation.MOST_AT_ONCE", 1)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_give_what_one_gives(three_threads):
    models, split = [cnn(seed) for seed in (1, 2, 3)], SimpleNamespace(train=data(4, 5, 5), test=data(4, 5, 5, count=20))
    threaded = loss_plane(cnn(0), models, split, 7, progress=False)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    alone = loss_plane(cnn(0), models, split, 7, progress=False)
    assert threaded.complete
    for name in ("train", "test"):
        np.testing.assert_allclose(threaded.losses[name], alone.losses[name], rtol=1e-5)


class Noting(nn.Module):
    """A network that notes which threads it runs in, and fails where it is told to."""

    threads: set[int] = set()
    error: type[BaseException] | None = None

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(20, 3)

    def forward(self, x):
        Noting.threads.add(threading.get_ident())
        if Noting.error is not None and threading.current_thread() is not threading.main_thread():
            raise Noting.error("stopped")
        return self.linear(x)


def test_threads_are_taken_where_only_torch_runs_in_them(three_threads):
    counts = []
    for options in ({}, {"metrics": {"mine": lambda outputs, targets: outputs.mean()}}):
        Noting.threads = set()
        random_plane(Noting(), None, data(20), 21, progress=False, **options)
        counts.append(len(Noting.threads - {threading.get_ident()}))
    assert 1 <= counts[0] <= 3 and counts[1] == 0


def test_an_error_in_a_thread_comes_out_and_all_threads_end(three_threads, monkeypatch):
    running = threading.active_count()
    monkeypatch.setattr(Noting, "error", ZeroDivisionError)
    with pytest.raises(ZeroDivisionError, match="stopped"):
        random_plane(Noting(), None, data(20), 5, progress=False)
    monkeypatch.setattr(Noting, "error", KeyboardInterrupt)
    with pytest.warns(UserWarning, match="interrupted: 0 of 24 points"):
        part = random_plane(Noting(), None, data(20), 5, progress=False)
    assert part.done.sum() == 1 and threading.active_count() == running and torch.get_num_threads() == 3


def test_a_crew_that_is_left_early_stops(three_threads):
    evaluator = Evaluator(mlp(0), data(20))
    list(evaluator([mlp(0).state_dict()]))
    span = Span.through(*(mlp(seed).state_dict() for seed in (1, 2, 3)))
    points = Workers(evaluator, None, span, lambda i: (i / 1000, 0.0))(range(1000))
    i, score = next(points)
    direct = evaluate(mlp(0), span(i / 1000, 0.0), data(20))["data"]
    assert score["data"].loss == pytest.approx(direct.loss, rel=1e-5)
    before = threading.active_count()
    points.close()
    assert threading.active_count() < before


# ---- what was given stays


def test_networks_of_the_caller_keep_their_forward():
    model = mlp(0)
    random_plane(model, None, data(20), 5, progress=False)
    assert all("forward" not in vars(module) for module in model.modules())
    assert lmc.landscape.evaluate(model, None, data(20))["data"].count == 40
