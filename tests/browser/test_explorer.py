"""The path explorer as a page of its own, without a kernel."""

import pytest
import torch

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
