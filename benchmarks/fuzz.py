"""Run many random programs through discovery and count: sound, unsound, untraced, groups.

    python benchmarks/fuzz.py --programs 10000 --workers 2 [--start 0]

Prints every unsound program with its source, then a markdown table.
"""

import argparse
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzz.check import outcomes  # noqa: E402
from fuzz.generate import random_program  # noqa: E402
from fuzz.program import Program  # noqa: E402

TOGETHER = 10


def count(seeds: Sequence[int]) -> tuple[Counter[str], list[str], list[int]]:
    """Counts over some seeds, a text for each failure, and a fingerprint of each program."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    programs = [random_program(seed) for seed in seeds]
    counts, failures = Counter(programs=len(seeds)), []
    for result in attempts(programs):
        if isinstance(result, str):
            counts["crashed"] += 1
            failures.append(result)
            continue
        counts["untraced"] += bool(result.untraced)
        counts["groups"] += len(result.groups)
        counts["with groups"] += bool(result.groups)
        if not result.sound:
            counts["unsound"] += 1
            failures.append(str(result))
    return counts, failures, [zlib.crc32(program.source.encode()) for program in programs]


def attempts(programs: Sequence[Program]) -> Iterator:
    """The outcome of each program, or what discovery raised against its own contract."""
    try:
        yield from outcomes(programs)
    except Exception as error:  # a crash is a result here
        if len(programs) == 1:
            yield f"seed {programs[0].seed} crashed: {type(error).__name__}: {error}"
        else:
            for program in programs:
                yield from attempts([program])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args()
    last = options.start + options.programs
    batches = [range(k, min(last, k + TOGETHER)) for k in range(options.start, last, TOGETHER)]
    counts: Counter[str] = Counter()
    different: set[int] = set()
    started = time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        for found, failures, prints in tqdm(pool.map(count, batches), total=len(batches), delay=2):
            counts += found
            different.update(prints)
            for text in failures:
                tqdm.write(text)
    each = options.workers * (time.perf_counter() - started) / options.programs
    traced = counts["programs"] - counts["untraced"] - counts["crashed"]
    print(f"torch {torch.__version__}, {options.workers} processes\n")
    print("| programs | different | traced | with groups | groups | crashed | unsound | seconds each |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {counts['programs']} | {len(different)} | {traced} | {counts['with groups']} | {counts['groups']} "
        f"| {counts['crashed']} | {counts['unsound']} | {each:.2f} |"
    )


if __name__ == "__main__":
    main()
