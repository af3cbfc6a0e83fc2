"""Put many random programs through discovery and count what comes out, by rule and by form of its arguments.

    python benchmarks/fuzz.py --first 0 --last 10000 --file fuzz.json

Two series, half of the programs each: "plain" draws from common statements, "every rule" also from those for rarely
needed rules. Unsound programs are printed with their source. The counts are written to the file after every few programs;
the same call goes on where it stopped. One process: for several, give each its own seeds and file.
"""

import argparse
import copy
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzz.check import Outcome, outcomes  # noqa: E402
from fuzz.generate import random_program  # noqa: E402
from fuzz.program import Program  # noqa: E402

from lmc.core.files import write_text  # noqa: E402
from lmc.symmetry.rules import RULES  # noqa: E402

TOGETHER = 20
SERIES = {"plain": False, "every rule": True}
COLUMNS = ("programs", "traced", "with groups", "groups", "untraced", "crashed", "unsound")


def new_counts() -> dict[str, Any]:
    empty = {"next": None, "seconds": 0.0, "counts": {}, "rules": {}, "failures": []}
    return {"torch": torch.__version__, **{name: copy.deepcopy(empty) for name in SERIES}}


def add(series: dict[str, Any], programs: list[Program]) -> None:
    """Count the outcomes of some programs."""
    counts, met = Counter(series["counts"]), Counter()
    started = time.process_time()
    for result in attempts(programs, met):
        counts["programs"] += 1
        if isinstance(result, str):
            counts["crashed"] += 1
            failure = result
        else:
            counts["untraced" if result.untraced else "traced"] += 1
            counts["groups"] += len(result.groups)
            counts["with groups"] += bool(result.groups)
            counts["unsound"] += not result.sound
            failure = "" if result.sound else str(result)
        if failure:
            series["failures"].append(failure)
            tqdm.write(failure)
    series["seconds"] += time.process_time() - started
    series["counts"] = dict(counts)
    for (rule, form), times in met.items():
        forms = series["rules"].setdefault(rule, {})
        forms[form] = forms.get(form, 0) + times


def attempts(programs: list[Program], met: Counter) -> list[Outcome | str]:
    """The outcome of each program, or what discovery raised against its own contract."""
    try:
        return list(outcomes(programs, met=met))
    except Exception as error:  # a crash is a result here
        if len(programs) == 1:
            return [f"seed {programs[0].seed} crashed: {type(error).__name__}: {error}\n{programs[0].source}"]
        return [result for program in programs for result in attempts([program], met)]


def tables(found: dict[str, Any]) -> str:
    """Two markdown tables: outcomes by series; nodes and forms of arguments by rule and series."""
    lines = [f"torch {found['torch']}", "", f"| series | {' | '.join(COLUMNS)} | CPU seconds each |", "|---" * 9 + "|"]
    for name in SERIES:
        counts = Counter(found[name]["counts"])
        each = found[name]["seconds"] / max(1, counts["programs"])
        lines.append(f"| {name} | {' | '.join(str(counts[c]) for c in COLUMNS)} | {each:.2f} |")
    lines += ["", f"| rule | {' | '.join(f'{name}: nodes | forms' for name in SERIES)} |", "|---" * 5 + "|"]
    rules = {f"{rule.__module__.rpartition('.')[2]}.{rule.__name__}" for rule in RULES.values()}
    rules.update(rule for name in SERIES for rule in found[name]["rules"])
    for rule in sorted(rules):
        forms = [found[name]["rules"].get(rule, {}) for name in SERIES]
        lines.append(f"| {rule} | {' | '.join(f'{sum(f.values())} | {len(f)}' for f in forms)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--last", type=int, default=10_000, help="the seed to stop before")
    parser.add_argument("--file", type=Path, default=Path("fuzz.json"), help="where the counts are, and are written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    found = json.loads(options.file.read_text()) if options.file.exists() else new_counts()
    middle = (options.first + options.last) // 2
    ends = dict(zip(SERIES, ((options.first, middle), (middle, options.last)), strict=True))
    for name, (first, _) in ends.items():
        found[name]["next"] = found[name]["next"] if found[name]["next"] is not None else first
    bar = tqdm(total=options.last - options.first, initial=sum(found[n]["next"] - ends[n][0] for n in SERIES), delay=2)
    while any(found[name]["next"] < last for name, (_, last) in ends.items()):
        for name, (_, last) in ends.items():
            seeds = range(found[name]["next"], min(last, found[name]["next"] + TOGETHER))
            if seeds:
                add(found[name], [random_program(seed, every_rule=SERIES[name]) for seed in seeds])
                found[name]["next"] = seeds.stop
                write_text(options.file, json.dumps(found, indent=1))
                bar.update(len(seeds))
    print(tables(found))


if __name__ == "__main__":
    main()
