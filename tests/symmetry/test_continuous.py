"""Kinds of continuous symmetries, against those derived by hand."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import lmc
from lmc.errors import InputError
from lmc.symmetry.groups.kinds import Kind
from tests.small_models import Attention as Heads


class Perceptron(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor], first: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.activation = first or nn.Linear(6, 5), nn.Linear(5, 4), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.activation(self.a(x)))


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False), nn.Linear(5, 4))
        self.activation = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Fused(nn.Module):
    """Values and gates in one linear layer, the first half times the sigmoid of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(6, 10, bias=False), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.both(x)))


class Attention(nn.Module):
    """One head; the bias of the keys adds the same to all scores of a query."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Library(nn.Module):
    """Attention as torch has it, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.o = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.attention(x, x, x, need_weights=False)[0])


class FusedAttention(nn.Module):
    """Queries, keys and values of one linear layer; with rotary encodings on request."""

    def __init__(self, rotary: bool = False) -> None:
        super().__init__()
        self.qkv, self.o, self.rotary = nn.Linear(5, 12, bias=False), nn.Linear(4, 3), rotary

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.rotary:
            angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
            turn = torch.polar(torch.ones_like(angles), angles)
            q, k = (
                torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (2, 2))) * turn).flatten(-2) for z in (q, k)
            )
        return self.o((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Normalised(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 5), norm, nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x)))).mean((2, 3))


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.r, self.o = cell, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(x)[0][:, -1])


class Tied(nn.Module):
    """An encoder that is, transposed, the decoder."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.activation = nn.Parameter(torch.randn(5, 7)), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x @ self.w.T) @ self.w


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


class Cut(nn.Module):
    """Of one half of a layer no gradient comes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)) * torch.tanh(self.b(x)).detach())


class Routed(nn.Module):
    """Each example goes to one of three matrices, or to the nearest of nine codes: what chooses has no gradient, and at few
    examples the choice is often the same after a change."""

    def __init__(self, codes: bool) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(6, 5), nn.Linear(5, 4)
        self.choose = nn.Parameter(torch.randn(9, 5)) if codes else nn.Parameter(torch.randn(3, 5))
        self.experts = None if codes else nn.Parameter(torch.randn(3, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        if self.experts is None:
            return self.o(self.choose[torch.cdist(h, self.choose).argmin(-1)])
        return self.o(torch.einsum("nd,nde->ne", h, self.experts[(h @ self.choose.T).argmax(-1)]))


def kinds(model: nn.Module, inputs: Tensor) -> dict[str, Kind]:
    torch.manual_seed(0)
    spec = lmc.permutation_spec(model, inputs, certify=False, progress=False)
    return lmc.continuous_symmetries(spec, model, inputs, progress=False).kinds


def scale(**exponents: float) -> dict[str, float]:
    return {name.replace("__", "."): e for name, e in exponents.items()}


SCALE = {"a.weight": 1.0, "a.bias": 1.0, "b.weight": -1.0}
SQUARE = {"a.weight": 0.5, "a.bias": 0.5, "b.weight": -1.0}
GAIN = {"norm.weight": 1.0, "norm.bias": 1.0, "b.weight": -1.0}


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


# name -> module, inputs, and for each family (scales, sign, mixing)
QK = {"q.weight": 1.0, "q.bias": 1.0, "k.weight": -1.0}
VO = {"v.weight": 1.0, "v.bias": 1.0, "o.weight": -1.0}
WEIGHT = "a.parametrizations.weight.original"
BILINEAR = (True, "general linear")
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[list[dict[str, float]], bool, str]]]] = {
    # the linear half of a gated unit scales; of a rectified gate the gate does as well
    "swiglu": (lambda: Gated(F.silu), (20, 6), [([{"up.weight": 1, "down.weight": -1}], True, "none")]),
    "reglu": (
        lambda: Gated(F.relu),
        (20, 6),
        [([{"gate.weight": 1, "down.weight": -1}, {"up.weight": 1, "down.weight": -1}], True, "none")],
    ),
    "glu": (Fused, (20, 6), [([{"both.weight[0]": 1, "down.weight": -1}], True, "none")]),
    "one head": (Attention, (4, 5, 5), [([QK], *BILINEAR), ([VO], *BILINEAR)]),
    "fused": (
        FusedAttention,
        (4, 5, 5),
        [([{"qkv.weight[0]": 1, "qkv.weight[1]": -1}], *BILINEAR), ([{"qkv.weight": 1, "o.weight": -1}], *BILINEAR)],
    ),
    # queries and keys of one frequency turn together: no units that may change places; values mix as ever
    "rotary": (lambda: FusedAttention(True), (4, 5, 5), [([{"qkv.weight": 1, "o.weight": -1}], *BILINEAR)]),
    "torch's": (
        Library,
        (4, 5, 6),
        [
            (
                [{"attention.in_proj_weight[0]": 1, "attention.in_proj_bias[0]": 1, "attention.in_proj_weight[1]": -1}],
                *BILINEAR,
            ),
            (
                [{"attention.in_proj_weight": 1, "attention.in_proj_bias": 1, "attention.out_proj.weight": -1}],
                *BILINEAR,
            ),
        ],
    ),
    "grouped": (
        lambda: Heads(kv=2, bias=False),
        (4, 5, 5),
        [
            ([{"q.weight[0]": 1, "q.weight[1]": 1, "k.weight": -1}], *BILINEAR),
            ([{"v.weight": 1, "o.weight[0]": -1, "o.weight[1]": -1}], *BILINEAR),
        ],
    ),
    # each norm has a gain of its own; the incoming side of a batch norm scales against its gain
    "batch norm": (
        lambda: Normalised(nn.BatchNorm1d(5)),
        (20, 6),
        [([{"a.weight": 1, "a.bias": 1, "norm.weight": -1, "norm.running_mean": 1}, GAIN], True, "none")],
    ),
    "layer norm": (lambda: Normalised(nn.LayerNorm(5)), (20, 6), [([GAIN], False, "none")]),
    "rms norm": (
        lambda: Normalised(nn.RMSNorm(5)),
        (20, 6),
        [([{"norm.weight": 1, "b.weight": -1}], True, "none")],
    ),
    "group norm": (Pictures, (4, 2, 6, 6), [([GAIN], True, "none"), ([GAIN], False, "none")]),
    # the length of a direction does not matter, and its sign goes with that of the gain
    "weight norm": (
        lambda: Perceptron(F.relu, weight_norm(nn.Linear(6, 5))),
        (20, 6),
        [([{f"{WEIGHT}1": 1}, {f"{WEIGHT}0": 1, "a.bias": 1, "b.weight": -1}], True, "none")],
    ),
    # the lengths of its rows are the same in all coordinates of a linear layer before it
    "before weight norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), weight_norm(nn.Linear(5, 4))),
        (20, 6),
        [([], True, "orthogonal")],
    ),
    "rnn": (lambda: Recurrent(nn.RNN(4, 5, batch_first=True)), (6, 3, 4), [([], True, "none")]),
    "relu rnn": (
        lambda: Recurrent(nn.RNN(4, 5, nonlinearity="relu", batch_first=True)),
        (6, 3, 4),
        [
            (
                [
                    {
                        "r.weight_ih_l0": 1,
                        "r.weight_hh_l0 axis 0": 1,
                        "r.weight_hh_l0 axis 1": -1,
                        "r.bias_ih_l0": 1,
                        "r.bias_hh_l0": 1,
                        "o.weight": -1,
                    }
                ],
                False,
                "none",
            )
        ],
    ),  # fmt: skip
    "lstm": (lambda: Recurrent(nn.LSTM(4, 5, batch_first=True)), (6, 3, 4), [([], True, "none")]),
    "gru": (lambda: Recurrent(nn.GRU(4, 5, batch_first=True)), (6, 3, 4), [([], True, "none")]),
    "tied, linear": (lambda: Tied(nn.Identity()), (20, 7), [([], True, "orthogonal")]),
    "tied, relu": (lambda: Tied(F.relu), (20, 7), [([], False, "none")]),
    "tied, odd": (lambda: Tied(torch.tanh), (20, 7), [([], True, "none")]),
    "rms stream": (lambda: Stream(False), (20, 6), [([], True, "orthogonal")]),
    "layer norm stream": (lambda: Stream(True), (20, 6), [([], False, "orthogonal fixing 1")]),
    "routed": (
        lambda: Routed(False),
        (2, 6),
        [([], False, "none"), ([{"experts": 1, "o.weight": -1}], True, "general linear")],
    ),
    "codes": (lambda: Routed(True), (2, 6), [([], False, "none")] * 2),
    "no gradient": (Cut, (20, 6), [([{"a.weight": 1, "a.bias": 1, "c.weight": -1}], True, "none")]),
}


HEADS = [CASES[name][0] for name in ("torch's", "grouped")]


def same_span(found: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]]) -> bool:
    """Whether two sets of independent scales generate the same group."""
    names = sorted({name for each in (*found, *expected) for name in each})

    def rank(scales: Sequence[Mapping[str, float]]) -> int:
        rows = torch.tensor([[each.get(name, 0.0) for name in names] for each in scales], dtype=torch.float64)
        return int(torch.linalg.matrix_rank(rows)) if scales else 0

    return rank(found) == rank(expected) == rank([*found, *expected]) == len(found) == len(expected)


@pytest.mark.parametrize("case", CASES)
def test_kinds_derived_by_hand(case):
    make, shape, expected = CASES[case]
    torch.manual_seed(0)
    found = list(kinds(make(), torch.randn(shape)).values())
    print(found)
    for kind in expected:
        match = [f for f in found if same_span(list(f.scales), kind[0]) and (f.sign, f.mixing) == kind[1:]]
        assert match, kind
        found.remove(match[0])
    assert not found or make in HEADS  # and what whole heads and the stream admit


class Single(nn.Module):
    """Leaves torch, and double precision, on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.from_numpy(self.a(x).detach().cpu().numpy().astype("float32"))
        return self.b(h.relu().to(x))


def test_single_precision_is_named_and_gets_the_tolerance_that_is_possible():
    torch.manual_seed(0)
    model, x = Single(), torch.randn(20, 6)
    patterns = {"a.weight": "h .", "a.bias": "h", "b.weight": ". h", "b.bias": "."}
    spec = lmc.PermutationSpec.from_patterns(patterns, model)
    with pytest.warns(UserWarning, match="lower precision"):
        found = lmc.continuous_symmetries(spec, model, x, progress=False)
    assert 1e-8 < found.tolerance < 1e-3
    (kind,) = found.kinds.values()
    assert not kind.sign and kind.mixing == "none" and len(kind.scales) == 1
    assert kind.scales[0] == pytest.approx(SCALE, abs=0.02)


class OnlySingle(nn.Module):
    """Knows no double precision, as kernels of one precision do not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("no kernel for double precision")
        q, k, v = (f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.b(self.a(self.o(y)).relu())


def test_modules_that_know_no_double_precision_show_the_same_kinds():
    torch.manual_seed(0)
    model, x = OnlySingle(), torch.randn(3, 5, 12)
    spec = lmc.permutation_spec(model, x, progress=False)
    with pytest.warns(UserWarning, match="lower precision"):
        found = lmc.continuous_symmetries(spec, model, x, progress=False)
    assert 1e-6 < found.tolerance < 1e-3
    kinds = {
        name: (kind.mixing, [sorted(scale.items()) for scale in kind.scales]) for name, kind in found.kinds.items()
    }
    assert kinds["a"] == ("none", [[("a.bias", 1.0), ("a.weight", 1.0), ("b.weight", -1.0)]])
    assert kinds["v"] == ("general linear", [[("o.weight", -1.0), ("v.bias", 1.0), ("v.weight", 1.0)]])
    assert kinds["q"] == ("general linear", [[("k.weight", -1.0), ("q.bias", 1.0), ("q.weight", 1.0)]])
    assert found.kinds["q"].free == ("k.bias",)  # a softmax is blind to it


# What comes into a batch norm scales against its gain, its gain against what goes out; a stream has one scale for each of the
# former, and one more. Streams of transformers have one for each norm, against what reads it.
BN, RELU, GELU, HEADS_OF = (2, True, "none"), (1, False, "none"), (0, False, "none"), (2, True, "none")
UNITS = (1, True, "general linear")
TRANSFORMER = {"*.fc1": GELU, "*.heads": HEADS_OF, "*.q": UNITS, "*.v": UNITS, "*": (5, True, "none")}
STORED = {
    "digits-mlp64": {"*": RELU},
    "digits-cnn": {"*": RELU},
    "digits-vgg11": {"conv*": BN, "fc": RELU},
    # Into a stream write four convolutions, each with batch normalisation, and all of it may be scaled at once.
    "digits-resnet20": {"*stream": (5, True, "none"), "*conv1": BN},
    # Layer normalisation over channels: its weights and biases against what reads them.
    "digits-resnet20-layernorm": {"*stream": (1, False, "none"), "*conv1": (1, False, "none")},
    "digits-vit": TRANSFORMER,
    "toy-text-gpt": TRANSFORMER,
}
SLOW = ("digits-vgg11", "digits-vit", "digits-resnet20", "digits-resnet20-layernorm")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] if name in SLOW else []) for name in STORED]
)
def test_kinds_of_the_stored_networks(name):
    stored = lmc.data.checkpoint(name)
    source = stored.manifest["data"]
    data = getattr(lmc.data, source["function"])(**source["options"])
    found = kinds(stored.model(), data.train[0][:2])
    for family, kind in found.items():
        expected = next(e for pattern, e in STORED[name].items() if fnmatch(family, pattern))
        assert (len(kind.scales), kind.sign, kind.mixing) == expected, (family, kind)
        assert kind.error < 1e-9 and (kind.power > 1e-5 or not kind.scales)


def test_a_budget_that_does_not_suffice():
    model, x = lmc.models.mlp(6, [5], 3), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    spec = lmc.permutation_spec(model, x, progress=False)
    with pytest.raises(InputError, match="budget=1e-09: too few seconds"):
        lmc.continuous_symmetries(spec, model, x, budget=1e-9, progress=False)
    assert lmc.continuous_symmetries(spec, model, x, budget=1e6, progress=False).kinds["fc1"].scales
