"""What every way to align must obey, whatever it optimises: identities, planted truths, edges and bad input."""

import warnings
from collections.abc import Callable, Collection, Iterable
from functools import cache

import pytest
import torch
from alignment_cases import CASES, HEADS, Case, random_weights, transformer_patterns
from support import same
from torch import Tensor, nn

import lmc
from lmc.errors import DataError, MismatchError, SpecError, WeightsError
from lmc.models.mlp import mlp
from lmc.symmetry.groups.group import Table
from lmc.symmetry.spec import Permutation, PermutationSpec
from lmc.weights import Weights

Align = Callable[..., Permutation]


def by_activations(method: str) -> Align:
    return lambda spec, model, a, b, data: lmc.activation_matching(
        spec, model, a, b, data, method=method, progress=False
    )


# Every method as one function (spec, model, a, b, data) -> the permutation that moves b onto a.
METHODS: dict[str, Align] = {
    "weight": lambda spec, model, a, b, data: lmc.weight_matching(spec, a, b, progress=False),
    "correlation": by_activations("correlation"),
    "cross-product": by_activations("cross-product"),
    "straight-through": lambda spec, model, a, b, data: lmc.straight_through_matching(
        spec, model, a, b, data, epochs=2, progress=False
    ),
    "sinkhorn l2": lambda spec, model, a, b, data: lmc.sinkhorn_matching(
        spec, model, a, b, target="l2", steps=40, progress=False
    ),
    "sinkhorn midpoint": lambda spec, model, a, b, data: lmc.sinkhorn_matching(
        spec, model, a, b, data, steps=10, progress=False
    ),
    "merge_many": lambda spec, model, a, b, data: lmc.match_many(spec, [a, b], method="merge_many", progress=False)[1],
    "cycle_consistent": lambda spec, model, a, b, data: lmc.match_many(spec, [a, b], progress=False)[1],
}
BY_WEIGHTS = ("weight", "sinkhorn l2", "merge_many", "cycle_consistent")
BY_DATA = tuple(name for name in METHODS if name not in BY_WEIGHTS)
EXACT = tuple(name for name in METHODS if name != "sinkhorn midpoint")  # which looks for a low loss, not for the plant
FAMILIES = ("mlp", "cnn-bn", "vit")
LEARNED = ("straight-through", "sinkhorn l2", "sinkhorn midpoint")  # which take longest: by default on one family
every_method = pytest.mark.parametrize("method", METHODS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def on_every_family(methods: Iterable[str], of_learned: Collection[str] = ("mlp",)) -> pytest.MarkDecorator:
    """Pairs of a method and a family; those that learn run on the others in the thorough form."""
    left = [(method, family) for method in LEARNED for family in FAMILIES if family not in of_learned]
    pairs = [
        pytest.param(method, family, marks=[pytest.mark.thorough] if (method, family) in left else [])
        for method in methods
        for family in FAMILIES
    ]
    return pytest.mark.parametrize(("method", "family"), pairs)


@cache
def case_of(family: str) -> Case:
    if family == "cnn-bn":
        layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
        model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5))
        inputs = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(7))
        return case(model, lmc.permutation_spec(model, inputs[:2]), inputs)
    if family == "vit":
        model = lmc.models.vit(dim=8, heads=HEADS, depth=1, hidden=12, classes=5)
        patterns = {"patch.weight": "d . . .", "patch.bias": "d", "class_token": ". . d", "position": ". . d"}
        spec = PermutationSpec.from_patterns(transformer_patterns(1) | patterns, model, head1=HEADS)
        return case(model, spec, torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(7)))
    return CASES[family]()


def case(model: nn.Module, spec: PermutationSpec, inputs: Tensor) -> Case:
    model.load_state_dict(random_weights(model, 1))
    return Case(model.eval(), spec, inputs, torch.arange(len(inputs)) % 5)


@cache
def planted(method: str, family: str) -> tuple[Weights, Weights, Permutation, Permutation]:
    """A network, a permuted copy with a little noise, the planted permutation and the one that was found."""
    case = case_of(family)
    a, pi = case.model.state_dict(), case.spec.random(3)
    b = noisy(pi.apply(a), 0.05, seed=1)
    return a, b, pi, run(method, case, a, b)


@cache
def unrelated(method: str, family: str) -> tuple[Weights, Weights, Permutation]:
    """Two networks that have nothing in common, and what was found."""
    case = case_of(family)
    a, b = case.other(1), case.other(2)
    return a, b, run(method, case, a, b)


def run(method: str, case: Case, a: Weights, b: Weights) -> Permutation:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sinkhorn has not converged")  # cut short, to be quick
        return METHODS[method](case.spec, case.model, a, b, (case.inputs, case.targets))


def noisy(weights: Weights, share: float, seed: int) -> Weights:
    """Every parameter with noise of `share` of its own spread."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, x in weights.items():
        noise = torch.randn(x.shape, generator=generator)
        keep = not x.is_floating_point() or "running" in name
        found[name] = x if keep else x + share * x.std() * noise
    return found


def same_moves(x: Permutation, y: Permutation) -> bool:
    return all(torch.equal(x[name], y[name]) for name in x.indices)


def outputs(case: Case, weights: Weights) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(case.model, weights, case.inputs)


# ---- planted truths


@on_every_family(EXACT, of_learned=("mlp", "vit"))
def test_a_planted_permutation_is_found_under_noise(method: str, family: str):
    _, _, pi, found = planted(method, family)
    assert same_moves(found, pi.inverse())
    assert not same_moves(found, pi)  # the wrong direction is another permutation


@on_every_family(EXACT)
def test_equal_networks_stay_where_they_are(method: str, family: str):
    case = case_of(family)
    a = case.model.state_dict()
    assert same_moves(run(method, case, a, a), case.spec.identity())


@on_every_family(EXACT)
def test_permuting_either_network_changes_nothing_in_the_result(method: str, family: str):
    case = case_of(family)
    a, b, _, found = planted(method, family)
    moved = found.apply(b)
    p, q = case.spec.random(4), case.spec.random(5)
    other = q.apply(b)
    assert same(run(method, case, a, other).apply(other), moved)
    assert same(run(method, case, p.apply(a), b).apply(b), p.apply(moved))


@on_every_family(EXACT)
def test_exchanging_the_networks_inverts_the_answer(method: str, family: str):
    a, b, _, found = planted(method, family)
    assert same_moves(run(method, case_of(family), b, a), found.inverse())


# ---- identities of any answer


@on_every_family(METHODS)
def test_the_function_is_kept_and_nothing_of_the_callers_changes(method: str, family: str):
    case = case_of(family)
    a, b, _ = unrelated(method, family)
    kept = [{name: x.clone() for name, x in w.items()} for w in (a, b, case.model.state_dict())]
    random = torch.get_rng_state()
    moved = run(method, case, a, b).apply(b)
    torch.testing.assert_close(outputs(case, moved), outputs(case, b), rtol=1e-4, atol=1e-5)
    assert all(same(x, y) for x, y in zip(kept, (a, b, case.model.state_dict()), strict=True))
    assert torch.equal(random, torch.get_rng_state()) and not case.model.training


@on_every_family(METHODS)
def test_the_order_of_the_tensors_does_not_matter_and_runs_repeat(method: str, family: str):
    a, b, found = unrelated(method, family)
    again = run(method, case_of(family), dict(reversed(a.items())), dict(reversed(b.items())))
    assert same_moves(again, found)


@every_family
@pytest.mark.parametrize("method", ["weight", "merge_many", "cycle_consistent"])
def test_scaling_both_networks_scales_the_objective_by_the_square(method: str, family: str):
    case = case_of(family)
    a, b, found = unrelated(method, family)
    larger = run(method, case, *({name: 4 * x for name, x in w.items()} for w in (a, b)))  # a power of 2: no rounding
    assert same_moves(larger, found)
    if method == "weight":
        assert larger.objective == pytest.approx(16 * found.objective)


@on_every_family(BY_WEIGHTS)
def test_the_answer_is_no_further_away_than_the_start(method: str, family: str):
    case = case_of(family)
    a, b, found = unrelated(method, family)
    parameters = dict(case.model.named_parameters()).keys()
    ours, start, end = ({name: w[name] for name in parameters} for w in (a, b, found.apply(b)))
    assert lmc.weights.distance(ours, end) < lmc.weights.distance(ours, start)


@pytest.mark.parametrize("method", ["merge_many", "cycle_consistent"])
@pytest.mark.parametrize("family", ["mlp", "cnn-bn", pytest.param("vit", marks=pytest.mark.thorough)])
def test_going_round_three_models_is_the_identity(family: str, method: str):
    case = case_of(family)
    found = lmc.match_many(case.spec, [case.other(seed) for seed in (1, 2, 3)], method=method, progress=False)
    round_trip = found.pairwise(0, 1).compose(found.pairwise(1, 2)).compose(found.pairwise(2, 0))
    assert same_moves(round_trip, case.spec.identity())
    assert not same_moves(found.pairwise(0, 1), case.spec.identity())


@pytest.mark.parametrize("family", ["cnn-bn", "resnet-ln"])
def test_merge_many_of_two_is_weight_matching_with_norms_too(family: str):
    case = case_of(family)
    a, b = case.other(1), case.other(2)
    assert same_moves(run("merge_many", case, a, b), run("weight", case, a, b))


@pytest.mark.parametrize("method", BY_WEIGHTS)
def test_half_precision_is_matched_as_if_it_were_single(method: str):
    case = case_of("mlp")
    half = [{name: x.bfloat16() for name, x in case.other(seed).items()} for seed in (1, 2)]
    found = run(method, case, *half)
    assert same_moves(found, run(method, case, *({name: x.float() for name, x in w.items()} for w in half)))
    assert all(x.dtype == torch.bfloat16 for x in found.apply(half[1]).values())


# ---- edges


@on_every_family(METHODS)
def test_dead_units_break_nothing(method: str, family: str):
    case = case_of(family)
    a = case.model.state_dict()
    pi = case.spec.random(3)
    group = next(group for group in case.spec.groups.values() if group.size >= 6)
    dead = dict(a)
    for tensor, tables in group.tables.items():
        for table in tables:
            dead[tensor] = without(dead[tensor], table, [0, 1, 2])
    b = pi.apply(dead)
    found = run(method, case, dead, b)
    assert all(sorted(index.tolist()) == list(range(len(index))) for index in found.indices.values())
    assert found.objective is None or torch.isfinite(torch.tensor(found.objective))
    torch.testing.assert_close(outputs(case, found.apply(b)), outputs(case, dead), rtol=1e-4, atol=1e-5)
    if method in EXACT:
        assert same(found.apply(b), dead)


def without(tensor: Tensor, table: Table, units: list[int]) -> Tensor:
    """The tensor with everything zero that belongs to some units."""
    rows = torch.from_numpy(table.rows[units].ravel())
    front = tensor.movedim(table.dims, tuple(range(len(table.dims)))).clone()
    front.flatten(0, len(table.dims) - 1)[rows] = 0
    return front.movedim(tuple(range(len(table.dims))), table.dims)


@every_method
def test_layers_of_one_unit(method: str):
    model = mlp(4, [1, 1], 3)
    inputs = torch.randn(20, 4)
    alone = Case(model.eval(), lmc.permutation_spec(model, inputs), inputs, torch.arange(20) % 3)
    b = random_weights(model, 2)
    assert same(run(method, alone, random_weights(model, 1), b).apply(b), b)


@pytest.mark.parametrize("method", EXACT)
def test_either_order_of_twins_will_do(method: str):
    case = case_of("mlp")
    a = {name: x.clone() for name, x in case.model.state_dict().items()}
    for tensor, tables in case.spec.groups["h1"].tables.items():
        for table in tables:
            front = a[tensor].movedim(table.dims[0], 0)
            front[1] = front[0]
    b = case.spec.random(3).apply(a)
    assert same(run(method, case, a, b).apply(b), a)


@on_every_family(BY_DATA)
def test_inputs_that_are_all_alike_break_nothing(method: str, family: str):
    case = case_of(family)
    still = Case(case.model, case.spec, torch.ones_like(case.inputs), case.targets)
    a, b = case.other(1), case.other(2)
    moved = run(method, still, a, b).apply(b)
    torch.testing.assert_close(outputs(case, moved), outputs(case, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", BY_DATA)
def test_an_iterator_is_as_good_as_a_list(method: str):
    case = case_of("mlp")
    a, b = case.other(1), case.other(2)
    halves = [(case.inputs[:100], case.targets[:100]), (case.inputs[100:], case.targets[100:])]
    assert same_moves(*(METHODS[method](case.spec, case.model, a, b, data) for data in (halves, iter(halves))))


# ---- bad input


@pytest.mark.parametrize("method", BY_DATA)
def test_an_iterator_that_ran_dry_is_said(method: str):
    case = case_of("mlp")
    data = iter([(case.inputs, case.targets)])
    list(data)
    with pytest.raises(DataError, match="iterator that was read before is empty"):
        METHODS[method](case.spec, case.model, case.other(1), case.other(2), data)


@every_method
def test_networks_that_do_not_fit_each_other_are_refused(method: str):
    case = case_of("mlp")
    a, b = case.other(1), case.other(2)
    with pytest.raises(MismatchError, match=r"fc1\.weight: shape \(16, 12\) in .*, \(17, 12\) in "):
        run(method, case, a, random_weights(mlp(12, [17, 10], 5), 1))
    with pytest.raises(MismatchError, match=r"fc1\.weight: on cpu in .*, on meta in .*; move one"):
        run(method, case, a, {name: x.to("meta") for name, x in b.items()})
    with pytest.raises(MismatchError, match=r"head\.bias: .*missing in"):
        run(method, case, a, {name: x for name, x in b.items() if name != "head.bias"})


@every_method
def test_a_spec_of_another_architecture_is_refused(method: str):
    case, other = case_of("mlp"), mlp(12, [17, 10], 5)
    a, b = random_weights(other, 1), random_weights(other, 2)
    with pytest.raises(SpecError, match="fc1"):
        METHODS[method](case.spec, other, a, b, (case.inputs, case.targets))


@pytest.mark.parametrize("method", BY_DATA + ("sinkhorn l2",))
def test_a_model_of_another_architecture_is_refused(method: str):
    case = case_of("mlp")
    with pytest.raises(MismatchError, match="fc1"):
        METHODS[method](case.spec, mlp(12, [17, 10], 5), case.other(1), case.other(2), (case.inputs, case.targets))


@every_method
def test_numbers_that_are_not_finite_are_located(method: str):
    case = case_of("mlp")
    broken = {name: x.clone() for name, x in case.other(2).items()}
    broken["fc2.weight"][3, 4] = torch.nan
    with pytest.raises(WeightsError, match=r"fc2\.weight of .*first at \(3, 4\)"):
        run(method, case, case.other(1), broken)


@pytest.mark.parametrize("method", BY_DATA)
def test_inputs_with_nan_are_refused(method: str):
    case = case_of("mlp")
    broken = case.inputs.clone()
    broken[3, 4] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        METHODS[method](case.spec, case.model, case.other(1), case.other(2), (broken, case.targets))


# ---- trained networks


@cache
def stored(name: str):
    pair = lmc.data.checkpoint(name)
    data = lmc.data.digits(**pair.manifest["data"]["options"])
    model = pair.model()
    spec = lmc.permutation_spec(model, data.train[0][:2])
    a, b = pair[:2]
    return data, model, spec, a, b, barrier(model, a, b, data)


def barrier(model: nn.Module, a: Weights, b: Weights, data) -> float:
    path = lmc.loss_path(model, a, b, data.test, alphas=7, inputs=data.train[0], progress=False)
    return path.barrier


LONGER: dict[str, Align] = METHODS | {
    "straight-through": lambda spec, model, a, b, data: lmc.straight_through_matching(
        spec, model, a, b, data, epochs=10, progress=False
    ),
    "sinkhorn midpoint": lambda spec, model, a, b, data: lmc.sinkhorn_matching(
        spec, model, a, b, data, steps=100, progress=False
    ),
}
PAIRS = [
    pytest.param(
        method,
        name,
        marks=[pytest.mark.thorough] if name == "digits-vgg11" or (method in LEARNED and name == "digits-cnn") else [],
    )
    for method in BY_DATA
    for name in ("digits-mlp128", "digits-cnn", "digits-vgg11")
    if (method, name) != ("sinkhorn midpoint", "digits-vgg11")
]


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_data_driven_methods_leave_less_than_a_third_of_the_barrier(method: str, name: str):
    # Sinkhorn leaves 0.35 of the barrier of vgg11, however many steps it is given.
    data, model, spec, a, b, naive = stored(name)
    moved = LONGER[method](spec, model, a, b, data).apply(b)
    assert barrier(model, a, moved, data) < naive / 3
