"""What alignment compares: complex weights, and independence of the order in which tensors are stored."""

import pytest
import torch
from alignment_cases import CASES
from torch import Tensor, nn

import lmc
from lmc.align.parameters import in_form_of, matched
from lmc.errors import WeightsError

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
@pytest.mark.parametrize("name", ["cnn", "resnet-bn"])
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
