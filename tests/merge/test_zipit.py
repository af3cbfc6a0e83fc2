"""ZipIt: identities, planted truths, what may grow and what may not, digits."""

import handwritten
import pytest
import small_models
import torch
import torch.nn.functional as F
from alignment_cases import CASES, Case, random_weights
from torch import Tensor, nn

import lmc
from lmc.errors import DataError, InputError, MismatchError
from lmc.merge.partial.growth import blocks, growth
from lmc.merge.partial.units import MergedUnits, paired, zipped_weights
from lmc.merge.partial.zipit import greedy
from lmc.symmetry.groups.group import Table
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights

WIDENABLE = ("mlp", "cnn", "vgg-bn", pytest.param("resnet-bn", marks=pytest.mark.thorough))


def zipit(case: Case, a: Weights, b: Weights, **options):
    return lmc.merge.zipit(case.model, [a, b], case.inputs, spec=case.spec, progress=False, **options)


def double(weights: Weights) -> Weights:
    return {name: x.double() if x.is_floating_point() else x for name, x in weights.items()}


@torch.no_grad()
def outputs(model: nn.Module, weights: Weights, inputs: Tensor) -> Tensor:
    return torch.func.functional_call(model.eval(), weights, (inputs,))


@pytest.mark.parametrize("name", WIDENABLE)
def test_zipping_a_network_with_itself_gives_it_back(name: str):
    case = CASES[name]()
    a = case.other(3)
    found = zipit(case, a, a)
    learned = [key for key, _ in case.model.named_parameters()]
    assert found.parameters[0] == 1.0
    assert all(torch.equal(found.weights[key], a[key]) for key in learned)


@pytest.mark.parametrize("name", WIDENABLE)
def test_a_permuted_copy_is_zipped_with_its_original(name: str):
    case = CASES[name]()
    a = case.other(3)
    found = zipit(case, a, case.spec.random(seed=5).apply(a))
    learned = [key for key, _ in case.model.named_parameters()]
    torch.testing.assert_close({k: found.weights[k] for k in learned}, {k: a[k] for k in learned}, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", WIDENABLE)
def test_with_nothing_merged_it_is_the_ensemble(name: str):
    case = CASES[name]()
    a, b = double(case.other(3)), double(case.other(4))
    inputs = case.inputs.double()
    model = case.model.double()
    found = lmc.merge.zipit(model, [a, b], inputs, spec=case.spec, ratio=1.0, progress=False)
    expected = 0.5 * (outputs(model, a, inputs) + outputs(model, b, inputs))
    with torch.no_grad():
        assert float((found.module(inputs) - expected).abs().max()) < 1e-9
    assert found.parameters[0] > 1.9


def test_pairs_across_are_permutation_and_average():
    case = CASES["mlp"]()
    a, b = case.other(3), case.other(4)
    found = zipit(case, a, b, alpha=0.0, beta=0.0)
    pi = found.info["permutation"]
    indices = {}
    for name, units in found.units.items():
        assert all(len(ours) == len(theirs) == 1 for ours, theirs in units.members)
        indices[name] = pi[name][torch.tensor([theirs[0] for _, theirs in units.members])]
    expected = lmc.weights.mean([a, lmc.Permutation(case.spec, indices).apply(b)])
    torch.testing.assert_close(found.weights, expected, rtol=0, atol=1e-6)


def duplicated(copies: list[int]) -> Weights:
    """One function of three hidden units, each with so many copies that share its outgoing weight."""
    generator = torch.Generator().manual_seed(0)
    into, bias, out = (torch.randn(*shape, generator=generator).double() for shape in ((3, 12), (3,), (5, 3)))
    which = torch.repeat_interleave(torch.arange(3), torch.tensor(copies))
    share = torch.tensor([1.0 / copies[unit] for unit in which]).double()
    zeros = torch.zeros(5).double()
    return {
        "fc1.weight": into[which],
        "fc1.bias": bias[which],
        "head.weight": out[:, which] * share,
        "head.bias": zeros,
    }


def test_units_that_a_network_has_twice_are_merged_within_it():
    model = lmc.models.mlp(12, [4], 5).double()
    spec = PermutationSpec.from_patterns(handwritten.mlp(1), model)
    inputs = torch.randn(200, 12, generator=torch.Generator().manual_seed(1)).double()
    a, b = duplicated([2, 1, 1]), duplicated([1, 1, 2])
    reference = outputs(model, a, inputs)
    errors = []
    for beta in (0.0, 1.0):
        found = lmc.merge.zipit(model, [a, b], inputs, spec=spec, alpha=1.0, beta=beta, progress=False)
        assert len(found.units["h1"]) == 4
        errors.append(float((outputs(found.module, found.weights, inputs) - reference).abs().max()))
    assert errors[1] < 1e-9 < 0.1 < errors[0]


def test_greedy_merges_as_worked_out_by_hand():
    # MergedUnits A0 A1 B0 B1. The best pair is A0-B0 (0.9); B1 is next closest to that cluster, then to A1.
    score = torch.tensor(
        [[1.0, 0.1, 0.9, 0.8], [0.1, 1.0, 0.2, 0.3], [0.9, 0.2, 1.0, 0.7], [0.8, 0.3, 0.7, 1.0]], dtype=torch.float64
    )
    pairs = MergedUnits(2, (((0,), (0,)), ((1,), (1,))))
    assert greedy(score, 2, alpha=0.1, beta=1.0).members == pairs.members
    assert greedy(score, 2, alpha=0.0, beta=1.0).members == pairs.members
    assert greedy(score, 2, alpha=1.0, beta=1.0).members == (((0,), (0, 1)), ((1,), ()))
    assert greedy(score, 2, alpha=1.0, beta=0.0).members == pairs.members
    assert greedy(score, 1, alpha=1.0, beta=1.0).members == (((0,), (0,)), ((1,), ()), ((), (1,)))


def slow_greedy(score: Tensor, merges: int, alpha: float) -> list[tuple[set[int], set[int]]]:
    """The same without limits within networks, every step over all pairs."""
    n = len(score) // 2
    clusters = {i: ({i}, set()) if i < n else (set(), {i - n}) for i in range(2 * n)}
    value = {(i, j): float(score[i, j]) for i in range(2 * n) for j in range(i)}
    for _ in range(merges):
        i, j = max(value, key=lambda pair: value[pair])
        clusters[i] = tuple(x | y for x, y in zip(clusters[i], clusters.pop(j), strict=True))
        for k in clusters:
            if k != i:
                at, other = (max(i, k), min(i, k)), (max(j, k), min(j, k))
                value[at] = alpha * min(value[at], value[other])
        value = {pair: x for pair, x in value.items() if j not in pair}
    return list(clusters.values())


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_keeps_its_best_partners_up_to_date(seed: int, alpha: float):
    noise = torch.randn(24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    score = noise + noise.T
    found = greedy(score, 12, alpha=alpha, beta=100.0)
    expected = {(frozenset(ours), frozenset(theirs)) for ours, theirs in slow_greedy(score, 12, alpha)}
    assert {(frozenset(ours), frozenset(theirs)) for ours, theirs in found.members} == expected


def test_later_groups_alone_can_be_kept_apart():
    case = CASES["mlp"]()
    a, b = case.other(3), case.other(4)
    found = zipit(case, a, b, ratio={"h2": 1.0})
    assert {name: len(units) for name, units in found.units.items()} == {"h1": 16, "h2": 20}
    assert tuple(found.weights["fc2.weight"].shape) == (20, 16)
    assert found.module.fc2.out_features == 20 and found.module.head.in_features == 20


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3)
        self.depth = nn.Conv2d(6, 6, 3, groups=6)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.depth(self.first(images).relu()).relu().permute(0, 2, 3, 1).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, steps: Tensor) -> Tensor:
        return self.head(self.lstm(steps)[0].tanh()[:, -1])


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.fc(x)).relu()).relu()
        return self.head(self.third(x.view(-1, 6)).relu())


PATTERNS = {
    "branches": (small_models.Branches, small_models.BRANCHES, (2, 4, 4)),
    "recurrent": (
        Recurrent,
        {"lstm.weight_ih_l0": "(4 h) .", "lstm.weight_hh_l0": "(4 h) h", "head.weight": ". h"}
        | {"lstm.bias_ih_l0": "(4 h)", "lstm.bias_hh_l0": "(4 h)"},
        (7, 3),
    ),
}


@pytest.mark.parametrize("name", ["branches", "recurrent", "depthwise"])
def test_every_regular_layout_can_grow(name: str):
    """Concatenations, stacked gates with recurrence, filters for each channel and flattened pixels, channels last."""
    torch.manual_seed(0)
    if name == "depthwise":
        model, shape = Depthwise().double(), (2, 6, 6)
        spec = lmc.permutation_spec(model, torch.randn(2, *shape).double(), progress=False)
    else:
        make, patterns, shape = PATTERNS[name]
        model = make().double()
        spec = PermutationSpec.from_patterns(patterns, model)
    inputs = torch.randn(80, *shape).double()
    a, b = (
        double(random_weights(model, seed)) if name != "recurrent" else double(drawn(model, seed)) for seed in (1, 2)
    )
    found = lmc.merge.zipit(model, [a, b], inputs, spec=spec, ratio=1.0, progress=False)
    assert found.units and not found.kept
    expected = 0.5 * (outputs(model, a, inputs) + outputs(model, b, inputs))
    with torch.no_grad():
        assert float((found.module(inputs) - expected).abs().max()) < 1e-9


def drawn(model: nn.Module, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(x.shape, generator=generator) for name, x in model.state_dict().items()}


def test_what_cannot_grow_says_why():
    torch.manual_seed(0)
    model = Fixed()
    patterns = {"fc.weight": "h .", "fc.bias": "h", "norm.weight": "h", "norm.bias": "h", "second.weight": "g h"}
    patterns |= {"second.bias": "g", "third.weight": "k g", "third.bias": "k", "head.weight": ". k"}
    spec = PermutationSpec.from_patterns(patterns, model)
    found = growth(spec, model, model.state_dict(), torch.randn(2, 4))
    assert set(found.sizes) == {"k"}
    assert "layer normalisation" in found.kept["h"]
    assert "does not run with more units" in found.kept["g"] or "returns" in found.kept["g"]
    attention = CASES["vit"]()
    found = growth(attention.spec, attention.model, attention.other(1), attention.inputs[:2])
    assert set(found.sizes) == {"f1", "f2"}
    assert "are within" in found.kept["head1"] and "are within those of head1" in found.kept["qk1[0]"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.token(tokens)))


def test_tied_weights_stay_tied():
    model = Tied()
    tokens = torch.randint(7, (30, 5), generator=torch.Generator().manual_seed(0))
    spec = lmc.permutation_spec(model, tokens[:2], progress=False)
    found = growth(spec, model, model.state_dict(), tokens[:2])
    assert all("two places" in reason or "lie" in reason for reason in found.kept.values()) and not found.sizes
    a, b = model.state_dict(), {name: x + 0.1 for name, x in model.state_dict().items()}
    merged = lmc.merge.zipit(model, [a, b], tokens, spec=spec, progress=False)
    assert merged.module.head.weight is merged.module.token.weight


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0], [1], [2]], [(0, 3)]),
        ([[2, 3], [4, 5]], [(2, 6)]),
        ([[0, 2, 4], [1, 3, 5]], [(0, 2), (2, 4), (4, 6)]),
        ([[1], [0]], None),
        ([[0, 3], [1, 2]], None),
        ([[0], [2]], None),
    ],
)
def test_runs_of_units(rows: list, expected: list | None):
    assert blocks(Table((0,), torch.tensor(rows).numpy())) == expected


def test_normalised_and_nested_groups_are_averaged_one_to_one():
    case = CASES["vit"]()
    a = case.other(3)
    moved = case.spec.random(seed=2).apply(a)
    pi = lmc.weight_matching(case.spec, a, moved, progress=False)
    found = lmc.merge.zipit(
        case.model, [a, moved], case.inputs, spec=case.spec, permutation=pi, ratio={"f*": 0.5}, progress=False
    )
    assert {name: len(units) for name, units in found.units.items()} == {"f1": 18, "f2": 18}
    torch.testing.assert_close(
        outputs(found.module, found.weights, case.inputs), outputs(case.model, a, case.inputs), rtol=0, atol=1e-5
    )
    assert "one to one" in str(found) and "more" in str(found)


@pytest.mark.filterwarnings("ignore:.*samples for.*")
def test_dead_units_constant_units_and_few_samples():
    case = CASES["mlp"]()
    a, b = case.other(3), case.other(4)
    for weights in (a, b):
        weights["fc1.bias"][:4] = -1e3  # dead on all inputs
    for ratio in (0.0, 0.5):
        few = lmc.merge.zipit(case.model, [a, b], case.inputs[:3], spec=case.spec, ratio=ratio, progress=False)
        assert all(bool(torch.isfinite(x).all()) for x in few.weights.values())
        assert len(few.units["h1"]) == round(16 * (1 + ratio))
    found = zipit(case, a, a)
    assert torch.equal(found.weights["fc1.weight"], a["fc1.weight"])


def test_nothing_given_is_changed():
    case = CASES["vgg-bn"]()
    case.model.train()
    b = case.other(4)
    before = {name: x.clone() for name, x in case.model.state_dict().items()}
    kept = {name: x.clone() for name, x in b.items()}
    state = torch.random.get_rng_state()
    found = zipit(case, case.model, b, ratio=0.25)
    assert case.model.training and not found.module.training
    assert torch.equal(state, torch.random.get_rng_state())
    torch.testing.assert_close(dict(case.model.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(b, kept, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in found.module.parameters())
    assert {x.dtype for x in found.weights.values()} == {torch.float32, torch.int64}


def test_bad_input_is_refused():
    case = CASES["mlp"]()
    a, b = case.other(3), case.other(4)
    with pytest.raises(InputError, match="ratio: expected a number from 0 to 1, got 1.5"):
        zipit(case, a, b, ratio=1.5)
    with pytest.raises(InputError, match="no group is called 'h9'"):
        zipit(case, a, b, ratio={"h9": 0.5})
    with pytest.raises(InputError, match="alpha"):
        zipit(case, a, b, alpha=-0.1)
    with pytest.raises(MismatchError, match="fc1.weight"):
        zipit(case, a, b | {"fc1.weight": torch.zeros(3, 3)})
    with pytest.raises(DataError, match="no examples"):
        lmc.merge.zipit(case.model, [a, b], iter(()), spec=case.spec, progress=False)
    vit = CASES["vit"]()
    with pytest.raises(InputError, match="head1.*one to one"):
        zipit(vit, vit.other(1), vit.other(2), ratio={"head1": 0.5})
    normed = CASES["resnet-ln"]()
    with pytest.raises(InputError, match="no group can have more units"):
        zipit(normed, normed.other(1), normed.other(2), ratio=0.5)


def test_the_units_of_one_group_are_averages_of_their_members():
    units = MergedUnits(3, (((0, 1), (2,)), ((2,), ()), ((), (0, 1))))
    torch.testing.assert_close(
        units.writing(0) @ torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([1, 4, 0]).double()
    )
    assert units.owner.tolist() == [2, 0, 1]
    assert paired(3, [1]).members == (((0,), (0,)), ((1,), ()), ((2,), (2,)), ((), (1,)))
    a, b = {"x": torch.ones(2)}, {"x": torch.zeros(2)}
    assert zipped_weights({}, {}, a, b)["x"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ["digits-mlp64", pytest.param("digits-vgg11", marks=pytest.mark.thorough)])
def test_digits_networks_improve_with_width(name: str):
    stored, data = lmc.data.checkpoint(name), lmc.data.digits(flat="mlp" in name)
    model, (a, b) = stored.model(), stored.weights
    inputs, targets = data.test
    spec = lmc.permutation_spec(model, data.train[0][:2], progress=False)

    def loss(logits: Tensor) -> float:
        return float(F.cross_entropy(logits, targets))

    ensemble = loss(0.5 * (outputs(model, a, inputs) + outputs(model, b, inputs)))
    naive = lmc.weights.mean([a, b])
    naive = loss(outputs(model, lmc.recalibrate_batchnorm(model, naive, data.train[0]), inputs))
    losses = []
    for ratio in (0.0, 0.5):
        found = lmc.merge.zipit(model, [a, b], data.train, spec=spec, ratio=ratio, progress=False)
        losses.append(loss(outputs(found.module, found.weights, inputs)))
    assert ensemble < losses[1] < losses[0] < 0.6 * naive


@pytest.mark.parametrize("name", ["mlp", pytest.param("resnet-bn", marks=pytest.mark.thorough)])
def test_with_heads_of_their_own_unmerged_networks_answer_as_before(name: str):
    case = CASES[name]()
    a, b, inputs = double(case.other(3)), double(case.other(4)), case.inputs.double()
    model = case.model.double()
    found = lmc.merge.zipit(model, [a, b], inputs, spec=case.spec, ratio=1.0, heads=["head.*"], progress=False)
    for network, weights in enumerate((a, b)):
        answer = found.answering(network)
        with torch.no_grad():
            assert float((answer(inputs) - outputs(model, weights, inputs)).abs().max()) < 1e-9


def test_heads_read_the_merged_body():
    """Copies of one body with two heads: merged in full, each answers as its network did."""
    case = CASES["mlp"]()
    a = case.other(3)
    b = a | {name: x for name, x in case.other(4).items() if name.startswith("head")}
    found = zipit(case, a, case.spec.random(seed=1).apply(b), heads=["head.*"])
    for network, weights in enumerate((a, b)):
        answer = found.answering(network)
        torch.testing.assert_close(
            outputs(answer, answer.state_dict(), case.inputs),
            outputs(case.model, weights, case.inputs),
            rtol=0,
            atol=1e-5,
        )
    with pytest.raises(InputError, match="fc1.weight computes units"):
        zipit(case, a, b, heads=["fc1.*"])
    with pytest.raises(InputError, match="no tensor is called so"):
        zipit(case, a, b, heads=["top.*"])
    with pytest.raises(InputError, match="expected 0 or 1"):
        found.answering(2)
    with pytest.raises(InputError, match="heads=.* named"):
        zipit(case, a, b).answering(0)


def test_a_spec_is_found_where_none_is_given():
    case = CASES["mlp"]()
    a, b = case.other(1), case.other(2)
    found = lmc.merge.zipit(case.model, [a, b], case.inputs, progress=False)
    given = lmc.merge.zipit(
        case.model, [a, b], case.inputs, spec=lmc.permutation_spec(case.model, case.inputs[:2]), progress=False
    )
    assert all(torch.equal(found.weights[name], given.weights[name]) for name in given.weights)
    by_weights = lmc.merge.pleas(case.model, [a, b], budget=2.0, progress=False)
    expected = 0.5 * (outputs(case.model, a, case.inputs) + outputs(case.model, b, case.inputs))
    torch.testing.assert_close(outputs(by_weights.module, by_weights.weights, case.inputs), expected)
    with pytest.raises(lmc.InputError, match="models: expected two, A and B, got a single one"):
        lmc.merge.zipit(case.model, a, case.inputs)


def test_tab_completion_shows_public_names_only():
    assert dir(lmc.merge) == sorted(lmc.merge.__all__) and all(hasattr(lmc.merge, name) for name in dir(lmc.merge))


class TwoAnswers(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = F.relu(self.a(x))
        return self.b(h), {"aside": self.c(h)}


@pytest.mark.parametrize("method", ["zipit", "pleas"])
def test_all_outputs_of_a_module_count(method: str):
    a, b, x = TwoAnswers(0), TwoAnswers(1), torch.randn(64, 5)
    options = {"ratio": 1.0} if method == "zipit" else {"budget": 2.0}
    merged = getattr(lmc.merge, method)(a, [a, b], x, progress=False, **options)
    found, expected = merged.module(x), [m(x) for m in (a, b)]
    assert torch.allclose(found[0], (expected[0][0] + expected[1][0]) / 2, atol=1e-5)
    assert torch.allclose(found[1]["aside"], (expected[0][1]["aside"] + expected[1][1]["aside"]) / 2, atol=1e-5)


def test_a_network_without_groups_is_averaged():
    models = [nn.Linear(5, 3), nn.Linear(5, 3)]
    merged = lmc.merge.zipit(models[0], models, torch.randn(8, 5), progress=False)
    assert torch.allclose(merged.weights["weight"], (models[0].weight + models[1].weight).detach() / 2)
