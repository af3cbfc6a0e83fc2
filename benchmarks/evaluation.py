"""Points per second: many weight sets of one network evaluated on one data set, against the usual ways to do it.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --device cuda --points 256

Every row gives exact losses over all examples. "ours" is `lmc.landscape.Evaluator` as it comes (it also computes the
accuracy, which the others do not); in brackets the number of weight sets that it chose to put through together. Times
are process time on the CPU (one thread) and wall time on a GPU, best of several rounds.
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import lmc
from lmc.landscape import Evaluator
from lmc.weights import Weights

Ways = dict[str, Callable[[], list[float]]]


def cnn() -> nn.Module:
    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 64-16-10, 32 examples": (lambda: lmc.models.mlp(64, [16], 10), (32, 64)),
    "MLP 64-64-64-10, 64 examples": (lambda: lmc.models.mlp(64, [64, 64], 10), (64, 64)),
    "MLP 64-64-64-10, 256 examples": (lambda: lmc.models.mlp(64, [64, 64], 10), (256, 64)),
    "MLP 64-64-64-10, 1797 examples": (lambda: lmc.models.mlp(64, [64, 64], 10), (1797, 64)),
    "MLP 64-512-512-512-10, 1797 examples": (lambda: lmc.models.mlp(64, [512] * 3, 10), (1797, 64)),
    "MLP 784-512-512-512-10, 10000 examples": (lambda: lmc.models.mlp(784, [512] * 3, 10), (10_000, 784)),
    "CNN 16-32, 1797 examples": (cnn, (1797, 1, 8, 8)),
}


def in_place(model: nn.Module, states: list[Weights], inputs: Tensor, targets: Tensor) -> list[float]:
    """What landscape packages do: copy each weight set into the module."""
    losses = []
    with torch.no_grad():
        for state in states:
            for name, parameter in model.named_parameters():
                parameter.copy_(state[name])
            losses.append(F.cross_entropy(model(inputs), targets).item())
    return losses


def functional(model: nn.Module, states: list[Weights], inputs: Tensor, targets: Tensor) -> list[float]:
    with torch.no_grad():
        outputs = (functional_call(model, state, (inputs,)) for state in states)
        return [F.cross_entropy(output, targets).item() for output in outputs]


def together(model: nn.Module, states: list[Weights], inputs: Tensor, targets: Tensor, chunk: int) -> list[float]:
    def loss(state: Weights) -> Tensor:
        return F.cross_entropy(functional_call(model, state, (inputs,)), targets)

    losses = []
    with torch.no_grad():
        for start in range(0, len(states), chunk):
            part = states[start : start + chunk]
            losses += torch.vmap(loss)({name: torch.stack([s[name] for s in part]) for name in part[0]}).tolist()
    return losses


def best_seconds(ways: Ways, rounds: int, cuda: bool) -> dict[str, float]:
    """The best time of each way, the ways taking turns so that a busy machine treats them alike."""
    clock = time.perf_counter if cuda else time.process_time
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            started = clock()
            way()
            best[name] = min(best[name], clock() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--points", type=int, default=64, help="weight sets evaluated in one round (default 64)")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cuda = torch.device(args.device).type == "cuda"
    print("| network and data | in place | functional_call | vmap, 16 | vmap, 64 | ours | ours / best other |")
    print("|---|---|---|---|---|---|---|")
    for name, (make, shape) in CASES.items():
        torch.manual_seed(0)
        points = args.points if cuda or shape[0] < 5000 else min(args.points, 16)
        model = make().to(args.device).eval()
        states = [{k: v.to(args.device) for k, v in make().state_dict().items()} for _ in range(points)]
        inputs, targets = torch.randn(shape).to(args.device), torch.randint(10, shape[:1]).to(args.device)
        evaluator = Evaluator(model, (inputs, targets))
        given = (model, states, inputs, targets)
        ways: Ways = {
            "in place": lambda given=given: in_place(*given),
            "functional_call": lambda given=given: functional(*given),
            "vmap, 16": lambda given=given: together(*given, 16),
            "vmap, 64": lambda given=given: together(*given, 64),
            "ours": lambda e=evaluator, s=states: [score["data"].loss for score in e(s)],
        }
        results = torch.tensor([way() for way in ways.values()])
        assert torch.allclose(results, results[:1].expand_as(results), rtol=1e-3), "the ways disagree"
        speed = {label: points / seconds for label, seconds in best_seconds(ways, args.rounds, cuda).items()}
        ratio = speed["ours"] / max(value for label, value in speed.items() if label != "ours")
        cells = [f"{value:.0f}" for value in speed.values()]
        print(f"| {name} | {' | '.join(cells)} ({evaluator.weight_sets_together}) | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
