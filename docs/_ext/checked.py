"""What is built holds together: every link and picture of every page lies in the site and is there, and nothing is fetched from
anywhere else. What does not is a warning, and warnings are errors."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
# What a browser fetches by itself; an <a> to another site is only followed by who clicks it.
FETCHED = {"src", "srcset", "poster", "data"}


class Links(HTMLParser):
    """The names that a page has, and what it points at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.found: list[tuple[str, str]] = []  # address, and what it is: followed or fetched
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.names.add(value)
            elif value and (name == "href" or name in FETCHED):
                self.found.append((value, "followed" if name == "href" and tag == "a" else "fetched"))


def check(app, error):
    if error is not None or app.builder.format != "html":
        return
    site = Path(app.outdir)
    built = [
        path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts
    ]  # templates of the theme lie there
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in built}
    count = 0
    for path, page in pages.items():
        for address, how in page.found:
            count += 1
            if wrong := _wrong(address, how, path, pages):
                LOGGER.warning("%s: %s: %s", path.relative_to(site), wrong, address[:80])
    for sheet in site.rglob("*.css"):
        for address in re.findall(r"url\(['\"]?([^'\")]+)", sheet.read_text(encoding="utf-8", errors="replace")):
            if urlsplit(address).scheme in ("http", "https") or address.startswith("//"):
                LOGGER.warning("%s fetches %s", sheet.relative_to(site), address[:80])
    LOGGER.info("checked %d links of %d pages", count, len(pages))


def _wrong(address: str, how: str, path: Path, pages: dict[Path, Links]) -> str | None:
    parts = urlsplit(address)
    if parts.scheme in ("data", "blob", "mailto", "javascript"):
        return None
    if parts.scheme or parts.netloc:
        return "fetched from elsewhere" if how == "fetched" else None
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return "nothing there"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].names:
        return "no such place in the page"
    return None


def setup(app):
    app.connect("build-finished", check, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
