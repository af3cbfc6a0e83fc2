"""`align=`: copies of one network in other orders of units, and independently trained ones, merge as if aligned."""

import pytest
import torch

import lmc
from lmc.merge.engine.aligning import aligned
from lmc.weights import distance


@pytest.fixture(scope="module")
def case():
    model = lmc.models.mlp(64, [24, 24], 10)
    torch.manual_seed(0)
    data = torch.rand(96, 64), torch.randint(10, (96,))
    spec = lmc.permutation_spec(model, data[0][:2])
    base = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    tuned = [{name: tensor + 0.05 * torch.randn(tensor.shape) for name, tensor in base.items()} for _ in range(3)]
    return model, data, spec, base, tuned


def shuffled(spec, models, base):
    moved = [spec.random(seed=i).apply(model) for i, model in enumerate([*models[1:], base], start=1)]
    return [models[0], *moved[:-1]], moved[-1]


ON_MODELS = ["average", "slerp", "karcher_mean", "variance_corrected"]
ON_BASE = ["model_stock", "task_arithmetic", "ties", "dare", "della", "breadcrumbs", "pcb", "lines", "consensus"]


@pytest.mark.parametrize("name", ON_MODELS + ON_BASE)
def test_shuffled_models_merge_like_the_originals(name, case) -> None:
    _, _, spec, base, tuned = case
    models = tuned[:2] if name == "slerp" else tuned
    mixed, mixed_base = shuffled(spec, models, base)
    options = {"blocks": ["fc1", "fc2", "head"]} if name == "lines" else {}
    given = [options | ({"base": b} if name in ON_BASE else {}) for b in (base, mixed_base)]
    method = getattr(lmc.merge, name)
    expected, found, plain = (
        method(models, **given[0]),
        method(mixed, **given[1], align=spec),
        method(mixed, **given[1]),
    )
    assert distance(expected, found) < 1e-4 < 0.1 < distance(expected, plain)


def test_methods_that_look_at_data_take_it_too(case) -> None:
    model, data, spec, base, tuned = case
    mixed, mixed_base = shuffled(spec, tuned, base)
    halves = [(data[0][i::3], data[1][i::3]) for i in range(3)]
    calls = {
        "greedy_soup": (data, {}),
        "learned_soup": (data, {"epochs": 1}),
        "fisher": (halves, {}),
        "regmean": (halves, {}),
        "regmean_plus_plus": (halves, {}),
        "ama": (data, {"base": True, "steps": 2, "groups": ["fc1", "fc2"]}),
        "adamerging": ([half[0] for half in halves], {"base": True, "steps": 2}),
    }
    for name, (examples, options) in calls.items():
        method = getattr(lmc.merge, name)
        ours = {**options, "base": base} if "base" in options else options
        theirs = {**options, "base": mixed_base} if "base" in options else options
        models, others = (tuned[:1], mixed[:1]) if name == "ama" else (tuned, mixed)
        expected = method(model, models, examples, progress=False, **ours)
        found = method(model, others, examples, progress=False, align=spec, **theirs)
        assert distance(expected, found) < 2e-3, name


def test_a_function_may_align_in_any_way(case) -> None:
    model, data, spec, _, tuned = case
    mixed = [tuned[0], spec.random(seed=5).apply(tuned[0])]

    def by_activations(weights):
        return [weights[0], lmc.activation_matching(spec, model, *weights, data[0], progress=False).apply(weights[1])]

    merged = lmc.merge.average(mixed, align=by_activations)
    assert distance(merged, tuned[0]) < 1e-5
    merged = lmc.merge.average(mixed, align=lambda weights: lmc.match_many(spec, weights, method="merge_many"))
    assert distance(merged, tuned[0]) < 1e-5


def test_independent_networks_make_a_soup() -> None:
    stored = lmc.data.checkpoint("digits-mlp256")
    data, model, (a, b) = lmc.data.digits(), stored.model(), stored
    spec = lmc.permutation_spec(model, data.test[0][:2])
    before, after = (lmc.merge.average([a, b], align=align) for align in (None, spec))
    naive, soup = (lmc.landscape.evaluate(model, weights, data)["test"].accuracy for weights in (before, after))
    alone = min(lmc.landscape.evaluate(model, weights, data)["test"].accuracy for weights in (a, b))
    assert naive < alone - 0.05 and soup > alone - 0.01


def test_nothing_given_is_changed_and_one_model_comes_back(case) -> None:
    _, _, spec, base, tuned = case
    copies = [{name: tensor.clone() for name, tensor in state.items()} for state in tuned]
    lmc.merge.ties(tuned, base=base, align=spec)
    assert all(torch.equal(old[name], new[name]) for old, new in zip(copies, tuned, strict=True) for name in old)
    alone = lmc.merge.average(tuned[:1], align=spec)
    assert all(torch.equal(alone[name], tuned[0][name]) for name in alone)


def test_bad_align(case) -> None:
    _, _, spec, base, tuned = case
    with pytest.raises(lmc.InputError, match="a PermutationSpec or a function"):
        lmc.merge.average(tuned, align="weights")
    with pytest.raises(lmc.InputError, match="align gave 1; expected .* each of 3 models"):
        lmc.merge.average(tuned, align=lambda weights: weights[:1])
    other = {**base, "extra": torch.zeros(1)}
    with pytest.raises(lmc.MismatchError, match="extra: in base"):
        aligned(tuned, spec, base=other)
