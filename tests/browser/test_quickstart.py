"""The quickstart as a reader meets it: run in JupyterLab from top to bottom, and its slider dragged."""

import json
import time


def test_it_runs_and_its_slider_answers_in_the_page_and_in_the_kernel(open_notebook):
    notebook = open_notebook("00_quickstart.ipynb")
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
