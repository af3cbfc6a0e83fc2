"""Open the built site in a headless Chromium: nothing may be fetched from elsewhere, nothing may fail or scroll sideways, explorers
must move, slides must turn, and the glossary must print on one page.

    make docs && python tools/check_site.py site
    python tools/check_site.py site --axe axe.min.js --shots pictures     with axe-core, from npm, and pictures of what was seen

Needs playwright and a Chromium on the PATH. Links are checked by `make docs` itself.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

# A page of every kind; with --all every page.
KINDS = [
    "index", "start", "course", "gallery", "glossary", "methods", "guides/align_two", "api/index", "api/generated/lmc.loss_path",
    "teaching/index", "teaching/exercises/00_quickstart", "notebooks/00_quickstart", "notebooks/02_git_re_basin",
]  # fmt: skip
SCREENS = [("light", 1280), ("dark", 1280), ("light", 1024), ("light", 390), ("dark", 390)]
SETTLE = 350  # milliseconds
PATIENCE = 300_000  # milliseconds for anything at all: a busy machine is no fault of a page


class Site:
    def __init__(self, browser: Browser, folder: Path, shots: Path | None) -> None:
        self.browser, self.folder, self.shots, self.faults = browser, folder, shots, []

    def open(self, name: str, scheme: str, width: int) -> Page:
        context = self.browser.new_context(
            viewport={"width": width, "height": 844 if width < 500 else 800}, color_scheme=scheme
        )
        context.set_default_timeout(PATIENCE)
        context.route("**/*", self._gate)
        page = context.new_page()
        page.on("pageerror", lambda error: self.fault(f"{name}: {error}"))
        page.goto(
            f"{(self.folder / name.partition('?')[0]).as_uri()}.html{'?' + name.partition('?')[2] if '?' in name else ''}"
        )
        page.wait_for_timeout(SETTLE)
        return page

    def _gate(self, route) -> None:
        if route.request.url.startswith(("file:", "data:", "blob:")):
            return route.continue_()
        self.fault(f"asked for {route.request.url}")
        route.abort()

    def fault(self, what: str) -> None:
        """Told at once: what comes later may take minutes."""
        if what not in self.faults:
            self.faults.append(what)
            print(what, flush=True)

    def shot(self, page: Page, name: str) -> None:
        if self.shots:
            page.screenshot(path=self.shots / f"{re.sub(r'[/?]', '-', name)}.png")

    def expect(self, holds: object, what: str) -> None:
        if not holds:
            self.fault(what)


def look(site: Site, name: str, axe: str | None) -> None:
    for scheme, width in SCREENS:
        page = site.open(name, scheme, width)
        wide = page.evaluate("document.documentElement.scrollWidth")
        site.expect(wide <= width, f"{name}: {wide} pixels wide in a window of {width}")
        site.shot(page, f"{name}-{scheme}-{width}")
        if axe and width != 1024:
            page.add_script_tag(content=axe)
            for found in page.evaluate("axe.run({ resultTypes: ['violations'] }).then((result) => result.violations)"):
                where = "; ".join(str(node["target"]) for node in found["nodes"][:3])
                site.fault(
                    f"{name} {scheme} {width}: axe {found['id']} ({found['impact']}): {len(found['nodes'])} x, {where}"
                )
        page.context.close()


def moves(site: Site) -> None:
    page = site.open("notebooks/00_quickstart", "light", 1280)
    slider = page.locator(".lmc-path input[type=range]")
    slider.scroll_into_view_if_needed()
    before = page.locator(".lmc-reading").inner_text()
    slider.press("ArrowRight")
    page.wait_for_timeout(SETTLE)
    site.expect(page.locator(".lmc-reading").inner_text() != before, "the explorer of the quickstart does not move")
    page.context.close()


def slides(site: Site, name: str) -> None:
    page = site.open(f"{name}?slides", "light", 1280)
    count = page.locator(".slide").count()
    site.expect(count > 10, f"{name}: {count} slides")
    for i in range(count):
        site.expect(
            page.locator(".slides-counter span").inner_text() == f"{i + 1} / {count}",
            f"{name}: slide {i + 1} did not come",
        )
        wide, long = page.evaluate(
            "(({ scrollWidth: w, clientWidth: c, scrollHeight: h, clientHeight: d }) => [w - c, h - d])(document.querySelector('.slide.shown'))"
        )
        site.expect(wide <= 1, f"{name}: slide {i + 1} is {wide} pixels too wide")
        live = page.locator(".slide.shown [data-lmc]").count()
        scrolls = live or page.locator(".slide.shown[tabindex='0'] .cell").count() == 1
        site.expect(long <= 1 or scrolls, f"{name}: slide {i + 1} is {long} pixels too long")
        if i in (0, 2, 4) or live:
            page.wait_for_timeout(SETTLE)
            site.shot(page, f"{name}-slide-{i + 1}")
        page.keyboard.press("ArrowRight")
    page.context.close()


def prints(site: Site) -> None:
    page = site.open("glossary", "light", 1280)
    paper = page.pdf(format="A4", margin=dict.fromkeys(("top", "bottom", "left", "right"), "14mm"))
    sheets = len(re.findall(rb"/Type\s*/Page\b", paper))
    site.expect(sheets == 1, f"the glossary prints on {sheets} pages")
    if site.shots:
        (site.shots / "glossary.pdf").write_bytes(paper)
    page.context.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--axe", type=Path, help="axe.min.js")
    parser.add_argument("--shots", type=Path, help="a folder for pictures")
    parser.add_argument("--all", action="store_true", help="every page of the site, not one of each kind")
    parser.add_argument("--pages", nargs="*", help="these pages instead, as notebooks/00_quickstart")
    options = parser.parse_args()
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    axe = options.axe.read_text(encoding="utf-8") if options.axe else None
    folder = options.site.resolve()
    every = [
        str(path.relative_to(folder).with_suffix(""))
        for path in sorted(folder.rglob("*.html"))
        if "_static" not in path.parts
    ]
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        site = Site(browser, folder, options.shots)
        pages = options.pages if options.pages is not None else every if options.all else KINDS
        for name in pages:
            look(site, name, axe)
        moves(site)
        for name in ("00_quickstart", "02_git_re_basin", "08_soup_landscapes"):
            slides(site, f"notebooks/{name}")
        prints(site)
        browser.close()
    found = f"{len(site.faults)} faults" if site.faults else "nothing wrong"
    print(f"{len(pages)} pages in {len(SCREENS)} windows, 3 decks: {found}")
    return min(len(site.faults), 1)


if __name__ == "__main__":
    sys.exit(main())
