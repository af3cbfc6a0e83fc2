"""The examples in docstrings do what they say, every function of the top level has one, and maps of rooms are whole."""

import doctest
import importlib
import inspect

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
