"""`make demo`, from a bare interpreter to a page that stands alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough  # what it calls, the README's lines call as well
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[str, str]:
    """What the demo prints and the page it writes."""
    page = tmp_path_factory.mktemp("demo") / "new" / "folder" / "demo.html"
    command = [sys.executable, ROOT / "tools" / "demo.py", "--out", page]
    command += [] if os.environ.get("LMC_THOROUGH") else ["--budget", "3"]
    done = subprocess.run(command, cwd=page.parents[2], capture_output=True, text=True, check=True)
    return done.stdout, page.read_text(encoding="utf-8")


def test_the_barrier_vanishes(demo):
    printed, _ = demo
    naive, aligned = (float(number) for number in re.findall(r"barrier ([\d.]+) nats", printed))
    assert naive > 1.0
    assert aligned < 0.03


def test_every_step_has_its_seconds(demo):
    printed, _ = demo
    assert len(re.findall(r" \d+\.\d s$", printed, re.M)) == 5


def test_the_certificate_is_exact(demo):
    printed, _ = demo
    assert float(re.search(r"outputs equal to (\S+)", printed)[1]) < 1e-12


def test_the_page_holds_the_table_and_needs_nothing_else(demo):
    printed, page = demo
    for cell in re.findall(r"barrier [\d.]+ nats", printed):
        assert cell in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)|url\(\s*["']?(?!data:|#)|@import""", page)
