"""Training 16 seeds on digits: `lmc.training.train` against a plain Python loop over the seeds.

    python benchmarks/training.py
    python benchmarks/training.py --device cuda

Both do the same steps of Adam (same epochs, batches, and number of them). The plain loop is as lean as one writes it: a
module and an optimiser for each seed, one seed after the other, no schedule, no accuracy. `train` is a whole call: it
also draws the initial weights, records the step, follows the cosine schedule and keeps loss and accuracy. Times are
process time on the CPU (one thread unless told otherwise) and wall time on a GPU, best of several rounds taken in turn.
The limit is the part of `train` that nobody can leave out, on a CPU: what its matrix products and convolutions take by themselves,
forward and backward, as torch's profiler counts them in one more run.
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import nn

import lmc

BATCH, RATE = 64, 3e-3
CASES: dict[str, Callable[[], nn.Module]] = {
    "MLP 64-64-64-64-10": lambda: lmc.models.mlp(64, [64] * 3, 10),
    "MLP 64-256-256-256-10": lambda: lmc.models.mlp(64, [256] * 3, 10),
    "MLP 64-512-512-512-10": lambda: lmc.models.mlp(64, [512] * 3, 10),
    "CNN 16-32": lambda: lmc.models.cnn((16, 32)),
    "ViT, width 32, 2 blocks": lambda: lmc.models.vit(),
    "VGG11, batch norm, 1/8 width": lambda: lmc.models.vgg(1 / 8, image=(1, 8, 8)),
}


def plain_loop(make: Callable[[], nn.Module], data: lmc.data.Dataset, seeds: int, epochs: int, fused: bool) -> None:
    inputs, targets = data.train
    for seed in range(seeds):
        model = make().to(inputs.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=fused)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
            for i in range(len(inputs) // BATCH):
                chosen = order[i * BATCH : (i + 1) * BATCH]
                loss = F.cross_entropy(model(inputs[chosen]), targets[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(make: Callable[[], nn.Module], flat: bool, args: argparse.Namespace) -> list[float]:
    """Best seconds of the plain loop, the plain loop with a fused optimiser, and `train`, and those of its products."""
    data = lmc.data.digits(flat=flat).to(args.device)
    options = dict(epochs=args.epochs, batch_size=BATCH, lr=RATE, device=args.device, progress=False)
    ways = [
        lambda epochs: plain_loop(make, data, args.seeds, epochs, fused=False),
        lambda epochs: plain_loop(make, data, args.seeds, epochs, fused=True),
        lambda epochs: lmc.training.train(make(), data, seeds=range(args.seeds), **(options | {"epochs": epochs})),
    ]
    best = [float("inf")] * len(ways)
    for way in ways:
        way(1)
    for _ in range(args.rounds):
        for i, way in enumerate(ways):
            best[i] = min(best[i], seconds(lambda way=way: way(args.epochs), torch.device(args.device)))
    return [*best, products(lambda: ways[-1](args.epochs)) if args.device == "cpu" else float("nan")]


PRODUCTS = (
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "convolution",
    "conv2d",
    "mkldnn_convolution",
    "thnn_conv2d",
    "convolution_backward",
)


def products(work: Callable[[], object]) -> float:
    """The seconds that matrix products and convolutions take in a piece of work."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    names = {f"aten::{name.removesuffix('_')}{end}" for name in PRODUCTS for end in ("", "_")}
    names |= {"aten::_slow_conv2d_forward", "aten::_slow_conv2d_backward", "aten::slow_conv2d_forward"}
    return sum(event.self_cpu_time_total for event in profile.key_averages() if event.key in names) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.device}, {args.threads} threads, {args.seeds} seeds, {args.epochs} epochs\n"
    )
    print("| network | plain loop, s | fused optimiser | `train`, s | `train` is faster by | `train` / limit |")
    print("|---|---|---|---|---|---|")
    for name, make in CASES.items():
        if args.only in name:
            plain, fused, ours, limit = measure(make, name.startswith("MLP"), args)
            row = f"{plain:.2f} | {plain / fused:.2f}x | {ours:.2f} | **{plain / ours:.2f}x** | {ours / limit:.2f}"
            print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
