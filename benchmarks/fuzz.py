"""Run many random programs through discovery and count: sound, unsound, untraced, groups.

    python benchmarks/fuzz.py --programs 10000 [--start 0]

Prints every unsound program with its source, then a markdown table.
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzz.check import Outcome, outcome  # noqa: E402
from fuzz.generate import random_program  # noqa: E402


def attempt(seed: int) -> Outcome | str:
    """The outcome of a seed, or the name of the exception that discovery raised against its own contract."""
    try:
        return outcome(random_program(seed))
    except Exception as error:  # a crash is a result here
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    counts: Counter[str] = Counter()
    started, slowest, sources = time.perf_counter(), (0.0, -1), set()
    for seed in tqdm(range(options.start, options.start + options.programs), delay=2):
        begun = time.perf_counter()
        result = attempt(seed)
        slowest = max(slowest, (time.perf_counter() - begun, seed))
        if isinstance(result, str):
            counts["crashed"] += 1
            tqdm.write(f"seed {seed}: crashed, {result}")
            continue
        sources.add(result.program.source)
        counts["untraced"] += bool(result.untraced)
        counts["groups"] += len(result.groups)
        counts["with groups"] += bool(result.groups)
        if not result.sound:
            counts["unsound"] += 1
            tqdm.write(str(result))
    print("| programs | different | traced | with groups | groups | crashed | unsound | seconds each | slowest |")
    print("|---|---|---|---|---|---|---|---|---|")
    each = (time.perf_counter() - started) / options.programs
    print(
        f"| {options.programs} | {len(sources)} | {options.programs - counts['untraced'] - counts['crashed']} | {counts['with groups']} "
        f"| {counts['groups']} | {counts['crashed']} | {counts['unsound']} | {each:.2f} | {slowest[0]:.1f} s (seed {slowest[1]}) |"
    )


if __name__ == "__main__":
    main()
