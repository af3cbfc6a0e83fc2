"""Weights as they are returned: a dict in every respect, that prints short and loads into any module."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import lmc
from lmc.weights import StateDict, as_weights


class Versioned(nn.Module):
    """A layer that reads its version when it is loaded, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))

    def _load_from_state_dict(self, state, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError(f"no version: {local_metadata}")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


def nets(count: int = 2) -> list[Versioned]:
    torch.manual_seed(0)
    return [Versioned() for _ in range(count)]


def test_it_prints_what_it_holds_and_no_values():
    text = repr(as_weights(nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40))))
    assert text.startswith("StateDict(7 tensors, 1,401 values, float32 on cpu, int64 on cpu: 0.weight (40, 30)")
    assert len(text) < 200 and "tensor(" not in text
    assert repr(StateDict()) == "StateDict(0 tensors, 0 values)"


@pytest.mark.parametrize(
    "again",
    [
        lambda s: s.copy(),
        copy.copy,
        copy.deepcopy,
        lambda s: s | {},
        lambda s: {} | s,
        lambda s: pickle.loads(pickle.dumps(s)),
        lambda s: StateDict(dict(s), like=s),
    ],
)
def test_copies_hold_the_same_and_keep_the_versions_of_modules(again):
    state = as_weights(nets()[0])
    found = again(state)
    assert found is not state and list(found) == list(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    nets()[1].load_state_dict(found)


def test_copies_print_short_too():
    state = as_weights(nets()[0])
    for found in (state.copy(), copy.copy(state), copy.deepcopy(state), state | {}, {} | state):
        assert type(found) is StateDict
    deep = copy.deepcopy(state)
    deep["fc1.bias"].zero_()
    assert state["fc1.bias"].abs().sum() > 0


def test_a_saved_one_is_a_plain_state_dict():
    buffer = io.BytesIO()
    torch.save(as_weights(nets()[0]), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert type(loaded).__name__ == "OrderedDict"
    nets()[1].load_state_dict(loaded)


def test_transforms_of_functions_walk_through_it():
    a, b = nets()
    stacked = StateDict({n: torch.stack([t, b.state_dict()[n]]) for n, t in as_weights(a).items()})
    x = torch.randn(5, 3)
    out = torch.vmap(lambda w: torch.func.functional_call(a, w, (x,)))(stacked)
    assert torch.allclose(out, torch.stack([a(x), b(x)]), atol=1e-6)
    gradient = torch.func.grad(lambda w: torch.func.functional_call(a, w, (x,)).sum())(as_weights(a))
    assert set(gradient) == set(as_weights(a))


def test_whatever_returns_weights_returns_one_that_loads():
    a, b = nets()
    x = torch.randn(16, 3)
    spec = lmc.permutation_spec(a, x[:2], progress=False)
    pi = lmc.weight_matching(spec, a, b, progress=False)
    found = {
        "lerp": lmc.weights.lerp(a, b, 0.3),
        "mean": lmc.weights.mean([a, b]),
        "apply": pi.apply(b),
        "average": lmc.merge.average([a, b]),
        "ties": lmc.merge.ties([a, b], base=a),
        "swa": lmc.merge.swa([a, b]),
        "recalibrate": lmc.recalibrate_batchnorm(a, b, x),
        "repair": lmc.repair(a, [a, b], x, progress=False),
        "fusion": lmc.ot_fusion(a, a, b, x, progress=False).weights,
        "soup": lmc.merge.greedy_soup(a, [a, b], (x, torch.randint(0, 2, (16,))), progress=False),
    }
    for name, weights in found.items():
        assert isinstance(weights, StateDict), name
        nets()[0].load_state_dict(weights)
        assert "tensor(" not in repr(weights), name
