"""Points of a plane as sums, first layers mixed from products, and points taken by several threads."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import lmc
from lmc.landscape.evaluation.evaluation import Evaluation
from lmc.landscape.evaluation.evaluator import Evaluator, evaluate
from lmc.landscape.planes.plane import loss_plane, random_plane
from lmc.landscape.planes.span import PlaneSpan
from lmc.landscape.planes.workers import FirstLayer, Products, Workers, find_first_layer
from lmc.network.network import Network
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
    span = PlaneSpan.through(*states)
    for u, v in ((0.0, 0.0), (0.3, 0.6), (-0.4, 1.2)):
        for name, tensor in mean(states, [1 - u - v, u, v]).items():
            np.testing.assert_allclose(span(u, v)[name], tensor, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in span(0.0, 0.0).items())


def test_what_has_no_direction_stays_and_dtypes_are_kept():
    state = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.float64), "n": torch.tensor(7)}
    moved = PlaneSpan(state, [{"a": torch.full((3,), 2.0)}, {}])(0.5, 3.0)
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
    span = PlaneSpan.through(*(make(seed).double().state_dict() for seed in (1, 2, 3)))
    inputs = inputs.double()
    plain, network = Network(make(0).double(), CPU), Network(make(0).double(), CPU)
    name = find_first_layer(network, inputs)
    first = FirstLayer(network, Products(span, name, network.module.get_submodule(name), [inputs]))
    for u, v in ((0.2, 0.9), (-1.0, 0.4)):
        first.place = (u, v)
        for other in (plain, network):
            other.load(span(u, v))
        np.testing.assert_allclose(network(inputs), plain(inputs), rtol=1e-10, atol=1e-10)
        other_inputs = inputs + 1.0  # no view of the data: computed as always
        np.testing.assert_allclose(network(other_inputs), plain(other_inputs), rtol=0, atol=0)


def test_products_are_made_once_and_within_the_memory(monkeypatch):
    inputs, _ = data(20)
    span, layer = PlaneSpan.through(*(mlp(seed).state_dict() for seed in (1, 2, 3))), mlp(0)[1]
    products = Products(span, "1", layer, [inputs])
    found = products.of(inputs[:8])
    assert len(found) == 3 and products.of(inputs[:8]) is found
    assert products.of(inputs.clone()) is None
    monkeypatch.setattr("lmc.landscape.planes.workers.PRODUCT_BYTES", 0)
    assert Products(span, "1", layer, [inputs]).of(inputs) is None


def random_points(model, split, **options):
    return random_plane(model, None, split, resolution=5, progress=False, **options)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_planes_with_mixed_layers_equal_direct_evaluations(monkeypatch, batch_size):
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MOST_AT_ONCE", 1)
    used = []
    of = Products.of
    monkeypatch.setattr(Products, "of", lambda self, inputs: used.append(of(self, inputs)) or used[-1])
    model, split = mlp(0).double(), data(20, dtype=torch.float64)
    plane = random_points(model, split, batch_size=batch_size)
    assert len(used) >= 24 and all(found is not None for found in used)
    monkeypatch.setattr("lmc.landscape.planes.workers.FEWEST_INPUTS", 10**6)
    made = len(used)
    plain = random_points(model, split, batch_size=batch_size)
    assert len(used) == made
    np.testing.assert_allclose(plane.losses["data"], plain.losses["data"], rtol=1e-6)


def test_batch_statistics_see_the_mixed_layer_too(monkeypatch):
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MOST_AT_ONCE", 1)
    models, split = [cnn(seed).double() for seed in (1, 2, 3)], data(4, 5, 5, dtype=torch.float64)
    planes = []
    for fewest in (16, 10**6):
        monkeypatch.setattr("lmc.landscape.planes.workers.FEWEST_INPUTS", fewest)
        planes.append(loss_plane(cnn(0).double(), models, split, resolution=5, progress=False))
    assert planes[0].recalibrated
    np.testing.assert_allclose(planes[0].losses["data"], planes[1].losses["data"], rtol=1e-6)


# ---- weights that stay where they are, outputs added up together


def states_of(*seeds):
    return [mlp(seed).state_dict() for seed in seeds]


def one_by_one(model, split, **options):
    evaluator = Evaluator(model, split, **options)
    list(evaluator(states_of(0)))
    assert evaluator.one_by_one
    return evaluator


def test_a_traveller_is_written_where_it_is():
    span = PlaneSpan.through(*states_of(1, 2, 3))
    weights, go = span.traveller()
    places = {name: tensor.data_ptr() for name, tensor in weights.items()}
    for u, v in ((0.3, 0.6), (-0.4, 1.2), (0.0, 0.0)):
        go(u, v)
        for name, tensor in span(u, v).items():
            np.testing.assert_allclose(weights[name], tensor, rtol=0, atol=0)
    assert {name: tensor.data_ptr() for name, tensor in weights.items()} == places
    mixed = states_of(1)[0] | {"3.bias": torch.zeros(3, dtype=torch.bfloat16)}
    assert PlaneSpan(mixed, [states_of(2)[0], {}]).traveller() is None


@pytest.mark.parametrize("tallied", [1, 3, 100])
def test_scores_added_up_together_are_those_of_each(monkeypatch, tallied):
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MOST_AT_ONCE", 1)
    split = SimpleNamespace(train=data(20), test=data(20, count=17))
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.TALLIED_BYTES", tallied * 57 * 3 * 4)
    evaluator, asked = one_by_one(mlp(0), split, batch_size=11, predictions=True), []
    states = states_of(*range(1, 9))
    for k, score in enumerate(evaluator(asked.append(state) or state for state in states)):
        assert len(asked) == min((k // tallied + 1) * tallied, 8)
        for name in ("train", "test"):
            alone = evaluate(mlp(0), states[k], getattr(split, name))["data"]
            assert score[name].loss == pytest.approx(alone.loss, rel=1e-6) and score[name].count == alone.count
            assert score[name].accuracy == alone.accuracy
            assert score[name].predictions.shape == (alone.count,)
    assert len(asked) == 8


def test_an_interrupt_leaves_the_scores_of_what_went_through(monkeypatch):
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MOST_AT_ONCE", 1)
    evaluator, found = one_by_one(mlp(0), data(20)), []

    def broken_off():
        yield from states_of(1, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for score in evaluator(broken_off()):
            found.append(score["data"].loss)
    assert found == pytest.approx([evaluate(mlp(0), state, data(20))["data"].loss for state in states_of(1, 2)])


def test_measures_of_the_caller_are_asked_before_the_next_point(monkeypatch):
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MOST_AT_ONCE", 1)
    calls = []
    measure = {"mine": lambda outputs, targets: calls.append(1) or outputs.mean()}
    evaluator = one_by_one(mlp(0), data(20), metrics=measure)
    before, seen = len(calls), []
    list(evaluator(seen.append(len(calls)) or state for state in states_of(1, 2, 3)))
    assert [count - before for count in seen] == [0, 1, 2]


def test_outputs_that_are_the_weights_themselves_are_kept_apart(monkeypatch):
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MOST_AT_ONCE", 1)

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([0.5, -0.2, 0.1]))

        def forward(self, x):
            return self.logits.expand(len(x), 3)

    states = [{"logits": torch.tensor(logits)} for logits in ([0.5, 0.0, 0.1], [0.0, 3.0, 0.0], [-2.0, 0.0, 1.0])]
    evaluation, span = Evaluation(Constant(), states, data(4)), PlaneSpan.through(*states)
    evaluation.own()
    for i, score in Workers(evaluation, span, lambda i: (i / 7, -i / 5))(range(9)):
        direct = evaluate(Constant(), span(i / 7, -i / 5), data(4))["data"]
        assert score["data"].loss == pytest.approx(direct.loss, rel=1e-6)


# ---- threads


@pytest.fixture
def three_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MOST_AT_ONCE", 1)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_give_what_one_gives(three_threads):
    models, split = (
        [cnn(seed) for seed in (1, 2, 3)],
        SimpleNamespace(train=data(4, 5, 5), test=data(4, 5, 5, count=20)),
    )
    threaded = loss_plane(cnn(0), models, split, resolution=7, progress=False)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    alone = loss_plane(cnn(0), models, split, resolution=7, progress=False)
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
        random_plane(Noting(), None, data(20), resolution=21, progress=False, **options)
        counts.append(len(Noting.threads - {threading.get_ident()}))
    assert 1 <= counts[0] <= 3 and counts[1] == 0


def test_an_error_in_a_thread_comes_out_and_all_threads_end(three_threads, monkeypatch):
    running = threading.active_count()
    monkeypatch.setattr(Noting, "error", ZeroDivisionError)
    with pytest.raises(ZeroDivisionError, match="stopped"):
        random_plane(Noting(), None, data(20), resolution=5, progress=False)
    monkeypatch.setattr(Noting, "error", KeyboardInterrupt)
    with pytest.warns(UserWarning, match="interrupted: 0 of 24 points"):
        part = random_plane(Noting(), None, data(20), resolution=5, progress=False)
    assert part.done.sum() == 1 and threading.active_count() == running and torch.get_num_threads() == 3


def test_a_crew_that_is_left_early_stops(three_threads):
    evaluation = Evaluation(mlp(0), [mlp(0)], data(20))
    evaluation.own()
    span = PlaneSpan.through(*(mlp(seed).state_dict() for seed in (1, 2, 3)))
    points = Workers(evaluation, span, lambda i: (i / 1e6, 0.0))(range(10**6))
    i, score = next(points)
    direct = evaluate(mlp(0), span(i / 1e6, 0.0), data(20))["data"]
    assert score["data"].loss == pytest.approx(direct.loss, rel=1e-5)
    before = threading.active_count()
    points.close()
    assert threading.active_count() < before


# ---- what was given stays


def test_networks_of_the_caller_keep_their_forward():
    model = mlp(0)
    random_plane(model, None, data(20), resolution=5, progress=False)
    assert all("forward" not in vars(module) for module in model.modules())
    assert lmc.landscape.evaluate(model, None, data(20))["data"].count == 40
