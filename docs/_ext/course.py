"""The notebooks as pages of the site, and a gallery of the pictures stored in them."""

import base64
import io
import json
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parents[1]
SIZE = (480, 360)
DEMO = "00_quickstart"  # whose explorer the home page shows, alive


def _write(path: Path, content: bytes) -> None:
    """Write what has changed, so that only that is built again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def _largest_picture(notebook: dict) -> bytes | None:
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    found = [base64.b64decode("".join(o["data"]["image/png"])) for o in outputs if "image/png" in o.get("data", {})]
    return max(found, key=len, default=None)


def _explorer(notebook: dict) -> str:
    """The first explorer in a notebook, which needs no kernel."""
    pages = (
        "".join(o["data"].get("text/html", ""))
        for cell in notebook["cells"]
        for o in cell.get("outputs", [])
        if "data" in o
    )
    return next(page for page in pages if "data-lmc" in page)


def _thumbnail(png: bytes) -> bytes:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail(SIZE)
    made = io.BytesIO()
    picture.save(made, "WEBP", quality=80)
    return made.getvalue()


def make(app, config):
    cards, pages = [], []
    for path in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        # In the repository the documentation lies beside the notebooks, on the site they lie in it.
        _write(HERE / "notebooks" / path.name, path.read_bytes().replace(b"](../docs/", b"](../"))
        if path.stem == DEMO:
            _write(HERE / "_thumbnails" / "demo.html", _explorer(notebook).encode())
        pages.append(f"notebooks/{path.stem}")
        title = "".join(notebook["cells"][0]["source"]).splitlines()[0].lstrip("# ")
        if png := _largest_picture(notebook):
            _write(HERE / "_thumbnails" / f"{path.stem}.webp", _thumbnail(png))
            picture = [f":img-top: _thumbnails/{path.stem}.webp", f":img-alt: a figure of {title}"]
            cards += [
                f":::{{grid-item-card}} {title}",
                *picture,
                f":link: notebooks/{path.stem}",
                ":link-type: doc",
                ":::",
            ]
    grid = ["::::{grid} 1 2 3 3", ":gutter: 3", "", *cards, "::::"]
    _write(HERE / "gallery.md", "\n".join(["# Gallery", "", "One picture of each notebook.", "", *grid, ""]).encode())
    tree = ["```{toctree}", ":maxdepth: 1", "", *pages, "```"]
    told = "Each page is a stored notebook: figures and explorers move without a kernel."
    _write(HERE / "course.md", "\n".join(["# Course", "", told, "", *tree, ""]).encode())


def setup(app):
    app.connect("config-inited", make)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
