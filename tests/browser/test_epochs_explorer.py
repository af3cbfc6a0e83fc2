"""The training-time explorer, moved: in JupyterLab with its kernel, and as a page of its own without one."""

import pytest
import torch
from acts import NETWORKS, drag, until, write

from lmc.align.study.epochs import barrier_over_time
from lmc.models import mlp

MAKE = """
runs = [{epoch: weights() for epoch in (0, 1, 4, 8)} for _ in range(2)]
spec = lmc.permutation_spec(model, data[0][:2])
result = lmc.align.barrier_over_time(model, *runs, data, spec=spec, alphas=9, progress=False)
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """The address of a page over two runs of random networks."""
    generator = torch.Generator().manual_seed(0)
    model = mlp(16, [8], 3)
    runs = [
        {e: {k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()} for e in (0, 1, 4, 8)}
        for _ in range(2)
    ]
    data = torch.randn(60, 16, generator=generator), torch.randint(3, (60,), generator=generator)
    file = tmp_path_factory.mktemp("pages") / "epochs.html"
    barrier_over_time(model, *runs, data, alphas=9, progress=False).save_html(file)
    return file.as_uri()


@pytest.mark.thorough
def test_a_drag_in_jupyterlab_reaches_page_kernel_and_the_other_widget(server, open_notebook):
    sources = NETWORKS + MAKE, "w = result.explore()\nw", "v = result.explore()\nv"
    lab = open_notebook(write(server, "epochs.ipynb", *sources))
    lab.run_all()
    assert lab.errors == []
    first, second = (lab.page.locator(".lmc-epochs").nth(i) for i in (0, 1))
    first.locator(".lmc-reading").filter(has_text="epoch 8 · α = 0.500").wait_for()
    curve = first.locator(".lmc-line").first
    before = curve.get_attribute("points")
    epochs = first.get_by_role("slider", name="epoch")
    drag(lab.page, epochs, (0.98, 0.5), (0.5, 0.5))
    until(lab, "(w.epoch, v.epoch)", lambda both: both == (4, 4))
    second.locator(".lmc-reading").filter(has_text="epoch 4").wait_for()
    assert curve.get_attribute("points") != before
    epochs.press("ArrowLeft")
    until(lab, "(w.epoch, v.epoch)", lambda both: both == (1, 1))

    first.get_by_role("radio", name="aligned").click()
    until(lab, "v.active", lambda name: name == "aligned")
    first.get_by_role("slider", name="position on the path").press("ArrowRight")
    until(lab, "v.alpha", lambda alpha: alpha == 0.625)
    drag(lab.page, first.locator(".lmc-chart").first, (0.5, 0.5), (0.3, 0.5))
    # The chart is 520 wide, with margins of 66 and 26. Of a drag the kernel hears now and then, and its end.
    there = (0.3 * 520 - 66) / (520 - 66 - 26)
    told = until(lab, "(w.alpha, v.alpha)", lambda both: both[0] == both[1] and abs(both[0] - there) < 0.005)[0]
    first.locator(".lmc-note[data-state=exact]").wait_for()
    exact = until(lab, "result[1]['aligned'].exact(w.alpha)['data'].loss", lambda loss: loss > 0)
    first.locator(".lmc-reading").filter(has_text=f"α = {told:.3f} · loss {exact:.3f}").wait_for()
    assert "confusion at epoch 1" in first.locator("figcaption").first.inner_text()


def test_the_saved_page_moves_by_mouse_and_keys_and_plays(window, address):
    page = window.open(address)
    reading = page.locator(".lmc-reading")
    page.locator(".lmc-note[data-state=static]", has_text="static, no kernel: evaluated beforehand").wait_for()
    drag(page, page.locator(".lmc-land"), (0.5, 0.3), (0.3, 0.83))
    reading.filter(has_text="epoch 0 ·").wait_for()
    page.locator(".lmc-note", has_text="interpolated between evaluated points").wait_for()
    page.get_by_role("slider", name="epoch").press("End")
    reading.filter(has_text="epoch 8 ·").wait_for()
    drag(page, page.locator(".lmc-chart").nth(2), (0.9, 0.5), (0.55, 0.5))
    reading.filter(has_text="epoch 4 ·").wait_for()
    page.get_by_role("button", name="train").click()
    reading.filter(has_text="epoch 8 ·").wait_for()
    page.get_by_role("button", name="▶ train").wait_for()
