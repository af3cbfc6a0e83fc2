"""The site's own pages are true: their Python compiles, their names are public, their papers are numbers that exist."""

import re
from pathlib import Path

import pytest

import lmc

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(DOCS / "guides").glob("*.md")])
PAGES = [page for page in PAGES if page.name not in ("course.md", "gallery.md")]  # made by the build


def named(text: str) -> set[str]:
    return set(re.findall(r"\blmc(?:\.[a-z_]\w*)+", text, re.I)) - {"lmc.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_are_public_and_python_compiles(page):
    text = page.read_text(encoding="utf-8")
    for name in named(text):
        value = lmc
        for part in name.split(".")[1:]:
            assert part in dir(value), f"{page.name}: {name}"
            value = getattr(value, part)
    for source in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        compile(source, page.name, "exec")


def test_every_guide_is_listed_and_every_method_has_a_paper():
    guides = {page.stem for page in (DOCS / "guides").glob("*.md")} - {"index"}
    assert guides == set(re.findall(r"^(\w+)$", (DOCS / "guides" / "index.md").read_text(encoding="utf-8"), re.M))
    rows = re.findall(r"^\| (?!method|---)(.*) \|$", (DOCS / "methods.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 15 and all(re.search(r"(19|20)\d\d", row.split("|")[2]) for row in rows)


def test_terms_of_the_glossary_are_in_order():
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^(\w[\w ]*)\n  \w", text, re.M)
    assert len(terms) > 12 and terms == sorted(terms)
