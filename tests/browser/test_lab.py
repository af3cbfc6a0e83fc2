"""The browser bench itself: it runs a notebook, sees a widget move, and notices what it should notice."""

import nbformat
import pytest

SLIDER = """
import ipywidgets
slider = ipywidgets.IntSlider(value=3, max=10)
square = ipywidgets.Label("9")
slider.observe(lambda change: setattr(square, "value", str(change["new"] ** 2)), "value")
ipywidgets.VBox([slider, square])
"""


def write(server, name: str, *sources: str) -> str:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), server.notebooks / name)
    return name


@pytest.mark.thorough
def test_a_moved_slider_reaches_the_kernel_and_comes_back(server, open_notebook):
    notebook = open_notebook(write(server, "slider.ipynb", "1 + 1", SLIDER))
    notebook.run_all()
    assert notebook.errors == []
    assert notebook.cells[0]["outputs"][0]["data"]["text/plain"] == "2"
    handle = notebook.page.locator(".widget-slider .noUi-handle")
    handle.focus()
    handle.press("ArrowRight")
    notebook.page.locator(".widget-label", has_text="16").wait_for()
    assert notebook.ask("slider.value") == "4"


@pytest.mark.thorough
def test_errors_and_requests_to_other_machines_are_noticed(server, window, open_notebook):
    notebook = open_notebook(write(server, "error.ipynb", "1 / 0"))
    notebook.run_all()
    assert notebook.errors == ["ZeroDivisionError: division by zero"]
    outcome = notebook.page.evaluate("fetch('http://lmc.invalid/x').then(() => 'answered', () => 'stopped')")
    assert (outcome, window.outside) == ("stopped", ["http://lmc.invalid/x"])
    window.outside.clear()
