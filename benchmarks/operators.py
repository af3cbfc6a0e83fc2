"""Put samples of torch's own database of operators through discovery: a markdown table of what came out.

    LMC_THOROUGH=1 python benchmarks/operators.py > operators.md

With the variable LMC_THOROUGH set six samples of each operator, otherwise one. Rows gather the operators with the same counts:
samples drawn, samples that torch could trace and that have a rule, and those of these with groups.
"""

import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzz.operators import Tally, operators, tally  # noqa: E402


def table(total: Tally) -> str:
    rows: dict[tuple[int, int, int], list[str]] = {}
    for name in sorted(total.drawn):
        rows.setdefault((total.drawn[name], total.samples[name], total.groups[name]), []).append(name)
    lines = ["| drawn | with a rule | with groups | operators |", "|---|---|---|---|"]
    lines += [
        f"| {d} | {s} | {g} | {len(rows[d, s, g])}: {', '.join(rows[d, s, g])} |" for d, s, g in sorted(rows)[::-1]
    ]
    sums = (sum(counts.values()) for counts in (total.drawn, total.samples, total.groups))
    lines.append("| " + " | ".join(f"**{n}**" for n in sums) + f" | {len(total.drawn)} operators |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    started, total = time.process_time(), Tally()
    for entry in tqdm(operators(), delay=2):
        found = tally([entry])
        total.add(found)
        for text in found.failures:
            tqdm.write(text)
    print(table(total))
    forms = sum(map(len, total.forms.values()))
    seconds = time.process_time() - started
    print(
        f"\ntorch {torch.__version__}: {len(total.forms)} operators with a rule met in {forms} forms of arguments, ",
        end="",
    )
    print(f"{len(total.failures)} failures, {seconds:.0f} CPU seconds")


if __name__ == "__main__":
    main()
