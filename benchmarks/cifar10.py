"""All alignment methods, and `lmc.connect`, on the stored pairs of ResNet20 trained on CIFAR-10.

    LMC_DATA=folder python benchmarks/cifar10.py                     all pairs, about an hour and a half on one core
    LMC_DATA=folder python benchmarks/cifar10.py cifar10-resnet20 --store

`folder` holds CIFAR-10 in one of the layouts that `lmc.data.cifar10` reads (without it, it is downloaded). Methods learn
from the first `--train` training images, barriers are taken on the first `--test` test images. With `--store` the paths
are written to `paths/` beside the networks, where the notebooks find them.
"""

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import lmc

PAIRS = ("cifar10-resnet20", "cifar10-resnet20-layernorm", "cifar10-resnet20x2")
FOLDER = Path(__file__).parents[1] / "data"
KEPT = (
    "naive",
    "weight matching",
    "Frank-Wolfe",
    "activation matching",
    "activation matching, repaired",
    "OT, activations",
    "connect",
)
# With batch norm behind every layer, re-estimated statistics are repaired ones.
REPAIRS: dict[str, dict[str, Any]] = {"batch": {"": "auto"}, "layer": {"": None, ", repaired": "repair"}}


def row(*cells: object) -> None:
    print(
        "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def stored(path: lmc.landscape.Path, name: str, title: str, store: bool) -> None:
    if store and title in KEPT:
        file = FOLDER / name / "paths" / f"{title.replace(', ', '-').replace(' ', '-').lower()}.json"
        file.parent.mkdir(exist_ok=True)
        path.save(file)


def measure(name: str, args: argparse.Namespace) -> None:
    pair, images = lmc.data.checkpoint(name, FOLDER), lmc.data.cifar10()
    data = {
        "train": tuple(part[: args.train] for part in images.train),
        "test": tuple(part[: args.test] for part in images.test),
    }
    (a, b), model = pair, pair.model()
    methods = lmc.align.METHODS | bounded(args.steps)
    spec = lmc.permutation_spec(model, data["train"][0][:2], progress=False)
    print(f"\n### {pair.manifest['description']} (`{name}`)\n")
    row("method", "barrier (nats)", "barrier in error", "loss half way", "accuracy half way", "seconds")
    row(*["---"] * 6)
    for title in args.methods:
        started = time.process_time()
        moved = methods[title](spec, model, a, b, data)
        seconds = time.process_time() - started
        moved = moved.apply(b) if isinstance(moved, lmc.Permutation) else moved
        for suffix, repair in REPAIRS[pair.manifest["model"]["options"]["norm"]].items():
            path = lmc.loss_path(
                model, a, moved, {"test": data["test"]}, alphas=args.alphas, repair=repair,
                inputs=data["train"][0], progress=False,
            )  # fmt: skip
            show(title + suffix, path, seconds)
            stored(path, name, title + suffix, args.store)
    if args.budget:
        found = lmc.connect(model, a, b, data, spec=spec, budget=args.budget, progress=False)
        for each in found.tried:
            row(f"(held out) {each.method} {each.note}".strip(), each.barrier, "", "", "", round(each.seconds))
        show(f"**connect**: {found.method}{', repaired' if found.repaired else ''}", found.path, found.seconds)
        stored(found.path, name, "connect", args.store)


def bounded(steps: int) -> dict[str, Any]:
    """The two methods that learn from the loss half way, on so many batches of 128 images."""
    options: dict[str, Any] = {"batch_size": 128, "progress": False}
    return {
        "straight-through": lambda spec, model, a, b, data: lmc.straight_through_matching(
            spec, model, a, b, data, epochs=max(1, steps * 128 // len(data["train"][0])), **options
        ),
        "Sinkhorn, midpoint": lambda spec, model, a, b, data: lmc.sinkhorn_matching(
            spec, model, a, b, data, steps=steps, **options
        ),
    }


def show(title: str, path: lmc.landscape.Path, seconds: float) -> None:
    middle = len(path.alphas) // 2
    half = {metric: float(path.values["test"][metric][middle]) for metric in ("loss", "accuracy")}
    row(title, path.barrier, path.error_barrier, half["loss"], half["accuracy"], round(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", default=PAIRS, metavar="PAIR", help=", ".join(PAIRS))
    parser.add_argument("--methods", nargs="*", default=list(lmc.align.METHODS), metavar="METHOD")
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--steps", type=int, default=200, help="batches for methods that learn from the loss half way")
    parser.add_argument("--alphas", type=int, default=11, help="points on each way")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds for connect; 0 leaves it out")
    parser.add_argument("--store", action="store_true", help="write the paths beside the networks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in args.pairs:
        measure(name, args)


if __name__ == "__main__":
    main()
