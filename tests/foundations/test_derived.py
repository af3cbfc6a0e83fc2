"""Derived state: averages do not depend on how a network writes its weights."""

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn.utils import parametrizations as p

import lmc
from lmc.merge.engine import chunks
from lmc.merge.engine.in_use import InUse, in_use
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


@pytest.mark.parametrize("dim", [0, 1, 3, None])
@pytest.mark.parametrize("old", [False, True])
def test_lengths_along_any_axis_of_a_kernel(dim, old):
    """A kernel of four axes has lengths over three of them."""
    normed = nn.utils.weight_norm if old else p.weight_norm
    a, b = (normed(nn.Conv2d(3, 6, 2), dim=dim) for _ in range(2))
    average = lmc.merge.average([rewritten(a), b])
    a_weight, b_weight = a(torch.zeros(1, 3, 2, 2)), b(torch.zeros(1, 3, 2, 2))  # so that hooks have computed them
    assert a_weight.shape == b_weight.shape
    expected = (a.weight.detach() + b.weight.detach()) / 2
    a.load_state_dict(average)
    a(torch.zeros(1, 3, 2, 2))
    assert torch.allclose(a.weight, expected, atol=1e-6)


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
    copied.load_state_dict(settled(gauged(state), gauged(state)))
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


def weight_in_use(model: nn.Module) -> torch.Tensor:
    return model[0].weight.detach().flatten(1)


@pytest.mark.parametrize(
    ("norm", "how"),
    [*((norm, "weights") for norm in NORMS), *(("weight", how) for how in ("sinkhorn", "straight through", "many"))],
)
def test_matching_compares_the_weights_in_use(norm, how):
    """Raw directions are made useless: rows of very different lengths, which the function does not see."""
    a, x = network(norm, 0), _inputs(False)
    data = x, torch.arange(64) % 4
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1))
    b = network(norm, 1)
    b.load_state_dict(a.state_dict())
    spec = lmc.permutation_spec(a, x[:2], progress=False)
    moved = spec.random(3).apply(b)
    for kind in derived_in(moved):
        if len(kind.derived) == 1:
            rows = moved[kind.direction]
            moved[kind.direction] = rows * torch.linspace(0.05, 20.0, len(rows))[order[: len(rows)] % len(rows)].view(
                -1, *[1] * (rows.ndim - 1)
            )
    match how:
        case "weights":
            pi = lmc.weight_matching(spec, a, moved, progress=False)
        case "many":
            pi = lmc.match_many(spec, [a, moved], progress=False)[1]
        case "sinkhorn":
            pi = lmc.sinkhorn_matching(spec, a, a, moved, target="l2", steps=100, progress=False)
        case _:
            pi = lmc.straight_through_matching(spec, a, a, moved, data, epochs=2, progress=False)
    back = network(norm, 2)
    back.load_state_dict(pi.apply(moved))
    back(x), a(x)
    assert torch.allclose(weight_in_use(back), weight_in_use(a), atol=1e-4)


def test_soft_matching_evaluates_mixtures_with_lengths_of_their_own():
    a, b, x = network("weight", 0), network("weight", 1), _inputs(False)
    data, spec = (
        (x, torch.arange(64) % 4),
        lmc.permutation_spec(network("weight", 0), _inputs(False)[:2], progress=False),
    )
    pi = lmc.sinkhorn_matching(spec, a, a, b, data, steps=5, measure_every=5, progress=False)
    middle = lmc.loss_path(a, a, pi.apply(b), data, alphas=3, progress=False).values["data"]["loss"][1]
    assert -pi.objective == pytest.approx(middle, abs=1e-5)


def test_pruned_networks_are_averaged_as_they_compute():
    models = []
    for seed in (0, 1):
        model = nn.Sequential(nn.Linear(8, 18), nn.ReLU(), nn.Linear(18, 4))
        model.load_state_dict(network_plain(seed))
        nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.5)
        models.append(model.eval())
    a, b = models
    merged = lmc.merge.average(models)
    mean = (a[0].weight + b[0].weight) / 2
    assert torch.allclose(merged["0.weight_orig"] * merged["0.weight_mask"], mean, atol=1e-6)
    assert set(merged["0.weight_mask"].unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(merged["0.weight_mask"] != 0, (a[0].weight_mask + b[0].weight_mask) != 0)
    x, y = _inputs(False), torch.arange(64) % 4
    path = lmc.loss_path(a, a, b, (x, y), alphas=3, progress=False)
    plain = nn.Sequential(nn.Linear(8, 18), nn.ReLU(), nn.Linear(18, 4))
    plain.load_state_dict(
        {name: (network_in_use(a)[name] + network_in_use(b)[name]) / 2 for name in plain.state_dict()}
    )
    assert path.values["data"]["loss"][1] == pytest.approx(nn.functional.cross_entropy(plain(x), y).item(), abs=1e-5)
    spec = lmc.permutation_spec(a, x[:2], progress=False)
    hidden = {name: t.clone() for name, t in spec.random(1).apply(a.state_dict()).items()}
    hidden["0.weight_orig"] += (
        100 * torch.randn(18, 8, generator=torch.Generator().manual_seed(2)) * (hidden["0.weight_mask"] == 0)
    )
    found = lmc.weight_matching(spec, a, hidden, progress=False).apply(hidden)
    assert torch.equal(found["0.weight_orig"] * found["0.weight_mask"], a[0].weight)


def network_plain(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = nn.Sequential(nn.Linear(8, 18), nn.ReLU(), nn.Linear(18, 4)).state_dict()
    return {name: 0.3 * torch.randn(t.shape, generator=rng) for name, t in shapes.items()}


def network_in_use(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{i}.{kind}": getattr(model[i], kind).detach() for i in (0, 2) for kind in ("weight", "bias")}


class Coordinates(nn.Module):
    """A table that belongs to the architecture, under a name of its own or a known one."""

    def __init__(self, seed: int, name: str, base: float) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 4)
        self.name = name
        self.register_buffer(name, torch.linspace(0.1, base, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x) + getattr(self, self.name)))


@pytest.mark.parametrize("name", ["relative_coords_table", "grid"])
def test_constants_of_the_architecture_are_kept_and_named_where_they_differ(name):
    models = [Coordinates(seed, name, 1.7) for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (models, [m.state_dict() for m in models]):
            for method in (lmc.merge.average, lambda m: lmc.merge.ties(m[1:], base=m[0])):
                assert torch.equal(method(given)[name], models[0].state_dict()[name])
        lmc.loss_path(models[0], *models[:2], (_inputs(False), torch.arange(64) % 4), alphas=3, progress=False)
    models[1] = Coordinates(1, name, 2.5)
    data = _inputs(False), torch.arange(64) % 4
    with pytest.warns(UserWarning, match=f"^{name}: buffers") as caught:
        lmc.merge.average(models)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=f"^{name}: buffers") as caught:
        lmc.loss_path(models[0], *models[:2], data, alphas=3, progress=False)
    assert len(caught) == 1


@pytest.mark.parametrize("shape", [(6, 6), (8, 5), (5, 8)])
@pytest.mark.parametrize("mapping", ["matrix_exp", "cayley", "householder"])
def test_orthogonal_matrices_are_averaged_as_matrices(shape, mapping):
    a, b, x = *(orthogonal(shape, mapping, seed) for seed in (0, 1)), torch.randn(4, shape[1])
    again = orthogonal(shape, mapping, 1)
    again.weight = b.weight.detach().clone()  # another base, and coordinates of no turn
    assert not torch.allclose(again.parametrizations.weight[0].base, b.parametrizations.weight[0].base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of averages that are nearly singular
        results = []
        for other in (b, again):
            merged = orthogonal(shape, mapping, 2)
            merged.load_state_dict(lmc.merge.average([a, other], weights=[0.7, 0.3]))
            results.append(merged)
        same = orthogonal(shape, mapping, 2)
        same.load_state_dict(lmc.merge.average([a, a]))
    left, _, right = torch.linalg.svd(0.7 * a.weight + 0.3 * b.weight, full_matrices=False)
    assert torch.allclose(results[0].weight, left @ right, atol=1e-5)
    assert torch.allclose(results[0](x), results[1](x), atol=1e-5) and torch.allclose(same(x), a(x), atol=1e-5)
    path = lmc.loss_path(a, a, again, (x, torch.arange(4) % shape[0]), alphas=3, progress=False)
    assert path.values["data"]["loss"][2] == pytest.approx(
        nn.functional.cross_entropy(b(x), torch.arange(4) % shape[0]).item(), abs=1e-5
    )
    with pytest.warns(
        UserWarning, match=r"parametrizations.weight.0.base: bases of orthogonal .*pass models as modules"
    ):
        lmc.merge.average([a.state_dict(), b.state_dict()])


def orthogonal(shape: tuple[int, int], mapping: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = p.orthogonal(nn.Linear(shape[1], shape[0]), orthogonal_map=mapping)
        optimizer = torch.optim.SGD(layer.parameters(), 0.3)
        for _ in range(5):
            optimizer.zero_grad()
            (layer(torch.randn(9, shape[1])) - 1).square().mean().backward()
            optimizer.step()
    return layer.eval()


@every
@pytest.mark.parametrize("method", ["average", "ties"])
def test_merges_on_disk_are_those_in_memory(norm, method, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "VALUES", 16)  # every weight in several chunks
    states = [rewritten(network(norm, 0)), network(norm, 1).state_dict(), network(norm, 2).state_dict()]
    for seed, state in enumerate(states):
        torch.save(state, tmp_path / f"{seed}.pt")
    files = [tmp_path / f"{seed}.pt" for seed in range(3)]
    options = {"base": files[2]} if method == "ties" else {}
    merge = getattr(lmc.merge, method)
    expected = merge(states[:2], **({"base": states[2]} if options else {}))
    planned = lmc.merge.plan(merge, files[:2], tmp_path / "out", **options)
    found = planned.write(progress=False).load()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)


def test_what_was_read_of_a_checkpoint_goes_with_it(tmp_path):
    torch.save(p.weight_norm(nn.Linear(3, 2)).state_dict(), tmp_path / "a.pt")
    opened = in_use(lmc.open_checkpoint(tmp_path / "a.pt"))
    entry = next(entry for entry in opened.stored.values() if isinstance(entry, InUse))
    entry.read()
    part = weakref.ref(next(iter(entry.parts.values())))
    del opened, entry
    gc.collect()
    assert part() is None


@every
@pytest.mark.parametrize("how", ["fusion", "repair"])
def test_fusion_and_repair_do_not_depend_on_how_a_network_is_written(norm, how):
    a, b, x = network(norm, 0), network(norm, 1), _inputs(False)
    spec = lmc.permutation_spec(a, x[:2], progress=False)
    outputs = []
    for state in (b.state_dict(), rewritten(b)):
        merged = network(norm, 2)
        if how == "fusion":
            merged.load_state_dict(lmc.ot_fusion(a, a, state, x, spec=spec, progress=False).weights)
        else:
            merged.load_state_dict(lmc.repair(a, [a, state], x, progress=False))
        outputs.append(merged(x))
    assert torch.allclose(*outputs, atol=1e-4)
