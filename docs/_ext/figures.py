"""Stored plotly figures stay alive: their data lie in the page, one plotly.js lies in the site, and each is drawn when it
comes into view."""

import json
import shutil
from pathlib import Path

import plotly

import lmc

MIME = "application/vnd.plotly.v1+json"
THEME = Path(lmc.__file__).parent / "views" / "lab" / "static" / "figures.css"
LIBRARY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def _markup(figure: dict) -> str:
    """A box that the page's script fills."""
    content = {"data": figure["data"], "layout": figure["layout"]}
    held = json.dumps(content, separators=(",", ":")).replace("</", "<\\/")
    height = figure["layout"].get("height", 450)
    return (
        f'<div class="figure-box" style="min-height:{height}px"><script type="application/json">{held}</script></div>'
    )


def read(app, name, source):
    """Before a notebook is parsed, put boxes in the place of its figures and of their pictures."""
    if app.builder.format != "html" or Path(app.env.doc2path(name)).suffix != ".ipynb":
        return
    notebook = json.loads(source[0])
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    drawn = [output for output in outputs if MIME in output.get("data", {})]
    for output in drawn:
        output["data"] = {"text/html": _markup(output["data"][MIME])}
    for output in outputs:
        if "text/html" in output.get(
            "data", {}
        ):  # data frames have headers of nothing, which screen readers would read out
            output["data"]["text/html"] = "".join(output["data"]["text/html"]).replace("<th></th>", "<td></td>")
    source[0] = json.dumps(notebook)
    app.env.metadata[name]["figures"] = bool(drawn)


def scripts(app, page, template, context, doctree):
    plotted = app.env.metadata.get(page, {}).get("figures")
    files = {
        "plotly.min.js": plotted,
        "figures.js": plotted or page == "index",
        "slides.js": page.startswith("notebooks/"),
    }
    for file, wanted in files.items():
        if wanted:
            app.add_js_file(file, loading_method="defer")
    if plotted:
        app.add_css_file("figures.css")


def finish(app, error):
    if error is None and app.builder.format == "html":
        for file in (LIBRARY, THEME):
            shutil.copyfile(file, Path(app.outdir) / "_static" / file.name)


def setup(app):
    app.connect("source-read", read)
    app.connect("html-page-context", scripts)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
