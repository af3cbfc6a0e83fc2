"""Weights put through modules that keep something beside their state dict."""

import array
import functools
import itertools
import random
import sys
import threading
import time
import warnings
from collections import UserDict, deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lmc
from lmc.network.examination import _equal
from lmc.network.network import Network, attention_written_out, whole

CPU = torch.device("cpu")


class Base(nn.Module):
    """A network with one hidden layer whose units are scaled by a table of parameters, which subclasses keep a copy of."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)
            self.table = nn.Parameter(1.0 + torch.rand(3))
        self.cache = {}

    def scale(self) -> torch.Tensor:
        """(6,), what a derived value is made by."""
        return 3 * self.table.repeat(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(x) * self.scale()))


class DroppedInTraining(Base):
    """As LeViT, TinyViT and EfficientFormer keep attention biases."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kept = None

    def train(self, mode: bool = True):
        self.kept = None if mode else self.kept
        return super().train(mode)

    def scale(self):
        if self.training:
            return super().scale()
        self.kept = super().scale() if self.kept is None else self.kept
        return self.kept


class MadeInEval(Base):
    """As TinyViT: the buffer is made when the mode changes."""

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and hasattr(self, "kept"):
            del self.kept
        elif not mode:
            self.register_buffer("kept", super().scale().detach(), persistent=False)
        return self

    def scale(self):
        return super().scale() if self.training else self.kept


class DictByDevice(Base):
    def scale(self):
        return self.cache.setdefault("cpu", super().scale())


class DictByLength(Base):
    def scale(self):
        if 6 not in self.cache:
            self.cache[6] = (super().scale().detach(), 6)
        return self.cache[6][0]


class LazyBuffer(Base):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.register_buffer("kept", None, persistent=False)

    def scale(self):
        if self.kept is None:
            self.kept = super().scale().detach()
        return self.kept


class AttributeMadeLater(Base):
    def scale(self):
        if not hasattr(self, "kept"):
            self.kept = super().scale().detach()
        return self.kept


class LruMethod(Base):
    @functools.lru_cache(4)  # noqa: B019
    def scale(self):
        return super().scale()


class LruProperty(Base):
    @property
    @functools.lru_cache(4)  # noqa: B019
    def kept(self):
        return super().scale()

    def scale(self):
        return self.kept


class LruOfInstance(Base):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.scale = functools.lru_cache(2)(self.scale)


class CachedProperty(Base):
    @functools.cached_property
    def kept(self):
        return super().scale()

    def scale(self):
        return self.kept


class Helper:
    def __init__(self) -> None:
        self.kept = None


class InAnObject(Base):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.helper = Helper()

    def scale(self):
        if self.helper.kept is None:
            self.helper.kept = super().scale().detach()
        return self.helper.kept


class InATuple(Base):
    def scale(self):
        self.pair = getattr(self, "pair", None) or (6, [super().scale()])
        return self.pair[1][0]


class Slotted:
    __slots__ = ("kept",)

    def __init__(self) -> None:
        self.kept = None


class InSlots(Base):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.helper = Slotted()

    def scale(self):
        self.helper.kept = super().scale() if self.helper.kept is None else self.helper.kept
        return self.helper.kept


class Number(Base):
    """A plain number, as logits are scaled by one that is computed once."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.mean, self.floor = None, 0.5

    def scale(self):
        if self.mean is None:
            self.mean = max(self.table.mean().item(), self.floor)
        return self.mean * super().scale()


class NumbersByLength(Base):
    def scale(self):
        if 6 not in self.cache:
            self.cache[6] = float(self.table.mean())
        return self.cache[6] * super().scale()


class Flagged(Base):
    """A flag says whether the value is there."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.ready, self.kept, self.total = False, torch.empty(0), 0.0

    def prepare(self):
        self.kept, self.total, self.ready = super().scale().detach(), float(self.table.sum()), True

    def scale(self):
        if not self.ready:
            self.prepare()
        return self.total * self.kept


@functools.lru_cache(64)
def tripled(table: torch.Tensor) -> torch.Tensor:
    return 3 * table.detach().repeat(2)


class LruFunction(Base):
    """Kept outside the module, by the identity of its parameter."""

    def scale(self):
        return tripled(self.table)


class MergedInEval(Base):
    """As adapters of loralib: the parameter itself holds something else in evaluation mode."""

    def train(self, mode: bool = True):
        if mode != self.training:
            self.table.data *= 1 / 3 if mode else 3
        return super().train(mode)

    def scale(self):
        return (3 * self.table if self.training else self.table).repeat(2)


class Renormed(nn.Module):
    """An embedding whose rows are shortened in place by a forward pass."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding, self.b = nn.Embedding(8, 6, max_norm=1.0), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.embedding(x.argmax(1)))


class InAList(Base):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kept: list | deque = []

    def scale(self):
        if not self.kept:
            self.kept.append(3 * self.table.detach().repeat(2))
        return self.kept[0]


class InADeque(InAList):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kept = deque(maxlen=1)


class FlaggedInASet(Base):
    """A set says for which lengths an attribute was made."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.made: set[int] = set()
        self.kept: torch.Tensor | None = None

    def scale(self):
        if len(self.table) not in self.made:
            self.made.add(len(self.table))
            self.kept = 3 * self.table.detach().repeat(2)
        return self.kept


class ByCountOfChanges(Base):
    """Made again where torch has counted a change of the parameter."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kept = (None, None)

    def scale(self):
        if self.kept[0] != self.table._version:
            self.kept = self.table._version, 3 * self.table.detach().repeat(2)
        return self.kept[1]


class Closed(Base):
    """Functions over the module itself or its parts, where deepcopy leaves them bound to the original."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        table = self.table
        self.steps = {"scale": lambda: 3 * table.repeat(2)}

    def scale(self):
        return self.steps["scale"]()


class ClosedHooks(Base):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.a.register_forward_hook(lambda _m, _x, out: out * (3 * self.table.repeat(2)))
        self.b.register_forward_pre_hook(lambda _m, x, a=self.table.shape: (x[0] + self.a.bias[0],))

    def scale(self):
        return 1.0


class Locked(Base):
    """Holds what cannot be copied."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.lock, self.log = threading.Lock(), sys.stdout

    def scale(self):
        with self.lock:
            return 3 * self.table.repeat(2)


class Clipped(Base):
    """Writes its parameter in every forward pass."""

    def scale(self):
        with torch.no_grad():
            self.table.div_(self.table.norm().clamp_min(0.5))
        return 3 * self.table.repeat(2)


class WritesInputs(Base):
    def scale(self):
        return 3 * self.table.repeat(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.sub_(0.5).mul_(0.5))


class FlaggedByATensor(Base):
    """The buffer is there from the start, and another one says whether it was filled."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.register_buffer("kept", torch.zeros(6), persistent=False)
        self.register_buffer("ready", torch.tensor(False), persistent=False)
        self.register_buffer("ones", torch.ones(6), persistent=False)

    def scale(self):
        if not self.ready:
            self.kept.copy_(super().scale().detach())
            self.ready.fill_(True)
        return self.kept * self.ones


class FilledWhereZero(FlaggedByATensor):
    """Through `.data`, which leaves the count of changes as it is."""

    def scale(self):
        if not self.kept.any():
            torch.mul(super(FlaggedByATensor, self).scale().detach(), 1.0, out=self.kept.data)
        return self.kept


class GivenData(FlaggedByATensor):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kept = torch.zeros(0)

    def scale(self):
        if not self.kept.numel():
            self.kept.data = super(FlaggedByATensor, self).scale().detach()
        return self.kept


class FilledWhereNaN(Base):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.cache["kept"] = torch.full((6,), torch.nan)

    def scale(self):
        if self.cache["kept"].isnan().any():
            self.cache["kept"][:] = super().scale().detach()
        return self.cache["kept"]


class FilledArray(Base):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kept, self.filled = np.zeros(6, dtype=np.float32), np.zeros(1, dtype=int)

    def scale(self):
        if not self.filled[0]:
            self.kept[:] = super().scale().detach().numpy()
            self.filled[0] = 1
        return torch.from_numpy(self.kept.copy())


class AFunction(Base):
    """Keeps a function that closes over what was computed."""

    made = None

    def scale(self):
        if self.made is None:
            kept = super().scale().detach()
            self.made = functools.partial(lambda one, factor: factor * kept * one, torch.ones(6))
        return self.made(1.0)


class AModule(Base):
    """Keeps a module that is none of its children."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        object.__setattr__(self, "made", None)

    def scale(self):
        if self.made is None:
            kept = nn.Module()
            kept.table = nn.Parameter(super().scale().detach())
            object.__setattr__(self, "made", [kept])
        return self.made[0].table


class NumbersInAList(Base):
    made, factors = [], ()

    def scale(self):
        if not self.made:
            self.made = super().scale().tolist()
            self.factors = (float(self.table.sum()), 1)
        return torch.tensor(self.made) * self.factors[0]


class InALockedObject(Base):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.holder = Holder()

    def scale(self):
        with self.holder.lock:
            if self.holder.kept is None:
                self.holder.kept = super().scale().detach()
            return self.holder.kept


class Holder:
    def __init__(self) -> None:
        self.lock, self.kept = threading.Lock(), None


class MadeInItsOwnEval(Base):
    """As `MadeInEval`, in the method of that name."""

    def eval(self):
        super().eval()
        self.kept = super().scale().detach()
        return self

    def scale(self):
        return super().scale() if self.training or not hasattr(self, "kept") else self.kept


class InADictOfDicts(Base):
    def scale(self):
        if 6 not in self.cache:
            self.cache[6] = {"kept": (super().scale().detach(),)}
        return self.cache[6]["kept"][0]


class Growing(Base):
    """A table that is made again for more examples than there were."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.register_buffer("kept", torch.zeros(0, 6), persistent=False)

    def forward(self, x):
        if self.kept.shape[0] < len(x):
            self.kept = super().scale().detach().repeat(len(x), 1)
        return self.b(F.relu(self.a(x) * self.kept[: len(x)]))


class AGenerator(Base):
    made = None

    def scale(self):
        if self.made is None:
            kept = super().scale().detach()
            self.made = (kept for _ in itertools.count())
        return next(self.made)


class Sparse(Base):
    def scale(self):
        if "kept" not in self.cache:
            self.cache["kept"] = super().scale().detach().to_sparse()
        return self.cache["kept"].to_dense()


class SetInTraining(Base):
    """With a constant that only training sets, which no call misses when it is 0."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.rate = 1.5

    def scale(self):
        if self.training:
            self.rate = 1.5
        return super().scale() * self.rate


class ForAnHour(Base):
    """Made again when it has become too old."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.until, self.kept = 0.0, None

    def scale(self):
        if time.monotonic() > self.until:
            self.kept, self.until = super().scale().detach(), time.monotonic() + 3600
        return self.kept


CACHING = [
    MadeInItsOwnEval,
    InADictOfDicts,
    Growing,
    AFunction,
    AModule,
    InALockedObject,
    FlaggedByATensor,
    FilledWhereZero,
    GivenData,
    InAList,
    InADeque,
    FlaggedInASet,
    ByCountOfChanges,
    Closed,
    ClosedHooks,
    Locked,
    DroppedInTraining,
    MadeInEval,
    DictByDevice,
    DictByLength,
    LazyBuffer,
    AttributeMadeLater,
    LruMethod,
    LruProperty,
    LruOfInstance,
    CachedProperty,
    InAnObject,
    InATuple,
    InSlots,
    Number,
    NumbersByLength,
    Flagged,
    LruFunction,
]
every = pytest.mark.parametrize(
    "kind",
    [
        *CACHING,
        AGenerator,
        SetInTraining,
        ForAnHour,
        Sparse,
        FilledWhereNaN,
        FilledArray,
        NumbersInAList,
        MergedInEval,
        Renormed,
        Clipped,
        WritesInputs,
    ],
)


def own_outputs(kind: type[nn.Module], weights: dict, x: torch.Tensor) -> torch.Tensor:
    """What a module made for these weights alone gives."""
    fresh = kind(9)
    fresh.load_state_dict({name: tensor.clone() for name, tensor in weights.items()})
    return fresh.eval()(x.clone()).detach()


@pytest.fixture
def data():
    rng = torch.Generator().manual_seed(1)
    return torch.randn(24, 8, generator=rng), torch.randint(0, 4, (24,), generator=rng)


@every
@pytest.mark.parametrize("before", ["not called", "called", "called in evaluation mode"])
@pytest.mark.filterwarnings("ignore:.*outside itself")
def test_each_weight_set_is_computed_as_if_it_were_the_only_one(kind, before, data):
    x, _ = data
    model, weights = kind(0), [kind(seed).state_dict() for seed in (1, 2, 3)]
    copies = [{name: tensor.clone() for name, tensor in state.items()} for state in weights]
    given = x.clone()
    if before != "not called":
        model.train(before == "called")(x.clone())
    network = Network(model, CPU)
    for state in (*weights, weights[0]):
        network.load(state)
        for _ in range(2):
            assert torch.allclose(network(x), own_outputs(kind, state, x), atol=1e-6)
    for state, copied in zip(weights, copies, strict=True):
        assert all(torch.equal(state[name], copied[name]) for name in state)
    assert torch.equal(x, given)


# Autograd and vmap cannot follow plain numbers, nor reach a tensor in a closure; tensors that are given have counts of their own.
IN_PLACE = (FlaggedByATensor, FilledWhereZero, GivenData)
NOT_FUNCTIONAL = (Number, NumbersByLength, Flagged, Closed, ByCountOfChanges, *IN_PLACE)


@pytest.mark.parametrize("kind", [kind for kind in CACHING if kind not in NOT_FUNCTIONAL])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.filterwarnings("ignore:.*outside itself")
def test_functional_calls_use_the_weights_that_are_given(kind, called, data):
    x, _ = data
    model, weights = kind(0), [kind(seed).state_dict() for seed in (1, 2)]
    if called:
        model.eval()(x)
    network = Network(model, CPU)
    network.load(weights[0])
    network(x)
    expected = [own_outputs(kind, state, x) for state in weights]
    assert torch.allclose(network.many(network.stack(weights), x), torch.stack(expected), atol=1e-6)
    assert torch.allclose(network.outputs(weights[1], x), expected[1], atol=1e-6)
    network.load(weights[0])
    assert torch.allclose(network(x), expected[0], atol=1e-6)


@pytest.mark.parametrize("kind", CACHING)
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.filterwarnings("ignore:.*outside itself")
def test_path_ends_and_specs_of_modules_that_cache(kind, called, data):
    x, y = data
    model, a, b = kind(0), kind(1), kind(2)
    if called:
        for module in (model, a, b):
            module.eval()(x)
    states = [a.state_dict(), b.state_dict()]
    path = lmc.loss_path(model, *states, (x, y), alphas=3, progress=False)
    own = [F.cross_entropy(own_outputs(kind, state, x), y).item() for state in states]
    ends = path.values["data"]["loss"][[0, -1]]
    assert abs(ends[0] - own[0]) < 1e-6 and abs(ends[1] - own[1]) < 1e-6
    spec = lmc.permutation_spec(model, x[:2], progress=False)
    # Units 0 and 3, 1 and 4, 2 and 5 share an entry of the table, which moves with them.
    moved = spec.random(0).apply(states[0])
    assert torch.allclose(own_outputs(kind, moved, x), own_outputs(kind, states[0], x), atol=1e-5)
    assert not torch.equal(moved["a.weight"], states[0]["a.weight"])


@pytest.mark.parametrize("first", [nn.LeakyReLU(0.1, inplace=True), nn.ELU(inplace=True), nn.Flatten()])
def test_layers_that_work_in_place_do_so_in_copies(first, data):
    """The first layer of a network, or what comes after a view, would write into the data of the caller."""
    x, y = data
    states = [
        nn.Sequential(first, nn.Hardtanh(-0.5, 0.5, inplace=True), nn.Linear(8, 4)).state_dict() for _ in range(2)
    ]
    model = nn.Sequential(first, nn.Hardtanh(-0.5, 0.5, inplace=True), nn.Linear(8, 4))
    given, own = x.clone(), []
    for state in states:
        model.load_state_dict(state)
        own.append(F.cross_entropy(model(x.clone()), y).item())
    path = lmc.loss_path(model, *states, (x, y), alphas=3, progress=False)
    assert torch.equal(x, given)
    assert path.values["data"]["loss"][[0, -1]].tolist() == pytest.approx(own, abs=1e-6)
    assert lmc.permutation_spec(model, x).certificate is not None and torch.equal(x, given)


class Twice(nn.Module):
    """One normalisation under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.again, self.same = self.norm, nn.Linear(8, 8)
        self.same.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.again(self.same(self.norm(self.a(x)).relu()).relu()))


def test_modules_with_several_names_are_put_back(data):
    x, y = data
    torch.manual_seed(0)
    model, states = Twice(), [Twice().train() for _ in range(2)]
    for other in states:
        other(x)
    weights = [other.eval().state_dict() for other in states]
    network = Network(model, CPU)
    expected = torch.stack([other(x).detach() for other in states])
    for _ in range(2):
        assert torch.allclose(network.many(network.stack(weights), x), expected, atol=1e-6)
        assert torch.allclose(network.outputs(weights[1], x), expected[1], atol=1e-6)
    network.load(weights[0])
    assert torch.allclose(network(x), expected[0], atol=1e-6)
    path = lmc.loss_path(model, *weights, (x, y), alphas=3, progress=False)  # estimates statistics at every point
    assert path.recalibrated and bool(torch.tensor(path.values["data"]["loss"]).isfinite().all())


class ViewsOfParameters(nn.Module):
    """As flattened parameters are split once: a copy has views of its own, which no loading reaches."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(36, generator=torch.Generator().manual_seed(seed)))
        self.weight, self.bias = self.flat.detach()[:32].view(4, 8), self.flat.detach()[32:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def test_a_module_whose_outputs_do_not_follow_its_weights_is_named(data):
    with pytest.warns(UserWarning, match="ViewsOfParameters: its outputs do not change with the weights"):
        lmc.loss_path(ViewsOfParameters(0), ViewsOfParameters(1), ViewsOfParameters(2), data, alphas=3, progress=False)


def test_outputs_of_few_values_follow_their_weights(data):
    class Decided(Base):
        def __init__(self, seed):
            super().__init__(seed)
            self.b.bias = nn.Parameter(torch.tensor([0.0, 9.0, 0.0, 0.0]))  # weights near by decide alike

        def forward(self, x):
            return F.one_hot(super().forward(x).argmax(-1), 4).float()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lmc.loss_path(Decided(0), Decided(1), Decided(2), data, alphas=3, progress=False)
    assert not [warning for warning in told if "do not change" in str(warning.message)]


class Turned(nn.Module):
    """Complex outputs, by a factor that is made once from the weights."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.factor = nn.Linear(4, 3), None

    def forward(self, x):
        if self.factor is None:
            self.factor = torch.exp(1j * self.layer.bias.detach())
        return self.layer(x) * self.factor


def test_complex_outputs_are_compared_as_well(data):
    first, second = Turned(1), Turned(2)
    x = torch.randn(5, 4)
    network = Network(Turned(0), CPU, read=whole)
    for model in (first, second, first):
        network.load(model.state_dict())
        assert torch.allclose(network(x), model(x).detach())
    outputs = [model(x).detach() for model in (first, second)]
    assert not _equal(*outputs) and _equal(outputs[0], outputs[0])


@pytest.mark.parametrize("view", [lambda w: w[:4], lambda w: w.T, lambda w: w[2:5, 1:3]])
def test_parameters_that_share_a_part_of_their_memory_are_refused(view, data):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    model.part = nn.Parameter(view(model[0].weight.data))
    for call in (
        lambda: lmc.permutation_spec(model, data[0][:2], progress=False),
        lambda: lmc.loss_path(model, model, model, data, alphas=3, progress=False),
    ):
        with pytest.raises(lmc.WeightsError, match="0.weight and part of Sequential|part and 0.weight of Sequential"):
            call()


def test_parameters_that_lie_in_one_memory_are_their_own(data):
    """As recurrent layers on an accelerator and sharded training lay them out."""
    model, flat = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6)), torch.randn(96)
    model[0].weight = nn.Parameter(flat[:48].view(6, 8))
    model[2].weight = nn.Parameter(flat[48:].view(6, 8)[:, :6])
    model[2].bias = nn.Parameter(flat[48:].view(6, 8)[:, 7])
    assert lmc.permutation_spec(model, data[0][:2], progress=False).groups["0"].size == 6


def test_extra_state_is_refused_alike(data):
    class Extra(Base):
        def get_extra_state(self):
            return {"calls": 1}

        def set_extra_state(self, state):
            pass

    plain = Base(1).state_dict()  # as a file without it has them
    for call in (
        lambda m: lmc.permutation_spec(m, data[0]),
        lambda m: lmc.loss_path(m, m, m, data),
        lambda m: lmc.loss_path(m, plain, plain, data),
    ):
        with pytest.raises(lmc.WeightsError, match="_extra_state"):
            call(Extra(0))


def test_modules_that_convert_their_inputs_take_inputs_of_any_dtype(data):
    class Half(Base):
        def forward(self, x):
            return super().forward(x.half()).float()

    models = [Half(seed).half() for seed in range(2)]
    path = lmc.loss_path(models[0], *models, data, alphas=3, progress=False)
    own = [F.cross_entropy(model(data[0]), data[1]).item() for model in models]
    assert path.values["data"]["loss"][[0, 2]] == pytest.approx(own, abs=2e-3)
    with pytest.raises(lmc.DataError, match="inputs are torch.float32, the weights torch.float16"):
        lmc.loss_path(Base(0).half(), Base(0).half(), Base(1).half(), data, alphas=3, progress=False)


def test_the_callers_module_is_left_as_it_was(data):
    x, y = data
    model = DictByDevice(0)
    kept = model.eval()(x), dict(model.cache)
    lmc.loss_path(model, DictByDevice(1), DictByDevice(2), (x, y), alphas=3, progress=False)
    lmc.permutation_spec(model, x[:2], progress=False)
    assert model.cache.keys() == kept[1].keys() and all(model.cache[k] is kept[1][k] for k in kept[1])
    assert not model.training and torch.equal(model(x), kept[0])


class Constants(Base):
    """Tensors beside the state dict that are no caches, or that only look like it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
        self.optional = torch.full((6,), 2.0)
        self.tables = {"a": torch.full((6,), 3.0)}

    def scale(self):
        scale = super().scale() * self.mask * self.tables["a"]
        return scale if self.optional is None else scale * self.optional


@pytest.mark.parametrize("kind", [InALockedObject, FlaggedByATensor, AFunction])
def test_what_the_callers_module_keeps_stays(kind, data):
    model = kind(0).eval()
    expected = model(data[0]).detach()
    with torch.no_grad():
        model.table.add_(1.0)  # what it keeps is old now, and used all the same
    lmc.loss_path(model, kind(1), kind(2), data, alphas=3, progress=False)
    assert torch.equal(model(data[0]), expected)


def test_constants_stay(data):
    x, _ = data
    model, weights = Constants(0), Constants(1).state_dict()
    model(x)
    network = Network(model, CPU)
    network.load(weights)
    assert torch.equal(network(x), own_outputs(Constants, weights, x))


KEPT: dict[str, torch.Tensor] = {}


class Elsewhere(Base):
    def scale(self):
        return KEPT.setdefault(str(id(self)), super().scale().detach())


class InAFile(Base):
    def scale(self):
        return kept_for(6, super().scale)


def kept_for(length: int, make):
    if length not in KEPT:
        KEPT[length] = make().detach()
    return KEPT[length]


class InTheClass(Base):
    tables: dict[int, float] = {}

    def scale(self):
        if 6 not in self.tables:
            self.tables[6] = self.table.sum().item()
        return self.tables[6] * super().scale()


class InADefault(Base):
    def scale(self, kept=[]):  # noqa: B006
        if not kept:
            kept.append(super().scale().detach())
        return kept[0]


class InAClosure(Base):
    def scale(self):
        return CLOSED(self)


def _closed():
    kept = {}

    def of(module):
        if 6 not in kept:
            kept[6] = Base.scale(module).detach()
        return kept[6]

    return of


CLOSED = _closed()
LAST = None
OF_THREADS = threading.local()


class InAVariable(Base):
    def scale(self):
        global LAST
        LAST = super().scale().detach() if LAST is None else LAST
        return LAST


class OfAThread(Base):
    def scale(self):
        if not hasattr(OF_THREADS, "kept"):
            OF_THREADS.kept = {id(self.table): super().scale().detach()}
        return OF_THREADS.kept.setdefault(id(self.table), super().scale().detach())


class InItsOwnFunction(Base):
    """A function that one module has, whose closure all copies share."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.made = _closed()

    def scale(self):
        return self.made(self)


class InAHook(Base):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        kept = None

        def hook(module, _inputs, output):
            nonlocal kept
            kept = module.weight.detach().sum() if kept is None else kept
            return output * kept

        self.b.register_forward_hook(hook)


SHARED = (Elsewhere, InAFile, InTheClass, InADefault, InAClosure, InAVariable, OfAThread, InItsOwnFunction, InAHook)


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("called", [False, True])
def test_what_cannot_be_dropped_is_refused(kind, called, data):
    x, y = data
    global LAST
    model, LAST = kind(0), None
    KEPT.clear()
    vars(OF_THREADS).clear()
    expected = model(x).detach() if called else None
    with pytest.raises(lmc.InputError, match=f"{kind.__name__}: what it computes from one set of weights"):
        lmc.loss_path(model, kind(1), kind(2), (x, y), alphas=3, progress=False)
    assert expected is None or torch.equal(model(x), expected)


def test_hooks_on_layers_of_torch_may_cache_as_well(data):
    models, kept = [nn.Sequential(nn.Linear(8, 4)) for _ in range(2)], {}

    def hook(module, inputs, output):
        return output + inputs[0] @ kept.setdefault("weight", module.weight.detach().clone()).T

    models[0][0].register_forward_hook(hook)
    with pytest.raises(lmc.InputError, match="Sequential: what it computes from one set of weights"):
        lmc.loss_path(models[0], *models, data, alphas=3, progress=False)


def test_hooks_that_only_record_are_no_caches(data):
    x, y = data
    models, seen, last = [Base(seed) for seed in range(3)], [], {}
    for model in models:
        model.a.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
        model.a.register_forward_hook(lambda _module, _inputs, output: last.update(output=output.detach()))
    path = lmc.loss_path(models[0], *models[1:], (x, y), alphas=3, progress=False)
    own = [F.cross_entropy(own_outputs(Base, model.state_dict(), x), y).item() for model in models[1:]]
    assert path.values["data"]["loss"][[0, 2]] == pytest.approx(own, abs=1e-6)


class MadeWhenLoaded(Base):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kept = self.scale_now()
        self.register_load_state_dict_post_hook(lambda module, _keys: setattr(module, "kept", module.scale_now()))

    def scale_now(self):
        return super().scale().detach()

    def scale(self):
        return self.kept


@pytest.mark.parametrize("called", [False, True])
def test_what_is_made_when_weights_are_loaded_is_made_for_each(called, data):
    x, y = data
    models = [MadeWhenLoaded(seed) for seed in range(3)]
    if called:
        models[0](x)
    path = lmc.loss_path(models[0], *models[1:], (x, y), alphas=3, progress=False)
    own = [F.cross_entropy(own_outputs(MadeWhenLoaded, m.state_dict(), x), y).item() for m in models[1:]]
    assert path.values["data"]["loss"][[0, 2]] == pytest.approx(own, abs=1e-6)
    with pytest.raises(lmc.InputError, match="it computes something when weights are loaded"):
        lmc.bezier_curve(models[0], *models[1:], (x, y), epochs=1, progress=False)


class MovingAverage(Base):
    """Evaluates with a copy of its parameters that no state dict has."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.shadow = {"table": self.table.detach().clone()}

    def scale(self):
        return 3 * (self.table if self.training else self.shadow["table"]).repeat(2)


def test_shadows_of_parameters_are_named(data):
    with pytest.warns(UserWarning, match="its outputs do not depend on table; it uses a tensor of that shape"):
        lmc.loss_path(*(MovingAverage(seed) for seed in range(3)), data, alphas=3, progress=False)


def test_inputs_that_want_gradients_get_none(data):
    x, y = data
    wanting = x.clone().requires_grad_()
    models = [Base(seed) for seed in range(3)]
    found = lmc.merge.fisher(models[0], models[1:], [wanting, wanting], samples=4, progress=False)
    lmc.merge.adamerging(
        models[0], models[1:], [wanting, wanting], base=models[0].state_dict(), steps=2, progress=False
    )
    assert wanting.grad is None and not any(tensor.requires_grad for tensor in found.values())


class ConstantsInAFile(Base):
    """Tables that do not depend on the weights may stay where they are."""

    def scale(self):
        if 6 not in KEPT:
            KEPT[6] = torch.linspace(0.5, 1.5, 6)
        return KEPT[6] * super().scale()


def test_shared_constants_are_no_caches(data):
    x, y = data
    KEPT.clear()
    states = [ConstantsInAFile(seed).state_dict() for seed in (1, 2)]
    path = lmc.loss_path(ConstantsInAFile(0), *states, (x, y), alphas=3, progress=False)
    own = [F.cross_entropy(own_outputs(ConstantsInAFile, state, x), y).item() for state in states]
    assert abs(path.values["data"]["loss"][[0, -1]] - own).max() < 1e-6


READ_ONLY = np.linspace(0.5, 1.5, 6)
READ_ONLY.flags.writeable = False
ARRAYS = {
    "reversed": np.linspace(1.5, 0.5, 6)[::-1],
    "read-only": READ_ONLY,
    "other bytes": np.linspace(0.5, 1.5, 6).astype(">f8"),
    "long": np.linspace(0.5, 1.5, 6).astype(np.longdouble),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_are_no_tensors_of_torch_may_be_kept(array, data):
    class Scaled(Base):
        def __init__(self, seed):
            super().__init__(seed)
            self.factors = array

        def scale(self):
            return torch.from_numpy(self.factors.astype(np.float64)).float() * super().scale()

    state = Scaled(1).state_dict()
    network = Network(Scaled(0), CPU)
    network.load(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(network(data[0]), own_outputs(Scaled, state, data[0]))


def test_parameters_are_replaced_with_one_warning(data):
    x, y = data
    model = LruFunction(0)
    with pytest.warns(UserWarning, match="LruFunction keeps values derived from its weights outside itself"):
        lmc.loss_path(model, LruFunction(1), LruFunction(2), (x, y), alphas=3, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lmc.loss_path(model, LruFunction(1), LruFunction(2), (x, y), alphas=3, progress=False)


class TrainsByItself(Base):
    """As models of Hugging Face: a `train` of their own, which does nothing to weights."""

    def train(self, mode: bool = True):
        changes = self.training != mode
        super().train(mode)
        return self.requires_grad_(mode) if changes else self


def test_modes_are_switched_with_each_weight_set_where_that_matters_alone(data):
    for kind, matters in ((TrainsByItself, False), (MergedInEval, True), (MadeInEval, True)):
        network = Network(kind(0), CPU)
        first, second = (kind(seed).state_dict() for seed in (1, 2))
        network.load(first)
        network(data[0])
        network.load(second)
        assert network.by_reference != matters
        fresh = Network(kind(0), CPU)
        fresh.load(second)
        assert torch.equal(network(data[0]), fresh(data[0]))


def test_modules_that_only_hold_parameters_keep_weights_by_reference(data):
    x, _ = data
    network = Network(Base(0), CPU)
    weights = Base(1).state_dict()
    network.load(weights)
    network(x)
    assert network.by_reference
    weights["table"].mul_(2)
    assert torch.allclose(network(x), own_outputs(Base, weights, x))


def test_scripted_modules(data):
    x, y = data
    states = [Base(seed).state_dict() for seed in (1, 2)]

    class Plain(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.a, self.b, self.table = nn.Linear(8, 6), nn.Linear(6, 4), nn.Parameter(torch.rand(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.relu(self.a(x) * 3 * self.table.repeat(2)))

    scripted = torch.jit.script(Plain(0))
    before = {name: slot.clone() for name, slot in scripted.state_dict().items()}
    path = lmc.loss_path(scripted, *states, (x, y), alphas=3, progress=False)
    plain = lmc.loss_path(Base(0), *states, (x, y), alphas=3, progress=False)
    assert abs(path.values["data"]["loss"] - plain.values["data"]["loss"]).max() < 1e-6
    lmc.repair(scripted, states, x, progress=False)
    found = [
        lmc.landscape.curvature(model, states[0], (x, y), progress=False).eigenvalues for model in (scripted, Base(0))
    ]
    assert np.allclose(*found, rtol=1e-3)
    assert all(torch.equal(slot, before[name]) for name, slot in scripted.state_dict().items())


class Fused(nn.Module):
    """Its state dict holds two of its parameters as one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.q, self.k, self.o = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False), nn.Linear(6, 4)
        self._register_state_dict_hook(Fused.fuse)
        self._register_load_state_dict_pre_hook(self.split)

    @staticmethod
    def fuse(module, state, prefix, metadata):
        state[prefix + "qk"] = torch.cat([state.pop(prefix + "q.weight"), state.pop(prefix + "k.weight")])

    def split(self, state, prefix, *_):
        state[prefix + "q.weight"], state[prefix + "k.weight"] = state.pop(prefix + "qk").chunk(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(F.relu(self.q(x)) * self.k(x))


def test_state_dicts_with_other_names_than_the_module(data):
    x, y = data
    model = Fused(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = [Fused(seed).state_dict() for seed in (1, 2)]
    path = lmc.loss_path(model, *states, (x, y), alphas=3, progress=False)
    own = [F.cross_entropy(own_outputs(Fused, state, x), y).item() for state in states]
    assert abs(path.values["data"]["loss"][[0, -1]] - own).max() < 1e-6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(lmc.InputError, match="qk"):
        lmc.landscape.curvature(model, states[0], (x, y), progress=False)
    with pytest.warns(UserWarning, match=r"^Fused: hooks store parameters under other names \(qk\)"):
        spec = lmc.permutation_spec(model, x[:2], progress=False)
    assert "qk" in spec.shapes and not any("qk" in group.tables for group in spec.groups.values())


@pytest.mark.parametrize(
    "call",
    [
        lambda m, a, b, x, y: lmc.merge.fisher(m, [a, b], [x, x], progress=False),
        lambda m, a, b, x, y: lmc.merge.regmean(m, [a, b], [x, x], progress=False),
        lambda m, a, b, x, y: lmc.merge.adamerging(m, [a, b], [x, x], base=m, steps=1, progress=False),
        lambda m, a, b, x, y: lmc.merge.ama(m, [a, b], (x, y), base=m, steps=1, progress=False),
        lambda m, a, b, x, y: lmc.merge.learned_soup(m, [a, b], (x, y), epochs=1, progress=False),
        lambda m, a, b, x, y: lmc.landscape.curvature(m, a, (x, y), top=1, probes=1, steps=2, progress=False),
        lambda m, a, b, x, y: lmc.bezier_curve(m, a, b, (x, y), epochs=1, progress=False),
        lambda m, a, b, x, y: lmc.repair(m, [a, b], x, progress=False),
        lambda m, a, b, x, y: lmc.recalibrate_batchnorm(m, a, x),
        lambda m, a, b, x, y: lmc.landscape.variance_ratios(m, a, [a, b], x, progress=False),
        lambda m, a, b, x, y: lmc.loss_path(m, a, b, (x, y), alphas=3, progress=False),
    ],
)
def test_inputs_that_are_no_numbers_are_named(call, data):
    x, y = data
    bad = x.clone()
    bad[3, 2] = torch.nan
    with pytest.raises(lmc.DataError, match=r"inputs of shape \(\d+, 8\) hold NaN, first at"):
        call(*(Base(seed) for seed in range(3)), bad, y)


class Chosen(Base):
    """Keeps which units are largest: an index, or how many there are: numbers that are no floating-point ones."""

    def __init__(self, seed: int, what: str) -> None:
        super().__init__(seed)
        self.what, self.kept = what, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.a.weight.detach().norm(dim=1)
        if self.kept is None:
            self.kept = {"index": size.topk(3).indices, "mask": size > size.median(), "number": int(size.argmax())}[
                self.what
            ]
        chosen = F.one_hot(torch.tensor(self.kept), 6) if self.what == "number" else self.kept
        scale = torch.zeros(6).index_fill(0, chosen, 1.0) if self.what == "index" else chosen
        return self.b(F.relu(self.a(x)) * scale)


@pytest.mark.parametrize("what", ["index", "mask", "number"])
@pytest.mark.parametrize("called", [False, True])
def test_choices_that_depend_on_weights_are_made_for_each(what, called, data):
    x, y = data
    models = [Chosen(seed, what) for seed in range(6)]
    if called:
        models[0](x)
    for a, b in zip(models[1:-1], models[2:], strict=True):
        path = lmc.loss_path(models[0], a, b, (x, y), alphas=3, progress=False)
        own = [F.cross_entropy(own_outputs(lambda s: Chosen(s, what), m.state_dict(), x), y).item() for m in (a, b)]
        assert path.values["data"]["loss"][[0, 2]] == pytest.approx(own, abs=1e-6)


class Switched(Base):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kept, self.wanted = None, False

    def scale(self):
        if not self.wanted:
            return super().scale()
        self.kept = super().scale() if self.kept is None else self.kept
        return self.kept


def test_a_module_that_was_changed_is_looked_at_again(data):
    x, y = data
    models = [Switched(seed) for seed in range(3)]
    own = [F.cross_entropy(own_outputs(Switched, m.state_dict(), x), y).item() for m in models[1:]]
    for wanted in (False, True):
        models[0].wanted = wanted
        path = lmc.loss_path(models[0], *models[1:], (x, y), alphas=3, progress=False)
        assert path.values["data"]["loss"][[0, 2]] == pytest.approx(own, abs=1e-6)


class Counting(Base):
    """Its outputs grow with every call."""

    def __init__(self, seed: int, kind: str = "number") -> None:
        super().__init__(seed)
        self.kind, self.calls = kind, [0] if kind == "list" else 0
        if kind.startswith("buffer"):
            del self.calls
            self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=kind == "buffer")

    def forward(self, x):
        if self.kind == "list":
            self.calls[0] += 1
        else:
            self.calls += 1
        return super().forward(x) * (self.calls[0] if self.kind == "list" else self.calls)


@pytest.mark.parametrize("kind", ["number", "list", "buffer", "buffer outside the state dict"])
def test_modules_whose_outputs_depend_on_the_calls_before_are_refused(kind, data):
    a, b = Counting(0, kind), Counting(1, kind)
    b.eval()(data[0])
    with pytest.raises(lmc.InputError, match="other outputs the second time.*calls changed"):
        lmc.loss_path(a, a, b, data, alphas=3, progress=False)


def test_what_a_copy_misses_when_it_was_called_before_is_no_constant(data):
    class Once(Base):
        """Its first call is told from others by an object into which nobody can look."""

        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.kept, self.random = torch.zeros(6), random.Random(0)

        def scale(self):
            if self.random.random() > 0.8:  # 0.84, then 0.76 and less for a while
                self.kept = super().scale().detach()
            return self.kept

    with pytest.raises(lmc.InputError, match="Once: what it computes from one set of weights"):
        lmc.loss_path(Once(0), Once(1), Once(2), data, alphas=3, progress=False)


def test_parameters_that_are_written_while_operators_are_recorded_stay_the_callers(data):
    class Initialised(Base):
        """Its bias is set by the first inputs, as activation normalisation does."""

        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.register_buffer("initialised", torch.tensor(0))

        def forward(self, x):
            if int(self.initialised) == 0:
                self.a.bias.data.copy_(-self.a(x).detach().mean(0))
                self.initialised.fill_(1)
            return super().forward(x)

    model = Initialised(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lmc.permutation_spec(model, data[0][:2], progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class SlotsAndMore(Slotted):
    """Slots beside a `__dict__`, one of them private."""

    __slots__ = ("__dict__", "__factor")

    def __init__(self) -> None:
        self.kept, self.more = None, {}
        self.__factor = None

    def factor(self, made):
        if self.__factor is None:
            self.__factor = float(made)
        return self.__factor


class Attributed(dict):
    pass


def keep_in(holder, made):
    if getattr(holder, "place", None) is None:
        setattr(holder, "place", made)  # noqa: B010
    return holder.place


def keep_made(holder, made):
    if holder.kept is None:
        holder.kept = made
    return holder.kept


def keep_in_dict(kept: dict, made):
    return kept.setdefault("made", made)


# The place in which a module keeps what it made of its weights, and how it is asked for there.
PLACES = {
    "a text": (lambda: None, lambda m, made: torch.tensor(eval(keep_in(m, repr(made.tolist()))))),
    "bytes": (lambda: None, lambda m, made: torch.from_numpy(np.frombuffer(keep_in(m, made.numpy().tobytes()), np.float32).copy())),
    "a frozen set": (lambda: None, lambda m, made: made * 0 + max(keep_in(m, frozenset(made.tolist())))),
    "a number of numpy": (lambda: None, lambda m, made: made * 0 + float(keep_in(m, np.float32(made.sum())))),
    "an object in a tuple": (lambda: (SlotsAndMore(),), lambda m, made: keep_made(m.place[0], made)),
    "a private slot": (SlotsAndMore, lambda m, made: made * 0 + m.place.factor(made.sum())),
    "a UserDict": (UserDict, lambda m, made: m.place.setdefault("made", made)),
    "an attribute of a dict": (Attributed, lambda m, made: keep_in(m.place, made)),
    "an argument of a partial function": (lambda: functools.partial(keep_in_dict, {}), lambda m, made: m.place(made)),
    "the object of a method": (lambda: SlotsAndMore().factor, lambda m, made: made * 0 + m.place(made.sum())),
    "an attribute of a layer": (lambda: None, lambda m, made: keep_in(m.a, made)),
    "a number on a layer": (lambda: None, lambda m, made: made * 0 + keep_in(m.a, float(made.sum()))),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("called", [False, True])
def test_values_are_dropped_wherever_a_module_can_keep_them(place, called, data):
    make, ask = PLACES[place]

    class Keeping(Base):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.place, self.ask = make(), ask

        def scale(self):
            return self.ask(self, super().scale().detach())

    x, model = data[0], Keeping(0)
    if called:
        model.eval()(x)
    network = Network(model, CPU)
    for seed in (1, 2):
        network.load(Keeping(seed).state_dict())
        assert torch.allclose(network(x), own_outputs(Keeping, Keeping(seed).state_dict(), x), atol=1e-6)


class ByLengthOf(Base):
    """Tables by the number of examples, in a dict that one of its texts is a constant of."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.by_length, self.mixed = {}, {"half": torch.tensor(0.5)}

    def forward(self, x):
        if len(x) not in self.by_length:
            self.by_length[len(x)] = super().scale().detach().expand(len(x), -1)
        if "made" not in self.mixed:
            self.mixed["made"] = super().scale().detach()
        return self.b(F.relu(self.a(x) * self.by_length[len(x)] * self.mixed["made"] * self.mixed["half"]))


def test_what_is_kept_for_inputs_that_the_examination_does_not_have_is_dropped_as_well(data):
    x, model = data[0], ByLengthOf(0)
    model.eval()(x), model(x[:2]), model(x[:5])
    network = Network(model, CPU)
    for seed in (1, 2):
        network.load(ByLengthOf(seed).state_dict())
        for part in (x, x[:5], x[:2]):
            assert torch.allclose(
                network(part), own_outputs(ByLengthOf, ByLengthOf(seed).state_dict(), part), atol=1e-5
            )


def test_what_is_kept_in_layers_that_the_examination_does_not_reach_is_dropped_as_well(data):
    class Deep(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.near, self.far = DroppedInSlots(seed), DroppedInSlots(seed + 10)

        def forward(self, x):
            return self.near(x) + self.far(x) if len(x) > 2 else self.near(x)

    x, model = data[0], Deep(0)
    model.eval()(x)
    network = Network(model, CPU)
    network(x[:2])
    network.load(Deep(1).state_dict())
    assert torch.allclose(network(x), own_outputs(Deep, Deep(1).state_dict(), x), atol=1e-6)


class DroppedInSlots(Base):
    kept = None

    def scale(self):
        self.kept = super().scale().detach() if self.kept is None else self.kept
        return self.kept


@pytest.mark.parametrize("draws", [lambda h: F.dropout(h, 0.5), lambda h: h + torch.randn(6)])
def test_modules_that_draw_in_evaluation_mode_are_named(draws, data):
    class Drawing(Base):
        def forward(self, x):
            return self.b(draws(F.relu(self.a(x))))

    class Idle(Base):
        def forward(self, x):
            torch.rand(2)
            return super().forward(x)

    with pytest.warns(UserWarning, match="Drawing: it draws random numbers in evaluation mode"):
        lmc.loss_path(Drawing(0), Drawing(1), Drawing(2), data, alphas=3, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lmc.loss_path(Idle(0), Idle(1), Idle(2), data, alphas=3, progress=False)


def counted():
    yield from range(1, 100)


def asked_once():
    """A generator that keeps what it is sent first."""
    made = yield
    while True:
        yield made


def started():
    generator = asked_once()
    next(generator)
    return generator


def filled(buffer, made):
    """Numbers kept in a buffer, where nothing or zeros stand in it."""
    if not any(buffer):
        buffer[:] = array.array("f", made.tolist()) if isinstance(buffer, array.array) else made.numpy().tobytes()
    return torch.from_numpy(np.frombuffer(bytes(buffer), np.float32).copy())


def first_of_all(m, made):
    if next(m.place, None) is None:
        m.place = itertools.repeat(made)
    return next(m.place)


def kept_as_object(array, made):
    if array[0] is None:
        array[0] = made
    return array[0]


OPAQUE = {
    "count": (lambda: itertools.count(1), lambda m, made: made * next(m.place)),
    "generator": (counted, lambda m, made: made * next(m.place)),
    "cycle": (lambda: itertools.cycle((1, 2, 5)), lambda m, made: made * next(m.place)),
    "list_iterator": (lambda: iter([1.0] * 1000), lambda m, made: made * next(m.place)),
    "repeat": (lambda: iter(()), first_of_all),
    "generator that is sent weights": (started, lambda m, made: m.place.send(made)),
    "count's own method": (lambda: itertools.count(1).__next__, lambda m, made: made * m.place()),
    "bytearray": (bytearray, lambda m, made: filled(m.place, made)),
    "array": (lambda: array.array("f"), lambda m, made: filled(m.place, made)),
    "memoryview": (lambda: memoryview(bytearray(24)), lambda m, made: filled(m.place, made)),
    "ndarray": (lambda: np.array([None]), lambda m, made: kept_as_object(m.place, made)),
}


@pytest.mark.parametrize("place", OPAQUE)
def test_what_can_be_neither_looked_into_nor_put_back_is_refused_by_name_once_it_holds_something(place, data):
    make, ask = OPAQUE[place]

    class Hiding(Base):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.place, self.ask = make(), ask

        def scale(self):
            return self.ask(self, super().scale().detach())

    model = Hiding(0)
    for _ in range(2):
        model.eval()(data[0])
    with pytest.raises(
        lmc.InputError, match=f"Hiding: its outputs depend on place \\({place.split()[0].split(chr(39))[0]}\\)"
    ):
        lmc.loss_path(model, Hiding(1), Hiding(2), data, alphas=3, progress=False)


def test_iterators_on_which_no_output_depends_are_let_be(data):
    class Numbered(Base):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.numbers, self.last = itertools.count(), 0

        def scale(self):
            self.last = next(self.numbers)
            return super().scale()

    network, weights = Network(Numbered(0), CPU), Numbered(1).state_dict()
    network.load(weights)
    assert torch.equal(network(data[0]), own_outputs(Numbered, weights, data[0]))


class Registry:
    """A class of no module, of which a module keeps something on the class or on one object."""


def keeping_function(made):
    if not hasattr(keeping_function, "made"):
        keeping_function.made = made
    return keeping_function.made


class OnAClass(Base):
    made = None

    def scale(self):
        if self.made is None:
            type(self).made = super().scale().detach()
        return self.made


class OnAnObjectOfAFile(Base):
    def scale(self):
        if not hasattr(Registry, "made"):
            Registry.made = super().scale().detach()
        return Registry.made


class OnAFunction(Base):
    def scale(self):
        return keeping_function(super().scale().detach())


@pytest.mark.parametrize("kind", [OnAClass, OnAnObjectOfAFile, OnAFunction])
@pytest.mark.parametrize("called", [False, True])
def test_attributes_of_what_all_copies_share_are_refused_and_left_as_they_were(kind, called, data):
    holder = {OnAClass: OnAClass, OnAnObjectOfAFile: Registry, OnAFunction: keeping_function}[kind]
    before = vars(holder).get("made")
    try:
        if called:
            kind(0).eval()(data[0])
        made = vars(holder).get("made")
        with pytest.raises(lmc.InputError, match="what it computes from one set of weights is used again"):
            lmc.loss_path(kind(0), kind(1), kind(2), data, alphas=3, progress=False)
        assert vars(holder).get("made") is made
        assert "made" in vars(holder) or not called
    finally:
        if "made" in vars(holder):
            delattr(holder, "made")
        if before is None and kind is OnAClass:
            OnAClass.made = None


def test_an_error_of_an_examination_is_no_verdict(data, monkeypatch):
    class Plain(Base):
        pass

    monkeypatch.setattr("lmc.network.examination.removable", lambda *_: 1 / 0)
    with pytest.raises(lmc.InputError, match="Plain: it can be called, but not examined.*ZeroDivisionError"):
        lmc.loss_path(Plain(0), Plain(1), Plain(2), data, alphas=3, progress=False)


def test_counts_that_do_not_matter_are_no_calls(data):
    class Counted(Base):
        count = 0

        def forward(self, x):
            self.count += 1
            return super().forward(x)

    a, b = Counted(0), Counted(1)
    path = lmc.loss_path(a, a, b, data, alphas=3, progress=False)
    expected = [F.cross_entropy(own_outputs(Counted, m.state_dict(), data[0]), data[1]).item() for m in (a, b)]
    assert path.values["data"]["loss"][[0, -1]] == pytest.approx(expected, abs=1e-5)


def test_compiled_modules_run_as_they_were_written(data):
    x, compiled = data[0], []

    def backend(graph, _example):
        compiled.append(graph)
        return graph.forward

    plain = [Base(seed) for seed in (0, 1)]
    a, b = (torch.compile(module, backend=backend) for module in plain)
    a(x), a.eval()(x)
    before = len(compiled)
    path = lmc.loss_path(a, a, b, data, alphas=3, progress=False)
    expected = [F.cross_entropy(own_outputs(Base, m.state_dict(), x), data[1]).item() for m in plain]
    assert path.values["data"]["loss"][[0, -1]] == pytest.approx(expected, abs=1e-5)
    spec = lmc.permutation_spec(a, x[:2], progress=False)
    lmc.activation_matching(spec, a, a, b, x, progress=False)  # hooks are not compiled along
    assert len(compiled) == before


def test_a_module_that_fails_on_inputs_is_named(data):
    a, b = Base(0), Base(1)
    spec = lmc.permutation_spec(a, data[0][:2], progress=False)
    with pytest.raises(lmc.DataError, match=r"the model \(Base\) fails on inputs \(2, 5\) torch.float32"):
        lmc.activation_matching(spec, a, a, b, data[0][:, :5], progress=False)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_stack_of_transformers_goes_through_their_plain_operations():
    """Torch's fused layer takes no stack: it would be called one network after the other, with a warning each time."""
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval() for _ in range(3)]
    inputs = torch.randn(4, 5, 8)
    network = Network(layers[0], torch.device("cpu"))
    together = network.many(network.stack([layer.state_dict() for layer in layers]), inputs)
    torch.testing.assert_close(together, torch.stack([layer(inputs) for layer in layers]))
    assert torch.backends.mha.get_fastpath_enabled()


def test_threads_that_write_attention_out_leave_the_settings_as_they_were():
    """They are the same for all threads: the second to come must not put back what the first has set."""
    first, second = attention_written_out(), attention_written_out()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled() and not torch.backends.cuda.flash_sdp_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()
