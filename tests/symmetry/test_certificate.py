"""Certificates can fail: on weights that hide nothing, with the power of each verdict beside the error."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lmc
from lmc.symmetry.proof.certify import MANY
from lmc.symmetry.proof.probe import draw
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
    frame = spec.certificate.to_frame().set_index("family")
    assert list(frame.loc["unseen", ["power", "verified"]]) == [0.0, False]
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
