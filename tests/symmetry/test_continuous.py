"""Kinds of continuous symmetries, against those derived by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmc
from lmc.symmetry.continuous import Kind


class Perceptron(nn.Module):
    def __init__(self, activation) -> None:
        super().__init__()
        self.a, self.b, self.activation = nn.Linear(6, 5), nn.Linear(5, 4), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.activation(self.a(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """One head; the bias of the keys adds the same to all scores of a query."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def kinds(model: nn.Module, inputs: Tensor) -> dict[str, Kind]:
    torch.manual_seed(0)
    spec = lmc.permutation_spec(model, inputs, certify=False)
    return lmc.continuous_symmetries(spec, model, inputs, progress=False).kinds


SCALE = {"a.weight": 1.0, "a.bias": 1.0, "b.weight": -1.0}
SQUARE = {"a.weight": 0.5, "a.bias": 0.5, "b.weight": -1.0}


@pytest.mark.parametrize(
    ("activation", "scales", "sign", "mixing"),
    [
        (F.relu, (SCALE,), False, "none"),
        (F.leaky_relu, (SCALE,), False, "none"),
        (lambda x: F.relu(x) ** 2, (SQUARE,), False, "none"),
        (torch.square, (SQUARE,), True, "none"),
        (torch.tanh, (), True, "none"),
        (torch.sin, (), True, "none"),
        (torch.cos, (), True, "none"),
        (F.gelu, (), False, "none"),
        (F.silu, (), False, "none"),
        (nn.Identity(), (SCALE,), True, "general linear"),
    ],
)
def test_kinds_of_a_hidden_layer(activation, scales, sign, mixing):
    found = kinds(Perceptron(activation), torch.randn(20, 6))["a"]
    assert (found.scales, found.sign, found.mixing) == (scales, sign, mixing)
    assert found.error < 1e-9
    assert found.power > 1e-3 if scales else found.power == 0


def test_the_linear_half_of_a_gated_unit_scales():
    (found,) = kinds(Gated(), torch.randn(20, 6)).values()
    assert found.scales in (({"up.weight": 1.0, "down.weight": -1.0},), ({"down.weight": 1.0, "up.weight": -1.0},))
    assert found.sign and found.mixing == "none"


def test_units_of_attention_mix_freely_and_the_bias_of_keys_is_free():
    found = {kind.free: kind for kind in kinds(Attention(), torch.randn(4, 5, 5)).values()}
    assert set(found) == {(), ("k.bias",)}
    assert all(kind.mixing == "general linear" and len(kind.scales) == 1 for kind in found.values())


class Stream(nn.Module):
    """Units between two normalisations without gains: rotations where the norm is the root mean square, those that fix the
    vector of ones where the mean is taken away."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.i, self.o, self.centred = nn.Linear(6, 5), nn.Linear(5, 4), centred

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        h = h - h.mean(-1, keepdim=True) if self.centred else h
        return self.o(h / h.square().mean(-1, keepdim=True).add(1e-5).sqrt())


@pytest.mark.parametrize(("centred", "mixing"), [(False, "orthogonal"), (True, "orthogonal fixing 1")])
def test_units_before_a_norm_rotate(centred, mixing):
    (found,) = kinds(Stream(centred), torch.randn(20, 6)).values()
    assert found.mixing == mixing and found.scales == () and found.power > 1e-3


def test_the_result_prints_and_becomes_a_table():
    model, x = Perceptron(F.relu), torch.randn(20, 6)
    spec = lmc.permutation_spec(model, x, certify=False)
    found = lmc.continuous_symmetries(spec, model, x, progress=False)
    assert "a  permutation + scale (a.weight +1, a.bias +1, b.weight -1)" in repr(found)
    assert list(found.to_frame().scales) == [1]
    with pytest.raises(lmc.InputError, match="draws=0"):
        lmc.continuous_symmetries(spec, model, x, draws=0)
