"""How often each public function waits for the device that it runs on, counted on the pretend device of the tests.

    python benchmarks/waits.py
    python benchmarks/waits.py loss_path ties --lines       # and from which lines

The calls are the small ones of `tests/project/test_accidents.py`, all arguments on the device. `operators` are launches,
`reads` numbers that are asked for (`.item()` and its kin), `to host` and `to device` copies. A GPU that is asked for a
number finishes all that it was given first. What is counted depends on the call and not on the machine.
"""

import argparse
import sys
import warnings
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "project")]

import pretend  # noqa: E402
from test_accidents import NAMES, World, call  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[name for name in NAMES if name != "projection"])
    parser.add_argument("--lines", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| function | operators | reads | to host | to device |\n|---|---|---|---|---|")
    for name in args.names:
        world = World()
        for key in ("a", "b", "c", "base", "model", "x", "y"):
            setattr(world, key, pretend.far(getattr(world, key)))
        with pretend.counted() as found:
            call(name, world)
        print(
            f"| `{name}` | {found.launches:,} | {found.items:,} | {found.to_host:,} | {found.to_device:,} |", flush=True
        )
        for line, count in found.lines.most_common(5) if args.lines else []:
            print(f"  {count} {line}")


if __name__ == "__main__":
    main()
