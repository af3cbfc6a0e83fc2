"""Pages of the reference: one for the top level, one for each room, each with a table of its public names."""

import importlib
import inspect
from pathlib import Path

import lmc

HERE = Path(__file__).parents[1]
ROOMS = ("align", "landscape", "merge", "weights", "training", "models", "data")


def _listed(room: str) -> list[str]:
    """The public functions and classes of a room, less those of the top level, which are listed there."""
    module = importlib.import_module(f"lmc.{room}")
    found = {name: getattr(module, name) for name in module.__all__ if name not in lmc.__all__}
    return [name for name, value in found.items() if inspect.isclass(value) or inspect.isroutine(value)]


def _page(title: str, module: str, text: str, names: list[str]) -> str:
    rows = [f"   {name}" for name in names]
    table = [f".. currentmodule:: {module}", "", ".. autosummary::", "   :toctree: generated", "", *rows]
    return "\n".join([title, "=" * len(title), "", text, "", *table, ""])


def make(app, config):
    top = [name for name in lmc.__all__ if not inspect.ismodule(getattr(lmc, name))]
    links = [f"   {room}" for room in ROOMS]
    tree = ["", ".. toctree::", "   :caption: Rooms", "", *links, ""]
    text = "What ``import lmc`` shows. Further names are in the rooms below; their pages leave out what stands here."
    pages = {"index": _page("Reference", "lmc", text, top) + "\n".join(tree)}
    for room in ROOMS:
        first = (inspect.getdoc(importlib.import_module(f"lmc.{room}")) or "").split("\n\n")[0]
        pages[room] = _page(f"lmc.{room}", f"lmc.{room}", first, _listed(room))
    for name, content in pages.items():
        path = HERE / "api" / f"{name}.rst"
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")


def setup(app):
    app.connect("config-inited", make)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
