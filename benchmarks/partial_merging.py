"""Accuracy against width: two networks zipped (ZipIt) or merged under a budget (PLeaS), and star models.

    python benchmarks/partial_merging.py [--cases mlp64 vgg11 resnet20] [--star]

Stored digits networks, three random choices of which inputs the methods see; prints markdown tables.
"""

import argparse
import time
from collections.abc import Iterator
from statistics import mean

import torch
from torch import Tensor, nn

import lmc

BUDGETS = (1.0, 1.2, 1.55, 1.8, 2.0)  # those of PLeaS
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def accuracy(logits: Tensor, targets: Tensor) -> float:
    return 100.0 * float((logits.argmax(1) == targets).float().mean())


@torch.no_grad()
def logits(model: nn.Module, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
    return torch.func.functional_call(model.eval(), weights, (inputs,))


def rows(case: str, examples: int, seeds: range) -> Iterator[tuple[str, float, float, float, float]]:
    """(method, parameters used, stored, accuracy in percent, process seconds), means over the choices of inputs."""
    stored, data = lmc.data.checkpoint(f"digits-{case}"), lmc.data.digits(flat="mlp" in case)
    model, (a, b) = stored.model(), stored.weights[:2]
    (train, _), (inputs, targets) = data.train, data.test
    spec = lmc.permutation_spec(model, train[:2], progress=False)
    alone = [logits(model, w, inputs) for w in (a, b)]
    yield "A and B alone, mean", 1.0, 1.0, mean(accuracy(x, targets) for x in alone), 0.0
    yield "ensemble", 2.0, 2.0, accuracy(0.5 * (alone[0] + alone[1]), targets), 0.0
    drawn = [train[torch.randperm(len(train), generator=torch.Generator().manual_seed(s))[:examples]] for s in seeds]
    pis = [lmc.activation_matching(spec, model, a, b, x, progress=False) for x in drawn]

    def plain(aligned: bool) -> float:
        found = []
        for x, pi in zip(drawn, pis, strict=True):
            weights = lmc.merge.average([a, pi.apply(b) if aligned else b])
            found.append(accuracy(logits(model, lmc.recalibrate_batchnorm(model, weights, x), inputs), targets))
        return mean(found)

    yield "average", 1.0, 1.0, plain(False), 0.0
    yield "permute and average", 1.0, 1.0, plain(True), 0.0
    methods = [
        (
            f"ZipIt, ratio {r:g}",
            lambda x, pi, r=r: lmc.merge.zipit(model, [a, b], x, spec=spec, ratio=r, permutation=pi, progress=False),
        )
        for r in RATIOS
    ]
    for fit in (False, True):
        methods += [
            (
                f"PLeaS{'' if fit else ' without least squares'}, budget {c:g}",
                lambda x, pi, c=c, fit=fit: lmc.merge.pleas(
                    model, [a, b], x, spec=spec, budget=c, fit=fit, permutation=pi, progress=False
                ),
            )
            for c in BUDGETS
        ]
    for name, method in methods:
        begin = time.process_time()
        made = [method(x, pi) for x, pi in zip(drawn, pis, strict=True)]
        seconds = (time.process_time() - begin) / len(made)
        found = mean(accuracy(logits(z.module, z.weights, inputs), targets) for z in made)
        yield name, mean(z.parameters[1] for z in made), mean(z.parameters[0] for z in made), found, seconds


def star(sources: int, unseen: int, epochs: int) -> None:
    """Barriers of star models trained on the digits, as solutions are and matched by weights."""
    data, model = lmc.data.digits(), lmc.models.mlp(64, [64, 64, 64], 10)
    weights = list(lmc.training.train(model, data, seeds=range(sources + unseen), epochs=20, progress=False))
    spec = lmc.permutation_spec(model, data.train[0][:2], progress=False)
    print("| solutions | kind of line | lines | mean barrier (nats) | largest | accuracy of the centre (%) |")
    print("|---|---|---|---|---|---|")
    inputs, targets = data.test
    for name, known in (("as they are", None), ("matched by weights", spec)):
        found = lmc.merge.star_model(model, weights[:sources], data, spec=known, epochs=epochs, progress=False)
        score = accuracy(logits(model, dict(found), inputs), targets)
        for kind, values in found.paths(data.test, held_out=weights[sources:], progress=False).barriers.items():
            print(f"| {name} | {kind} | {len(values)} | {values.mean():.3f} | {values.max():.3f} | {score:.1f} |")
    print(f"\nsolutions: {mean(accuracy(logits(model, w, inputs), targets) for w in weights):.1f} % on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["mlp64", "vgg11", "resnet20"])
    parser.add_argument("--examples", type=int, default=512, help="unlabelled inputs that the methods see")
    parser.add_argument("--choices", type=int, default=3, help="of these inputs")
    parser.add_argument("--star", action="store_true", help="star models too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cases:
        print("| network | method | parameters used | stored | accuracy (%) | process s |")
        print("|---|---|---|---|---|---|")
    for case in options.cases:
        for name, used, stored, score, seconds in rows(case, options.examples, range(options.choices)):
            took = f"{seconds:.2f}" if seconds else ""
            print(f"| {case} | {name} | {used:.2f} | {stored:.2f} | {score:.1f} | {took} |", flush=True)
    if options.star:
        star(5, 3, 60)


if __name__ == "__main__":
    main()
