"""Every public function on a device that is not the CPU, and with its arguments on two: the same results.

The device is a pretend one (`tests/pretend.py`), which refuses to mix with the CPU as CUDA does.
"""

import pretend
import pytest
import torch
from test_accidents import NAMES, World, call, numbers
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import lmc
from lmc.landscape.evaluation.evaluator import Evaluator

KEYS = ("a", "b", "c", "base", "model", "x", "y")
WEIGHTS = KEYS[:4]
# The same numbers up to rounding: on a CPU several threads mix what the first layer makes.
ROUNDED = {"random_plane", "trajectory_plane", "connect", "branches"}
MIXTURES = {
    "weights": WEIGHTS, "weights and model": (*WEIGHTS, "model"), "data": ("x", "y"), "model": ("model",),
    "model and data": ("model", "x", "y"), "weights and data": (*WEIGHTS, "x", "y"),
}  # fmt: skip
A_TENTH = ("loss_path", "weight_matching", "ties", "fold_norms", "repair", "train")
HAS_ITS_OWN = {"projection"}  # lies on the device that it is asked to lie on, not where its argument is
TRIED = [
    pytest.param(name, marks=[] if name in A_TENTH else [pytest.mark.thorough])
    for name in NAMES
    if name not in HAS_ITS_OWN
]


def moved(keys: tuple[str, ...]) -> World:
    world = World()
    for key in keys:
        setattr(world, key, pretend.far(getattr(world, key)))
    return world


def agree(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    near = [x.cpu() for x in found]
    assert [x.shape for x in near] == [x.shape for x in expected]
    for x, y in zip(near, expected, strict=True):
        assert torch.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", TRIED)
@pytest.mark.filterwarnings("ignore")
def test_the_same_on_the_device(name):
    expected = numbers(call(name, World()))
    agree(numbers(call(name, moved(KEYS))), expected, 1e-5 if name in ROUNDED else 0.0)


@pytest.mark.parametrize("name", TRIED)
@pytest.mark.filterwarnings("ignore")
def test_the_same_with_arguments_on_two_devices(name):
    expected = numbers(call(name, World()))
    for mixture, keys in MIXTURES.items():
        try:
            agree(numbers(call(name, moved(keys))), expected, 1e-5)
        except Exception as error:
            raise AssertionError(f"{mixture} on the device, the rest on the CPU") from error


@pytest.mark.parametrize("method", ["average", "ties", "task_arithmetic"])
def test_merged_weights_stay_on_the_device(method):
    found = call(method, moved(WEIGHTS))
    assert {str(tensor.device) for tensor in found.values()} == {"pretend:0"}


def test_a_device_that_there_is_not_is_named():
    world = World()
    with pytest.raises(lmc.InputError, match="device='hpu' cannot be used here"):
        lmc.loss_path(world.model, world.a, world.b, world.data, alphas=3, device="hpu", progress=False)


def test_weights_of_one_call_on_two_devices_are_refused():
    world = moved(("b",))
    with pytest.raises(lmc.MismatchError, match="pretend"):
        lmc.loss_path(world.model, world.a, world.b, world.data, alphas=3, progress=False)


def test_a_merge_asks_no_more_often_for_more_tensors():
    asked = []
    for depth in (1, 6):
        states = [pretend.far(lmc.models.mlp(4, [3] * depth, 2).state_dict()) for _ in range(3)]
        with pretend.counted() as counts:
            lmc.merge.task_arithmetic(states[1:], base=states[0], scale=0.3)
        asked.append(counts.items + counts.to_host)
    assert asked[0] == asked[1] < 8
    states[2]["fc3.bias"] = pretend.far(torch.tensor([0.0, float("nan"), 0.0]))
    with pytest.raises(lmc.errors.WeightsError, match=r"fc3.bias of models\[1\]: 1 of 3 values"):
        lmc.merge.task_arithmetic(states[1:], base=states[0], scale=0.3)


def test_sums_that_leave_the_range_are_still_found():
    states = [pretend.far({"w": torch.full((3,), 3e38)}) for _ in range(2)]
    with pytest.raises(lmc.errors.WeightsError, match="sums of the models leave the range"):
        lmc.merge.task_arithmetic(states, base={"w": -states[0]["w"]}, scale=1.0)


def test_scores_of_a_point_are_read_at_once():
    world = moved(("a", "model", "x", "y"))
    evaluator = Evaluator(world.model, (world.x, world.y))
    first = next(evaluator([world.a]))
    with pretend.counted() as counts:
        again = next(evaluator([world.a]))
    assert counts.items + counts.to_host == 1 and again == first and len(first["data"].values) == 2


def test_it_refuses_what_cuda_refuses_and_counts_what_waits():
    x, far = torch.randn(4, 5), torch.zeros(4, 5, device="pretend")
    for mixed in (
        lambda: far + x,
        lambda: far @ x.T,
        lambda: torch.cat([far, x]),
        lambda: far.index_select(0, torch.tensor([0])),
    ):
        with pytest.raises(RuntimeError, match="found at least two devices, pretend:0 and cpu"):
            mixed()
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(3, device="pretend", generator=torch.Generator())
    with pytest.raises(TypeError, match="Use Tensor.cpu"):
        far.numpy()
    assert (far * torch.tensor(2.0)).device == far[torch.tensor([0, 2])].device == pretend.DEVICE
    with pretend.counted() as counts:
        copied = x.to("pretend")
        float((copied * 2).sum())
        copied.cpu()
    assert (counts.items, counts.to_host, counts.to_device) == (1, 1, 1) and counts.launches >= 2


def test_it_differentiates_vectorises_and_copies():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(7, 5)
    there = pretend.far(model)
    there(pretend.far(x)).sum().backward()
    model(x).sum().backward()
    assert all(torch.equal(p.grad, q.grad.cpu()) for p, q in zip(model.parameters(), there.parameters(), strict=True))
    stacked = {name: torch.stack([tensor, 2 * tensor]) for name, tensor in there.state_dict().items()}
    assert vmap(lambda state: functional_call(there, state, (pretend.far(x),)))(stacked).device == pretend.DEVICE
    slope = grad(lambda w: (pretend.far(x) @ w).square().sum())(torch.ones(5, device="pretend"))
    assert torch.allclose(slope.cpu(), grad(lambda w: (x @ w).square().sum())(torch.ones(5)), atol=1e-5)
    part = there[0].weight.data[1:3]
    part.fill_(7.0)
    assert (there[0].weight[1:3].cpu() == 7).all(), "views share their memory"
