"""The house: which rooms may know which, no circles at any depth, no crowded folder, and nothing heavy at import."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmc

PACKAGE = Path(__file__).parents[2] / "lmc"
MOST_NAMES = 16

# For each room the other rooms that it may import, anywhere in its files: in functions and for typing, too.
FLOOR = {"errors", "core", "weights", "network"}
ALLOWED = {
    "errors": set(),
    "core": {"errors"},
    "weights": {"errors", "core"},
    "network": {"errors", "core", "weights"},
    "symmetry": FLOOR,
    "landscape": FLOOR,
    "align": FLOOR | {"symmetry", "landscape"},
    "merge": FLOOR | {"symmetry", "landscape", "align"},
    "views": FLOOR | {"symmetry", "landscape", "align", "merge", "training"},
    "models": {"errors"},
    "data": {"errors", "core", "weights", "models"},
    "training": FLOOR,
    "cli": FLOOR | {"symmetry", "landscape", "align", "merge", "data"},
    "__main__": {"cli"},
}
CORE_NEEDS = {"torch", "numpy", "scipy", "safetensors", "tqdm"}
DRAWING = {"plotly", "anywidget", "ipywidgets", "traitlets", "IPython", "pandas"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file; of `lmc.a.b.name`, the module `lmc.a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names if node.module in MODULES}
    return found - {module_name(path)}


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def loaded_at_once(tree: ast.Module) -> Iterator[str]:
    """Names that importing a module imports; bodies of functions and of `if TYPE_CHECKING` are left out."""
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
            yield str(node.module)
        todo.extend(ast.iter_child_nodes(node))


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of nodes that reach each other."""
    reach = {node: set(after) for node, after in graph.items()}
    for middle in graph:
        for node in graph:
            if middle in reach[node]:
                reach[node] |= reach[middle]
    together = {frozenset(other for other in graph if other in reach[n] and n in reach[other]) for n in graph}
    return [set(found) for found in together if found]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "lmc"])
def test_imports_follow_the_directions(name: str):
    room = name.split(".")[1]
    assert room in ALLOWED, f"lmc/{room} is new: say in ALLOWED what it may import"
    for target in IMPORTS[name]:
        assert target != "lmc", f"{name}: import the module that defines a name, not the whole package"
        other = target.split(".")[1]
        assert other == room or other in ALLOWED[room], f"lmc.{room} may not import lmc.{other} ({target})"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "lmc"])
def test_only_the_core_and_what_draws_is_imported_at_once(name: str):
    may_draw = name.startswith("lmc.views.")
    for target in loaded_at_once(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        top = target.split(".")[0]
        allowed = top in ("lmc", *sys.stdlib_module_names) or top in CORE_NEEDS or (may_draw and top in DRAWING)
        assert allowed, f"{target}: import it inside the function that needs it"


def test_no_circle_between_files():
    assert circles(IMPORTS) == []


@pytest.mark.parametrize(
    "folder", sorted({path.parent.relative_to(PACKAGE.parent).as_posix() for path in MODULES.values()})
)
def test_no_circle_between_what_lies_in_a_folder(folder: str):
    """Files and folders beside each other, each folder standing for all that it holds."""
    inside = folder.replace("/", ".") + "."
    graph: dict[str, set[str]] = {}
    for name, found in IMPORTS.items():
        if name.startswith(inside):
            part = name.removeprefix(inside).split(".")[0]
            others = {t.removeprefix(inside).split(".")[0] for t in found if t.startswith(inside)}
            graph.setdefault(part, set()).update(others - {part})
    assert circles({part: found & set(graph) for part, found in graph.items()}) == []


def test_no_two_folders_import_each_other():
    """A file belongs to the folder that it lies in directly: a folder and one inside it are two."""
    graph: dict[str, set[str]] = {}
    for name, found in IMPORTS.items():
        if MODULES[name].name != "__init__.py":
            others = {t.rpartition(".")[0] for t in found if MODULES[t].name != "__init__.py"}
            graph.setdefault(name.rpartition(".")[0], set()).update(others - {name.rpartition(".")[0]})
    pairs = {tuple(sorted((a, b))) for a in graph for b in graph[a] if a in graph.get(b, ())}
    assert pairs == set()


def test_public_names_are_found_where_type_checkers_see_them():
    seen = set()
    for node in ast.parse(MODULES["lmc"].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If):
            for part in node.body:
                assert isinstance(part, ast.ImportFrom)
                seen |= {(alias.name, part.module) for alias in part.names if part.module != "lmc"}
    assert seen == set(lmc._HOMES.items())
    assert dir(lmc) == sorted(lmc.__all__) and all(getattr(lmc, name) is not None for name in lmc.__all__)
    assert [name for name in lmc.__all__ if name not in (lmc.__doc__ or "")] == []


@pytest.mark.parametrize(
    "name", [path.parent.name for path in PACKAGE.glob("*/__init__.py") if "__all__" in path.read_text()]
)
def test_completion_offers_public_names_only(name: str):
    room = importlib.import_module(f"lmc.{name}")
    assert sorted(dir(room)) == sorted(room.__all__)


@pytest.mark.parametrize("folder", sorted({path.parent for path in PACKAGE.rglob("*.*")}), ids=lambda f: f.name)
def test_no_folder_is_crowded(folder: Path):
    names = [path.name for path in folder.iterdir() if path.name != "__pycache__"]
    assert len(names) <= MOST_NAMES, f"{folder}: {len(names)} names"


def test_importing_lmc_loads_no_extra():
    heavy = ["plotly", "pandas", "sklearn", "anywidget", "ipywidgets", "IPython", "transformers", "ot", "cma"]
    heavy += ["scipy.optimize", "scipy.sparse", "sympy"]
    code = f"import sys, torch; before = set(sys.modules); import lmc; [getattr(lmc, n) for n in lmc.__all__]; print([n for n in {heavy} if n in set(sys.modules) - before])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a.b, c", {"a.b", "c"}),
        ("try:\n    import a\nexcept ImportError:\n    import b", {"a", "b"}),
        ("class C:\n    import a", {"a"}),
        ("def f():\n    import a", set()),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a", {"typing"}),
    ],
)
def test_only_imports_at_load_time_are_seen(source: str, expected: set[str]):
    assert set(loaded_at_once(ast.parse(source))) == expected
