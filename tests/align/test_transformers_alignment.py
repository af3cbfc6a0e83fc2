"""Transformers: planted heads, units and residual streams are found again, by permutations and by rotations."""

from functools import cache

import handwritten
import pytest
import torch
from alignment_cases import CASES, Case, random_weights
from torch import nn

import lmc
from lmc.align.relaxed.soft import SoftMoves
from lmc.align.rotations.folding import Probe
from lmc.align.rotations.procrustes import Ascent, nearest_rotation
from lmc.errors import InputError, SpecError
from lmc.models.mlp import mlp
from lmc.models.transformers import gpt, vit
from lmc.weights import Weights

TRANSFORMERS = ("vit", "gpt")
STREAM = "d"


@cache
def case(name: str) -> Case:
    return CASES[name]()


def wide(weights) -> Weights:
    return {name: tensor.double() for name, tensor in weights.items()}


def error(case: Case, weights: Weights, reference=None) -> float:
    """Largest change of the outputs, as a share of their size, in float64."""
    generator = torch.Generator().manual_seed(0)
    return Probe(case.model, reference or case.model.state_dict(), case.inputs, generator).error(weights)


def folded(name: str) -> Weights:
    """The weights of a case in float64, norms folded."""
    return lmc.align.fold_norms(
        case(name).spec, case(name).model, wide(case(name).model.state_dict()), case(name).inputs
    )


def rotation(size: int, seed: int, ones: bool) -> torch.Tensor:
    return nearest_rotation(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double(), ones)


# Permutations


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_planted_heads_units_and_streams_are_found_by_weights(name):
    spec, planted = case(name).spec, case(name).spec.random(seed=3)
    assert {"head1", "f1", STREAM} <= set(spec.groups) and any(group.within for group in spec.groups.values())
    a = lmc.weights.as_weights(case(name).model)
    found = lmc.weight_matching(spec, a, planted.apply(a), restarts=5, progress=False)
    assert found == planted.inverse()


@pytest.mark.parametrize("method", ["correlation", "cross-product"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_planted_heads_units_and_streams_are_found_by_activations(name, method):
    spec, planted = case(name).spec, case(name).spec.random(seed=3)
    a = lmc.weights.as_weights(case(name).model)
    found = lmc.activation_matching(
        spec, case(name).model, a, planted.apply(a), case(name).inputs, method=method, progress=False
    )
    assert found == planted.inverse()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_aligned_transformers_compute_what_they_did(name):
    a, b = case(name).model, case(name).other(2)
    for pi in (
        lmc.weight_matching(case(name).spec, a, b, progress=False),
        lmc.activation_matching(case(name).spec, a, a, b, case(name).inputs, progress=False),
    ):
        assert not pi.is_identity()
        certificate = pi.certify(case(name).model, case(name).inputs[:2], weights=b)
        assert certificate.max_error < 1e-12 and certificate.moved > 0.5


@pytest.mark.parametrize("model", [vit(dim=8, heads=2, hidden=12), gpt(11, 6, dim=8, heads=2, hidden=12)])
def test_the_residual_stream_is_a_group_of_its_own(model: nn.Module):
    inputs = torch.rand(2, 1, 8, 8) if model._get_name() == "ViT" else torch.arange(12).view(2, 6) % 11
    spec = lmc.permutation_spec(model, inputs)
    streams = [g for g in spec.groups.values() if "norm.weight" in g.tables]
    assert len(streams) == 1 and streams[0].size == 8
    assert {"blocks.1.norm1.weight", "blocks.2.norm2.bias", "head.weight"} <= set(streams[0].tables)


# Folding


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_folding_keeps_the_function_and_leaves_norms_plain(name):
    weights = folded(name)
    assert error(case(name), weights) < 1e-13
    for key, tensor in weights.items():
        if "norm" in key and key.endswith("weight"):
            assert torch.equal(tensor, torch.ones_like(tensor))
        if "norm" in key and key.endswith("bias") and not (name == "gpt" and key == "norm.bias"):
            assert not tensor.any()
    assert weights["blocks.1.fc2.weight"].mean(0).abs().max() < 1e-15
    twice = lmc.align.fold_norms(case(name).spec, case(name).model, weights, case(name).inputs)
    assert max(float((twice[key] - tensor).abs().max()) for key, tensor in weights.items()) < 1e-13


def test_the_shift_of_a_norm_before_a_layer_without_bias_stays():
    weights, before = folded("gpt"), case("gpt").model.state_dict()
    expected = before["norm.bias"].double() / before["norm.weight"].double()
    assert torch.allclose(weights["norm.bias"], expected, atol=1e-15)


def test_folding_keeps_dtype_and_the_caller_s_weights():
    before = {name: tensor.clone() for name, tensor in case("vit").model.state_dict().items()}
    weights = lmc.align.fold_norms(case("vit").spec, case("vit").model, case("vit").model, case("vit").inputs)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in case("vit").model.state_dict().items())


def test_folding_refuses_tied_embeddings():
    model = gpt(11, 6, dim=8, heads=2, hidden=12, tied=True)
    spec = lmc.permutation_spec(model, case("gpt").inputs[:2])
    with pytest.raises(SpecError, match="tied"):
        lmc.align.fold_norms(spec, model, model, case("gpt").inputs)


class _Leaky(nn.Module):
    """A norm whose output goes round the linear layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        normed = self.norm(self.embed(x))
        return self.out(normed) + normed.mean(1, keepdim=True)


def test_folding_refuses_a_norm_that_something_else_reads():
    model = _Leaky()
    patterns = {"embed.weight": "d .", "embed.bias": "d", "norm.weight": "d", "norm.bias": "d", "out.weight": ". d"}
    model.load_state_dict(random_weights(model, 0))
    spec = lmc.PermutationSpec.from_patterns(patterns, model)
    with pytest.raises(SpecError, match="something other"):
        lmc.align.fold_norms(spec, model, model, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))


class Mixer(nn.Module):
    """A norm that is read across positions, and one that is read unit by unit (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(3, dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.across, self.along, self.out = nn.Linear(tokens, tokens), nn.Linear(dim, dim), nn.Linear(dim, 2)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.across(self.norm1(x).transpose(1, 2)).tanh().transpose(1, 2)
        return self.out(x + self.along(self.norm2(x)))


@pytest.mark.parametrize("tokens", [4, 6])  # 6: as many as there are units
def test_a_norm_that_is_read_across_positions_is_not_folded(tokens):
    model, x = Mixer(tokens, 6), torch.randn(8, tokens, 3, generator=torch.Generator().manual_seed(0))
    model.load_state_dict(random_weights(model, 0))
    spec = lmc.permutation_spec(model, x[:2], progress=False)
    folded = lmc.align.fold_norms(spec, model, model, x)
    outputs = [torch.func.functional_call(model, dict(w), (x,)) for w in (model.state_dict(), folded)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert torch.equal(folded["norm1.weight"], model.norm1.weight) and bool((folded["norm2.weight"] == 1).all())


# Rotations


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_streams_and_insides_of_heads_rotate_and_nothing_else(name):
    spec = case(name).spec
    found = lmc.align.rotatable_groups(spec, case(name).model, folded(name), case(name).inputs)
    inside = {group.name for group in spec.groups.values() if group.within}
    assert found == {STREAM: True} | dict.fromkeys(inside, False) and len(inside) == 8
    plain = lmc.align.rotatable_groups(spec, case(name).model, case(name).model, case(name).inputs)
    assert set(plain) == inside  # scales of norms hold the stream in place


def test_groups_for_which_there_is_no_time_are_not_rotated():
    name = TRANSFORMERS[0]
    with pytest.warns(UserWarning, match="no time left"):
        found = lmc.align.rotatable_groups(
            case(name).spec, case(name).model, folded(name), case(name).inputs, budget=1e-9
        )
    assert not found and not found.unverified


@pytest.mark.parametrize("bias", [0.0, 10.0, -10.0])
@pytest.mark.parametrize("seed", range(6))
def test_no_hidden_layer_of_an_mlp_rotates(seed, bias):
    """Also where all of its units are on, or off, for the few examples at hand, so that it is linear there."""
    model, inputs = mlp(6, [5, 4], 3), torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    spec = lmc.PermutationSpec.from_patterns(handwritten.mlp(2), model)
    weights = random_weights(model, seed)
    weights["fc1.bias"] = torch.full((5,), bias)
    assert lmc.align.rotatable_groups(spec, model, weights, inputs) == {}


def test_a_verdict_states_its_power():
    """Behind a layer that is switched off, a rotation changes nothing, and neither does half a rotation."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    spec = lmc.PermutationSpec.from_patterns({"0.weight": "h .", "0.bias": "h", "1.weight": ". h"}, model)
    inputs, weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), random_weights(model, 1)
    found = lmc.align.rotatable_groups(spec, model, weights, inputs)
    assert found == {"h": False} and found.errors["h"] < 1e-12 < 1e-3 < found.powers["h"]
    assert "h: error" in repr(found)
    blind = weights | {"2.weight": torch.zeros(3, 4)}
    with pytest.warns(UserWarning, match="h: rotations change nothing, but neither do broken ones"):
        found = lmc.align.rotatable_groups(spec, model, blind, inputs)
    assert found == {} and found.unverified == ("h",) and "h: not verified" in repr(found)


def test_the_nearest_rotation_is_a_rotation_and_best():
    gain = torch.randn(6, 6, generator=torch.Generator().manual_seed(4)).double()
    free, bound = nearest_rotation(gain), nearest_rotation(gain, ones=True)
    for q in (free, bound):
        assert torch.allclose(q @ q.T, torch.eye(6).double(), atol=1e-13)
    assert torch.allclose(bound.sum(1), torch.ones(6).double(), atol=1e-13)
    assert float((free * gain).sum()) == pytest.approx(float(torch.linalg.svdvals(gain).sum()), rel=1e-12)
    values = [float((rotation(6, seed, True) * gain).sum()) for seed in range(10, 60)]
    assert max(values) < float((bound * gain).sum()) <= float((free * gain).sum())


def plant(name: str, seed: int) -> tuple[Weights, Weights, dict[str, torch.Tensor]]:
    """Folded weights, the same network with heads and units permuted and the rest rotated, and by what."""
    spec, a = case(name).spec, folded(name)
    rotated = lmc.align.rotatable_groups(spec, case(name).model, a, case(name).inputs)
    pi = spec.random(seed)
    matrices = {
        g: rotation(len(p), seed + i, rotated[g]) if g in rotated else torch.eye(len(p)).double()[p]
        for i, (g, p) in enumerate(pi.indices.items())
    }
    return a, SoftMoves(spec, a, torch.device("cpu"))(matrices, a), matrices


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_planted_rotation_is_found(name):
    a, b, matrices = plant(name, 11)
    assert error(case(name), b) < 1e-12 and float((a["head.weight"] - b["head.weight"]).abs().max()) > 0.1
    found = lmc.align.rotation_matching(
        case(name).spec, case(name).model, a, b, case(name).inputs, steps=0, progress=False
    )
    stream = found.matrices[STREAM] @ matrices[STREAM]
    assert (stream - torch.eye(len(stream)).double()).norm() < 1e-5
    assert max(float((found.a[key] - found.weights[key]).abs().max()) for key in a) < 1e-5
    assert found.objective == pytest.approx(lmc.weights.dot(found.a, found.weights), rel=1e-9)


@pytest.mark.parametrize("name", [pytest.param("vit", marks=pytest.mark.thorough), "gpt"])
def test_unrelated_networks_keep_their_functions_and_come_closer(name):
    a, b = case(name).model.state_dict(), case(name).other(2)
    inputs = case(name).inputs
    labelled = (inputs.double(), case(name).targets) if name == "vit" else (inputs, inputs)
    found = lmc.align.rotation_matching(
        case(name).spec, case(name).model, wide(a), wide(b), labelled, steps=30, progress=False
    )
    assert error(case(name), found.a) < 1e-12
    assert error(case(name), found.weights, wide(b)) < 1e-11
    losses = found.info["losses"]
    assert min(losses) < losses[0]
    still = lmc.weights.dot(
        found.a, lmc.align.fold_norms(case(name).spec, case(name).model, wide(b), case(name).inputs)
    )
    start = lmc.align.rotation_matching(
        case(name).spec, case(name).model, wide(a), wide(b), labelled, steps=0, progress=False
    )
    assert start.objective > still


def test_equal_networks_stay():
    weights = wide(case("gpt").model.state_dict())
    found = lmc.align.rotation_matching(
        case("gpt").spec, case("gpt").model, weights, weights, case("gpt").inputs, steps=0, progress=False
    )
    for matrix in found.matrices.values():
        assert (matrix - torch.eye(len(matrix)).double()).abs().max() < 1e-6


def test_every_sweep_of_the_ascent_gains():
    spec = case("vit").spec
    a, b = folded("vit"), lmc.align.fold_norms(spec, case("vit").model, wide(case("vit").other(2)), case("vit").inputs)
    rotated = lmc.align.rotatable_groups(spec, case("vit").model, b, case("vit").inputs)
    ascent = Ascent(spec, rotated, a, b)
    values = [ascent.value]
    for _ in range(5):
        ascent.sweep()
        values.append(ascent.value)
    assert values == sorted(values) and values[-1] > 1.05 * values[0]
    mixed = SoftMoves(spec, b, torch.device("cpu"))(ascent.matrices, b)
    assert lmc.weights.dot(a, mixed) == pytest.approx(ascent.value, rel=1e-12)


def test_unusable_arguments_are_named():
    one = case("vit")
    with pytest.raises(InputError, match="steps=-1"):
        lmc.align.rotation_matching(one.spec, one.model, one.model, one.model, one.inputs, steps=-1)


# Text


def test_toy_text_is_what_its_seed_says():
    text, again, other = (
        lmc.data.toy_text(3, train=20, test=5),
        lmc.data.toy_text(3, train=20, test=5),
        lmc.data.toy_text(4),
    )
    assert torch.equal(text.train[0], again.train[0]) and not torch.equal(text.train[0], other.train[0][:20])
    assert text.train[0].shape == text.train[1].shape == (20, 32) and text.test[0].shape == (5, 32)
    assert torch.equal(text.train[0].flatten()[1:], text.train[1].flatten()[:-1])
    words = text.decode(text.train[0].flatten())
    assert torch.equal(text.encode(words), text.train[0].flatten())
    sums = [s.split() for s in words.split(". ")[:-1] if "plus" in s]
    numbers = {word: i for i, word in enumerate(lmc.data.sentences.NUMBERS)}
    assert len(sums) > 3 and all(numbers[left] + numbers[right] == numbers[total] for left, _, right, _, total in sums)
    with pytest.raises(InputError, match="'!'"):
        text.encode("one!")
