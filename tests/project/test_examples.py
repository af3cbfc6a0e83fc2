"""The examples in docstrings do what they say, every function of the top level has one, maps of rooms are whole, and each docstring
starts with a noun or a verb."""

import ast
import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import lmc

ROOMS = ("lmc", "lmc.align", "lmc.landscape", "lmc.merge", "lmc.training", "lmc.weights")
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def found() -> dict[str, doctest.DocTest]:
    """The examples by the name of what they are of."""
    finder, tests = doctest.DocTestFinder(recurse=False, exclude_empty=True), {}
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                tests |= {
                    f"{value.__module__}.{name}": test for test in finder.find(value, name, globs={}) if test.examples
                }
    return tests


EXAMPLES = found()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_hold(name: str) -> None:
    torch.manual_seed(0)
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(EXAMPLES[name], out=report.append)
    assert not result.failed, "".join(report)


def test_every_function_of_the_top_level_has_an_example() -> None:
    shown = {name.rpartition(".")[2] for name in EXAMPLES}
    assert {name for name in lmc.__all__ if inspect.isfunction(getattr(lmc, name))} <= shown


@pytest.mark.parametrize("room", ROOMS)
def test_maps_are_whole(room: str) -> None:
    module = importlib.import_module(room)
    words = set("".join(c if c.isidentifier() or c.isdigit() else " " for c in module.__doc__ or "").split())
    assert set(module.__all__) - words == set()


FILES = sorted(Path(lmc.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FILES[0].parent)))
def test_docstrings_start_with_a_noun_or_a_verb(file: Path):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documented = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    firsts = [(ast.get_docstring(node) or "Nothing").split()[0] for node in documented]
    assert not {"What", "Which", "How", "Where", "When", "Why"} & set(firsts)
