"""What needs a package beyond the core's says which one; the core works without any of them."""

import subprocess
import sys

import pytest

import lmc
from lmc.core.extras import require

WITHOUT = """
import sys

for name in ("plotly", "pandas", "sklearn", "anywidget", "ipywidgets", "IPython", "ot", "cma", "transformers"):
    sys.modules[name] = None  # importing it fails as if it were not installed
import torch

import lmc

torch.manual_seed(0)
model = lmc.models.mlp(6, [8], 3)
data = torch.randn(40, 6), torch.arange(40) % 3
a, b = lmc.training.train(model, data, seeds=range(2), epochs=1)
spec = lmc.permutation_spec(model, data[0][:2])
path = lmc.loss_path(model, a, lmc.weight_matching(spec, a, b).apply(b), data, alphas=3)
print(path, spec)
for call in (path.plot, path.explore, path.to_frame, path.barriers, lambda: path.save_html("never.html"), spec.plot):
    try:
        call()
    except lmc.MissingPackageError as error:
        print("missing:", error)
try:
    lmc.data.digits()
except lmc.DataError as error:
    print("missing:", error)
"""


def test_the_core_needs_no_extra_and_drawing_says_which(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    missing = [line for line in done.stdout.splitlines() if line.startswith("missing:")]
    assert len(missing) == 7 and all("pip install" in line for line in missing)
    packages = ("plotly", "anywidget", "pandas", "pandas", "anywidget", "plotly", "scikit-learn")
    assert all(package in line for package, line in zip(packages, missing, strict=True))
    assert not list(tmp_path.iterdir())


def test_require_gives_the_module_or_says_how_to_get_it():
    assert require("math").pi > 3
    with pytest.raises(ImportError, match=r"nowhere_at_all.*pip install 'lmc-lab\[search\]'") as error:
        require("nowhere_at_all", "search")
    assert isinstance(error.value, lmc.LmcError)
    with pytest.raises(ImportError, match="needs the package Pillow.*pip install Pillow, or"):
        require("PIL.nowhere_at_all", "images")
