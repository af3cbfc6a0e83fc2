"""Certificates can fail: on weights that hide nothing, with the power of each verdict beside the error."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmc
from lmc.symmetry.proof.certify import MANY, relative_error
from lmc.symmetry.proof.probe import Probe, draw, varied
from lmc.symmetry.tracing.outputs import kept

HIDDEN = {"0.weight": "h .", "0.bias": "h", "2.weight": ". h"}


def perceptron(std: float | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    if std is not None:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=std)
    return model


def deep(layers: int = 12, std: float = 0.002) -> nn.Sequential:
    """Signals fade to 1e-30 of the last bias."""
    model = nn.Sequential(
        *(m for _ in range(layers) for m in (nn.Linear(8, 8, bias=False), nn.ReLU())), nn.Linear(8, 3)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std) if parameter.ndim > 1 else nn.init.ones_(parameter)
    return model


class Scaled(nn.Module):
    """A branch behind a scale of 1e-6, as networks with layer scale start."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.scale = nn.Linear(6, 8), nn.Linear(8, 6), nn.Parameter(1e-6 * torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.outer(torch.relu(self.inner(x)))


class ZeroHead(nn.Module):
    """All outputs are zero as initialised."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


@pytest.mark.parametrize(
    ("model", "wrong", "size"),
    [
        (deep(), {"0.weight": "h ."}, 8),
        (deep(), {"10.weight": "h ."}, 8),
        (Scaled(), {"inner.weight": "h .", "inner.bias": "h"}, 6),
        (Scaled(), {"inner.weight": "h .", "outer.weight": ". h"}, 6),  # the bias is forgotten
        (ZeroHead(), {"body.weight": "h ."}, 6),
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Flatten()), {"1.running_var": "h"}, None),
    ],
)
def test_fresh_weights_hide_no_wrong_spec(model, wrong, size):
    inputs = torch.randn(4, size) if size else torch.randn(3, 2, 4, 4)
    if isinstance(model, nn.Sequential) and not isinstance(model[0], nn.Conv2d):
        inputs = torch.randn(4, 8)
    with pytest.raises(lmc.CertificateError, match="'h'"):
        lmc.PermutationSpec.from_patterns(wrong, model).certify(model, inputs)


@pytest.mark.parametrize("model", [deep(), Scaled(), ZeroHead(), perceptron(), perceptron(1e-8)])
def test_the_power_of_a_right_spec_is_large(model):
    inputs = torch.randn(4, 8 if isinstance(model, nn.Sequential) and len(model) > 3 else 6)
    certificate = lmc.permutation_spec(model, inputs).certificate
    assert certificate is not None and certificate.families and certificate.unverified == ()
    assert certificate.max_error < 1e-12 and certificate.power > 1e-4
    assert f"changed by {certificate.power:.1e} or more" in str(certificate)


class Gated(nn.Module):
    """A branch that the second input switches off."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.unseen, self.head = nn.Linear(6, 5), nn.Linear(6, 7), nn.Linear(12, 3)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.head(torch.cat([self.seen(x).relu(), self.unseen(x).relu() * gate], -1))


def test_a_group_whose_breakage_is_invisible_is_named():
    model, x = Gated(), torch.randn(4, 6)
    with pytest.warns(UserWarning, match="not verified: unseen"):
        spec = lmc.permutation_spec(model, (x, torch.zeros(4, 1)))
    assert spec.certificate is not None and spec.certificate.unverified == ("unseen",)
    assert spec.certificate.families["unseen"].power == 0 < spec.certificate.families["seen"].power
    assert "not verified: unseen" in repr(spec) and "unseen" in str(spec.certificate)
    frame = spec.certificate.to_frame().set_index("group")
    assert list(frame.loc["unseen", ["family", "power", "verified"]]) == ["unseen", 0.0, False]
    # The same spec is proven by inputs that show the branch, also as the second example.
    assert spec.certify(model, (x, torch.ones(4, 1))).unverified == ()
    assert spec.certify(model, (x, torch.zeros(4, 1)), also=(x, torch.ones(4, 1))).unverified == ()


def test_sums_of_units_are_verified_by_overwriting_one():
    model = perceptron()
    spec = lmc.permutation_spec(model, torch.randn(4, 6), outputs=lambda y: y.sum(1))
    assert set(spec.families) == {"0", "2"}
    assert spec.certificate is not None and spec.certificate.unverified == ()


def test_one_permutation_is_certified_with_its_power():
    model = perceptron()
    spec = lmc.PermutationSpec.from_patterns(HIDDEN, model)
    certificate = spec.random(0).certify(model, torch.randn(4, 6))
    assert certificate.power > 1e-4 and certificate.unverified == ()
    assert spec.identity().certify(model, torch.randn(4, 6)).moved == 0
    # On weights that hide the hidden layer nothing is proven.
    blind = perceptron()
    nn.init.zeros_(blind[2].weight)
    assert spec.random(0).certify(blind, torch.randn(4, 6)).unverified == ("h",)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(8, 5, dtype=torch.complex64))
        self.b = nn.Parameter(torch.randn(3, 8, dtype=torch.complex64))
        self.register_buffer("turn", torch.polar(torch.ones(5), torch.arange(5.0)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = (x.to(torch.complex64) * self.turn) @ self.a.T
        return torch.view_as_real((h * h.abs()) @ self.b.T)


def test_complex_networks_are_certified_in_double_precision():
    spec = lmc.permutation_spec(Complex(), torch.randn(4, 5))
    certificate = spec.certificate
    assert certificate is not None and certificate.dtype == "complex128"
    assert certificate.max_error < 1e-13 and certificate.power > 1e-4
    wrong = lmc.PermutationSpec.from_patterns({"a": "h ."}, Complex())
    with pytest.raises(lmc.CertificateError):
        wrong.certify(Complex(), torch.randn(4, 5))


class Table(nn.Module):
    """A persistent buffer that is a constant: distances between positions, as an index as well."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("distance", torch.arange(4.0).sub(torch.arange(4.0)[:, None]).abs())
        self.bias, self.i, self.o = nn.Parameter(torch.randn(4)), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.bias[self.distance.long()].softmax(-1) @ self.i(x)))


def test_constants_kept_as_buffers_keep_their_values():
    model = Table()
    drawn = draw(model, 0, 0)
    assert torch.equal(drawn["distance"], model.distance) and not torch.equal(drawn["bias"], model.bias)
    spec = lmc.PermutationSpec.from_patterns({"i.weight": "h .", "i.bias": "h", "o.weight": ". h"}, model)
    assert spec.certify(model, torch.randn(2, 4, 5)).max_error < 1e-12


def test_fresh_statistics_and_scales_are_drawn_so_that_units_differ():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.LayerNorm(6))
    for number in (0, 1, 2):
        drawn = draw(model, number, seed=0)
        for name, tensor in drawn.items():
            assert tensor.numel() == 1 or len(tensor.unique()) == tensor.numel(), name
        assert bool((drawn["1.running_var"] > 0).all()) and bool((drawn["1.weight"] > 0).all())
    assert torch.equal(drawn["0.weight"], draw(model, 2, seed=0)["0.weight"])


def test_tied_tensors_are_drawn_as_one():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    drawn = draw(model, 0, 0)
    assert drawn["a.weight"] is drawn["b.weight"]


def test_inputs_without_values_are_refused_with_both_devices():
    model = perceptron()
    spec = lmc.PermutationSpec.from_patterns(HIDDEN, model)
    with pytest.raises(lmc.InputError, match=r"meta device.*cpu"):
        spec.certify(model, torch.zeros(4, 6, device="meta"))


def test_the_callers_precision_and_modes_stay():
    model = perceptron()
    spec = lmc.PermutationSpec.from_patterns(HIDDEN, model)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert spec.certify(model, torch.randn(4, 6)).max_error < 1e-12
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(lmc.CertificateError):
        spec.certify(nn.Sequential(*model, nn.Linear(99, 2)), torch.randn(4, 6))
    assert torch.get_default_dtype() == torch.float32


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (ONE, [""]),
        ((ONE, {"state": ONE}, None), ["0", "1.state"]),
        ({"logits": ONE, "pred_boxes": ONE, "hidden_states": (ONE, ONE), "attentions": ONE}, ["logits", "pred_boxes"]),
        ({"logits": ONE, "last_hidden_state": ONE, "encoder_last_hidden_state": ONE}, ["logits"]),
        ({"last_hidden_state": ONE, "pooler_output": ONE, "past_key_values": ((ONE, ONE),)},
         ["last_hidden_state", "pooler_output"]),
        ({"logits": ONE, "labels": torch.ones(2, dtype=torch.int64)}, ["logits"]),
        ({"labels": torch.ones(2, dtype=torch.int64)}, ["labels"]),
        ({"hidden_states": ONE}, ["hidden_states"]),
        (SimpleNamespace(sample=ONE, extra=3), ["sample"]),
        ([{"boxes": ONE, "scores": ONE}, {"boxes": ONE}], ["0.boxes", "0.scores", "1.boxes"]),
    ],
)  # fmt: skip
def test_everything_that_a_caller_could_use_is_kept(output, names):
    assert list(kept(output)) == names


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes, self.boxes = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.body(x))
        return {"logits": self.classes(h), "pred_boxes": self.boxes(h).sigmoid(), "hidden_states": h}


def test_the_outputs_that_are_kept_are_named_and_chosen():
    model, x = Detector(), torch.randn(4, 5)
    spec = lmc.permutation_spec(model, x)
    assert spec.outputs == ("logits", "pred_boxes") and "keeps logits, pred_boxes" in repr(spec)
    assert "boxes.weight" in spec.groups["body"].tables
    assert lmc.PermutationSpec.from_dict(spec.to_dict()).outputs == spec.outputs
    less = spec.without("body*")
    assert less.outputs == (less | {"body.bias": "."}).outputs == spec.outputs and less.certificate is None
    for outputs in ("logit", 7, -4):
        with pytest.raises(lmc.InputError, match=f"outputs={outputs!r}.* has no such entry"):
            lmc.permutation_spec(model, x, outputs=outputs)
    only = lmc.permutation_spec(model, x, outputs="hidden_states")
    assert only.outputs == ("hidden_states",) and not only.groups
    assert spec.certificate is not None and spec.certificate.outputs == spec.outputs


class Many(nn.Module):
    """More groups than are broken one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(20)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def test_many_groups_are_broken_by_one_gradient(monkeypatch):
    torch.manual_seed(0)
    model, x = Many(), torch.randn(4, 6)
    spec = lmc.permutation_spec(model, x, certify=False)
    assert len(spec.families) > MANY
    by_gradient = spec.certify(model, x)
    monkeypatch.setattr("lmc.symmetry.proof.certify.MANY", len(spec.families))
    one_by_one = spec.certify(model, x)
    assert by_gradient.unverified == one_by_one.unverified == ()
    for family, evidence in by_gradient.families.items():
        assert 1e-3 < evidence.power / one_by_one.families[family].power < 1e3


@pytest.mark.parametrize("cut", ["detached", "without_gradient"])
def test_what_a_gradient_does_not_show_is_broken_on_purpose(cut):
    """Nothing is seen of layers whose results are detached, or computed where no gradient is kept."""

    class Cut(Many):
        def forward(self, x: Tensor) -> Tensor:
            if cut == "detached":
                return super().forward(x).detach()
            with torch.no_grad():
                return super().forward(x)

    torch.manual_seed(0)
    proof = lmc.permutation_spec(Cut(), torch.randn(4, 6)).certificate
    assert proof is not None and proof.unverified == () and len(proof.families) > MANY


def test_what_shows_on_later_weights_is_not_searched_for_on_earlier_ones(monkeypatch):
    """Layers through which signals fade, beside a stronger way to the output: they show where later draws are louder."""

    class Faint(Many):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] + super().forward(x)

    torch.manual_seed(0)
    model = Faint()
    for layer in model.layers:
        nn.init.normal_(layer.weight, std=0.3 * 6**-0.5)
        layer.bias = None
    calls = []
    run = Probe.outputs_of
    monkeypatch.setattr(Probe, "outputs_of", lambda self, *given: calls.append(1) or run(self, *given))
    spec = lmc.permutation_spec(model, torch.randn(4, 6), certify=False)
    proof = spec.certify(model, torch.randn(4, 6))
    assert len(spec.groups) > MANY and proof.unverified == () and proof.trials > 2
    assert len(calls) == 2 * proof.trials  # the outputs before and after a permutation, and no breakage


def test_what_no_output_depends_on_is_not_verified_by_a_gradient():
    class Ended(Many):
        def forward(self, x: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                x = torch.tanh(layer(x)) * (0 if number == 10 else 1)
            return self.head(x)

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="not verified"):
        proof = lmc.permutation_spec(Ended(), torch.randn(4, 6)).certificate
    assert proof is not None and proof.unverified == tuple(f"layers.{number}" for number in range(11))


class OutOfDomain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.acos(self.gain * (1.0 + x.square()))


def test_a_network_without_groups_needs_no_finite_outputs():
    spec = lmc.permutation_spec(OutOfDomain(), torch.ones(3), progress=False)
    assert not spec.groups and spec.certificate is not None and spec.certificate.max_error == 0.0


@pytest.mark.parametrize(
    "error, bound", [(0.0, 1e-14), (3e-16, 1e-14), (9.9e-15, 1e-14), (2e-14, 1e-12), (3e-7, 1e-6), (0.5, 1.0)]
)
def test_the_bound_is_the_even_power_of_ten_above_the_error(error, bound):
    found = lmc.Certificate(error, 1e-9, 3, 1, 1.0, ())
    assert found.bound == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("lowest", [-1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_values_that_are_ruled_out_hide_nothing(lowest):
    """Beside the lowest number there is, a change of the other logits is far below the tolerance."""

    class RuledOut(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).masked_fill(torch.tensor([False, True, False, False]), lowest)

    torch.manual_seed(0)
    model, x = RuledOut(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(5, 6)
    proof = lmc.permutation_spec(model, x).certificate
    assert proof is not None and proof.unverified == () and proof.max_error < 1e-12
    wrong = lmc.PermutationSpec.from_patterns({"0.weight": "h .", "0.bias": "h"}, model)
    with pytest.raises(lmc.CertificateError, match="'h'"):
        wrong.certify(model, x)


class Applied(nn.Module):
    """Two layers, what comes between them, and what becomes of the result."""

    def __init__(self, ending: Callable[[Tensor], Any], between: Callable[[Tensor], Tensor] = torch.relu, n: int = 3):
        super().__init__()
        self.a, self.b, self.between, self.ending = nn.Linear(6, 8), nn.Linear(8, n), between, ending

    def forward(self, x: Tensor) -> Any:
        return self.ending(self.b(self.between(self.a(x))))


def filled(act: type[nn.Module] = nn.ReLU, **values: float) -> nn.Sequential:
    """Weights and biases times a factor, or biases of one value (`dead`, `bias`)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 3))
    with torch.no_grad():
        for name, value in values.items():
            layer, part = model[0 if name.endswith("1") else 2], name[0]
            if name in ("dead", "bias"):
                model[0].bias[: 4 if name == "dead" else 8] = value
            else:
                (layer.weight if part == "w" else layer.bias).mul_(value)
    return model


HIDING = {
    "half of the units are dead": filled(dead=-1e4),
    "all units are dead": filled(bias=-1e4),
    "all units are dead for good": filled(bias=-1e8),
    "biases of 1e8": filled(bias=1e8),
    "weights of 1e8": filled(w1=1e8, b1=1e8, w2=1e8, b2=1e8),
    "weights of 1e-8": filled(w1=1e-8, b1=1e-8, w2=1e-8, b2=1e-8),
    "1e8 and back": filled(w1=1e8, w2=1e-8),
    "squares leave single precision": filled(w1=1e30, b1=1e30),
    "an output bias that is louder than all": filled(w2=1e-8, b2=1e8),
    "saturated by weights": filled(nn.Tanh, w1=1e8, b1=1e8),
    "saturated by biases": filled(nn.Tanh, bias=1e4),
}


@pytest.mark.parametrize("scale", [1.0, 1e8, 0.0])
@pytest.mark.parametrize("model", HIDING.values(), ids=HIDING)
def test_weights_and_inputs_that_hide_units_hide_no_wrong_spec(model, scale):
    x = scale * torch.randn(4, 6)
    proof = lmc.permutation_spec(model, x).certificate
    assert proof is not None and proof.unverified == () and proof.max_error < 1e-12 and proof.power > 1e-5
    for wrong in ({"0.weight": "h ."}, {"0.bias": "h", "2.weight": ". h"}):  # all that zeros show moves
        with pytest.raises(lmc.CertificateError, match="'h'"):
            lmc.PermutationSpec.from_patterns(wrong, model).certify(model, x)


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
def test_signals_survive_sixty_layers(act):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), *(m for _ in range(60) for m in (act(), nn.Linear(16, 16))))
    proof = lmc.permutation_spec(model, torch.randn(4, 6)).certificate
    assert proof is not None and proof.unverified == () and proof.max_error < 1e-9
    with pytest.raises(lmc.CertificateError, match="'h'"):
        lmc.PermutationSpec.from_patterns({"0.weight": "h ."}, model).certify(model, torch.randn(4, 6))


def test_only_inputs_of_one_value_throughout_get_noise():
    ids, gate = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 1)
    assert varied(torch.randn(4, 6), 0) is None and varied(ids, 0) is None and varied(torch.zeros(()), 0) is None
    assert varied((torch.randn(4, 6), gate), 0) is None  # a closed gate stays closed
    given = {"x": torch.ones(4, 6), "ids": ids, "n": 3}
    found = varied(given, 0)
    assert isinstance(found, dict) and found["n"] == 3 and torch.equal(found["ids"], ids)
    assert len(found["x"].unique()) == 24 and bool((given["x"] == 1).all())
    (turned,) = varied((torch.zeros(3, dtype=torch.complex64),), 0)
    assert turned.dtype == torch.complex64 and len(turned.abs().unique()) == 3


def test_noise_that_a_module_refuses_is_not_tried():
    class Picky(Applied):
        def forward(self, x: Tensor) -> Any:
            if bool((x != 1).any()):
                raise ValueError("only ones")
            return super().forward(x)

    model = Picky(torch.tanh)
    spec = lmc.PermutationSpec.from_patterns({"a.weight": "h .", "a.bias": "h", "b.weight": ". h"}, model)
    assert spec.certify(model, torch.ones(4, 6)).max_error < 1e-12


def test_the_sign_of_infinity_is_seen():
    x = torch.tensor([1.0, math.inf, math.nan, -math.inf])
    assert relative_error([x], [x.clone()]) == 0.0
    assert relative_error([x], [torch.tensor([1.0, -math.inf, math.nan, -math.inf])]) == math.inf
    assert relative_error([x], [torch.tensor([1.0, math.inf, math.inf, -math.inf])]) == math.inf


FAINT = {
    "a constant": lambda y: 0 * y + 1,
    "zeros": lambda y: 0 * y,
    "the share of the only class": lambda y: y[:, :1].softmax(-1),
    "the place of the only class": lambda y: y[:, :1].argmax(-1),
    "clipped": lambda y: y.clamp(100, 200),
    "beside 1e12": lambda y: y + 1e12,
}


@pytest.mark.parametrize("ending", FAINT.values(), ids=FAINT)
def test_outputs_that_say_nothing_prove_nothing(ending):
    model = Applied(ending)
    with pytest.warns(UserWarning, match="not verified: a"):
        proof = lmc.permutation_spec(model, torch.randn(4, 6)).certificate
    assert proof is not None and proof.unverified == ("a",) and proof.power == 0.0
    wrong = lmc.PermutationSpec.from_patterns({"a.weight": "h ."}, model)
    assert wrong.certify(model, torch.randn(4, 6)).unverified == ("h",)  # not seen, and said so


@pytest.mark.parametrize("ending", [lambda y: y.argmax(-1), lambda y: y > 0, torch.sign, torch.round, Tensor.half])
def test_outputs_of_few_values_prove_what_they_show(ending):
    torch.manual_seed(0)
    model, x = Applied(ending), torch.randn(8, 6)
    proof = lmc.permutation_spec(model, x).certificate
    assert proof is not None and proof.unverified == () and proof.max_error < 1e-12
    with pytest.raises(lmc.CertificateError, match="'h'"):
        lmc.PermutationSpec.from_patterns({"a.weight": "h ."}, model).certify(model, x)


@pytest.mark.parametrize(
    ("between", "groups"),
    [
        (lambda h: F.dropout(h, 0.5, True), 0),
        (lambda h: h + torch.randn(8), 0),
        (lambda h: h + torch.randn(len(h), 1), 1),
        (lambda h: F.batch_norm(h, None, None, training=True).relu(), 1),
        (lambda h: (h - h.mean(0)).relu(), 1),
    ],
)
def test_units_are_told_apart_by_noise_of_their_own_and_not_by_the_batch(between, groups):
    """Of a random function the draw counts: noise that units do not share tells them apart."""
    model, x = Applied(torch.tanh, between), torch.randn(4, 6)
    spec = lmc.permutation_spec(model, x)
    assert len(spec.groups) == groups and spec.certificate is not None and spec.certificate.unverified == ()
    by_hand = lmc.PermutationSpec.from_patterns({"a.weight": "h .", "a.bias": "h", "b.weight": ". h"}, model)
    if groups:
        assert by_hand.certify(model, x).unverified == ()
    else:
        with pytest.raises(lmc.CertificateError, match="'h'"):
            by_hand.certify(model, x)


class Experts(nn.Module):
    """Each example goes to the expert that its gate prefers."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(6, count)
        self.first = nn.Parameter(torch.randn(count, 8, 6) * 0.4)
        self.second = nn.Parameter(torch.randn(count, 3, 8) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        h = torch.einsum("bhd,bd->bh", self.first[chosen], x).relu()
        return weight[:, None] * torch.einsum("boh,bh->bo", self.second[chosen], h)


@pytest.mark.parametrize("count", [6, 64])  # broken one by one, and by halves
def test_an_expert_without_tokens_hides_behind_no_other(count, monkeypatch):
    torch.manual_seed(0)
    model, x, runs = Experts(count), torch.randn(2, 6), []
    run = Probe.outputs_of
    monkeypatch.setattr(Probe, "outputs_of", lambda self, *args: runs.append(1) or run(self, *args))
    with pytest.warns(UserWarning, match="not verified: first") as told:
        spec = lmc.permutation_spec(model, x)
    proof = spec.certificate
    assert proof is not None and sorted(len(e.powers) for e in proof.families.values()) == [1, count]
    drawn = [draw(model, number, 0) for number in range(proof.trials)]
    used = {int(e) for w in drawn for e in F.linear(x, w["gate.weight"], w["gate.bias"]).argmax(-1)}
    assert proof.unverified == tuple(f"first[{e}]" for e in range(count) if e not in used)
    assert 1 < len(used) < count and ("more" in str(told[0].message)) == (len(proof.unverified) > 8)
    assert len(runs) < 100
    frame = proof.to_frame().set_index("group")
    assert sum(frame["verified"]) == 1 + len(used) and set(frame["family"]) == set(spec.families)
    assert len(spec.certify(model, torch.randn(60 * count, 6)).unverified) <= count // 32  # nearly every expert has one


class SinglePrecisionOnly(nn.Module):
    """As a fused kernel that knows float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("expected float32")
        return F.relu(x)


def in_single_precision() -> nn.Sequential:
    model = perceptron()
    model[1] = SinglePrecisionOnly()
    return model


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_modules_that_know_no_double_precision_are_certified_in_single_which_the_certificate_says(given) -> None:
    model, x = in_single_precision(), torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(given)
    spec = lmc.permutation_spec(model, x.float(), progress=False)
    proof = spec.certify(model, x)
    assert list(spec.groups) == ["0"] and proof.dtype == "float32" and proof.tolerance == 1e-5
    assert 0 < proof.max_error < 1e-6 < 1e-2 < proof.power and "float32" in str(proof)
    assert spec.random(0).certify(model, x).tolerance == 1e-5
    assert spec.certify(model, x, tolerance=1e-4).tolerance == 1e-4
    assert model[0].weight.dtype == torch.float32


def test_wrong_specs_are_refused_in_single_precision() -> None:
    model, x = in_single_precision(), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    wrong = lmc.PermutationSpec.from_patterns({"0.weight": "h .", "2.weight": ". h"}, model)
    with pytest.raises(lmc.CertificateError, match=r"tolerance 1e-05 in float32.*tolerance= allows for more"):
        wrong.certify(model, x)


def test_what_is_computed_in_neither_precision_is_refused_by_what_it_said_first() -> None:
    model = perceptron()
    model[1] = SinglePrecisionOnly()
    model.append(nn.Linear(4, 3))  # three values come
    with pytest.raises(lmc.CertificateError, match="in double precision.*expected float32"):
        lmc.PermutationSpec.from_patterns(HIDDEN, perceptron()).certify(model, torch.randn(2, 6))
