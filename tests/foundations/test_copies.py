import torch
from torch import nn

from lmc.network.copies import fresh_copy


def test_a_copy_computes_the_same_and_shares_nothing():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.BatchNorm1d(3)).eval()
    inputs = torch.randn(5, 4)
    before = model(inputs)
    copied = fresh_copy(model)
    assert torch.equal(copied(inputs), before)
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.add_(1)
    assert torch.equal(model(inputs), before)


def test_tied_parameters_stay_tied():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    copied = fresh_copy(model)
    assert copied["a"].weight is copied["b"].weight
