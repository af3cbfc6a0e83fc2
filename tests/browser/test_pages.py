"""Every explorer as a page: what fits, what can be read, and what can be kept of it."""

import csv
import io
import math
import xml.etree.ElementTree as ElementTree

import pytest
from acts import NETWORKS, drag
from PIL import Image

MAKE = """
path, naive = lmc.loss_path(model, a, b, data), lmc.loss_path(model, a, c, data)
run = {epoch: lmc.weights.lerp(a, b, epoch / 8) for epoch in range(9)}  # along an edge, from one model to the next
plane = lmc.loss_plane(model, (a, b, c), data, resolution=9, progress=False)
triangle = lmc.loss_triangle(model, (a, b, c), data, resolution=8, progress=False)
five = lmc.loss_simplex(model, (a, b, c, weights(), weights()), data, resolution=3, progress=False)
runs = [{epoch: weights() for epoch in (0, 1, 4, 8)} for _ in range(2)]
spec = lmc.permutation_spec(model, data[0][:2])
epochs = lmc.align.barrier_over_time(model, *runs, data, spec=spec, alphas=9, progress=False)
pi = lmc.weight_matching(spec, a, b, seed=0)
matching = lmc.align.inspect_matching(pi, a, b, model=model, data=data, steps=5, alphas=9, progress=False)
mixer = lmc.merge.mixer(model, [a, b], {"left": data, "right": data}, base=c, progress=False)
"""
# The explorer of each page, and the rows of its table: splits or paths times points.
ROWS = {
    "path": 2 * 25,
    "plane": 9 * 9,
    "triangle": 45,
    "five": 35,
    "epochs": 2 * 4 * 9,
    "matching": 6,
    "mixer": 16 * 16,
}
WIDTHS = (390, 768, 1024, 1280)  # a phone, a tablet, a projector, a laptop

# What cannot be read or reached: texts over texts or under curves, pale texts, short sliders. Text in charts that leaves them.
FAULTS = """() => {
    const found = [];
    const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        pen.clearRect(0, 0, 1, 1);
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
    };
    const light = ([r, g, b]) => [r, g, b].map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const under = (element) => {
        const layers = [];
        for (let at = element; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
        return layers.reverse().reduce((low, [r, g, b, a]) => [r, g, b].map((v, i) => a * v + (1 - a) * low[i]), [1, 1, 1]);
    };
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        if (!own || !element.checkVisibility() || element.closest(".lmc-spoken, .lmc-faded, :disabled")) continue;
        const look = getComputedStyle(element);
        const ink = element instanceof SVGElement ? look.fill : look.color;
        const [x, y] = [light(rgba(ink)), light(under(element))].sort((p, q) => q - p);
        if ((x + 0.05) / (y + 0.05) < 4.5) found.push(`pale: ${element.textContent.slice(0, 30)} ${ink} ${(x + 0.05) / (y + 0.05)}`);
    }
    const crossed = (p, q, gap = 0) => p.left < q.right - gap && q.left < p.right - gap && p.top < q.bottom - gap && q.top < p.bottom - gap;
    for (const chart of document.querySelectorAll("svg.lmc-chart")) {
        const texts = [...chart.querySelectorAll("text")].filter((text) => text.getBoundingClientRect().width);
        const boxes = texts.map((text) => text.getBoundingClientRect());
        const whole = chart.getBoundingClientRect();
        boxes.forEach((box, i) => {
            if (box.left < whole.left - 1 || box.right > whole.right + 1) found.push(`cut off: ${texts[i].textContent}`);
            for (let k = 0; k < i; k++)
                if (crossed(box, boxes[k], 2)) found.push(`over each other: ${texts[i].textContent} | ${texts[k].textContent}`);
        });
        for (const label of chart.querySelectorAll(".lmc-barrier text")) {
            const box = label.getBoundingClientRect();
            for (const line of chart.querySelectorAll("polyline.lmc-line")) {
                const matrix = line.getScreenCTM();
                for (let at = 0; at < line.getTotalLength(); at += 2) {
                    const { x, y } = line.getPointAtLength(at).matrixTransform(matrix);
                    if (x > box.left && x < box.right && y > box.top + 3 && y < box.bottom - 3) {
                        found.push(`struck through: ${label.textContent}`);
                        break;
                    }
                }
            }
        }
    }
    for (const slider of document.querySelectorAll("input[type=range]"))
        if (slider.clientWidth < 90) found.push(`${slider.clientWidth} pixels: ${slider.getAttribute("aria-label")}`);
    const wide = document.documentElement.scrollWidth;
    if (wide > innerWidth) found.push(`${wide} pixels wide in a window of ${innerWidth}`);
    return found;
}"""

# Words on canvases, which are no elements: noted as they are written, to be asked for after the next picture.
NOTE = """() => {
    globalThis.written = new Map();
    const { fillText, clearRect } = CanvasRenderingContext2D.prototype;
    CanvasRenderingContext2D.prototype.clearRect = function (...box) {
        written.delete(this.canvas);
        return clearRect.apply(this, box);
    };
    CanvasRenderingContext2D.prototype.fillText = function (text, x, y, ...rest) {
        const [wide, size] = [this.measureText(text).width, parseFloat(this.font.match(/([0-9.]+)px/)[1])];
        const left = x - wide * { left: 0, start: 0, center: 0.5, right: 1, end: 1 }[this.textAlign];
        const middle = { alphabetic: y - 0.35 * size, middle: y }[this.textBaseline];
        const box = { text, left, right: left + wide, top: middle - 0.4 * size, bottom: middle + 0.4 * size };
        if (/[\\p{L}\\p{N}]/u.test(text) && !this.getTransform().b) written.set(this.canvas, [...(written.get(this.canvas) ?? []), box]);
        return fillText.call(this, text, x, y, ...rest);
    };
}"""
MET = """() => [...written.values()].flatMap((boxes) => boxes.flatMap((p, i) => boxes.slice(0, i)
    .filter((q) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
    .map((q) => `over each other: ${p.text} | ${q.text}`)))"""


@pytest.fixture(scope="module")
def results() -> dict:
    """Small results of every kind that has an explorer."""
    import torch

    threads, scope = torch.get_num_threads(), {}
    exec(NETWORKS + MAKE, scope)
    torch.set_num_threads(threads)
    return scope


@pytest.fixture
def page(window, results, tmp_path, request):
    name = request.param
    more = {
        "path": {"naive": results["naive"]},
        "plane": {"tracks": {"naive": [(0, 0), (1, 1)], "run": results["run"]}},
    }
    opened = window.open(results[name].save_html(tmp_path / f"{name}.html", **more.get(name, {})).as_uri())
    opened.locator(".lmc-reading").filter(has_text=".").wait_for()
    return opened


@pytest.mark.parametrize(
    "page", [pytest.param(name, marks=[] if name == "path" else pytest.mark.thorough) for name in ROWS], indirect=True
)
def test_it_fits_can_be_read_and_can_be_kept(page, request):
    page.evaluate(NOTE)
    for scheme, width in [("light", width) for width in WIDTHS] + [("dark", WIDTHS[0]), ("dark", WIDTHS[-1])]:
        page.evaluate("written.clear()")
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 844 if width == 390 else 768})
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert page.evaluate(FAULTS) + page.evaluate(MET) == [], (scheme, width)
        if request.node.callspec.params["page"] == "plane":
            words = page.evaluate("[...written.values()].flat().map((box) => box.text)")
            assert {"A", "B", "C", "run 0", "run 8"} <= set(words), (width, words)

    page.emulate_media(color_scheme="light")
    kept = {kind: keep(page, kind) for kind in ("PNG", "SVG", "CSV")}
    box = page.locator(".lmc").bounding_box()
    picture = Image.open(io.BytesIO(kept["PNG"])).convert("RGB")
    assert picture.width == pytest.approx(2 * box["width"], abs=4)
    seen = Image.open(io.BytesIO(page.locator(".lmc").screenshot())).convert("RGB").resize((60, 60))
    apart = [abs(p - q) for p, q in zip(seen.tobytes(), picture.resize((60, 60)).tobytes(), strict=True)]
    assert sum(apart) / len(apart) < 4.0, "of 255: the picture is not what is seen"
    words = " ".join(ElementTree.fromstring(kept["SVG"]).itertext())
    assert page.locator(".lmc-reading").inner_text().split(" · ")[0] in words
    rows = list(csv.DictReader(io.StringIO(kept["CSV"].decode())))
    assert len(rows) == ROWS[request.node.callspec.params["page"]]
    assert all(
        value and math.isfinite(float(value))
        for row in rows
        for name, value in row.items()
        if name not in ("split", "path")
    )


@pytest.mark.thorough
def test_an_explorer_is_a_page_of_javascript(window, tmp_path, monkeypatch):
    """The guide's own explorer, run as it is printed there, moves, says where its values come from, and can be kept."""
    from project.test_docs import DOCS, FILES, PYTHON, SMALL

    monkeypatch.chdir(tmp_path)
    text = (DOCS / "guides" / "own_explorer.md").read_text(encoding="utf-8")
    ((source, file),) = FILES.findall(text)
    assert len(source.splitlines()) < 60
    (tmp_path / file).write_text(source, encoding="utf-8")
    names: dict = {}
    exec(SMALL, names)
    for each in PYTHON.findall(text):
        exec(each, names)
    page = window.open((tmp_path / "flatness.html").as_uri())
    reading = page.locator(".lmc-reading")
    reading.filter(has_text=f"noise of 0.00 · loss {names['found'].losses['A'][0]:.3f}").wait_for()
    page.get_by_role("slider", name="size of the noise").press("ArrowRight")
    reading.filter(has_text=f"loss {names['found'].losses['A'][1]:.3f}").wait_for()
    page.get_by_role("radio", name="B").click()
    reading.filter(has_text=f"loss {names['found'].losses['B'][1]:.3f}").wait_for()
    drag(page, page.locator(".lmc-chart"), (0.3, 0.5), (0.71, 0.5))
    page.locator(".lmc-note", has_text="interpolated between evaluated points").wait_for()
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 768})
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert page.evaluate(FAULTS) == [], width
    rows = list(csv.DictReader(io.StringIO(keep(page, "CSV").decode())))
    assert [row["network"] for row in rows] == ["A"] * 8 + ["B"] * 8


def keep(page, kind: str) -> bytes:
    """What one of the buttons saves."""
    with page.expect_download() as waited:
        page.locator(".lmc-keep").get_by_text(kind, exact=True).click()
    assert waited.value.suggested_filename.endswith(f".{kind.lower()}")
    return waited.value.path().read_bytes()


def test_the_table_of_a_path_holds_the_path(window, results, tmp_path):
    path = results["path"]
    page = window.open(path.save_html(tmp_path / "path.html").as_uri())
    rows = list(csv.DictReader(io.StringIO(keep(page, "CSV").decode())))
    assert [float(row["alpha"]) for row in rows] == pytest.approx(path.alphas.tolist(), abs=1e-6)
    assert [float(row["loss"]) for row in rows] == pytest.approx(path.losses["data"].tolist(), abs=1e-5)
    assert [float(row["accuracy"]) for row in rows] == pytest.approx(100 * path.accuracies["data"], abs=1e-4)
