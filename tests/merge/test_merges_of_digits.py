"""End to end: four tasks of digits, fine-tuned from one base, merged by every method; what is sure to hold."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lmc.merge as merge

Pair = tuple[Tensor, Tensor]
TASKS = ([0, 1, 2], [3, 4, 5], [6, 7], [8, 9])
SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)


class Bench:
    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))

        def task(index: Tensor, classes: list[int]) -> Pair:
            index = index[torch.isin(y[index], torch.tensor(classes))]
            return x[index], y[index]

        self.train, self.validation, self.test = (
            [task(index, classes) for classes in TASKS] for index in (order[:900], order[900:1300], order[1300:])
        )
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10))
        self.base = self.fit(net, (x[order[:100]], y[order[:100]]), 60, 3e-3, seed)
        self.models = [self.fit(self.base, part, 100, 1e-3, t) for t, part in enumerate(self.train)]
        self.inputs = [part[0] for part in self.train]

    @staticmethod
    def fit(model: nn.Module, data: Pair, steps: int, lr: float, seed: int) -> nn.Module:
        model = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for _ in range(steps):
            index = torch.randint(len(data[1]), (64,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[0][index]), data[1][index]).backward()
            optimizer.step()
        return model.eval()

    def accuracies(self, weights: dict[str, Tensor], parts: list[Pair]) -> list[float]:
        outputs = [torch.func.functional_call(self.base, weights, (x,)) for x, _ in parts]
        return [float((o.argmax(1) == y).float().mean()) for o, (_, y) in zip(outputs, parts, strict=True)]

    def mean(self, weights: dict[str, Tensor], parts: list[Pair] | None = None) -> float:
        return sum(self.accuracies(weights, parts or self.test)) / len(TASKS)


@pytest.fixture(scope="module", params=[0, 1])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


ON_BASE = {
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "dare": {},
    "della": {},
    "breadcrumbs": {"density": 0.5},
    "pcb": {},
    "consensus": {},
    "lines": {"blocks": ["0", "2", "4"], "beta": 0.5},
}


@pytest.mark.parametrize("name", ON_BASE)
def test_a_tuned_scale_keeps_the_base_and_beats_every_specialist(name: str, bench: Bench) -> None:
    method = getattr(merge, name)
    tried = [method(bench.models, base=bench.base, scale=s, **ON_BASE[name]) for s in SCALES]
    best = max(tried, key=lambda weights: bench.mean(weights, bench.validation))
    specialists = [bench.mean(m.state_dict()) for m in bench.models]
    assert bench.mean(best) > max(specialists) + 0.4
    assert bench.mean(best) > bench.mean(bench.base.state_dict()) - 0.02


def test_regression_on_activations_beats_averaging_which_beats_every_specialist(bench: Bench) -> None:
    average = bench.mean(merge.average(bench.models))
    assert average > max(bench.mean(m.state_dict()) for m in bench.models) + 0.4
    for method in (merge.regmean, merge.regmean_plus_plus):
        assert bench.mean(method(bench.base, bench.models, bench.inputs, progress=False)) > average + 0.02


def test_a_tall_mask_gives_each_task_its_own_model_back(bench: Bench) -> None:
    for t in range(len(TASKS)):
        own = bench.accuracies(bench.models[t].state_dict(), bench.test)[t]
        masked = merge.tall_mask(bench.models, base=bench.base, task=t, threshold=0.4)
        assert bench.accuracies(masked, bench.test)[t] > own - 0.02


def test_forgetting_a_task_by_subtracting_its_vector(bench: Bench) -> None:
    before = bench.accuracies(bench.base.state_dict(), bench.test)
    forgotten = merge.task_arithmetic([bench.models[3]], base=bench.base, scale=-0.5)
    after = bench.accuracies(forgotten, bench.test)
    assert after[3] < before[3] - 0.1 and sum(after[:3]) > sum(before[:3]) - 0.15


def test_fisher_and_soups_stay_in_business(bench: Bench) -> None:
    specialist = max(bench.mean(m.state_dict()) for m in bench.models)
    fisher = merge.fisher(
        bench.base, bench.models, bench.inputs, samples=128, normalize=True, floor=1e-9, progress=False
    )
    assert bench.mean(fisher) > specialist + 0.3
    validation = torch.cat([x for x, _ in bench.validation]), torch.cat([y for _, y in bench.validation])
    soup = merge.greedy_soup(bench.base, bench.models, validation, progress=False)
    assert bench.mean(soup) > specialist + 0.3 and len(soup.report.taken) > 1
