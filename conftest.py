"""Settings for every test and every notebook cell that pytest runs."""

import os
import tempfile

import pytest

# One thread: sums are then made in one order on every machine, and a busy small machine is not slowed by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A progress bar, which shows after two seconds, would be an output that the stored notebook does not have.
os.environ["TQDM_DISABLE"] = "1"

# Kernels neither read nor write the user's own Jupyter and IPython folders.
_JUPYTER_HOME = tempfile.TemporaryDirectory(prefix="lmc-jupyter-")
for _name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
    os.environ[_name] = os.path.join(_JUPYTER_HOME.name, _name.lower())

# Figures are compared by the assertions in the cell below them: a plotly figure differs in its last bit between
# processors, html holds random ids, and progress bars write their speed to stderr.
NOT_COMPARED = ("application/vnd.plotly.v1+json", "text/html", "stderr")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare") and collector.path.suffix == ".ipynb":
        collector.skip_compare += NOT_COMPARED


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws from the same state, whichever tests ran before it in its process."""
    import torch  # not before the threads are set above

    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked thorough, unless CI is set: searches for gaps, and the same path through another door."""
    if os.environ.get("CI"):
        return
    left = [item for item in items if item.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]
