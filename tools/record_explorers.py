"""Record explorers as small animated pictures: `python tools/record_explorers.py docs`.

Makes pages of a path, a plane, the soup triangle and a matching from stored checkpoints, opens them in a headless
Chromium, drags, and writes what is seen. Needs playwright, Pillow and a Chromium on the PATH.
"""

import argparse
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from playwright.sync_api import sync_playwright

import lmc

WIDTH = 760  # of the pictures; the window is wider
VIEWS = {"path": (1060, 980), "plane": (1060, 760), "triangle": (1060, 660), "matching": (1060, 880)}


def pages(folder: Path) -> dict[str, str]:
    """The pages to be recorded: name -> address."""
    pair, wide = lmc.data.checkpoint("digits-mlp64"), lmc.data.checkpoint("digits-mlp512")
    data = lmc.data.digits()
    a, b = pair
    model = pair.model()
    spec = lmc.permutation_spec(model, data.test[0][:2])
    found = lmc.weight_matching(spec, a, b, restarts=3)
    three = {"A": a, "B": b, "B moved": found.apply(b)}
    triangle = lmc.loss_triangle(model, list(three.values()), data.test, names=list(three), progress=False)
    triangle.save_html(folder / "triangle.html")
    plane = lmc.loss_plane(model, list(three.values()), data.test, names=list(three), progress=False)
    plane.save_html(folder / "plane.html")
    matching = lmc.align.inspect_matching(found, a, b, model=model, data=data.test, progress=False)
    matching.save_html(folder / "matching.html")
    a, b = wide
    model = wide.model()
    moved = lmc.weight_matching(lmc.permutation_spec(model, data.test[0][:2]), a, b).apply(b)
    naive, aligned = (lmc.loss_path(model, a, end, data, progress=False) for end in (b, moved))
    aligned.save_html(folder / "path.html", naive=naive)
    return {name: (folder / f"{name}.html").as_uri() for name in VIEWS}


def path(page: Any) -> Iterator[None]:
    """Along the aligned line and back along the naive one."""
    slider = page.locator(".lmc-path input[type=range]")
    slider.wait_for()
    box = slider.bounding_box()
    for name, way in (("aligned", range(0, 19)), ("naive", range(18, -1, -1))):
        page.locator(".lmc-head").get_by_text(name, exact=True).click()
        page.mouse.move(box["x"] + 9 + way[0] / 18 * (box["width"] - 18), box["y"] + box["height"] / 2)
        page.mouse.down()
        for step in way:
            page.mouse.move(box["x"] + 9 + step / 18 * (box["width"] - 18), box["y"] + box["height"] / 2)
            yield
        page.mouse.up()


def plane(page: Any) -> Iterator[None]:
    """The point over the map, then the surface turned."""
    canvases = page.locator(".lmc canvas")
    canvases.first.wait_for()
    stops = [(0.2, 0.75), (0.45, 0.35), (0.7, 0.75), (0.25, 0.8)]
    for canvas, spots, steps in ((canvases.nth(0), stops, 7), (canvases.nth(1), [(0.3, 0.5), (0.8, 0.42)], 14)):
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + spots[0][0] * box["width"], box["y"] + spots[0][1] * box["height"])
        page.mouse.down()
        for (x, y), (u, v) in zip(spots, spots[1:], strict=False):
            for step in range(steps):
                share = step / steps
                page.mouse.move(
                    box["x"] + (x + share * (u - x)) * box["width"], box["y"] + (y + share * (v - y)) * box["height"]
                )
                yield
        page.mouse.up()


def triangle(page: Any) -> Iterator[None]:
    """From B over the ridge to A, and along the valley to B moved."""
    map_ = page.locator(".lmc-mix-map")
    map_.wait_for()
    box = map_.bounding_box()
    stops = [(0.16, 0.84), (0.3, 0.6), (0.43, 0.25), (0.6, 0.52), (0.74, 0.84), (0.45, 0.84), (0.16, 0.84)]
    page.mouse.move(box["x"] + stops[0][0] * box["width"], box["y"] + stops[0][1] * box["height"])
    page.mouse.down()
    for (x, y), (u, v) in zip(stops, stops[1:], strict=False):
        for step in range(6):
            at = x + (u - x) * step / 6, y + (v - y) * step / 6
            page.mouse.move(box["x"] + at[0] * box["width"], box["y"] + at[1] * box["height"])
            yield
    page.mouse.up()


def matching(page: Any) -> Iterator[None]:
    """From naive to aligned."""
    slider = page.locator(".lmc-match input[type=range]")
    slider.wait_for()
    box = slider.bounding_box()
    page.mouse.move(box["x"] + 8, box["y"] + box["height"] / 2)
    page.mouse.down()
    for share in [0.0] * 3 + [i / 26 for i in range(1, 26)] + [1.0] * 6:
        page.mouse.move(box["x"] + 8 + share * (box["width"] - 16), box["y"] + box["height"] / 2)
        yield
    page.mouse.up()


def record(page: Any, frames: Iterator[None], file: Path) -> None:
    """One picture after each frame, as an animated WebP."""
    images = []
    for _ in frames:
        page.wait_for_timeout(120)
        image = Image.open(io.BytesIO(page.locator(".lmc").first.screenshot())).convert("RGB")
        images.append(image.resize((WIDTH, round(WIDTH * image.height / image.width)), Image.Resampling.LANCZOS))
    images[0].save(file, save_all=True, append_images=images[1:], duration=140, loop=0, quality=46, method=6)
    print(f"{file}: {len(images)} frames, {file.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    target = parser.parse_args().folder
    torch.set_num_threads(1)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        for name, address in pages(Path(folder)).items():
            width, height = VIEWS[name]
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
            page.goto(address)
            frames = {"path": path, "plane": plane, "triangle": triangle, "matching": matching}[name]
            record(page, frames(page), target / f"{name}.webp")
        browser.close()


if __name__ == "__main__":
    main()
