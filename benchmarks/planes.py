"""A plane of 51 x 51 points through three networks: ours, exact and within 1 %, against loss-landscapes and plain loops.

    pip install --no-deps --target FOLDER loss-landscapes
    LMC_DATA=folder python benchmarks/planes.py --peer FOLDER
    python benchmarks/planes.py --rows 784 --images 2000
    python benchmarks/planes.py --threads 2

Every way gives the mean cross-entropy over all examples. Plain loops are as lean as one writes them: one mixes weights
into vectors that the module's parameters are views of, the other calls `functional_call`. Ours also computes accuracies.
For the large networks, loops and loss-landscapes do a part of the plane (their points all cost the same) and are scaled
up; ours are whole planes, everything included. Without --peer the column of loss-landscapes stays empty. Times are
process time and wall time, the least of --rounds in which all ways take turns; errors are the largest over the plane,
as a share of its range of losses. With --threads 2 and more the table is another: exact planes by one thread, by that
many inside each operator, and by that many that take points; wall time, the least of --rounds.
"""

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import lmc
from lmc.landscape.planes import workers
from lmc.weights import Weights

Seconds = tuple[float, float]


def timed(ways: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, Any], dict[str, Seconds]]:
    """What each way gives, and its least process and wall time; the ways take turns, so that neighbours slow all alike."""
    results, least = {}, {name: (math.inf, math.inf) for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            process, wall = time.process_time(), time.perf_counter()
            results[name] = way()
            spent = time.process_time() - process, time.perf_counter() - wall
            least[name] = min(least[name][0], spent[0]), min(least[name][1], spent[1])
    return results, least


def trained(make: Callable[[], nn.Module], data: tuple[Tensor, Tensor], epochs: int) -> list[nn.Module]:
    """Three networks from three seeds."""
    inputs, targets = data
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = make()
        optimiser = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(epochs):
            for chosen in torch.randperm(len(inputs)).split(64):
                optimiser.zero_grad()
                F.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
                optimiser.step()
        models.append(model.eval())
    return models


def mnist(images: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
    """A part of the training images, the first test images; random numbers where the data are not at hand."""
    try:
        data = lmc.data.mnist(download=False)
    except lmc.DataError:
        random = torch.Generator().manual_seed(0)
        made = [
            (torch.randn(n, 784, generator=random), torch.randint(10, (n,), generator=random)) for n in (6000, images)
        ]
        return made[0], made[1], "random numbers of the shape of MNIST (LMC_DATA holds none)"
    return (data.train[0][:6000], data.train[1][:6000]), (data.test[0][:images], data.test[1][:images]), "MNIST"


def shares(points: int) -> list[tuple[float, float]]:
    """Where the loops evaluate: evenly spread over the plane."""
    side = max(int(points**0.5), 1)
    line = np.linspace(-0.2, 1.2, side)
    return [(float(u), float(v)) for u in line for v in line]


def loop_in_place(model: nn.Module, states: list[Weights], data: tuple[Tensor, Tensor], points: int) -> list[float]:
    flats = [torch.cat([state[name].flatten() for name, _ in model.named_parameters()]) for state in states]
    flat, u_axis, v_axis = flats[0].clone(), flats[2] - flats[0], flats[1] - flats[0]
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    losses = []
    with torch.no_grad():
        for u, v in shares(points):
            torch.add(flats[0], u_axis, alpha=u, out=flat).add_(v_axis, alpha=v)
            losses.append(F.cross_entropy(model(data[0]), data[1]).item())
    return losses


def loop_functional(model: nn.Module, states: list[Weights], data: tuple[Tensor, Tensor], points: int) -> list[float]:
    losses = []
    with torch.no_grad():
        for u, v in shares(points):
            mixed = {
                name: torch.lerp(first, states[2][name], u).add_(states[1][name] - first, alpha=v)
                for name, first in states[0].items()
            }
            losses.append(F.cross_entropy(functional_call(model, mixed, (data[0],)), data[1]).item())
    return losses


def peer(models: list[nn.Module], data: tuple[Tensor, Tensor], points: int) -> np.ndarray:
    import loss_landscapes
    from loss_landscapes.metrics import Loss

    metric = Loss(nn.functional.cross_entropy, *data)
    side = max(int(points**0.5), 1)
    return loss_landscapes.planar_interpolation(models[0], models[2], models[1], metric, side, deepcopy_model=True)


@dataclass(frozen=True)
class Case:
    """A row: the network, what its three seeds are trained on, what the plane is evaluated on, how much the loops do."""

    name: str
    make: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int
    part: int = 2601

    def states(self) -> list[Weights]:
        models = trained(self.make, self.train, self.epochs)
        return [{k: t.clone() for k, t in model.state_dict().items()} for model in models]

    def plane(self, states: list[Weights], resolution: int, tolerance: float | None = None) -> lmc.Plane:
        return lmc.loss_plane(
            self.make(), states, self.test, resolution=resolution, tolerance=tolerance, progress=False
        )


def row(case: Case, args: argparse.Namespace) -> None:
    states, make, test = case.states(), case.make, case.test
    points = args.resolution**2
    part = min(case.part, points)
    ways: dict[str, Callable[[], object]] = {
        "in place": lambda: loop_in_place(make().eval(), states, test, part),
        "functional": lambda: loop_functional(make().eval(), states, test, part),
        "ours, exact": lambda: case.plane(states, args.resolution),
        "ours, within 1 %": lambda: case.plane(states, args.resolution, 0.01),
    }
    if args.peer:
        models = [make().eval() for _ in states]
        for model, state in zip(models, states, strict=True):
            model.load_state_dict(state)
        ways["loss-landscapes"] = lambda: peer(models, test, part)
    results, times = timed(ways, args.rounds)
    for name in times.keys() - {"ours, exact", "ours, within 1 %"}:
        times[name] = tuple(seconds * points / len(shares(part)) for seconds in times[name])
    exact, quick = results["ours, exact"], results["ours, within 1 %"]
    truth, guess = exact.losses["data"], quick.losses["data"]
    error = float(np.abs(truth - guess).max() / np.ptp(truth))
    said = quick.error["data"]["loss"] / np.ptp(truth)
    best = min((times[name] for name in ("in place", "functional")), key=lambda pair: pair[0])
    reference = times.get("loss-landscapes", best)
    ratios = [best[0] / times["ours, exact"][0], *(reference[i] / times["ours, within 1 %"][i] for i in (0, 1))]
    order = ("in place", "functional", "loss-landscapes", "ours, exact", "ours, within 1 %")
    cells = [f"{times[name][0]:.2f} / {times[name][1]:.2f}" if name in times else "" for name in order]
    print(
        f"| {case.name} | {' | '.join(cells)} | {ratios[0]:.2f} | {ratios[1]:.1f} / {ratios[2]:.1f} | "
        f"{int(quick.evaluated.sum())} | {error:.2%} ({said:.2%}) |",
        flush=True,
    )


def threads(case: Case, args: argparse.Namespace) -> None:
    """One row of the table for several threads."""
    states = case.states()

    def plane(count: int, crews: int) -> None:
        torch.set_num_threads(count)
        workers.MOST = crews
        case.plane(states, args.resolution)

    ways: dict[str, Callable[[], object]] = {
        "one": lambda: plane(1, 1),
        "inside": lambda: plane(args.threads, 1),
        "over": lambda: plane(args.threads, args.threads),
    }
    walls = {name: seconds[1] for name, seconds in timed(ways, args.rounds)[1].items()}
    cells = [f"{wall:.2f}" for wall in walls.values()]
    gains = [f"{walls['one'] / walls[name]:.2f}" for name in ("inside", "over")]
    print(f"| {case.name} | {' | '.join(cells + gains)} |", flush=True)


def corners(args: argparse.Namespace) -> None:
    """Losses at corners that are models: a direct evaluation, ours, the peer's."""
    data = lmc.data.digits()
    models = trained(lambda: lmc.models.mlp(64, [64, 64], 10), data.train, 8)
    direct = [lmc.landscape.evaluate(model, None, data.test)["data"].loss for model in models]
    print(f"\nThe three models, evaluated directly: {', '.join(f'{loss:.4f}' for loss in direct)}")
    plane = lmc.loss_plane(models[0], models, data.test, resolution=args.resolution, progress=False)
    at = [(np.flatnonzero(plane.y == y)[0], np.flatnonzero(plane.x == x)[0]) for x, y in plane.places.values()]
    losses = plane.losses["data"]
    print(f"ours at their places: {', '.join(f'{losses[place]:.4f}' for place in at)}")
    if args.peer:
        theirs = peer(models, data.test, args.resolution**2)
        print(f"loss-landscapes at its corners: {theirs[0, 0]:.4f}, {theirs[0, -1]:.4f}, {theirs[-1, 0]:.4f}")


def joined(data: lmc.data.Dataset) -> tuple[Tensor, Tensor]:
    """All images with their classes."""
    return torch.cat((data.train[0], data.test[0])), torch.cat((data.train[1], data.test[1]))


def cases(args: argparse.Namespace) -> Iterator[Case]:
    digits, images = lmc.data.digits(), lmc.data.digits(flat=False)
    everything, pictures = joined(digits), joined(images)
    few = everything[0][:256], everything[1][:256]
    small = partial(lmc.models.mlp, 64, [64, 64], 10)
    train, test, what = mnist(args.images)
    yield Case("MLP 64-64-64-10, 1797 digits", small, digits.train, everything, 8)
    yield Case("MLP 64-64-64-10, 256 digits", small, digits.train, few, 8)
    yield Case("CNN 16-32, 1797 digits", partial(lmc.models.cnn, (16, 32)), images.train, pictures, 4, 49)
    large = partial(lmc.models.mlp, 784, [512, 512], 10)
    yield Case(f"MLP 784-512-512-10, {args.images} of {what}", large, train, test, 2, 25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="folder that holds the package loss_landscapes")
    parser.add_argument("--threads", type=int, default=1, help="more than 1: what as many threads bring")
    parser.add_argument("--resolution", type=int, default=51)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--images", type=int, default=10_000, help="of the MNIST test set")
    parser.add_argument("--rows", default="", help="only rows whose name holds this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.peer:
        sys.path.insert(0, args.peer)
    head = (
        "| network and data | loop in place | loop functional_call | loss-landscapes | ours, exact | ours, within 1 % "
        "| best loop / exact | loss-landscapes / within 1 % | points evaluated | error (estimated) |"
    )
    if args.threads > 1:
        head = (
            f"| network and data | 1 thread | {args.threads} inside operators | {args.threads} over points | gain inside "
            "| gain over points |"
        )
    else:
        print("CPU / wall seconds; ratios of CPU time, then of CPU / wall time\n")
    print(f"{head}\n{'|---' * (head.count('|') - 1)}|")
    for case in cases(args):
        if args.rows in case.name:
            (threads if args.threads > 1 else row)(case, args)
    if args.threads == 1 and not args.rows:
        corners(args)


if __name__ == "__main__":
    main()
