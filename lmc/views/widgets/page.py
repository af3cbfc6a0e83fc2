"""Pages that run a widget's own drawing code without a kernel, a server or a network."""

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

# The page keeps the state that a kernel would keep; nobody else changes it, so there is nothing to listen to.
_START = """<script type="module">
import widget from "data:text/javascript;base64,{module}";
const state = JSON.parse(document.getElementById("state").textContent);
const model = {{ get: (key) => state[key], set: (key, value) => (state[key] = value),
  save_changes() {{}}, on() {{}}, off() {{}} }};
widget.render({{ model, el: document.getElementById("widget") }});
</script>"""

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w.]+)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:const|function)\b)", re.MULTILINE)

_STYLE = """:root { color-scheme: light dark; --lmc-page: #fff; --lmc-ink: #1b1b1b; }
@media (prefers-color-scheme: dark) { :root { --lmc-page: #16181c; --lmc-ink: #f0f0f0; } }
body { margin: 0 auto; max-width: 1180px; background: var(--lmc-page); color: var(--lmc-ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { padding: 8px 24px 24px; }
h1 { font-size: 26px; line-height: 1.25; margin: 18px 0 8px; }
table { border-collapse: collapse; margin: 14px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid color-mix(in srgb, currentColor 18%, transparent); }"""


def source(name: str) -> str:
    """The text of a file in the folder `js` or `css`."""
    return (FOLDER / name.rpartition(".")[2] / name).read_text(encoding="utf-8")


def module(name: str) -> str:
    """One ES module: the file `name`, after the files beside it that it imports, without their imports and exports.

    Widgets are given to Jupyter and to pages as one text, so that nothing has to be built or fetched. All files share
    one scope: their top-level names must differ.
    """
    parts: dict[str, str] = {}

    def add(file: str) -> None:
        text = source(file)
        for other in _IMPORT.findall(text):
            if other not in parts:
                add(other)
        parts[file] = _IMPORT.sub("", text)

    add(name)
    last = parts.pop(name)
    return "".join(_EXPORT.sub("", text) for text in parts.values()) + last


def style(*names: str) -> str:
    """The CSS that all explorers share, then the files `names`."""
    return "".join(source(name) for name in ("common.css", *names))


def page(
    module: str,
    style: str,
    state: Mapping[str, Any],
    *,
    title: str,
    text: Sequence[str] = (),
    rows: Sequence[Mapping[str, str]] = (),
) -> str:
    """A complete HTML document: title, paragraphs, a table of `rows` (column -> cell), then the widget.

    Args:
        module: the widget's ES module, whose default export has `render({ model, el })`.
        style: its CSS.
        state: what `model.get` returns; anything that JSON holds.
    """
    heading = f"<h1>{html.escape(title)}</h1>" + "".join(f"<p>{html.escape(line)}</p>" for line in text)
    inner = f'<main>{heading}{_table(rows)}<div id="widget"></div></main>'
    return _document(module, style, state, title, inner)


def frame(module: str, style: str, state: Mapping[str, Any], *, title: str, height: int) -> str:
    """The widget alone, in a frame for the output of a notebook cell that is shown without a kernel."""
    content = _document(module, style, state, title, '<div id="widget"></div>')
    return (
        f'<iframe title="{html.escape(title)}" srcdoc="{html.escape(content)}" '
        f'style="width: 100%; height: {height}px; border: 0"></iframe>'
        "<p><small>No figure above? Trust this notebook, or run it: the figure is a small program.</small></p>"
    )


def _document(module: str, style: str, state: Mapping[str, Any], title: str, body: str) -> str:
    data = json.dumps(state, separators=(",", ":")).replace("</", "<\\/")
    start = _START.format(module=base64.b64encode(module.encode()).decode())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}\n{style}</style></head>"
        f'<body class="lmc-page">{body}<script type="application/json" id="state">{data}</script>{start}</body></html>\n'
    )


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row.values()) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
