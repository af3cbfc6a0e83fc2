"""Both ends of a path are the networks themselves, for every kind of module that keeps something beside its weights."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from lmc.landscape.path import loss_path
from lmc.landscape.planes.plane import loss_plane

RANDOM = torch.Generator().manual_seed(0)
X, Y = torch.randn(32, 8, generator=RANDOM), torch.randint(0, 4, (32,), generator=RANDOM)


class Cached(nn.Module):
    """Keeps a tensor derived from its weights on the first call in evaluation mode."""

    def __init__(self, how):
        super().__init__()
        self.a, self.table, self.b = nn.Linear(8, 16), nn.Parameter(torch.randn(16)), nn.Linear(16, 4)
        self.how, self.cache, self.bias = how, {}, None

    def train(self, mode=True):
        if mode and self.how != "never dropped":
            self.cache = {}
        elif not mode and self.how == "made by eval":
            self.bias = 3 * self.table.detach()
        return super().train(mode)

    def scale(self):
        if self.how == "made by eval":
            return 3 * self.table if self.training else self.bias
        if self.how == "lru_cache":
            return self.computed()
        return self.cache.setdefault("scale", 3 * self.table)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def computed(self):
        return 3 * self.table

    def forward(self, x):
        return self.b(F.relu(self.a(x) * self.scale()))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(self.b(self.a(x).relu()))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 12, dtype=torch.cfloat), nn.Linear(12, 4, dtype=torch.cfloat)

    def forward(self, x):
        return self.b(self.a(x.to(torch.cfloat))).abs()


class Counting(nn.Module):
    """Writes a buffer in every forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


def sequential(*layers):
    return nn.Sequential(nn.Linear(8, 12), *layers, nn.ReLU(), nn.Linear(12, 4))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.cell(x[:, None].repeat(1, 3, 1))[0][:, -1])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.attention(x[:, None].repeat(1, 3, 1)).mean(1))


KINDS = {
    "linear": lambda: nn.Linear(8, 4),
    "batch normalisation": lambda: sequential(nn.BatchNorm1d(12)),
    "batch normalisation without statistics": lambda: sequential(nn.BatchNorm1d(12, track_running_stats=False)),
    "layer normalisation": lambda: sequential(nn.LayerNorm(12)),
    "group normalisation": lambda: sequential(nn.GroupNorm(3, 12)),
    "tracked instance normalisation": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)),
        nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(8, 4),
    ),
    "dropout": lambda: sequential(nn.Dropout(0.5)),
    "random ReLU": lambda: nn.Sequential(nn.Linear(8, 12), nn.RReLU(), nn.Linear(12, 4)),
    "PReLU": lambda: sequential(nn.PReLU(12)),
    "weight normalisation": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 12)), nn.Linear(12, 4)),
    "old weight normalisation": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 12)), nn.Linear(12, 4)),
    "spectral normalisation": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 12)), nn.Linear(12, 4)),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 4)),
    "tied": Tied,
    "complex": Complex,
    "writes a buffer": Counting,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "attention": Attending,
    "cache dropped by train": lambda: Cached("dropped"),
    "cache never dropped": lambda: Cached("never dropped"),
    "made by eval": lambda: Cached("made by eval"),
    "lru_cache": lambda: Cached("lru_cache"),
    "scripted": lambda: torch.jit.script(sequential()),
    "double": lambda: nn.Linear(8, 4).double(),
    "half": lambda: nn.Linear(8, 4).bfloat16(),
}


def trained_twice(kind):
    made = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        model = KINDS[kind]()
        dtype = next(model.parameters()).dtype
        inputs = X.to(dtype if dtype.is_floating_point else torch.float32)
        with torch.no_grad():
            for _ in range(3):
                model(inputs)  # in train mode: running statistics and power iterations get values of their own
            made.append(model.eval())
    return made, inputs


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_ends_score_what_the_networks_score(kind, called):
    (a, b, c), inputs = trained_twice(kind)
    with torch.no_grad():
        own = [F.cross_entropy(model(inputs).float(), Y).item() for model in (a, b)]
    torch.manual_seed(0)
    model = c if called else KINDS[kind]()
    path = loss_path(model, a.state_dict(), b.state_dict(), (inputs, Y), alphas=3, progress=False)
    assert path.own["data"]["loss"] == pytest.approx(tuple(own), rel=1e-4 if kind != "half" else 2e-2)
    if not path.recalibrated:
        assert path.losses["data"][[0, -1]] == pytest.approx(own, rel=1e-4 if kind != "half" else 2e-2)
    assert abs(path.losses["data"][0] - path.losses["data"][-1]) > 1e-6


@pytest.mark.parametrize("kind", ["complex", "cache dropped by train", "weight normalisation", "tied"])
def test_the_corners_of_a_plane_score_what_the_networks_score(kind):
    models, inputs = trained_twice(kind)
    with torch.no_grad():
        own = [F.cross_entropy(model(inputs).float(), Y).item() for model in models]
    states = [model.state_dict() for model in models]
    plane = loss_plane(models[0], states, (inputs, Y), resolution=5, progress=False)
    assert plane.own["data"]["loss"] == pytest.approx(tuple(own), rel=1e-4)
    for (x, y), loss in zip(plane.places.values(), own, strict=True):
        assert plane.exact(x, y)["data"].loss == pytest.approx(loss, rel=1e-3)
