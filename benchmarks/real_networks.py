"""Loss barriers between MLPs 784-512-512-512-10 trained on MNIST and on Fashion-MNIST, before and after alignment.

    LMC_DATA=folder python benchmarks/real_networks.py

`folder` holds the original files (`lmc.data.mnist` says where they are looked for; without it they are downloaded).
For each data set five pairs of seeds are trained and matched by weights, and loss and error are taken at 25 points of
the line between them on the 10,000 test images; barriers are those above the line between the ends.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import lmc

WIDTHS = [512, 512, 512]
SETS = {"MNIST": lmc.data.mnist, "Fashion-MNIST": lmc.data.fashion_mnist}


def pair(data: lmc.data.Dataset, seeds: tuple[int, int], args: argparse.Namespace) -> dict[str, float]:
    """Everything measured about one pair."""
    model = lmc.models.mlp(784, WIDTHS, 10)
    start = time.perf_counter()
    a, b = lmc.training.train(
        model, data, seeds=seeds, epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, device=args.device
    )
    trained = time.perf_counter()
    spec = lmc.permutation_spec(model, data.train[0][:2])
    moved = lmc.weight_matching(spec, a, b, seed=0, restarts=args.restarts).apply(b)
    matched = time.perf_counter()
    naive = lmc.loss_path(model, a, b, data.test)
    aligned = lmc.loss_path(model, a, moved, data.test)
    ends = naive.values["data"]["accuracy"][[0, -1]]
    return {
        "accuracy": 100 * float(ends.mean()),
        "naive": naive.barrier,
        "aligned": aligned.barrier,
        "naive error": naive.error_barrier,
        "aligned error": aligned.error_barrier,
        "seconds training": trained - start,
        "seconds matching": matched - trained,
    }


def spread(rows: list[dict[str, float]], column: str, digits: int) -> str:
    values = [row[column] for row in rows]
    return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=SETS)
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {args.device}; Adam {args.lr:g}, cosine, {args.epochs} epochs of batches of "
        f"{args.batch_size}; {args.pairs} pairs of seeds; mean (smallest to largest) over the pairs\n"
    )
    print(
        "| data | test accuracy, % | loss barrier, naive, nats | aligned | error barrier, naive, points | aligned |",
        end="",
    )
    print(" s training a pair | s matching |\n" + "|---" * 8 + "|")
    for name, load in SETS.items():
        if args.only in (None, name):
            data = load().to(args.device)
            rows = [pair(data, (2 * i, 2 * i + 1), args) for i in range(args.pairs)]
            columns = {"accuracy": 1, "naive": 2, "aligned": 3, "naive error": 1, "aligned error": 2}
            cells = [spread(rows, column, digits) for column, digits in columns.items()]
            times = [f"{max(row[f'seconds {what}'] for row in rows):.1f}" for what in ("training", "matching")]
            print("|", " | ".join([name, *cells, *times]), "|", flush=True)


if __name__ == "__main__":
    main()
