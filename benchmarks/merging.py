"""Every merging method on networks fine-tuned from one base on digits, ranked over seeds.

    python benchmarks/merging.py                    # all settings, 5 seeds, tables on standard output
    python benchmarks/merging.py --setting classes --seeds 2

Three settings of four tasks each, one network `64-128-64-10` and one head for all:

- classes: each task has the images of some digits ({0,1,2}, {3,4,5}, {6,7}, {8,9}); the base knows all ten a little;
- views: each task has all digits turned by 90 degrees, inverted, shifted by 3 pixels, or mirrored; the base has seen a
  few;
- adapters: the tasks of "views", each learned by a low-rank adapter (rank 4 on all three matrices) on the frozen base.

The score is the mean accuracy over the tasks' test images, always among all ten digits. Scales of task vectors and all
learned coefficients come from validation images; no test image is used for anything else, nor seen by AdaMerging.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lmc.merge as merge
from lmc.data import digits
from lmc.models import mlp

SETTINGS = ("classes", "views", "adapters")
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0)
CLASSES = ([0, 1, 2], [3, 4, 5], [6, 7], [8, 9])
VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.rot90(1, (1, 2)),
    lambda x: 1.0 - x,
    lambda x: x.roll(3, 2),
    lambda x: x.flip(2),
)
BLOCKS = ["fc1", "fc2", "head"]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Bench:
    """One seed: the base, the models fine-tuned from it, and each task's images."""

    base: nn.Module
    models: list[nn.Module]
    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]

    def accuracy(self, weights: dict[str, Tensor], parts: list[Pair]) -> float:
        """Mean over tasks."""
        found = [torch.func.functional_call(self.base, weights, (x,)).argmax(1) == y for x, y in parts]
        return sum(float(right.float().mean()) for right in found) / len(parts)

    @property
    def together(self) -> Pair:
        """The validation images of all tasks."""
        return torch.cat([x for x, _ in self.validation]), torch.cat([y for _, y in self.validation])


def fine_tune(model: nn.Module, data: Pair, steps: int, lr: float, seed: int) -> nn.Module:
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        index = torch.randint(len(data[1]), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(data[0][index]), data[1][index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def adapt(model: nn.Module, data: Pair, steps: int, lr: float, seed: int, rank: int = 4) -> nn.Module:
    """The same by `W + B A` with factors of a rank, B = 0 at first; everything else is frozen."""
    generator = torch.Generator().manual_seed(seed)
    fixed = {name: tensor.detach() for name, tensor in model.named_parameters()}
    matrices = [name for name, tensor in fixed.items() if tensor.ndim == 2]
    down = {n: torch.randn(rank, fixed[n].shape[1], generator=generator) / rank**0.5 for n in matrices}
    up = {n: torch.zeros(len(fixed[n]), rank) for n in matrices}
    optimizer = torch.optim.Adam([tensor.requires_grad_() for tensor in (*down.values(), *up.values())], lr=lr)

    def moved() -> dict[str, Tensor]:
        return fixed | {name: fixed[name] + up[name] @ down[name] for name in matrices}

    for _ in range(steps):
        index = torch.randint(len(data[1]), (64,), generator=generator)
        outputs = torch.func.functional_call(model, moved(), (data[0][index],))
        loss = nn.functional.cross_entropy(outputs, data[1][index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned = copy.deepcopy(model)
    tuned.load_state_dict({name: tensor.detach() for name, tensor in moved().items()})
    return tuned.eval()


def make(setting: str, seed: int) -> Bench:
    data = digits(flat=True)
    x, y = torch.cat([data.train[0], data.test[0]]), torch.cat([data.train[1], data.test[1]])
    x = (x - x.min()) / (x.max() - x.min())
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    splits = order[:900], order[900:1300], order[1300:]

    def task(t: int, index: Tensor) -> Pair:
        if setting == "classes":
            index = index[torch.isin(y[index], torch.tensor(CLASSES[t]))]
            return x[index], y[index]
        return VIEWS[t](x[index].reshape(-1, 8, 8)).reshape(-1, 64), y[index]

    parts = [[task(t, index) for t in range(4)] for index in splits]
    torch.manual_seed(seed)
    model = mlp(64, [128, 64], 10)
    few = order[:100] if setting == "classes" else order[:200]
    seen = [(x[few], y[few])] + ([] if setting == "classes" else [task(t, few) for t in range(4)])
    start = torch.cat([a for a, _ in seen]), torch.cat([b for _, b in seen])
    base = fine_tune(model, start, 60 if setting == "classes" else 150, 3e-3, seed)
    tune, steps = (adapt, 200) if setting == "adapters" else (fine_tune, 100)
    models = [tune(base, part, steps, 1e-3, 1000 + seed + t) for t, part in enumerate(parts[0])]
    return Bench(base, models, *parts)


def scaled(method: Any, **options: Any) -> Callable[[Bench], dict[str, Tensor]]:
    """A method on task vectors with the scale that does best on validation images."""

    def build(bench: Bench) -> dict[str, Tensor]:
        tried = [method(bench.models, base=bench.base, scale=scale, **options) for scale in SCALES]
        return max(tried, key=lambda weights: bench.accuracy(weights, bench.validation))

    return build


def with_data(method: Any, **options: Any) -> Callable[[Bench], dict[str, Tensor]]:
    return lambda b: method(b.base, b.models, [x for x, _ in b.train], progress=False, **options)


def scaled_with_data(method: Any, **options: Any) -> Callable[[Bench], dict[str, Tensor]]:
    """The same for a method that looks at training images as well."""

    def build(bench: Bench) -> dict[str, Tensor]:
        inputs = [x for x, _ in bench.train]

        def on_tasks(models: Any, **more: Any) -> dict[str, Tensor]:
            return method(bench.base, models, inputs, progress=False, **options, **more)

        return scaled(on_tasks)(bench)

    return build


METHODS: dict[str, Callable[[Bench], dict[str, Tensor]]] = {
    "base": lambda b: b.base.state_dict(),
    "first fine-tuned model": lambda b: b.models[0].state_dict(),
    "average": lambda b: merge.average(b.models),
    "karcher_mean": lambda b: merge.karcher_mean(b.models),
    "variance_corrected": lambda b: merge.variance_corrected(b.models),
    "model_stock": lambda b: merge.model_stock(b.models, base=b.base),
    "greedy_soup": lambda b: merge.greedy_soup(b.base, b.models, b.together, progress=False),
    "learned_soup (tensor)": lambda b: merge.learned_soup(
        b.base, b.models, b.together, per="tensor", epochs=30, progress=False
    ),
    "task_arithmetic": scaled(merge.task_arithmetic),
    "ties (0.2)": scaled(merge.ties),
    "ties (0.5)": scaled(merge.ties, density=0.5),
    "dare (0.5)": scaled(merge.dare),
    "dare + ties (0.5)": scaled(merge.dare, combine_by="ties"),
    "della (0.7)": scaled(merge.della),
    "breadcrumbs (0.5)": scaled(merge.breadcrumbs, density=0.5),
    "pcb (0.1)": scaled(merge.pcb),
    "lines": scaled(merge.lines, blocks=BLOCKS, beta=0.5),
    "consensus": scaled(merge.consensus),
    "sce (0.1)": scaled(merge.sce, select=0.1),
    "sce (1)": scaled(merge.sce),
    "ram": scaled(merge.ram),
    "ram+": scaled(merge.ram, boost=0.1),
    "magmax": scaled(merge.magmax),
    "multislerp": lambda b: merge.multislerp(b.models, base=b.base),
    "tsv_m": scaled(merge.tsv_m),
    "iso_c": scaled(merge.iso_c),
    "iso_cts": scaled(merge.iso_cts),
    "wudi": scaled(merge.wudi, rest="mean"),
    "knots (0.2)": scaled(merge.knots, density=0.2),
    "knots (1)": scaled(merge.knots, density=1.0),
    "cat_merging": scaled_with_data(merge.cat_merging),
    "fisher": with_data(merge.fisher, samples=256),
    "fisher (normalised)": with_data(merge.fisher, samples=256, normalize=True, floor=1e-9),
    "regmean": with_data(merge.regmean),
    "regmean++": with_data(merge.regmean_plus_plus),
    "adamerging (train images)": lambda b: with_data(merge.adamerging, base=b.base)(b),
    "evolve scale, density of ties": lambda b: merge.evolve(
        b.base,
        b.models,
        b.together,
        method=merge.ties,
        base=b.base,
        space={"density": (0.05, 1.0), "scale": (0.0, 2.0)},
        evaluations=60,
        progress=False,
    ),
}


def measure(setting: str, seed: int) -> dict[str, Any]:
    """Accuracy and seconds of every method on one seed, and the mean accuracy of the models on their own tasks."""
    bench = make(setting, seed)
    pairs = zip(bench.models, bench.test, strict=True)
    found: dict[str, Any] = {"setting": setting, "seed": seed, "scores": {}, "seconds": {}}
    found["own"] = statistics.mean(bench.accuracy(m.state_dict(), [part]) for m, part in pairs)
    for name, build in METHODS.items():
        start = time.process_time()
        weights = build(bench)
        found["seconds"][name] = time.process_time() - start
        found["scores"][name] = bench.accuracy(weights, bench.test)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The methods of one setting over its seeds, best first."""
    scores = {name: [one["scores"][name] for one in found] for name in METHODS}
    ranks: dict[str, list[int]] = {name: [] for name in METHODS}
    for one in found:
        for place, name in enumerate(sorted(METHODS, key=lambda name: -one["scores"][name]), start=1):
            ranks[name].append(place)
    rows = ["| method | accuracy, % | sd | rank, best to worst seed | process seconds |", "|---|---|---|---|---|"]
    for name in sorted(METHODS, key=lambda name: -statistics.mean(scores[name])):
        mean = 100 * statistics.mean(scores[name])
        deviation = 100 * statistics.stdev(scores[name]) if len(found) > 1 else 0.0
        seconds = statistics.mean(one["seconds"][name] for one in found)
        place = f"{min(ranks[name])} to {max(ranks[name])}"
        rows.append(f"| {name} | {mean:.1f} | {deviation:.1f} | {place} | {seconds:.2f} |")
    own = 100 * statistics.mean(one["own"] for one in found)
    title = f"### {found[0]['setting']}: each model on its own task {own:.1f} %, {len(found)} seeds\n"
    return "\n".join([title, *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, action="append")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--keep", type=Path, help="a file of results, a line for each setting and seed; what it has is not run"
    )
    parser.add_argument("--once", action="store_true", help="run the next setting and seed alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = arguments.keep.read_text().splitlines() if arguments.keep and arguments.keep.exists() else []
    found = {(one["setting"], one["seed"]): one for one in map(json.loads, kept)}
    settings = arguments.setting or SETTINGS
    wanted = [(setting, seed) for setting in settings for seed in range(arguments.seeds)]
    for each in [each for each in wanted if each not in found][: 1 if arguments.once else None]:
        found[each] = measure(*each)
        if arguments.keep:
            with open(arguments.keep, "a") as file:
                file.write(json.dumps(found[each]) + "\n")
    if all(each in found for each in wanted):
        print(f"Python {platform.python_version()}, torch {torch.__version__}, 1 thread\n")
        for setting in settings:
            print(table([found[setting, seed] for seed in range(arguments.seeds)]))


if __name__ == "__main__":
    main()
