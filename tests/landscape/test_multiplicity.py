"""Decisions of several models: churn, ambiguity, discrepancy, viable range and capacity."""

import numpy as np
import pytest
import torch
from support import blobs, classifier, trained
from torch import nn

import lmc

DATA = {"train": blobs(80, 0), "test": blobs(60, 1, spread=1.2)}


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    return [trained(classifier(seed), DATA["train"], 30) for seed in range(4)]


def test_one_model_twice_is_no_multiplicity(models):
    found = lmc.landscape.multiplicity(models[0], [models[0], models[0]], DATA)
    assert found.ambiguity == found.discrepancy == 0 and np.abs(found.churn).max() == 0
    assert found.capacity == pytest.approx(1.0, abs=1e-9) and np.abs(found.viable_range).max() == 0
    assert len(found.undecided) == 0 and found.split == "test"


def test_laws_between_the_quantities(models):
    found = lmc.landscape.multiplicity(models[0], models, DATA)
    churn = found.churn[0]
    assert 0 < found.discrepancy == churn.max() <= found.ambiguity <= churn.sum()
    assert found.ambiguity == pytest.approx(len(found.undecided) / 60)
    assert (
        np.allclose(found.churn, found.churn.T) and (found.churn <= found.errors[:, None] + found.errors + 1e-12).all()
    )
    assert (found.capacity >= 1 - 1e-9).all() and (found.capacity <= 4 + 1e-9).all()
    assert (np.diff(found.capacity[found.undecided]) <= 0).all()
    again = lmc.landscape.multiplicity(models[0], [*models, models[2]], DATA)  # a duplicate changes nothing
    assert again.ambiguity == found.ambiguity and np.allclose(again.capacity, found.capacity, atol=1e-5)
    fewer = lmc.landscape.multiplicity(models[0], models[:2], DATA)  # and fewer models never add
    assert fewer.ambiguity <= found.ambiguity and (fewer.capacity <= found.capacity + 1e-5).all()


def test_a_wider_tolerance_never_lowers_anything(models):
    found = [lmc.landscape.multiplicity(models[0], models, DATA, tolerance=t) for t in (0.0, 0.2, 9.0)]
    assert sum(found[0].kept) < sum(found[-1].kept) == 4
    for few, more in zip(found, found[1:], strict=False):
        assert all(x <= y for x, y in zip(few.kept, more.kept, strict=True))
        assert few.ambiguity <= more.ambiguity and few.discrepancy <= more.discrepancy
        assert (few.viable_range <= more.viable_range + 1e-12).all() and (few.capacity <= more.capacity + 1e-5).all()


def test_classes_renamed_change_nothing(models):
    order = torch.tensor([2, 0, 3, 1])
    (inputs, targets), renamed = DATA["test"], []
    for model in models:
        state = model.state_dict()
        renamed.append({**state, **{name: state[name][order] for name in ("2.weight", "2.bias")}})
    found = lmc.landscape.multiplicity(models[0], models, (inputs, targets))
    again = lmc.landscape.multiplicity(models[0], iter(renamed), (inputs, order.argsort()[targets]))
    assert again.ambiguity == found.ambiguity and again.losses == pytest.approx(found.losses, rel=1e-6)
    assert again.capacity == pytest.approx(found.capacity, abs=1e-5) and np.array_equal(again.churn, found.churn)


def test_decisions_part_only_where_the_margin_is_small(models):
    one, two, *_ = [model.eval()(DATA["test"][0]).double() for model in models]
    top = one.topk(2).values
    certain = top[:, 0] - top[:, 1] > 2 * (one - two).abs().amax(1)
    decided = lmc.landscape.multiplicity(models[0], models[:2], DATA).decisions
    assert certain.any() and np.array_equal(*decided[:, certain.numpy()])


def test_decisions_are_those_of_the_models(models):
    found = lmc.landscape.multiplicity(models[0], models, DATA, names=list("abcd"), reference=2)
    expected = torch.stack([model.eval()(DATA["test"][0]).argmax(-1) for model in models])
    assert np.array_equal(found.decisions, expected.numpy()) and found.reference == "c"
    losses = [lmc.landscape.evaluate(models[0], model, DATA)["test"].loss for model in models]
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert found.churn[2, 1] == float((expected[2] != expected[1]).double().mean())
    assert list(found.to_frame().columns) == ["model", "kept", "loss", "error", "churn"]


class Fixed(nn.Module):
    """Gives the same logits for every example: a row of a channel."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(x), -1)


@pytest.mark.parametrize("classes, rows, expected", [(3, 3, 3.0), (4, 2, 2.0), (2, 5, 2.0)])
def test_capacity_of_certain_models_counts_their_decisions(classes, rows, expected):
    models = [Fixed(40.0 * nn.functional.one_hot(torch.tensor(k % classes), classes).float()) for k in range(rows)]
    found = lmc.landscape.multiplicity(models[0], models, (torch.randn(3, 2), torch.tensor([0, 1, 0])))
    assert found.capacity == pytest.approx(expected, abs=1e-6)


def test_capacity_of_a_symmetric_channel():
    flip = 0.1
    rows = torch.tensor([[1 - flip, flip], [flip, 1 - flip]]).log()
    found = lmc.landscape.multiplicity(
        Fixed(rows[0]), [Fixed(row) for row in rows], (torch.randn(2, 2), torch.tensor([0, 1]))
    )
    entropy = -(flip * np.log2(flip) + (1 - flip) * np.log2(1 - flip))
    assert found.capacity == pytest.approx(2 ** (1 - entropy), rel=1e-6)
    assert found.viable_range == pytest.approx(1 - 2 * flip, rel=1e-6)


def test_models_outside_the_tolerance_do_not_count(models):
    bad = classifier(9)
    found = lmc.landscape.multiplicity(models[0], [models[0], bad], DATA, tolerance=0.05)
    assert found.kept == (True, False) and found.ambiguity == 0 and np.isnan(found.churn[0, 1])
    assert not lmc.landscape.multiplicity(models[0], [models[0], bad], DATA).ambiguity == 0


def test_saved_and_read_back(models, tmp_path):
    found = lmc.landscape.multiplicity(models[0], models, DATA)
    back = type(found).load(found.save(tmp_path / "multiplicity.json"))
    assert repr(back) == repr(found) and np.array_equal(back.decisions, found.decisions)


def test_bad_input_is_refused(models):
    for options in (
        {"reference": 7}, {"reference": "0"}, {"reference": 1.0}, {"tolerance": -1.0}, {"tolerance": "1"}, {"names": ["a"]},
        {"names": ["a"] * len(models)},
    ):  # fmt: skip
        with pytest.raises(lmc.InputError):
            lmc.landscape.multiplicity(models[0], models, DATA, **options)
    with pytest.raises(lmc.InputError, match="two models"):
        lmc.landscape.multiplicity(models[0], models[:1], DATA)
    with pytest.raises(lmc.LmcError):
        lmc.landscape.multiplicity(models[0], models, (DATA["test"][0], torch.randn(60, 4)))
