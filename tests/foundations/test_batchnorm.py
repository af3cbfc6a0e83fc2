"""Batch statistics of averaged networks."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lmc.errors import DataError, InputError, MismatchError
from lmc.network.batchnorm import equal_batches, recalibrate_batchnorm
from lmc.network.task import Task


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)
    )


def images(count=64, seed=0):
    return 3.0 + 2.0 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_one_batch_gives_its_own_statistics():
    model, inputs = net(), images()
    state = recalibrate_batchnorm(model, None, inputs, batch_size=64)
    before = model[0](inputs)
    torch.testing.assert_close(state["1.running_mean"], before.mean((0, 2, 3)))
    torch.testing.assert_close(state["1.running_var"], before.var((0, 2, 3)))  # unbiased, as torch keeps it


def test_batches_weigh_by_their_size():
    model = net()
    inputs = images(60)
    state = recalibrate_batchnorm(model, None, [inputs[:10], inputs[10:]])
    parts = [model[0](inputs[:10]), model[0](inputs[10:])]
    variance = (10 * parts[0].var((0, 2, 3)) + 50 * parts[1].var((0, 2, 3))) / 60
    torch.testing.assert_close(state["1.running_mean"], model[0](inputs).mean((0, 2, 3)))
    torch.testing.assert_close(state["1.running_var"], variance)


def test_inputs_come_in_any_form_of_data():
    model, inputs = net(), images(40)
    labels = torch.zeros(40, dtype=torch.long)
    whole, batches = (recalibrate_batchnorm(model, None, given) for given in (inputs, list(inputs.split(16))))
    forms = {
        "pair": ((inputs, labels), whole),
        "sets": ({"train": (inputs, labels), "test": (inputs[:4], labels[:4])}, whole),
        "data set": (TensorDataset(inputs, labels), whole),
        "task": (Task.regression().on((inputs, labels)), whole),
        "loader": (DataLoader(TensorDataset(inputs, labels), batch_size=16), batches),
        "loader of mappings": (
            DataLoader([{"input": x, "labels": y} for x, y in zip(inputs, labels, strict=True)], batch_size=16),
            batches,
        ),
        "list of pairs": (list(zip(inputs.split(16), labels.split(16), strict=True)), batches),
    }
    for name, (given, expected) in forms.items():
        found = recalibrate_batchnorm(model, None, given)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    odd = images(17)  # the last batch of the loader is one example, which has no variance
    one, other = (recalibrate_batchnorm(model, None, x) for x in (DataLoader(TensorDataset(odd), 16), [odd[:16]]))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_old_statistics_leave_no_trace():
    model, inputs = net(), images()
    clean = recalibrate_batchnorm(model, None, inputs)
    spoiled = model.state_dict() | {
        "1.running_mean": torch.full((5,), math.nan),
        "5.running_var": torch.full((4,), 1e9),
    }
    again = recalibrate_batchnorm(model, spoiled, inputs)
    for name, tensor in clean.items():
        assert torch.equal(again[name], tensor), name


class CalledBefore(nn.Module):
    """Has a `train` of its own, and keeps what it derived from its weights when it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.kept = nn.Linear(6, 5), nn.BatchNorm1d(5), None

    def train(self, mode: bool = True) -> "CalledBefore":
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.layer.weight.detach().sum(1)
        return self.norm(input=self.layer(x) + self.kept)


def test_a_module_that_was_called_before_is_calibrated_as_well():
    model, inputs = CalledBefore().eval(), torch.randn(32, 6)
    new = recalibrate_batchnorm(model, None, inputs)
    with torch.no_grad():
        model(inputs)
    called = recalibrate_batchnorm(model, None, inputs)
    assert all(torch.equal(new[name], called[name]) for name in new)
    assert float(new["norm.running_mean"].abs().max()) > 0.1


def test_dropout_stays_off_and_the_estimate_repeats():
    model, inputs = net(), images()
    first, second = (recalibrate_batchnorm(model, None, inputs, batch_size=16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(
        torch.equal(recalibrate_batchnorm(model, first, inputs, batch_size=16)[name], first[name]) for name in first
    )


def test_nothing_of_the_callers_changes():
    model, inputs = net().train(), images()
    weights = {name: tensor.clone() for name, tensor in net().state_dict().items()}
    kept = [{name: tensor.clone() for name, tensor in state.items()} for state in (model.state_dict(), weights)]
    random = torch.get_rng_state()
    result = recalibrate_batchnorm(model, weights, inputs)
    assert model.training and model[1].momentum == 0.1 and torch.equal(random, torch.get_rng_state())
    for before, after in zip(kept, (model.state_dict(), weights), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not {t.data_ptr() for t in result.values()} & {t.data_ptr() for t in weights.values()}


def test_a_trained_network_hardly_moves():
    torch.manual_seed(0)
    model, inputs = (
        nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)),
        torch.randn(512, 8),
    )
    targets = (inputs[:, 0] > 0).long()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimiser.step()
    model.eval()
    before = model(inputs).argmax(1)
    model.load_state_dict(recalibrate_batchnorm(model, None, inputs))
    assert (model(inputs).argmax(1) == before).float().mean() > 0.99


def test_a_model_without_batch_normalisation_gets_an_equal_copy():
    model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
    state = recalibrate_batchnorm(model, None, torch.randn(5, 8))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert state["0.weight"].data_ptr() != model[0].weight.data_ptr()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_tied_tensors_stay_tied(norm):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm, self.head = nn.Embedding(7, 4), norm(4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.norm(self.embedding(tokens)))

    model = Tied()
    state = recalibrate_batchnorm(model, None, torch.arange(21) % 7)
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr() != model.head.weight.data_ptr()
    assert torch.equal(state["head.weight"], model.head.weight)
    apart = recalibrate_batchnorm(model, {k: v.clone() for k, v in model.state_dict().items()}, torch.arange(21) % 7)
    assert apart["head.weight"].data_ptr() != apart["embedding.weight"].data_ptr()


def test_a_short_remainder_makes_no_batch_of_one():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    state = recalibrate_batchnorm(model, None, torch.randn(33, 8), batch_size=32)
    assert torch.isfinite(state["1.running_var"]).all()


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(10, 4, [4, 3, 3]), (9, 8, [5, 4]), (8, 8, [8]), (3, 1, [1, 1, 1])]
)
def test_equal_batches_hold_each_example_once(count, most, sizes):
    inputs = torch.arange(count)
    batches = equal_batches(inputs, most)
    assert [len(batch) for batch in batches] == sizes and torch.equal(torch.cat(batches), inputs)


def test_unusable_inputs_are_refused():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    with pytest.raises(DataError, match="more than 1 value per channel"):
        recalibrate_batchnorm(model, None, torch.randn(1, 8))
    with pytest.raises(DataError, match="without targets"):
        recalibrate_batchnorm(model, None, (torch.randn(5, 8), torch.zeros(5), torch.zeros(5)))
    with pytest.raises(DataError, match="fails on inputs.*5x7"):
        recalibrate_batchnorm(model, None, torch.randn(5, 7))
    with pytest.raises(DataError, match="a tensor has none"):
        recalibrate_batchnorm(model, None, torch.randn(0, 8))
    with pytest.raises(DataError, match="no examples"):
        recalibrate_batchnorm(model, None, [])
    with pytest.raises(InputError, match="batch_size=1"):
        recalibrate_batchnorm(model, None, torch.randn(5, 8), batch_size=1)
    with pytest.raises(MismatchError, match="0.weight"):
        recalibrate_batchnorm(model, nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)), torch.randn(5, 8))
