"""`lmc.training.train`: against a plain loop, independence of the seeds, and what happens when things go wrong."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lmc.models
from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.training import loop as training_loop
from lmc.training import train
from lmc.training.run import initialised

pytestmark = pytest.mark.filterwarnings("error")


def images(count=96, seed=0):
    """Separable images: each class has its own pattern, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(4, 1, 8, 8, generator=generator)
    targets = torch.arange(count) % 4
    return patterns[targets] + 0.3 * torch.randn(count, 1, 8, 8, generator=generator), targets


def sentences(count=64, length=6, vocabulary=5):
    start = torch.arange(count)[:, None]
    tokens = (start + torch.arange(length + 1)) % vocabulary
    return tokens[:, :-1], tokens[:, 1:]


def plain_loop(model, data, seed, epochs, batch_size, make_optimizer, lr):
    """What `train` claims to compute, as one would write it for a single seed."""
    inputs, targets = data
    model = copy.deepcopy(model).train()
    own = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    for name, tensor in initialised(model, seed).items():
        own[name].data.copy_(tensor)
    optimizer = make_optimizer(model.parameters())
    order = torch.Generator().manual_seed(seed + training_loop.ORDER_STREAM)
    steps = len(inputs) // batch_size
    for epoch in range(epochs):
        permutation = torch.randperm(len(inputs), generator=order)
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = lr / 2 * (1 + math.cos(math.pi * (epoch * steps + i) / (epochs * steps)))
            chosen = permutation[i * batch_size : (i + 1) * batch_size]
            logits = model(inputs[chosen])
            loss = F.cross_entropy(logits.flatten(0, -2), targets[chosen].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def largest_difference(a, b):
    assert list(a) == list(b)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


SMALL = {
    "mlp": (lmc.models.mlp(64, [12, 8], 4), "images"),
    "mlp with batch norm": (lmc.models.mlp(64, [12], 4, norm="batch", activation="gelu"), "images"),
    "cnn": (lmc.models.cnn((4, 6), classes=4), "images"),
    "vgg": (lmc.models.vgg(1 / 16, image=(1, 8, 8), classes=4), "images"),
    "resnet20": (lmc.models.resnet20(1, norm="layer", in_channels=1, classes=4), "images"),
    "vit": (lmc.models.vit(dim=8, depth=1, heads=2, classes=4), "images"),
    "gpt": (lmc.models.gpt(5, 6, dim=8, depth=1, heads=2), "sentences"),
    "gpt, tied and fused": (lmc.models.gpt(5, 6, dim=8, depth=1, heads=2, tied=True, fused_qkv=True), "sentences"),
}
DATA = {"images": images(), "sentences": sentences()}


@pytest.mark.parametrize("name", SMALL)
def test_equals_a_plain_loop_over_the_seeds(name):
    # SGD, since Adam divides by gradients that may be pure rounding error
    model, data = SMALL[name][0], DATA[SMALL[name][1]]
    options = dict(epochs=1 if name in ("resnet20", "vgg") else 2, batch_size=32, lr=0.05)
    trained = train(model, data, seeds=(3, 11), optimizer="sgd", momentum=0.9, progress=False, **options)
    for seed, weights in zip((3, 11), trained, strict=True):
        expected = plain_loop(
            model, data, seed, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), **options
        )
        assert largest_difference(weights, expected) < 1e-5
        moved = largest_difference(weights, model.state_dict())
        assert moved > 1e-2, "nothing was trained"


@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        ("adam", lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.5, weight_decay=0.1)),
    ],
)
def test_optimizers_are_torchs_own(optimizer, reference):
    model, data = SMALL["mlp"][0].double(), (DATA["images"][0].double(), DATA["images"][1])
    options = dict(epochs=3, batch_size=40, lr=1e-3)  # 40 does not divide 96: the last batch is left out
    trained = train(
        model, data, seeds=(2,), optimizer=optimizer, momentum=0.5, weight_decay=0.1, progress=False, **options
    )
    model = SMALL["mlp"][0]
    assert largest_difference(trained[0], plain_loop(model, data, 2, make_optimizer=reference, **options)) < 1e-10
    model.float()


def test_a_seed_does_not_depend_on_its_company():
    model, data = SMALL["mlp with batch norm"][0], DATA["images"]
    options = dict(epochs=1, optimizer="sgd", lr=0.05, batch_size=32, progress=False)
    alone = train(model, data, seeds=(5,), **options)
    among = train(model, data, seeds=(1, 5, 9), **options)
    in_parts = train(model, data, seeds=(9, 1, 5), together=2, **options)
    assert largest_difference(alone[0], among[1]) < 1e-5
    assert largest_difference(alone[0], in_parts[2]) < 1e-5
    assert largest_difference(among[0], among[1]) > 1e-2


def test_same_call_same_weights():
    first, second = (train(SMALL["cnn"][0], DATA["images"], seeds=(0, 1), epochs=1, progress=False) for _ in range(2))
    assert all(torch.equal(first[i][name], second[i][name]) for i in (0, 1) for name in first[i])


def test_random_layers_train_one_by_one_and_keep_to_their_seed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    options = dict(epochs=2, batch_size=32, progress=False)
    alone = train(model, DATA["images"], seeds=(7,), **options)
    among = train(model, DATA["images"], seeds=(0, 7), **options)
    assert largest_difference(alone[0], among[1]) == 0.0
    without = train(copy.deepcopy(model).eval()[:3].append(model[4]), DATA["images"], seeds=(7,), **options)
    assert float((without[0]["3.weight"] - alone[0]["4.weight"]).abs().max()) > 1e-3, "dropout did nothing"


def test_nothing_of_the_caller_changes():
    model = lmc.models.mlp(64, [8], 4, norm="batch").eval()
    before, random_state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    trained = train(model, DATA["images"], seeds=(0, 1), epochs=1, progress=False)
    assert largest_difference(model.state_dict(), before) == 0.0
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert not any(tensor.requires_grad for tensor in trained[0].values())
    model.load_state_dict(trained[0])


def test_frozen_parameters_stay_where_they_start():
    model = lmc.models.mlp(64, [8], 4)
    model.fc1.requires_grad_(False)
    trained = train(model, DATA["images"], seeds=(4,), epochs=1, progress=False)
    start = initialised(model, 4)
    assert torch.equal(trained[0]["fc1.weight"], start["fc1.weight"])
    assert not torch.equal(trained[0]["head.weight"], start["head.weight"])


def test_given_init_and_kept_weights():
    model = lmc.models.mlp(64, [8], 4)
    start = initialised(model, 100)
    trained = train(model, DATA["images"], seeds=(0, 1), epochs=4, init=start, keep=[0, 2, 4], progress=False)
    for i in (0, 1):
        assert list(trained.trajectory[i]) == [0, 2, 4]
        assert largest_difference(trained.trajectory[i][0], start) == 0.0
        assert largest_difference(trained.trajectory[i][4], trained[i]) == 0.0
        assert largest_difference(trained.trajectory[i][2], trained[i]) > 0.0
    assert largest_difference(trained[0], trained[1]) > 1e-3, "the order of the data differs"
    assert list(train(model, DATA["images"], seeds=(0,), epochs=5, keep=2, progress=False).trajectory[0]) == [
        0,
        2,
        4,
        5,
    ]


def test_learns_and_reports():
    options = dict(epochs=15, lr=1e-2, batch_size=16, progress=False)
    trained = train(lmc.models.mlp(64, [16], 4), DATA["images"], seeds=(0, 1), **options)
    a, b = trained
    assert a is trained.weights[0] and b is trained[-1] and len(trained) == 2
    frame = trained.to_frame()
    assert len(frame) == 30 and list(frame.columns) == ["seed", "epoch", "loss", "accuracy"]
    for history in trained.history:
        assert history.loss[0] > 1.0 > 0.1 > history.loss[-1] and history.accuracy[-1] > 0.97
    assert "MLP" in repr(trained) and "seed 1" in repr(trained) and "adam 0.01" in repr(trained)


def test_batches_are_taken_too():
    inputs, targets = DATA["images"]
    batches = [(inputs[:50], targets[:50]), (inputs[50:], targets[50:])]
    model = SMALL["mlp"][0]
    whole, split = (train(model, data, seeds=(0,), epochs=1, progress=False) for data in ((inputs, targets), batches))
    assert largest_difference(whole[0], split[0]) == 0.0


def test_interrupt_returns_what_there_is(monkeypatch):
    model, data = lmc.models.mlp(64, [8], 4), DATA["images"]
    options = dict(epochs=4, batch_size=32, schedule="constant", progress=False)  # 3 steps an epoch
    rate, calls = training_loop._rate, itertools.count(1)

    def interrupting(*arguments):
        if next(calls) == 12 + 7:  # the seventh step of the second pair
            raise KeyboardInterrupt
        return rate(*arguments)

    monkeypatch.setattr(training_loop, "_rate", interrupting)
    with pytest.warns(UserWarning, match="interrupted"):
        trained = train(model, data, seeds=(0, 1, 2, 3, 4), together=2, **options)
    monkeypatch.undo()
    assert trained.interrupted and trained.seeds == (0, 1, 2, 3) and "interrupted" in repr(trained)
    assert [len(history.loss) for history in trained.history] == [4, 4, 2, 2]
    half = train(model, data, seeds=(2,), **(options | {"epochs": 2}))
    assert largest_difference(trained[2], half[0]) < 1e-4  # six steps were finished
    assert torch.isfinite(trained[3]["head.weight"]).all()


def test_divergence_is_named():
    with pytest.warns(UserWarning, match="seed 6 diverged"):
        train(SMALL["mlp"][0], DATA["images"], seeds=(6,), optimizer="sgd", lr=1e30, epochs=3, progress=False)


class NoReset(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.scale * x.flatten(1))


X, Y = DATA["images"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(data=(X[:0], Y[:0])), DataError, "empty targets"),
        (dict(data=(X, Y[:5])), DataError, "differ along axis 0"),
        (dict(data=(X, Y.float())), DataError, "targets are torch.float32"),
        (dict(data=(torch.full_like(X, math.nan), Y)), DataError, "NaN"),
        (dict(data=iter([])), DataError, "no batches"),
        (dict(data=3), DataError, "expected a pair"),
        (dict(data=[((X, X), Y), ((X, X), Y)]), DataError, "inputs are a tuple"),
        (dict(data=(X[..., :7], Y)), InputError, r"fails on inputs \(96, 1, 8, 7\)"),
        (dict(data=(X, Y + 1)), InputError, "targets go from 1 to 4, the model has 4 classes"),
        (dict(data=(X, Y[:, None].expand(-1, 3))), InputError, "expected logits"),
        (dict(model=NoReset()), InputError, "layer model .NoReset. has parameters and no reset_parameters"),
        (dict(model=nn.Flatten()), InputError, "no parameters"),
        (dict(seeds=()), InputError, "seeds"),
        (dict(seeds=3), InputError, r"for example range\(3\)"),
        (dict(model="mlp"), InputError, "expected an nn.Module, got str"),
        (dict(device="no such device"), InputError, "cannot be used here"),
        (dict(device="meta"), InputError, "holds no values"),
        (
            dict(init={k: v * math.nan for k, v in SMALL["mlp"][0].state_dict().items()}),
            WeightsError,
            "fc1.weight of init",
        ),
        (dict(seeds=(1, 1)), InputError, "same seed twice"),
        (dict(seeds=(-1,)), InputError, "seeds"),
        (dict(optimizer="lbfgs"), InputError, "optimizer='lbfgs': expected one of adam"),
        (dict(schedule="step"), InputError, "schedule"),
        (dict(epochs=0), InputError, "epochs=0"),
        (dict(batch_size=0), InputError, "batch_size=0"),
        (dict(lr=math.inf), InputError, "lr=inf"),
        (dict(keep=[0, 9]), InputError, r"keep: \[9\] outside 0 to 1"),
        (dict(keep=0), InputError, "keep=0"),
        (dict(init=lmc.models.mlp(64, [12, 7], 4)), MismatchError, "fc2.weight"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = dict(model=SMALL["mlp"][0], data=DATA["images"], epochs=1, progress=False) | changes
    with pytest.raises(error, match=message):
        train(arguments.pop("model"), arguments.pop("data"), **arguments)


class BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 3, batch_first=True, bidirectional=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_cannot_be_replayed_is_trained_one_by_one():
    x, y = torch.randn(8, 3, 4), torch.arange(8) % 2
    assert len(train(BothWays(), (x, y), seeds=range(2), epochs=1, batch_size=4, progress=False)) == 2
