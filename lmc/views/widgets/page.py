"""Pages that run a widget's own drawing code without a kernel, a server or a network."""

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

# A page keeps the state that a kernel would keep; nobody else changes it, so there is nothing to listen to.
_STILL = """import widget from "data:text/javascript;base64,{module}";
const state = {state};
const still = {{ get: (key) => state[key], set: (key, value) => (state[key] = value), save_changes() {{}}, on() {{}}, off() {{}} }};
"""
_START = """<script type="module">
{still}widget.render({{ model: still, el: document.getElementById("widget") }});
</script>"""
# In a notebook the script runs wherever its output is shown; with a kernel, the model comes sooner or later, or again.
_OPEN = """<script type="module">
{still}for (const el of document.querySelectorAll('[data-lmc="{key}"]:not([data-open])')) {{
  el.dataset.open = "";
  let close;
  const open = async () => {{
    close?.();
    close = await widget.render({{ model: globalThis.lmcModels?.get("{key}") ?? still, el }});
  }};
  addEventListener("lmc-model", (event) => event.detail === "{key}" && open());
  open();
}}
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
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}\n{style}</style></head>"
        f'<body class="lmc-page">{inner}{_START.format(still=_still(module, state))}</body></html>\n'
    )


def inline(module: str, style: str, state: Mapping[str, Any], *, key: str, summary: str) -> str:
    """The widget alone, for the output of a notebook cell: live while the kernel's model of this key is there.

    `summary` stands in its place where scripts do not run, as in a notebook that is not trusted yet.
    """
    start = _OPEN.format(still=_still(module, state), key=key)
    return (
        f'<div data-lmc="{key}"><pre>{html.escape(summary)}</pre>'
        "<p><small>Trust this notebook, or run it, to see the figure: it is a small program.</small></p></div>"
        f"<style>{style}</style>{start}"
    )


def _still(module: str, state: Mapping[str, Any]) -> str:
    data = json.dumps(state, separators=(",", ":")).replace("<", "\\u003c")
    return _STILL.format(module=base64.b64encode(module.encode()).decode(), state=data)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row.values()) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
