"""Derived state: averages do not depend on how a network writes its weights."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as p

import lmc
from lmc.network.derived import derived_in, derived_names, gauged, settled


def old(norm, layer):
    with pytest.warns(FutureWarning) if norm is nn.utils.weight_norm else _nothing():
        return norm(layer)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


NORMS = {
    "spectral": p.spectral_norm,
    "spectral, hook": nn.utils.spectral_norm,
    "weight": p.weight_norm,
    "weight, hook": nn.utils.weight_norm,
}
every = pytest.mark.parametrize("norm", NORMS)


def network(norm: str, seed: int, *, convolution: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = nn.Sequential(nn.ConvTranspose1d(4, 6, 2), nn.Flatten()) if convolution else nn.Linear(8, 18)
        if convolution:
            first[0] = old(NORMS[norm], first[0])
        else:
            first = old(NORMS[norm], first)
        model = nn.Sequential(first, nn.ReLU(), old(NORMS[norm], nn.Linear(18, 4)))
        for _ in range(200):  # power iterations
            model(_inputs(convolution))
    return model.eval()


def _inputs(convolution: bool) -> torch.Tensor:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
    return x.view(64, 4, 2) if convolution else x


def rewritten(model: nn.Module) -> dict[str, torch.Tensor]:
    """The same function, written otherwise."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for kind in derived_in(state):
        if len(kind.derived) == 2:
            state[kind.u], state[kind.v], state[kind.weight] = -state[kind.u], -state[kind.v], 3 * state[kind.weight]
        else:
            state[kind.direction] = 5 * state[kind.direction]
    return state


@every
@pytest.mark.parametrize("convolution", [False, True])
def test_two_ways_to_write_one_network_have_a_flat_path(norm, convolution):
    model, x = network(norm, 0, convolution=convolution), _inputs(convolution)
    y = torch.arange(64) % 4
    other = rewritten(model)
    path = lmc.loss_path(model, model, other, (x, y), alphas=5, progress=False)
    own = nn.functional.cross_entropy(model(x), y).item()
    assert abs(path.values["data"]["loss"] - own).max() < 1e-5


@every
def test_merges_do_not_depend_on_how_a_network_is_written(norm):
    a, b, x = network(norm, 0), network(norm, 1), _inputs(False)
    for method in (lmc.merge.average, lambda models: lmc.merge.task_arithmetic(models[1:], base=models[0], scale=0.5)):
        results = []
        for second in (b.state_dict(), rewritten(b)):
            merged = network(norm, 2)
            merged.load_state_dict(method([a.state_dict(), second]))
            results.append(merged(x))
        assert torch.allclose(*results, atol=1e-5)
    same = network(norm, 2)
    same.load_state_dict(lmc.merge.average([a.state_dict(), rewritten(a)]))
    assert torch.allclose(same(x), a(x), atol=1e-5)


@every
def test_the_average_is_that_of_the_weights_in_use(norm):
    a, b = network(norm, 0), network(norm, 1)
    merged = network(norm, 2)
    merged.load_state_dict(lmc.merge.average([a.state_dict(), b.state_dict()]))
    x = _inputs(False)
    merged(x), a(x), b(x)
    mean = (a[2].weight + b[2].weight) / 2
    if norm.startswith("spectral"):
        mean = mean / torch.linalg.matrix_norm(mean, 2)
    assert torch.allclose(merged[2].weight, mean, atol=1e-5)


@every
def test_gauging_and_settling_keep_a_single_network(norm):
    model, x = network(norm, 0), _inputs(False)
    state = rewritten(model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    copied = network(norm, 1)
    copied.load_state_dict(settled(gauged(state)))
    assert torch.allclose(copied(x), model(x), atol=1e-5)
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert derived_names(state) and not derived_in(nn.Linear(3, 3).state_dict())


def test_tracked_statistics_of_instance_normalisation_are_estimated():
    model = nn.Sequential(
        nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten(), nn.Linear(12, 3)
    )
    x = torch.randn(32, 2, 4, generator=torch.Generator().manual_seed(0)) + 3
    found = lmc.recalibrate_batchnorm(model.eval(), None, x)
    seen = model[0](x)
    assert torch.allclose(found["1.running_mean"], seen.mean((0, 2)), atol=1e-5)
    assert torch.allclose(found["1.running_var"], seen.var(2).mean(0), atol=1e-4)


def test_lagging_tensors_are_named_once():
    states = [
        {"a.weight": torch.randn(2, 2), "ema.a.weight": torch.randn(2, 2), "ema.b": torch.randn(3)} for _ in range(3)
    ]
    with pytest.warns(UserWarning, match="ema.a.weight and 1 more: moving averages") as caught:
        lmc.merge.average(states)
    assert len(caught) == 1
