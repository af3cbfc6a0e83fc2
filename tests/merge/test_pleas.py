"""PLeaS: identities at both ends of the budget, the budget kept, least squares, digits."""

import handwritten
import pytest
import torch
import torch.nn.functional as F
from alignment_cases import CASES, Case
from torch import Tensor

import lmc
from lmc.errors import InputError, MismatchError
from lmc.merge.partial.pair import prepare
from lmc.merge.partial.pleas import pleas, spend
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights

DEEP = pytest.param("vgg-bn", marks=pytest.mark.thorough)  # by default it is seen where a permuted copy is merged
WIDENABLE = ("mlp", "cnn", DEEP, pytest.param("resnet-bn", marks=pytest.mark.thorough))


def merged(case: Case, a: Weights, b: Weights, data: Tensor | None, **options):
    return pleas(case.model, [a, b], data, spec=case.spec, progress=False, **options)


def double(weights: Weights) -> Weights:
    return {name: x.double() if x.is_floating_point() else x for name, x in weights.items()}


@torch.no_grad()
def outputs(model: torch.nn.Module, weights: Weights, inputs: Tensor) -> Tensor:
    return torch.func.functional_call(model.eval(), weights, (inputs,))


@pytest.mark.parametrize("data", [True, False], ids=["data", "data-free"])
@pytest.mark.parametrize("name", WIDENABLE)
def test_at_twice_the_size_it_is_the_ensemble(name: str, data: bool):
    case = CASES[name]()
    a, b, inputs = double(case.other(3)), double(case.other(4)), case.inputs.double()
    model = case.model.double()
    found = merged(case, a, b, inputs if data else None, budget=2.0)
    expected = 0.5 * (outputs(model, a, inputs) + outputs(model, b, inputs))
    with torch.no_grad():
        assert float((found.module(inputs) - expected).abs().max()) < 1e-9
    assert found.parameters[1] == pytest.approx(2.0, abs=0.02)


@pytest.mark.parametrize("name", WIDENABLE)
def test_at_the_size_of_one_it_is_permuting_and_averaging(name: str):
    case = CASES[name]()
    a, b = case.other(3), case.other(4)
    found = merged(case, a, b, None, budget=1.0)
    expected = lmc.weights.mean([a, lmc.weight_matching(case.spec, a, b, progress=False).apply(b)])
    torch.testing.assert_close(found.weights, expected, rtol=0, atol=1e-6)
    with_data = merged(case, a, b, case.inputs, ratio=0.0, fit=False)
    pi = lmc.activation_matching(case.spec, case.model, a, b, case.inputs, progress=False)
    expected = lmc.weights.mean([a, pi.apply(b)])
    learned = [key for key, _ in case.model.named_parameters()]
    torch.testing.assert_close(
        {key: with_data.weights[key] for key in learned}, {key: expected[key] for key in learned}, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", ["mlp", "vgg-bn", "vit"])
@pytest.mark.parametrize("budget", [1.0, pytest.param(1.15, marks=pytest.mark.thorough)])
def test_a_permuted_copy_gives_the_same_function_at_every_budget(name: str, budget: float):
    case = CASES[name]()
    a, inputs = double(case.other(3)), case.inputs.double()
    model = case.model.double()
    pi = case.spec.random(seed=2)
    # Normalisation layers see the same statistics as the weights hold, so that re-estimating them changes nothing.
    a = lmc.recalibrate_batchnorm(model, a, inputs)
    found = pleas(
        model, [a, pi.apply(a)], inputs, spec=case.spec, budget=budget, permutation=pi.inverse(), progress=False
    )
    with torch.no_grad():
        assert float((found.module(inputs) - outputs(model, a, inputs)).abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["mlp", "cnn", DEEP])
def test_the_budget_is_used_and_kept(name: str):
    case = CASES[name]()
    a, b = case.other(3), case.other(4)
    before = 1.0
    for budget in (1.2, 1.5, 1.8):
        found = merged(case, a, b, None, budget=budget)
        assert before <= found.parameters[1] <= budget
        assert found.parameters[1] > 1.0
        before = found.parameters[1]
        assert sum(p.numel() for p in found.module.parameters()) == round(
            found.parameters[0] * sum(p.numel() for p in case.model.parameters())
        )


def test_ratios_are_the_best_of_a_fine_grid():
    case = CASES["mlp"]()
    pair = prepare(case.spec, case.model, [case.other(3), case.other(4)], None, None, 256, None, False)
    worth = {"h1": 1.0, "h2": 2.5}
    found = spend(pair, worth, 1.4)
    one, two = 12 * 16 + 16, 16 * 10  # weights and bias of fc1; fc2 is shared, its bias and the head are h2's
    rest, total = 10 + 10 * 5, 12 * 16 + 16 + 16 * 10 + 10 + 10 * 5 + 5

    def cost(r: float, s: float) -> float:
        return (one * (1 + r) + two * (1 + r + s - r * s) + rest * (1 + s) + 5) / total

    grid = [(r / 400, s / 400) for r in range(401) for s in range(401)]
    best = max(r + 2.5 * s for r, s in grid if cost(r, s) <= 1.4)
    assert cost(found["h1"], found["h2"]) <= 1.4 + 1e-6
    assert found["h1"] + 2.5 * found["h2"] == pytest.approx(best, abs=0.02)


def test_units_that_match_least_stay_separate():
    case = CASES["mlp"]()
    a = case.other(3)
    b = {name: tensor.clone() for name, tensor in a.items()}
    odd = case.other(9)
    b["fc1.weight"][[2, 7]] = odd["fc1.weight"][[2, 7]]
    identity = case.spec.identity()
    for data in (None, case.inputs):
        found = merged(case, a, b, data, ratio={"h1": 2 / 16}, permutation=identity)
        apart = [ours[0] for ours, theirs in found.units["h1"].members if not theirs]
        assert apart == [2, 7]
        assert len(found.units["h2"]) == 10


@pytest.mark.parametrize("name", ["mlp", "cnn", DEEP])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_least_squares_never_makes_a_layer_worse(name: str, ratio: float):
    case = CASES[name]()
    found = merged(case, case.other(3), case.other(4), case.inputs, ratio=ratio)
    errors = found.info["least_squares"]
    assert len(errors) == sum(key.endswith("weight") and x.ndim > 1 for key, x in case.model.named_parameters())
    assert all(error.after <= error.before for error in errors.values())
    assert sum(error.after for error in errors.values()) < 0.5 * sum(error.before for error in errors.values())


def test_least_squares_against_a_direct_solution():
    case = CASES["mlp"]()
    a, b, inputs = double(case.other(3)), double(case.other(4)), case.inputs.double()
    model = case.model.double()
    found = pleas(
        model, [a, b], inputs, spec=case.spec, ratio=0.0, ridge=0.0, permutation=case.spec.identity(), progress=False
    )
    with torch.no_grad():
        hidden, target = [], []
        for weights in (a, b):
            first = F.linear(inputs, weights["fc1.weight"], weights["fc1.bias"]).relu()
            hidden.append(first)
            target.append(F.linear(first, weights["fc2.weight"], weights["fc2.bias"]))
    x = torch.cat([0.5 * (hidden[0] + hidden[1]), torch.ones(len(inputs), 1).double()], dim=1)
    solution = torch.linalg.lstsq(x, 0.5 * (target[0] + target[1])).solution
    torch.testing.assert_close(found.weights["fc2.weight"], solution[:-1].T, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.weights["fc2.bias"], solution[-1], rtol=0, atol=1e-8)


def test_nothing_crosses_between_what_is_kept_of_either():
    case = CASES["mlp"]()
    found = merged(case, case.other(3), case.other(4), case.inputs, ratio=0.5)
    into, out = found.units["h1"].owner, found.units["h2"].owner
    weight = found.weights["fc2.weight"]
    assert bool((weight[out == 0][:, into == 1] == 0).all()) and bool((weight[out == 1][:, into == 0] == 0).all())
    assert bool((weight[out == 0][:, into == 0] != 0).any())


@pytest.mark.filterwarnings("ignore:.*samples for.*")
def test_few_samples_dead_units_and_constant_inputs_stay_sane():
    case = CASES["mlp"]()
    a, b = case.other(3), case.other(4)
    for weights in (a, b):
        weights["fc1.bias"][:4] = -1e3
    for data in (case.inputs[:3], torch.ones(20, 12)):
        found = merged(case, a, b, data, budget=1.3)
        plain = merged(case, a, b, data, budget=1.3, fit=False)
        assert all(bool(torch.isfinite(x).all()) for x in found.weights.values())
        goal = 0.5 * (outputs(case.model, a, data) + outputs(case.model, b, data))
        errors = [float((outputs(x.module, x.weights, data) - goal).square().mean()) for x in (found, plain)]
        assert errors[0] < errors[1]


def test_nothing_given_is_changed():
    case = CASES["vgg-bn"]()
    case.model.train()
    b = case.other(4)
    before = {name: x.clone() for name, x in case.model.state_dict().items()}
    kept = {name: x.clone() for name, x in b.items()}
    found = merged(case, case.model, b, case.inputs, budget=1.3)
    assert case.model.training and not found.module.training
    torch.testing.assert_close(dict(case.model.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(b, kept, rtol=0, atol=0)


def test_bad_input_is_refused():
    case = CASES["mlp"]()
    a, b = case.other(3), case.other(4)
    for options, message in (
        ({"budget": 2.5}, "budget=2.5"),
        ({"ridge": -1.0}, "ridge=-1"),
        ({"ratio": {"h7": 0.2}}, "no group is called 'h7'"),
    ):
        with pytest.raises(InputError, match=message):
            merged(case, a, b, case.inputs, **options)
    with pytest.raises(InputError, match="expected two, A and B, got 3"):
        pleas(case.model, [a, b, a], case.inputs, spec=case.spec)
    other = lmc.models.mlp(12, [16, 11], 5).state_dict()
    with pytest.raises(MismatchError, match="fc2"):
        merged(case, a, other, case.inputs)


@pytest.mark.parametrize(
    "name",
    ["digits-mlp64", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("digits-vgg11", "digits-resnet20"))],
)
def test_digits_networks_come_close_to_their_ensemble(name: str):
    stored, data = lmc.data.checkpoint(name), lmc.data.digits(flat="mlp" in name)
    model, (a, b) = stored.model(), stored.weights
    inputs, targets = data.test
    patterns = {"digits-mlp64": handwritten.mlp(3), "digits-vgg11": handwritten.vgg(8)}
    spec = PermutationSpec.from_patterns(patterns.get(name, handwritten.resnet20()), model)
    some = data.train[0][:400]
    pi = lmc.activation_matching(spec, model, a, b, some, progress=False)

    def accuracy(logits: Tensor) -> float:
        return float((logits.argmax(1) == targets).float().mean())

    ensemble = accuracy(0.5 * (outputs(model, a, inputs) + outputs(model, b, inputs)))
    found = []
    for options in ({"ratio": 0.0, "fit": False}, {"ratio": 0.0}, {"ratio": 0.25}):
        made = pleas(model, [a, b], some, spec=spec, permutation=pi, progress=False, **options)
        found.append(accuracy(outputs(made.module, made.weights, inputs)))
    assert found[0] + 0.02 < found[1] < ensemble + 0.015
    assert ensemble - 0.03 < found[2] < ensemble + 0.015


@pytest.mark.parametrize("name", ["mlp", pytest.param("resnet-bn", marks=pytest.mark.thorough)])
def test_with_heads_of_their_own_unmerged_networks_answer_as_before(name: str):
    case = CASES[name]()
    a, b, inputs = double(case.other(3)), double(case.other(4)), case.inputs.double()
    model = case.model.double()
    found = merged(case, a, b, inputs, budget=2.0, heads=["head.*"])
    for network, weights in enumerate((a, b)):
        answer = found.answering(network)
        with torch.no_grad():
            assert float((answer(inputs) - outputs(model, weights, inputs)).abs().max()) < 1e-9


def test_layers_over_sequences_are_fitted():
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Conv1d(2, 5, 3, padding=1), torch.nn.Conv1d(5, 6, 3, padding=1)
            self.head = torch.nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).relu()).relu().mean(-1))

    a, b, inputs = Net(), Net(), torch.randn(60, 2, 7)
    found = pleas(a, [a, b], inputs, ratio=0.4, ridge=0.0, progress=False)
    errors = found.info["least_squares"]
    assert set(errors) == {"first.weight", "second.weight", "head.weight"}
    assert all(fit.after <= fit.before for fit in errors.values())
    assert errors["second.weight"].after < 0.9 * errors["second.weight"].before
