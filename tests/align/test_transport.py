import sys

import handwritten
import pytest
import torch
from alignment_cases import CASES, HEADS, digits, random_weights, transformer_patterns

import lmc
from lmc.align.activations.matching import activation_matching
from lmc.align.transport.couplings import Coupling, plan
from lmc.align.transport.fusion import Fusion, ot_fusion
from lmc.align.transport.layerwise import check_alone, guess_inputs
from lmc.align.weight_matching.gains import assign, opening_prices
from lmc.errors import DataError, InputError, MismatchError, MissingPackageError, SpecError, WeightsError
from lmc.models.convnets import cnn
from lmc.models.mlp import mlp
from lmc.models.transformers import gpt, vit
from lmc.symmetry.groups.group import Group
from lmc.symmetry.spec import PermutationSpec

METRICS = ("weights", "activations")


def costs(n_a: int, n_b: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n_a, n_b, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fuse(case, a, b, metric: str = "weights", **options) -> Fusion:
    inputs = case.inputs if metric == "activations" else None
    return ot_fusion(case.model, a, b, inputs, spec=case.spec, progress=False, **options)


def duplicated(weights, spec: PermutationSpec, wide):
    """Weights of `wide` in which every unit of `weights` stands twice, with half of its outgoing weight each."""
    found = {}
    for name, tensor in weights.items():
        for axis in range(tensor.ndim):
            length = wide[name].shape[axis]
            if length != tensor.shape[axis]:
                table = next(t for _, t in spec.tables_by_tensor[name] if t.dims == (axis,))
                rows = torch.from_numpy(table.rows).repeat(2, 1).flatten()
                tensor = tensor.index_select(axis, rows) / (2.0 if axis == 1 else 1.0)
        found[name] = tensor
    return found


@pytest.mark.parametrize("seed", range(3))
def test_exact_couplings_of_equally_many_units_are_assignments(seed: int):
    cost = costs(9, 9, seed)
    ot = pytest.importorskip("ot", reason="the comparison is with POT's exact solver")
    index, _ = assign(-cost)
    expected = torch.eye(9, dtype=torch.float64)[index] / 9
    assert torch.equal(plan(cost, 0.0, "h"), expected)
    uniform = torch.full((9,), 1 / 9).double().numpy()
    torch.testing.assert_close(torch.from_numpy(ot.emd(uniform, uniform, cost.numpy())), expected)


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
def test_opening_prices_change_no_assignment(spread: float):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(150, 40, generator=generator, dtype=torch.float64).relu() for _ in range(2))
    gain = spread * ours @ theirs.T  # low rank and positive, as cross-products of activations are
    prices = opening_prices(gain)
    assert prices is not None and torch.isfinite(prices).all()
    index, value = assign(gain, prices)
    expected, best = assign(gain)
    assert value == pytest.approx(best, rel=1e-12) and torch.equal(index, expected)


def test_there_are_no_prices_where_they_do_not_help():
    assert opening_prices(torch.rand(10, 10)) is None
    assert opening_prices(torch.ones(200, 200)) is None


@pytest.mark.parametrize(("n_a", "n_b", "regularization"), [(6, 4, 0.0), (4, 6, 0.0), (5, 5, 0.1), (7, 3, 0.05)])
def test_marginals_are_uniform(n_a: int, n_b: int, regularization: float):
    coupling = plan(costs(n_a, n_b), regularization, "h")
    torch.testing.assert_close(coupling.sum(1), torch.full((n_a,), 1 / n_a, dtype=torch.float64), atol=1e-7, rtol=0)
    torch.testing.assert_close(coupling.sum(0), torch.full((n_b,), 1 / n_b, dtype=torch.float64), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("n_b", "regularization"), [(6, 0.0), (4, 0.0), (4, 0.1)])
def test_marginals_are_the_masses(n_b: int, regularization: float):
    masses = tuple(torch.arange(1.0, n + 1, dtype=torch.float64) / (n * (n + 1) / 2) for n in (6, n_b))
    coupling = plan(costs(6, n_b), regularization, "h", masses)
    torch.testing.assert_close(coupling.sum(1), masses[0], atol=1e-7, rtol=0)
    torch.testing.assert_close(coupling.sum(0), masses[1], atol=1e-7, rtol=0)
    group = Group("h", 6, {})
    for producing in (True, False):
        shares = Coupling(group, group, coupling).share(producing)
        sums = shares.sum(1 if producing else 0)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_constant_in_the_cost_changes_no_coupling():
    cost = costs(6, 4)
    torch.testing.assert_close(plan(cost, 0.0, "h"), plan(cost + 3.0, 0.0, "h"))


def test_entropy_leads_from_the_assignment_to_the_mean_of_all():
    cost = costs(6, 6)
    exact = plan(cost, 0.0, "h")
    gaps = [float((plan(cost, reg, "h") - exact).abs().max()) for reg in (0.3, 0.06, 0.02)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.03
    torch.testing.assert_close(plan(cost, 1e4, "h"), torch.full((6, 6), 1 / 36, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CASES)
def test_a_planted_permutation_is_undone(name: str, metric: str):
    case = CASES[name]()
    a = case.model.state_dict()
    fused = fuse(case, a, case.spec.random(3).apply(a), metric)
    assert all(torch.allclose(fused[k], v, atol=1e-6) for k, v in a.items())
    assert all(torch.allclose(fused.transported[0][k], v, atol=1e-6) for k, v in a.items())


@pytest.mark.parametrize("importance", ["l1", "l2"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet-bn", "gpt"])
def test_a_planted_permutation_is_undone_where_units_have_masses(name: str, importance: str):
    case = CASES[name]()
    a = case.model.state_dict()
    fused = fuse(case, a, case.spec.random(3).apply(a), importance=importance)
    assert all(torch.allclose(fused[k], v, atol=1e-5) for k, v in a.items())


@pytest.mark.parametrize(("importance", "order"), [("l1", 1), ("l2", 2)])
def test_masses_are_norms_of_incoming_weights(importance: str, order: int):
    case = CASES["mlp"]()
    a, b = case.other(2), case.other(1)
    coupling = fuse(case, a, b, importance=importance).couplings[0]["h1"]
    for weights, axis in ((b, 1), (a, 0)):
        incoming = torch.cat([weights["fc1.weight"], weights["fc1.bias"][:, None]], 1).double()
        norms = torch.linalg.vector_norm(incoming, order, dim=1)
        torch.testing.assert_close(coupling.sum(axis), norms / norms.sum(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("regularization", [0.0, 0.05])
def test_the_order_of_units_that_either_network_has_does_not_matter(metric: str, regularization: float):
    case = CASES["cnn"]()
    a, b, pi = case.other(5), case.other(4), case.spec.random(6)
    plain = fuse(case, a, b, metric, regularization=regularization)
    of_b = fuse(case, a, pi.apply(b), metric, regularization=regularization)
    of_a = fuse(case, pi.apply(a), b, metric, regularization=regularization)
    for name, moved in pi.apply(plain).items():
        torch.testing.assert_close(of_b[name], plain[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_a[name], moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_a_model_fused_with_itself_is_itself(metric: str):
    case = CASES["gpt"]()
    fused = fuse(case, case.model, case.model, metric, share=0.3)
    assert all(torch.allclose(fused[k], v, atol=1e-6) for k, v in case.model.state_dict().items())
    heads = fused.couplings[0]["head1"]
    torch.testing.assert_close(heads, torch.eye(HEADS, dtype=torch.float64) / HEADS)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet-ln", "vit"])
def test_hard_couplings_keep_the_function_of_b(name: str, metric: str):
    case = CASES[name]()
    a, b = case.other(5), case.other(4)
    fused = fuse(case, a, b, metric, share=0.0)
    with torch.no_grad():
        expected = torch.func.functional_call(case.model, b, case.inputs)
        found = torch.func.functional_call(case.model, fused.weights, case.inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    whole = fuse(case, a, b, metric, share=1.0)
    assert all(torch.equal(whole[k], v) for k, v in a.items())


def test_activations_give_the_matching_of_the_outputs():
    """Squared distances of standardised activations are 2 - 2 correlations: where a unit is seen does the rest."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 12), torch.nn.Linear(12, 3))
    spec = PermutationSpec.from_patterns({"0.weight": "h .", "0.bias": "h", "1.weight": ". h"}, model)
    a, b = random_weights(model, 2), random_weights(model, 1)
    inputs = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    coupling = ot_fusion(model, a, b, inputs, spec=spec, squared=True, standardize=True, progress=False).couplings[0][
        "h"
    ]
    pi = activation_matching(spec, model, a, b, inputs, progress=False)["h"]  # without a nonlinearity, the same values
    assert torch.equal(coupling, torch.eye(12, dtype=torch.float64)[pi].T / 12)


WIDTHS = {
    "mlp": (lambda k: mlp(12, [6 * k, 5 * k], 5), handwritten.mlp(2), {}, (40, 12)),
    "cnn": (
        lambda k: cnn((3 * k, 4 * k), classes=5),
        {"conv1.weight": "c1 . . .", "conv1.bias": "c1", "conv2.weight": "c2 c1 . .", "conv2.bias": "c2"}
        | {"head.weight": ". (c2 .)"},
        {},
        (40, 1, 8, 8),
    ),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", WIDTHS)
def test_a_network_of_duplicated_units_becomes_the_narrow_one(name: str, metric: str):
    make, patterns, sizes, shape = WIDTHS[name]
    narrow, wide = make(1), make(2)
    narrow.load_state_dict(random_weights(narrow, 3))
    spec = PermutationSpec.from_patterns(patterns, narrow, **sizes)
    a = narrow.state_dict()
    wide.load_state_dict(duplicated(a, spec, wide.state_dict()))
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(wide(inputs), narrow(inputs), rtol=1e-4, atol=1e-5)
    planted = PermutationSpec.from_patterns(patterns, wide, **sizes).random(1)
    wide.load_state_dict(planted.apply(wide))
    fused = ot_fusion(narrow, a, wide, inputs if metric == "activations" else None, spec=spec, progress=False)
    for key, tensor in a.items():
        torch.testing.assert_close(fused.transported[0][key], tensor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fused[key], tensor, rtol=1e-4, atol=1e-5)


def test_the_narrow_network_can_be_fused_into_the_wide_one():
    narrow, wide = mlp(12, [6, 5], 5), mlp(12, [12, 10], 5)
    narrow.load_state_dict(random_weights(narrow, 3))
    spec = PermutationSpec.from_patterns(handwritten.mlp(2), wide)
    a = duplicated(narrow.state_dict(), PermutationSpec.from_patterns(handwritten.mlp(2), narrow), wide.state_dict())
    fused = ot_fusion(wide, a, narrow, spec=spec, progress=False)
    inputs = torch.randn(30, 12)
    with torch.no_grad():
        found = torch.func.functional_call(wide, fused.transported[0], inputs)
        torch.testing.assert_close(found, narrow(inputs), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.func.functional_call(wide, fused.weights, inputs), narrow(inputs))


@pytest.mark.parametrize("metric", METRICS)
def test_transformers_of_unequal_widths_fuse_into_a_working_one(metric: str):
    patterns = transformer_patterns(2) | {"patch.weight": "d . . .", "patch.bias": "d"}
    patterns |= {"class_token": ". . d", "position": ". . d"}
    small = vit(dim=8, heads=2, hidden=12, classes=5)
    large = vit(dim=16, heads=2, hidden=20, classes=5)
    spec = PermutationSpec.from_patterns(patterns, small, head1=2, head2=2)
    images = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    fused = ot_fusion(small, small, large, images if metric == "activations" else None, spec=spec, progress=False)
    assert {k: v.shape for k, v in fused.items()} == {k: v.shape for k, v in small.state_dict().items()}
    small.load_state_dict(fused)
    assert torch.isfinite(small(images)).all()
    assert fused.couplings[0]["v1[0->1]"].shape == (8, 4)


@pytest.mark.parametrize("regularization", [0.0, 0.05])
def test_several_models_are_fused_into_the_anchor(regularization: float):
    case = CASES["cnn"]()
    a = case.model.state_dict()
    copies = [case.spec.random(seed).apply(a) for seed in (1, 2)]
    fused = fuse(case, a, copies, regularization=regularization)
    assert len(fused.transported) == len(fused.couplings) == 2 and fused.info["share"] == pytest.approx(1 / 3)
    if regularization == 0.0:
        assert all(torch.allclose(fused[k], v, atol=1e-6) for k, v in a.items())
    mixed = fuse(case, a, [case.other(3), case.other(4)], share=0.5)
    expected = 0.5 * a["conv1.weight"] + 0.25 * sum(t["conv1.weight"] for t in mixed.transported)
    torch.testing.assert_close(mixed["conv1.weight"], expected)


@pytest.mark.parametrize("metric", METRICS)
def test_trained_networks_come_closer(metric: str):
    trained = digits()
    a, b = trained.weights[1::-1]
    inputs = trained.data if metric == "activations" else None
    fused = ot_fusion(trained.model, a, b, inputs, spec=trained.spec, progress=False)
    assert trained.barrier(fused.transported[0], a) < trained.barrier(b, a) / 3


def test_the_spec_is_found_where_none_is_given():
    case = CASES["mlp"]()
    a = case.model.state_dict()
    b = case.spec.random(2).apply(a)
    for inputs in (None, case.inputs):
        fused = ot_fusion(case.model, a, b, inputs, progress=False)
        assert all(torch.allclose(fused[k], v, atol=1e-6) for k, v in a.items())


def test_example_inputs_are_made_up_from_the_first_layer():
    assert guess_inputs(mlp(12, [3], 2)).shape == (2, 12)
    assert guess_inputs(cnn((3, 4), image=(2, 16, 16))).shape == (2, 2, 16, 16)
    assert guess_inputs(gpt(11, 6, dim=8, heads=2)).shape == (2, 4)
    with pytest.raises(InputError, match="pass inputs, or spec"):
        guess_inputs(torch.nn.LSTM(3, 4))


def test_it_is_a_mapping_that_prints():
    case = CASES["mlp"]()
    fused = fuse(case, case.other(2), case.other(1))
    case.model.load_state_dict(fused)
    assert repr(fused) == "Fusion(2 models, by weights, 6 tensors)" and len(fused) == 6
    assert torch.equal(lmc.weights.as_weights(fused)["fc1.bias"], fused["fc1.bias"])


def test_nothing_of_the_callers_changes():
    case = CASES["vgg-bn"]()
    case.model.train()
    a, b = case.other(2), case.other(1)
    kept = [{k: v.clone() for k, v in w.items()} for w in (b, a, case.model.state_dict())]
    fuse(case, a, b, "activations")
    for now, before in zip((b, a, case.model.state_dict()), kept, strict=True):
        assert all(torch.equal(now[k], before[k]) for k in before)
    assert case.model.training


def test_dead_units_make_no_nan():
    case = CASES["mlp"]()
    a, b = dict(case.other(1)), dict(case.other(2))
    for weights in (a, b):
        weights["fc1.weight"], weights["fc1.bias"] = weights["fc1.weight"].clone(), weights["fc1.bias"].clone()
        weights["fc1.weight"][:5] = 0.0
    fused = fuse(case, a, b, "activations", regularization=0.05)
    assert all(torch.isfinite(tensor).all() for tensor in fused.values())


def test_without_pot_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    case = CASES["mlp"]()
    fuse(case, case.other(2), case.other(1))
    with pytest.raises(MissingPackageError, match="lmc-lab\\[ot\\]"):
        fuse(case, case.other(2), case.other(1), regularization=0.1)
    with pytest.raises(MissingPackageError, match="needs the package POT"):
        fuse(case, case.other(2), case.other(1), importance="l1")


def test_entropic_couplings_that_do_not_converge_are_said(monkeypatch):
    monkeypatch.setattr("lmc.align.transport.couplings._SCALINGS", 3)
    with pytest.warns(UserWarning, match="h1: Sinkhorn has not converged in 3 iterations.*raise regularization"):
        plan(costs(8, 6), 1e-3, "h1")


def test_bad_input():
    case = CASES["mlp"]()
    a, b = case.other(2), case.other(1)
    with pytest.raises(MismatchError, match="depths and kinds of layers must be equal"):
        fuse(case, a, mlp(12, [16, 16, 10], 5))
    with pytest.raises(MismatchError, match="fc1.weight"):
        fuse(case, a, mlp(13, [16, 10], 5))
    with pytest.raises(MismatchError, match="int64"):
        fuse(case, a, b | {"fc1.bias": torch.zeros(16, dtype=torch.int64)})
    with pytest.raises(InputError, match="need it as a module"):
        fuse(case, a, mlp(12, [20, 10], 5).state_dict(), "activations")
    with pytest.raises(InputError, match="importance='max': expected 'l1'"):
        fuse(case, a, b, importance="max")
    with pytest.raises(InputError, match="share=2"):
        fuse(case, a, b, share=2.0)
    with pytest.raises(InputError, match="0 models"):
        fuse(case, a, [])
    with pytest.raises(WeightsError, match="of b"):
        fuse(case, a, b | {"fc1.bias": torch.full((16,), torch.nan)})
    with pytest.raises(DataError, match="no examples"):
        ot_fusion(case.model, a, b, iter([]), spec=case.spec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_of_two_dtypes_the_wider_one_is_taken(dtype):
    case = CASES["mlp"]()
    a, b = case.other(2), {name: tensor.to(dtype) for name, tensor in case.other(1).items()}
    found = ot_fusion(case.model, a, b, spec=case.spec, progress=False)
    assert {tensor.dtype for tensor in found.values()} == {torch.promote_types(torch.float32, dtype)}
    wide = ot_fusion(case.model, a, {n: t.float() for n, t in b.items()}, spec=case.spec, progress=False)
    assert all(torch.allclose(found[name].float(), wide[name], atol=1e-6) for name in found)


def test_groups_that_transport_cannot_follow_are_named():
    experts = PermutationSpec.from_patterns({"up": "e e/f ."}, {"up": torch.zeros(3, 4, 5)})
    with pytest.raises(SpecError, match="up: group 'f\\[0\\]' spans axes \\(0, 1\\); leave it out"):
        check_alone(experts)
    same_in_all = PermutationSpec.from_patterns({"q": "(head /v) ."}, {"q": torch.zeros(6, 5)}, head=2)
    with pytest.raises(
        SpecError, match=r"groups 'head' and 'v' share channels.*without\('head'\) or spec.without\('v'\)"
    ):
        check_alone(same_in_all)
