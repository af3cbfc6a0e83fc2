"""Run notebooks from top to bottom and store their outputs, so that two runs give the same file.

    python tools/run_notebooks.py                               all of notebooks/
    python tools/run_notebooks.py notebooks/00_quickstart.ipynb

The code that was run is kept as a checksum in the notebook's metadata: a test finds outputs that are older than their code.
Left out of the file: timings, progress bars, stderr, widget state (5 MB for one figure) and views of widgets, which
show nothing without it. A widget that draws itself without a kernel keeps its html. Figures are stored as plotly data
and as PNG of 256 colours, which is what GitHub shows; it needs kaleido, a Chromium and Pillow.
"""

import argparse
import base64
import hashlib
import io
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
LIVE_VIEW = "application/vnd.jupyter.widget-view+json"


def run(path: Path, timeout: int) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    notebook.metadata = nbformat.from_dict(
        {
            # As JupyterLab writes it: with other words a notebook counts as changed as soon as it is opened.
            "kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"},
            "language_info": notebook.metadata.language_info,
            "lmc": {"executed": checksum(notebook)},
        }
    )
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not fleeting(output)]
            for output in cell.outputs:
                data = output.get("data", {})
                data.pop(LIVE_VIEW, None)
                if "image/png" in data:
                    data["image/png"] = few_colours(data["image/png"])
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def checksum(notebook) -> str:
    """Of the source of all code cells, in their order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def fleeting(output) -> bool:
    """What is there or not depending on how fast the machine is: warnings of the kernel, progress bars."""
    data = output.get("data", {})
    return output.get("name") == "stderr" or (LIVE_VIEW in data and "%|" in data.get("text/plain", ""))


def few_colours(png: str) -> str:
    """The picture with a palette, which takes a third of the bytes; nobody sees the difference in a figure."""
    shrunk = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(shrunk, "PNG", optimize=True)
    return base64.b64encode(shrunk.getvalue()).decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every notebook in notebooks/")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one cell (default 600)")
    args = parser.parse_args()
    os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype+png")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    failed = 0
    for path in args.notebooks or sorted(FOLDER.glob("*.ipynb")):
        begin = time.monotonic()
        try:
            run(path.resolve(), args.timeout)
        except CellExecutionError as error:
            print(f"{path}: not stored\n{error}", file=sys.stderr)
            failed += 1
        else:
            print(f"{path}: stored, {path.stat().st_size / 1000:.0f} kB, {time.monotonic() - begin:.0f} s", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
