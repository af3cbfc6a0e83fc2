"""What alignment compares: complex weights, and independence of the order in which tensors are stored."""

import pytest
import torch
from alignment_cases import CASES
from torch import Tensor, nn

import lmc
from lmc.align.weight_matching.matching import in_form_of, matched
from lmc.errors import DataError, MismatchError, WeightsError

QUIET = {"progress": False}
METHODS = {
    "weights": lambda spec, model, a, b, data: lmc.weight_matching(spec, a, b, restarts=3, **QUIET),
    "activations": lambda spec, model, a, b, data: lmc.activation_matching(spec, model, a, b, data, **QUIET),
    "straight-through": lambda spec, model, a, b, data: lmc.straight_through_matching(
        spec, model, a, b, data, epochs=2, **QUIET
    ),
    "Sinkhorn, l2": lambda spec, model, a, b, data: lmc.sinkhorn_matching(spec, model, a, b, steps=60, **QUIET),
    "Sinkhorn, midpoint": lambda spec, model, a, b, data: lmc.sinkhorn_matching(
        spec, model, a, b, data, steps=20, **QUIET
    ),
    "many": lambda spec, model, a, b, data: lmc.match_many(spec, [a, b], **QUIET)[1],
    "OT, weights": lambda spec, model, a, b, data: lmc.ot_fusion(model, a, b, spec=spec, **QUIET).transported[0],
    "OT, activations": lambda spec, model, a, b, data: lmc.ot_fusion(
        model, a, b, data[0], spec=spec, **QUIET
    ).transported[0],
}


class Complex(nn.Module):
    """Two hidden layers with complex weights; the real and the imaginary part pass a ReLU each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(n, m, dtype=torch.complex64) for n, m in ((6, 12), (12, 8), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.complex64)
        for layer in (self.a, self.b):
            x = layer(x)
            x = torch.complex(x.real.relu(), x.imag.relu())
        return self.c(x).abs()


def moved(found, b) -> dict[str, Tensor]:
    return found.apply(b) if isinstance(found, lmc.Permutation) else found


@pytest.mark.parametrize("method", METHODS)
def test_complex_networks_are_matched_like_real_ones(method: str):
    model = Complex()
    spec = lmc.PermutationSpec.from_patterns(
        {"a.weight": "h .", "a.bias": "h", "b.weight": "g h", "b.bias": "g", "c.weight": ". g"}, model
    )
    a = model.state_dict()
    b = spec.random(3).apply(a)
    data = torch.randn(64, 6), torch.randint(4, (64,))
    found = moved(METHODS[method](spec, model, a, b, data), b)
    assert all(tensor.dtype == torch.complex64 for tensor in found.values())
    if method != "Sinkhorn, midpoint":  # which may end elsewhere after so few steps
        assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in a.items())
    before = lmc.align.singular_alignment(a, b, gamma=0.0).r
    assert lmc.align.singular_alignment(a, a).r == pytest.approx(1.0) and before < 0.9
    with pytest.raises(WeightsError, match="a.weight: complex weights cannot be rotated"):
        lmc.align.rotatable_groups(spec, model, a, data)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["cnn", pytest.param("resnet-bn", marks=pytest.mark.thorough)])
def test_the_order_of_keys_changes_nothing(name: str, method: str):
    case = CASES[name]()
    a, b, data = case.other(1), case.other(2), (case.inputs, case.targets)
    turned = [dict(reversed(w.items())) for w in (a, b)]
    first, second = (METHODS[method](case.spec, case.model, *pair, data) for pair in ((a, b), turned))
    if isinstance(first, lmc.Permutation):
        assert first == second and first.objective == second.objective
    else:
        assert all(torch.equal(second[key], tensor) for key, tensor in first.items())


def test_complex_tensors_come_back_as_they_were():
    spec = lmc.PermutationSpec.from_patterns({"w": "h ."}, {"w": torch.zeros(3, 2)})
    weights = {"w": torch.randn(3, 2, dtype=torch.complex64), "b": torch.randn(3).half()}
    found = matched(spec, weights)
    assert list(found) == ["b", "w"] and found["w"].shape == (3, 2, 2) and found["b"].dtype == torch.float32
    for name, tensor in weights.items():
        assert torch.equal(in_form_of(tensor, found[name]), tensor)


ROTATIONS = {
    "rotatable_groups": lambda spec, model, a, b, data: lmc.align.rotatable_groups(spec, model, a, data),
    "fold_norms": lambda spec, model, a, b, data: lmc.align.fold_norms(spec, model, a, data),
    "rotations": lambda spec, model, a, b, data: lmc.align.rotation_matching(spec, model, a, b, data, steps=1, **QUIET),
}
ON_DATA = ROTATIONS | {
    name: METHODS[name] for name in METHODS if name not in ("weights", "Sinkhorn, l2", "many", "OT, weights")
}


def spoiled(weights, value: float) -> dict[str, Tensor]:
    return weights | {"fc1.weight": torch.full_like(weights["fc1.weight"], value)}


@pytest.mark.parametrize("method", ON_DATA)
def test_unusable_weights_and_data_are_named(method: str):
    case = CASES["mlp"]()
    a, b, run = case.other(1), case.other(2), ON_DATA[method]
    cases = {
        "empty data": ((a, b, (case.inputs[:0], case.targets[:0])), DataError, "axis 0"),
        "NaN in the inputs": ((a, b, (torch.full_like(case.inputs, torch.nan), case.targets)), DataError, "NaN"),
        "NaN in the weights": ((spoiled(a, torch.nan), b, (case.inputs, case.targets)), WeightsError, "fc1.weight"),
        "inputs of another dtype": (
            (a, b, (case.inputs.double(), case.targets)),
            DataError,
            "inputs are torch.float64",
        ),
        "another architecture": ((a | {"foo": a["fc1.bias"]}, b, (case.inputs, case.targets)), MismatchError, "foo"),
    }
    if method in ROTATIONS:  # which compute in float64, whatever is given
        del cases["inputs of another dtype"]
    for arguments, error, text in cases.values():
        with pytest.raises(error, match=text):
            run(case.spec, case.model, *arguments)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS | ROTATIONS)
def test_dead_units_and_equal_networks_are_no_obstacle(method: str):
    case = CASES["mlp"]()
    dead = spoiled(case.other(1), 0.0) | {"fc1.bias": torch.zeros(16)}
    for weights in (dead, case.other(1)):
        found = {**METHODS, **ROTATIONS}[method](case.spec, case.model, weights, weights, (case.inputs, case.targets))
        if isinstance(found, lmc.Permutation) and method != "Sinkhorn, midpoint":  # untrained, the middle may be better
            moved_weights = found.apply(weights)
            assert all(torch.equal(moved_weights[name], tensor) for name, tensor in weights.items())


def test_the_network_whose_activations_are_unusable_is_named():
    case = CASES["mlp"]()
    huge = {name: 1e30 * tensor for name, tensor in case.other(2).items()}
    with pytest.raises(DataError, match="activations of b hold NaN"):
        lmc.ot_fusion(case.model, case.other(1), huge, case.inputs, spec=case.spec, progress=False)
    with pytest.raises(DataError, match="activations of a hold NaN"):
        lmc.activation_matching(case.spec, case.model, huge, case.other(1), case.inputs, progress=False)
