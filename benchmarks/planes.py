"""A plane of 51 x 51 points through three networks: ours, exact and within 1 %, against loss-landscapes and plain loops.

    pip install --no-deps --target FOLDER loss-landscapes
    LMC_DATA=folder python benchmarks/planes.py --peer FOLDER
    python benchmarks/planes.py --threads 2

Every way gives the mean cross-entropy over all examples. Plain loops are as lean as one writes them: one mixes weights
into vectors that the module's parameters are views of, the other calls `functional_call`. Ours also computes accuracies.
For the large networks, loops and loss-landscapes do a part of the plane (their points all cost the same) and are scaled
up; ours are whole planes, everything included. Without --peer the column of loss-landscapes stays empty. Times are
process time and wall time; errors are the largest over the plane, as a share of its range of losses.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import lmc
from lmc.weights import Weights

Seconds = tuple[float, float]


def timed(work: Callable[[], object]) -> tuple[object, Seconds]:
    """What the work gives, and its process and wall time."""
    process, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, (time.process_time() - process, time.perf_counter() - wall)


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


def mnist() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
    """A part of the training images, all test images; random numbers where the data are not at hand."""
    try:
        data = lmc.data.mnist(download=False)
    except lmc.DataError:
        random = torch.Generator().manual_seed(0)
        made = [
            (torch.randn(n, 784, generator=random), torch.randint(10, (n,), generator=random)) for n in (6000, 10_000)
        ]
        return made[0], made[1], "random numbers of the shape of MNIST (LMC_DATA holds none)"
    return (data.train[0][:6000], data.train[1][:6000]), data.test, "MNIST"


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


def row(name: str, make: Callable, train: tuple, test: tuple, epochs: int, args: argparse.Namespace, part: int) -> None:
    models = trained(make, train, epochs)
    states = [{k: t.clone() for k, t in model.state_dict().items()} for model in models]
    points = args.resolution**2
    part = min(part, points)

    def plane(tolerance: float | None) -> lmc.Plane:
        return lmc.loss_plane(make(), states, test, args.resolution, tolerance=tolerance, progress=False)

    loops = {}
    for label, loop in (("in place", loop_in_place), ("functional", loop_functional)):
        count = len(shares(part))
        loops[label] = timed(lambda loop=loop: loop(make().eval(), states, test, part))[1]
        loops[label] = tuple(seconds * points / count for seconds in loops[label])
    cells = dict(loops)
    if args.peer:
        done, seconds = timed(lambda: peer(models, test, part))
        cells["loss-landscapes"] = tuple(s * points / done.size for s in seconds)
    exact, cells["ours, exact"] = timed(lambda: plane(None))
    quick, cells["ours, within 1 %"] = timed(lambda: plane(0.01))
    truth, guess = exact.losses["data"], quick.losses["data"]
    error = float(np.abs(truth - guess).max() / np.ptp(truth))
    said = quick.error["data"]["loss"] / np.ptp(truth)
    best = min((loops[label] for label in loops), key=lambda pair: pair[0])
    reference = cells.get("loss-landscapes", best)
    ratios = [best[0] / cells["ours, exact"][0], *(reference[i] / cells["ours, within 1 %"][i] for i in (0, 1))]
    times = [f"{c:.2f} / {w:.2f}" for c, w in cells.values()]
    if not args.peer:
        times.insert(2, "")
    print(
        f"| {name} | {' | '.join(times)} | {ratios[0]:.2f} | {ratios[1]:.1f} / {ratios[2]:.1f} | "
        f"{int(quick.evaluated.sum())} | {error:.2%} ({said:.2%}) |",
        flush=True,
    )


def corners(args: argparse.Namespace) -> None:
    """Losses at corners that are models: a direct evaluation, ours, the peer's."""
    data = lmc.data.digits()
    models = trained(lambda: lmc.models.mlp(64, [64, 64], 10), data.train, 8)
    direct = [lmc.landscape.evaluate(model, None, data.test)["data"].loss for model in models]
    print(f"\nThe three models, evaluated directly: {', '.join(f'{loss:.4f}' for loss in direct)}")
    plane = lmc.loss_plane(models[0], models, data.test, args.resolution, progress=False)
    at = [(np.flatnonzero(plane.y == y)[0], np.flatnonzero(plane.x == x)[0]) for x, y in plane.places.values()]
    losses = plane.losses["data"]
    print(f"ours at their places: {', '.join(f'{losses[place]:.4f}' for place in at)}")
    if args.peer:
        theirs = peer(models, data.test, args.resolution**2)
        print(f"loss-landscapes at its corners: {theirs[0, 0]:.4f}, {theirs[0, -1]:.4f}, {theirs[-1, 0]:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="folder that holds the package loss_landscapes")
    parser.add_argument("--threads", type=int, default=1, help="of torch: as many take points (default 1)")
    parser.add_argument("--resolution", type=int, default=51)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    if args.peer:
        sys.path.insert(0, args.peer)
    digits, images = lmc.data.digits(), lmc.data.digits(flat=False)
    everything = tuple(torch.cat(parts) for parts in zip(digits.train, digits.test, strict=True))
    pictures = tuple(torch.cat(parts) for parts in zip(images.train, images.test, strict=True))
    train, test, what = mnist()
    print("CPU / wall seconds; ratios of CPU time, then of CPU / wall time\n")
    print(
        "| network and data | loop in place | loop functional_call | loss-landscapes | ours, exact | ours, within 1 % "
        "| best loop / exact | loss-landscapes / within 1 % | points evaluated | error (estimated) |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    case = (lambda: lmc.models.mlp(64, [64, 64], 10), digits.train)
    row("MLP 64-64-64-10, 1797 digits", *case, everything, 8, args, 2601)
    row("MLP 64-64-64-10, 256 digits", *case, tuple(part[:256] for part in everything), 8, args, 2601)
    row("CNN 16-32, 1797 digits", lambda: lmc.models.cnn((16, 32)), images.train, pictures, 4, args, 49)
    row(f"MLP 784-512-512-10, 10000 of {what}", lambda: lmc.models.mlp(784, [512] * 2, 10), train, test, 2, args, 25)
    corners(args)


if __name__ == "__main__":
    main()
