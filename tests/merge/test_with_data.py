"""Methods that look at data without labels: Fisher merging and RegMean, against closed forms and autograd loops."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from support import close, same
from torch import Tensor, nn

import lmc
import lmc.merge as merge
from lmc.errors import DataError, InputError, MismatchError


class Net(nn.Module):
    """Convolution, batch and layer norm, linear layers; small and in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        self.bn = nn.BatchNorm2d(3)
        self.fc1 = nn.Linear(12, 7)
        self.ln = nn.LayerNorm(7)
        self.fc2 = nn.Linear(7, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn(self.conv(x))).flatten(1)
        return self.fc2(self.ln(torch.relu(self.fc1(h))))


def inputs(seed: int, count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 4, 4, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def nets() -> tuple[Net, list[Net], list[Tensor]]:
    return Net(0), [Net(1), Net(2)], [inputs(1), inputs(2)]


# Fisher


def test_information_is_the_expected_squared_gradient_of_each_example(nets) -> None:
    net, _, (x, _) = nets
    x = x[:5]
    reference = copy.deepcopy(net).eval()
    expected = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    true = copy.deepcopy(expected)
    targets = torch.tensor([0, 1, 2, 3, 0])
    for example, target in zip(x, targets, strict=True):
        logs = reference(example[None])[0].log_softmax(0)
        for c in range(4):
            gradients = torch.autograd.grad(logs[c], list(reference.parameters()), retain_graph=True)
            for name, gradient in zip(expected, gradients, strict=True):
                expected[name] += float(logs[c].detach().exp()) * gradient**2 / 5
                true[name] += (c == target) * gradient**2 / 5
    assert close(merge.fisher_information(net, None, x), expected, 1e-8)
    assert close(merge.fisher_information(net, None, (x, targets), labels="true"), true, 1e-8)
    assert net.training and all(p.grad is None for p in net.parameters())
    batched = [(x[:2], targets[:2]), (x[2:], targets[2:])]
    assert close(merge.fisher_information(net, None, batched), expected, 1e-8)
    assert close(merge.fisher_information(net, None, SimpleNamespace(train=(x, targets), test=None)), expected, 1e-8)


def test_sampled_labels_agree_in_expectation(nets) -> None:
    net, _, (x, _) = nets
    expected = merge.fisher_information(net, None, x[:4])["fc2.weight"]
    draws = [merge.fisher_information(net, None, x[:4], labels="sampled", seed=s)["fc2.weight"] for s in range(200)]
    assert torch.allclose(torch.stack(draws).mean(0).mean(), expected.mean(), rtol=0.1)
    again = merge.fisher_information(net, None, x[:4], labels="sampled", seed=3)["fc2.weight"]
    assert torch.equal(again, draws[3])


def test_information_of_token_models_adds_up_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    tokens = torch.randint(5, (6, 3))
    found = merge.fisher_information(model, None, (tokens, tokens), labels="true")
    expected = torch.zeros(5, 4)
    for row in tokens:
        loss = nn.functional.cross_entropy(model(row), row, reduction="sum")
        expected += torch.autograd.grad(loss, model[1].weight)[0] ** 2 / 6
    assert torch.allclose(found["1.weight"], expected, atol=1e-6)
    with pytest.raises(DataError, match="sampled"):
        merge.fisher_information(model, None, tokens, labels="expected")


def test_networks_whose_course_depends_on_the_data_are_measured_one_example_at_a_time() -> None:
    class Branching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool((x < 1e9).all()) else x

    torch.manual_seed(0)
    model, x = Branching(5, 3), torch.randn(7, 5)
    plain = nn.Linear(5, 3)
    plain.load_state_dict(model.state_dict())
    found, expected = merge.fisher_information(model, None, x), merge.fisher_information(plain, None, x)
    assert close(found, expected, 1e-6)


def test_equal_information_gives_the_weighted_mean(nets) -> None:
    _, models, _ = nets
    equal = {name: torch.full_like(p, 0.3) for name, p in models[0].named_parameters()}
    result = merge.fisher_weighted(models, [equal, equal], weights=[1.0, 3.0])
    expected = merge.average(models, weights=[1.0, 3.0])
    assert close(result, expected)
    twice = {name: 2 * f for name, f in equal.items()}
    assert close(
        merge.fisher_weighted(models, [twice, equal]), merge.fisher_weighted(models, [equal, equal], weights=[2, 1])
    )
    assert close(merge.fisher_weighted(models, [twice, equal], normalize=True), merge.average(models))


def test_fisher_is_exact_for_diagonal_quadratics() -> None:
    generator = torch.Generator().manual_seed(0)
    minima = [{"w": torch.randn(6, generator=generator, dtype=torch.float64)} for _ in range(3)]
    curvatures = [{"w": torch.rand(6, generator=generator, dtype=torch.float64) + 0.1} for _ in range(3)]

    def gradient(w: Tensor) -> Tensor:
        return sum(h["w"] * (w - m["w"]) for h, m in zip(curvatures, minima, strict=True))

    assert gradient(merge.fisher_weighted(minima, iter(curvatures))["w"]).abs().max() < 1e-12
    assert gradient(merge.average(minima)["w"]).abs().max() > 0.1


def test_floor_and_entries_without_information(nets) -> None:
    _, models, _ = nets
    zero = {name: torch.zeros_like(p) for name, p in models[0].named_parameters()}
    for floor in (1e-6, 0.0):
        assert close(merge.fisher_weighted(models, [zero, zero], floor=floor), merge.average(models))
    only = merge.fisher_weighted(models, [{"fc1.bias": torch.ones(7)}, {"fc1.bias": torch.zeros(7)}], floor=0.0)
    assert torch.allclose(only["fc1.bias"], models[0].fc1.bias) and close(
        {"w": only["fc2.weight"]}, {"w": merge.average(models)["fc2.weight"]}
    )
    with pytest.raises(MismatchError, match=r"informations\[1\]: fc1.bias"):
        merge.fisher_weighted(models, [zero, {"fc1.bias": torch.ones(8)}])


def test_fisher_of_one_or_equal_models(nets) -> None:
    net, (a, _), (x, y) = nets
    assert same(merge.fisher(net, [a], [x]), a.state_dict())
    assert same(merge.fisher(net, [a, a, a], [x, y, x]), a.state_dict())


def test_fisher_merges_what_each_model_needs() -> None:
    """Two linear classifiers that look at different features: their Fisher merge keeps both, their mean halves them."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(8, 2, bias=False)
    data, models = [], []
    for part in (slice(0, 4), slice(4, 8)):
        x = torch.zeros(300, 8)
        x[:, part] = torch.randn(300, 4, generator=generator)
        weight = torch.zeros(2, 8)
        weight[1, part] = torch.tensor([1.0, -1.0, 0.5, 2.0])
        data.append(x)
        models.append({"weight": weight})
    merged = merge.fisher(model, models, data, samples=300)["weight"]
    for m in models:
        used = m["weight"] != 0
        assert torch.allclose(merged[used], m["weight"][used], rtol=0.01)


def each_gradient(net: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """For every example and output the gradient of that output."""
    return [
        list(torch.autograd.grad(value, list(net.parameters()), retain_graph=True))
        for example in x
        for value in net(example[None])[0]
    ]


@pytest.mark.parametrize("outputs", [1, 3])
def test_information_of_regression_and_of_logits_of_their_own(outputs: int) -> None:
    """Gaussian: the Gauss-Newton diagonal; Bernoulli: p (1 - p) times it; true labels: squared residuals."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    goal, yes = torch.randn(6, outputs, dtype=torch.float64), torch.randint(0, 2, (6, outputs))
    gradients, f = each_gradient(net, x), net(x).detach()
    p = f.sigmoid()

    def total(shares: Tensor, together: bool = False) -> dict[str, Tensor]:
        columns = [torch.stack(g).unflatten(0, (6, outputs)) for g in zip(*gradients, strict=True)]
        shaped = [torch.einsum("nc,nc...->nc...", shares, g) for g in columns]
        squares = [(g.sum(1) if together else g).square() for g in shaped]
        return {
            name: s.flatten(0, -1 - parameter.ndim).sum(0) / 6
            for s, (name, parameter) in zip(squares, net.named_parameters(), strict=True)
        }

    information = merge.fisher_information
    assert close(information(net, None, (x, goal)), total(torch.ones_like(f)), 1e-10)
    assert close(information(net, None, (x, goal), labels="true"), total(goal - f, together=True), 1e-10)
    told = information(net, None, x, likelihood="bernoulli")
    assert close(told, total((p * (1 - p)).sqrt()), 1e-10)
    true = information(net, None, (x, yes), labels="true", likelihood="bernoulli")
    assert close(true, total(yes - p, together=True), 1e-10)
    for likelihood in ("bernoulli", "gaussian"):
        expected = information(net, None, x, likelihood=likelihood)["0.weight"]
        options = {"labels": "sampled", "likelihood": likelihood}
        draws = [information(net, None, x, seed=seed, **options)["0.weight"] for seed in range(300)]
        assert torch.allclose(torch.stack(draws).mean(0), expected, rtol=0.5, atol=0.1 * float(expected.max()))
    if outputs == 1:
        assert close(information(net, None, (x, yes[:, 0])), told, 1e-12)
        assert close(information(net, None, (x, goal[:, 0]), labels="true"), total(goal - f), 1e-10)


def test_a_single_output_is_not_taken_for_a_class() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(3, 1) for _ in range(2)]
    x = torch.randn(8, 3)
    for options in ({}, {"likelihood": "categorical"}):
        with pytest.raises(DataError, match="likelihood="):
            merge.fisher(models[0], models, [x, x], **options)
    with pytest.raises(InputError, match="likelihood must be"):
        merge.fisher(models[0], models, [x, x], likelihood="poisson")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="have one class"):
        merge.adamerging(models[0], models, [x, x], base=models[0], steps=1)
    wide = merge.fisher(models[0], models, [x, 3 * x], likelihood="gaussian")
    assert not close(wide, merge.average(models), 1e-3)


def test_bad_data_is_named(nets) -> None:
    net, models, (x, y) = nets
    for method in (merge.fisher, merge.regmean):
        with pytest.raises(InputError, match="one data set for each of the 2 models"):
            method(net, models, x)
        with pytest.raises(InputError, match="one data set"):
            method(net, models, [x])
        with pytest.raises(DataError):
            method(net, models, [x, x[:0]])
    with pytest.raises(InputError, match="labels"):
        merge.fisher(net, models, [x, y], labels="exact")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="targets"):
        merge.fisher(net, models, [x, y], labels="true")
    with pytest.raises(InputError, match="shrink"):
        merge.regmean(net, models, [x, y], shrink=1.5)


# RegMean


@pytest.mark.parametrize("method", [merge.regmean, merge.regmean_plus_plus])
def test_regmean_of_one_or_equal_models(method, nets) -> None:
    net, (a, _), (x, y) = nets
    for models, data in (([a], [x]), ([a, a], [x, y])):
        assert close(method(net, models, data), a.state_dict(), 1e-12)
    assert same(method(net, [a], [x]), a.state_dict())


@pytest.mark.parametrize("shrink", [0.0, 0.9, 1.0])
def test_regmean_is_the_closed_form_and_the_least_squares_solution(shrink: float) -> None:
    torch.manual_seed(0)
    model, models = nn.Linear(6, 3).double(), [nn.Linear(6, 3).double() for _ in range(3)]
    data = [torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) for _ in range(3)]
    found = merge.regmean(model, models, data, shrink=shrink)
    grams = [x.T @ x for x in data]
    grams = [shrink * g + (1 - shrink) * torch.diag(g.diagonal()) for g in grams]
    sides = sum(g @ m.weight.detach().T for g, m in zip(grams, models, strict=True))
    assert torch.allclose(found["weight"], torch.linalg.solve(sum(grams), sides).T, atol=1e-10)
    assert torch.allclose(found["bias"], torch.stack([m.bias.detach() for m in models]).mean(0))
    if shrink == 1.0:
        answers = torch.cat([x @ m.weight.detach().T for x, m in zip(data, models, strict=True)])
        fit = torch.linalg.lstsq(torch.cat(data), answers).solution
        assert torch.allclose(found["weight"], fit.T, atol=1e-10)
    if shrink == 0.0:
        weights = torch.stack([x.square().sum(0) for x in data])
        mean = torch.einsum("ti,toi->oi", weights, torch.stack([m.weight.detach() for m in models])) / weights.sum(0)
        assert torch.allclose(found["weight"], mean, atol=1e-10)


def test_equal_grams_give_the_average(nets) -> None:
    net, models, (x, _) = nets
    found = merge.regmean(net, models, [x, x])
    average = merge.average(models)
    assert torch.allclose(found["conv.weight"], average["conv.weight"], atol=1e-12)  # the same inputs for both
    assert not torch.allclose(found["fc2.weight"], average["fc2.weight"], atol=1e-3)
    assert found.report.fitted == ("conv.weight", "fc1.weight", "fc2.weight") and "ln.weight" in found.report.averaged


@pytest.mark.parametrize("dims", [1, 2])
def test_a_convolution_is_fitted_over_its_patches(dims: int) -> None:
    torch.manual_seed(0)
    kind, apply = [(nn.Conv1d, nn.functional.conv1d), (nn.Conv2d, nn.functional.conv2d)][dims - 1]
    model = kind(2, 3, 3, padding=1, stride=2, dilation=2, bias=False).double()
    models = [copy.deepcopy(model) for _ in range(2)]
    for m in models:
        nn.init.normal_(m.weight)
    shape = (30, 2, *[8] * dims)
    data = [torch.randn(shape, dtype=torch.float64) * torch.rand(shape, dtype=torch.float64) for _ in range(2)]
    found = merge.regmean(model, models, data, shrink=1.0)["weight"]

    def mismatch(weight: Tensor) -> Tensor:
        parts = []
        for m, x in zip(models, data, strict=True):
            outputs = apply(x, weight, padding=1, stride=2, dilation=2)
            parts.append((outputs - m(x).detach()).square().sum())
        return torch.stack(parts).sum()

    probe = found.clone().requires_grad_()
    assert torch.autograd.grad(mismatch(probe), probe)[0].abs().max() < 1e-8


def test_the_transposed_linear_layer_of_gpt2_is_fitted_too() -> None:
    class Conv1D(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.T.contiguous())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    torch.manual_seed(0)
    plain = [nn.Linear(6, 3, bias=False).double() for _ in range(2)]
    data = [torch.randn(30, 4, 6).double() * torch.rand(6).double() for _ in range(2)]
    transposed = [Conv1D(m.weight.detach()) for m in plain]
    for method in (merge.regmean, merge.regmean_plus_plus):
        found, expected = method(transposed[0], transposed, data), method(plain[0], plain, data)
        assert torch.allclose(found["weight"].T, expected["weight"], atol=1e-12) and found.report.fitted == ("weight",)


def test_features_that_are_never_active_keep_the_average() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(5, 2) for _ in range(2)]
    data = [torch.randn(30, 5) for _ in range(2)]
    for x in data:
        x[:, 3] = 0.0
    found = merge.regmean(nn.Linear(5, 2), models, data, shrink=1.0)
    assert torch.isfinite(found["weight"]).all()
    assert torch.allclose(found["weight"][:, 3], merge.average(models)["weight"][:, 3], atol=1e-6)


def test_fewer_rows_than_inputs_leave_the_rest_at_the_average() -> None:
    """In float32: what no row reaches is not moved by rounding, and what the rows reach is fitted exactly."""
    torch.manual_seed(0)
    models = [nn.Linear(64, 3, bias=False) for _ in range(2)]
    data = [torch.randn(7, 64) for _ in range(2)]
    found = merge.regmean(models[0], models, data, shrink=1.0)["weight"].double()
    average = merge.average(models)["weight"].double()
    seen = torch.cat(data).double()
    outside = torch.eye(64).double() - torch.linalg.pinv(seen) @ seen
    assert ((found - average) @ outside).abs().max() < 1e-5
    for model, x in zip(models, data, strict=True):
        assert torch.allclose(x.double() @ found.T, model(x).detach().double(), atol=1e-4)


def test_regmean_is_exact_for_tasks_on_orthogonal_features() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(8, 3, bias=False).double() for _ in range(2)]
    data = [torch.zeros(40, 8, dtype=torch.float64) for _ in range(2)]
    data[0][:, :4], data[1][:, 4:] = torch.randn(40, 4).double(), torch.randn(40, 4).double()
    found = merge.regmean(models[0], models, data)["weight"]
    for m, x in zip(models, data, strict=True):
        assert torch.allclose(x @ found.T, m(x).detach(), atol=1e-10)


def test_plus_plus_takes_the_inputs_of_the_merged_network(nets) -> None:
    net, models, data = nets
    plain, plus = merge.regmean(net, models, data), merge.regmean_plus_plus(net, models, data)
    assert torch.allclose(plain["conv.weight"], plus["conv.weight"], atol=1e-12)  # the first layer sees the same
    prefix = copy.deepcopy(net).eval()
    prefix.load_state_dict(plus)
    seen = [torch.relu(prefix.bn(prefix.conv(x))).flatten(1).detach() for x in data]
    grams = [0.9 * h.T @ h + 0.1 * torch.diag(h.square().sum(0)) for h in seen]
    sides = sum(g @ m.fc1.weight.detach().T for g, m in zip(grams, models, strict=True))
    assert torch.allclose(plus["fc1.weight"], torch.linalg.solve(sum(grams), sides).T, atol=1e-8)
    assert not torch.allclose(plain["fc1.weight"], plus["fc1.weight"], atol=1e-3)


def test_shared_and_tied_layers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.out = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.mix(torch.relu(self.mix(self.embed(tokens)))))

    torch.manual_seed(0)
    models, data = [Twice() for _ in range(2)], [torch.randint(7, (20, 3)) for _ in range(2)]
    for method in (merge.regmean, merge.regmean_plus_plus):
        found = method(models[0], models, data)
        assert found.report.fitted == ("mix.weight",)
        assert torch.equal(found["embed.weight"], merge.average(models)["embed.weight"])
        assert found["out.weight"] is found["embed.weight"]


@pytest.mark.parametrize("method", [merge.fisher, merge.regmean, merge.regmean_plus_plus])
def test_nothing_of_the_caller_is_touched(method, nets) -> None:
    net, models, data = nets
    everything = [net, *models]
    before = [copy.deepcopy(m.state_dict()) for m in everything]
    state = torch.get_rng_state()
    merged = method(net, models, data)
    assert torch.equal(state, torch.get_rng_state())
    assert all(same(a, m.state_dict()) and m.training for a, m in zip(before, everything, strict=True))
    assert not any(m._forward_pre_hooks for module in everything for m in module.modules())
    assert math.isfinite(float(sum(v.double().sum() for v in merged.values())))
    assert torch.allclose(merged["bn.running_var"], torch.stack([m.bn.running_var for m in models]).mean(0))


def test_information_of_pixels_leaves_out_what_does_not_count() -> None:
    draw = torch.Generator().manual_seed(0)
    model = nn.Conv2d(2, 3, 1)
    images, masks = torch.randn(5, 2, 3, 4, generator=draw), torch.randint(3, (5, 3, 4), generator=draw)
    masks[0], masks[1, :2] = 255, 255
    task = lmc.Task.segmentation()
    found = merge.fisher_information(model, None, task.on((images, masks)), labels="true")
    expected = torch.zeros_like(model.weight)
    for image, mask in zip(images[1:], masks[1:], strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), mask[None], ignore_index=255, reduction="sum")
        expected += torch.autograd.grad(loss, model.weight)[0] ** 2 / 4
    assert torch.allclose(found["weight"], expected, atol=1e-6)
    # what stands at places that do not count makes no difference, nor to drawn labels, which classes first must not mislead
    other = images.where((masks != 255)[:, None], torch.randn(images.shape, generator=draw))
    for labels in ("true", None):
        one, two = (merge.fisher_information(model, None, task.on((x, masks)), labels=labels) for x in (images, other))
        assert torch.allclose(one["weight"], two["weight"], atol=1e-6)
    with pytest.raises(DataError, match="which axis holds the classes"):
        merge.fisher_information(model, None, images)


def test_information_of_independent_labels_is_that_of_their_task() -> None:
    draw = torch.Generator().manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(9, 4, generator=draw)
    yes = (torch.randn(9, 3, generator=draw) > 0).float()
    found = merge.fisher_information(model, None, lmc.Task.binary().on((x, yes)))
    p = model(x).sigmoid()
    assert torch.allclose(found["bias"], (p * (1 - p)).mean(0), atol=1e-6)
    assert torch.allclose(found["weight"], (p * (1 - p)).T @ x.square() / 9, atol=1e-6)


class Nodes(nn.Module):
    """Sums over neighbours, then a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return self.lin(x.index_add(0, edge_index[1], x[edge_index[0]]))


def test_one_graph_is_an_example_for_every_method() -> None:
    draw = torch.Generator().manual_seed(0)
    x, edges = torch.randn(7, 3, generator=draw), torch.randint(7, (2, 12), generator=draw)
    y = torch.randint(2, (7,), generator=draw)
    mask = torch.arange(7) % 2 == 0
    graph = SimpleNamespace(x=x, edge_index=edges, y=y, train_mask=mask, val_mask=None, test_mask=~mask)
    models = [Nodes(), Nodes()]
    found = merge.fisher_information(models[0], None, graph, labels="true")
    loss = nn.functional.cross_entropy(models[0](x, edges), y, reduction="none")
    rows = [torch.autograd.grad(loss[n], models[0].lin.weight, retain_graph=True)[0] ** 2 for n in range(7) if mask[n]]
    assert torch.allclose(found["lin.weight"], torch.stack(rows).mean(0), atol=1e-6)
    merged = merge.regmean(models[0], models, [graph, graph], progress=False)
    gathered = (x.index_add(0, edges[1], x[edges[0]])).double()
    gram = gathered.T @ gathered
    gram = 0.9 * gram + 0.1 * torch.diag(gram.diag())
    sums = [gram @ m.lin.weight.double().T for m in models]
    assert torch.allclose(merged["lin.weight"].double(), torch.linalg.solve(2 * gram, sum(sums)).T, atol=1e-5)
    soup = merge.greedy_soup(models[0], models, graph, progress=False)
    best = min(nn.functional.cross_entropy(m(x, edges)[mask], y[mask]).item() for m in models)
    alone = [
        row.score
        for row in merge.greedy_soup(models[0], models, graph, metric="loss", progress=False).report.ingredients
    ]
    assert min(alone) == pytest.approx(best, rel=1e-5) and soup
    spec = lmc.permutation_spec(models[0], graph, progress=False)
    assert spec.certificate is not None
    methods = ["average", "adamerging", "regmean", "fisher"]
    compared = merge.compare(
        models[0], models, graph, base=Nodes(), data=[graph, graph], methods=methods, progress=False
    )
    assert set(methods) <= set(compared.to_frame().index)


def test_unlabelled_batches_serve_methods_that_need_no_labels() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=draw)
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    whole = merge.regmean(models[0], models, [x, x], progress=False)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=5)
    for given in (loader, [x[:5], x[5:]], iter([x[:5], x[5:]])):
        found = merge.regmean(models[0], models, [given, x], progress=False)
        assert all(torch.allclose(found[name], whole[name], atol=1e-6) for name in whole)


class Pair(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c, self.aside = nn.Linear(3, 5), nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(x) + self.b(z))
        return self.c(h), self.aside(h)


def test_inputs_without_targets_are_told_from_pairs() -> None:
    """Two tensors are inputs where the module takes two, a list of equally shaped ones is a list of batches."""
    models, task = [Pair(0), Pair(1)], lmc.Task(outputs=0)
    x, z = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(48.0).view(12, 4) / 48
    whole = merge.fisher(models[0], models, [task.on({"x": x, "z": z})] * 2, progress=False)
    for data in ((x, z), [(x[:5], z[:5]), (x[5:], z[5:])], [[x[:6], z[:6]], [x[6:], z[6:]]]):
        assert close(merge.fisher(models[0], models, [task.on(data)] * 2, progress=False), whole, 1e-6)
    plain = [nn.Linear(3, 2), nn.Linear(3, 2)]
    whole = merge.fisher(plain[0], plain, [x, x], progress=False)
    for size in (4, 6):
        assert close(merge.fisher(plain[0], plain, [list(x.split(size))] * 2, progress=False), whole, 1e-6)
    with pytest.raises(InputError, match="a single pair"):
        merge.fisher(plain[0], plain, (x, torch.zeros(12, dtype=torch.long)), progress=False)


def test_adamerging_takes_the_outputs_that_its_data_name() -> None:
    models, base = [Pair(0), Pair(1)], Pair(2)
    data = {"x": torch.randn(12, 3), "z": torch.randn(12, 4)}
    with pytest.raises(InputError, match=r"lmc.Task\(outputs=...\).on\(data\)"):
        merge.adamerging(models[0], models, [data, data], base=base, steps=1, progress=False)
    judged = lmc.Task(outputs=0).on(data)
    found = merge.adamerging(models[0], models, [judged, judged], base=base, steps=1, progress=False)
    assert found.report.predicted and len(found.report.predicted[0]) == 2
