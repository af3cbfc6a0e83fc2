"""JupyterLab as a reader meets it: the quickstart run from top to bottom and its slider dragged, and explorers in step, saved and
opened again. One file, so that all of it is served by one JupyterLab."""

import json
import re
import time

import pytest
from acts import NETWORKS, drag, until, write

from conftest import KERNEL_IDLE, ROOT

QUICKSTART = ROOT / "notebooks" / "00_quickstart.ipynb"
STORED_BY = json.loads(QUICKSTART.read_text(encoding="utf-8"))["metadata"]["language_info"]["version"]


@pytest.mark.thorough
def test_it_shows_pictures_runs_and_its_slider_answers_in_the_page_and_in_the_kernel(open_notebook):
    notebook = open_notebook("00_quickstart.ipynb")
    show_pictures(notebook.page)
    notebook.run_all()
    assert notebook.errors == []

    explorer = notebook.page.locator(".lmc-path").last
    explorer.scroll_into_view_if_needed()
    reading, slider = explorer.locator(".lmc-reading"), explorer.locator("input[type=range]")
    before = reading.inner_text()
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    notebook.page.mouse.move(box["x"] + box["width"] / 2, middle)
    notebook.page.mouse.down()
    notebook.page.mouse.move(box["x"] + box["width"] / 4, middle, steps=8)
    notebook.page.mouse.up()
    shown = slider.evaluate("slider => slider.valueAsNumber")
    assert 0.2 < shown < 0.3
    reading.filter(has_text=f"{shown:.3f}").wait_for()  # drawn with the next frame
    assert reading.inner_text() != before

    # The kernel hears of a drag at intervals, of its last position soon after it.
    states = "[w.alpha for w in __import__('ipywidgets').Widget.widgets.values() if hasattr(w, 'alpha')]"
    end = time.monotonic() + 30
    while shown not in (heard := json.loads(notebook.ask(states))) and time.monotonic() < end:
        notebook.page.wait_for_timeout(100)
    assert shown in heard
    follow_the_theme(notebook.page)


def show_pictures(page) -> None:
    """A fresh clone, neither trusted nor run: no script of the notebook runs, nothing is missing, and nothing is changed, unless
    by JupyterLab, which writes the version of Python into it."""
    poster = page.locator(".jp-OutputArea-output img[alt*='on the way from A to B']")
    poster.scroll_into_view_if_needed()
    assert poster.evaluate("image => image.naturalWidth") == 600
    assert page.get_by_text("Trust this notebook, or run it").is_visible() and not page.locator(".lmc-path").count()
    # It, and those of two figures.
    page.wait_for_function("document.querySelectorAll('.jp-OutputArea-output img').length >= 3")
    changed, kernel = page.evaluate(
        "(({ dirty, metadata }) => [dirty, metadata.language_info.version])(window.jupyterapp.shell.currentWidget.content.model)"
    )
    assert not changed or kernel != STORED_BY


LOOK = """() => {
    const figure = [...document.querySelectorAll(".js-plotly-plot")].find((each) => each.querySelector(".xtitle"));
    const look = (selector, name) => getComputedStyle(figure.querySelector(selector)).getPropertyValue(name);
    const other = document.querySelector("[data-other] text");
    return [look(".main-svg", "background-color"), look(".xtitle", "fill"), look(".xgrid", "stroke"), getComputedStyle(other).fill];
}"""
# A figure of somebody else, in plotly's own colours; outside the notebook, whose nodes JupyterLab exchanges.
OTHER = """() => document.body.insertAdjacentHTML("beforeend",
    '<div class="js-plotly-plot" data-other><svg class="main-svg" style="background: rgb(255, 255, 255)"><text style="fill: rgb(42, 63, 95)">x</text></svg></div>')"""


def follow_the_theme(page) -> None:
    """Figures of this package have other colours on a dark Lab, and others' figures stay as they are."""
    figure = page.locator(".js-plotly-plot .xtitle").first
    figure.scroll_into_view_if_needed()
    page.evaluate(OTHER)
    light = page.evaluate(LOOK)
    assert light == ["rgb(255, 255, 255)", "rgb(34, 34, 34)", "rgb(228, 228, 228)", "rgb(42, 63, 95)"]
    themes = "window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab %s' })"
    page.evaluate(themes % "Dark")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    page.wait_for_timeout(1000)  # JupyterLab stumbles over its own style sheets where one change meets the next
    assert page.evaluate(LOOK) == ["rgba(0, 0, 0, 0)", "rgb(232, 232, 232)", "rgb(65, 70, 78)", "rgb(42, 63, 95)"]
    page.evaluate(themes % "Light")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'true'")
    page.wait_for_timeout(1000)
    assert page.evaluate(LOOK) == light


# Long work: a bar that is seen, and leaves nothing behind.
BAR = """import os
from lmc.core.progress import tqdm
os.environ.pop("TQDM_DISABLE", None)
for _ in tqdm(range(3), desc="wo" + "rk", delay=1e-9, mininterval=0.0): pass
print("do" + "ne")"""


@pytest.mark.thorough
def test_two_widgets_of_a_path_stay_in_step_and_what_is_saved_is_alive_when_it_is_opened_again(server, open_notebook):
    make = "path, naive = lmc.loss_path(model, a, b, data, alphas=9), lmc.loss_path(model, a, c, data, alphas=9)"
    cells = NETWORKS + make, "w = path.explore(naive=naive)\nw", "v = path.explore()\nv", BAR
    lab = open_notebook(write(server, "path.ipynb", *cells))
    lab.run_all()
    assert lab.errors == []
    stay_in_step(lab)
    are_alive_again(lab)
    *bars, said = lab.cells[3]["outputs"]
    assert said["text"] == "done\n" and [data for bar in bars for data in bar["data"].values() if data != ""] == []


def stay_in_step(lab) -> None:
    """What is dragged in one widget moves the kernel and the other, and the kernel gives exact values."""
    first, second = (lab.page.locator(".lmc-path").nth(i) for i in (0, 1))
    drag(lab.page, first.get_by_role("slider"), (0.5, 0.5), (0.3, 0.5))
    told = first.get_by_role("slider").evaluate("slider => slider.valueAsNumber")  # the slider itself was dragged
    assert 0.25 < told < 0.35
    until(lab, "(w.alpha, v.alpha)", lambda both: both == (told, told))
    for each in (first, second):
        each.locator(".lmc-note[data-state=exact]").wait_for()
        each.locator(".lmc-reading").filter(has_text=f"α = {told:.3f}").wait_for()
    exact = until(lab, "path.exact(w.alpha)['data'].loss", lambda loss: loss > 0)
    first.get_by_role("radio", name="aligned").click()
    first.locator(".lmc-reading").filter(has_text=f"loss {exact:.3f}").wait_for()
    second.get_by_role("slider").press("ArrowRight")
    until(lab, "(w.alpha, v.alpha)", lambda both: both == (0.375, 0.375))
    first.locator(".lmc-reading").filter(has_text="α = 0.375").wait_for()


def are_alive_again(lab) -> None:
    """Saved and loaded again with no setting touched: with its kernel an explorer asks for exact values, and without one it
    interpolates."""
    page = lab.page
    explorer = page.locator(".lmc-path").first
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function("!window.jupyterapp.shell.currentWidget.content.model.dirty")
    page.reload()
    page.wait_for_function(KERNEL_IDLE)
    page.wait_for_function("globalThis.lmcModels?.size")  # the kernel of before is still there
    drag(page, explorer.get_by_role("slider"), (0.5, 0.5), (0.7, 0.5))
    explorer.locator(".lmc-note[data-state=exact]").wait_for()
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.reload()
    page.wait_for_function(KERNEL_IDLE)
    drag(page, explorer.get_by_role("slider"), (0.5, 0.5), (0.3, 0.5))
    explorer.locator(".lmc-reading").filter(has_text=re.compile(r"α = 0\.(2|3)")).wait_for()
    explorer.locator(".lmc-note[data-state=static]").wait_for()
    assert "model not found" not in page.locator(".jp-Notebook").inner_text()
    assert not page.evaluate("window.jupyterapp.shell.currentWidget.content.model.dirty")
