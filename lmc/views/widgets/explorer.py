"""Explorers in general: those of one result stay in step, the kernel answers for places, and a page needs no kernel.

The file of each explorer holds its state (what it draws, as plain data), its class, and the views that make it a method of
its result.
"""

import base64
import html
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import anywidget
import numpy as np
import numpy.typing as npt
import traitlets

from lmc.core.files import write_text
from lmc.errors import InputError, LmcError
from lmc.landscape.evaluation.measured import Live, Predictions
from lmc.views.widgets.poster import Poster

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
_BUNDLED = """<script type="module">
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
_COMMENT = re.compile(r"^[ \t]*//.*\n", re.MULTILINE)
_LAYOUT = re.compile(r"^[ \t]*\n|^[ \t]+", re.MULTILINE)  # indents and empty lines
_DECLARED = re.compile(r"^(?:export )?(?:async )?(?:function|const) (\w+)", re.MULTILINE)
_WORD = re.compile(r"\w+")
_EXPORT = re.compile(r"^export (?=(?:const|function)\b)", re.MULTILINE)

_STYLE = """:root { color-scheme: light dark; --lmc-page: #fff; --lmc-ink: #1b1b1b; }
@media (prefers-color-scheme: dark) { :root { --lmc-page: #16181c; --lmc-ink: #f0f0f0; } }
body { margin: 0 auto; max-width: 1180px; background: var(--lmc-page); color: var(--lmc-ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { padding: 8px 24px 24px; }
@media (max-width: 500px) { main { padding: 4px 8px 16px; } }
h1 { font-size: 26px; line-height: 1.25; margin: 18px 0 8px; }
table { border-collapse: collapse; margin: 14px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid color-mix(in srgb, currentColor 18%, transparent); }"""


def source(name: str) -> str:
    """The text of a file in the folder `js` or `css`."""
    return (FOLDER / name.rpartition(".")[2] / name).read_text(encoding="utf-8")


def module(name: str | Path) -> str:
    """One ES module: the file `name`, after the shared files that it imports, without their imports and exports.

    A name is of a file in the folder `js`; a path, of an explorer that somebody keeps elsewhere, is where it says.

    Widgets are given to Jupyter and to pages as one text, so that nothing has to be built or fetched; it is stored with every
    notebook, so comments, indents and what the explorer does not use stay here. All files share one scope: their top-level
    names must differ.
    """
    parts: dict[str | Path, str] = {}

    def add(file: str | Path) -> None:
        text = file.read_text(encoding="utf-8") if isinstance(file, Path) else source(file)
        for other in _IMPORT.findall(text):
            if other not in parts:
                add(other)
        parts[file] = _IMPORT.sub("", _COMMENT.sub("", text))

    add(name)
    last = parts.pop(name)
    return _LAYOUT.sub("", _EXPORT.sub("", _needed("".join(parts.values()), last)) + last)


def _needed(shared: str, own: str) -> str:
    """Of shared functions and constants, in their order, those that an explorer's own text needs, itself or through others."""
    starts = [*_DECLARED.finditer(shared)]
    ends = [*(match.start() for match in starts[1:]), len(shared)]
    pieces = {match[1]: shared[match.start() : end] for match, end in zip(starts, ends, strict=True)}
    needed, texts = set[str](), [own]
    while texts:
        found = (set(_WORD.findall(texts.pop())) & pieces.keys()) - needed
        needed |= found
        texts += [pieces[name] for name in found]
    return "".join(text for name, text in pieces.items() if name in needed)


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


def inline(module: str, style: str, state: Mapping[str, Any], *, key: str, poster: Poster, summary: str) -> str:
    """The widget alone, for the output of a notebook cell: live while the kernel's model of this key is there.

    `poster` and `summary` stand in its place where scripts do not run, as in a notebook that is not trusted yet.
    """
    start = _BUNDLED.format(still=_still(module, state), key=key)
    names = ", ".join(f'<span style="color: {colour}">■</span> {html.escape(n)}' for n, colour in poster.names.items())
    source = f"data:image/png;base64,{base64.b64encode(poster.png).decode()}"
    caption = html.escape(poster.caption)
    legend = f"{names}<br>" if names else ""
    return (
        f'<div data-lmc="{key}"><p><img src="{source}" alt="{caption}"><br>{legend}{caption}</p>'
        f"<pre>{html.escape(summary)}</pre><p><small>This is a still picture. Trust this notebook, or run it, and the figure "
        f"moves: it is a small program.</small></p></div><style>{style}</style>{start}"
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


TILES = 24  # pictures that an explorer shows at once


def unlike(examples: str, names: Iterable[str]) -> str | None:
    """The network with whose decisions an explorer compares: "unlike A" gives "A", "wrong" gives None.

    Raises:
        InputError: anything else.
    """
    known = {"wrong": None, **{f"unlike {name}": name for name in names}}
    if examples not in known:
        raise InputError(f"examples={examples!r}; expected one of {', '.join(map(repr, known))}")
    return known[examples]


def answer(
    exact: Live | None, place: Sequence[float], split: str, other: Sequence[float] | None = None
) -> dict[str, Any]:
    """The kernel's answer to a place: the values of a split (accuracy in percent), and what is predicted on the last.

    Args:
        other: a place with which predictions are compared; they are the first of two points then.

    Raises:
        InputError: a result that was read from a file. WeightsError, DataError: see `Live`.
    """
    if exact is None:
        raise InputError("made without networks at hand")
    values = exact(*place)[split].values
    known = {m: (100.0 if m == "accuracy" else 1.0) * v if math.isfinite(v) else None for m, v in values.items()}
    shown = exact.predictions(*place, unlike=other)
    if shown is None:
        return {"values": known, "shown": None, "images": None}
    differing = np.flatnonzero(shown.predicted[-1] != (shown.targets if other is None else shown.predicted[0]))
    wrong = differing[:TILES]
    images = None if shown.images is None else shown.images[wrong]
    few = Predictions(
        shown.split, shown.confusion, shown.index[wrong], shown.targets[wrong], shown.predicted[:, wrong], images
    )
    return {"values": known, "shown": shown_state(few), "images": images_state([few]), "differing": len(differing)}


def shown_state(shown: Predictions) -> dict[str, Any]:
    """Predictions at one or several points, as the ES module unpacks them."""
    classes = shown.confusion.shape[1]
    known = shown.confusion.sum(axis=(1, 2))
    return {
        "classes": classes,
        "count": int(known.max()),
        "confusion": encode(shown.confusion.astype("<u4")),
        "index": shown.index.tolist(),
        "targets": encode(shown.targets.astype(np.uint8)),
        "predicted": encode(np.where(shown.predicted < 0, 255, shown.predicted).astype(np.uint8)),
    }


def images_state(shown: Sequence[Predictions]) -> dict[str, Any] | None:
    """The pictures of all paths, each example once."""
    pictures: dict[int, tuple[int, npt.NDArray[np.uint8]]] = {}
    for each in shown:
        if each.images is None:
            continue
        for example, target, image in zip(each.index.tolist(), each.targets.tolist(), each.images, strict=True):
            known = pictures.setdefault(example, (target, image))
            if known[0] != target or known[1].shape != image.shape:
                raise InputError(f"example {example} differs between the paths; show paths over the same data together")
    if not pictures:
        return None
    index = sorted(pictures)
    pixels = np.stack([pictures[example][1] for example in index])
    return {
        "height": pixels.shape[1],
        "width": pixels.shape[2],
        "channels": 3 if pixels.ndim == 4 else 1,
        "index": index,
        "pixels": encode(pixels),
    }


def encode(array: npt.NDArray[Any]) -> str:
    """The bytes of an array as base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


_OPEN: WeakKeyDictionary[Any, WeakSet["Explorer"]] = WeakKeyDictionary()  # result -> its explorers


class Explorer(anywidget.AnyWidget):
    """A widget that shows results, and as a page of its own where no kernel runs.

    Args:
        results: what it shows. Explorers of one kind that show the same result have the same `shared` traits.
        state: the first values of its traits.
    """

    _esm: ClassVar[str]
    _css: ClassVar[str]
    title: ClassVar[str]
    shared: ClassVar[tuple[str, ...]] = ()
    data = traitlets.Dict().tag(sync=True)
    key = traitlets.Unicode().tag(sync=True)  # by which pages in the notebook find this model

    def __init__(self, results: Sequence[Any], state: Mapping[str, Any]) -> None:
        self._results, self._kind = list(results), type(self)  # anywidget will make a class of its own of it
        self._summary = "\n\n".join(str(result) for result in results)
        super().__init__(key=secrets.token_hex(8), **state)
        others = self._peers()
        if others:
            for name in self.shared:
                self._follow(name, getattr(others[0], name))
        for result in self._results:
            _OPEN.setdefault(result, WeakSet()).add(self)
        self.observe(self._lead, list(self.shared))
        self.on_msg(self._asked)

    def answer(self, place: Any) -> dict[str, Any]:
        """The values at a place that was not evaluated before."""
        raise NotImplementedError

    def poster(self) -> Poster:
        """The picture that stands for it where it cannot move."""
        raise NotImplementedError

    @classmethod
    def write(
        cls,
        file: str | Path,
        state: Mapping[str, Any],
        title: str | None,
        text: Sequence[str],
        rows: Sequence[Mapping[str, str]],
    ) -> Path:
        """Write the explorer as a page of its own, and return where it is."""
        write_text(file, page(cls._esm, cls._css, state, title=title or cls.title, text=text, rows=rows))
        return Path(file)

    def _peers(self) -> list["Explorer"]:
        found = {id(each): each for result in self._results for each in _OPEN.get(result, ())}
        return [each for each in found.values() if each is not self and each._kind is self._kind]

    def _lead(self, change: Any) -> None:
        for peer in self._peers():
            peer._follow(change["name"], change["new"])

    def _follow(self, name: str, value: Any) -> None:
        try:
            setattr(self, name, value)
        except traitlets.TraitError:
            pass  # something that this one does not show

    def _asked(self, _widget: Any, content: Any, _buffers: Any) -> None:
        if "place" not in content:
            return
        try:
            told = self.answer(content["place"])
        except LmcError as error:  # the reader sees it where the value would stand
            told = {"error": str(error)}
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        self.send({**told, "ticket": content["ticket"], "place": content["place"]})

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The figure as HTML that finds the kernel's model, if there is one; a widget view only where that is needed."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if data is not None:
            state = {name: getattr(self, name) for name in ("data", *self.shared)}
            still = {"poster": self.poster(), "summary": self._summary}
            data["text/html"] = inline(self._kind._esm, self._kind._css, state, key=self.key, **still)
            if not _views_wanted():
                data.pop("application/vnd.jupyter.widget-view+json", None)
        return bundle


def _views_wanted() -> bool:
    """Whether the front end keeps a notebook's outputs apart, so that a page does not find the model of the kernel.

    Elsewhere a bundle without a widget view is better: what is saved stays alive when the notebook is opened again.
    """
    return "google.colab" in sys.modules or "VSCODE_PID" in os.environ
