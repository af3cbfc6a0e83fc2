"""How much variance merged networks keep: measured, predicted, planted, and mended."""

import math

import numpy as np
import pytest
import torch
from alignment_cases import CASES, digits
from torch import nn

import lmc
from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.landscape.variance import VarianceRatios, variance_ratios


@pytest.mark.parametrize("name", CASES)
def test_a_network_varies_as_much_as_itself(name: str):
    case = CASES[name]()
    found = variance_ratios(case.model, case.model, [case.model, case.model], case.inputs)
    weighted = [n for n, m in case.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert set(found.ratios) == set(weighted)
    assert all(ratio == pytest.approx(1.0) for ratio in found.ratios.values())


def test_variances_are_those_of_all_activations_at_once():
    case = CASES["cnn"]()
    a, b = case.other(1), case.other(2)
    middle = lmc.weights.lerp(a, b, 0.3)
    found = variance_ratios(case.model, middle, [a, b], case.inputs, batch_size=17)

    def first_layer(weights) -> np.ndarray:
        images = case.inputs.double()
        values = nn.functional.conv2d(
            images, weights["conv1.weight"].double(), weights["conv1.bias"].double(), padding=1
        )
        return values.transpose(0, 1).flatten(1).var(1, correction=0).numpy()

    np.testing.assert_allclose(found.merged["conv1"], first_layer(middle), rtol=1e-5)
    np.testing.assert_allclose(found.ends["conv1"], 0.5 * (first_layer(a) + first_layer(b)), rtol=1e-5)
    assert found.ratios["conv1"] == pytest.approx(first_layer(middle).sum() / found.ends["conv1"].sum(), rel=1e-5)


def test_scaling_a_layer_scales_its_variance_by_the_square():
    case = CASES["mlp"]()
    a = case.other(1)
    larger = a | {"fc1.weight": 3.0 * a["fc1.weight"]}
    assert variance_ratios(case.model, larger, [a], case.inputs).ratios["fc1"] == pytest.approx(9.0)


@pytest.mark.parametrize("name", ["resnet-bn", "resnet-ln"])
def test_layers_without_bias_are_read_behind_their_normalisation(name: str):
    case = CASES[name]()
    a = lmc.recalibrate_batchnorm(case.model, case.other(1), [case.inputs])
    norm = next(n for n in a if "norm" in n and n.endswith(".weight"))
    half = a | {norm: 0.5 * a[norm]}
    ratios = list(variance_ratios(case.model, half, [a], case.inputs).ratios.values())
    assert ratios[0] == pytest.approx(0.25)


def test_unrelated_units_lose_half_of_their_variance_and_repair_gives_it_back():
    case = CASES["mlp"]()
    a, b = case.other(1), case.other(2)
    repaired = lmc.repair(case.model, [a, b], case.inputs, progress=False)
    found = variance_ratios(case.model, repaired, [a, b], case.inputs)
    spread = {layer: np.sqrt(found.merged[layer]) for layer in ("fc1", "fc2")}
    for layer, merged in spread.items():
        ends = [np.sqrt(variance_ratios(case.model, x, [x], case.inputs).ends[layer]) for x in (a, b)]
        np.testing.assert_allclose(merged, 0.5 * (ends[0] + ends[1]), rtol=1e-4)
    collapsed = variance_ratios(case.model, lmc.weights.mean([a, b]), [a, b], case.inputs).ratios
    # Inputs are white, so the first layer's units of two networks are as unrelated as their weights.
    assert collapsed["fc1"] == pytest.approx(0.5, abs=0.15)


def test_the_variance_of_trained_networks_collapses_with_depth_and_less_once_aligned():
    trained = digits()
    a, b = trained.weights[:2]
    moved = lmc.weight_matching(trained.spec, a, b, progress=False).apply(b)
    naive, aligned, repaired = (
        list(variance_ratios(trained.model, merged, [a, other], trained.data).ratios.values())
        for merged, other in (
            (lmc.weights.mean([a, b]), b),
            (lmc.weights.mean([a, moved]), moved),
            (lmc.repair(trained.model, [a, moved], trained.data, progress=False), moved),
        )
    )
    assert naive == sorted(naive, reverse=True) and naive[-1] < 0.2
    assert all(n < x < r for n, x, r in zip(naive, aligned, repaired, strict=True))
    assert min(repaired[:-1]) > 0.9


def test_dead_layers_and_layers_that_are_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.twice(self.twice(x)))

    model = Twice()
    with torch.no_grad():
        model.last.weight.zero_()
    found = variance_ratios(model, model, [model], torch.randn(30, 4))
    assert found.ratios == {"twice": pytest.approx(1.0), "last": 1.0}


def test_it_prints_tabulates_and_plots():
    case = CASES["mlp"]()
    a, b = case.other(1), case.other(2)
    found = variance_ratios(case.model, lmc.weights.mean([a, b]), [a, b], case.inputs)
    healthy = variance_ratios(case.model, a, [a], case.inputs)
    assert f"fc1 {found.ratios['fc1']:.2f}, fc2" in repr(found)
    frame = found.to_frame()
    assert list(frame.columns) == ["layer", "channels", "merged", "ends", "ratio"]
    assert frame.channels.tolist() == [16, 10, 5] and frame.ratio.tolist() == list(found.ratios.values())
    figure = found.plot(healthy=healthy)
    assert [trace.name for trace in figure.data] == ["healthy", "merged"]
    assert list(figure.data[1].y) == list(found.ratios.values()) and list(figure.data[0].x) == ["fc1", "fc2", "head"]
    with pytest.raises(InputError, match="two results are called 'merged'"):
        found.plot(merged=healthy)
    with pytest.raises(InputError, match="same layers"):
        found.plot(other=VarianceRatios({}, {}))


def test_nothing_of_the_callers_changes():
    case = CASES["vgg-bn"]()
    case.model.train()
    a = case.other(1)
    kept = [{k: v.clone() for k, v in w.items()} for w in (a, case.model.state_dict())]
    variance_ratios(case.model, a, [a], case.inputs)
    for now, before in zip((a, case.model.state_dict()), kept, strict=True):
        assert all(torch.equal(now[k], before[k]) for k in before)
    assert case.model.training and not any(m._forward_hooks for m in case.model.modules())


def test_bad_input():
    case = CASES["mlp"]()
    a = case.other(1)
    with pytest.raises(InputError, match="at least one"):
        variance_ratios(case.model, a, [], case.inputs)
    with pytest.raises(MismatchError, match="fc1"):
        variance_ratios(case.model, a, [lmc.models.mlp(12, [17, 10], 5)], case.inputs)
    with pytest.raises(WeightsError, match=r"fc1.bias of ends\[0\]"):
        variance_ratios(case.model, a, [a | {"fc1.bias": torch.full((16,), math.nan)}], case.inputs)
    with pytest.raises(DataError, match="no examples"):
        variance_ratios(case.model, a, [a], iter([]))
