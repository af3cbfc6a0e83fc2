"""Intrinsic dimension of the MLP 784-200-200-10 on MNIST, beside the published one (Li et al. 2018, arXiv:1804.08838).

    LMC_DATA=folder python benchmarks/intrinsic.py                              the paper's length: hours on one core
    LMC_DATA=folder python benchmarks/intrinsic.py 500 750 --epochs 20 --seeds 0

`folder` holds MNIST in one of the layouts that `lmc.data.mnist` reads (without it, it is downloaded). A row for each
network as soon as it is trained, then the dimension by the paper's rule against two baselines: its global one (accuracy 1) and
the network trained in all directions.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import lmc

GLOBAL = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dimensions", nargs="*", type=int, default=[500, 750, 1000], metavar="DIMENSION")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--kind", default="sparse", help="of projection: dense, sparse or fastfood")
    parser.add_argument("--direct", type=int, default=20, help="epochs in all directions; 0 leaves this baseline out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, model = lmc.data.mnist(progress=False), lmc.models.mlp(784, [200, 200], 10)
    print(
        "| dimension | projection | seed | epochs | lr | test accuracy | s |\n|---|---|---|---|---|---|---|", flush=True
    )

    def row(*cells: object) -> None:
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    accuracies = np.zeros((len(args.dimensions), len(args.seeds)))
    for column, seed in enumerate(args.seeds):
        for at, dimension in enumerate(args.dimensions):
            began = time.perf_counter()
            found = lmc.training.intrinsic_dimension(
                model, data, [dimension], baseline=GLOBAL, kind=args.kind, seeds=[seed], epochs=args.epochs, lr=args.lr,
                progress=False,
            )  # fmt: skip
            accuracies[at, column] = found.accuracies[0, 0]
            taken = round(time.perf_counter() - began)
            row(dimension, args.kind, seed, args.epochs, args.lr, f"{accuracies[at, column]:.4f}", taken)
    baselines = {"global": GLOBAL}
    if args.direct:
        began = time.perf_counter()
        trained = lmc.training.train(
            model, data, seeds=args.seeds, epochs=args.direct, batch_size=128, lr=1e-3, progress=False
        )
        scores = [lmc.landscape.evaluate(model, weights, data)["test"].accuracy for weights in trained]
        baselines["own"] = float(np.mean(scores))
        taken = round(time.perf_counter() - began)
        row("all", "none", args.seeds, args.direct, 1e-3, ", ".join(f"{score:.4f}" for score in scores), taken)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for name, baseline in baselines.items():
        order = np.argsort(args.dimensions)
        tried = tuple(args.dimensions[at] for at in order)
        found = lmc.training.IntrinsicDimension(tried, accuracies[order], baseline, 0.9, args.kind, parameters)
        print(f"\n{name} baseline: {found}")


if __name__ == "__main__":
    main()
