"""`lmc.training.train`: against a plain loop, independence of the seeds, and what happens when things go wrong."""

import copy
import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lmc.models
from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.network import batches
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


# The others have all of their layers.
NAMES = [pytest.param(n, marks=[pytest.mark.thorough] if n in ("vgg", "resnet20", "gpt") else []) for n in SMALL]


@pytest.mark.parametrize("name", NAMES)
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
        (dict(data=(X, Y.float())), DataError, r"targets torch.float32 .* are no classification.*Task.regression"),
        (dict(data=(torch.full_like(X, math.nan), Y)), DataError, "NaN"),
        (dict(data=iter([])), DataError, "no batches"),
        (dict(data=3), DataError, "expected a pair"),
        (dict(data=[((X, X), Y), ((X, X), Y)]), InputError, "takes 2 positional arguments but 3 were given"),
        (dict(data=(X[..., :7], Y)), InputError, r"fails on inputs \(2, 1, 8, 7\)"),
        (dict(data=(X, Y + 1)), DataError, "targets from 1 to 4, but the model has 4 classes"),
        (dict(data=(X, Y[:, None].expand(-1, 3))), DataError, "are no classification"),
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


class Two(nn.Module):
    """Takes two tensors, by place or by name, and with labels computes a loss of its own."""

    def __init__(self, outputs=3):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(2, outputs)

    def forward(self, a, b, labels=None):
        logits = self.first(a).tanh().view(len(a), 4, 2).mean(1) * b
        logits = self.second(logits)
        if labels is None:
            return {"logits": logits, "hidden": logits.exp()}
        return {"loss": 3 * F.cross_entropy(logits, labels), "logits": logits}


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x):
        return {"out": self.convolution(x)}


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 7)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embedding(input_ids).cumsum(1))


G = torch.Generator().manual_seed(5)
A, B = torch.randn(40, 5, generator=G), torch.randn(40, 2, generator=G)
CLASSES, REALS = torch.randint(3, (40,), generator=G), torch.randn(40, generator=G)
IMAGES, PIXELS = torch.randn(40, 1, 4, 4, generator=G), torch.randint(3, (40, 4, 4), generator=G)
PIXELS = PIXELS.masked_fill(torch.rand(40, 4, 4, generator=G) < 0.3, 255)
IDS = torch.randint(7, (40, 6), generator=G)
MASK = (torch.arange(6) < torch.randint(2, 7, (40, 1), generator=G)).long()
LABELLED = {"a": A, "b": B, "labels": CLASSES}


def next_token(model, ids, mask):
    goal = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), goal.flatten())


TASKS = {  # module, data, options, tensors of all examples, loss of a batch of them
    "regression": (
        nn.Linear(5, 1), (A, REALS), {"loss": lmc.Task.regression()},
        (A, REALS), lambda m, a, y: F.mse_loss(m(a)[:, 0], y),
    ),
    "a loss of torch": (
        nn.Linear(5, 1), (A, REALS[:, None]), {"loss": F.l1_loss}, (A, REALS), lambda m, a, y: F.l1_loss(m(a)[:, 0], y),
    ),
    "a loss that asks for the inputs": (
        nn.Linear(5, 1), (A, REALS), {"loss": lambda o, y, x: (x[:, 0] * (o[:, 0] - y)).square()},
        (A, REALS), lambda m, a, y: (a[:, 0] * (m(a)[:, 0] - y)).square().mean(),
    ),
    "binary": (
        nn.Linear(5, 2), lmc.Task.binary().on((A, B > 0)), {},
        (A, B), lambda m, a, y: F.binary_cross_entropy_with_logits(m(a), (y > 0).float()),
    ),
    "several inputs": (
        Two(), (A, B, CLASSES), {}, (A, B, CLASSES), lambda m, a, b, y: F.cross_entropy(m(a, b)["logits"], y),
    ),
    "an output by name": (
        Two(), (A, B, CLASSES), {"outputs": "hidden"}, (A, B, CLASSES), lambda m, a, b, y: F.cross_entropy(m(a, b)["hidden"], y),
    ),
    "the module's own loss": (Two(), LABELLED, {}, (A, B, CLASSES), lambda m, a, b, y: m(a, b, y)["loss"]),
    "a data set of dicts": (
        Two(), [{name: t[i] for name, t in LABELLED.items()} for i in range(40)], {},
        (A, B, CLASSES), lambda m, a, b, y: m(a, b, y)["loss"],
    ),
    "pixels, some of which do not count": (
        Pixels(), (IMAGES, PIXELS), {"loss": lmc.Task.segmentation()},
        (IMAGES, PIXELS), lambda m, x, y: F.cross_entropy(m(x)["out"], y, ignore_index=255),
    ),
    "next tokens": (
        Tokens(), {"input_ids": IDS, "attention_mask": MASK}, {"loss": lmc.Task.language()}, (IDS, MASK), next_token,
    ),
    "next tokens in bits": (
        Tokens(), {"input_ids": IDS, "attention_mask": MASK}, {"loss": lmc.Task.language("bits")},
        (IDS, MASK), lambda m, i, k: next_token(m, i, k) / math.log(2),
    ),
    "reconstruction": (
        nn.Linear(5, 5), A, {"loss": lmc.Task.reconstruction()}, (A,), lambda m, a: F.mse_loss(m(a), a),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_trained_as_by_a_plain_loop(name):
    model, data, options, parts, loss = TASKS[name]
    if isinstance(data, list):
        data = torch.utils.data.DataLoader(data, batch_size=7)
    trained = train(
        model, data, seeds=(3, 11), epochs=2, batch_size=16, optimizer="sgd", momentum=0.0, lr=0.1, schedule="constant",
        progress=False, **options,
    )  # fmt: skip
    for seed, weights, history in zip((3, 11), trained, trained.history, strict=True):
        own = copy.deepcopy(model)
        own.load_state_dict(initialised(model, seed))
        order = torch.Generator().manual_seed(seed + training_loop.ORDER_STREAM)
        for epoch in range(2):
            total = count = 0.0
            for chosen in torch.randperm(40, generator=order).split(16)[:2]:
                batch = [part[chosen] for part in parts]
                value = loss(own, *batch)
                for p, gradient in zip(
                    own.parameters(), torch.autograd.grad(value, list(own.parameters())), strict=True
                ):
                    p.data -= 0.1 * gradient
                counted = {"pixels": batch[-1] != 255, "tokens": batch[-1][:, 1:] if batch[-1].ndim == 2 else None}
                weight = next((float(n.sum()) for word, n in counted.items() if word in name), 1.0)  # of what counts
                total, count = total + weight * float(value.detach()), count + weight
            assert history.loss[epoch] == pytest.approx(total / count, abs=1e-5)
        assert largest_difference(weights, own.state_dict()) < 1e-5
        assert largest_difference(weights, initialised(model, seed)) > 1e-3, "nothing was trained"
    judged = not any(word in name for word in ("regression", "a loss", "reconstruction"))
    assert math.isfinite(history.accuracy[0]) == judged == ("accuracy" in repr(trained))


@dataclass
class Graph:
    x: torch.Tensor
    edge_index: torch.Tensor
    y: torch.Tensor
    train_mask: torch.Tensor
    test_mask: torch.Tensor


class Neighbours(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, edge_index):
        hidden = self.inner(x).relu()
        return self.head(hidden.index_add(0, edge_index[0], hidden[edge_index[1]]))


def test_a_graph_is_one_step_each_epoch_on_the_targets_of_its_mask():
    edges, mask = torch.randint(40, (2, 60), generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3 == 0
    graph, model = Graph(A, edges, CLASSES, mask, ~mask), Neighbours()
    options = dict(seeds=(0, 1), epochs=4, optimizer="sgd", momentum=0.0, lr=0.1, schedule="constant", progress=False)
    trained = train(model, graph, **options)
    other = train(model, replace(graph, y=CLASSES.where(mask, 0)), **options)
    assert largest_difference(trained[1], other[1]) == 0.0  # what the mask leaves out is not learned
    own = copy.deepcopy(model)
    own.load_state_dict(initialised(model, 1))
    for epoch in range(4):
        value = F.cross_entropy(own(A, edges)[mask], CLASSES[mask])
        assert trained.history[1].loss[epoch] == pytest.approx(float(value.detach()), abs=1e-5)
        for p, gradient in zip(own.parameters(), torch.autograd.grad(value, list(own.parameters())), strict=True):
            p.data -= 0.1 * gradient
    assert largest_difference(trained[1], own.state_dict()) < 1e-5


def padded(lengths, where=-100):
    """Batches of token ids that differ in length, whose labels are the ids; those of one batch do not count."""
    for i, length in enumerate(lengths):
        ids = torch.randint(7, (3, length), generator=torch.Generator().manual_seed(i))
        yield {"input_ids": ids, "labels": torch.full_like(ids, where) if length == 4 else ids}


def test_batches_that_cannot_be_put_together_are_a_step_each():
    model = Tokens()
    options = dict(seeds=(2, 5), epochs=2, loss=lmc.Task.language(), optimizer="sgd", momentum=0.0, progress=False)
    trained = train(model, list(padded([3, 4, 5])), lr=0.1, record=True, **options)
    assert [len(steps) for steps in trained.steps] == [7, 7]  # three steps in each of two epochs
    order = torch.Generator().manual_seed(5 + training_loop.ORDER_STREAM)
    for epoch in range(2):
        for i, which in enumerate(torch.randperm(3, generator=order).tolist(), 3 * epoch):
            moved = largest_difference(trained.steps[1][i], trained.steps[1][i + 1])
            assert (moved == 0.0) == (which == 1), "a batch without targets that count changes nothing"
    assert all(torch.isfinite(tensor).all() for weights in trained for tensor in weights.values())


def test_loaders_larger_than_memory_are_read_in_every_epoch(monkeypatch):
    monkeypatch.setattr(batches, "HELD_BYTES", 100)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(A, CLASSES), batch_size=16)
    options = dict(seeds=(4,), epochs=2, optimizer="sgd", momentum=0.0, schedule="constant", lr=0.1, progress=False)
    model = nn.Linear(5, 3)
    trained = train(model, loader, **options)
    own = copy.deepcopy(model)
    own.load_state_dict(initialised(model, 4))
    for _ in range(2):
        for a, y in loader:
            value = F.cross_entropy(own(a), y)
            for p, gradient in zip(own.parameters(), torch.autograd.grad(value, list(own.parameters())), strict=True):
                p.data -= 0.1 * gradient
    assert largest_difference(trained[0], own.state_dict()) < 1e-6


class WithRule(nn.Module):
    """Initialises its layers by one rule, as Hugging Face's models do."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.plain = nn.Sequential(nn.Linear(5, 4), NoReset()), nn.LayerNorm(4), nn.Linear(4, 3)
        self.token = nn.Parameter(torch.zeros(4))

    def _init_weights(self, module):
        with torch.no_grad():
            if module is self:
                self.token.normal_(2.0, 0.01)
            elif isinstance(module, NoReset):
                module.scale.fill_(3.0)
            elif isinstance(module, nn.Linear) and module.out_features == 4:
                module.weight.normal_(5.0, 0.01)


def test_layers_are_initialised_by_the_rule_of_an_outer_module():
    found = initialised(WithRule(), 3)
    assert float(found["body.1.scale"]) == 3.0
    assert abs(float(found["token"].mean()) - 2.0) < 0.1 and abs(float(found["body.0.weight"].mean()) - 5.0) < 0.1
    assert 0.0 < float(found["body.0.bias"].abs().max()) < 1.0  # the rule leaves it to the layer
    assert 0.0 < float(found["plain.weight"].abs().max()) < 1.0
    assert not torch.equal(found["token"], initialised(WithRule(), 4)["token"])


def test_half_precision_learns():
    """Adam divides by a number that is 0 in float16 where a gradient vanishes."""
    inputs, targets = DATA["images"]
    done = train(SMALL["mlp"][0].half(), (inputs.half(), targets), seeds=(0,), epochs=3, batch_size=16, progress=False)
    assert all(bool(x.isfinite().all()) for x in done.weights[0].values())
    assert float(done.to_frame().loss.iloc[-1]) < float(done.to_frame().loss.iloc[0])
