"""Take the README's picture: the path explorer on the page that `make demo` writes.

    python tools/readme_figure.py [reports/demo.html] [docs/explorer.png]
"""

import sys
from pathlib import Path
from shutil import which

from playwright.sync_api import sync_playwright


def main(page: str = "reports/demo.html", picture: str = "docs/explorer.png") -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1180, "height": 1000}, color_scheme="light")
        tab.goto(Path(page).resolve().as_uri())
        tab.locator(".lmc-path").screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
