"""No function of several networks depends on how one of them writes its normalised weights."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lmc
from lmc import merge
from lmc.network.derived import derived_in, gauged

Q: dict[str, Any] = {"progress": False}
NORMS = {
    "weight": parametrizations.weight_norm,
    "weight, hook": nn.utils.weight_norm,
    "spectral": parametrizations.spectral_norm,
    "spectral, hook": nn.utils.spectral_norm,
}
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def network(norm: str, seed: int) -> nn.Sequential:
    """A square layer in the middle, along whose axes a spectral normalisation could run in two ways."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [NORMS[norm](nn.Linear(*sizes)) for sizes in ((6, 8), (8, 8), (8, 3))]
        model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
        for _ in range(40):  # power iterations
            model(X)
    return model.eval()


def rewritten(model: nn.Module) -> dict[str, Tensor]:
    """The same function: longer directions, or larger weights and vectors of the other sign."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for kind in derived_in(state):
        if len(kind.derived) == 2:
            state[kind.u], state[kind.v], state[kind.weight] = -state[kind.u], -state[kind.v], 3 * state[kind.weight]
        else:
            state[kind.direction] = 4 * state[kind.direction]
    return state


Call = Callable[[nn.Module, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]], Any]
WITH_SUMS = ("zipit", "zipit, half", "pleas", "pleas, weights")
CALLS: dict[str, Call] = {
    "model_stock": lambda m, a, b, c: merge.model_stock([a, b], base=c),
    "swa": lambda m, a, b, c: merge.swa([a, b]),
    "ema": lambda m, a, b, c: merge.ema([a, b], decay=0.5),
    "fisher": lambda m, a, b, c: merge.fisher(m, [a, b], [X, X], samples=8, **Q),
    "regmean": lambda m, a, b, c: merge.regmean(m, [a, b], [X, X], **Q),
    "adamerging": lambda m, a, b, c: merge.adamerging(m, [a, b], [X, X], base=c, steps=5, lr=0.1, **Q),
    "ama": lambda m, a, b, c: merge.ama(m, [a, b], (X, Y), base=c, steps=5, groups=2, **Q),
    "learned_soup": lambda m, a, b, c: merge.learned_soup(m, [a, b], (X, Y), epochs=2, **Q),
    "star": lambda m, a, b, c: merge.star_model(m, [a, b], (X, Y), epochs=2, batch_size=16, **Q).weights,
    "curve": lambda m, a, b, c: lmc.bezier_curve(m, a, b, (X, Y), epochs=2, batch_size=16, **Q).at(0.4),
    "chain": lambda m, a, b, c: lmc.polygonal_chain(m, a, b, (X, Y), epochs=2, batch_size=16, **Q).at(0.4),
    "ot_fusion": lambda m, a, b, c: lmc.ot_fusion(m, a, b, X, **Q).weights,
    "repair": lambda m, a, b, c: lmc.repair(m, [a, b], X, **Q),
    "zipit": lambda m, a, b, c: merge.zipit(m, [a, b], X, **Q),
    "zipit, half": lambda m, a, b, c: merge.zipit(m, [a, b], X, ratio=0.5, **Q),
    "pleas": lambda m, a, b, c: merge.pleas(m, [a, b], X, **Q),
    "pleas, weights": lambda m, a, b, c: merge.pleas(m, [a, b], **Q),
    "plane": lambda m, a, b, c: lmc.loss_plane(m, [a, b, c], (X, Y), resolution=5, **Q),
    "match_many": lambda m, a, b, c: merge.average(
        lmc.match_many(lmc.permutation_spec(m, X[:2], **Q), [a, b, c], **Q).apply([a, b, c])
    ),
}


def computed(norm: str, found: Any) -> Tensor:
    """What the network that was found computes, or the numbers that were."""
    if isinstance(found, lmc.merge.Zipped):
        return found.module(X)
    if hasattr(found, "values") and not callable(found.values):
        return torch.as_tensor(found.values["data"]["loss"])
    model = network(norm, 9)
    model.load_state_dict(found)
    return model(X)


@pytest.mark.parametrize("norm", ["weight, hook", "spectral"])
@pytest.mark.parametrize("how", CALLS)
def test_nothing_depends_on_how_a_network_is_written(how, norm):
    a, b, c = (network(norm, seed).state_dict() for seed in range(3))
    again = rewritten(network(norm, 1))
    if norm.startswith("spectral") and how in WITH_SUMS:
        with pytest.raises(lmc.InputError, match="fixes the scale of the weight"):
            CALLS[how](network(norm, 3), a, b, c)
        return
    results = [computed(norm, CALLS[how](network(norm, 3), a, other, c)) for other in (b, again)]
    assert torch.allclose(*results, atol=1e-4)


@pytest.mark.parametrize("norm", ["weight", "weight, hook"])
def test_sums_over_units_have_lengths_of_their_own(norm):
    a, b = network(norm, 0), network(norm, 1)
    ensemble = (a(X) + b(X)) / 2
    for found in (
        merge.zipit(a, [a, b], X, ratio=1.0, **Q),
        merge.pleas(a, [a, b], X, ratio=1.0, **Q),
    ):
        assert torch.allclose(found.module(X), ensemble, atol=1e-5)
    fits = merge.pleas(a, [a, b], X, ratio=0.0, **Q).info["least_squares"]
    assert len(fits) == 3 and fits[list(fits)[1]].after < fits[list(fits)[1]].before
    assert len(merge.regmean(a, [a, b], [X, X], **Q).report.fitted) == 3


@pytest.mark.parametrize("norm", NORMS)
def test_fisher_information_is_that_of_the_weight_in_use(norm):
    model = network(norm, 0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    plain.load_state_dict(
        {f"{i}.{own}": getattr(model[i], own).detach() for i in (0, 2, 4) for own in ("weight", "bias")}
    )
    found, expected = (merge.fisher_information(m, None, X, samples=8) for m in (model, plain))
    assert len(found) == len(expected)
    for name, information in found.items():
        own = f"{name[0]}.{'bias' if name.endswith('bias') else 'weight'}"
        if norm.startswith("weight") or own.endswith("bias"):
            assert torch.allclose(information, expected[own], rtol=1e-4, atol=1e-6)


class Softplus(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight)


def test_a_spectral_normalisation_behind_another_parametrization_is_left_as_it_is():
    models = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layer = nn.Linear(6, 6)
            parametrize.register_parametrization(layer, "weight", Softplus())
            model = nn.Sequential(parametrizations.spectral_norm(layer), nn.ReLU(), nn.Linear(6, 3))
            for _ in range(20):
                model(X)
            models.append(model.eval())
    with pytest.warns(UserWarning, match="0.parametrizations.weight.1._u .*behind another parametrization"):
        path = lmc.loss_path(models[0], *models, (X, Y), alphas=3, **Q)
    own = [F.cross_entropy(model(X), Y).item() for model in models]
    assert path.values["data"]["loss"][[0, 2]] == pytest.approx(own, abs=1e-5)


class Gated(nn.Module):
    """Parameters that are called as those of a weight normalisation, and are none."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.weight_g = nn.Parameter(torch.rand(8, 1, generator=rng))
        self.weight_v = nn.Parameter(torch.randn(8, 6, generator=rng))
        self.gate_g, self.gate_v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(x @ self.weight_v.T) * self.gate_v * self.gate_g + self.weight_g.T)[:, :3]


def test_names_alone_make_no_normalisation():
    a, b = Gated(0), Gated(1)
    path = lmc.loss_path(a, a, b, (X, Y), alphas=3, **Q)
    own = [F.cross_entropy(model(X), Y).item() for model in (a, b)]
    assert path.values["data"]["loss"][[0, 2]] == pytest.approx(own, abs=1e-6)
    middle = merge.average([a, b])
    assert torch.allclose(middle["weight_g"], (a.weight_g + b.weight_g) / 2)
    assert torch.equal(gauged(a.state_dict())["gate_v"], a.gate_v)
    bend = lmc.bezier_curve(a, a, b, (X, Y), epochs=1, **Q).controls[1]
    assert not torch.equal(bend["weight_g"], middle["weight_g"])
    plane = lmc.loss_plane(a, [a, b, Gated(2)], (X, Y), resolution=5, **Q)
    assert plane.project(b)[2] < 1e-4
