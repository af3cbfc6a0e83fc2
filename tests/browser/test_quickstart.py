"""The quickstart as a reader meets it: run in JupyterLab from top to bottom, and its slider dragged."""

import json
import time


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
    """A fresh clone, neither trusted nor run: no script of the notebook runs, and nothing is missing."""
    poster = page.locator(".jp-OutputArea-output img[alt*='on the way from A to B']")
    poster.scroll_into_view_if_needed()
    assert poster.evaluate("image => image.naturalWidth") == 600
    assert page.get_by_text("Trust this notebook, or run it").is_visible() and not page.locator(".lmc-path").count()
    # It, and those of two figures.
    page.wait_for_function("document.querySelectorAll('.jp-OutputArea-output img').length >= 3")


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
