"""The coverage table: symmetries found in every architecture of the zoo, against the count derived by hand.

    python benchmarks/zoo.py [NAME ...]

Needs `transformers` for the architectures whose names begin with hf_.
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo import ENTRIES, Entry  # noqa: E402

import lmc  # noqa: E402
from lmc.symmetry.discovery.discover import discover  # noqa: E402


def row(entry: Entry) -> str:
    """One line of the table."""
    model, example = entry.build(), entry.example()
    started = time.process_time()
    found = discover(model, example, entry.outputs, progress=False)
    seconds = time.process_time() - started
    spec = lmc.PermutationSpec(found.groups, found.shapes, found.buffers, found.frozen)
    proof = spec.certify(model, entry.example(1), trials=1, outputs=entry.outputs, also=entry.larger_example(1))
    sizes = Counter(group.size for group in spec.groups.values())
    verdict = "yes" if sizes == entry.expected.sizes else f"no: {entry.short}" if entry.short else "no"
    cells = [
        entry.name,
        sum(p.numel() for p in model.parameters()),
        len(spec.groups),
        f"{spec.log10_order:.1f}",
        f"{entry.expected.log10_order:.1f}",
        verdict,
        f"{spec.coverage:.1%}",
        f"{proof.max_error:.0e}",
        "yes" if entry.larger else "no",
        f"{seconds:.2f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures; all if none is named")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(
        "| architecture | parameters | groups | log10 of order | by hand | same groups | parameters on a moving axis "
        "| error (float64) | second shape | trace + solve (processor s) |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for entry in ENTRIES:
        if not options.names or entry.name in options.names:
            try:
                print(row(entry), flush=True)
            except Exception as error:  # one architecture must not hide the others
                print(f"| {entry.name} | failed: {type(error).__name__} |", flush=True)


if __name__ == "__main__":
    main()
