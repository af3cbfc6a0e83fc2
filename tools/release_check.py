"""Build the wheel and the sdist, install both into empty environments, and use them there.

    python tools/release_check.py                                     this Python
    python tools/release_check.py python3.11 python3.12 python3.13    each of them
    python tools/release_check.py --lowest python3.11                 with the oldest versions that pyproject.toml promises

For each Python: the core alone, from the wheel and from the sdist (nothing of an extra may be there, and nothing may need it),
then all that readers of the notebooks install. `--constraint FILE` is handed to pip; `--without NAME` leaves the lower bound of one package alone, where this
machine's registry lacks it; `--keep FOLDER` keeps the environments.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

CORE = """
import importlib.util, pathlib, torch, lmc
assert "site-packages" in lmc.__file__, lmc.__file__
extra = [name for name in ("plotly", "pandas", "anywidget", "sklearn", "ot", "cma", "distributed") if importlib.util.find_spec(name)]
assert not extra, extra
assert (pathlib.Path(lmc.__file__).parent / "py.typed").exists()
stored = lmc.data.checkpoint("digits-mlp64")
model, (a, b) = stored.model(), stored[:2]
x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
data = x, torch.func.functional_call(model, a, (x,)).argmax(1)
spec = lmc.permutation_spec(model, x[:2])
moved = lmc.weight_matching(spec, a, b, seed=0).apply(b)
naive, aligned = (lmc.loss_path(model, a, end, data, progress=False).barrier for end in (b, moved))
assert aligned < naive / 2, (naive, aligned)
lmc.merge.ties([a, moved], base=lmc.weights.lerp(a, moved, 0.5))
try:
    lmc.loss_path(model, a, b, data, progress=False).plot()
except lmc.LmcError as error:
    assert "lmc-lab[notebooks]" in str(error), error
else:
    raise AssertionError("a figure without plotly")
"""
EXTRAS = """
import json, pathlib, sys, lmc
data = lmc.data.digits()
stored = lmc.data.checkpoint("digits-mlp64")
model, (a, b) = stored.model(), stored[:2]
spec = lmc.permutation_spec(model, data.test[0][:2])
path = lmc.loss_path(model, a, lmc.weight_matching(spec, a, b, seed=0).apply(b), data, progress=False)
assert path.barrier < 0.3
path.plot().to_json()
assert "text/html" in str(path.explore()._repr_mimebundle_())
path.to_frame()
path.save_html("path.html")
lmc.ot_fusion(model, a, b)
lab = pathlib.Path(sys.prefix, "share/jupyter/labextensions/lmc-lab/package.json")
assert json.loads(lab.read_text())["version"] == lmc.__version__
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:300]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def clean() -> dict[str, str]:
    """Nothing of this checkout may be found by chance."""
    left = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return left | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def built(folder: Path) -> tuple[Path, Path]:
    """The wheel, made from the sdist, and the sdist."""
    run(sys.executable, "-m", "venv", folder / "builder", cwd=folder)
    python = folder / "builder" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "build", cwd=folder)
    run(python, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
    wheel, sdist = (next((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    print(
        f"{sdist.name} {sdist.stat().st_size / 1e6:.1f} MB, {wheel.name} {wheel.stat().st_size / 1e6:.1f} MB",
        flush=True,
    )
    return wheel, sdist


def oldest(lines: list[str], without: list[str]) -> list[str]:
    """Requirements with their lower bounds as the only version."""
    return [line if line.partition(">=")[0] in without else line.replace(">=", "==") for line in lines if ">=" in line]


def check(python: str, wheel: Path, sdist: Path, folder: Path, options: argparse.Namespace) -> None:
    home = folder / Path(python).name
    run(python, "-m", "venv", home, cwd=folder)
    inside = home / "bin" / "python"
    empty = home / "elsewhere"
    empty.mkdir()
    pip = [inside, "-m", "pip", "install", "-q", *(["-c", options.constraint.resolve()] if options.constraint else [])]
    extras = PROJECT["optional-dependencies"]
    core, more = ([], [])
    if options.lowest:
        core = oldest(PROJECT["dependencies"], options.without)
        more = oldest([*extras["notebooks"], *extras["ot"]], options.without)
    for file in (sdist, wheel):
        run(*pip, "--force-reinstall", "--no-deps", file, cwd=empty)
        run(*pip, file, *core, cwd=empty)
        run(inside, "-I", "-c", CORE, cwd=empty)
        run(inside.with_name("lmc"), "--version", cwd=empty)
    print(f"{python}: core", flush=True)
    run(*pip, f"{wheel}[notebooks,ot]", *core, *more, cwd=empty)
    run(inside, "-I", "-c", EXTRAS, cwd=empty)
    run(inside, "-m", "pip", "check", cwd=empty)
    listed = run(inside, "-m", "pip", "list", "--format=freeze", cwd=empty).split()
    named = {
        line.partition(">=")[0].lower() for line in [*PROJECT["dependencies"], *extras["notebooks"], *extras["ot"]]
    }
    print(
        f"{python}: core and extras, with {', '.join(x for x in listed if x.partition('==')[0].lower() in named)}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", default=[sys.executable])
    parser.add_argument("--lowest", action="store_true")
    parser.add_argument("--without", action="append", default=[], metavar="NAME")
    parser.add_argument("--constraint", type=Path)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lmc-release-") as temporary:
        folder = options.keep.resolve() if options.keep else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = built(folder)
        for python in options.pythons:
            check(python, *files, folder, options)


if __name__ == "__main__":
    main()
