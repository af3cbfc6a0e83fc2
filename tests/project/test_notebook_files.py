"""Every notebook is stored as `tools/run_notebooks.py` leaves it: what nbval needs, and nothing it would let through."""

import re
from pathlib import Path

import nbformat
import pytest
from support import tool

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAY_FAIL = {"raises-exception", "nbval-raises-exception"}
LIVE_VIEW = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = re.compile(r"/(?:home|Users|root|tmp|work|opt)/")


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_is_a_quickstart():
    assert FOLDER / "00_quickstart.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_clean(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not notebook.metadata.get("widgets"), "widget state is stored (megabytes of it)"
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_run_top_to_bottom(path: Path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1)), "run tools/run_notebooks.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_of_the_code_above_them(path: Path):
    notebook = nbformat.read(path, as_version=4)
    executed = notebook.metadata.get("lmc", {}).get("executed")
    assert executed == tool("tools/run_notebooks").checksum(notebook), "run tools/run_notebooks.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_claim_is_stated_once(path: Path):
    """An assertion fails by itself: what is printed beside it is a number, not whether the condition holds."""
    for cell in code_cells(path):
        for output in cell.outputs:
            text = str(output.get("text", ""))
            assert not re.search(r"\b(True|False)$", text, re.M), text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_checks_itself(path: Path):
    assert any(re.search(r"^\s*assert ", cell.source, re.M) for cell in code_cells(path)), "no cell asserts anything"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_outputs_can_be_compared(path: Path):
    for cell in code_cells(path):
        assert not cell.source.rstrip().endswith(";"), "nbval does not honour a trailing ';': assign to _ instead"
        for output in cell.outputs:
            data = output.get("data", {})
            text = str(data.get("text/plain", "")) + str(output.get("text", ""))
            assert output.output_type != "error" or MAY_FAIL & set(cell.metadata.get("tags", [])), "a stored error"
            assert output.get("name") != "stderr", "stored stderr"
            assert LIVE_VIEW not in data, "a stored view of a widget without its state"
            assert not re.search(r"\b0x[0-9a-f]{6,}", text), f"an object's address in {text[:80]!r}"
            assert not MACHINE_PATH.search(text), f"a path of one machine in {text[:80]!r}"


def test_numbers_in_texts_may_differ_by_rounding_alone():
    outline, stored = tool("conftest").outline, "barrier 0.44 nats, 12 units, 3e-16"
    same = outline(stored, [stored])
    assert outline("barrier 0.45 nats, 12 units, 2e-16", [stored]) == same
    assert outline("barrier 0.43 nats, 12 units, 1e-15", ["another", stored]) == same
    others = (
        "barrier 0.46 nats, 12 units, 3e-16",
        "barrier 0.44 nats, 13 units, 3e-16",
        "barrier 0.4 nats, 12 units, 3e-16",
    )
    for other in (*others, "barrier 0.44 bits, 12 units, 3e-16", "barrier 1.44 nats, 12 units, 3e-16"):
        assert outline(other, [stored]) != same
