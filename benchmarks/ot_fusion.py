"""OT fusion of MLPs 784-400-200-100-10 without biases on MNIST, the setting of Singh and Jaggi (2020, section 5.1).

    LMC_DATA=folder python benchmarks/ot_fusion.py

`folder` holds the original files (`lmc.data.mnist` says where they are looked for). Three questions: two networks from
two seeds averaged into one; a wide network fused into a narrow one; and one-shot transfer, where one network has seen all
of one digit and a tenth of the others, the other one the rest of the others only. Accuracies are on the 10,000 test
images, in percent; fused networks are not trained any further. Pixels are brought to mean 0 and variance 1 as the authors
do; with pixels from 0 to 1 networks trained by their recipe are a point worse, and lose more by fusion.
"""

import argparse
import itertools
import os
from collections import OrderedDict
from collections.abc import Mapping

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.func import functional_call

import lmc

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
RECIPE = {"optimizer": "sgd", "lr": 0.01, "momentum": 0.5, "schedule": "constant", "batch_size": 64}
MEAN, DEVIATION = 0.1307, 0.3081  # of the pixels of MNIST's training images
QUESTIONS = ("seeds", "transfer", "widths")
Weights = Mapping[str, Tensor]
Split = tuple[Tensor, Tensor]


def network(scale: int = 1) -> nn.Module:
    """The authors' `MLPNet`, with `scale` times as many hidden units."""
    sizes = [784, 400 * scale, 200 * scale, 100 * scale, 10]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (into, out) in enumerate(itertools.pairwise(sizes), start=1):
        layers[f"fc{i}"] = nn.Linear(into, out, bias=False)
        layers[f"relu{i}"] = nn.ReLU()
    layers.popitem()
    return nn.Sequential(layers)


@torch.no_grad()
def logits(model: nn.Module, weights: Weights, inputs: Tensor) -> Tensor:
    return functional_call(model, dict(weights), (inputs,))


def accuracy(scores: Tensor, targets: Tensor) -> float:
    return 100.0 * float((scores.argmax(1) == targets).float().mean())


def sample(inputs: Tensor, count: int, seed: int) -> Tensor:
    return inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:count]]


def two_seeds(model: nn.Module, a: Weights, b: Weights, train: Split, test: Split) -> dict[str, list[float]]:
    """Accuracy of everything that can be made of two networks; several values where it depends on the samples."""
    inputs, targets = test
    spec = lmc.permutation_spec(model, train[0][:2], progress=False)

    def score(weights: Weights) -> float:
        return accuracy(logits(model, weights, inputs), targets)

    def by_activations(count: int) -> list[float]:
        batches = (sample(train[0], count, seed) for seed in range(3))
        return [score(lmc.ot_fusion(model, b, a, x, spec=spec, progress=False)) for x in batches]

    both = logits(model, a, inputs).softmax(1) + logits(model, b, inputs).softmax(1)
    matched = lmc.weight_matching(spec, b, a, progress=False).apply(a)
    return {
        "each network": [score(a), score(b)],
        "both networks' predictions averaged": [accuracy(both, targets)],
        "plain average": [score(lmc.merge.average([a, b]))],
        "OT fusion, weights": [score(lmc.ot_fusion(model, b, a, spec=spec, progress=False))],
        "OT fusion, activations of 200 samples": by_activations(200),
        "OT fusion, activations of 1000 samples": by_activations(1000),
        "OT fusion, activations of 10000 samples": by_activations(10000),
        "weight matching, then the average": [score(lmc.merge.average([matched, b]))],
    }


def wide_and_narrow(wide: Weights, narrow: Weights, train: Split, test: Split) -> dict[str, list[float]]:
    """A network of twice the width fused into a narrow one."""
    model, large = network(), network(2)
    large.load_state_dict(dict(wide))
    spec = lmc.permutation_spec(model, train[0][:2], progress=False)
    found = {
        "the wide network": [accuracy(logits(large, wide, test[0]), test[1])],
        "the narrow network": [accuracy(logits(model, narrow, test[0]), test[1])],
    }
    for metric, inputs in (("weights", None), ("activations of 1000 samples", sample(train[0], 1000, 0))):
        fused = lmc.ot_fusion(model, narrow, large, inputs, spec=spec, progress=False)
        found[f"the wide one in the narrow one's units, {metric}"] = [
            accuracy(logits(model, fused.transported[0], test[0]), test[1])
        ]
        found[f"their average, {metric}"] = [accuracy(logits(model, fused, test[0]), test[1])]
    return found


def split_by_digit(train: Split, digit: int, seed: int) -> tuple[Split, Split]:
    """All of one digit and a tenth of the others; the rest of the others."""
    inputs, targets = train
    tenth = torch.rand(len(targets), generator=torch.Generator().manual_seed(seed)) < 0.1
    first = (targets == digit) | tenth
    second = (targets != digit) & ~tenth
    return (inputs[first], targets[first]), (inputs[second], targets[second])


def transfer(model: nn.Module, a: Weights, b: Weights, train: Split, test: Split) -> dict[str, list[float]]:
    """Averages of a specialist `a` and a generalist `b` at several shares of b; the best one, and its share."""
    inputs, targets = test
    spec = lmc.permutation_spec(model, train[0][:2], progress=False)
    moved = {
        "plain average": a,
        "OT fusion, weights": lmc.ot_fusion(model, b, a, spec=spec, progress=False).transported[0],
        "OT fusion, activations of 400 samples": lmc.ot_fusion(
            model, b, a, sample(train[0], 400, 0), spec=spec, progress=False
        ).transported[0],
    }
    found = {
        "specialist": [accuracy(logits(model, a, inputs), targets)],
        "generalist": [accuracy(logits(model, b, inputs), targets)],
        "both networks' predictions averaged": [
            accuracy(logits(model, a, inputs).softmax(1) + logits(model, b, inputs).softmax(1), targets)
        ],
    }
    for name, weights in moved.items():
        line = [
            accuracy(logits(model, lmc.merge.average([weights, b], weights=[1 - share, share]), inputs), targets)
            for share in SHARES
        ]
        found[f"{name}, half and half"] = [line[SHARES.index(0.5)]]
        found[f"{name}, best of {len(SHARES)} shares"] = [max(line)]
    return found


def show(title: str, rows: list[dict[str, list[float]]]) -> None:
    """One line for each quantity: its mean over all rows and samples, and the range."""
    print(f"\n{title}\n\n| network | test accuracy, % | lowest to highest |\n|---|---|---|")
    for name in rows[0]:
        values = [value for row in rows for value in row[name]]
        print(f"| {name} | {sum(values) / len(values):.1f} | {min(values):.1f} to {max(values):.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--digit", type=int, default=4, help="the digit that only one network sees")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, model, pairs = lmc.data.mnist(), network(), options.pairs
    training, test = (((inputs - MEAN) / DEVIATION, targets) for inputs, targets in (data.train, data.test))

    def train(architecture: nn.Module, split: Split, seeds: range) -> lmc.training.Trained:
        return lmc.training.train(architecture, split, seeds=seeds, epochs=options.epochs, **RECIPE)

    if "seeds" in options.questions:
        narrow = train(model, training, range(2 * pairs))
        rows = [two_seeds(model, narrow[2 * k], narrow[2 * k + 1], training, test) for k in range(pairs)]
        show(f"Two networks from two seeds, {pairs} pairs:", rows)
    if "transfer" in options.questions:
        special, rest = split_by_digit(training, options.digit, seed=0)
        specialists = train(model, special, range(100, 100 + pairs))
        generalists = train(model, rest, range(200, 200 + pairs))
        rows = [transfer(model, a, b, training, test) for a, b in zip(specialists, generalists, strict=True)]
        show(f"A specialist of the digit {options.digit} and a generalist without it, {pairs} pairs:", rows)
    if "widths" in options.questions:
        narrow = train(model, training, range(pairs))
        wide = train(network(2), training, range(300, 301))
        rows = [wide_and_narrow(wide[0], narrow[k], training, test) for k in range(pairs)]
        show(f"Twice the width into the width, one wide network and {pairs} narrow ones:", rows)


if __name__ == "__main__":
    main()
