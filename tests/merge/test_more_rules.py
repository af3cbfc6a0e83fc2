"""Rules that choose entries, rules by singular vectors, and relatives of SLERP: the identities of each formula."""

import pytest
import torch
from support import close
from torch import Tensor

import lmc.merge as merge
from lmc.errors import InputError

SHAPES = {"w": (8, 6), "conv": (4, 2, 3, 1), "b": (5,), "s": ()}
State = dict[str, Tensor]


def states(count: int, seed: int = 0) -> list[State]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {k: torch.randn(shape, generator=draw, dtype=torch.float64) for k, shape in SHAPES.items()}
        for _ in range(count)
    ]


BASE, A, B, C = states(4)
ZERO = {k: torch.zeros_like(v) for k, v in BASE.items()}
TASK_RULES = {
    "magmax": {}, "ram": {}, "sce": {}, "emr": {"task": 0}, "tsv_m": {}, "iso_cts": {}, "wudi": {"rest": "mean"},
}  # fmt: skip


def plus(base: State, delta: State) -> State:
    return {k: base[k] + delta[k] for k in base}


def tau(model: State, base: State = BASE) -> State:
    return {k: model[k] - base[k] for k in model}


@pytest.mark.parametrize("name", TASK_RULES)
def test_one_task_gives_its_model(name: str):
    assert close(getattr(merge, name)([A], base=BASE, **TASK_RULES[name]), A, 1e-9)


@pytest.mark.parametrize("name", [name for name in TASK_RULES if name != "emr"])
def test_the_order_of_tasks_does_not_matter(name: str):
    method, options = getattr(merge, name), TASK_RULES[name]
    assert close(method([A, B, C], base=BASE, **options), method([C, A, B], base=BASE, **options), 1e-9)


@pytest.mark.parametrize("name", [*TASK_RULES, "iso_c"])
def test_task_vectors_five_times_as_long_give_one_five_times_as_long(name: str):
    method, options = getattr(merge, name), TASK_RULES.get(name, {})
    once = tau(method([A, B], base=BASE, **options))
    five = [plus(BASE, {k: 5 * v for k, v in tau(m).items()}) for m in (A, B)]
    assert close(tau(method(five, base=BASE, **options)), {k: 5 * v for k, v in once.items()}, 1e-8)


def test_nearswap():
    limit = max(float(t.abs().max()) for t in tau(A).values())
    assert close(merge.nearswap([A], base=BASE, t=0.0), BASE, 0)
    assert close(merge.nearswap([A], base=BASE, t=limit), A, 0)
    there, back = merge.nearswap([A], base=BASE, t=0.3), merge.nearswap([BASE], base=A, t=0.3)
    assert close(plus(there, back), plus(A, BASE), 1e-12)
    assert max(float(t.abs().max()) for t in tau(there).values()) <= 0.3 + 1e-12
    with pytest.raises(InputError, match="exactly one model"):
        merge.nearswap([A, B], base=BASE, t=0.1)
    with pytest.raises(InputError, match="negative"):
        merge.nearswap([A], base=BASE, t=-1.0)


def test_magmax_takes_the_largest_and_of_equals_the_later():
    base = {"w": torch.zeros(3)}
    a, b = {"w": torch.tensor([1.0, -3.0, 2.0])}, {"w": torch.tensor([-2.0, 1.0, -2.0])}
    assert merge.magmax([a, b], base=base)["w"].tolist() == [-2.0, -3.0, -2.0]
    assert merge.magmax([b, a], base=base)["w"].tolist() == [-2.0, -3.0, 2.0]
    assert close(merge.magmax([A, B, B], base=BASE), merge.magmax([A, B], base=BASE), 0)


def test_ram_adds_what_is_unique_and_averages_what_is_shared():
    even = {k: torch.arange(v.numel()).reshape(v.shape) % 2 == 0 for k, v in BASE.items()}
    first = {k: torch.where(even[k], A[k], BASE[k]) for k in BASE}
    second = {k: torch.where(even[k], BASE[k], B[k]) for k in BASE}
    assert close(merge.ram([first, second], base=BASE), merge.task_arithmetic([first, second], base=BASE), 1e-12)
    assert close(merge.ram([A, B], base=BASE), merge.average([A, B]), 1e-12)
    assert close(merge.ram([first, B], base=BASE, boost=0.0), merge.ram([first, B], base=BASE), 0)
    base = {"w": torch.zeros(8)}
    a, b = {"w": torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 1e-6])}, {"w": torch.tensor([3.0, 0, 0, 0, 0, 3, 0, 0])}
    found = merge.ram([a, b], base=base, boost=0.1, cap=0.5)["w"]  # one entry shared; four and one are unique
    expected = torch.tensor([2.0, *[1 + 0.1 * 0.25] * 4, 3 * (1 + 0.1 * 0.5), 0, 0])
    assert torch.allclose(found, expected)


def test_sce_by_hand():
    base = {"w": torch.zeros(4)}
    a, b = {"w": torch.tensor([1.0, -2.0, 3.0, 2.0])}, {"w": torch.tensor([1.0, 4.0, -1.0, 2.0])}
    energy = [float(m["w"].square().mean()) for m in (a, b)]
    wa, wb = energy[0] / sum(energy), energy[1] / sum(energy)
    mixed = [wa * 1 + wb * 1, 4.0, 3.0, wa * 2 + wb * 2]  # where signs differ the sum elects one model alone
    assert torch.allclose(merge.sce([a, b], base=base)["w"], torch.tensor(mixed))
    half = merge.sce([a, b], base=base, select=0.5)["w"]  # two positions vary, the second most: one is kept
    assert half.tolist() == [0.0, 4.0, 0.0, 0.0]
    dense = merge.sce([a, b], base=base, select=0.5, dense=True)["w"]
    share = torch.tensor([4.0, 16.0]) / 20.0
    assert torch.allclose(dense, torch.tensor([1.0, 4.0, 3.0, 2.0])) and float(share.sum()) == 1.0


def test_sce_limits():
    assert close(merge.sce([A, A], base=BASE), A, 1e-12)
    assert close(merge.sce([A, A], base=BASE, select=0.5), BASE, 0)
    assert close(merge.sce([A, A], base=BASE, select=0.5, dense=True), A, 1e-12)
    assert close(merge.sce([A, B], base=BASE, select=0.0), BASE, 0)
    assert close(merge.sce([A, B], base=BASE, dense=True), merge.sce([A, B], base=BASE), 0)
    with pytest.raises(InputError, match="select"):
        merge.sce([A, B], base=BASE, select=1.5)


def test_arcee_fusion_takes_whole_entries():
    found = merge.arcee_fusion([A], base=BASE)
    taken = {k: found[k] == A[k] for k in A}
    assert all(bool((taken[k] | (found[k] == BASE[k])).all()) for k in A)
    share = sum(int(t.sum()) for t in taken.values()) / sum(t.numel() for t in taken.values())
    assert 0.0 < share < 0.4
    assert close(merge.arcee_fusion([BASE], base=BASE), BASE, 0)
    up = {k: v + 2.0 for k, v in A.items()}, {k: v + 2.0 for k, v in BASE.items()}
    moved = merge.arcee_fusion([up[0]], base=up[1])  # softmax does not see a shift of rows
    assert all(torch.equal(moved[k] == up[0][k], taken[k]) for k in ("w", "b", "conv"))
    with pytest.raises(InputError, match="exactly one model"):
        merge.arcee_fusion([A, B], base=BASE)


def test_emr_restores_the_size_of_each_task():
    base = {"w": torch.zeros(50, 4, dtype=torch.float64)}
    draw = torch.Generator().manual_seed(3)
    models = [{"w": torch.randn(50, 4, generator=draw, dtype=torch.float64)} for _ in range(3)]
    mean = torch.stack([m["w"] for m in models]).mean(0)
    for task, model in enumerate(models):
        found = merge.emr(models, base=base, task=task)["w"]
        assert float(found.abs().mean()) == pytest.approx(float(model["w"].abs().mean()))
        agrees = model["w"] * torch.where(mean > 0, 1.0, -1.0) > 0
        assert torch.equal(found != 0, agrees) and bool((found * model["w"] >= 0).all())
    with pytest.raises(InputError, match="task"):
        merge.emr(models, base=base, task=3)


def orthogonal(size: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi"])
def test_spectral_rules_turn_with_the_matrices(name: str):
    method, left, right = getattr(merge, name), orthogonal(8, 1), orthogonal(6, 2)
    zero = {"w": ZERO["w"]}
    plain = method([{"w": m["w"]} for m in (A, B)], base=zero)["w"]
    turned = method([{"w": left @ m["w"] @ right} for m in (A, B)], base=zero)["w"]
    assert torch.allclose(turned, left @ plain @ right, atol=1e-9)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
def test_spectral_rules_average_vectors_and_take_kernels_as_matrices(name: str):
    found = getattr(merge, name)([A, B], base=BASE)
    for key in ("b", "s"):
        assert torch.allclose(found[key], (A[key] + B[key]) / 2)
    flat = [{"w": m["conv"].flatten(1)} for m in (BASE, A, B)]
    assert torch.allclose(found["conv"].flatten(1), getattr(merge, name)(flat[1:], base=flat[0])["w"])


def blocks() -> tuple[State, list[State]]:
    """Two tasks whose rows and columns are disjoint."""
    base = {"w": torch.zeros(8, 8, dtype=torch.float64)}
    models = []
    for k in (0, 4):
        model = torch.zeros(8, 8, dtype=torch.float64)
        model[k : k + 4, k : k + 4] = torch.randn(4, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        models.append({"w": model})
    return base, models


def test_tsv_m():
    base, models = blocks()
    assert torch.allclose(merge.tsv_m(models, base=base)["w"], models[0]["w"] + models[1]["w"], atol=1e-12)
    w = {"w": A["w"]}
    u, s, v = torch.linalg.svd(w["w"], full_matrices=False)
    twice = merge.tsv_m([w, w], base={"w": ZERO["w"]})["w"]  # coinciding vectors are not torn apart
    assert torch.allclose(twice, (u[:, :3] * s[:3]) @ v[:3], atol=1e-9)
    found = merge.tsv_m([{"w": m["w"]} for m in (A, B)], base={"w": ZERO["w"]})["w"]
    kept = torch.cat([torch.linalg.svdvals(m["w"])[:3] for m in (A, B)])
    assert torch.allclose(torch.linalg.svdvals(found), kept.sort(descending=True).values)
    many = [{"w": m["w"][:, :2]} for m in (A, B, C)]
    assert torch.allclose(merge.tsv_m(many, base={"w": ZERO["w"][:, :2]})["w"], merge.average(many)["w"])


def test_iso_c():
    zero = {"w": ZERO["w"]}
    total = A["w"] + B["w"]
    found = merge.iso_c([{"w": A["w"]}, {"w": B["w"]}], base=zero)["w"]
    values = torch.linalg.svdvals(found)
    assert torch.allclose(values, torch.linalg.svdvals(total).mean().expand(6))
    assert torch.allclose(merge.iso_c([{"w": found}, zero], base=zero)["w"], found, atol=1e-9)  # idempotent
    low = torch.outer(torch.arange(8.0), torch.ones(6)).double()  # directions that are not there stay out
    assert torch.allclose(merge.iso_c([{"w": low}, zero], base=zero)["w"], low, atol=1e-9)
    assert close(merge.iso_c([zero, zero], base=zero), zero, 0)


def test_iso_cts():
    zero, pair = {"w": ZERO["w"]}, [{"w": A["w"]}, {"w": B["w"]}]
    values = torch.linalg.svdvals(merge.iso_cts(pair, base=zero)["w"])
    assert torch.allclose(values, values[:1].expand(6))
    everything = merge.iso_cts(pair, base=zero, common=1.0)
    assert torch.allclose(everything["w"], merge.iso_c(pair, base=zero)["w"])
    with pytest.raises(InputError, match="common"):
        merge.iso_cts(pair, base=zero, common=2.0)


def test_wudi():
    base, models = blocks()
    assert torch.allclose(merge.wudi(models, base=base)["w"], models[0]["w"] + models[1]["w"], atol=1e-9)
    assert close(merge.wudi([A, A], base=BASE, rest="mean"), A, 1e-8)
    kept = merge.wudi([A, B], base=BASE)
    assert torch.equal(kept["b"], BASE["b"]) and not torch.equal(kept["w"], BASE["w"])
    taus = [m["w"] - BASE["w"] for m in (A, B)]
    at = (kept["w"] - BASE["w"]).requires_grad_()
    sum(((at - t) @ t.T).square().sum() / t.square().sum() for t in taus).backward()
    assert at.grad is not None and float(at.grad.abs().max()) < 1e-8  # a minimum of the paper's objective
    with pytest.raises(InputError, match="rest"):
        merge.wudi([A, B], base=BASE, rest="sum")


@pytest.mark.parametrize("base", [None, BASE])
def test_relatives_of_slerp(base: State | None):
    for t in (0.0, 0.3, 1.0):
        found = merge.nuslerp([A, B], weights=[1 - t, t], base=base)
        assert close(found, merge.slerp([A, B], t=t, base=base, lerp_above=1.0), 1e-9)
    swapped = merge.nuslerp([B, A], weights=[3, 1], base=base, row_wise=True)
    assert close(swapped, merge.nuslerp([A, B], weights=[1, 3], base=base, row_wise=True), 1e-12)
    rows = merge.nuslerp([A, B], weights=[1, 3], row_wise=True)["w"]
    alone = [merge.nuslerp([{"w": m["w"][i]} for m in (A, B)], weights=[1, 3])["w"] for i in range(8)]
    assert torch.allclose(rows, torch.stack(alone))
    assert close(merge.multislerp([A, A, A], base=base), A, 1e-9)
    origin = ZERO if base is None else base
    equal = {k: origin[k] + v * (tau(A, origin)[k].norm() / v.norm()) for k, v in tau(B, origin).items()}
    vectors = ("w", "conv", "b")  # numbers on their own have two directions only
    halves = merge.multislerp([A, equal], base=base), merge.slerp([A, equal], base=base, lerp_above=1.0)
    assert all(torch.allclose(halves[0][k], halves[1][k], atol=1e-9) for k in vectors)
    with pytest.raises(InputError, match="exactly 2 models"):
        merge.nuslerp([A, B, C])


def test_multislerp_is_the_mean_direction_at_the_mean_length():
    share = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    found = merge.multislerp([A, B, C], weights=share.tolist())["w"]
    norms = torch.stack([m["w"].norm() for m in (A, B, C)])
    direction = sum(s * m["w"] / m["w"].norm() for s, m in zip(share, (A, B, C), strict=True))
    assert torch.allclose(found, direction / direction.norm() * (share @ norms))
    longer = {k: 7 * v for k, v in A.items()}
    other = merge.multislerp([longer, B, C], weights=share.tolist())["w"]
    assert torch.allclose(other / other.norm(), found / found.norm())
    plain, mirror = {"w": A["w"]}, {"w": -A["w"]}
    assert torch.allclose(merge.multislerp([plain, mirror])["w"], ZERO["w"])
    with pytest.raises(InputError, match="cancel out"):
        merge.multislerp([plain, mirror, {"w": ZERO["w"]}])
