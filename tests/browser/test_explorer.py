"""The path explorer as a page of its own, without a kernel."""

import re

import pytest
import torch
from acts import NETWORKS, drag, until, write

from conftest import KERNEL_IDLE
from lmc.landscape.path import loss_path
from lmc.models import mlp


@pytest.fixture(scope="module")
def explorer(tmp_path_factory) -> str:
    """The address of a page with two paths between two random networks."""
    generator = torch.Generator().manual_seed(0)
    model = mlp(16, [8], 3)
    a, b, c = ({k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()} for _ in range(3))
    data = torch.randn(60, 1, 4, 4, generator=generator), torch.randint(3, (60,), generator=generator)
    file = tmp_path_factory.mktemp("pages") / "explorer.html"
    loss_path(model, a, b, data).save_html(file, naive=loss_path(model, a, c, data))
    return file.as_uri()


def test_the_saved_page_moves_with_keys_and_mouse(window, explorer):
    page = window.open(explorer)
    reading, slider = page.locator(".lmc-reading"), page.locator(".lmc-path input[type=range]")
    reading.filter(has_text="0.500").wait_for()
    slider.press("ArrowRight")
    reading.filter(has_text="0.542").wait_for()
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    reading.filter(has_text="0.000").wait_for()


def test_the_saved_page_shows_the_path_that_is_chosen(window, explorer):
    page = window.open(explorer)
    reading = page.locator(".lmc-reading")
    aligned = reading.inner_text()
    page.locator(".lmc-head").get_by_text("naive").click()
    page.wait_for_function("before => document.querySelector('.lmc-reading').textContent !== before", arg=aligned)


def test_two_widgets_of_a_path_stay_in_step_and_the_kernel_gives_exact_values(server, open_notebook):
    make = "path, naive = lmc.loss_path(model, a, b, data, alphas=9), lmc.loss_path(model, a, c, data, alphas=9)"
    cells = NETWORKS + make, "w = path.explore(naive=naive)\nw", "v = path.explore()\nv"
    lab = open_notebook(write(server, "path.ipynb", *cells))
    lab.run_all()
    assert lab.errors == []
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


def test_what_is_saved_is_alive_when_it_is_opened_again(server, window, open_notebook):
    """With no setting touched: without a kernel the explorer interpolates, with one it asks for exact values."""
    cells = NETWORKS + "path = lmc.loss_path(model, a, b, data, alphas=9)", "w = path.explore()\nw"
    lab = open_notebook(write(server, "kept.ipynb", *cells))
    lab.run_all()
    drag(lab.page, lab.page.locator(".lmc-path").get_by_role("slider"), (0.5, 0.5), (0.3, 0.5))
    lab.page.locator(".lmc-note[data-state=exact]").wait_for()
    lab.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    lab.page.wait_for_function("!window.jupyterapp.shell.currentWidget.content.model.dirty")
    lab.page.reload()
    lab.page.wait_for_function(KERNEL_IDLE)
    lab.page.wait_for_function("globalThis.lmcModels?.size")  # the kernel of before is still there
    drag(lab.page, lab.page.locator(".lmc-path").get_by_role("slider"), (0.5, 0.5), (0.7, 0.5))
    lab.page.locator(".lmc-note[data-state=exact]").wait_for()
    lab.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    again = open_notebook("kept.ipynb").page
    drag(again, again.locator(".lmc-path").get_by_role("slider"), (0.5, 0.5), (0.3, 0.5))
    again.locator(".lmc-reading").filter(has_text=re.compile(r"α = 0\.(2|3)")).wait_for()
    again.locator(".lmc-note[data-state=static]").wait_for()
    assert "model not found" not in again.locator(".jp-Notebook").inner_text()
    assert not again.evaluate("window.jupyterapp.shell.currentWidget.content.model.dirty")
