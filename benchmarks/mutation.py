"""Change one place of the engine's core, see whether a test notices, and count: a random sample of such mutants.

    python benchmarks/mutation.py --sample 250 --file mutants.json            # goes on where it stopped
    python benchmarks/mutation.py --file mutants.json --again survived        # those that no test noticed, once more
    python benchmarks/mutation.py --file mutants.json --table                 # what came out

The mutants are those of mutmut 3 (`pip install mutmut`, needed for nothing else) inside functions; the texts of errors and
warnings are left as they are. Each is tried in a fork of one process that has imported torch and pytest: the mutated file
is imported in place of the real one, and the tests that belong to it run until one fails; where none does, wider ones.
"""

import argparse
import difflib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy  # noqa: F401
import pytest
import torch
import torch._dynamo  # noqa: F401 (what every fork would import by itself)
import torch.export  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1]))
HOME = Path(__file__).parents[1]
LIMIT = 120  # seconds of processor time, after which a mutant counts as noticed
SOLVED = ["tests/symmetry/test_solve.py", "tests/symmetry/test_discover.py", "tests/symmetry/test_rules.py"]
SPECS = ["tests/symmetry/test_spec.py", "tests/symmetry/test_notation.py"]
MATCHED = ["tests/align/test_weight_matching.py", "tests/align/test_alignment_identities.py"]
MERGED = ["tests/merge/test_engine.py", "tests/merge/test_averaging.py", "tests/merge/test_chunks.py"]
WIDER_MERGED = [
    "tests/foundations/test_depth.py",
    "tests/merge/test_sparse.py",
    "tests/merge/test_with_data.py",
    "tests/merge/test_write.py",
]
WIDER_SOLVED = ["tests/symmetry/test_record.py", "tests/symmetry/test_fuzz.py", "tests/symmetry/test_handwritten.py"]
NORMS = ["tests/foundations/test_batchnorm.py", "tests/foundations/test_repair.py"]
# Mutated file -> the tests that belong to it, and those that are run where these do not notice.
FILES: dict[str, tuple[list[str], list[str]]] = {
    **{f"lmc/symmetry/discovery/{name}.py": (SOLVED, WIDER_SOLVED) for name in (
        "discover", "interpret", "provenance", "solve", "tables")},
    "lmc/symmetry/spec.py": (SPECS, [*SOLVED, "tests/foundations/test_results.py"]),
    **{f"lmc/symmetry/groups/{name}.py": (SPECS, SOLVED) for name in ("group", "symmetries")},
    **{f"lmc/align/weight_matching/{name}.py": (MATCHED, ["tests/align/test_many.py", "tests/align/test_comparison.py"])
       for name in ("algorithm", "blocks", "gains", "matching")},
    **{f"lmc/merge/engine/{name}.py": (MERGED, WIDER_MERGED) for name in ("assembly", "call", "chunks", "method", "tensors")},
    "lmc/merge/engine/quantiles.py": (["tests/merge/test_engine.py"], WIDER_MERGED),
    "lmc/merge/engine/aligning.py": (["tests/merge/test_aligning.py"], MERGED),
    "lmc/network/batchnorm.py": (NORMS, ["tests/merge/test_with_data.py"]),
    "lmc/network/moments.py": (["tests/merge/test_chunks.py", *NORMS], ["tests/align/test_activation_matching.py"]),
}  # fmt: skip


def mutants(path: str) -> list[Callable[[], str]]:
    """Of a file, what makes its source with one change each."""
    import libcst as cst
    from mutmut import configuration
    from mutmut.mutation.file_mutation import create_mutations

    configuration._guess_source_paths = lambda: ["lmc"]  # it looks for a folder `src`

    class Texts(cst.CSTVisitor):
        """Strings inside of `raise` and `warn`."""

        def __init__(self) -> None:
            self.depth, self.found = 0, set()

        def on_visit(self, node: cst.CSTNode) -> bool:
            self.depth += self._says(node)
            if self.depth and isinstance(node, (cst.SimpleString, cst.FormattedString)):
                self.found.add(node)
            return True

        def on_leave(self, node: cst.CSTNode) -> None:
            self.depth -= self._says(node)

        def _says(self, node: cst.CSTNode) -> bool:
            called = isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value == "warn"
            return called or isinstance(node, cst.Raise)

    module, mutations, *_ = create_mutations(path, (HOME / path).read_text())
    module.visit(texts := Texts())
    return [
        lambda m=m: module.deep_replace(m.original_node, m.mutated_node).code
        for m in mutations
        if m.contained_by_top_level_function is not None and m.original_node not in texts.found
    ]


def change(path: str, source: str) -> str:
    """The lines that a mutant has otherwise, as a short diff."""
    lines = difflib.unified_diff((HOME / path).read_text().splitlines(), source.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


class Mutated(importlib.abc.MetaPathFinder):
    """Imports one module from a given source."""

    def __init__(self, path: str, source: str) -> None:
        self.path, self.source = HOME / path, source
        self.name = path.removesuffix(".py").replace("/", ".")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        loader = importlib.machinery.SourceFileLoader(name, str(self.path))
        loader.get_code = lambda _: compile(self.source, str(self.path), "exec")  # type: ignore[method-assign]
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


def attempt(path: str, source: str, widely: bool = True) -> tuple[str, float]:
    """What became of a mutant, and the processor time in seconds."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))
            out = os.open(os.devnull, os.O_WRONLY)
            os.dup2(out, 1), os.dup2(out, 2)
            sys.meta_path.insert(0, Mutated(path, source))
            os.chdir(HOME)
            for tests in FILES[path][: 2 if widely else 1]:
                arguments = ["-x", "-q", "-p", "no:nbval", "-p", "no:cacheprovider", "-o", "addopts=", *tests]
                code = int(pytest.main(arguments))
                if code:
                    break
        except BaseException:  # the interpreter itself may not start with this mutant
            code = 1
        os._exit(code)
    _, status, used = os.wait4(child, 0)
    seconds = used.ru_utime + used.ru_stime
    if os.WIFSIGNALED(status):
        hung = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        return ("hung" if hung else "killed"), seconds
    if time.monotonic() - started > 10 * LIMIT:
        return "hung", seconds
    return ("survived" if os.WEXITSTATUS(status) == 0 else "killed"), seconds


def drawn(count: int, seed: int) -> list[dict[str, Any]]:
    """A sample of all mutants of all files, in random order, and how many there are in each file."""
    everything = {path: mutants(path) for path in FILES}
    every = [(path, number) for path, sources in everything.items() for number in range(len(sources))]
    chosen = random.Random(seed).sample(every, min(count, len(every)))
    sources = [(path, everything[path][number]()) for path, number in chosen]
    return [
        {"file": p, "of": len(everything[p]), "change": change(p, source), "source": source} for p, source in sources
    ]


def table(found: list[dict[str, Any]]) -> str:
    """A markdown table of outcomes by file."""
    kinds = ("killed", "hung", "survived", "equivalent")
    lines = [f"| file | mutants there are | tried | {' | '.join(kinds)} |", "|---" * (3 + len(kinds)) + "|"]
    total: Counter[str] = Counter()
    for path in FILES:
        own = [mutant for mutant in found if mutant["file"] == path and "outcome" in mutant]
        counts = Counter(mutant["outcome"] for mutant in own)
        there = next((mutant["of"] for mutant in found if mutant["file"] == path), 0)
        total += counts + Counter(there=there, tried=len(own))
        numbers = " | ".join(str(counts[kind]) for kind in kinds)
        lines.append(f"| {path.removeprefix('lmc/')} | {there} | {len(own)} | {numbers} |")
    numbers = " | ".join(f"**{total[kind]}**" for kind in kinds)
    return "\n".join([*lines, f"| **all** | {total['there']} | **{total['tried']}** | {numbers} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=250)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--file", type=Path, default=Path("mutants.json"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further mutant afterwards")
    parser.add_argument("--again", choices=("survived",), help="try those once more")
    parser.add_argument("--narrowly", action="store_true", help="leave the wider tests out")
    parser.add_argument("--only", default="", help="of files whose path holds this")
    parser.add_argument("--table", action="store_true", help="print what is there, try nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.file.read_text()) if options.file.exists() else drawn(options.sample, options.seed)
    ended = time.monotonic() + options.seconds
    for mutant in [] if options.table else found:
        due = "outcome" not in mutant if options.again is None else mutant.get("outcome") == options.again
        if not due or options.only not in mutant["file"] or time.monotonic() > ended:
            continue
        mutant["outcome"], mutant["seconds"] = attempt(mutant["file"], mutant["source"], not options.narrowly)
        options.file.write_text(json.dumps(found, indent=1))
        print(f"{mutant['outcome']} ({mutant['seconds']:.1f} s) {mutant['file']}\n{mutant['change']}\n", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
