"""KnOTS, Twin-Merging and CAT Merging: the laws of each formula."""

import pytest
import torch
from support import blobs, classifier, close
from torch import Tensor

import lmc.merge as merge
from lmc.errors import InputError
from lmc.merge.rules.task_vectors import elect

State = dict[str, Tensor]
SHAPES = {"w": (8, 6), "conv": (4, 2, 3, 1), "b": (5,)}


def states(count: int, seed: int = 0) -> list[State]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {k: torch.randn(shape, generator=draw, dtype=torch.float64) for k, shape in SHAPES.items()}
        for _ in range(count)
    ]


BASE, A, B, C = states(4)


def tau(model: State) -> State:
    return {k: model[k] - BASE[k] for k in model}


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_knots_of_one_task_is_its_model(scope: str):
    assert close(merge.knots([A], base=BASE, density=1.0, scope=scope), A, 1e-9)


def test_knots_by_sums_is_task_arithmetic():
    merged = merge.knots([A, B, C], base=BASE, density=1.0, combine_by="sum", weights=[1.0, 0.5, -2.0])
    assert close(merged, merge.task_arithmetic([A, B, C], base=BASE, weights=[1.0, 0.5, -2.0]), 1e-9)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_knots_turns_with_the_outputs(scope: str):
    turn = torch.linalg.qr(states(1, 5)[0]["w"] @ states(1, 6)[0]["w"].T).Q
    moved = [{**m, "w": BASE["w"] + turn @ (m["w"] - BASE["w"])} for m in (A, B)]
    first = tau(merge.knots([A, B], base=BASE, density=0.4, scope=scope))
    second = tau(merge.knots(moved, base=BASE, density=0.4, scope=scope))
    assert torch.allclose(turn @ first["w"], second["w"], atol=1e-8) and torch.allclose(first["conv"], second["conv"])


def test_knots_of_adapters_stays_in_the_span_of_their_outputs_and_ranks_what_is_there():
    """Rank one each: the two aligned parts have two rows, of which a half is kept."""
    draw = torch.Generator().manual_seed(1)
    base = {"w": torch.zeros(20, 10, dtype=torch.float64)}
    ups = torch.randn(2, 20, 1, generator=draw, dtype=torch.float64)
    models = [{"w": up @ torch.randn(1, 10, generator=draw, dtype=torch.float64)} for up in ups]
    merged = merge.knots(models, base=base, density=0.5)["w"]
    frame = torch.linalg.qr(ups.squeeze(-1).T).Q
    assert torch.allclose(frame @ (frame.T @ merged), merged, atol=1e-9) and torch.linalg.matrix_rank(merged) == 2
    u, s, v = torch.linalg.svd(torch.cat([m["w"] for m in models], 1), full_matrices=False)
    parts = [(s[:2, None] * v[:2])[:, :10], (s[:2, None] * v[:2])[:, 10:]]
    trimmed = []
    for part in parts:
        limit = part.abs().flatten().sort(descending=True).values[10]  # floor(0.5 * 20) + 1 entries survive
        trimmed.append(part * (part.abs() >= limit))
    expected = u[:, :2] @ elect(torch.stack(trimmed))
    assert torch.allclose(merged, expected, atol=1e-9)


def test_twin():
    plain = {"compress": "none"}
    assert close(merge.twin([A, B, C], base=BASE, weights=[0, 1, 0], **plain), B, 1e-12)
    for shared in (0.0, 0.3, 2.0):
        mean = merge.twin([A, B], base=BASE, weights=[0.5, 0.5], shared=shared, **plain)
        assert close(mean, merge.average([A, B]), 1e-12)
    assert close(merge.twin([A], base=BASE, weights=[1.0], density=1.0), A, 1e-12)
    for how in ("svd", "magnitude"):
        small = tau(merge.twin([A, B], base=BASE, weights=[1.0, 0.0], shared=0.0, density=0.2, compress=how))["w"]
        left = torch.linalg.matrix_rank(small) if how == "svd" else int((small != 0).sum())
        assert left == (1 if how == "svd" else 9)
    with pytest.raises(InputError, match="sum to 1"):
        merge.twin([A, B], base=BASE, weights=[1.0, 1.0])
    with pytest.raises(InputError, match="compress"):
        merge.twin([A, B], base=BASE, weights=[0.5, 0.5], compress="zip")


def models() -> tuple[torch.nn.Module, State, list[State], list[Tensor]]:
    net = classifier(0)
    base = {k: v.double() for k, v in net.state_dict().items()}
    draw = torch.Generator().manual_seed(3)
    tuned = [{k: v + 0.1 * torch.randn(v.shape, generator=draw) for k, v in base.items()} for _ in range(3)]
    return net.double(), base, tuned, [blobs(40, seed, shift=float(seed))[0].double() for seed in range(3)]


def test_cat_without_directions_is_task_arithmetic():
    net, base, tuned, inputs = models()
    plain = merge.task_arithmetic(tuned, base=base, scale=0.4)
    assert close(merge.cat_merging(net, tuned, inputs, base=base, scale=0.4, directions=0, progress=False), plain)
    one = merge.cat_merging(net, tuned[:1], inputs[:1], base=base, progress=False)
    assert close(one, tuned[0], 1e-12)
    with pytest.raises(InputError, match="directions"):
        merge.cat_merging(net, tuned, inputs, base=base, directions=-1)


def test_cat_takes_away_what_disturbs_the_others():
    """One layer, two tasks: the second task vector moves one output on the first task's inputs only."""
    net = torch.nn.Linear(4, 3, bias=False).double()
    base = {"weight": torch.zeros(3, 4, dtype=torch.float64)}
    first = {"weight": torch.zeros(3, 4, dtype=torch.float64)}
    first["weight"][0, 0] = 1.0
    second = {"weight": torch.zeros(3, 4, dtype=torch.float64)}
    second["weight"][1, 2], second["weight"][2, 0] = 1.0, 5.0  # inputs 2 are its own, inputs 0 are the first task's
    inputs = [torch.eye(4, dtype=torch.float64)[[0, 0, 1]], torch.eye(4, dtype=torch.float64)[[2, 3, 3]]]
    merged = merge.cat_merging(net, [first, second], inputs, base=base, directions=1, progress=False)["weight"]
    assert merged[0, 0] == 1.0 and merged[1, 2] == 1.0 and abs(float(merged[2, 0])) < 1e-12


def test_cat_does_not_depend_on_the_order_of_models():
    net, base, tuned, inputs = models()
    options = {"base": base, "directions": 2, "scale": 0.5, "progress": False}
    order = [2, 0, 1]
    other = merge.cat_merging(net, [tuned[i] for i in order], [inputs[i] for i in order], **options)
    assert close(merge.cat_merging(net, tuned, inputs, **options), other, 1e-10)
