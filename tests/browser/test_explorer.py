"""The path explorer as a page of its own, without a kernel."""

import os
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


def test_two_widgets_of_a_path_stay_in_step_and_what_is_saved_is_alive_when_it_is_opened_again(server, open_notebook):
    make = "path, naive = lmc.loss_path(model, a, b, data, alphas=9), lmc.loss_path(model, a, c, data, alphas=9)"
    cells = NETWORKS + make, "w = path.explore(naive=naive)\nw", "v = path.explore()\nv"
    lab = open_notebook(write(server, "path.ipynb", *cells))
    lab.run_all()
    assert lab.errors == []
    stay_in_step(lab)
    are_alive_again(lab)


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
    """Saved and loaded again with no setting touched: without a kernel an explorer interpolates, and with one, which the
    thorough form looks at, it asks for exact values."""
    page = lab.page
    explorer = page.locator(".lmc-path").first
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function("!window.jupyterapp.shell.currentWidget.content.model.dirty")
    if os.environ.get("LMC_THOROUGH"):
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


def test_the_examples_that_change_their_mind_follow_the_slider(window, tmp_path):
    """At A nothing differs from A; on the way to B some examples do, each with A's class, another one, and its picture."""
    import lmc

    stored, digits = lmc.data.checkpoint("digits-mlp32"), lmc.data.digits()
    path = lmc.loss_path(stored.model(), *stored, digits.test, alphas=9, progress=False)
    page = window.open(path.save_html(tmp_path / "path.html", examples="unlike A").as_uri())
    caption, labels = page.locator("figcaption").nth(1), page.locator(".lmc-tile:visible span")
    table = path.predictions.predicted
    for key, point in (("Home", 0), ("End", -1)):
        page.get_by_role("slider").press(key)
        changed = table[point] != table[0]
        caption.filter(has_text=f"{changed.sum()} of 397 decided otherwise than by A").wait_for()
        right = table[point] == path.predictions.targets
        said = [
            f"{was}→{now}{' ✓' if good else ''}"
            for was, now, good in zip(table[0][changed], table[point][changed], right[changed], strict=True)
        ]
        assert labels.all_inner_texts() == said[:24]
        assert bool(said) == (key == "End")
