"""Similarity of networks: what CKA does not see, and the identities that errors and disagreement obey."""

import math

import pytest
import torch
from torch import nn

from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.landscape.similarity import linear_cka, similarity


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def examples(count=300, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=random), torch.randint(0, 3, (count,), generator=random)


def features(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()


def test_cka_is_the_formula_over_features():
    x, y = features(50, 4, 0), features(50, 7, 1) + 3.0
    u, v = x - x.mean(0), y - y.mean(0)
    formula = (v.T @ u).norm() ** 2 / ((u.T @ u).norm() * (v.T @ v).norm())
    assert linear_cka(x, y) == pytest.approx(float(formula), rel=1e-12)


def test_cka_ignores_rotation_scale_and_offset():
    x = features(60, 5, 0)
    rotation = torch.linalg.qr(features(5, 5, 1))[0]
    assert linear_cka(x, 2.5 * x @ rotation + 4.0) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(x, x * torch.tensor([1.0, 9.0, 1.0, 1.0, 1.0])) < 0.9
    assert linear_cka(features(4000, 3, 2), features(4000, 3, 3)) < 0.01
    assert math.isnan(linear_cka(x, torch.ones(60, 2).double()))


def test_a_network_and_itself_are_the_same():
    found = similarity(network(0), network(1), network(1), examples())
    assert (found.disagreement, found.lost, found.won, found.count) == (0.0, 0.0, 0.0, 300)
    assert list(found.cka) == ["0", "1", "2"] and all(value == pytest.approx(1.0) for value in found.cka.values())


def test_permuted_units_are_the_same_to_cka():
    a = network(1)
    state, p = a.state_dict(), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = {"0.weight": state["0.weight"][p], "0.bias": state["0.bias"][p], "2.weight": state["2.weight"][:, p]}
    found = similarity(a, a, moved | {"2.bias": state["2.bias"]}, examples())
    assert found.disagreement == 0.0 and all(value == pytest.approx(1.0, abs=1e-6) for value in found.cka.values())


def test_errors_and_disagreement_belong_together():
    data = examples()
    a, b = network(1), network(2)
    found = similarity(a, a, b, data)
    with torch.no_grad():
        one, two = a(data[0]).argmax(1), b(data[0]).argmax(1)
    assert found.disagreement == pytest.approx(float((one != two).float().mean())) and found.disagreement > 0.1
    assert found.errors == pytest.approx([float((p != data[1]).float().mean()) for p in (one, two)])
    assert abs(found.errors[0] - found.errors[1]) <= found.disagreement <= sum(found.errors)
    assert found.lost - found.won == pytest.approx(found.errors[1] - found.errors[0])
    assert 0.0 < found.normalised_disagreement <= 1.0
    assert all(0.0 <= value < 0.999 for value in found.cka.values())
    with torch.no_grad():
        assert found.cka["1"] == pytest.approx(linear_cka(a[:2](data[0]), b[:2](data[0])), rel=1e-6)
    assert "CKA of 2:" in str(found) and "predicted differently" in str(found)


def test_positions_that_do_not_count_are_left_out():
    inputs, targets = examples()
    marked = targets.clone()
    marked[:100] = -100
    found, kept = (
        similarity(network(0), network(1), network(2), d) for d in ((inputs, marked), (inputs[100:], targets[100:]))
    )
    assert found.count == 200 and found.errors == kept.errors and found.disagreement == kept.disagreement


def test_batches_and_convolutions():
    model, other = (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)) for _ in range(2))
    batches = [(torch.randn(20, 1, 4, 4), torch.arange(20) % 2) for _ in range(3)]
    found = similarity(model, model, other, batches, examples=10)
    assert found.count == 60 and list(found.cka) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("size", [7, 100])
def test_data_in_batches_are_compared_as_the_whole(size):
    x, y = examples(100)
    batches = [(x[i : i + size], y[i : i + size]) for i in range(0, 100, size)]
    whole, found = (similarity(network(0), network(1), network(2), data) for data in ((x, y), batches))
    assert found.cka == pytest.approx(whole.cka, abs=1e-6)
    few = similarity(network(0), network(1), network(2), batches, examples=20)
    assert few.cka == pytest.approx(similarity(network(0), network(1), network(2), (x[:20], y[:20])).cka, abs=1e-6)


def test_bad_input():
    data = examples(20)
    with pytest.raises(InputError, match="same N examples"):
        linear_cka(features(5, 3, 0), features(6, 3, 0))
    with pytest.raises(InputError, match="examples=1"):
        similarity(network(0), network(1), network(2), data, examples=1)
    with pytest.raises(MismatchError):
        similarity(network(0), network(1), nn.Linear(6, 3), data)
    with pytest.raises(WeightsError, match="0.bias of b"):
        similarity(network(0), network(1), network(2).state_dict() | {"0.bias": torch.full((12,), math.nan)}, data)
    with pytest.raises(DataError):
        similarity(network(0), network(1), network(2), (data[0], data[0][:, :3]))
