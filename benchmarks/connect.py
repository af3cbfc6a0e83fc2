"""`lmc.connect` on stored pairs, beside every single method of `lmc.align.compare` on the same pair.

Barriers are of the test loss at 25 points, in nats. Seconds are of this process on one thread, and so is the budget, so
that they do not depend on what else the machine does. `python benchmarks/connect.py digits-vit toy-text-gpt --budget 60`;
without names all stored pairs. With `--alone` the single methods are left out.
"""

import argparse
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch  # noqa: E402

import lmc  # noqa: E402
from lmc.core import progress  # noqa: E402

PAIRS = sorted(
    path.parent.name
    for path in (Path(__file__).parents[1] / "data").glob("*/manifest.json")
    if "trajectory" not in path.parent.name and "cifar10" not in path.parent.name  # these: benchmarks/cifar10.py
)


def data_of(name: str):
    return lmc.data.toy_text() if "text" in name else lmc.data.digits(flat="mlp" in name)


def row(*cells: object) -> None:
    print("| " + " | ".join(f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


def singles(name: str, method: str) -> tuple[float, float]:
    """The barrier by one method, repaired or not, whichever is lower, and its seconds."""
    pair, data = lmc.data.checkpoint(name), data_of(name)
    model = pair.model()
    spec = lmc.permutation_spec(model, data.train[0][:2])
    started = time.process_time()
    moved = lmc.align.METHODS[method](spec, model, pair[0], pair[1], data)
    seconds = time.process_time() - started
    moved = moved.apply(pair[1]) if isinstance(moved, lmc.Permutation) else moved
    paths = [lmc.loss_path(model, pair[0], moved, data, repair=repair) for repair in ("auto", "repair")]
    return min(path.barrier for path in paths), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", default=PAIRS, metavar="PAIR")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of process time for connect (default 60)")
    parser.add_argument("--alone", action="store_true", help="without the single methods")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    progress.clock = time.process_time
    row("pair", "method", "barrier", "seconds")
    row("---", "---", "---", "---")
    for name in options.pairs:
        pair, data = lmc.data.checkpoint(name), data_of(name)
        if not options.alone:
            for method in lmc.align.METHODS:
                row(name, method, *singles(name, method))
        found = lmc.connect(pair.model(), pair[0], pair[1], data, budget=options.budget, progress=False)
        for each in found.tried:
            row(name, f"(held out) {each.method} {each.note}".strip(), each.barrier, each.seconds)
        how = f"{found.method}{', repaired' if found.repaired else ''}"
        row(name, f"**connect**: {how}", found.barrier, found.seconds)


if __name__ == "__main__":
    main()
