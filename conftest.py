"""Settings for every test and every notebook cell that pytest runs."""

import os
import re
import tempfile

import pytest

# One thread: sums are then made in one order on every machine, and a busy small machine is not slowed by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A progress bar, which shows after two seconds, would be an output that the stored notebook does not have.
os.environ["TQDM_DISABLE"] = "1"

# Figures as data, as they are stored, and nothing beside.
os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"

# Kernels neither read nor write the user's own Jupyter and IPython folders.
_JUPYTER_HOME = tempfile.TemporaryDirectory(prefix="lmc-jupyter-")
for _name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
    os.environ[_name] = os.path.join(_JUPYTER_HOME.name, _name.lower())

_NUMBER = re.compile(r"\d[\d.,e+-]*")
_ROUNDING = re.compile(r"\b\d(\.\d+)?e-(1[3-9]|[2-9]\d)\b")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare") and collector.path.suffix == ".ipynb":
        # Html holds random ids, and the same stands beside it as text; progress bars write their speed to stderr.
        collector.skip_compare += ("text/html", "stderr")


def pytest_itemcollected(item):
    if hasattr(item, "sanitize") and item.path.suffix == ".ipynb":
        item.sanitize = outline


def outline(output):
    """What is compared of the output of a notebook's cell, so that a figure made by other code is found to be stale.

    Of a figure its words, colours and kinds of marks: its numbers differ in the last bit between processors, and the
    cells assert what matters of them. Of a text all but the digits of rounding errors, which differ likewise.
    """
    return _ROUNDING.sub("~1e-16", output) if isinstance(output, str) else _words(output)


def _words(part):
    """A part of a figure without numbers; None where nothing is left."""
    if isinstance(part, dict):
        part = {key: kept for key, value in part.items() if key != "bdata" and (kept := _words(value))}
    elif isinstance(part, list):
        part = [kept for value in part if (kept := _words(value))]
    return _NUMBER.sub("#", part) if isinstance(part, str) else part if isinstance(part, dict | list) else None


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws from the same state, whichever tests ran before it in its process."""
    import torch  # not before the threads are set above

    torch.manual_seed(0)


# Files that take longest, in this order: two processes then end at about the same time.
LONGEST = (
    "tests/symmetry/test_zoo.py",
    "notebooks/",
    "tests/browser/",
    "tests/symmetry/test_fuzz.py",
    "tests/project/test_accidents.py",
    "tests/symmetry/test_operators.py",
    "tests/merge/test_pleas.py",
    "tests/symmetry/test_record.py",
    "tests/merge/test_zipit.py",
    "tests/project/test_demo.py",
    "tests/align/test_many.py",
    "tests/align/test_connect.py",
)


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked thorough, unless LMC_THOROUGH is set: searches for gaps, and the same path through another door."""
    place = {start: k for k, start in enumerate(LONGEST)}
    items.sort(
        key=lambda item: min((k for start, k in place.items() if item.nodeid.startswith(start)), default=len(place))
    )
    if os.environ.get("LMC_THOROUGH"):
        return
    left = [item for item in items if item.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]
