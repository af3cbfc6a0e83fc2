"""The site's own pages are true: their Python compiles, their names are public, their papers are numbers that exist."""

import importlib
import inspect
import json
import re
import shlex
from operator import attrgetter
from pathlib import Path

import pytest
import safetensors.torch
import torch

import lmc
from lmc.cli import main

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(DOCS / "guides").glob("*.md"), *(DOCS / "teaching").rglob("*.md")])
PAGES = [page for page in PAGES if page.name not in ("course.md", "gallery.md")]  # made by the build
# One page of exercises on every run, the others, half a minute of training, on the thorough one.
EXERCISES = [
    pytest.param(page, marks=[] if page.stem.startswith("06") else [pytest.mark.thorough])
    for page in PAGES
    if page.parent.name == "exercises"
]


def named(text: str) -> set[str]:
    return set(re.findall(r"\blmc(?:\.[a-z_]\w*)+", text, re.I)) - {"lmc.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_are_public_and_python_compiles(page):
    text = page.read_text(encoding="utf-8")
    for name in named(text):
        value, path = lmc, "lmc"
        for part in name.split(".")[1:]:
            path += f".{part}"
            # What is no public name is a module, there to be imported.
            value = getattr(value, part) if part in dir(value) else importlib.import_module(path)
    for source in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        compile(source, page.name, "exec")


def test_every_guide_is_listed_and_every_method_has_a_paper():
    guides = {page.stem for page in (DOCS / "guides").glob("*.md")} - {"index"}
    assert guides == set(re.findall(r"^(\w+)$", (DOCS / "guides" / "index.md").read_text(encoding="utf-8"), re.M))
    rows = re.findall(r"^\| (?!method|---)(.*) \|$", (DOCS / "methods.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 15 and all(re.search(r"(19|20)\d\d", row.split("|")[2]) for row in rows)


def test_options_of_the_methods_are_theirs():
    rows = re.findall(r"^\| (?!method|---)(.*) \|$", (DOCS / "methods.md").read_text(encoding="utf-8"), re.M)
    found = 0
    for _, names, _, options in (row.split("|") for row in rows):
        functions = [attrgetter(name.removeprefix("lmc."))(lmc) for name in named(names)]
        known = {name for function in functions for name in inspect.signature(function).parameters}
        told = set(re.findall(r"(\w+)=", " ".join(re.findall(r"`([^`]+)`", options))))
        assert functions and told <= known, (names, told - known)
        found += len(told)
    assert found > 20


def test_terms_of_the_glossary_are_in_order():
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^(\w[\w ]*)\n  \w", text, re.M)
    assert len(terms) > 12 and terms == sorted(terms)


PYTHON = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
COMMANDS = re.compile(r"^```\n(lmc .*?)^```", re.M | re.S)
FILES = re.compile(r"^```js\n(// (\w+\.js):.*?)^```", re.M | re.S)  # which name themselves on their first line
SMALL = """
import torch
import lmc
data = lmc.data.digits()
model = lmc.models.mlp(64, [16], 10)
a, b = lmc.training.train(model, data, seeds=[0, 1], epochs=3, progress=False)
spec = lmc.permutation_spec(model, data.train[0][:2])
"""
GPT = """
import lmc, transformers, torch
config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.randint(40, (4, 8))
"""
# What stands before the Python of a guide: networks to try it on.
BEFORE = {"align_two": SMALL, "bring_your_network": GPT, "sweep": SMALL, "matplotlib": SMALL, "own_explorer": SMALL}


GUIDES = [  # a sweep starts processes, each with an import of torch
    pytest.param(page, marks=[pytest.mark.thorough] if page.stem == "sweep" else [])
    for page in PAGES
    if page.parent.name == "guides"
]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda page: page.stem)
def test_guides_run_as_printed(guide, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = guide.read_text(encoding="utf-8")
    names: dict = {}
    if guide.stem == "matplotlib":
        pytest.importorskip("matplotlib", reason="the recipe is for those who have matplotlib; lmc itself does without")
    exec(BEFORE.get(guide.stem, ""), names)
    for source, file in FILES.findall(text):
        Path(file).write_text(source, encoding="utf-8")
    for source in PYTHON.findall(text):
        exec(compile(source.replace("budget=60", "budget=2"), guide.name, "exec"), names)
    for line in "".join(COMMANDS.findall(text)).splitlines():
        _folders(tmp_path)
        assert main(shlex.split(line.split("#")[0])[1:]) == 0, line


def _folders(where: Path) -> None:
    """A base and two models fine-tuned from it, as folders of checkpoints."""
    draw = torch.Generator().manual_seed(0)
    for name in ("base", "math", "code"):
        weights = {n: torch.randn(t.shape, generator=draw) for n, t in lmc.models.mlp(8, [6], 3).state_dict().items()}
        (where / name).mkdir(exist_ok=True)
        safetensors.torch.save_file(weights, where / name / "model.safetensors")


@pytest.mark.parametrize("page", EXERCISES, ids=lambda page: page.stem)
def test_solutions_run_and_what_they_claim_holds(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for source in PYTHON.findall(page.read_text(encoding="utf-8")):
        exec(compile(source, page.name, "exec"), names)


def test_every_try_has_its_exercises():
    """One exercise for each point of a notebook's last section, hidden behind a click, with an assertion in it."""
    for notebook in sorted((DOCS.parent / "notebooks").glob("*.ipynb")):
        last = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][-1]["source"])
        points = re.findall(r"^- \*\*", last.partition("## Try")[2], re.M)
        page = DOCS / "teaching" / "exercises" / f"{notebook.stem}.md"
        assert bool(points) == page.exists(), notebook.stem
        if points:
            tasks = re.split(r"^## \d", page.read_text(encoding="utf-8"), flags=re.M)[1:]
            assert len(tasks) == len(points), notebook.stem
            assert f"exercises/{notebook.stem}.md" in last
            for task in tasks:
                question, _, answer = task.partition("<details><summary>Solution</summary>")
                assert "```" not in question and "assert " in answer and answer.rstrip().endswith("</details>")
