"""The stored figures of the notebooks, drawn: labels of barriers stand on no curve and on no other label."""

import json
import re
from pathlib import Path

import nbformat
import plotly
import pytest
from acts import write

ROOT = Path(__file__).parents[2]
LIBRARY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
MIME = "application/vnd.plotly.v1+json"
WIDTHS = (700, 1000)  # of a stored picture, of a figure in JupyterLab

DRAW = """async ([figure, width]) => {
    document.body.innerHTML = "<div id=at></div>";
    await Plotly.newPlot("at", figure.data, { ...figure.layout, width, height: figure.layout.height ?? 450 });
    const found = [];
    const labels = [...document.querySelectorAll(".annotation-text")].filter((text) => /nats$|points$/.test(text.textContent));
    const boxes = labels.map((label) => label.getBoundingClientRect());
    boxes.forEach((box, i) => {
        const inside = ({ x, y }) => x > box.left - 2 && x < box.right + 2 && y > box.top + 3 && y < box.bottom - 3;
        for (const line of document.querySelectorAll("path.js-line")) {
            if (line.closest(".legend")) continue;
            const [matrix, length] = [line.getScreenCTM(), line.getTotalLength()];
            for (let at = 0; at < length; at += 4)
                if (inside(line.getPointAtLength(at).matrixTransform(matrix))) {
                    found.push(`${labels[i].textContent} on a curve`);
                    break;
                }
        }
        for (let k = 0; k < i; k++) {
            const other = boxes[k];
            if (box.left < other.right && other.left < box.right && box.top < other.bottom - 3 && other.top < box.bottom - 3)
                found.push(`${labels[i].textContent} on ${labels[k].textContent}`);
        }
    });
    return [labels.length, found];
}"""


def labelled(name: str) -> list[dict]:
    """The figures of a notebook in which barriers have labels."""
    cells = nbformat.read(ROOT / "notebooks" / name, as_version=4).cells
    figures = [
        output.data[MIME] for cell in cells for output in cell.get("outputs", []) if MIME in output.get("data", {})
    ]
    return [
        each for each in figures if re.search(r" (nats|points)\b", json.dumps(each["layout"].get("annotations", [])))
    ]


@pytest.mark.thorough
def test_labels_of_barriers_cover_nothing(window, tmp_path):
    (tmp_path / "page.html").write_text(f'<script src="{LIBRARY.as_uri()}"></script>')
    page = window.open((tmp_path / "page.html").as_uri())
    found = {path.name: labelled(path.name) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    assert sum(map(len, found.values())) > 10
    for name, figures in found.items():
        for figure in figures:
            for width in WIDTHS:
                labels, faults = page.evaluate(DRAW, [figure, width])
                assert labels and faults == [], (name, width)


STORED = """
import nbformat, plotly.graph_objects as go
cells = nbformat.read("14_which_model_do_you_trust.ipynb", as_version=4).cells
figures = [output.data["application/vnd.plotly.v1+json"] for cell in cells if "sliders=[{" in cell.source for output in cell.outputs]
go.Figure(figures[0]["data"], figures[0]["layout"])
"""


@pytest.mark.thorough
def test_the_slider_of_decisions_is_dragged(server, open_notebook, tmp_path):
    """In JupyterLab: the digits keep their places while what is said above them changes with the slider."""
    notebook = open_notebook(write(server, "slider_of_decisions.ipynb", STORED))
    notebook.run_all()
    figure = notebook.page.locator(".js-plotly-plot")
    figure.scroll_into_view_if_needed()
    grip, labels = figure.locator(".slider-grip-rect"), figure.locator(".annotation-text")
    begin = labels.all_text_contents()
    track = figure.locator(".slider-rail-touch-rect").bounding_box()
    for share, said in ((0.5, "α = 0.5"), (1.0, "α = 1.0")):
        box = grip.bounding_box()
        notebook.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        notebook.page.mouse.down()
        notebook.page.mouse.move(track["x"] + share * (track["width"] - 2), box["y"] + box["height"] / 2, steps=8)
        notebook.page.mouse.up()
        figure.locator(".slider-label", has_text=said).wait_for()
        figure.screenshot(path=tmp_path / f"at {share}.png")
    end = labels.all_text_contents()
    assert len(begin) == len(end) == 12 and begin != end
    assert [text.split(", is ")[1] for text in begin] == [text.split(", is ")[1] for text in end]
    bold = labels.evaluate_all("all => all.map((text) => text.innerHTML.includes('bold'))")
    assert bold == [one != other for one, other in zip(begin, end, strict=True)]
