"""Soups that stay sparse, and experts that are mixed while they train."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lmc.merge as merge
from lmc.errors import InputError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))


def retrain(weights: dict[str, Tensor], masks: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A few steps on random data with frozen zeros."""
    model = net()
    model.load_state_dict(weights)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(5):
        x = torch.randn(32, 12, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(masks.get(name, 1.0))
    return model.state_dict()


def test_masks_keep_the_largest() -> None:
    weights = net().state_dict()
    masks = merge.magnitude_masks(weights, sparsity=0.75)
    assert set(masks) == {"0.weight", "2.weight"}
    values = torch.cat([weights[k].abs().flatten() for k in masks])
    kept = torch.cat([masks[k].flatten() for k in masks])
    assert int((~kept).sum()) == int(0.75 * 320) and values[kept].min() > values[~kept].max()
    uniform = merge.magnitude_masks(weights, sparsity=0.75, selector="uniform")
    assert [int((~m).sum()) for m in uniform.values()] == [180, 60]
    assert all(m.all() for m in merge.magnitude_masks(weights, sparsity=0.0).values())
    with pytest.raises(InputError, match="sparsity"):
        merge.magnitude_masks(weights, sparsity=1.0)


@pytest.mark.parametrize("selector", ["global", "uniform"])
def test_a_sparse_soup_has_the_support_of_its_mask(selector: str) -> None:
    dense = net()
    before = copy.deepcopy(dense.state_dict())
    seen = []

    def watched(weights: dict[str, Tensor], masks: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        seen.append({k: m.clone() for k, m in masks.items()})
        return retrain(weights, masks, seed)

    soup = merge.sparse_soup(dense, retrain=watched, sparsity=0.9, phases=3, copies=2, selector=selector)
    masks = soup.report.masks
    assert "32 of 320 weights kept" in str(soup.report) and torch.equal(soup.weights["0.weight"], soup["0.weight"])
    assert all(torch.equal(soup[k] != 0, m) for k, m in masks.items())
    density = sum(int(m.sum()) for m in masks.values()) / 320
    assert abs(density - 0.1) < 0.01
    for phase in range(3):  # one mask for all copies of a phase, each within the one before
        a, b = seen[2 * phase : 2 * phase + 2]
        assert all(torch.equal(a[k], b[k]) for k in a)
        kept = sum(int(m.sum()) for m in a.values()) / 320
        assert abs(kept - 0.1 ** ((phase + 1) / 3)) < 0.01
        if phase:
            assert all(not bool((a[k] & ~seen[2 * phase - 1][k]).any()) for k in a)
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())


def test_one_copy_is_iterative_magnitude_pruning() -> None:
    soup = merge.sparse_soup(net(), retrain=retrain, sparsity=0.8, phases=2, copies=1)
    weights = net().state_dict()
    for phase, seed in ((1, 0), (2, 1)):
        masks = merge.magnitude_masks(weights, sparsity=1 - 0.2 ** (phase / 2))
        weights = retrain({k: v * masks[k] if k in masks else v for k, v in weights.items()}, masks, seed)
    assert all(torch.equal(soup[k], weights[k]) for k in weights)


def test_retraining_that_grows_pruned_weights_is_refused() -> None:
    with pytest.raises(InputError, match=r"pruned entries of 0.weight are not zero"):
        merge.sparse_soup(net(), retrain=lambda w, m, s: {k: v + 1e-3 for k, v in w.items()}, sparsity=0.5)


def test_mixing_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = [{"w": torch.randn(3, 4, generator=generator, dtype=torch.float64)} for _ in range(4)]
    mean = merge.average(experts)["w"]
    assert all(torch.equal(a["w"], b["w"]) for a, b in zip(merge.mix_experts(experts, beta=0.0), experts, strict=True))
    assert all(torch.allclose(e["w"], mean, atol=1e-12) for e in merge.mix_experts(experts, beta=0.75))
    mixed = merge.mix_experts(experts, beta=0.1)
    assert torch.allclose(merge.average(mixed)["w"], mean, atol=1e-12)  # the mean does not move
    assert torch.allclose(mixed[0]["w"], 0.9 * experts[0]["w"] + 0.1 * sum(e["w"] for e in experts[1:]) / 3)
    assert torch.equal(merge.mix_experts(experts[:1], beta=0.5)[0]["w"], experts[0]["w"])
    with pytest.raises(InputError, match="beta"):
        merge.mix_experts(experts, beta=1.5)


def test_shares_out_of_range_are_refused() -> None:
    for sparsity in (-0.1, 1.0, 1.5):
        with pytest.raises(InputError, match="sparsity"):
            merge.sparse_soup(net(), retrain=retrain, sparsity=sparsity)
