"""The soup triangle, dragged: in JupyterLab with its kernel, and as a page of its own without one."""

import ast
import io
import time
from collections import Counter

import nbformat
import pytest
import torch
from PIL import Image

from lmc.landscape.simplices.simplex import loss_simplex, loss_triangle
from lmc.models import mlp

SOURCE = """
import torch, lmc
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
model = lmc.models.mlp(16, [8], 3)
states = [{k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()} for _ in range(3)]
data = torch.randn(200, 16, generator=generator), torch.randint(3, (200,), generator=generator)
triangle = lmc.loss_triangle(model, states, data, resolution=12, progress=False)
"""

# The colour of the map a little above its middle.
PIXEL = """() => {
    const map = document.querySelector(".lmc-mix-map");
    return [...map.getContext("2d").getImageData(0.45 * map.width, 0.4 * map.height, 1, 1).data];
}"""


def made(count):
    generator = torch.Generator().manual_seed(0)
    model = mlp(16, [8], 3)
    states = [
        {k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()} for _ in range(count)
    ]
    data = torch.randn(200, 16, generator=generator), torch.randint(3, (200,), generator=generator)
    return model, states, data


@pytest.fixture
def lab(server, open_notebook):
    """A notebook with two widgets of one triangle, run."""
    cells = [
        nbformat.v4.new_code_cell(source)
        for source in (SOURCE, "w = triangle.explore()\nw", "v = triangle.explore()\nv")
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), server.notebooks / "triangle.ipynb")
    notebook = open_notebook("triangle.ipynb")
    notebook.run_all()
    assert notebook.errors == []
    notebook.page.locator(".lmc-mix").nth(1).wait_for()
    return notebook


def until(notebook, expression, accept):
    """The value of an expression in the kernel, once it is accepted."""
    end = time.monotonic() + 30
    while not accept(found := ast.literal_eval(notebook.ask(expression))):
        assert time.monotonic() < end, f"{expression} is still {found}"
        notebook.page.wait_for_timeout(50)
    return found


def drag(page, element, start, end):
    """From one place on an element to another, given in shares of its size."""
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=8)
    page.mouse.up()


@pytest.mark.thorough
def test_a_drag_in_jupyterlab_reaches_page_kernel_and_the_other_widget(lab):
    first, second = (lab.page.locator(".lmc-mix").nth(i) for i in (0, 1))
    first.locator(".lmc-note[data-state=exact]").wait_for()
    before = first.locator(".lmc-reading").inner_text()
    shares = ast.literal_eval(lab.ask("w.shares"))
    drag(lab.page, first.locator(".lmc-mix-map"), (0.5, 0.6), (0.45, 0.3))
    first.locator(".lmc-note[data-state=exact]").wait_for()
    after = first.locator(".lmc-reading").inner_text()
    assert after != before
    moved = until(lab, "w.shares", lambda found: found != shares and found[0] > 0.5)
    # What the page shows is what the kernel has evaluated, which is no lattice point.
    exact = lab.ask("w.exact['data']['loss']")
    assert f"{float(exact):.3f}" in after or f"{float(exact):.1f}" in after
    truth = lab.ask(
        "lmc.landscape.evaluate(model, lmc.weights.mean(states, [s / sum(w.shares) for s in w.shares]), data)['data'].loss"
    )
    assert float(exact) == pytest.approx(float(truth), rel=1e-5)
    # The second widget has followed, in the page and in the kernel.
    assert ast.literal_eval(lab.ask("v.shares")) == moved
    second.locator(".lmc-reading").filter(has_text=after.split("·")[-1].strip()).wait_for()
    outputs = second.locator(".lmc-mix-row output").all_inner_texts()
    assert outputs == [f"{share:.2f}" for share in moved]


@pytest.mark.thorough
def test_the_kernel_moves_the_widget_and_keys_move_it_too(lab):
    widget = lab.page.locator(".lmc-mix").first
    lab.ask("setattr(w, 'shares', [0.0, 0.0, 1.0])")
    widget.locator(".lmc-mix-row output").nth(2).filter(has_text="1.00").wait_for()
    widget.locator("input[type=range]").first.press("PageUp")
    assert until(lab, "w.shares", lambda found: found[0] > 0) == [0.1, 0.0, 0.9]
    widget.locator(".lmc-mix-map").press("2")
    assert until(lab, "v.shares", lambda found: found[1] == 1.0) == [0.0, 1.0, 0.0]


def test_the_saved_triangle_moves_without_a_kernel(window, tmp_path):
    triangle = loss_triangle(*made(3), resolution=12, progress=False)
    triangle.save_html(tmp_path / "triangle.html")
    page = window.open((tmp_path / "triangle.html").as_uri())
    reading, map_ = page.locator(".lmc-reading"), page.locator(".lmc-mix-map")
    drag(page, map_, (0.4, 0.6), (0.05, 1.0))  # beyond the lower left corner: all B
    page.locator(".lmc-mix-row output").nth(1).filter(has_text="1.00").wait_for()
    own = triangle.own["data"]["accuracy"][1]
    assert f"accuracy {100 * own:.1f} %" in reading.inner_text()
    page.locator(".lmc-note", has_text="no kernel: evaluated beforehand").wait_for()
    loss = page.evaluate(PIXEL)
    page.get_by_text("accuracy (%)").click()
    page.wait_for_function(f"before => ({PIXEL})().join() !== before", arg=",".join(map(str, loss)))
    page.get_by_text("uniform soup").click()
    page.locator(".lmc-mix-row output").nth(0).filter(has_text="0.33").wait_for()
    drag(page, map_, (0.4, 0.6), (0.42, 0.613))
    page.locator(".lmc-note", has_text="no kernel: interpolated between 91 mixtures").wait_for()


def colour(picture: bytes) -> tuple[int, ...]:
    """The red, green and blue of most of what is not grey."""
    values = Image.open(io.BytesIO(picture)).convert("RGB").tobytes()
    pixels = zip(values[::3], values[1::3], values[2::3], strict=True)
    return Counter(pixel for pixel in pixels if max(pixel) - min(pixel) > 60).most_common(1)[0][0]


def test_the_saved_page_of_five_models_moves_by_sliders(window, tmp_path):
    mixtures = loss_simplex(*made(5), resolution=4, progress=False)
    mixtures.save_html(tmp_path / "five.html")
    page = window.open((tmp_path / "five.html").as_uri())
    assert (
        len({colour(slider.screenshot()) for slider in page.locator("input[type=range]").all()}) == 5
    )  # that of its model
    slider = page.locator("input[type=range]").nth(3)
    slider.press("End")
    page.locator(".lmc-mix-row output").nth(3).filter(has_text="1.00").wait_for()
    assert page.locator(".lmc-mix-row output").all_inner_texts() == ["0.00", "0.00", "0.00", "1.00", "0.00"]
    assert f"accuracy {100 * mixtures.own['data']['accuracy'][3]:.1f} %" in page.locator(".lmc-reading").inner_text()
    slider.press("Home")  # the others had nothing: they share evenly
    page.locator(".lmc-mix-row output").nth(0).filter(has_text="0.25").wait_for()
