"""Tasks: any form of data, outputs and losses gives what torch computes on all the examples at once, at any batch size."""

import copy
import functools
import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lmc.errors import DataError, InputError
from lmc.landscape.curvature import curvature
from lmc.landscape.curves.curve import bezier_curve
from lmc.landscape.evaluation.evaluator import Evaluator, evaluate
from lmc.landscape.path import loss_path
from lmc.landscape.planes.plane import loss_plane, random_plane, trajectory_plane
from lmc.landscape.similarity import similarity
from lmc.landscape.simplices.simplex import loss_simplex, loss_triangle
from lmc.landscape.variance import variance_ratios
from lmc.network.batchnorm import recalibrate_batchnorm
from lmc.network.inputs import input_batches
from lmc.network.task import Task

RANDOM = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 6, generator=RANDOM), torch.randint(0, 4, (24,), generator=RANDOM)
IMAGES, MASKS = torch.randn(10, 3, 6, 6, generator=RANDOM), torch.randint(0, 4, (10, 6, 6), generator=RANDOM)
MASKS[0], MASKS[1, :5] = 255, 255
SIZES = (None, 7, 3, 1)


def linear(inputs=6, outputs=4, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


def conv(seed=0):
    torch.manual_seed(seed)
    return nn.Conv2d(3, 4, 3, padding=1)


class Returning(nn.Module):
    """A network whose result has a certain form."""

    def __init__(self, form, inputs=6, outputs=4, seed=0):
        super().__init__()
        self.layer, self.form = linear(inputs, outputs, seed), form

    def forward(self, x):
        return self.form(self.layer(x))


@dataclass
class Sample:
    sample: torch.Tensor


FORMS = {
    "tuple": (lambda out: (out, None), lambda result: result[0]),
    "dict": (lambda out: {"x": out}, lambda result: result["x"]),
    "namespace": (lambda out: SimpleNamespace(sample=out), lambda result: result.sample),
    "dataclass": (Sample, lambda result: result.sample),
    "two heads": (lambda out: (out, {"aux": out[:, :1]}), lambda result: result[0]),
    "logits and loss": (lambda out: (out, out.square().mean()), lambda result: result[0]),
}


# ---- outputs of any form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [None, 7])
def test_a_loss_is_given_what_the_module_returns_or_the_outputs_chosen(form, size):
    make, pick = FORMS[form]
    model = Returning(make)
    want = F.cross_entropy(model.layer(X), Y).item()
    own = evaluate(model, None, (X, Y), loss=lambda o, t: F.cross_entropy(pick(o), t), batch_size=size)["data"]
    assert own.loss == pytest.approx(want, rel=1e-5)
    chosen = evaluate(model, None, (X, Y), outputs=pick, batch_size=size)["data"]
    assert chosen.loss == pytest.approx(want, rel=1e-5)
    assert chosen.accuracy == pytest.approx((model.layer(X).argmax(1) == Y).float().mean().item())


@pytest.mark.parametrize("outputs", ["x", 0])
def test_outputs_are_chosen_by_key_or_position(outputs):
    model = Returning(FORMS["dict"][0])
    assert evaluate(model, None, (X, Y), outputs=outputs)["data"].loss == pytest.approx(
        F.cross_entropy(model.layer(X), Y).item()
    )
    with pytest.raises(InputError, match="outputs='y'.*no such entry"):
        evaluate(model, None, (X, Y), outputs="y")
    with pytest.raises(InputError, match="outputs="):
        evaluate(model, None, (X, Y))


# ---- losses of any signature, whatever the batch size

WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5])
SCALED = {
    "torch's function": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "class weights in a function": lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS),
    "one value an example": functools.partial(F.cross_entropy, reduction="none"),
    "sum": lambda o, t: F.cross_entropy(o, t, reduction="sum"),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "contrastive": lambda o, t: ((o[:, None] - o[None]) ** 2).mean(),
    "the inputs too": lambda o, t, x: F.cross_entropy(o, t) + x.square().mean(),
}


@pytest.mark.parametrize("name", SCALED)
def test_values_do_not_depend_on_the_batch_size(name):
    loss, model = SCALED[name], linear()
    want = loss(*((model(X), Y, X) if name == "the inputs too" else (model(X), Y))).mean().item()
    for size in SIZES:
        assert evaluate(model, None, (X, Y), loss=loss, batch_size=size)["data"].loss == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(ignore_index=255),
        functools.partial(F.cross_entropy, ignore_index=255),
        lambda o, t: F.cross_entropy(o, t, ignore_index=255),
        lambda o, t: F.cross_entropy(o, t, ignore_index=255, reduction="none").sum() / (t != 255).sum(),
        Task.segmentation(),
        Task(ignore=255),
    ],
)
@pytest.mark.parametrize("size", [None, 3, 1])
def test_ignored_targets_do_not_count(loss, size):
    model = conv()
    found = evaluate(model, None, (IMAGES, MASKS), loss=loss, batch_size=size)["data"]
    assert found.loss == pytest.approx(F.cross_entropy(model(IMAGES), MASKS, ignore_index=255).item(), rel=1e-5)
    if isinstance(loss, Task):
        counted = MASKS != 255
        right = (model(IMAGES).argmax(1) == MASKS)[counted].float().mean().item()
        assert found.accuracy == pytest.approx(right) and found.count == int(counted.sum())


@pytest.mark.parametrize("size", [3, 1])
def test_beyond_memory_means_of_batches_are_weighted_by_what_counts(monkeypatch, size):
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MEASURED_BYTES", 0)
    model, masks = conv(), MASKS.masked_fill(MASKS == 255, -100)
    want = F.cross_entropy(model(IMAGES), masks).item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss in (F.cross_entropy, lambda o, t: F.cross_entropy(o, t), functools.partial(F.cross_entropy)):
            found = evaluate(model, None, (IMAGES, masks), loss=loss, batch_size=size)["data"].loss
            assert found == pytest.approx(want, rel=1e-5)
        total = lambda o, t: F.cross_entropy(o, t, reduction="sum")  # noqa: E731
        found = evaluate(model, None, (IMAGES, masks), loss=total, batch_size=5)["data"].loss
        assert found == pytest.approx(total(model(IMAGES), masks).item(), rel=1e-5)


def test_beyond_memory_a_value_that_depends_on_the_batches_is_warned_of(monkeypatch):
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MEASURED_BYTES", 0)
    with pytest.warns(UserWarning, match="depends on how the data are batched"):
        evaluate(linear(), None, (X, Y), loss=SCALED["contrastive"], batch_size=8)


@pytest.mark.parametrize("room", [64, 30, 1])
def test_outputs_that_are_kept_to_be_measured_at_once_have_their_share_of_memory(monkeypatch, room):
    monkeypatch.setattr("lmc.landscape.evaluation.evaluator.MEASURED_BYTES", room * 24 * 4 * 4)
    evaluator = Evaluator(linear(), (X, Y), loss=F.cross_entropy)
    losses = [score["data"].loss for score in evaluator([linear(seed=seed).state_dict() for seed in range(70)])]
    assert evaluator.weight_sets_together == room
    assert losses == pytest.approx([F.cross_entropy(linear(seed=seed)(X), Y).item() for seed in range(70)], rel=1e-5)


# ---- ready-made tasks


def test_regression_is_in_its_own_unit_and_takes_targets_without_a_last_axis():
    model, targets = linear(6, 1), torch.randn(24, generator=RANDOM)
    path = loss_path(model, linear(6, 1, 1), linear(6, 1, 2), (X, targets), alphas=3, loss=Task.regression())
    want = F.mse_loss(linear(6, 1, 1)(X)[:, 0], targets).item()
    assert path.losses["data"][0] == pytest.approx(want, rel=1e-5) and path.unit == "squared error"
    assert "accuracy" not in path.values["data"]
    assert loss_path(model, model, model, (X, targets[:, None]), alphas=3, loss=nn.MSELoss()).unit == "squared error"
    assert loss_path(model, model, model, (X, targets[:, None]), alphas=3, loss=lambda o, t: (o - t).abs()).unit == ""
    with pytest.raises(DataError, match="expected the same shape"):
        evaluate(linear(6, 3), None, (X, targets), loss=Task.regression())


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        (F.mse_loss, lambda o, y: (o - y).square().mean()),
        (nn.L1Loss(), lambda o, y: (o - y).abs().mean()),
        (functools.partial(F.huber_loss, delta=0.5), lambda o, y: F.huber_loss(o, y, delta=0.5)),
        (nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits),
        (F.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits),
        (nn.PoissonNLLLoss(), F.poisson_nll_loss),
        (F.soft_margin_loss, F.soft_margin_loss),
        (nn.HingeEmbeddingLoss(), F.hinge_embedding_loss),
    ],
)
@pytest.mark.parametrize("last", ["outputs", "targets"])
def test_torchs_losses_do_not_spread_a_last_axis_over_the_examples(loss, want, last):
    goal = torch.randint(0, 2, (24,), generator=RANDOM)
    model = linear(6, 1) if last == "outputs" else nn.Sequential(linear(6, 1), nn.Flatten(0))
    found = evaluate(model, None, (X, goal if last == "outputs" else goal[:, None]), loss=loss)["data"].loss
    assert found == pytest.approx(want(model(X).detach().reshape(-1), goal.float()).item(), rel=1e-5)


def test_losses_of_torch_whose_third_argument_is_no_input_are_refused():
    with pytest.raises(InputError, match="GaussianNLLLoss takes three arguments of its own"):
        evaluate(linear(6, 1), None, (X.abs(), X[:, :1]), loss=nn.GaussianNLLLoss())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_classes_are_integers_of_any_size(dtype):
    for loss in (None, nn.CrossEntropyLoss(), F.cross_entropy, functools.partial(F.cross_entropy, label_smoothing=0.1)):
        assert evaluate(linear(), None, (X, Y.to(dtype)), loss=loss) == evaluate(linear(), None, (X, Y), loss=loss)


@pytest.mark.parametrize("size", SIZES)
def test_classes_stand_where_the_task_says_when_shapes_leave_it_open(size):
    """Six classes of 6 x 6 pixels, and six classes at each of six positions: both axes fit the targets."""
    torch.manual_seed(0)
    maps, pixels = nn.Conv2d(3, 6, 1), MASKS.clamp(max=5)
    firsts = {"axis=1": Task.classes(axis=1), "segmentation": Task.segmentation(), "torch's": nn.CrossEntropyLoss()}
    lines, tokens = nn.Conv1d(3, 6, 1), pixels[:, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model, inputs, goal in ((maps, IMAGES, pixels), (lines, IMAGES[:, :, 0], tokens)):
            for loss in firsts.values():
                score = evaluate(model, None, (inputs, goal), loss=loss, batch_size=size)["data"]
                assert score.loss == pytest.approx(F.cross_entropy(model(inputs), goal).item(), rel=1e-5)
                assert score.accuracy == pytest.approx((model(inputs).argmax(1) == goal).float().mean().item())
            last = evaluate(model, None, (inputs, goal), loss=Task.classes(axis=-1), batch_size=size)["data"].loss
            assert last == pytest.approx(F.cross_entropy(model(inputs).movedim(-1, 1), goal).item(), rel=1e-5)
    for model, inputs, goal, axis in ((maps, IMAGES, pixels, 1), (lines, IMAGES[:, :, 0], tokens, -1)):
        with pytest.warns(UserWarning, match="may stand along axis 1 or along the last"):
            found = evaluate(model, None, (inputs, goal), batch_size=size)
        assert found == evaluate(model, None, (inputs, goal), loss=Task.classes(axis=axis), batch_size=size)


def test_targets_that_a_loss_reads_as_numbers_have_no_accuracy():
    shares = torch.tensor([0.1, 0.5, 0.9, 0.95])

    def quantiles(outputs, targets):
        beyond = targets[:, None] - outputs
        return torch.maximum(shares * beyond, (shares - 1) * beyond).mean()

    def one_hot(outputs, targets):
        return -((torch.arange(4) == targets[:, None]) * outputs.log_softmax(1)).sum(1)

    def picked(outputs, targets):
        return -outputs.log_softmax(1).gather(1, targets[:, None]).mean()

    assert "accuracy" not in evaluate(linear(), None, (X, Y), loss=quantiles)["data"].values
    right = evaluate(linear(), None, (X, Y))["data"].accuracy
    for loss in (one_hot, picked, lambda outputs, targets: F.cross_entropy(outputs, targets.long())):
        assert evaluate(linear(), None, (X, Y), loss=loss)["data"].accuracy == right


@pytest.mark.parametrize("labels", [1, 5])
def test_binary_and_multi_label(labels):
    model = linear(6, labels)
    goal = torch.randint(0, 2, (24, labels), generator=RANDOM)
    goal = goal[:, 0] if labels == 1 else goal
    found = evaluate(model, None, (X, goal), loss=Task.binary(), batch_size=5)["data"]
    outputs = model(X)[:, 0] if labels == 1 else model(X)
    assert found.loss == pytest.approx(F.binary_cross_entropy_with_logits(outputs, goal.float()).item(), rel=1e-5)
    assert found.accuracy == pytest.approx(((outputs > 0) == (goal > 0)).float().mean().item())


class Tokens(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))


IDS = torch.randint(0, 11, (6, 5), generator=RANDOM)
PADDED = {"input_ids": IDS, "attention_mask": (torch.arange(5) < torch.tensor([[5], [5], [3], [2], [5], [4]])).long()}


@pytest.mark.parametrize(
    "data", [IDS, PADDED, [PADDED], {**PADDED, "labels": IDS.masked_fill(PADDED["attention_mask"] == 0, -100)}]
)
@pytest.mark.parametrize("unit", ["nats", "bits"])
def test_language_models_predict_the_next_token(data, unit):
    model = Tokens()
    goal = IDS if data is IDS else IDS.masked_fill(PADDED["attention_mask"] == 0, -100)
    nats = F.cross_entropy(model(IDS).logits[:, :-1].reshape(-1, 11), goal[:, 1:].reshape(-1)).item()
    found = evaluate(model, None, data, loss=Task.language(unit), batch_size=2)["data"]
    assert found.loss == pytest.approx(nats / (math.log(2) if unit == "bits" else 1.0), rel=1e-5)
    assert found.values["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)


def test_labels_of_language_are_the_tokens_themselves():
    model = Tokens()
    whole = evaluate(model, None, IDS, loss=Task.language())["data"]
    assert evaluate(model, None, {"input_ids": IDS, "labels": IDS}, loss=Task.language())["data"] == whole
    for others in (torch.ones_like(IDS), IDS.roll(-1, 1)):  # a mask, and next tokens already
        with pytest.raises(DataError, match="tokens themselves as labels"):
            evaluate(model, None, [(IDS, others)], loss=Task.language())
        with pytest.raises(DataError, match="tokens themselves as labels"):
            evaluate(model, None, {"input_ids": IDS, "labels": others}, loss=Task.language())


@pytest.mark.parametrize("name", ["test", "val", "eval"])
def test_splits_of_a_mapping_may_be_tensors_alone(name):
    found = evaluate(Tokens(), None, Task.language().on({"train": IDS[:4], name: IDS}))
    assert found[name] == evaluate(Tokens(), None, IDS, loss=Task.language())["data"]
    calls = list(input_batches(Tokens(), {"train": IDS[:4], name: IDS}, 9))
    assert len(calls) == 1 and torch.equal(calls[0], IDS[:4])


def test_targets_may_have_an_axis_of_channels():
    model = nn.Conv2d(2, 3, 1)
    images, goal = torch.randn(4, 2, 5, 5, generator=RANDOM), torch.randint(0, 3, (4, 5, 5), generator=RANDOM)
    assert evaluate(model, None, (images, goal[:, None])) == evaluate(model, None, (images, goal))
    assert evaluate(linear(), None, (X, Y[:, None])) == evaluate(linear(), None, (X, Y))


def test_reconstruction_needs_no_targets():
    model = linear(6, 6)
    want = F.mse_loss(model(X), X).item()
    for data in (X, [X[:10], X[10:]], (X, Y), TensorDataset(X), DataLoader(TensorDataset(X), batch_size=5)):
        assert evaluate(model, None, data, loss=Task.reconstruction())["data"].loss == pytest.approx(want, rel=1e-5)


def test_data_that_carry_their_task_have_splits_that_do():
    parts = {"train": (X[:16], X[:16, 0]), "test": (X[16:], X[16:, 0])}
    model, task = linear(6, 1), Task.regression()
    for data in (parts, SimpleNamespace(**parts)):
        whole = evaluate(model, None, task.on(data))
        for name in ("train", "test"):
            alone = evaluate(model, None, getattr(task.on(data), name))["data"]
            assert alone.loss == whole[name].loss == evaluate(model, None, parts[name], loss=task)["data"].loss
    assert not hasattr(task.on((X, Y)), "train")


# ---- the module's own loss


class Own(nn.Module):
    """Like a model of Hugging Face: it takes labels, shifts them and computes its loss."""

    def __init__(self, form, seed=0):
        super().__init__()
        self.inner, self.form = Tokens(seed), form

    def forward(self, input_ids, labels=None):
        logits = self.inner(input_ids).logits
        if labels is None:
            return self.form(logits[:, -1:], None)
        return self.form(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


OWN = {
    "object": lambda logits, loss: SimpleNamespace(logits=logits, loss=loss),
    "dict": lambda logits, loss: {"loss": loss, "logits": logits},
    "tuple": lambda logits, loss: (logits, loss),
}


@pytest.mark.parametrize("form", OWN)
@pytest.mark.parametrize("size", [6, 4, 2, 1])
def test_a_module_that_takes_labels_is_judged_by_its_own_loss(form, size):
    model, labels = Own(OWN[form]), IDS.masked_fill(PADDED["attention_mask"] == 0, -100)
    want = F.cross_entropy(model.inner(IDS).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
    data = [{"input_ids": i, "labels": t} for i, t in zip(IDS.split(size), labels.split(size), strict=True)]
    found = evaluate(model, None, data)["data"]
    assert found.loss == pytest.approx(want, rel=1e-5) and "accuracy" not in found.values
    whole = evaluate(model, None, {"input_ids": IDS, "labels": labels}, batch_size=size)["data"].loss
    assert whole == pytest.approx(want, rel=1e-5)
    pair = evaluate(model, None, (IDS, labels), loss=Task.own_loss("labels"), batch_size=size)["data"].loss
    assert pair == pytest.approx(want, rel=1e-5)


class Tagging(nn.Module):
    """Like a tagger of Hugging Face: its loss is that of each token's own label, which it takes as one view."""

    def __init__(self, seed=0):
        super().__init__()
        self.inner = Tokens(seed)

    def forward(self, input_ids, labels=None):
        logits = self.inner(input_ids).logits
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.view(-1))
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.mark.parametrize("make", [Own, Tagging])
@pytest.mark.parametrize("cuts", [(1,) * 6, (2, 2, 2), (1, 2, 3)])
def test_own_losses_over_sequences_of_several_lengths(make, cuts):
    """The mean over all labels that count, whether or not the module shifts them, and however many are in a batch."""
    model = make(OWN["object"]) if make is Own else make()
    labels = IDS.masked_fill(PADDED["attention_mask"] == 0, -100)
    ends = torch.tensor(cuts).cumsum(0).tolist()
    parts = [
        (IDS[j - i : j, : 5 - k], labels[j - i : j, : 5 - k])
        for k, (i, j) in enumerate(zip(cuts[:3], ends[:3], strict=True))
    ]
    batches = [(ids.contiguous(), goal.contiguous()) for ids, goal in parts]
    total, count = 0.0, 0
    for ids, goal in batches:
        logits = model.inner(ids).logits
        logits, goal = (logits[:, :-1], goal[:, 1:]) if make is Own else (logits, goal)
        total += F.cross_entropy(logits.flatten(0, 1), goal.flatten(), reduction="sum").item()
        count += int((goal != -100).sum())
    data = [{"input_ids": ids, "labels": goal} for ids, goal in batches]
    assert evaluate(model, None, data)["data"].loss == pytest.approx(total / count, rel=1e-5)


def test_every_second_example_is_a_view_for_losses_that_ask_for_one():
    import lmc

    data = {"input_ids": IDS, "labels": IDS}
    found = lmc.merge.compare(Tagging(), [Tagging(1), Tagging(2)], data, methods=["average"], progress=False)
    assert all(math.isfinite(entry.test) for entry in found.entries)


class Ends(nn.Module):
    """Like a model that answers by the first and last token of a span."""

    def __init__(self):
        super().__init__()
        self.head = linear(outputs=2)

    def forward(self, x, starts=None, ends=None):
        first, last = self.head(x).unbind(-1)
        loss = None if starts is None else (first - starts).square().mean() + (last - ends).square().mean()
        return {"first": first, "last": last, "loss": loss}


@pytest.mark.parametrize("size", [24, 5])
def test_own_losses_take_targets_of_any_name(size):
    starts, ends = Y, Y + 2
    columns = {"x": X, "starts": starts, "ends": ends}
    data = [{name: part[k : k + size] for name, part in columns.items()} for k in range(0, 24, size)]
    own = Ends()(X, starts, ends)["loss"].item()
    assert evaluate(Ends(), None, data, loss=Task.own_loss("starts"))["data"].loss == pytest.approx(own, rel=1e-5)
    with pytest.raises(DataError, match="mappings with an entry 'start'"):
        evaluate(Ends(), None, data, loss=Task.own_loss("start"))


def test_hugging_face_models_are_judged_by_their_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(transformers.GPT2LMHeadModel(config).eval())
    data = DataLoader([{"input_ids": ids, "labels": ids} for ids in IDS], batch_size=4)
    path = loss_path(models[0], *models, data, alphas=3, progress=False)
    for model, loss in zip(models, path.own["data"]["loss"], strict=True):
        assert loss == pytest.approx(model(input_ids=IDS, labels=IDS).loss.item(), rel=1e-4)


# ---- data of any form


class Pairs(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i], int(Y[i])


class Dicts(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return {"x": X[i], "label": Y[i]}


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x):
        return self.layer(x)


SETS = {
    "pair": (X, Y),
    "tensor dataset": TensorDataset(X, Y),
    "map-style dataset": Pairs(),
    "loader of a dataset": DataLoader(Pairs(), batch_size=7, shuffle=True),
    "dataset of dicts": Dicts(),
    "loader of dicts": DataLoader(Dicts(), batch_size=7),
    "a dict": {"x": X, "labels": Y},
    "splits": {"train": (X, Y)},
    "generator": ((X[i : i + 5], Y[i : i + 5]) for i in range(0, 24, 5)),
}


@pytest.mark.parametrize("form", SETS)
def test_data_of_any_form(form):
    model = Keyword()
    score = next(iter(evaluate(model, None, SETS[form]).values()))
    assert score.loss == pytest.approx(F.cross_entropy(model(X), Y).item(), rel=1e-5) and score.count == 24


def test_splits_of_a_mapping_are_named_train_first_and_test_last():
    data = {"test": (X[:4], Y[:4]), "val": (X[4:8], Y[4:8]), "train": (X[8:], Y[8:])}
    scores = evaluate(linear(), None, data)
    assert list(scores) == ["train", "val", "test"] and [s.count for s in scores.values()] == [16, 4, 4]
    assert loss_path(linear(), linear(), linear(seed=1), data, alphas=3).split == "test"


def test_the_last_of_several_tensors_holds_the_targets():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear()

        def forward(self, a, b):
            return self.layer(a + b)

    model, want = Sum(), F.cross_entropy(linear()(2 * X), Y).item()
    for data in ((X, X, Y), TensorDataset(X, X, Y), [(X, X, Y)], ((X, X), Y)):
        assert evaluate(model, None, data)["data"].loss == pytest.approx(want, rel=1e-5)


class GCN(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.layer = linear(8, 3, seed)

    def forward(self, x, edge_index):
        return self.layer(x.index_add(0, edge_index[1], x[edge_index[0]]))


class Wrapped(nn.Module):
    """Takes a data object as its only argument."""

    def __init__(self):
        super().__init__()
        self.inner = GCN()

    def forward(self, data):
        return self.inner(data.x, data.edge_index)


class Graph(SimpleNamespace):
    """Like a `torch_geometric` data object: it yields pairs of names and values, and makes a mapping of itself."""

    def to_dict(self):
        return dict(vars(self))

    def __iter__(self):
        return iter(vars(self).items())


NODES = torch.randn(5, 8, generator=RANDOM)
EDGES = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])
CLASSES = torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize("kind", [SimpleNamespace, Graph])
def test_a_graph_is_one_call_with_targets_for_its_outputs(kind):
    want = F.cross_entropy(GCN()(NODES, EDGES), CLASSES).item()
    data = kind(x=NODES, edge_index=EDGES, y=CLASSES)
    forms = [
        ((NODES, EDGES), CLASSES),
        [((NODES, EDGES), CLASSES)],
        data,
        [data, data],
        DataLoader([data], collate_fn=list),
    ]
    for given in forms:
        given = [given.dataset[0]] if isinstance(given, DataLoader) else given
        assert evaluate(GCN(), None, given)["data"].loss == pytest.approx(want, rel=1e-5)
    assert evaluate(Wrapped(), None, data)["data"].loss == pytest.approx(want, rel=1e-5)
    assert loss_path(GCN(), GCN(0), GCN(1), data, alphas=3).losses["data"][0] == pytest.approx(want, rel=1e-5)


def test_masks_of_a_graph_are_its_splits():
    train = torch.tensor([True, True, False, False, True])
    data = Graph(x=NODES, edge_index=EDGES, y=CLASSES, train_mask=train, test_mask=~train)
    scores, outputs = evaluate(GCN(), None, data), GCN()(NODES, EDGES)
    for name, mask in (("train", train), ("test", ~train)):
        assert scores[name].loss == pytest.approx(F.cross_entropy(outputs[mask], CLASSES[mask]).item(), rel=1e-5)
        assert scores[name].count == int(mask.sum())


def test_sequences_of_several_lengths():
    model = Tokens()
    batches = [(IDS, IDS), (IDS[:3, :4], IDS[:3, :4])]
    logits = torch.cat([model(x).logits.flatten(0, 1) for x, _ in batches])
    want = F.cross_entropy(logits, torch.cat([y.flatten() for _, y in batches])).item()
    assert evaluate(model, None, batches)["data"].loss == pytest.approx(want, rel=1e-5)
    flat = lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten())  # noqa: E731
    assert evaluate(model, None, batches, loss=flat)["data"].loss == pytest.approx(want, rel=1e-5)


# ---- every function understands every task

TASKS = {
    "classes": (linear, (X, Y), {}),
    "regression": (functools.partial(linear, 6, 1), (X, X[:, 0]), {"loss": Task.regression()}),
    "with the data": (functools.partial(linear, 6, 1), Task.regression().on((X, X[:, 0])), {}),
    "outputs": (lambda seed=0: Returning(FORMS["tuple"][0], seed=seed), (X, Y), {"outputs": 0}),
    "own loss": (lambda seed=0: Own(OWN["object"], seed), [{"input_ids": IDS, "labels": IDS}], {}),
    "graph": (GCN, Graph(x=NODES, edge_index=EDGES, y=CLASSES), {}),
    "language": (Tokens, IDS, {"loss": Task.language()}),
    "segmentation": (lambda seed=0: conv(seed), (IMAGES, MASKS), {"loss": Task.segmentation()}),
}


def three(make):
    torch.manual_seed(1)
    return [make(seed=seed) for seed in (0, 1, 2)]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", ["path", "plane", "random", "trajectory", "triangle", "simplex", "curve"])
def test_functions_of_the_landscape_judge_a_task_alike(name, kind):
    make, data, options = TASKS[name]
    models, model = three(make), make(seed=0)
    own = [next(iter(evaluate(model, other, data, **options).values())).loss for other in models]
    options = {**options, "progress": False}
    if kind == "path":
        found = loss_path(model, *models[:2], data, alphas=3, **options)
        assert found.losses[found.split][[0, -1]] == pytest.approx(own[:2], rel=1e-4)
    elif kind == "curve":
        curve = bezier_curve(model, *models[:2], data, epochs=2, batch_size=8, **options)
        assert np.isfinite(curve.losses).all()
        found = curve.path(data, alphas=3, **options)
        assert found.losses[found.split][[0, -1]] == pytest.approx(own[:2], rel=1e-4)
    elif kind in ("plane", "random", "trajectory"):
        function = {"plane": loss_plane, "random": random_plane, "trajectory": trajectory_plane}[kind]
        found = function(model, models[0] if kind == "random" else models, data, resolution=5, **options)
        ends = {"plane": own, "random": own[:1], "trajectory": own[2:]}[kind]
        assert found.own[found.split]["loss"] == pytest.approx(ends, rel=1e-4) and found.complete
        assert np.isfinite(found.losses[found.split]).all()
    else:
        function = loss_triangle if kind == "triangle" else loss_simplex
        found = function(model, models, data, resolution=2, **options)
        assert found.own[found.split]["loss"] == pytest.approx(own, rel=1e-4)
    if kind != "curve":
        assert found.unit == {
            "classes": "nats",
            "outputs": "nats",
            "graph": "nats",
            "segmentation": "nats",
            "language": "nats per token",
            "own loss": "",
        }.get(name, "squared error")


@pytest.mark.parametrize("name", TASKS)
def test_curvature_understands_tasks(name):
    make, data, options = TASKS[name]
    found = curvature(make(seed=0), None, data, top=1, probes=1, steps=8, progress=False, **options)
    assert math.isfinite(found.eigenvalues[0]) and abs(found.eigenvalues[0]) > 0


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0, 0.1, 2.0]))


@pytest.mark.parametrize(
    ("loss", "data"),
    [
        (WEIGHTED, (X, Y)),
        (functools.partial(F.cross_entropy, weight=WEIGHTED.weight, ignore_index=1), (X, Y)),
        (nn.CrossEntropyLoss(reduction="sum"), (X, Y)),
        (nn.CrossEntropyLoss(), (X, Y.where(torch.arange(24) < 15, -100))),
        (None, {"input_ids": IDS, "labels": IDS.masked_fill(PADDED["attention_mask"].flip(1) == 0, -100)}),
    ],
)
def test_curvature_is_that_of_all_the_data_at_once(loss, data):
    model = Own(OWN["object"]) if loss is None else linear()
    options = {"loss": loss, "top": 2, "probes": 1, "tolerance": 1e-4, "progress": False}
    whole, cut = (curvature(model, None, data, batch_size=size, **options).eigenvalues for size in (24, 2))
    assert cut == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("name", ["curve", "geodesic", "low loss", "relaxed", "star", "learned", "ama"])
@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss()])
def test_batches_in_which_no_target_counts_change_nothing(name, loss):
    import lmc

    counting = [(X[k : k + 1], Y[k : k + 1]) for k in range(6)]
    others = [(X[k : k + 1], torch.tensor([-100])) for k in (7, 8)]
    model, models = lmc.models.mlp(6, [5], 4), [lmc.models.mlp(6, [5], 4).state_dict() for _ in range(3)]
    spec, given = lmc.permutation_spec(model, X[:2], progress=False), {"loss": loss, "progress": False}
    functions = {
        "curve": lambda d: lmc.bezier_curve(model, *models[:2], d, epochs=1, **given).at(0.5),
        "geodesic": lambda d: lmc.landscape.geodesic_path(model, *models[:2], d, points=3, epochs=1, progress=False),
        "low loss": lambda d: lmc.landscape.low_loss_path(model, *models[:2], d, ticks=2, rounds=(1, 1), **given),
        "relaxed": lambda d: lmc.sinkhorn_matching(spec, model, *models[:2], d, target="random", steps=3, **given),
        "star": lambda d: lmc.merge.star_model(model, models, d, spec=spec, epochs=1, **given).weights,
        "learned": lambda d: lmc.merge.learned_soup(model, models, d, epochs=1, **given).report.coefficients["*"],
        "ama": lambda d: lmc.merge.ama(model, models[1:], d, base=models[0], steps=3, **given),
    }
    shown = [functions[name](data) for data in (counting, [*counting[:3], *others, *counting[3:]])]
    shown = [each.to_frame().to_numpy().tolist() if hasattr(each, "to_frame") else each for each in shown]
    assert str(shown[0]) == str(shown[1]) and "nan" not in str(shown[0])
    rows = torch.cat([X[:6], X[7:9]]), torch.cat([Y[:6], torch.full((2,), -100)])
    whole = [functions[name](data) for data in ((X[:6], Y[:6]), rows)]
    whole = [each.to_frame().to_numpy().tolist() if hasattr(each, "to_frame") else each for each in whole]
    assert str(whole[0]) == str(whole[1])


@pytest.mark.parametrize("name", ["classes", "outputs", "graph"])
def test_similarity_understands_tasks(name):
    make, data, options = TASKS[name]
    first, second, _ = three(make)
    assert similarity(first, first, second, data, examples=24, **options).count == (5 if name == "graph" else 24)


@pytest.mark.parametrize("name", ["classes", "with the data", "own loss", "graph", "segmentation"])
def test_functions_of_inputs_drop_targets(name):
    make, data, _ = TASKS[name]
    first, second, third = three(make)
    assert variance_ratios(first, first, [second, third], data, progress=False).ratios
    inputs = [data] if name == "graph" else data
    if name in ("classes", "segmentation"):
        assert recalibrate_batchnorm(first, None, data[0]).keys() == first.state_dict().keys()
    assert inputs is not None


def test_units_and_direction_stay_with_results(tmp_path):
    model, goal = linear(6, 1), X[:, 0]
    metrics = {"closeness": lambda o, t: -(o[:, 0] - t).abs()}
    task = Task.regression(metrics=metrics, higher=("closeness",))
    path = loss_path(model, linear(6, 1, 1), linear(6, 1, 2), (X, goal), alphas=5, loss=task, progress=False)
    drop = path.barrier_of("closeness")
    values = path.values["data"]["closeness"]
    assert drop.start == pytest.approx(values[0]) and drop.end == pytest.approx(values[-1]) and drop.value >= 0.0
    path.save(tmp_path / "path.json")
    again = type(path).load(tmp_path / "path.json")
    assert again.unit == "squared error" and again.higher == ("closeness",)
    assert copy.deepcopy(path).unit == "squared error"


# ---- what is wrong is said


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ((X, torch.randn(24)), {}, DataError, r"lmc.Task.regression\(\)"),
        ((X, Y + 3), {}, DataError, r"ignore=255"),
        ([{"input_ids": IDS}], {}, DataError, r"lmc.Task.language\(\)"),
        (((NODES, EDGES), CLASSES[:4]), {}, DataError, r"\[\(inputs, targets\)\]"),
        ((X, Y), {"loss": "mse"}, InputError, "lmc.Task"),
    ],
)
def test_messages_name_the_way_out(data, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(linear(), None, data, **options)


def test_plots_name_the_unit_of_the_loss():
    pytest.importorskip("plotly")
    model, goal = linear(6, 1), X[:, 0]
    for task, label in ((Task.regression(), "loss (squared error)"), (lambda o, t: (o[:, 0] - t).abs(), "loss")):
        options = {"loss": task, "progress": False}
        models = [linear(6, 1, seed) for seed in (1, 2, 3)]
        path = loss_path(model, *models[:2], (X, goal), alphas=3, **options)
        plane = loss_plane(model, models, (X, goal), resolution=5, **options)
        triangle = loss_triangle(model, models, (X, goal), resolution=2, **options)
        assert path.plot().layout.yaxis.title.text == label
        for figure in (path.plot(), plane.plot(), triangle.plot()):
            assert "nats" not in figure.to_json() and label in figure.to_json()


class ByName(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.layer = linear(seed=seed)

    def forward(self, image):
        return self.layer(image)


class WholeBatch(ByName):
    def forward(self, batch):
        return self.layer(batch["image"])


def test_entries_of_a_mapping_that_the_module_does_not_take():
    own = F.cross_entropy(linear()(X), Y).item()
    named = [{"image": X[k : k + 8], "label": Y[k : k + 8], "file": ["a"] * 8} for k in (0, 8, 16)]
    assert evaluate(ByName(), None, named)["data"].loss == pytest.approx(own, abs=1e-6)
    counted = [{**batch, "index": torch.arange(8)} for batch in named]
    with pytest.warns(UserWarning, match="ByName.forward takes no file, index"):
        assert evaluate(ByName(), None, counted)["data"].loss == pytest.approx(own, abs=1e-6)
    assert evaluate(WholeBatch(), None, [({"image": X}, Y)])["data"].loss == pytest.approx(own, abs=1e-6)
    assert evaluate(WholeBatch(), None, named)["data"].loss == pytest.approx(own, abs=1e-6)
    with pytest.raises(DataError, match="given a mapping with image, file, since its forward names none of these"):
        evaluate(linear(), None, named)


def test_arrays_of_numpy_are_tensors():
    own = F.cross_entropy(linear()(X), Y).item()
    for data in ((X.numpy(), Y.numpy()), [(X[:9].numpy(), Y[:9].numpy()), (X[9:].numpy(), Y[9:].numpy())]):
        assert evaluate(linear(), None, data)["data"].loss == pytest.approx(own, abs=1e-6)
    reversed_, swapped = (X.numpy()[::-1], Y.numpy()[::-1]), (X.numpy().astype(">f4"), Y.numpy().astype(">i8"))
    for data in (reversed_, swapped):
        assert evaluate(linear(), None, data)["data"].loss == pytest.approx(own, abs=1e-6)
    model = nn.BatchNorm1d(6)
    found = recalibrate_batchnorm(model, None, X.numpy())
    assert torch.equal(found["running_mean"], recalibrate_batchnorm(model, None, X)["running_mean"])


def test_compiled_modules_of_several_inputs_have_targets_left_out():
    class Two(ByName):
        def forward(self, image, other):
            return self.layer(image + other)

    pair = [torch.compile(Two(seed), backend="eager") for seed in (0, 1)]
    loader = DataLoader(TensorDataset(X, X, Y), batch_size=8)
    found = variance_ratios(pair[0], pair[0], pair, loader, progress=False)
    assert found.merged


class Translating(nn.Module):
    """Like an encoder-decoder of Hugging Face: its decoder reads the labels, moved on by one, or fails."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.inner, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def prepare_decoder_input_ids_from_labels(self, labels):
        return F.pad(labels.masked_fill(labels == -100, 0), (1, -1))

    def forward(self, input_ids, decoder_input_ids=None, labels=None):
        if labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if decoder_input_ids is None:
            raise ValueError("no decoder inputs")
        source = self.embed(input_ids).mean(1, keepdim=True)
        logits = self.head(torch.relu(self.inner(self.embed(decoder_input_ids) + source)))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def test_decoders_read_the_labels_also_where_inputs_are_asked_for():
    import lmc

    models = [Translating(seed) for seed in (0, 1)]
    goals = IDS.flip(1)[:, :3].contiguous()
    data, quiet = {"input_ids": IDS, "labels": goals}, {"progress": False}
    shown = {"input_ids": IDS, "decoder_input_ids": models[0].prepare_decoder_input_ids_from_labels(goals)}
    spec = lmc.permutation_spec(models[0], shown, **quiet)
    pi = lmc.activation_matching(spec, *models[:1], *models, data, **quiet)
    assert str(dict(pi)) == str(dict(lmc.activation_matching(spec, *models[:1], *models, shown, **quiet)))
    assert variance_ratios(models[0], models[0], models, data, progress=False).merged
    found = lmc.merge.fisher_information(models[0], None, data, labels="true")
    per_example = []
    for i in range(len(IDS)):
        logits = models[0](IDS[i : i + 1], labels=goals[i : i + 1]).logits
        models[0].zero_grad()
        F.cross_entropy(logits[0], goals[i], reduction="sum").backward()
        per_example.append(models[0].head.weight.grad.square())
    torch.testing.assert_close(found["head.weight"], torch.stack(per_example).mean(0), rtol=1e-4, atol=1e-6)
    lmc.merge.regmean(models[0], models, [data, data], **quiet)


def test_a_list_of_inputs_and_targets_has_its_targets_left_out():
    for goal in (Y, X[:, :1]):
        calls = list(input_batches(linear(), [X, goal], 24))
        assert len(calls) == 1 and torch.equal(calls[0], X)
    assert len(list(input_batches(linear(), [X[:9], X[9:18]], 24))) == 2


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, form) for name in ("compare", "methods") for form in ("once", "splits", "object", "task")),
        *((name, "once") for name in ("soups", "pairs", "steps", "branches")),
    ],
)
def test_what_can_be_read_once_is_as_good_as_a_list(name, form):
    import lmc

    def data(make):
        one = {"train": make([(X[:12], Y[:12]), (X[12:], Y[12:])]), "test": make([(X, Y)])}
        return {"once": one["train"], "splits": one, "object": SimpleNamespace(**one), "task": Task().on(one["train"])}[
            form
        ]

    model, models = lmc.models.mlp(6, [5], 4), [lmc.models.mlp(6, [5], 4).state_dict() for _ in range(2)]
    spec, quiet = lmc.permutation_spec(model, X[:2], progress=False), {"progress": False}
    pi = lmc.weight_matching(spec, *models, **quiet)
    functions = {
        "compare": lambda d: lmc.merge.compare(model, models, d, methods=["average"], test=(X, Y), **quiet).weights,
        "soups": lambda d: lmc.merge.compare_soups(model, models, d, epochs=1, **quiet).scores,
        "pairs": lambda d: lmc.landscape.pairwise_barriers(model, models, d, alphas=3, **quiet).barriers.tolist(),
        "methods": lambda d: lmc.align.compare(spec, model, *models, d, methods=["naive", "weight matching"], **quiet)["naive"].barrier,
        "steps": lambda d: list(lmc.align.inspect_matching(pi, *models, model=model, data=d).barriers),
        "branches": lambda d: lmc.training.branches(model, d, at=[1], epochs=2, **quiet).trunk.weights[0],
    }  # fmt: skip
    found, want = (functions[name](data(make)) for make in (iter, list))
    assert str(found) == str(want)


def test_a_class_of_losses_is_no_loss():
    with pytest.raises(InputError, match=r"make one, CrossEntropyLoss\(\)"):
        evaluate(linear(), None, (X, Y), loss=nn.CrossEntropyLoss)
    with pytest.raises(InputError, match="metrics: expected a mapping of names to functions, got list"):
        evaluate(linear(), None, (X, Y), metrics=[F.cross_entropy])


def test_trained_curves_and_stars_know_the_unit_of_their_loss():
    from lmc.merge import star_model

    models, data = [linear(seed=k) for k in range(2)], Task.regression().on((X, X[:, :4]))
    curve = bezier_curve(models[0], *models, data, epochs=1, progress=False)
    star = star_model(models[0], models, data, epochs=1, progress=False)
    for found in (curve, star):
        assert found.unit == "squared error" and "nats" not in str(found.plot().to_dict())
