"""The matching explorer, moved: in JupyterLab with its kernel, and as a page of its own without one."""

import ast
import re
import time

import nbformat
import pytest

import lmc

SOURCE = """
import torch, lmc
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
model = lmc.models.mlp(16, [12, 12], 3)
a = {k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}
inputs = torch.randn(100, 16, generator=generator)
data = inputs, torch.func.functional_call(model, a, (inputs,)).argmax(1)
spec = lmc.permutation_spec(model, inputs[:2])
hidden = spec.random(seed=1)
matching = lmc.align.inspect_matching(hidden.inverse(), a, hidden.apply(a), model=model, data=data, steps=6, progress=False)
"""


@pytest.fixture
def lab(server, open_notebook):
    """A notebook with two widgets of one matching, run."""
    sources = (SOURCE, "w = matching.explore()\nw", "v = matching.explore()\nv")
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), server.notebooks / "matching.ipynb")
    notebook = open_notebook("matching.ipynb")
    notebook.run_all()
    assert notebook.errors == []
    notebook.page.locator(".lmc-match").nth(1).wait_for()
    return notebook


def pixels(widget, canvas):
    """All colours of a canvas."""
    return widget.locator(canvas).evaluate("canvas => canvas.toDataURL()")


def pull(page, slider, share):
    """Drag the thumb of a slider from its left end to a share of its length."""
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 8, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 8 + share * (box["width"] - 16), middle, steps=8)
    page.mouse.up()


@pytest.mark.thorough
def test_a_drag_in_jupyterlab_reaches_page_kernel_and_the_other_widget(lab):
    first, second = (lab.page.locator(".lmc-match").nth(i) for i in (0, 1))
    canvases = (".lmc-match-matrix", ".lmc-match-ways", ".lmc-match-fields")
    before = [pixels(first, canvas) for canvas in canvases]
    line = first.locator("polyline.lmc-match-now").first.get_attribute("points")
    pull(lab.page, first.locator("input[type=range]"), 1.0)
    first.locator(".lmc-reading").filter(has_text="100 % of B's units in place · barrier 0.000 nats").wait_for()
    assert all(pixels(first, canvas) != old for canvas, old in zip(canvases, before, strict=True))
    assert first.locator("polyline.lmc-match-now").first.get_attribute("points") != line
    second.locator(".lmc-reading").filter(has_text="100 %").wait_for()
    end = time.monotonic() + 30
    while ast.literal_eval(lab.ask("[w.placed, v.placed]")) != [1.0, 1.0]:
        assert time.monotonic() < end
        lab.page.wait_for_timeout(50)
    # The kernel moves both.
    lab.ask("[setattr(v, 'placed', 0.0), setattr(v, 'group', list(matching.groups)[1])]")
    for widget in (first, second):
        widget.locator(".lmc-reading").filter(has_text="0 % of B's units in place").wait_for()
        widget.locator(".lmc-match-fields").wait_for(state="hidden")  # the second layer is fed by no picture


def test_the_saved_page_moves_without_a_kernel_and_plays(window, tmp_path):
    names: dict = {}
    exec(SOURCE, names)
    matching: lmc.align.Matching = names["matching"]
    matching.save_html(tmp_path / "matching.html")
    page = window.open((tmp_path / "matching.html").as_uri())
    reading, slider = page.locator(".lmc-reading"), page.locator("input[type=range]")
    slider.press("ArrowRight")
    reading.filter(has_text=f"17 % of B's units in place · barrier {matching.barriers[1]:.3f} nats").wait_for()
    slider.press("End")
    reading.filter(has_text="100 %").wait_for()
    page.get_by_text("play").click()
    reading.filter(has_text=re.compile(r"^[3-7]\d % of")).wait_for()
    page.get_by_text("pause").click()
    page.get_by_text("play").wait_for()
    stopped = slider.evaluate("slider => slider.valueAsNumber")
    assert 0.25 < stopped < 1.0
