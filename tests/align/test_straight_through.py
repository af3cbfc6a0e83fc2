import pytest
import torch
from alignment_cases import CASES, digits, random_weights
from torch import nn

import lmc
from lmc.align.relaxed.soft import TaskLoss
from lmc.align.relaxed.straight_through import straight_through_matching
from lmc.errors import DataError, InputError, MismatchError
from lmc.models.mlp import mlp
from lmc.symmetry.spec import PermutationSpec


@pytest.mark.parametrize("name", CASES)
def test_a_planted_permutation_is_found(name: str):
    case = CASES[name]()
    targets = case.inputs if name == "gpt" else case.targets
    planted = case.spec.random(3)
    pi = straight_through_matching(
        case.spec, case.model, case.model, planted.apply(case.model), (case.inputs, targets), epochs=1, progress=False
    )
    assert pi == planted.inverse()


@pytest.mark.parametrize("name", ["mlp", "resnet-bn"])
def test_the_loss_falls_and_the_best_is_kept(name: str):
    case = CASES[name]()
    a, b = (random_weights(case.model, seed) for seed in (3, 4))
    data = (case.inputs, case.targets)
    pi = straight_through_matching(
        case.spec, case.model, a, b, data, epochs=6, patience=6, lr=1.0, batch_size=30, progress=False
    )
    losses = pi.info["losses"]
    assert len(losses) == 7 and min(losses) < losses[0] and pi.objective == -min(losses)
    task = TaskLoss(case.model, case.model.state_dict(), data, None, 30, torch.device("cpu"))
    assert task.mean(lmc.weights.lerp(a, pi.apply(b), 0.5)) == pytest.approx(min(losses), rel=1e-6)


def test_trained_networks_come_closer_and_no_less_than_by_weight_matching():
    trained = digits()
    a, b = trained.weights[:2]
    pi = straight_through_matching(trained.spec, trained.model, a, b, trained.data, epochs=8, progress=False)
    assert trained.barrier(a, pi.apply(b)) < trained.barrier(a, b) / 3
    matched = lmc.weight_matching(trained.spec, a, b, progress=False)
    task = TaskLoss(trained.model, trained.weights[0], trained.data, None, 256, torch.device("cpu"))
    assert pi.info["losses"][0] == pytest.approx(task.mean(lmc.weights.lerp(a, matched.apply(b), 0.5)))
    assert -pi.objective <= pi.info["losses"][0]


def test_it_stops_when_nothing_gets_better():
    case = CASES["mlp"]()
    pi = straight_through_matching(
        case.spec,
        case.model,
        case.model,
        case.other(1),
        (case.inputs, case.targets),
        lr=1e-9,
        patience=2,
        progress=False,
    )
    assert len(pi.info["losses"]) == 3


def test_the_same_seed_gives_the_same_result_and_nothing_of_the_callers_changes():
    case = CASES["vgg-bn"]()
    case.model.train()
    a, b = random_weights(case.model, 3), random_weights(case.model, 4)
    kept = [{k: v.clone() for k, v in w.items()} for w in (a, b, case.model.state_dict())]
    state = torch.get_rng_state()

    def run():
        data = (case.inputs, case.targets)
        return straight_through_matching(case.spec, case.model, a, b, data, epochs=2, seed=3, progress=False)

    assert run() == run()
    for now, before in zip((a, b, case.model.state_dict()), kept, strict=True):
        assert all(torch.equal(now[k], before[k]) for k in before)
    assert case.model.training and torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in case.model.parameters())


def test_a_loss_of_ones_own():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
    spec = PermutationSpec.from_patterns({"0.weight": "h .", "0.bias": "h", "2.weight": ". h"}, model)
    planted = spec.random(2)
    inputs = torch.randn(40, 3)
    pi = straight_through_matching(
        spec, model, model, planted.apply(model), (inputs, inputs[:, :1]), loss=nn.functional.mse_loss, progress=False
    )
    expected = nn.functional.mse_loss(model(inputs), inputs[:, :1])  # weight matching undoes the plant
    assert pi.info["losses"][0] == pytest.approx(float(expected), rel=1e-5)


def test_tied_and_normalised_networks_have_a_loss():
    from lmc.models.transformers import gpt

    model = gpt(7, 5, dim=8, heads=2, tied=True)
    tokens = torch.randint(7, (4, 5))
    task = TaskLoss(model, model.state_dict(), (tokens, tokens), None, 2, torch.device("cpu"))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert task.mean(model.state_dict()) == pytest.approx(float(expected), rel=1e-6)
    case = CASES["vgg-bn"]()
    task = TaskLoss(case.model, case.model.state_dict(), (case.inputs, case.targets), None, 1000, torch.device("cpu"))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(case.model.train()(case.inputs), case.targets)
    assert task.mean(case.model.state_dict()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("batch_size", [2, 6, 256])
def test_no_example_is_left_alone_in_a_batch(batch_size):
    """An example by itself has no batch statistics: 7 of them in batches of 2 would leave one."""
    case = CASES["vgg-bn"]()
    data = (case.inputs[:7], case.targets[:7])
    task = TaskLoss(case.model, case.model.state_dict(), data, None, batch_size, torch.device("cpu"))
    assert task.mean(case.model.state_dict()) > 0.0
    assert all(len(targets) > 1 for _, targets in task.epoch(torch.Generator().manual_seed(0)))


def test_bad_input():
    case = CASES["mlp"]()
    a, b, data = case.model, case.other(1), (case.inputs, case.targets)
    with pytest.raises(InputError, match="epochs=0"):
        straight_through_matching(case.spec, case.model, a, b, data, epochs=0)
    with pytest.raises(DataError):
        straight_through_matching(case.spec, case.model, a, b, case.inputs)
    with pytest.raises(DataError, match="no batches"):
        straight_through_matching(case.spec, case.model, a, b, iter([]))
    with pytest.raises(MismatchError):
        straight_through_matching(case.spec, case.model, a, mlp(12, [16, 9], 5), data)


def test_a_last_batch_of_one_example_has_no_batch_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(17, 4), torch.arange(17) % 3
    spec = lmc.permutation_spec(model, x[:2])
    b = spec.random(1).apply(model)
    cut = [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])]
    found = straight_through_matching(spec, model, model, b, cut, epochs=1, progress=False)
    assert found == straight_through_matching(spec, model, model, b, cut[:2], epochs=1, progress=False)
    with pytest.raises(DataError, match="two examples"):
        straight_through_matching(spec, model, model, b, cut[2:], epochs=1, progress=False)
