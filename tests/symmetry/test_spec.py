import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from handwritten import ATTENTION, EXPERTS, GROUPED_QUERY, LAYER_NORM, mlp, resnet20, vgg
from small_models import (
    BRANCHES,
    GROUPED,
    RESIDUAL,
    Attention,
    Branches,
    Experts,
    GroupedConvolution,
    ResidualMLP,
)
from torch import nn

import lmc
from lmc import models
from lmc.symmetry.groups.action import act, compose_moves
from lmc.symmetry.groups.group import Group, Table
from lmc.symmetry.spec import PermutationSpec

TOKENS, IMAGES = (2, 6, 5), (3, 2, 4, 4)
CASES = {
    "mlp": (lambda: models.mlp(9, [8, 7], 4), mlp(2), {}, (5, 9)),
    "vgg": (lambda: models.vgg(1 / 16, image=(1, 8, 8)), vgg(8), {}, (2, 1, 8, 8)),
    "resnet20": (lambda: models.resnet20(1, in_channels=1), resnet20(), {}, (2, 1, 8, 8)),
    "resnet20 layer norm": (
        lambda: models.resnet20(1, in_channels=1, norm="layer"),
        resnet20(LAYER_NORM),
        {},
        (2, 1, 8, 8),
    ),
    "attention": (Attention, ATTENTION, {"head": 4}, TOKENS),
    "grouped query": (lambda: Attention(kv=2, bias=False), GROUPED_QUERY, {"kv": 2, "rep": 2}, TOKENS),
    "experts": (Experts, EXPERTS, {}, (6, 5)),
    "branches": (Branches, BRANCHES, {}, IMAGES),
    "grouped convolution": (GroupedConvolution, GROUPED, {"g": 2}, IMAGES),
    "residual": (ResidualMLP, RESIDUAL, {}, (5, 4)),
}


NAMES = [pytest.param(n, marks=[pytest.mark.thorough] if n == "resnet20 layer norm" else []) for n in CASES]


@pytest.fixture(params=NAMES)
def case(request):
    build, patterns, sizes, shape = CASES[request.param]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    return model, PermutationSpec.from_patterns(patterns, model, **sizes), torch.randn(shape, generator=generator)


def test_handwritten_specs_keep_the_function(case):
    model, spec, inputs = case
    certificate = spec.certify(model, inputs)
    assert certificate.max_error < 1e-12
    assert certificate.moved > 0.5


def test_a_unit_put_in_the_wrong_place_is_caught_with_the_guilty_group(case):
    model, spec, inputs = case
    victim = next(group for group in spec.groups.values() if not group.within and len(group.tables) > 1)
    tensor = list(victim.tables)[-1]
    tables = {name: tables for name, tables in victim.tables.items() if name != tensor}
    groups = {g.name: g for g in spec.groups.values() if not g.within} | {
        victim.name: Group(victim.name, victim.size, tables)
    }
    broken = PermutationSpec(groups, spec.shapes, spec.buffers)
    with pytest.raises(lmc.CertificateError, match=victim.name):
        broken.certify(model, inputs)


def test_certifying_leaves_the_model_alone(case):
    model, spec, inputs = case
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.random.get_rng_state()
    spec.certify(model, inputs, trials=1)
    assert model.training and torch.equal(rng, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_inverse_undoes_and_composition_applies_one_after_the_other(case):
    model, spec, _ = case
    weights = model.state_dict()
    pi, rho = spec.random(1), spec.random(2)
    back = pi.inverse().apply(pi.apply(weights))
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    composed, twice = pi.compose(rho).apply(weights), pi.apply(rho.apply(weights))
    assert all(torch.equal(composed[name], twice[name]) for name in weights)
    assert pi.compose(pi.inverse()).is_identity() and pi.inverse().compose(pi).is_identity()
    assert pi.inverse().inverse() == pi


def test_a_spec_and_a_permutation_survive_saving(case, tmp_path):
    _, spec, _ = case
    spec.save(tmp_path / "spec.json")
    assert PermutationSpec.load(tmp_path / "spec.json") == spec
    assert list(PermutationSpec.load(tmp_path / "spec.json").groups) == list(spec.groups)
    pi = spec.random(0)
    pi.save(tmp_path / "pi.json")
    assert lmc.Permutation.load(tmp_path / "pi.json") == pi


def test_printing_shows_groups_sizes_and_patterns(case):
    _, spec, _ = case
    text, page = repr(spec), spec._repr_html_()
    for family in spec.families:
        assert family in text and family in page


def test_apply_copies_and_keeps_names_order_dtype():
    model = models.mlp(9, [8], 4).half()
    spec = PermutationSpec.from_patterns(mlp(1), model)
    weights = spec.random(0).apply(model)
    assert list(weights) == list(model.state_dict())
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    weights["head.bias"].add_(1)
    assert not torch.equal(weights["head.bias"], model.state_dict()["head.bias"])


def test_direction_new_unit_i_is_old_unit_p_i():
    model = models.mlp(9, [8], 4)
    spec = PermutationSpec.from_patterns(mlp(1), model)
    pi = spec.random(0)
    moved = pi.apply(model)
    assert torch.equal(moved["fc1.bias"], model.state_dict()["fc1.bias"][pi["h1"]])
    assert torch.equal(moved["head.weight"], model.state_dict()["head.weight"][:, pi["h1"]])


def test_order_and_coverage_are_counted():
    spec = PermutationSpec.from_patterns(mlp(2), models.mlp(9, [8, 7], 4))
    assert spec.log10_order == pytest.approx(math.log10(math.factorial(8) * math.factorial(7)))
    total = 9 * 8 + 8 + 8 * 7 + 7 + 7 * 4 + 4
    assert spec.coverage == pytest.approx((total - 4) / total)
    half = PermutationSpec.from_patterns({"w": "(a + .)", "a": "a"}, {"w": torch.zeros(6), "a": torch.zeros(3)})
    assert half.coverage == pytest.approx(6 / 9)
    assert half.moving_share("w") == pytest.approx(0.5)


def test_running_statistics_are_buffers_with_and_without_a_module():
    model = models.vgg(1 / 16, image=(1, 8, 8))
    by_module = PermutationSpec.from_patterns(vgg(8), model)
    by_weights = PermutationSpec.from_patterns(vgg(8), model.state_dict())
    assert by_module.buffers == by_weights.buffers
    assert "norm1.running_mean" in by_module.buffers and "norm1.weight" not in by_module.buffers


def test_a_spec_without_weights_says_what_it_needs_and_binds_later():
    open_spec = PermutationSpec.from_patterns(mlp(1))
    with pytest.raises(lmc.SpecError, match="sizes are open"):
        open_spec.groups  # noqa: B018
    assert open_spec.bind(models.mlp(9, [8], 4)).groups["h1"].size == 8


def test_specs_that_do_not_fit_name_the_tensor():
    small, large = models.mlp(9, [8], 4), models.mlp(9, [16], 4)
    spec = PermutationSpec.from_patterns(mlp(1), small)
    with pytest.raises(lmc.SpecError, match=r"fc1.weight.*\(8, 9\).*\(16, 9\)"):
        spec.random(0).apply(large)
    with pytest.raises(lmc.SpecError, match="fc1.weight"):
        spec.check({})
    with pytest.raises(lmc.SpecError, match="'nothing.weight'"):
        PermutationSpec.from_patterns({"nothing.weight": "a ."}, small)


def test_patterns_that_are_no_texts_are_refused():
    for patterns in ({"fc1.weight": 3}, "h ."):
        with pytest.raises(lmc.SpecError, match="mapping of tensor names to texts"):
            PermutationSpec.from_patterns(patterns)


def test_an_example_without_examples_proves_nothing():
    model = models.mlp(9, [8, 7], 4)
    with pytest.raises(lmc.InputError, match=r"inputs: shape \(0, 9\) holds nothing"):
        lmc.permutation_spec(model, torch.zeros(0, 9))
    wrong = PermutationSpec.from_patterns({"fc1.weight": "h ."}, model)
    with pytest.raises(lmc.CertificateError, match="outputs are empty"):
        wrong.certify(model, torch.zeros(0, 9))


def test_only_modules_have_symmetries_to_find():
    with pytest.raises(lmc.InputError, match="expected an nn.Module, got OrderedDict"):
        lmc.permutation_spec(models.mlp(9, [8], 4).state_dict(), torch.zeros(2, 9))


def test_certifying_other_weights_names_what_does_not_fit():
    model = models.mlp(9, [8, 7], 4)
    pi = PermutationSpec.from_patterns(mlp(2), model).random(0)
    assert "one permutation of 2 groups" in str(pi.certify(model, torch.randn(3, 9)))
    with pytest.raises(lmc.SpecError, match=r"fc1.weight: the spec was made for shape \(8, 9\), got \(6, 9\)"):
        pi.certify(model, torch.randn(3, 9), weights=models.mlp(9, [6, 7], 4))


def test_wildcards_name_many_tensors_and_pass_their_text_on():
    model = models.mlp(9, [8, 7], 4)
    spec = PermutationSpec.from_patterns(
        {"fc*.bias": "h*", "fc1.weight": "h1 .", "fc2.weight": "h2 h1", "head.weight": ". h2"}, model
    )
    assert spec == PermutationSpec.from_patterns(mlp(2), model)


def test_wildcards_may_stand_in_quotes():
    shapes = {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(4), "2.weight": torch.zeros(2, 4)}
    patterns = {"0.weight": "'0' .", "*.bias": "'*'", "2.weight": ". '0'"}
    assert list(PermutationSpec.from_patterns(patterns, shapes).groups) == ["0"]


def test_a_group_of_one_unit_holds_others_and_is_none_itself():
    shapes = {"a": torch.zeros(6, 2), "b": torch.zeros(2, 6), "c": torch.zeros(3, 6)}
    patterns = {"a": "(kv head d) .", "b": ". (kv head d)", "c": ". (kv head d)"}
    spec = PermutationSpec.from_patterns(patterns, shapes, kv=2, head=1)
    assert list(spec.groups) == ["kv", "d[0]", "d[1]"] and spec.groups["d[1]"].within == (("kv", 1),)
    assert spec == PermutationSpec.from_patterns({n: p.replace("head ", "") for n, p in patterns.items()}, shapes, kv=2)
    assert PermutationSpec.from_dict(spec.to_dict()) == spec
    alone = PermutationSpec.from_patterns({"a": "(head d) .", "b": ". (head d)"}, shapes, head=1)
    assert list(alone.groups) == ["d"] and alone.random(1).inverse().inverse() == alone.random(1)


def test_a_certificate_is_of_the_specification_that_was_certified():
    model = models.mlp(9, [8, 7], 4)
    spec = lmc.permutation_spec(model, torch.randn(3, 9), progress=False)
    name = next(iter(spec.groups))
    assert spec.certificate is not None and spec.without(name).certificate is None


def test_a_pattern_can_be_edited():
    model = models.mlp(9, [8, 7], 4)
    spec = PermutationSpec.from_patterns(mlp(2), model)
    frozen = spec | {"fc2.weight": "h2 .", "fc1.*": ". .", "fc1.bias": "."}
    assert list(frozen.groups) == ["h2"]
    assert (frozen | {"fc2.weight": "h2 h1", "fc1.weight": "h1 .", "fc1.bias": "h1"}) == spec
    assert frozen != spec and spec.contains(frozen) and not frozen.contains(spec)
    assert any("h1" in line for line in spec.differences(frozen))


def test_exchanges_are_found_in_larger_and_in_other_tables():
    model = models.mlp(9, [2000], 4)
    spec = PermutationSpec.from_patterns(mlp(1), model)
    pairs = PermutationSpec.from_patterns({n: p.replace("h1", "(1000 pair)") for n, p in mlp(1).items()}, model, pair=2)
    halves = PermutationSpec.from_patterns({n: p.replace("h1", "(half .)") for n, p in mlp(1).items()}, model, half=2)
    assert all(x.contains(x) for x in (spec, pairs, halves))
    assert not halves.contains(spec) and not pairs.contains(spec) and not pairs.contains(halves)


def test_groups_can_be_left_out():
    spec = PermutationSpec.from_patterns(ATTENTION, Attention(), head=4)
    assert set(spec.without("d").families) == {"head", "qk", "v"}
    loose = spec.without("head")
    assert loose.groups["v[2]"].within == ()
    assert loose.certify(Attention(), torch.randn(TOKENS)).max_error < 1e-12
    with pytest.raises(lmc.SpecError, match="no group matches 'x'"):
        spec.without("x")


def test_comparison_ignores_names_and_order_of_units():
    model = models.mlp(9, [8], 4)
    spec = PermutationSpec.from_patterns(mlp(1), model)
    renamed = PermutationSpec.from_patterns({"fc1.weight": "z .", "fc1.bias": "z", "head.weight": ". z"}, model)
    assert spec == renamed


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (Group("g", 2, {"w": (Table((0,), np.array([[0], [9]])),)}), "outside"),
        (Group("g", 2, {"w": (Table((0,), np.array([[0], [0]])),)}), "two units"),
        (Group("g", 3, {"w": (Table((0,), np.array([[0], [1]])),)}), "rows of shape"),
        (Group("g", 2, {"w": (Table((5,), np.array([[0], [1]])),)}), "no such axes"),
        (Group("g", 2, {"x": (Table((0,), np.array([[0], [1]])),)}), "not known"),
        (Group("g", 2, {"w": (Table((0,), np.array([[0], [1]])),)}, within=(("p", 0),)), "not a group"),
    ],
)
def test_malformed_groups_are_refused(group, message):
    with pytest.raises(lmc.SpecError, match=message):
        PermutationSpec({group.name: group}, {"w": (4,)})


def test_siblings_that_do_not_correspond_are_refused():
    rows = {0: np.array([[0], [1]]), 1: np.array([[3], [2]])}
    parent = Group("p", 2, {"w": (Table((0,), np.array([[0, 1], [2, 3]])),)})
    children = [Group(f"c[{u}]", 2, {"w": (Table((0,), rows[u]),)}, "c", (("p", u),)) for u in (0, 1)]
    with pytest.raises(lmc.SpecError, match="do not correspond"):
        PermutationSpec({g.name: g for g in (parent, *children)}, {"w": (4,)})


def test_files_that_are_something_else_are_refused(tmp_path):
    for text in ("", "{}", "[1]", json.dumps({"format": "else"}), "\0"):
        (tmp_path / "x.json").write_text(text)
        for kind in (PermutationSpec, lmc.Permutation):
            with pytest.raises(lmc.DataError):
                kind.load(tmp_path / "x.json")


def test_certifying_on_the_meta_device_is_refused_with_a_way_out():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    spec = PermutationSpec.from_patterns({"0.weight": "h .", "0.bias": "h", "1.weight": ". h"}, model)
    with pytest.raises(lmc.CertificateError, match="twin"):
        spec.certify(model, torch.zeros(1, 4, device="meta"))


def test_casts_inside_the_model_do_not_hide_behind_rounding():
    class Casting(nn.Sequential):
        def forward(self, x):
            return super().forward(x.float()).to(torch.float32)

    model = Casting(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    spec = PermutationSpec.from_patterns({"0.weight": "h .", "0.bias": "h", "2.weight": ". h"}, model)
    assert spec.certify(model, torch.randn(4, 6)).max_error < 1e-12


def test_tied_tensors_move_under_both_names_and_count_once():
    model = nn.ModuleDict({"embed": nn.Linear(5, 4, bias=False), "out": nn.Linear(5, 4, bias=False)})
    model["out"].weight = model["embed"].weight
    spec = PermutationSpec.from_patterns({"embed.weight": "d .", "out.weight": "d ."}, model)
    assert spec.parameters == {"embed.weight": 20} and spec.coverage == 1.0
    moved = spec.random(0).apply(model)
    assert torch.equal(moved["embed.weight"], moved["out.weight"])
    found = lmc.weight_matching(spec, model, moved)
    assert found.objective == pytest.approx(float(model["embed"].weight.detach().square().sum()))
    assert PermutationSpec.from_dict(spec.to_dict()).aliases == {"out.weight": "embed.weight"}


def test_a_permutation_says_how_many_units_move():
    spec = PermutationSpec.from_patterns({"0.weight": "h .", "0.bias": "h"}, nn.Sequential(nn.Linear(3, 6)))
    turned = lmc.Permutation(spec, {"h": torch.tensor([1, 0, 2, 3, 4, 5])}, objective=1.5, info={"method": "hand"})
    assert repr(turned) == "Permutation(1 groups, 2 of 6 units move, objective 1.5, by hand)"
    assert repr(spec.identity()) == "Permutation(1 groups, 0 of 6 units move)"


def test_moves_compose_as_the_permutations_that_they_stand_for():
    """Outer and nested groups, where a step names some of them and what came before others."""
    torch.manual_seed(0)
    model = Attention()
    spec = PermutationSpec.from_patterns(ATTENTION, model, head=4)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    identity = dict(spec.identity())
    for seed in range(4):
        one, two = dict(spec.random(seed)), dict(spec.random(seed + 10))
        first, step = ({n: p[n] for k, n in enumerate(p) if (k + seed) % 3 != by} for p, by in ((one, 0), (two, 1)))
        found = compose_moves(spec, step, first)
        expected = act(spec, identity | step, act(spec, identity | first, weights))
        got = act(spec, identity | found, weights)
        assert all(torch.equal(got[name], expected[name]) for name in weights)
    assert compose_moves(spec, {}, {}) == {}


def test_a_spec_read_back_is_the_same_in_every_part():
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    spec = lmc.permutation_spec(model, torch.randn(4, 3))
    again = PermutationSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again.buffers == spec.buffers == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert (again.shapes, again.frozen, again.aliases) == (spec.shapes, spec.frozen, spec.aliases)
    assert again.coverage == spec.coverage and not again.differences(spec)


def test_what_was_assumed_and_kept_is_saved_with_a_spec():
    spec = replace(
        lmc.PermutationSpec.from_patterns({"a": "h .", "b": ". h"}, {"a": torch.ones(3, 2), "b": torch.ones(2, 3)}),
        assumed=("how many are true in a mask",),
        outputs=("logits", "boxes"),
    )
    again = lmc.PermutationSpec.from_dict(spec.to_dict())
    assert again.assumed == spec.assumed and again.outputs == spec.outputs
