import numpy as np
import pytest
import torch
from alignment_cases import CASES, digits
from torch import nn

import lmc
from lmc.errors import DataError, InputError, MismatchError, WeightsError
from lmc.models.mlp import mlp
from lmc.network.batchnorm import recalibrate_batchnorm
from lmc.network.network import Network
from lmc.network.repair import Renormalizer, repair

METHODS = ("passes", "closed_form")


def outputs(case, weights) -> torch.Tensor:
    with torch.no_grad():
        return torch.func.functional_call(case.model, weights, case.inputs)


def statistics(case, weights) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and deviation of the output of every linear and convolutional layer, by plain hooks."""
    found = {}

    def note(name: str, channel: int):
        def hook(_module, _args, output):
            values = output.movedim(channel, 0).flatten(1).double()
            found[name] = (values.mean(1).numpy(), values.std(1, correction=0).numpy())

        return hook

    hooks = [
        module.register_forward_hook(note(name, -1 if isinstance(module, nn.Linear) else 1))
        for name, module in case.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    outputs(case, weights)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_equal_networks_stay_as_they_are(name: str, method: str):
    case = CASES[name]()
    a = recalibrate_batchnorm(case.model, None, [case.inputs])
    found = repair(case.model, [a, a], case.inputs, method=method, progress=False)
    expected = outputs(case, a)
    # Batch norm divides by the biased variance of a batch, and keeps the unbiased one.
    tolerance = 0.02 if name.endswith("-bn") else 1e-4
    assert (outputs(case, found) - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_share_of_one_gives_that_network_back(method: str):
    case = CASES["cnn"]()
    a, b = case.other(1), case.other(2)
    for shares, expected in (((1.0, 0.0), a), ((0.0, 1.0), b)):
        found = repair(case.model, [a, b], case.inputs, shares, method=method, progress=False)
        assert all(torch.equal(found[k], v) for k, v in expected.items())


@pytest.mark.parametrize("alpha", [0.5, 0.2])
@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_the_statistics_become_the_averaged_ones(name: str, alpha: float):
    case = CASES[name]()
    a, b = case.other(1), case.other(2)
    found = repair(case.model, [a, b], case.inputs, (1 - alpha, alpha), progress=False)
    ours, of_a, of_b = (statistics(case, weights) for weights in (found, a, b))
    layers = Renormalizer(Network(case.model, torch.device("cpu")), [a, b], case.inputs).layers
    assert "head" not in layers and len(layers) >= 2
    for layer in layers:
        center = (1 - alpha) * of_a[layer][0] + alpha * of_b[layer][0]
        spread = (1 - alpha) * of_a[layer][1] + alpha * of_b[layer][1]
        np.testing.assert_allclose(ours[layer][1], spread, rtol=1e-4)
        np.testing.assert_allclose(ours[layer][0], center, atol=1e-4 * spread.mean())


def test_in_several_batches_the_statistics_come_close():
    case = CASES["mlp"]()
    a, b = case.other(1), case.other(2)
    found = repair(case.model, [a, b], case.inputs, batch_size=50, progress=False)
    ours, of_a, of_b = (statistics(case, weights) for weights in (found, a, b))
    for layer in ("fc1", "fc2"):
        np.testing.assert_allclose(ours[layer][1], 0.5 * (of_a[layer][1] + of_b[layer][1]), rtol=0.15)
        assert np.abs(ours[layer][1] / (0.5 * (of_a[layer][1] + of_b[layer][1])) - 1).mean() < 0.04


def test_both_methods_agree_in_the_first_layer_which_is_exact():
    case = CASES["cnn"]()
    a, b = case.other(1), case.other(2)
    passes, closed = (repair(case.model, [a, b], case.inputs, method=m, progress=False) for m in METHODS)
    torch.testing.assert_close(closed["conv1.weight"], passes["conv1.weight"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(closed["conv1.bias"], passes["conv1.bias"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(closed["conv2.weight"], passes["conv2.weight"], rtol=1e-3)


def test_the_variance_of_an_average_follows_from_those_of_its_parts():
    case = CASES["mlp"]()
    a, b = case.other(1), case.other(2)
    one, other = statistics(case, a)["fc1"], statistics(case, b)["fc1"]
    values = [case.inputs.double() @ w["fc1.weight"].double().T + w["fc1.bias"] for w in (a, b)]
    rho = np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(values[0].T, values[1].T, strict=True)])
    alpha = 0.3
    expected = (0.7 * one[1]) ** 2 + (0.3 * other[1]) ** 2 + 2 * alpha * (1 - alpha) * rho * one[1] * other[1]
    merged = statistics(case, lmc.weights.lerp(a, b, alpha))["fc1"]
    np.testing.assert_allclose(merged[1] ** 2, expected, rtol=1e-5)
    renormalizer = Renormalizer(Network(case.model, torch.device("cpu")), [a, b], case.inputs, "closed_form")
    scale, _, _ = renormalizer._endpoints[0][0].closed_form((1 - alpha, alpha))
    np.testing.assert_allclose(scale, (0.7 * one[1] + 0.3 * other[1]) / np.sqrt(expected), rtol=1e-5)


def test_with_batch_norm_alone_only_its_statistics_change():
    case = CASES["resnet-bn"]()
    a, b = case.other(1), case.other(2)
    found = repair(case.model, [a, b], case.inputs, progress=False)
    expected = recalibrate_batchnorm(case.model, lmc.weights.lerp(a, b, 0.5), [case.inputs])
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_batch_norm_and_biased_layers_together():
    case = CASES["vgg-bn"]()
    a, b = case.other(1), case.other(2)
    found = repair(case.model, [a, b], case.inputs, progress=False)
    spread = [statistics(case, weights)["fc"][1] for weights in (found, a, b)]
    np.testing.assert_allclose(spread[0], 0.5 * (spread[1] + spread[2]), rtol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_an_average_of_unaligned_networks_works_again(method: str):
    trained = digits()
    models = trained.weights[:2]
    middle = lmc.weights.mean(models)
    images, labels = trained.data.test

    def accuracy(weights) -> float:
        with torch.no_grad():
            return float(
                (torch.func.functional_call(trained.model, weights, images).argmax(1) == labels).float().mean()
            )

    repaired = repair(trained.model, models, trained.data, method=method, progress=False)
    assert accuracy(repaired) > accuracy(middle) + 0.2


def test_three_networks_and_batches():
    case = CASES["mlp"]()
    models = [case.other(seed) for seed in range(3)]
    whole = repair(case.model, models, case.inputs, (0.5, 0.3, 0.2), progress=False)
    data = iter([(case.inputs, case.targets)])
    assert all(
        torch.equal(whole[k], v) for k, v in repair(case.model, models, data, (0.5, 0.3, 0.2), progress=False).items()
    )
    spread = [statistics(case, w)["fc2"][1] for w in (whole, *models)]
    np.testing.assert_allclose(spread[0], 0.5 * spread[1] + 0.3 * spread[2] + 0.2 * spread[3], rtol=1e-4)


def test_dead_channels_are_left_alone():
    case = CASES["mlp"]()
    a, b = dict(case.other(1)), dict(case.other(2))
    for weights in (a, b):
        weights["fc1.weight"] = weights["fc1.weight"].clone()
        weights["fc1.weight"][:3] = 0.0
    found = repair(case.model, [a, b], case.inputs, progress=False)
    assert torch.equal(found["fc1.weight"][:3], torch.zeros(3, 12))
    torch.testing.assert_close(found["fc1.bias"][:3], 0.5 * (a["fc1.bias"] + b["fc1.bias"])[:3])
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_layers_that_are_shared_or_called_twice_are_left_out():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice, self.tied, self.copy = (nn.Linear(4, 4) for _ in range(4))
            self.copy.weight = self.tied.weight
            self.plain, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

        def forward(self, x):
            x = torch.tanh(self.twice(self.twice(self.first(x))))
            return self.last(self.plain(self.copy(self.tied(x))))

    model = Odd()
    state = model.state_dict()
    assert Renormalizer(Network(model, torch.device("cpu")), [state, state], torch.randn(9, 4)).layers == ["first"]


def test_layers_may_be_called_by_keyword():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.norm, self.last = nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.norm(input=self.plain(input=x)))

    model = Keywords()
    states = [model.state_dict(), Keywords().state_dict()]
    assert Renormalizer(Network(model, torch.device("cpu")), states, torch.randn(9, 4)).layers == ["norm"]


def test_without_biases_the_normalisation_behind_is_repaired():
    case = CASES["resnet-ln"]()
    a, b = case.other(1), case.other(2)
    renormalizer = Renormalizer(Network(case.model, torch.device("cpu")), [a, b], case.inputs)
    assert len(renormalizer.layers) == 21 and all("norm" in name for name in renormalizer.layers)
    found = renormalizer((0.5, 0.5))
    name = renormalizer.layers[-1]
    seen = []
    for weights in (found, a, b):
        module = case.model.get_submodule(name)
        hook = module.register_forward_hook(lambda _m, _a, output: seen.append(output.transpose(0, 1).flatten(1)))
        outputs(case, weights)
        hook.remove()
    torch.testing.assert_close(seen[0].std(1), 0.5 * (seen[1].std(1) + seen[2].std(1)), rtol=1e-3, atol=0)
    torch.testing.assert_close(seen[0].mean(1), 0.5 * (seen[1].mean(1) + seen[2].mean(1)), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.InstanceNorm1d(6, affine=True), nn.BatchNorm1d(6)]
)
def test_only_normalisations_that_scale_and_shift_each_channel_count(norm: nn.Module):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.last = nn.Conv1d(2, 6, 3, bias=False), norm, nn.Linear(6, 3)
            self.rest = nn.LayerNorm(6, elementwise_affine=False)

        def forward(self, x):
            x = self.layer(x)
            x = self.norm(x.mT).mT if isinstance(self.norm, nn.LayerNorm) else self.norm(x)
            return self.last(self.rest(x.mean(2)))

    model = Net()
    state = model.state_dict()
    layers = Renormalizer(Network(model, torch.device("cpu")), [state, state], torch.randn(9, 2, 7)).layers
    assert layers == ([] if isinstance(norm, nn.BatchNorm1d) else ["norm"])


def test_in_place_layers_and_float64():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)).double()
    images = torch.randn(40, 1, 4, 4, dtype=torch.float64)
    a, b = ({k: torch.randn_like(v) for k, v in model.state_dict().items()} for _ in range(2))
    found = repair(model, [a, b], images, progress=False)

    def spread(w):
        return nn.functional.conv2d(images, w["0.weight"], w["0.bias"]).transpose(0, 1).flatten(1).std(1, correction=0)

    torch.testing.assert_close(spread(found), 0.5 * (spread(a) + spread(b)), rtol=1e-9, atol=0)


def test_nothing_of_the_callers_changes():
    case = CASES["vgg-bn"]()
    case.model.train()
    a, b = case.other(1), case.other(2)
    kept = [{k: v.clone() for k, v in w.items()} for w in (a, b, case.model.state_dict())]
    repair(case.model, [a, b], case.inputs, progress=False)
    for now, before in zip((a, b, case.model.state_dict()), kept, strict=True):
        assert all(torch.equal(now[k], before[k]) for k in before)
    assert case.model.training and not any(m._forward_hooks for m in case.model.modules())


def test_bad_input():
    case = CASES["mlp"]()
    a, b = case.other(1), case.other(2)
    with pytest.raises(InputError, match="method='exact'"):
        repair(case.model, [a, b], case.inputs, method="exact")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no models"):
        repair(case.model, [], case.inputs)
    with pytest.raises(InputError, match="sum to 0.9"):
        repair(case.model, [a, b], case.inputs, (0.5, 0.4))
    with pytest.raises(MismatchError, match="fc1"):
        repair(case.model, [a, mlp(12, [17, 10], 5)], case.inputs)
    with pytest.raises(WeightsError, match=r"of models\[1\]"):
        repair(case.model, [a, b | {"fc1.bias": torch.full((16,), torch.nan)}], case.inputs)
    with pytest.raises(DataError, match="no examples"):
        repair(case.model, [a, b], iter([]))
