"""Methods on task vectors: the identities of each paper's formula, and comparison with slow, literal versions."""

import math

import pytest
import torch
from support import close
from torch import Tensor

import lmc.merge as merge
from lmc.errors import InputError

SHAPES = {
    "layers.0.w": (9, 6),
    "layers.0.b": (9,),
    "layers.1.w": (4, 9),
    "layers.1.b": (4,),
    "head": (3, 4, 1, 1),
    "s": (),
}


def random_states(count: int, seed: int = 0, scale: float = 1.0, base: dict | None = None) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    states = []
    for _ in range(count):
        state = {k: scale * torch.randn(s, generator=generator, dtype=torch.float64) for k, s in SHAPES.items()}
        states.append(state if base is None else {k: base[k] + v for k, v in state.items()})
    return states


BASE = random_states(1)[0]
A, B, C = random_states(3, seed=1, scale=0.1, base=BASE)
METHODS = {
    "task_arithmetic": {},
    "ties": {"density": 0.3},
    "dare": {"density": 0.5},
    "della": {},
    "breadcrumbs": {"density": 0.5, "outliers": 0.1},
    "pcb": {"density": 0.4},
    "lines": {"alpha": 0.3, "beta": 0.5},
    "consensus": {},
}


def plus(base: dict[str, Tensor], *deltas: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    return {k: base[k] + scale * sum(d[k] for d in deltas) for k in base}


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state[k].flatten() for k in SHAPES])


def moved(state: dict[str, Tensor]) -> Tensor:
    return flat(state) - flat(BASE)


def test_task_vector_and_arithmetic() -> None:
    tau = [merge.task_vector(m, base=BASE) for m in (A, B, C)]
    assert close(plus(BASE, tau[0]), A)
    assert close(merge.task_arithmetic([A, B], base=BASE, scale=0.4), plus(BASE, tau[0], tau[1], scale=0.4))
    assert close(merge.task_arithmetic([A, B, C], base=BASE, scale=1 / 3), merge.average([A, B, C]))
    assert close(merge.task_arithmetic([A], base=BASE, scale=-1.0), plus(BASE, tau[0], scale=-1.0))
    analogy = merge.task_arithmetic([C, B, A], base=BASE, weights=[1, 1, -1])
    assert close(analogy, {k: BASE[k] + tau[2][k] + tau[1][k] - tau[0][k] for k in BASE})


@pytest.mark.parametrize("name", METHODS)
def test_result_is_linear_in_scale(name: str) -> None:
    method, options = getattr(merge, name), METHODS[name]
    once, twice = (moved(method([A, B, C], base=BASE, scale=s, **options)) for s in (1.0, 2.0))
    assert torch.allclose(twice, 2 * once, atol=1e-12) and once.abs().sum() > 0


@pytest.mark.parametrize("name", [n for n in METHODS if n != "pcb"])  # tanh makes PCB scale-dependent
def test_scaling_base_and_models_scales_the_result(name: str) -> None:
    method, options = getattr(merge, name), METHODS[name]
    five = [{k: 5 * v for k, v in m.items()} for m in (BASE, A, B)]
    result = method([A, B], base=BASE, **options)
    assert close(method(five[1:], base=five[0], **options), {k: 5 * v for k, v in result.items()}, 1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_models_equal_to_the_base_leave_it(name: str) -> None:
    assert close(getattr(merge, name)([BASE, BASE], base=BASE, **METHODS[name]), BASE, 0)


# TIES


def literal_ties(taus: Tensor, density: float) -> Tensor:
    """The authors' procedure on flat vectors, entry by entry."""
    size = taus.shape[1]
    trimmed = []
    for tau in taus.tolist():
        limit = sorted(map(abs, tau))[size - int(density * size) - 1] if density < 1 else 0.0
        trimmed.append([x if abs(x) >= limit else 0.0 for x in tau])
    sums = [math.fsum(column) for column in zip(*trimmed, strict=True)]
    votes = sum((s > 0) - (s < 0) for s in sums)
    merged = []
    for column, total in zip(zip(*trimmed, strict=True), sums, strict=True):
        sign = (total > 0) - (total < 0) or (1 if votes > 0 else -1)
        kept = [x for x in column if x * sign > 0]
        merged.append(sum(kept) / len(kept) if kept else 0.0)
    return torch.tensor(merged, dtype=torch.float64)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.97, 1.0])
def test_ties_is_the_literal_procedure(density: float) -> None:
    expected = literal_ties(torch.stack([moved(m) for m in (A, B, C)]), density)
    assert torch.allclose(moved(merge.ties([A, B, C], base=BASE, density=density)), expected, atol=1e-12)


def test_ties_per_tensor_trims_each_tensor() -> None:
    result = merge.ties([A, B, C], base=BASE, density=0.3, scope="tensor", undecided="drop")
    for k, shape in SHAPES.items():
        taus = torch.stack([(m[k] - BASE[k]).flatten() for m in (A, B, C)])
        kept = max(1, int(0.3 * math.prod(shape)))
        trimmed = torch.where(taus.abs() >= taus.abs().sort(1, descending=True).values[:, kept - 1 : kept], taus, 0.0)
        assert (trimmed != 0).sum(1).tolist() == [kept] * 3
        agrees = trimmed.sign() == trimmed.sum(0).sign()
        expected = (trimmed * agrees).sum(0) / (agrees & (trimmed != 0)).sum(0).clamp_min(1)
        assert torch.allclose((result[k] - BASE[k]).flatten(), expected, atol=1e-12)
    mixed = merge.ties([A, B], base=BASE, density={"*": 0.3, "head": 1.0}, scope="tensor")
    assert torch.equal(mixed["head"], merge.ties([A, B], base=BASE, density=1.0)["head"])
    with pytest.raises(InputError, match="scope='tensor'"):
        merge.ties([A, B], base=BASE, density={"*": 0.3})


def test_ties_without_conflict_is_the_mean_not_the_sum() -> None:
    aligned = [{k: BASE[k] + (m[k] - BASE[k]).abs() for k in BASE} for m in (A, B, C)]
    result = merge.ties(aligned, base=BASE, density=1.0, scale=0.7)
    assert close(result, merge.task_arithmetic(aligned, base=BASE, scale=0.7 / 3))


def test_ties_of_one_model_is_its_trimmed_vector() -> None:
    tau = moved(A)
    kept = moved(merge.ties([A], base=BASE, density=0.25, scale=2.0)) / 2
    count = int(0.25 * len(tau)) + 1
    largest = tau.abs().argsort(descending=True)[:count]
    expected = torch.zeros_like(tau).index_copy(0, largest, tau[largest])
    assert torch.allclose(kept, expected, atol=1e-12)


def test_ties_turns_with_the_sign_of_all_task_vectors() -> None:
    mirrored = [{k: 2 * BASE[k] - m[k] for k in BASE} for m in (A, B, C)]
    assert torch.allclose(moved(merge.ties(mirrored, base=BASE)), -moved(merge.ties([A, B, C], base=BASE)), atol=1e-12)


def test_ties_where_sums_cancel_exactly() -> None:
    zero = {"w": torch.zeros(4)}
    up, down = {"w": torch.tensor([1.0, -2.0, 3.0, 0.0])}, {"w": torch.tensor([-1.0, 2.0, -3.0, 0.0])}
    options = {"base": zero, "density": 1.0}
    # no majority: the negative entries, as in the authors' code
    assert merge.ties([up, down], **options)["w"].tolist() == [-1.0, -2.0, -3.0, 0.0]
    assert merge.ties([up, down], undecided="positive", **options)["w"].tolist() == [1.0, 2.0, 3.0, 0.0]
    assert merge.ties([up, down], undecided="drop", **options)["w"].tolist() == [0.0] * 4
    # a positive majority elsewhere in the model decides
    more = [{**m, "v": torch.ones(2)} for m in (up, down)]
    assert merge.ties(more, base={**zero, "v": torch.zeros(2)}, density=1.0)["w"].tolist() == [1.0, 2.0, 3.0, 0.0]
    with pytest.raises(InputError, match="undecided"):
        merge.ties([up, down], undecided="up", **options)


@pytest.mark.parametrize(("normalize", "power"), [("weights", 0), ("count", 1), ("none", 1)])
def test_what_weights_of_ties_scale_is_chosen_by_its_normalisation(normalize: str, power: int) -> None:
    options = {"base": BASE, "density": 0.4, "normalize": normalize}
    once = moved(merge.ties([A, B, C], weights=[3.0, 1.0, 2.0], **options))
    doubled = moved(merge.ties([A, B, C], weights=[6.0, 2.0, 4.0], **options))
    assert torch.allclose(doubled, 2.0**power * once, atol=1e-12) and once.abs().sum() > 0


def test_normalisations_of_ties_by_hand() -> None:
    base = {"w": torch.zeros(3)}
    a, b = {"w": torch.tensor([1.0, 4.0, -5.0])}, {"w": torch.tensor([2.0, 8.0, 1.0])}
    expected = {"weights": [1.25, 5.0, -5.0], "count": [2.5, 10.0, -15.0], "none": [5.0, 20.0, -15.0]}
    for normalize, values in expected.items():
        found = merge.ties([a, b], base=base, density=1.0, weights=[3, 1], normalize=normalize)
        assert found["w"].tolist() == values
    elected = merge.dare([a, b], base=base, density=1.0, combine_by="ties-sum", weights=[3, 1])
    assert elected["w"].tolist() == expected["none"]
    turned = merge.ties([a, b], base=base, density=1.0, weights=[-3, 1])  # votes with its sign turned round
    assert turned["w"].tolist() == [-1.0, -4.0, 4.0]


def test_a_weighted_mean_is_divided_by_the_weights() -> None:
    for weights in ([3.0, 1.0], [6.0, 2.0]):
        mean = merge.dare([A, B], base=BASE, density=1.0, combine_by="mean", weights=weights)
        assert close(mean, merge.average([A, B], weights=[3, 1]))
    with pytest.raises(InputError, match="sum to 0"):
        merge.dare([A, B], base=BASE, density=1.0, combine_by="mean", weights=[1, -1])


# DARE, DELLA, breadcrumbs


def test_dare_keeps_everything_at_density_one() -> None:
    for how in ("keep", "l1", "l2", "none"):
        assert close(merge.dare([A, B], base=BASE, density=1.0, rescale=how), merge.task_arithmetic([A, B], base=BASE))
    elected = merge.dare([A, B], base=BASE, density=1.0, combine_by="ties")
    assert close(elected, merge.ties([A, B], base=BASE, density=1.0, undecided="drop"))
    mean = merge.dare([A, B], base=BASE, density=1.0, combine_by="mean")
    assert close(mean, merge.average([A, B]))


def test_dare_is_unbiased_with_the_stated_variance() -> None:
    tau = torch.linspace(0.5, 1.5, 40_000)
    model, base = {"w": tau}, {"w": torch.zeros(40_000)}
    for density in (0.1, 0.5, 0.9):
        result = merge.dare([model], base=base, density=density)["w"]
        kept = (result != 0).float().mean()
        assert abs(kept - density) < 4 * math.sqrt(density * (1 - density) / 40_000)
        assert torch.allclose(result[result != 0], (tau / density)[result != 0])
    draws = torch.stack([merge.dare([model], base=base, density=0.25, seed=s)["w"] for s in range(100)])
    assert torch.allclose(draws.mean(0).mean(), tau.mean(), rtol=0.01)
    assert torch.allclose((draws.var(0) / tau.square()).mean(), torch.tensor(3.0), rtol=0.03)  # p / (1 - p)


@pytest.mark.parametrize("order", [1, 2])
def test_dare_rescale_restores_the_norm_of_each_tensor(order: int) -> None:
    result = merge.dare([A], base=BASE, density=0.5, rescale=f"l{order}")
    for k in ("layers.0.w", "layers.1.w"):
        before, after = (A[k] - BASE[k]).norm(order), (result[k] - BASE[k]).norm(order)
        assert torch.allclose(before, after, rtol=1e-9)


def test_dare_masks_of_two_models_differ() -> None:
    base = {"w": torch.zeros(1000)}
    kept = (merge.dare([{"w": torch.ones(1000)}, {"w": 10 * torch.ones(1000)}], base=base)["w"] / 2).round()
    assert set(kept.tolist()) == {0.0, 1.0, 10.0, 11.0}


def test_della_without_window_is_dare_and_with_it_prefers_large_entries() -> None:
    dare = merge.dare([A, B], base=BASE, density=0.6)
    assert close(merge.della([A, B], base=BASE, density=0.6, epsilon=0.0, combine_by="sum"), dare)
    row = torch.linspace(0.1, 1.0, 101)
    base = {"w": torch.zeros(400, 101)}
    result = merge.della([{"w": row.repeat(400, 1)}], base=base, density=0.5, epsilon=0.3)["w"]
    kept = (result != 0).double().mean(0)
    expected = torch.linspace(0.2, 0.8, 101, dtype=torch.float64)
    assert torch.allclose(kept, expected, atol=5 * 0.5 / 20) and abs(kept.mean() - 0.5) < 0.01
    assert torch.allclose(result.mean(0), row, atol=0.3)  # unbiased, entry by entry
    for options in ({"density": 0.9, "epsilon": 0.2}, {"density": 0.1, "epsilon": 0.1}):
        with pytest.raises(InputError, match="epsilon"):
            merge.della([A], base=BASE, **options)


@pytest.mark.parametrize(("scope", "groups"), [("filter", 4), ("tensor", 1)])
def test_breadcrumbs_keeps_its_share_of_kernels(scope: str, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"conv": torch.zeros(4, 10, 3, 3), "point": torch.zeros(4, 100, 1, 1), "bias": torch.zeros(3)}
    model = {name: torch.randn(x.shape, generator=generator) for name, x in base.items()}
    found = merge.breadcrumbs([model], base=base, density=0.15, outliers=0.02, scope=scope)
    for name in ("conv", "point"):
        rows, kept = model[name].abs().reshape(groups, -1), (found[name] != 0).reshape(groups, -1)
        n = rows.shape[1]
        rank = rows.argsort(1, descending=True).argsort(1)
        assert torch.equal(kept, (rank >= round(0.02 * n)) & (rank < round(0.15 * n)))
    assert int((found["bias"] != 0).sum()) == 1  # never nothing


def test_breadcrumbs_refuses_rows_too_short_to_keep_anything() -> None:
    base = {"conv": torch.zeros(4, 10, 3, 3)}
    with pytest.raises(InputError, match="conv: density 0.15 keeps no entry of rows of 3; rank filters"):
        merge.breadcrumbs([{"conv": torch.ones(4, 10, 3, 3)}], base=base, scope="row")
    kept = merge.breadcrumbs([{"conv": torch.ones(4, 10, 3, 3)}], base=base, scope="row", density=0.5, outliers=0.0)
    assert int(kept["conv"].sum()) == 4 * 10 * 3 * 2
    with pytest.raises(InputError, match="scope must be"):
        merge.breadcrumbs([base], base=base, scope="layer")


def test_breadcrumbs_keeps_a_band_of_each_row() -> None:
    row = torch.tensor([5.0, -1.0, 3.0, -8.0, 2.0, 7.0, -4.0, 6.0, 9.0, -10.0])
    model = {"w": torch.stack([row, row.flip(0)])}
    result = merge.breadcrumbs([model], base={"w": torch.zeros(2, 10)}, density=0.5, outliers=0.2)["w"]
    band = torch.where((row.abs() >= 6) & (row.abs() <= 8), row, 0.0)  # of the top five the top two go
    assert torch.equal(result, torch.stack([band, band.flip(0)]))
    assert close(
        merge.breadcrumbs([A, B], base=BASE, density=1.0, outliers=0.0), merge.task_arithmetic([A, B], base=BASE)
    )
    share = (
        (merge.breadcrumbs([{"w": torch.randn(3, 1000)}], base={"w": torch.zeros(3, 1000)})["w"] != 0).float().mean()
    )
    assert abs(float(share) - 0.144) < 1e-6
    with pytest.raises(InputError, match="outliers"):
        merge.breadcrumbs([A], base=BASE, density=0.1, outliers=0.2)


# PCB


def literal_pcb(taus: Tensor, density: float) -> Tensor:
    """PCB's formulas on flat vectors, with sorted quantiles."""

    def minmax(x: Tensor) -> Tensor:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return (x - low) / (high - low)

    def quantile(x: Tensor, q: float) -> Tensor:
        return x.sort(1).values[:, int(q * (x.shape[1] - 1))][:, None]

    a = taus.abs()
    a = a.clamp(quantile(a, 1e-4), quantile(a, 1 - 1e-4))
    balance = torch.exp(len(taus) * minmax(a) ** 2) * torch.tanh(taus * taus.sum(0))
    s = minmax(balance.clamp_min(quantile(balance, 1 - density)))
    return (taus.sign() * a * s).sum(0) / s.sum(0).clamp_min(1e-12)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 1.0])
def test_pcb_is_the_literal_procedure(density: float) -> None:
    expected = literal_pcb(torch.stack([moved(m) for m in (A, B, C)]), density)
    result = moved(merge.pcb([A, B, C], base=BASE, density=density, scale=1.2)) / 1.2
    assert torch.allclose(result, expected, atol=1e-12) and expected.abs().sum() > 0


def test_pcb_of_equal_and_of_opposite_task_vectors() -> None:
    equal, single = moved(merge.pcb([A, A, A], base=BASE, density=0.3)), moved(A)
    kept = equal != 0
    assert 0.2 < kept.double().mean() < 0.4
    low, high = single.abs().sort().values[[0, -2]]
    assert torch.allclose(equal[kept], (single.sign() * single.abs().clamp(low, high))[kept], atol=1e-12)
    zero, mirror = {k: torch.zeros_like(v) for k, v in A.items()}, {k: -v for k, v in A.items()}
    assert close(merge.pcb([A, mirror], base=zero), zero, 0)


# LiNeS, TALL-masks and consensus


def test_lines_limits() -> None:
    tau = merge.task_vector(A, base=BASE)
    uniform = merge.lines([A, B], base=BASE, alpha=0.4, beta=0.0)
    assert close(uniform, merge.task_arithmetic([A, B], base=BASE, scale=0.4))
    ramp = merge.lines([A], base=BASE, alpha=0.0, beta=1.0)
    assert close(ramp, {k: BASE[k] + (tau[k] if k.startswith("layers.1") else 0 * tau[k]) for k in BASE})
    both = merge.lines([A], base=BASE, alpha=0.2, beta=0.5)
    factor = {k: 0.7 if k.startswith("layers.1") else 0.2 for k in BASE}
    assert close(both, {k: BASE[k] + factor[k] * tau[k] for k in BASE})


def test_lines_with_three_blocks_given_or_found() -> None:
    names = [f"h.{i}.mlp.0.w" for i in (0, 1, 2)]
    base = {"wte": torch.zeros(2), **{n: torch.zeros(2) for n in names}}
    model = {k: torch.ones(2) for k in base}
    for blocks in (None, ["h.0", "h.1", "h.2"]):
        result = merge.lines([model], base=base, alpha=0.1, beta=0.8, blocks=blocks)
        assert [round(float(v[0]), 6) for v in result.values()] == [0.1, 0.1, 0.5, 0.9]
    with pytest.raises(InputError, match="no tensor fits the pattern 'g.0'"):
        merge.lines([model], base=base, blocks=["g.0", "h.1"])
    with pytest.raises(InputError, match="pass blocks="):
        merge.lines([{"w": torch.ones(2)}], base={"w": torch.zeros(2)})
    stages = {f"{part}.{b}.w": torch.ones(2) for part, count in (("features", 2), ("top", 3)) for b in range(count)}
    with pytest.raises(InputError, match="pass blocks="):
        merge.lines([stages], base=stages)


def test_lines_alpha_for_several_tasks_and_other_methods() -> None:
    merged = moved(merge.ties([A, B, C], base=BASE, density=0.5))
    total = moved(A) + moved(B) + moved(C)
    alpha = float(total.abs().sum() / merged.abs().sum()) / 3
    result = moved(merge.lines([A, B, C], base=BASE, beta=0.0, method=merge.ties, density=0.5))
    assert torch.allclose(result, alpha * merged, atol=1e-12)
    assert torch.allclose(moved(merge.lines([A, B, C], base=BASE, beta=0.0)), total / 3, atol=1e-12)


def test_corrections_go_on_top_of_methods_on_task_vectors_only() -> None:
    with pytest.raises(InputError, match="average is not a method on task vectors"):
        merge.lines([A], base=BASE, method=merge.average)
    with pytest.raises(InputError, match="expected a method on task vectors"):
        merge.consensus([A], base=BASE, method="ties")
    with pytest.raises(InputError, match="density"):
        merge.consensus([A], base=BASE, density=0.2)  # task arithmetic has none


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "pcb"])
def test_consensus_limits(method: str) -> None:
    inner = getattr(merge, method)
    plain = inner([A, B, C], base=BASE, scale=0.6)
    assert close(merge.consensus([A, B, C], base=BASE, method=inner, agree=0, scale=0.6), plain)
    assert close(merge.consensus([A, B, C], base=BASE, method=inner, agree=4, scale=0.6), BASE, 0)


def test_tall_masks() -> None:
    tau = torch.stack([moved(m) for m in (A, B, C)])
    masks = merge.tall_masks([A, B, C], base=BASE, threshold=[0.2, 0.4, 0.6])
    limits = torch.tensor([[0.2], [0.4], [0.6]])
    expected = tau.abs() > limits * (tau.sum(0) - tau).abs()
    assert all(torch.equal(flat(masks[t]), expected[t]) for t in range(3))
    shared = moved(merge.consensus([A, B, C], base=BASE, threshold=[0.2, 0.4, 0.6], agree=2))
    assert torch.allclose(shared, tau.sum(0) * (expected.sum(0) >= 2), atol=1e-12)
    own = moved(merge.tall_mask([A, B, C], base=BASE, task=1, threshold=0.4))
    assert torch.allclose(own, tau.sum(0) * expected[1], atol=1e-12)
    sparse = {k: torch.where(v.abs() > 0.5, A[k], v) for k, v in BASE.items()}
    assert all(torch.equal(merge.tall_masks([sparse], base=BASE)[0][k], sparse[k] != BASE[k]) for k in BASE)


def test_a_tall_mask_recovers_tasks_that_use_different_entries() -> None:
    first = {k: torch.where(torch.arange(v.numel()).reshape(v.shape) % 2 == 0, A[k], BASE[k]) for k, v in BASE.items()}
    second = {k: torch.where(torch.arange(v.numel()).reshape(v.shape) % 2 == 1, B[k], BASE[k]) for k, v in BASE.items()}
    assert close(merge.tall_mask([first, second], base=BASE, task=0), first)
    assert close(merge.tall_mask([first, second], base=BASE, task=1), second)
    with pytest.raises(InputError, match="task"):
        merge.tall_mask([first, second], base=BASE, task=2)


def test_task_arithmetic_is_exact_for_a_linear_model_with_tasks_on_disjoint_features() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(3, 10, generator=generator, dtype=torch.float64)}
    inputs = [torch.zeros(20, 10, dtype=torch.float64) for _ in range(2)]
    models = []
    for x, part in zip(inputs, (slice(0, 5), slice(5, 10)), strict=True):
        x[:, part] = torch.randn(20, 5, generator=generator, dtype=torch.float64)
        model = base["w"].clone()
        model[:, part] = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        models.append({"w": model})
    merged = merge.task_arithmetic(models, base=base)["w"]
    for x, model in zip(inputs, models, strict=True):
        assert torch.allclose(x @ merged.T, x @ model["w"].T, atol=1e-12)
        assert not torch.allclose(x @ merge.average(models)["w"].T, x @ model["w"].T, atol=0.1)
