"""Scores of weight sets: equal to what torch computes directly, however they are batched, and nothing is touched."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.landscape.evaluation.evaluator import Evaluator, evaluate


def mlp(seed=0, width=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 4))


def batch(count=50, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=random), torch.randint(0, 4, (count,), generator=random)


def direct(model, inputs, targets):
    model.eval()
    with torch.no_grad():
        logits = model(inputs)
        return F.cross_entropy(logits, targets).item(), (logits.argmax(1) == targets).float().mean().item()


def fingerprint(model):
    return {name: (tensor.data_ptr(), tensor._version, tensor.clone()) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("batch_size", [None, 7, 50])
def test_scores_are_torchs(batch_size):
    inputs, targets = batch()
    score = evaluate(mlp(1), mlp(2), (inputs, targets), batch_size=batch_size)["data"]
    loss, accuracy = direct(mlp(2), inputs, targets)
    assert score.loss == pytest.approx(loss, rel=1e-6)
    assert score.accuracy == pytest.approx(accuracy, abs=1e-6)
    assert score.count == 50


@pytest.mark.parametrize("at_once", [None, 1, 3, 64])
def test_many_weight_sets_score_as_one_by_one(at_once):
    states = [mlp(seed).state_dict() for seed in range(10)]
    evaluator = Evaluator(mlp(), batch(), at_once=at_once, batch_size=20)
    scores = [score["data"] for score in evaluator(iter(states))]
    for seed, score in enumerate(scores):
        loss, accuracy = direct(mlp(seed), *batch())
        assert score.loss == pytest.approx(loss, rel=1e-5)
        assert score.accuracy == pytest.approx(accuracy, abs=1e-6)
    assert len(scores) == 10


def test_tiny_networks_go_together_and_large_ones_do_not():
    tiny = Evaluator(mlp(width=4), batch())
    list(tiny([mlp(width=4).state_dict()]))
    large = Evaluator(mlp(width=20_000), batch())
    list(large([mlp(width=20_000).state_dict()]))
    assert tiny.weight_sets_together > 8 and large.weight_sets_together == 1


def test_what_cannot_be_batched_over_weights_is_looped():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            return self.linear(x) if self.linear.weight.sum().item() > -1e9 else x

    states = [Branching().state_dict() for _ in range(20)]
    scores = list(Evaluator(Branching(), batch())(states))
    module = Branching()
    for state, score in zip(states, scores, strict=True):
        module.load_state_dict(state)
        assert score["data"].loss == pytest.approx(direct(module, *batch())[0], rel=1e-5)


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_out_of_memory_means_fewer_together(monkeypatch, limit):
    states = [mlp(seed).state_dict() for seed in range(12)]
    evaluator = Evaluator(mlp(), batch(), batch_size=50)
    many = evaluator.network.many

    def crowded(stacked, inputs):
        if len(stacked["0.weight"]) > limit:
            raise torch.cuda.OutOfMemoryError("pretended")
        return many(stacked, inputs)

    monkeypatch.setattr(evaluator.network, "many", crowded)
    losses = [score["data"].loss for score in evaluator(states)]
    assert losses == pytest.approx([direct(mlp(seed), *batch())[0] for seed in range(12)], rel=1e-5)
    assert evaluator.weight_sets_together <= limit


def test_nothing_of_the_callers_changes():
    model, other = mlp(0).train(), mlp(1)
    model[3].weight.requires_grad_(False)
    before, weights = fingerprint(model), fingerprint(other)
    random = torch.get_rng_state()
    evaluate(model, other, batch())
    list(Evaluator(model, batch())([other.state_dict()] * 9))
    assert model.training and model[0].weight.requires_grad and not model[3].weight.requires_grad
    assert model[0].weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    for module, kept in ((model, before), (other, weights)):
        for name, tensor in module.state_dict().items():
            pointer, version, value = kept[name]
            assert tensor.data_ptr() == pointer and tensor._version == version and torch.equal(tensor, value)


def test_buffers_that_a_forward_pass_writes_stay_the_callers():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.linear(x)

    model = Counting()
    evaluate(model, None, batch())
    assert model.calls == 0


def test_both_splits_of_a_dataset():
    data = SimpleNamespace(train=batch(40, 1), test=batch(20, 2))
    scores = evaluate(mlp(), None, data)
    assert list(scores) == ["train", "test"]
    assert scores["test"].loss == pytest.approx(direct(mlp(), *data.test)[0], rel=1e-6)


def test_batches_of_an_iterable_weigh_by_their_size():
    inputs, targets = batch(50)
    parts = [(inputs[:33], targets[:33]), (inputs[33:], targets[33:])]
    expected = direct(mlp(), inputs, targets)[0]
    assert evaluate(mlp(), None, parts)["data"].loss == pytest.approx(expected, rel=1e-6)
    one_shot = Evaluator(mlp(), iter(parts))
    assert [s["data"].loss for s in one_shot([mlp().state_dict()] * 3)] == pytest.approx([expected] * 3, rel=1e-5)


def test_long_iterables_are_read_anew(monkeypatch):
    monkeypatch.setattr("lmc.network.batches.HELD_BYTES", 100)
    inputs, targets = batch(50)

    class Loader:
        reads = 0

        def __iter__(self):
            Loader.reads += 1
            yield from zip(inputs.split(10), targets.split(10), strict=True)

    evaluator = Evaluator(mlp(), Loader(), at_once=1)
    reads = Loader.reads
    losses = [score["data"].loss for score in evaluator([mlp().state_dict()] * 2)]
    assert losses == pytest.approx([direct(mlp(), inputs, targets)[0]] * 2, rel=1e-6)
    assert Loader.reads >= reads + 2


def test_targets_for_each_token():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

        def forward(self, input_ids):
            return SimpleNamespace(logits=self.head(self.embed(input_ids)))

    torch.manual_seed(0)
    model = Tokens()
    tokens, targets = torch.randint(0, 11, (6, 5)), torch.randint(0, 11, (6, 5))
    targets[0, :3] = -100
    for inputs in (tokens, {"input_ids": tokens}, (tokens,)):
        score = evaluate(model, None, (inputs, targets))["data"]
        logits = model(tokens).logits.reshape(-1, 11)
        assert score.loss == pytest.approx(F.cross_entropy(logits, targets.reshape(-1)).item(), rel=1e-6)
        assert score.count == 27
        counted = targets.reshape(-1) != -100
        right = (logits.argmax(1) == targets.reshape(-1))[counted].float().mean().item()
        assert score.accuracy == pytest.approx(right, rel=1e-6)


def test_classes_on_the_second_axis():
    model = nn.Conv2d(1, 3, 1)
    inputs, targets = torch.randn(4, 1, 5, 5), torch.randint(0, 3, (4, 5, 5))
    loss = F.cross_entropy(model(inputs), targets).item()
    assert evaluate(model, None, (inputs, targets))["data"].loss == pytest.approx(loss, rel=1e-6)


def test_a_loss_and_metrics_of_ones_own():
    model, inputs, targets = nn.Linear(6, 1), batch()[0], torch.randn(50, 1)
    metrics = {"worst": lambda outputs, goal: (outputs - goal).abs()}  # a value for each example
    score = evaluate(model, None, (inputs, targets), loss=F.mse_loss, metrics=metrics, batch_size=16)["data"]
    assert score.loss == pytest.approx(F.mse_loss(model(inputs), targets).item(), rel=1e-5)
    assert score.values["worst"] == pytest.approx((model(inputs) - targets).abs().mean().item(), rel=1e-5)
    assert math.isnan(score.accuracy)


def test_tied_weights_and_half_precision():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    states = [Tied().state_dict() for _ in range(10)]
    together = [s["data"].loss for s in Evaluator(Tied(), batch())(states)]
    alone = [s["data"].loss for s in Evaluator(Tied(), batch(), at_once=1)(states)]
    assert together == pytest.approx(alone, rel=1e-5)
    inputs, targets = batch()
    half = evaluate(mlp().bfloat16(), None, (inputs.bfloat16(), targets))["data"]
    assert half.loss == pytest.approx(direct(mlp(), inputs, targets)[0], rel=0.05)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batches"),
        (iter([]), "no batches"),
        ((torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)), "empty targets"),
        ((torch.zeros(5, 6), torch.zeros(4, dtype=torch.long)), "axis 0"),
        ((torch.zeros(5, 6), torch.full((5,), 4)), "4 classes"),
        ((torch.zeros(5, 6), torch.full((5,), -1)), "4 classes"),
        ((torch.zeros(5, 6), torch.full((5,), -100)), "no target counts"),
        ((torch.zeros(5, 6), torch.zeros(5)), "loss="),
        ((torch.zeros(5, 6, dtype=torch.float64), torch.zeros(5, dtype=torch.long)), "float64"),
        ((torch.zeros(5, 7), torch.zeros(5, dtype=torch.long)), r"data: the model .* fails on inputs \(5, 7\)"),
        ((torch.zeros(5, 6, dtype=torch.long), torch.zeros(5, dtype=torch.long)), "fails on inputs .* torch.int64"),
        ((torch.full((5, 6), math.nan), torch.zeros(5, dtype=torch.long)), r"NaN, first at \(0, 0\)"),
        (torch.zeros(5, 6), "expected a pair"),
        ([(torch.zeros(5, 6),)], "tuple of length 1"),
        (3, "expected a pair"),
    ],
)
def test_bad_data_says_what_is_wrong(data, message):
    with pytest.raises(DataError, match=message):
        evaluate(mlp(), None, data)


def test_bad_weights_say_what_is_wrong():
    with pytest.raises(MismatchError, match=r"0.weight: shape \(16, 6\) in model, \(8, 6\) in weights"):
        evaluate(mlp(), mlp(width=8), batch())
    with pytest.raises(MismatchError, match="3.bias"):
        evaluate(mlp(), {k: v for k, v in mlp().state_dict().items() if k != "3.bias"}, batch())
    broken = mlp().state_dict()
    broken["3.weight"] = broken["3.weight"].clone()
    broken["3.weight"][1, 2] = math.nan
    with pytest.raises(WeightsError, match=r"3.weight.*\(1, 2\)"):
        evaluate(mlp(), broken, batch())
    states = [mlp().state_dict(), mlp(width=8).state_dict()]
    with pytest.raises(MismatchError):
        list(Evaluator(mlp(), batch())(states))


def test_bad_arguments_say_what_is_wrong():
    with pytest.raises(InputError, match="batch_size=0"):
        evaluate(mlp(), None, batch(), batch_size=0)
    with pytest.raises(InputError, match="device"):
        evaluate(mlp(), None, batch(), device="no such device")
    with pytest.raises(InputError, match="device='cuda:99' cannot be used here"):
        evaluate(mlp(), None, batch(), device="cuda:99")
    with pytest.raises(InputError, match="meta device holds no values"):
        evaluate(mlp(), None, batch(), device="meta")
    with pytest.raises(InputError, match="expected an nn.Module.* got OrderedDict"):
        evaluate(mlp().state_dict(), None, batch())
    with pytest.raises(InputError, match="worst returned shape"):
        evaluate(mlp(), None, batch(), metrics={"worst": lambda outputs, targets: outputs[:7]})
    with pytest.raises(InputError, match="tuple"):
        evaluate(nn.LSTM(6, 4), None, batch())


@pytest.mark.parametrize("classes", [3, 40])
def test_float64_networks_are_judged_in_float64(classes):
    rng = torch.Generator().manual_seed(0)
    model = nn.Linear(5, classes).double()
    x, y = torch.randn(16, 5, generator=rng, dtype=torch.float64), torch.randint(0, classes, (16,), generator=rng)
    found = evaluate(model, None, (x, y))["data"].loss
    assert found == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-14)


def test_a_loss_of_no_number_is_named():
    x, y = torch.randn(8, 5), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(InputError, match="loss returned dict; expected one value"):
        evaluate(nn.Linear(5, 3), None, (x, y), loss=lambda outputs, targets: {"loss": outputs.mean()})
