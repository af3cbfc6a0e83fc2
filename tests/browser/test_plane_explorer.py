"""The plane explorer, dragged: in JupyterLab with its kernel, without one, and as a page of its own."""

import re

import numpy as np
import pytest
import torch
from acts import NETWORKS, changes, drag, pixels, until, write

from lmc.landscape.planes.plane import loss_plane
from lmc.landscape.planes.plane_result import Plane
from lmc.models import mlp

MAKE = "plane = lmc.loss_plane(model, (a, b, c), data, resolution=9, progress=False)"


@pytest.fixture
def lab(server, open_notebook):
    """A notebook with two widgets of one plane, run."""
    notebook = open_notebook(
        write(server, "plane.ipynb", NETWORKS + MAKE, "w = plane.explore()\nw", "v = plane.explore()\nv")
    )
    notebook.run_all()
    assert notebook.errors == []
    notebook.page.locator(".lmc-plane").nth(1).wait_for()
    return notebook


@pytest.fixture(scope="module")
def plane() -> Plane:
    generator = torch.Generator().manual_seed(0)
    model = mlp(16, [8], 3)
    states = [{k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()} for _ in range(3)]
    data = torch.randn(200, 16, generator=generator), torch.randint(3, (200,), generator=generator)
    return loss_plane(model, states, data, resolution=9, progress=False)


@pytest.fixture
def static(window, plane, tmp_path):
    plane.save_html(tmp_path / "plane.html", tracks={"naive": [plane.places["A"], plane.places["B"]]})
    return window.open((tmp_path / "plane.html").as_uri())


def at(widget, point) -> bool:
    """Whether the page reads as this point."""
    read = re.findall(r"[xy] = (-?[\d.]+)", widget.locator(".lmc-reading").inner_text())
    return all(abs(float(text) - value) < 0.06 for text, value in zip(read, point, strict=True))


@pytest.mark.thorough
def test_a_drag_in_jupyterlab_reaches_page_kernel_and_the_other_widget(lab):
    first, second = (lab.page.locator(".lmc-plane").nth(i) for i in (0, 1))
    first.locator(".lmc-note[data-state=exact]").wait_for()
    before = until(lab, "list(w.point)", bool)
    seen = pixels(first.locator(".lmc-map"))
    drag(lab.page, first.locator(".lmc-map"), (0.45, 0.4), (0.6, 0.7))
    told = until(lab, "list(w.point)", lambda point: at(first, point))  # of a drag the kernel hears now and then
    until(lab, "list(v.point)", lambda point: point == told)
    assert told[0] > before[0] and told[1] < before[1]
    assert pixels(first.locator(".lmc-map")) != seen
    exact = until(lab, "plane.exact(*w.point)['data'].loss", lambda loss: loss > 0)
    for each in (first, second):
        each.locator(".lmc-reading").filter(has_text=f"loss {exact:.3f}").wait_for()
        each.locator(".lmc-note[data-state=exact]").wait_for()
    assert first.locator(".lmc-reading").inner_text() == second.locator(".lmc-reading").inner_text()
    assert "confusion at (" in first.locator("figcaption").first.inner_text()
    assert first.locator(".lmc-tile:visible").count() == 24


@pytest.mark.thorough
def test_keys_and_tabs_in_jupyterlab(lab):
    first, second = (lab.page.locator(".lmc-plane").nth(i) for i in (0, 1))
    before = until(lab, "list(w.point)", bool)
    first.locator(".lmc-map").press("ArrowLeft")
    told = until(lab, "list(w.point)", lambda point: point != before)
    grid = until(lab, "plane.x.tolist()", bool)
    assert told[0] == max(x for x in grid if x < before[0]) and told[1] == before[1]
    first.get_by_role("radio", name="accuracy").click()
    until(lab, "v.measure", lambda measure: measure == "accuracy")
    second.get_by_role("radio", name="accuracy", checked=True).wait_for()
    lab.page.locator(".lmc-plane").first.get_by_role("button", name="C", exact=True).click()
    until(lab, "tuple(v.point) == plane.places['C']", bool)
    assert until(lab, "w.comm is not None", bool)
    lab.ask("setattr(v, 'point', [1.0, 1.0])")
    first.locator(".lmc-reading").filter(has_text="x = 1.00, y = 1.00").wait_for()


@pytest.mark.thorough
def test_a_dead_kernel_leaves_the_last_picture_and_says_so(lab):
    first = lab.page.locator(".lmc-plane").first
    first.locator(".lmc-note[data-state=exact]").wait_for()
    lab.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.shutdown()")
    before = pixels(first.locator(".lmc-map"))
    drag(lab.page, first.locator(".lmc-map"), (0.45, 0.4), (0.3, 0.6))
    first.locator(".lmc-note[data-state=static]").wait_for()
    assert first.locator(".lmc-note").inner_text().startswith("static, the kernel ")
    assert pixels(first.locator(".lmc-map")) != before


def test_the_saved_page_moves_and_says_that_it_is_static(static, plane):
    reading, flat, surface = (static.locator(f".lmc-{name}") for name in ("reading", "map", "surface"))
    static.locator(".lmc-note[data-state=static]").wait_for()
    before, seen = reading.inner_text(), (pixels(flat), pixels(surface))
    drag(static, flat, (0.45, 0.4), (0.3, 0.6))
    changes(static, seen[0], pixels, flat)
    changes(static, seen[1], pixels, surface)
    assert reading.inner_text() != before
    static.locator(".lmc-note", has_text="interpolated between grid points").wait_for()
    static.get_by_role("button", name="A", exact=True).click()
    reading.filter(has_text=f"loss {plane.own['data']['loss'][0]:.3f}").wait_for()
    static.locator(".lmc-note", has_text="evaluated beforehand").wait_for()
    seen = pixels(surface)
    surface.press("ArrowLeft")
    changes(static, seen, pixels, surface)
    seen = pixels(surface)
    drag(static, surface, (0.5, 0.5), (0.7, 0.4))
    changes(static, seen, pixels, surface)


def test_gaps_are_drawn_as_gaps_and_counted(window, plane, tmp_path):
    holes = {"data": {name: grid.copy() for name, grid in plane.values["data"].items()}}
    holes["data"]["loss"][4:6, 4:7] = np.nan
    broken = Plane(plane.x, plane.y, holes, plane.places, plane.own, plane.done, plane.axes)
    broken.save_html(tmp_path / "broken.html")
    page = window.open((tmp_path / "broken.html").as_uri())
    page.locator(".lmc-foot", has_text="loss is not a number at 6 points").wait_for()
    flat = page.locator(".lmc-map")
    flat.focus()
    for _ in range(12):
        flat.press("ArrowRight")
    for key in ["ArrowDown"] * 12 + ["ArrowUp"] * 4 + ["ArrowLeft"] * 4:
        flat.press(key)
    page.locator(".lmc-reading", has_text="loss – nats").wait_for()
