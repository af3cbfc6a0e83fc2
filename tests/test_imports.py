"""Data flows one way through the package, and importing the core costs nothing but the core's dependencies.

Only imports that run when a module is imported count: a result's `.plot()` may import the drawing code when called.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lmc"

# For each part of the package, the other parts it may import. `lmc/__init__.py` may import all of them.
LEAVES = {"errors", "extras", "files", "progress", "modules", "weights", "batches", "inputs", "network"}
LEAVES |= {"stored", "checkpoints"}
ALLOWED = {
    "errors": set(),
    "extras": {"errors"},
    "files": {"errors"},
    "progress": set(),
    "modules": {"errors"},
    "weights": {"errors"},
    "batches": {"errors"},
    "stored": {"errors"},
    "checkpoints": {"errors", "stored", "weights"},
    "inputs": {"errors", "batches"},
    "network": {"errors", "modules", "weights", "batches"},
    "batchnorm": LEAVES,
    "rescalable": LEAVES,
    "renormalize": LEAVES | {"batchnorm", "rescalable"},
    "symmetry": LEAVES,
    "align": LEAVES | {"symmetry", "batchnorm"},
    "landscape": LEAVES | {"batchnorm", "renormalize", "rescalable"},
    "merge": LEAVES | {"symmetry", "align", "batchnorm", "landscape"},
    "data": LEAVES,
    "models": LEAVES | {"symmetry"},
    "training": LEAVES,
    "plots": LEAVES | {"symmetry", "align", "landscape", "merge"},
    "widgets": LEAVES | {"symmetry", "align", "landscape", "merge", "plots"},
    "cli": LEAVES | {"symmetry", "align", "landscape", "merge", "data"},
    "__main__": {"cli"},
}
CORE_NEEDS = {"torch", "numpy", "scipy", "safetensors", "tqdm"}
DRAWING = {"plotly", "anywidget", "ipywidgets", "traitlets", "IPython", "pandas"}


def imports_when_loaded(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names that importing a module imports; bodies of functions and of `if TYPE_CHECKING` are left out."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        todo.extend(ast.iter_child_nodes(node))


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_layers(path: Path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    part = parts[0]
    assert part in ALLOWED, f"lmc/{part} is new: say in ALLOWED what it may import"
    may_draw = part in ("plots", "widgets")
    package = ".".join(["lmc", *parts[:-1]])
    for name in imports_when_loaded(ast.parse(path.read_text(encoding="utf-8")), package):
        top, *rest = name.split(".")
        if top == "lmc":
            target = rest[0] if rest else ""
            assert target in ALLOWED, f"{name}: import the module that defines it, not the whole package"
            assert target == part or target in ALLOWED[part], f"lmc.{part} may not import lmc.{target} ({name})"
        else:
            allowed = top in sys.stdlib_module_names or top in CORE_NEEDS or (may_draw and top in DRAWING)
            assert allowed, f"{name}: import it inside the function that needs it"


def test_the_layers_have_no_cycle():
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {part for part, below in ALLOWED.items() if part not in done and below <= done}
        assert ready, f"a cycle among {sorted(ALLOWED.keys() - done)}"
        done |= ready


def test_importing_lmc_loads_no_extra():
    heavy = ["plotly", "pandas", "sklearn", "anywidget", "ipywidgets", "IPython", "transformers", "ot", "cma"]
    code = f"import sys, lmc; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a.b, c", {"a.b", "c"}),
        ("from .x import y", {"lmc.align.x.y"}),
        ("from ..weights import lerp", {"lmc.weights.lerp"}),
        ("from . import x", {"lmc.align.x"}),
        ("try:\n    import a\nexcept ImportError:\n    import b", {"a", "b"}),
        ("class C:\n    import a", {"a"}),
        ("def f():\n    import a", set()),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a", {"typing.TYPE_CHECKING"}),
    ],
)
def test_only_imports_at_load_time_are_seen(source: str, expected: set[str]):
    assert set(imports_when_loaded(ast.parse(source), "lmc.align")) == expected
