import copy
import warnings

import handwritten
import numpy as np
import pytest
import torch
from alignment_cases import CASES, HEADS, Case, cases, digits
from torch import nn

import lmc
from lmc.align.activations.collect import CrossMoments, Site, Tap, centred, choose, live_taps
from lmc.align.activations.matching import activation_matching
from lmc.errors import DataError, InputError, MismatchError, SpecError, WeightsError
from lmc.models.mlp import mlp
from lmc.models.transformers import Attention
from lmc.symmetry.spec import Permutation, PermutationSpec

METHODS = ("correlation", "cross-product")
pytestmark = pytest.mark.filterwarnings("ignore:.*leave the matching open")


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def match(case: Case, a, b, **options) -> Permutation:
    return activation_matching(case.spec, case.model, a, b, case.inputs, progress=False, **options)


def outputs(case: Case, weights) -> torch.Tensor:
    with torch.no_grad():
        return torch.func.functional_call(case.model, weights, case.inputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", cases("mlp", "cnn", "vgg-bn", "gpt"))
def test_a_planted_permutation_is_found(name: str, method: str):
    case = CASES[name]()
    planted = case.spec.random(3)
    pi = match(case, case.model, planted.apply(case.model), method=method)
    middle = lmc.weights.lerp(case.model, pi.apply(planted.apply(case.model)), 0.5)
    torch.testing.assert_close(outputs(case, middle), outputs(case, case.model.state_dict()), rtol=1e-5, atol=1e-5)
    if not any(sum(constant) for constant in pi.info["constant_units"].values()):
        assert pi == planted.inverse()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", cases("mlp", "resnet-ln", "vit"))
def test_a_model_is_matched_to_itself_by_the_identity(name: str, method: str):
    case = CASES[name]()
    assert match(case, case.model, case.model, method=method).is_identity()


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit"])
def test_permuting_either_input_changes_nothing_in_the_result(name: str):
    case = CASES[name]()
    a, b = case.model.state_dict(), case.other(5)
    pi = match(case, a, b)
    moved_b, moved_a = case.spec.random(1), case.spec.random(2)
    after_b = match(case, a, moved_b.apply(b))
    assert after_b.compose(moved_b) == pi
    assert after_b.objective == pytest.approx(pi.objective, rel=1e-6)
    assert match(case, moved_a.apply(a), b) == moved_a.compose(pi)


def test_the_inverse_permutation_would_not_do():
    case = CASES["mlp"]()
    planted = case.spec.random(3)
    assert match(case, case.model, planted.apply(case.model)) != planted


@pytest.mark.parametrize("name", ["mlp", "resnet-bn", "gpt"])
def test_the_objective_beats_the_identity_and_is_what_it_says(name: str):
    case = CASES[name]()
    pi = match(case, case.model, case.other(4))
    assert pi.objective is not None and pi.objective > pi.info["objective_at_identity"]
    again = match(case, case.model, pi.apply(case.other(4)))
    assert again.is_identity()
    assert again.info["objective_at_identity"] == pytest.approx(pi.objective, rel=1e-5)


def test_correlations_and_cross_products_are_those_of_all_activations_at_once():
    case = CASES["mlp"]()
    other = case.other(2)

    def hidden(weights):
        return torch.relu(case.inputs.double() @ weights["fc1.weight"].double().T + weights["fc1.bias"].double())

    za, zb = hidden(case.model.state_dict()).numpy(), hidden(other).numpy()
    moments = CrossMoments(16, 16, torch.device("cpu"))
    rows = torch.arange(16)[:, None]
    site = Site(Tap("fc2", "input", -1, "fc2.weight", 1), "h1", rows, rows)
    for part in np.array_split(np.arange(200), 7):
        moments.update(site, centred(torch.tensor(za[part].T)), centred(torch.tensor(zb[part].T)))
    np.testing.assert_allclose(moments.cross_product(), za.T @ zb, rtol=1e-12)
    expected = np.corrcoef(za.T, zb.T)[:16, 16:]
    np.testing.assert_allclose(moments.correlation(), expected, atol=1e-12)


def test_a_large_mean_costs_no_digits():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5000, generator=generator, dtype=torch.float64)
    moments = CrossMoments(3, 3, torch.device("cpu"))
    rows = torch.arange(3)[:, None]
    site = Site(Tap("fc", "output", -1, "fc.weight", 0), "h", rows, rows)
    for part in (values + 300.0).float().split(100, dim=1):
        moments.update(site, centred(part), centred(part))
    np.testing.assert_allclose(moments.correlation(), np.corrcoef(values), atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_batches_make_no_difference(name: str):
    case = CASES[name]()
    other = case.other(4)
    whole = match(case, case.model, other)
    assert match(case, case.model, other, batch_size=7) == whole
    batches = [(case.inputs[i : i + 9], case.targets[i : i + 9]) for i in range(0, len(case.inputs), 9)]
    streamed = activation_matching(case.spec, case.model, case.model, other, iter(batches), progress=False)
    assert streamed == whole
    pair = activation_matching(case.spec, case.model, case.model, other, (case.inputs, case.targets), progress=False)
    assert pair == whole


def test_correlation_does_not_see_the_scale_of_a_unit():
    case = CASES["mlp"]()
    other, scaled = case.other(4), dict(case.other(4))
    scale = torch.linspace(0.2, 5.0, 16)
    scaled["fc1.weight"], scaled["fc1.bias"] = other["fc1.weight"] * scale[:, None], other["fc1.bias"] * scale
    scaled["fc2.weight"] = other["fc2.weight"] / scale
    assert match(case, case.model, other) == match(case, case.model, scaled)
    assert match(case, case.model, other, method="cross-product") != match(
        case, case.model, scaled, method="cross-product"
    )


def test_a_head_is_matched_as_a_whole_by_the_best_order_of_its_units():
    """Brute force over heads and units: the score of the found permutation is the largest of all."""
    from itertools import permutations, product

    case = CASES["vit"]()
    a, b = case.model.state_dict(), case.other(9)
    pi = match(case, a, b)
    seen = {}

    def note(key):
        def hook(module, args, output):
            seen[key, module] = (args[0] if key == "o" else output).flatten(0, 1).double()

        return hook

    network = copy.deepcopy(case.model)
    attention = network.blocks["1"].attention
    features = []
    for weights in (a, b):
        handles = [getattr(attention, part).register_forward_hook(note(part)) for part in ("q", "k", "o")]
        network.load_state_dict(weights)
        with torch.no_grad():
            network(case.inputs)
        features.append({key: value for (key, _), value in seen.items()})
        for handle in handles:
            handle.remove()
    score = {k: np.corrcoef(features[0][k].T, features[1][k].T)[:8, 8:].reshape(2, 4, 2, 4) for k in ("q", "k", "o")}

    def inside(matrix):
        return max(sum(matrix[i, p[i]] for i in range(4)) for p in permutations(range(4)))

    best = max(
        sum(
            inside(score["q"][i, :, order[i]] + score["k"][i, :, order[i]]) + inside(score["o"][i, :, order[i]])
            for i in range(HEADS)
        )
        for order in permutations(range(HEADS))
    )
    found = 0.0
    heads = pi["head1"].tolist()
    for i, unit in product(range(HEADS), range(4)):
        qk, v = int(pi[f"qk1[{i}]"][unit]), int(pi[f"v1[{i}]"][unit])
        found += (
            score["q"][i, unit, heads[i], qk] + score["k"][i, unit, heads[i], qk] + score["o"][i, unit, heads[i], v]
        )
    assert found == pytest.approx(best, rel=1e-5)


def test_streams_use_all_their_taps_and_shared_inputs_count_once():
    case = CASES["gpt"]()
    taps = match(case, case.model, case.other(1)).info["taps"]
    places = ("blocks.1.attention.q", "blocks.1.fc1", "blocks.2.attention.q", "blocks.2.fc1", "head")
    assert taps["d"] == [f"input of {place}" for place in places]
    resnet = CASES["resnet-bn"]()
    assert len(match(resnet, resnet.model, resnet.other(1)).info["taps"]["s1"]) == 4


def test_outputs_are_preferred_where_asked_for():
    case = CASES["cnn"]()
    taps = live_taps(case.spec, case.model, lambda: case.model(case.inputs[:1]))
    assert [tap.name for tap in choose(case.spec, taps)] == ["input of conv2", "input of head"]
    assert [tap.name for tap in choose(case.spec, taps, "output")] == ["output of conv1", "output of conv2"]


class Functional(nn.Module):
    """A hidden layer whose weights no module owns, between two ordinary ones."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.middle = nn.Parameter(torch.randn(10, 8, generator=torch.Generator().manual_seed(1)))
        self.last = nn.Parameter(torch.randn(4, 10, generator=torch.Generator().manual_seed(2)))

    def forward(self, x):
        hidden = nn.functional.linear(torch.relu(self.fc1(x)), self.middle)
        return nn.functional.linear(torch.relu(hidden), self.last)


def test_groups_that_no_module_shows_are_matched_by_their_weights():
    model = Functional()
    patterns = {"fc1.weight": "h1 .", "fc1.bias": "h1", "middle": "h2 h1", "last": ". h2"}
    spec = PermutationSpec.from_patterns(patterns, model)
    planted = spec.random(0)
    with pytest.warns(UserWarning, match="h2: these groups are matched by their weights"):
        pi = activation_matching(spec, model, model, planted.apply(model), torch.randn(50, 6))
    assert pi == planted.inverse()
    assert pi.info["by_weights"] == ["h2"] and list(pi.info["taps"]) == ["h1"]


def test_weights_used_in_place_of_their_module_fall_back_too():
    """`nn.MultiheadAttention` never calls its projection: its heads pass no module."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    model = Block()
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
    patterns = {
        "attention.in_proj_weight": "((head qk) + (head qk) + (head v)) .",
        "attention.out_proj.weight": "d (head v)",
    }
    patterns |= {"attention.in_proj_bias": "((head qk) + (head qk) + (head v))", "attention.out_proj.bias": "d"}
    spec = PermutationSpec.from_patterns(patterns | {"head.weight": ". d"}, model, head=2, qk=2, v=2)
    planted = spec.random(4)
    with pytest.warns(UserWarning, match="matched by their weights"):
        pi = activation_matching(spec, model, model, planted.apply(model), torch.randn(80, 5, 4))
    assert pi == planted.inverse()
    assert list(pi.info["taps"]) == ["d"]


def test_in_place_layers_do_not_spoil_what_was_seen():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 4, 3)).eval()
    spec = PermutationSpec.from_patterns({"0.weight": "c . . .", "0.bias": "c", "3.weight": ". (c .)"}, model)
    images = torch.randn(40, 1, 4, 4)
    taps = choose(spec, live_taps(spec, model, lambda: model(images[:1])), "output")
    from lmc.align.activations.collect import collect
    from lmc.align.activations.matching import clusters
    from lmc.network.network import Network

    sites = [site for cluster in clusters(spec, taps)[0] for site in cluster.sites(spec)]
    network, state = Network(model, torch.device("cpu")), model.state_dict()
    moments = collect((network, network), (state, state), sites, [images], False)["c"]
    before_relu = nn.functional.conv2d(images, state["0.weight"], state["0.bias"]).transpose(0, 1).flatten(1)
    before_relu = before_relu.detach().double()
    np.testing.assert_allclose(moments.cross_product(), before_relu @ before_relu.T, rtol=1e-5)


def test_modules_called_several_times_show_several_samples():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

        def forward(self, x):
            for _ in range(2):
                x = x + self.down(torch.tanh(self.up(x)))
            return x

    model = Twice()
    spec = PermutationSpec.from_patterns({"up.weight": "h .", "up.bias": "h", "down.weight": ". h"}, model)
    planted = spec.random(1)
    pi = activation_matching(spec, model, model, planted.apply(model), torch.randn(30, 5))
    assert pi == planted.inverse() and pi.info["samples"] == {"h": 60}


def test_fused_heads_that_are_read_from_one_output():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention(8, 2, causal=False, fused=True)

        def forward(self, x):
            return self.attention(x)

    model = Fused()
    patterns = {
        "attention.qkv.weight": "((head qk) + (head qk) + (head v)) .",
        "attention.qkv.bias": "((head qk) + (head qk) + (head v))",
        "attention.o.weight": ". (head v)",
    }
    spec = PermutationSpec.from_patterns(patterns, model, head=2, qk=4, v=4)
    planted = spec.random(2)
    pi = activation_matching(spec, model, model, planted.apply(model), torch.randn(60, 5, 8))
    assert pi == planted.inverse()


def test_nothing_of_the_callers_changes():
    case = CASES["vgg-bn"]()
    case.model.train()
    other = case.other(3)
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    kept, state = {k: v.clone() for k, v in other.items()}, torch.get_rng_state()
    match(case, case.model, other)
    assert case.model.training and all(p.requires_grad and p.grad is None for p in case.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())
    assert all(torch.equal(before[k], v) for k, v in case.model.state_dict().items())
    assert all(torch.equal(kept[k], other[k]) for k in kept)
    assert torch.equal(state, torch.get_rng_state())


def test_dead_units_are_matched_by_their_weights():
    case = CASES["mlp"]()
    a = {k: v.clone() for k, v in case.model.state_dict().items()}
    a["fc1.bias"][:4] = torch.tensor([-1e3, -2e3, -3e3, -4e3])
    planted = case.spec.random(2)
    for method in METHODS:
        pi = match(case, a, planted.apply(a), method=method)
        assert pi == planted.inverse() and np.isfinite(pi.objective)
        assert pi.info["constant_units"]["h1"] == [4, 4]


def test_dead_units_make_no_nan_where_the_other_network_has_none():
    case = CASES["mlp"]()
    b = {k: v.clone() for k, v in case.other(3).items()}
    b["fc1.bias"][:4] = -1e3
    pi = match(case, case.model, b)
    assert pi.info["constant_units"]["h1"] == [0, 4] and np.isfinite(pi.objective)


def test_a_layer_without_any_signal_is_matched_by_its_weights():
    case = CASES["mlp"]()
    a = {k: v.clone() for k, v in case.model.state_dict().items()}
    a["fc1.bias"] -= 1e3
    planted = case.spec.random(1)
    pi = match(case, a, planted.apply(a))
    assert pi.info["constant_units"]["h1"] == [16, 16]
    assert torch.equal(pi["h1"], planted.inverse()["h1"])


def test_saturated_units_are_not_taken_for_dead_ones():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU6(), nn.Linear(8, 2))
    weights = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    weights["0.bias"] = torch.tensor([50.0, -50.0, 60.0, -60.0, 0.0, 0.1, -0.1, 0.2])
    spec = PermutationSpec.from_patterns({"0.weight": "h .", "0.bias": "h", "2.weight": ". h"}, model)
    planted, inputs = spec.random(0), torch.randn(50, 3)
    for method in METHODS:
        pi = activation_matching(spec, model, weights, planted.apply(weights), inputs, method=method)
        middle = lmc.weights.lerp(weights, pi.apply(planted.apply(weights)), 0.5)
        found, expected = (torch.func.functional_call(model, w, inputs) for w in (middle, weights))
        # Uncentred products do not tell two saturated units apart, whose outgoing weights then mix.
        assert torch.allclose(found, expected) or method == "cross-product"
    assert activation_matching(spec, model, weights, planted.apply(weights), inputs) == planted.inverse()


def test_inputs_that_count_different_things():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(5, 7), nn.Linear(6, 7)

        def forward(self, x, y):
            return self.head(torch.relu(self.left(x))) @ torch.relu(self.right(y)).T

    model = Towers()
    spec = PermutationSpec.from_patterns(
        {"left.weight": "h .", "left.bias": "h", "head.weight": "g h", "head.bias": "g"}
        | {"right.weight": "g .", "right.bias": "g"},
        model,
    )
    planted = spec.random(0)
    inputs = (torch.randn(30, 4), torch.randn(40, 5))
    for given in (inputs, [inputs, inputs], {"x": inputs[0], "y": inputs[1]}):
        assert activation_matching(spec, model, model, planted.apply(model), given) == planted.inverse()


def test_width_one():
    model = mlp(4, [1, 3], 2)
    spec = PermutationSpec.from_patterns(handwritten.mlp(2), model)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    pi = activation_matching(spec, model, weights, spec.random(5).apply(weights), torch.randn(20, 4))
    assert set(pi) == {"h2"}


def test_either_order_of_duplicate_units_will_do():
    case = CASES["mlp"]()
    weights = {k: v.clone() for k, v in case.model.state_dict().items()}
    for name in ("fc2.weight", "fc2.bias"):
        weights[name][1] = weights[name][0]
    planted = case.spec.random(5)
    moved = match(case, weights, planted.apply(weights)).apply(planted.apply(weights))
    assert all(torch.equal(moved[name], weights[name]) for name in ("fc1.weight", "fc2.weight", "fc2.bias"))


def test_too_few_samples_are_said():
    case = CASES["mlp"]()
    with pytest.warns(UserWarning, match="h1: 5 samples for 16 units.* 1 more group"):
        activation_matching(case.spec, case.model, case.model, case.other(1), case.inputs[:5])


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_no_needless_warnings(name: str):
    case = CASES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match(case, case.model, case.other(1))


def test_bad_input():
    case = CASES["mlp"]()
    a, b = case.model.state_dict(), case.other(1)
    with pytest.raises(InputError, match="method='pearson'.*'correlation', 'cross-product'"):
        match(case, a, b, method="pearson")
    with pytest.raises(MismatchError, match="fc1.weight"):
        match(case, a, mlp(12, [20, 10], 5))
    with pytest.raises(DataError, match="inputs are torch.float32"):  # weights of two dtypes take the wider one
        match(case, a, {k: v.double() for k, v in b.items()})
    with pytest.raises(MismatchError, match="conv1.weight: in model"):
        match(CASES["cnn"](), a, b)
    with pytest.raises(SpecError, match="spec"):
        activation_matching(CASES["cnn"]().spec, case.model, a, b, case.inputs, progress=False)
    with pytest.raises(WeightsError, match="fc1.bias of b"):
        match(case, a, b | {"fc1.bias": torch.full((16,), torch.nan)})
    empty = iter([])
    for inputs, message in (
        (empty, "no examples"),
        (case.inputs[:0], "axis 0"),
        ("digits", "got str"),
        ([3], "got int"),
    ):
        with pytest.raises(DataError, match=message):
            activation_matching(case.spec, case.model, a, b, inputs)
    with pytest.raises(DataError, match="h1: activations of a hold NaN"):
        activation_matching(case.spec, case.model, a, b, torch.full((30, 12), torch.inf))
    with pytest.raises(DataError, match="inputs of shape .* hold NaN"):
        activation_matching(case.spec, case.model, a, b, torch.full((30, 12), torch.nan))


@pytest.mark.parametrize("method", METHODS)
def test_trained_networks_come_closer(method: str):
    trained = digits()
    a, b = trained.weights[:2]
    pi = activation_matching(trained.spec, trained.model, a, b, trained.data, method=method, progress=False)
    assert trained.barrier(a, pi.apply(b)) < trained.barrier(a, b) / 3


def test_modules_that_want_more_than_one_example_get_two():
    """Normalised by the statistics of the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 4))
    inputs = torch.randn(64, 6)
    spec = lmc.permutation_spec(model, inputs[:2], progress=False)
    planted = spec.random(1).apply(model)
    back = activation_matching(spec, model, model, planted, inputs, progress=False).apply(planted)
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
