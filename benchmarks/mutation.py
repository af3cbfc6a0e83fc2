"""Change one place of the engine's core, see whether a test notices, and count: a random sample of such mutants.

    python benchmarks/mutation.py --sample 250 --file mutants.json            # goes on where it stopped
    python benchmarks/mutation.py --file mutants.json --again survived        # those that no test noticed, once more
    python benchmarks/mutation.py --file mutants.json --table                 # what came out

The mutants are those of mutmut 3 (`pip install mutmut`, needed for nothing else) inside functions; the texts of errors and
warnings are left as they are. Each is tried in a fork of one process that has collected the tests that belong to the files:
functions get the mutated code, and the tests run, first those that noticed most mutants before, until one fails. That
takes a second for most. With `--again survived` those that no test noticed are imported in place of the real file by a fork
that has imported torch alone, as a mutant may act when a module is imported, and wider tests run as well.
"""

import argparse
import difflib
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import os
import random
import resource
import signal
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy  # noqa: F401
import pytest
import torch
import torch._dynamo  # noqa: F401 (what every fork would import by itself)
import torch.export  # noqa: F401
from _pytest.runner import runtestprotocol

sys.path.insert(0, str(Path(__file__).parents[1]))
HOME = Path(__file__).resolve().parents[1]
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


def codes(source: str, path: str) -> dict[tuple[str, int], types.CodeType]:
    """Of every function in a source, nested ones included: its name and its line -> its code."""
    found: dict[tuple[str, int], types.CodeType] = {}

    def look(code: types.CodeType) -> None:
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                found[inner.co_qualname, inner.co_firstlineno] = inner
                look(inner)

    look(compile(source, str(HOME / path), "exec"))
    return found


class Quickly:
    """A plugin of pytest that tries mutants where it would run the tests that it has collected."""

    def __init__(self, found: list[dict[str, Any]], due: Callable[[dict[str, Any]], bool], save: Callable[[], None]):
        self.found, self.due, self.save = found, due, save
        self.noticed: Counter[str] = Counter()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for _, items in itertools.groupby(session.items, lambda item: item.nodeid.partition("::")[0]):
            runtestprotocol(next(items), log=False, nextitem=None)  # imports what every fork would import by itself
        functions: dict[str, list[types.FunctionType]] = {}
        gc.unfreeze()  # what was collected while tests were imported
        for thing in gc.get_objects():
            if type(thing) is types.FunctionType:  # proxies of torch would warn
                functions.setdefault(thing.__code__.co_filename, []).append(thing)
        gc.freeze()
        for mutant in self.found:
            if not self.due(mutant):
                continue
            own = functions.get(str(HOME / mutant["file"]), [])
            tests = FILES[mutant["file"]][0]
            items = [item for item in session.items if item.nodeid.partition("::")[0] in tests]
            items.sort(key=lambda item: -self.noticed[item.nodeid])
            self._try(mutant, own, items)
            self.noticed[mutant.get("by", "")] += 1
            self.save()
            print(f"{mutant['outcome']} ({mutant['seconds']:.1f} s) {mutant['file']}\n{mutant['change']}\n", flush=True)
        return True

    def _try(self, mutant: dict[str, Any], functions: list[types.FunctionType], items: list[pytest.Item]) -> None:
        own, changed = (codes(text, mutant["file"]) for text in ((HOME / mutant["file"]).read_text(), mutant["source"]))
        changed = {place: code for place, code in changed.items() if code != own.get(place)}
        if not any((f.__code__.co_qualname, f.__code__.co_firstlineno) in changed for f in functions):
            mutant["outcome"], mutant["seconds"] = "survived", 0.0  # a default argument, or run only at the import
            return
        heard, said = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))
                out = os.open(os.devnull, os.O_WRONLY)
                os.dup2(out, 1), os.dup2(out, 2)
                for function in functions:
                    place = function.__code__.co_qualname, function.__code__.co_firstlineno
                    if place in changed:
                        function.__code__ = changed[place]
                code = 0
                for item, following in zip(items, [*items[1:], None], strict=True):
                    if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
                        os.write(said, item.nodeid.encode())
                        code = 1
                        break
            finally:
                os._exit(code)
        os.close(said)
        _, status, used = os.wait4(child, 0)
        with open(heard, "rb") as file:
            mutant["by"] = file.read().decode()
        mutant["seconds"] = used.ru_utime + used.ru_stime
        hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        mutant["outcome"] = "hung" if hung else "survived" if status == 0 else "killed"


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


def attempt(path: str, source: str) -> tuple[str, float]:
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
            for tests in FILES[path]:
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
    parser.add_argument("--only", default="", help="of files whose path holds this")
    parser.add_argument("--table", action="store_true", help="print what is there, try nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.file.read_text()) if options.file.exists() else drawn(options.sample, options.seed)
    ended = time.monotonic() + options.seconds

    def due(mutant: dict[str, Any]) -> bool:
        wanted = "outcome" not in mutant if options.again is None else mutant.get("outcome") == options.again
        return wanted and options.only in mutant["file"] and time.monotonic() < ended

    def save() -> None:
        options.file.write_text(json.dumps(found, indent=1))

    save()
    if options.again is None and not options.table:
        os.chdir(HOME)
        tests = sorted({test for mutant in found if due(mutant) for test in FILES[mutant["file"]][0]})
        arguments = ["-s", "-q", "-p", "no:nbval", "-p", "no:cacheprovider", "-o", "addopts=", *tests]
        pytest.main(arguments, plugins=[Quickly(found, due, save)])
    for mutant in found if options.again is not None and not options.table else []:
        if due(mutant):
            mutant["outcome"], mutant["seconds"] = attempt(mutant["file"], mutant["source"])
            save()
            print(f"{mutant['outcome']} ({mutant['seconds']:.1f} s) {mutant['file']}\n{mutant['change']}\n", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
