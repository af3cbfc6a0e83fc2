"""Two networks, one basin: what `make demo` runs.

Trains two networks on handwritten digits from different seeds, moves the hidden units of the second to fit the first,
and measures the loss on the straight line between their weights before and after. Prints a table and writes a page that
needs neither Python nor a network to be played with.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads; networks this small are slower on more threads

import torch  # noqa: E402

import lmc  # noqa: E402

WIDTHS = [512, 512, 512]
TITLE = "Two networks, one basin"
TEXT = [
    "Networks A and B have the same architecture and were trained on the same handwritten digits, from different random "
    "seeds. Halfway between their weights lies a network that is far worse than both: the curve called naive.",
    "The hidden units of a layer can be put in any order, and scaled, without changing what a network computes. Here B's "
    "units are moved in the way that fits A's best. The line from A to this B stays low: the two were in one basin all "
    "along. Move the slider, and switch between the two lines.",
]


class Table:
    """Rows of (step, result, seconds), printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []
        self.clock = time.perf_counter()

    def add(self, step: str, result: str) -> None:
        """A row for what was done since the last one."""
        now = time.perf_counter()
        self.rows.append({"step": step, "result": result, "seconds": f"{now - self.clock:.1f}"})
        print(f"  {step:<33}{result:<58}{now - self.clock:6.1f} s", flush=True)
        self.clock = time.perf_counter()


def accuracy(model: torch.nn.Module, weights: lmc.weights.Weights, split: tuple[torch.Tensor, torch.Tensor]) -> float:
    inputs, targets = split
    with torch.no_grad():
        predicted = torch.func.functional_call(model, weights, (inputs,)).argmax(1)
    return (predicted == targets).double().mean().item()


def barrier_of(path: lmc.Path) -> str:
    return f"barrier {path.barrier:.3f} nats, {path.error_barrier:.1f} points of error"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/demo.html"), help="the page (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 1), metavar=("A", "B"), help="default 0 1")
    parser.add_argument("--budget", type=float, default=8, metavar="SECONDS", help="to move B in (default 8)")
    args = parser.parse_args()

    print(f"{TITLE}: 64-{'-'.join(map(str, WIDTHS))}-10 on 8x8 digits, seeds {args.seeds[0]} and {args.seeds[1]}\n")
    table = Table()
    data = lmc.data.digits()
    model = lmc.models.mlp(64, WIDTHS, 10)
    a, b = lmc.training.train(model, data, seeds=args.seeds)
    first, second = (accuracy(model, weights, data.test) for weights in (a, b))
    table.add("train A and B at once", f"test accuracy {first:.1%} and {second:.1%}")

    table.add("walk from A to B", barrier_of(lmc.loss_path(model, a, b, data)))

    spec = lmc.permutation_spec(model, data.train[0][:2])
    certificate = spec.certify(model, data.train[0][:64])
    table.add(
        "find and certify the symmetries",
        f"10^{spec.log10_order:.0f} orders of the units; outputs equal to {certificate.bound:.0e}",
    )

    found = lmc.connect(model, a, b, data, spec=spec, budget=args.budget, progress=False)
    table.add(
        f"move B onto A, {args.budget:g} s at most",
        f"distance {lmc.weights.distance(a, b):.1f}, then {lmc.weights.distance(found.a, found.weights):.1f}",
    )
    print(f"    by {found.method}")
    table.add("walk from A to B moved", barrier_of(found.path))

    args.out.parent.mkdir(parents=True, exist_ok=True)
    found.save_html(args.out, title=TITLE, text=TEXT, rows=table.rows)
    print(f"\n{args.out}: open it in a browser and move the slider")


if __name__ == "__main__":
    main()
