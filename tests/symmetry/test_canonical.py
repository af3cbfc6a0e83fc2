"""The canonical form: the same function, the same for all scales and signs, and a form of itself."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import lmc
from lmc.symmetry.element import Factors
from lmc.symmetry.groups.kinds import Kind
from tests.small_models import Attention


def perceptron(**options) -> nn.Module:
    return lmc.models.mlp(6, [5, 4], 3, **options)


def weight_normed() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3))


MODELS = {
    "relu": (perceptron, (8, 6)),
    "tanh": (lambda: perceptron(activation="tanh"), (8, 6)),
    "batch norm": (lambda: perceptron(norm="batch"), (8, 6)),
    "layer norm": (lambda: perceptron(norm="layer"), (8, 6)),
    "weight norm": (weight_normed, (8, 6)),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), (8, 6)),
    "attention": (lambda: Attention(width=6, heads=2), (3, 4, 5)),
    "transformer": (lambda: lmc.models.vit(dim=8, depth=1, heads=2), (2, 1, 8, 8)),
    "gelu": (lambda: perceptron(activation="gelu"), (8, 6)),
}


def scales_and_signs(spec: lmc.PermutationSpec, seed: int) -> lmc.Element:
    """A random element that moves and mixes nothing."""
    generator = torch.Generator().manual_seed(seed)
    factors: Factors = {}
    for name, group in spec.groups.items():
        kind: Kind = spec.kind(group.family)
        own: dict[str, Tensor] = {}
        for scale in kind.scales:
            logs = torch.randn(group.size, generator=generator, dtype=torch.float64)
            for o, e in scale.items():
                own[o] = own.get(o, torch.ones(group.size, dtype=torch.float64)) * torch.exp(e * logs)
        for pattern in kind.signs:
            flips = 1 - 2 * torch.randint(2, (group.size,), generator=generator)
            for o in pattern:
                own[o] = own.get(o, torch.ones(group.size)) * flips
        factors[name] = own
    return lmc.Element(spec, spec.identity().indices, factors)


def difference(a, b) -> float:
    return max(
        float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-9)) for n in a if a[n].is_floating_point()
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*no unit has a scale")
def test_a_planted_scaling_is_undone(name):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
    spec = lmc.permutation_spec(model, x, certify=False, continuous=True, progress=False)
    found = lmc.canonical(spec, model, model, inputs=x)
    assert torch.allclose(torch.func.functional_call(model, found, (x,)), model(x), rtol=1e-10, atol=1e-10)
    scaled = scales_and_signs(spec, 1).apply(model)
    assert difference(lmc.canonical(spec, model, scaled), found) < 1e-12
    assert difference(lmc.canonical(spec, model, found), found) < 1e-12
    assert (difference(found, model.state_dict()) == 0) == (name == "gelu")
    if name != "gelu":
        assert difference(scaled, model.state_dict()) > 0.1


def test_what_comes_in_and_what_goes_out_are_balanced():
    torch.manual_seed(0)
    model, x = perceptron(), torch.randn(8, 6)
    w = lmc.canonical(lmc.permutation_spec(model, x, continuous=True, progress=False), model, model)
    into = w["fc1.weight"].square().sum(1) + w["fc1.bias"].square()
    assert torch.allclose(into, w["fc2.weight"].square().sum(0), rtol=1e-5)


def test_gains_are_folded():
    torch.manual_seed(0)
    model, x = MODELS["transformer"][0](), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor += 0.2 * torch.randn_like(tensor)
    w = lmc.canonical(lmc.permutation_spec(model, x, continuous=True, progress=False), model, model)
    assert all(torch.allclose(t, torch.ones_like(t)) for n, t in w.items() if "norm" in n and n.endswith("weight"))


def test_dead_units_stay_and_do_no_harm():
    torch.manual_seed(0)
    model, x = perceptron(), torch.randn(8, 6)
    spec = lmc.permutation_spec(model, x, continuous=True, progress=False)
    with torch.no_grad():
        model.fc1.weight[2], model.fc1.bias[2] = 0.0, 0.0
        model.fc2.weight[:, 3] = 0.0
    w = lmc.canonical(spec, model, model, inputs=x)
    assert all(bool(t.isfinite().all()) for t in w.values()) and not w["fc1.weight"][2].any()
    assert torch.equal(w["fc1.weight"][3], model.fc1.weight[3])


def test_what_is_not_known_is_found_or_asked_for():
    torch.manual_seed(0)
    model, x = perceptron(), torch.randn(8, 6)
    bare = lmc.permutation_spec(model, x, certify=False, progress=False)
    with pytest.raises(lmc.InputError, match="continuous=True"):
        lmc.canonical(bare, model, model)
    known = lmc.canonical(lmc.permutation_spec(model, x, continuous=True, progress=False), model, model)
    assert difference(lmc.canonical(bare, model, model, inputs=x), known) < 1e-6
    certified = lmc.permutation_spec(model, x, progress=False)
    assert difference(lmc.canonical(certified, model, model), known) < 1e-6
    gelu = perceptron(activation="gelu")
    with pytest.warns(UserWarning, match="no unit has a scale or a sign"):
        same = lmc.canonical(bare, gelu, gelu, inputs=x)
    assert all(torch.equal(t, same[n]) for n, t in gelu.state_dict().items())
