"""Settings for every test and every notebook cell that pytest runs."""

import gc
import os
import re
import tempfile
from decimal import Decimal
from functools import partial

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
_DECIMAL = re.compile(r"\d+\.\d+")
_ROUNDING = re.compile(r"\b\d(\.\d+)?e-(1[3-9]|[2-9]\d)\b")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare") and collector.path.suffix == ".ipynb":
        # Html holds random ids, and the same stands beside it as text; progress bars write their speed to stderr.
        collector.skip_compare += ("text/html", "stderr")
        if not os.environ.get("LMC_THOROUGH"):
            collector.setup = partial(_with_shared_kernel, collector)
            collector.teardown = lambda: None


_kernels = []  # at most one for each process of tests


def _with_shared_kernel(notebook):
    """Start a notebook in the emptied kernel of the last one, which has imported everything: half of the time of most."""
    if _kernels and _kernels[0].is_alive():
        notebook.kernel = _kernels[0]
        notebook.kernel.await_idle(notebook.kernel.execute_cell_input("%reset -f"), timeout=60)
        notebook.setup_sanitize_files()
    else:
        type(notebook).setup(notebook)
        _kernels[:] = [notebook.kernel]


def pytest_sessionfinish():
    for kernel in _kernels:
        kernel.stop()


def pytest_itemcollected(item):
    if hasattr(item, "sanitize") and item.path.suffix == ".ipynb":
        stored = [part for output in item.cell.get("outputs", ()) for part in _texts(output)]
        item.sanitize = partial(outline, stored=stored)


def outline(output, stored=()):
    """What is compared of the output of a notebook's cell, so that a figure made by other code is found to be stale.

    Of a figure its words, colours and kinds of marks: its numbers differ in the last bit between processors, and the
    cells assert what matters of them. Of a text all, but the digits of rounding errors are left out and the last digit of
    a number may be one more or less than in a `stored` text, for what is rounded differs likewise.
    """
    if not isinstance(output, str):
        return _words(output)
    output, *stored = (_ROUNDING.sub("~1e-16", text) for text in (output, *stored))
    return next((text for text in stored if _rounded_alike(output, text)), output)


def _texts(output):
    """The texts of a stored output."""
    return [part for part in (output.get("text"), output.get("data", {}).get("text/plain")) if isinstance(part, str)]


def _rounded_alike(x, y):
    """Whether two texts are the same but for one unit in the last place of numbers with a decimal point."""
    if _DECIMAL.sub("#", x) != _DECIMAL.sub("#", y):
        return False
    pairs = zip(_DECIMAL.findall(x), _DECIMAL.findall(y), strict=True)
    return all(abs(Decimal(a) - Decimal(b)) <= Decimal((0, (1,), Decimal(b).as_tuple().exponent)) for a, b in pairs)


def _words(part):
    """A part of a figure without numbers; None where nothing is left."""
    if isinstance(part, dict):
        # "config" holds what a version of plotly takes for granted, an address of its own service for one.
        part = {key: kept for key, value in part.items() if key not in ("bdata", "config") and (kept := _words(value))}
    elif isinstance(part, list):
        part = [kept for value in part if (kept := _words(value))]
    return _NUMBER.sub("#", part) if isinstance(part, str) else part if isinstance(part, dict | list) else None


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws from the same state, whichever tests ran before it in its process."""
    import torch  # not before the threads are set above

    torch.default_generator.manual_seed(0)


def pytest_collection_finish():
    """What the imports made stays: looking through it for garbage again and again is a tenth of the time of the tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


# Files that take longest, in this order: two processes then end at about the same time.
LONGEST = (
    "tests/browser/test_quickstart.py",
    "notebooks/",
    "tests/project/test_accidents.py",
    "tests/align/test_alignment_identities.py",
    "tests/project/test_demo.py",
    "tests/merge/test_write.py",
    "tests/merge/test_pleas.py",
    "tests/symmetry/test_record.py",
    "tests/symmetry/test_library_models.py",
    "tests/align/test_transformers_alignment.py",
    "tests/align/test_connect.py",
    "tests/symmetry/test_fuzz.py",
    "tests/symmetry/test_zoo.py",
    "tests/browser/",
    "tests/merge/test_zipit.py",
    "tests/align/test_many.py",
    "tests/align/test_comparison.py",
    "tests/project/test_devices.py",
    "tests/project/test_readme.py",
    "tests/symmetry/test_operators.py",
)


# Notebooks of the long run: what they show the tests of their methods compute as well.
LONG = tuple(f"notebooks/{number}_" for number in ("02", "04", "05", "07", "08", "09", "10", "12", "13"))


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked thorough, unless LMC_THOROUGH is set: searches for gaps, and the same path through another door."""
    place = {start: k for k, start in enumerate(LONGEST)}
    items.sort(
        key=lambda item: min((k for start, k in place.items() if item.nodeid.startswith(start)), default=len(place))
    )
    if os.environ.get("LMC_THOROUGH"):
        return
    left = {item for item in items if item.get_closest_marker("thorough") or item.nodeid.startswith(LONG)}
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]
