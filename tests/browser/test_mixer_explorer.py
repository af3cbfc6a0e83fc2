"""The merge mixer in JupyterLab, with a kernel, and as a page of its own, without one."""

import pytest
import torch
from acts import until, write

import lmc

SOURCE = """
import torch
import lmc

torch.set_num_threads(1)
model = lmc.models.mlp(16, [8], 3)
draw = torch.Generator().manual_seed(0)
base, a, b = ({k: torch.randn(v.shape, generator=draw) for k, v in model.state_dict().items()} for _ in range(3))
data = {n: (torch.randn(60, 16, generator=draw), torch.randint(3, (60,), generator=draw)) for n in ("left", "right")}
mixer = lmc.merge.mixer(model, [a, b], data, base=base, progress=False)
"""


@pytest.fixture(scope="module")
def mixer() -> lmc.merge.Mixer:
    scope: dict = {}
    threads = torch.get_num_threads()
    exec(SOURCE, scope)
    torch.set_num_threads(threads)
    return scope["mixer"]


@pytest.mark.thorough
def test_sliders_move_the_bars_and_the_kernel(open_notebook, server):
    write(server, "mixer.ipynb", SOURCE, "widget = mixer.explore()\nwidget", "other = mixer.explore()\nother")
    lab = open_notebook("mixer.ipynb")
    lab.run_all()
    assert not lab.errors
    widget = lab.page.locator(".lmc-mixer").first
    note, reading = widget.locator(".lmc-note"), widget.locator(".lmc-reading")
    note.filter(has_text="exact, from the kernel").wait_for()
    slider = widget.get_by_label("coefficient of left, all layers")
    box = slider.bounding_box()
    lab.page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 2)
    lab.page.mouse.down()
    lab.page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2, steps=8)
    lab.page.mouse.up()
    lab.page.wait_for_function("document.querySelector('.lmc-mixer-all, .lmc-mixer output').textContent === '1.50'")
    until(lab, "[row[0] for row in widget.coefficients]", lambda column: column == [1.5, 1.5])
    head = widget.get_by_label("coefficient of right, head")
    head.press("ArrowRight")
    widget.get_by_text("mixed", exact=True).wait_for()
    rows = until(lab, "widget.coefficients", lambda rows: rows[0][1] != rows[1][1])
    until(lab, "other.coefficients", lambda told: told == rows)  # widgets of one result stay in step
    values = until(lab, "list(mixer.scores(widget.coefficients).values())", bool)
    note.filter(has_text="exact, from the kernel").wait_for()
    reading.filter(has_text=f"mean accuracy {50 * sum(values):.1f} %").wait_for()
    lab.page.locator(".lmc-mixer").nth(1).get_by_text("mixed", exact=True).wait_for()


def test_the_saved_page_moves_without_a_kernel(window, mixer, tmp_path):
    file = tmp_path / "mixer.html"
    mixer.save_html(file)
    page = window.open(file.as_uri())
    page.locator(".lmc-note").filter(has_text="interpolated; layers need a kernel").wait_for()
    assert page.get_by_label("coefficient of left, fc1").is_disabled()
    reading = page.locator(".lmc-reading")
    for name, coefficients in {"base": [0, 0], "sum": [1, 1], "left alone": [1, 0]}.items():
        page.get_by_role("button", name=name, exact=True).click()
        expected = 50 * sum(mixer.scores(coefficients).values())  # these lie on the grid
        reading.filter(has_text=f"mean accuracy {expected:.1f} %").wait_for()
    page.get_by_label("coefficient of right, all layers").press("ArrowRight")
    between = 50 * (0.5 * mixer.grid[10, 0].sum() + 0.5 * mixer.grid[10, 1].sum())  # 0.05 lies half way to 0.1
    reading.filter(has_text=f"mean accuracy {between:.1f} %").wait_for()
    for slider in page.get_by_label("all layers").all():
        slider.press("End")
    reading.filter(has_text=f"mean accuracy {50 * mixer.grid[-1, -1].sum():.1f} %").wait_for()
    page.get_by_role("button", name="best of the grid").click()
    from playwright.sync_api import expect  # there where a browser is

    for name, value in zip(mixer.names, mixer.best, strict=True):  # the page answers a moment later
        expect(page.get_by_label(f"coefficient of {name}, all layers")).to_have_value(f"{value:g}")
