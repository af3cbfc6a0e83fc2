"""Large tensors in parts: what depends on places, rows and sums over whole tensors comes out as if they were whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lmc.merge as merge
from lmc.errors import InputError
from lmc.merge.engine import call
from lmc.merge.engine import chunks as parts
from lmc.merge.engine.call import Uniform
from lmc.network.moments import moments

SIZE = 6_000_000
METHODS = {
    **{name: {} for name in ("average", "slerp", "karcher_mean", "model_stock", "variance_corrected")},
    **{name: {} for name in ("task_arithmetic", "ties", "dare", "della", "breadcrumbs", "pcb", "lines", "consensus")},
    "tall_mask": {"task": 0, "method": merge.della},
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_random_numbers_belong_to_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "BLOCK", 10)
    whole = Uniform(3, "w")(torch.zeros(2, 9, 7))
    flat = whole.reshape(2, 63)
    for start, stop in ((0, 5), (5, 10), (3, 31), (10, 20), (57, 63), (0, 63)):
        assert torch.equal(Uniform(3, "w", slice(start, stop))(torch.zeros(2, stop - start)), flat[:, start:stop])
    rows = Uniform(3, "w", slice(14, 42))(torch.zeros(2, 4, 7))
    assert torch.equal(rows, whole[:, 2:6])
    assert len(flat.unique()) == flat.numel()  # no block is another's, nor one model another's
    assert not torch.equal(Uniform(4, "w")(flat), flat) and not torch.equal(Uniform(3, "v")(flat), flat)
    many = Uniform(0, "w")(torch.zeros(1, 40_000))
    assert 0.0 <= many.min() and many.max() < 1.0 and abs(float(many.mean()) - 0.5) < 0.01


def test_moments_of_parts_are_those_of_the_whole() -> None:
    tensors = random(3, 40, 25) + torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64).reshape(3, 1, 1)
    flat = tensors.reshape(3, -1)
    for cuts in ([1000], [1, 998, 1], [300, 300, 400]):
        found = moments(flat.split(cuts, dim=1))
        assert found.count == 1000
        assert torch.allclose(found.means, flat.mean(1), rtol=1e-13)
        assert torch.allclose(found.covariances, torch.cov(flat, correction=0), rtol=1e-11)
        assert torch.allclose(found.gram, flat @ flat.T, rtol=1e-12)


def test_moments_of_float32_are_those_of_float64_to_its_digits() -> None:
    """Sums of short stretches are taken in float32: a sequence of single additions would lose three digits more."""
    tensors = 5.0 + random(3, 80 * 512, dtype=torch.float32)
    exact = moments([tensors.double()])
    for cuts in ([80 * 512], [40 * 512, 40 * 512], [5 * 512 + 1, 75 * 512 - 1]):
        found = moments(tensors.split(cuts, dim=1))
        assert found.gram.dtype == torch.float64
        assert torch.allclose(found.means, exact.means, rtol=1e-8, atol=0)
        scale = exact.covariances.diagonal().sqrt()
        off = (found.covariances - exact.covariances) / torch.outer(scale, scale)
        assert float(off.abs().max()) < 3e-7


def test_a_small_spread_around_a_large_mean_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "VALUES", 100)
    models = [{"w": 1e6 + 1e-3 * random(40, 30, seed=s)} for s in range(4)]
    corrected, plain = merge.variance_corrected(models)["w"], merge.average(models)["w"]
    wanted = torch.stack([m["w"].var(correction=0) for m in models]).mean()
    assert torch.allclose(corrected.var(correction=0), wanted, rtol=1e-5)
    assert torch.allclose(corrected.mean(), plain.mean(), rtol=1e-14)


@pytest.mark.parametrize("part", [50, 1 << 18])
def test_sums_over_whole_tensors_count_in_every_part(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each method by its formula on the whole tensor, in parts and not."""
    monkeypatch.setattr(parts, "VALUES", part)
    base, *tensors = (random(20, 15, seed=s) for s in range(4))
    models = [{"w": base + t} for t in tensors]
    u, v = tensors[:2]
    angle = torch.arccos((u * v).sum() / u.norm() / v.norm())
    turned = base + (torch.sin(0.7 * angle) * u + torch.sin(0.3 * angle) * v) / torch.sin(angle)
    assert torch.allclose(merge.slerp(models[:2], base={"w": base}, t=0.3)["w"], turned, atol=1e-12)
    cosines = [float((a * b).sum() / a.norm() / b.norm()) for a, b in ((u, v), (u, tensors[2]), (v, tensors[2]))]
    cosine = sum(cosines) / 3
    expected = base + max(0.0, 3 * cosine / (1 + 2 * cosine)) * torch.stack(tensors).mean(0)
    assert torch.allclose(merge.model_stock(models, base={"w": base})["w"], expected, atol=1e-12)
    mean = torch.stack(tensors).mean(0)
    spread = torch.stack([t.var(correction=0) for t in tensors]).mean()
    expected = (mean - mean.mean()) * (spread / mean.var(correction=0)).sqrt() + mean.mean()
    assert torch.allclose(merge.variance_corrected([{"w": t} for t in tensors])["w"], expected, atol=1e-12)


def test_karcher_mean_with_points_opposite_to_it_and_nearly_equal_ones() -> None:
    v = random(6, 5)
    assert torch.allclose(merge.karcher_mean([{"w": t} for t in (v, v, -v)])["w"], v, atol=1e-12)
    turned = [{"w": factor * v} for factor in (0.3, 1.7, 0.9, -0.6)]
    assert torch.allclose(merge.karcher_mean(turned)["w"], 0.875 * v, atol=1e-7)
    near = [{"w": v + 1e-9 * random(6, 5, seed=s)} for s in range(1, 4)]
    assert torch.allclose(merge.karcher_mean(near)["w"], merge.average(near)["w"], atol=1e-14)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("large")
    for seed in range(3):
        tensor = random(1000, SIZE // 1000, seed=seed, dtype=torch.float32)
        save_file({"block.0": tensor[:1].clone(), "block.1": tensor}, folder / f"{seed}.safetensors")
    return [folder / f"{seed}.safetensors" for seed in range(3)]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_plans_for_less_than_three_copies_of_a_large_tensor(
    name: str, large: list[Path], tmp_path: Path
) -> None:
    plan = merge.plan(getattr(merge, name), large[1:], tmp_path / "out", base=large[0], **METHODS[name])
    assert not plan.whole and 4 * parts.VALUES < plan.memory < 3 * 4 * SIZE
    assert "whole tensors" not in str(plan)


def test_what_needs_whole_tensors_says_so(large: list[Path], tmp_path: Path) -> None:
    def first(tensors: Tensor) -> Tensor:
        return tensors[0]

    for method, options in (
        (merge.on_tensors(first), {}),
        (merge.della, {"rescale": {"block.1": "l2"}}),
        (merge.lines, {"method": merge.della, "rescale": "l1"}),
    ):
        plan = merge.plan(method, large[1:], tmp_path / "out", base=large[0], **options)
        assert plan.whole and plan.memory >= 18 * 4 * SIZE and "for whole tensors" in str(plan)
    assert not merge.plan(merge.on_tensors(first, elementwise=True), large[1:], tmp_path / "out").whole


def test_rules_of_ones_own_take_rows_filters_and_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    @merge.on_task_vectors(cut="rows")
    def noisy(deltas: Tensor, *, uniform, share: float = 0.5) -> Tensor:
        shapes.append(tuple(deltas.shape))
        return (deltas * (uniform(deltas) < share)).softmax(-1).sum(0)

    @merge.on_tensors(cut="filters")
    def unit(tensors: Tensor) -> Tensor:
        shapes.append(tuple(tensors.shape))
        return tensors[0] / tensors[0].flatten(1).norm(dim=1).reshape(-1, *[1] * (tensors.ndim - 2))

    states = [{"w": random(6, 4, 3, seed=s)} for s in range(3)]
    rows, filters = noisy(states[1:], base=states[0], seed=2)["w"], unit(states[1:])["w"]
    assert shapes == [(2, 6, 4, 3)] * 2
    shapes.clear()
    monkeypatch.setattr(parts, "VALUES", 25)
    assert torch.equal(noisy(states[1:], base=states[0], seed=2)["w"], rows)
    assert torch.allclose(unit(states[1:])["w"], filters, atol=1e-15)
    assert shapes == [(2, 8, 3)] * 3 + [(2, 2, 12)] * 3
    assert not torch.equal(noisy(states[1:], base=states[0], seed=3)["w"], rows)
    with pytest.raises(InputError, match="name `uniform` instead of `generator`"):

        @merge.on_task_vectors(elementwise=True)
        def repeated(deltas: Tensor, *, generator: torch.Generator) -> Tensor:
            return deltas[0]


@pytest.mark.parametrize("chunk", [None, slice(3, 9)])
def test_random_numbers_do_not_depend_on_the_dtype(chunk: slice | None) -> None:
    draw = Uniform(7, "w", chunk)
    single, double = (draw(torch.zeros(2, 6, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert torch.equal(single.double(), double) and len(set(single.flatten().tolist())) == 12


def test_dare_drops_the_same_entries_in_every_dtype() -> None:
    base = {"w": torch.zeros(500)}
    tuned = {"w": torch.linspace(1.0, 2.0, 500)}
    kept = [
        merge.dare([{"w": tuned["w"].to(dtype)}], base={"w": base["w"].to(dtype)}, density=0.4)["w"] != 0
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    ]
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[1], kept[2]) and 100 < int(kept[0].sum()) < 300
