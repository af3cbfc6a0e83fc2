"""Latency of the explorers, measured in a headless Chromium with JupyterLab: how long a reader waits for a redrawn figure.

    python benchmarks/latency.py

Client side, on a saved page: `move` is from a pointer event to the end of the frame that draws it, `work` the time that the
page's own code takes in between (the rest is waiting for the screen, 16.7 ms at 60 Hz). `CPU a move` is the
processor time of the page's thread for all of it, which other programs on the machine do not disturb. With the kernel: `twin` is from a key to the redrawn
second widget of the same result, which hears of it from the kernel; `exact` from letting go to the values of the network
that is there, evaluated by the kernel on the whole data.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]

CELLS = (
    """
import torch, lmc
torch.set_num_threads(1)
stored, data = lmc.data.checkpoint("digits-mlp64"), lmc.data.digits()
model, (a, b) = stored.model(), stored
pi = lmc.weight_matching(lmc.permutation_spec(model, data.train[0][:2]), a, b, seed=0)
c = pi.apply(b)
path, naive = lmc.loss_path(model, a, c, data), lmc.loss_path(model, a, b, data)
plane = lmc.loss_plane(model, (a, c, b), data, 41, names=("A", "B moved", "B"), progress=False)
runs = lmc.data.checkpoint("digits-mlp64-trajectory")
epochs = sorted(set(runs.epochs))
over = lmc.align.barrier_over_time(model, *({e: runs.at(s, e) for e in epochs} for s in (0, 1)), data, progress=False)
path.save_html("path.html", naive=naive), plane.save_html("plane.html"), over.save_html("epochs.html")
""",
    "path.explore(naive=naive)",
    "path.explore(naive=naive)",
    "plane.explore()",
    "plane.explore()",
    "over.explore()",
    "over.explore()",
)

# Moves a pointer over an element, one event a frame, and measures each frame.
DRAG = """async ({ kind, target, moves }) => {
  const element = document.querySelectorAll(kind)[0].querySelector(target);
  const box = element.getBoundingClientRect();
  const at = (i) => ({ clientX: box.x + box.width * (0.5 + 0.3 * Math.sin(i / 7)), clientY: box.y + box.height * (0.5 + 0.3 * Math.cos(i / 5)),
    pointerId: 1, button: 0, bubbles: true });
  element.setPointerCapture = () => {};
  element.hasPointerCapture = () => true;
  element.dispatchEvent(new PointerEvent("pointerdown", at(0)));
  const frame = () => new Promise(requestAnimationFrame);
  const [moved, work] = [[], []];
  for (let i = 0; i < moves; i++) {
    await frame();
    const start = performance.now();
    element.dispatchEvent(new PointerEvent("pointermove", at(i)));
    const handled = performance.now() - start;
    const before = new Promise((done) => requestAnimationFrame(() => done(performance.now())));
    const after = before.then(() => new Promise((done) => { const c = new MessageChannel(); c.port1.onmessage = () => done(performance.now()); c.port2.postMessage(0); }));
    const drawn = await before;
    const done = await after;
    moved.push(done - start);
    work.push(handled + Math.max(0, done - drawn));
  }
  element.dispatchEvent(new PointerEvent("lostpointercapture", { pointerId: 1 }));
  return { moved, work };
}"""

# Presses a key on an element and waits until what is said of the place changes: here, in the twin, and exactly.
KEY = """async ({ kind, target, keys }) => {
  const [mine, twin] = [...document.querySelectorAll(kind)];
  const element = mine.querySelector(target);
  const read = (root) => root.querySelector(".lmc-reading").textContent;
  const until = (test) => new Promise((done) => { const start = performance.now(); (function look() {
    if (test()) done(performance.now()); else if (performance.now() - start > 8000) done(NaN); else setTimeout(look, 1); })(); });
  const rest = (ms) => new Promise((done) => setTimeout(done, ms));
  const [here, peer, exact] = [[], [], []];
  for (let i = 0; i < keys; i++) {
    await until(() => mine.querySelector(".lmc-note").dataset.state === "exact");
    await rest(400);
    const [old, other] = [read(mine), read(twin)];
    const start = performance.now();
    element.dispatchEvent(new KeyboardEvent("keydown", { key: i % 2 ? "ArrowLeft" : "ArrowRight", bubbles: true }));
    const ends = await Promise.all([until(() => read(mine) !== old), until(() => read(twin) !== other)]);
    here.push(ends[0] - start);
    peer.push(ends[1] - start);
    exact.push(await until(() => mine.querySelector(".lmc-note").dataset.state === "exact") - start - SETTLE);
  }
  return { here, peer, exact };
}"""

WIDGETS = [
    ("path explorer", ".lmc-path", ".lmc-chart", "input[type=range]"),
    ("plane explorer, map", ".lmc-plane", ".lmc-map", ".lmc-map"),
    ("plane explorer, surface turned", ".lmc-plane", ".lmc-surface", None),
    ("training-time explorer", ".lmc-epochs", ".lmc-land", "input[type=range]"),
]
SETTLE = 150  # milliseconds of rest that a key waits before the kernel is asked (SETTLE_AFTER in lmc/views/widgets/common.js)


def bench():
    """The fixtures of the browser tests, which start JupyterLab and Chromium."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "tests" / "browser" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module
    spec.loader.exec_module(module)
    return module


class Folders:
    """Stands in for pytest's `tmp_path_factory`."""

    def mktemp(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=name))


def row(name: str, *columns: list[float]) -> str:
    spread = [f" ({sorted(c)[int(0.95 * len(c))]:.1f})" if len(c) > 1 else "" for c in columns]
    cells = [f"{statistics.median(c):.1f}{more}" if c else "" for c, more in zip(columns, spread, strict=True)]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=120, help="of each drag (default 120)")
    parser.add_argument("--keys", type=int, default=15, help="presses (default 15)")
    args = parser.parse_args()
    module = bench()
    make = {name: contextmanager(getattr(module, name).__wrapped__) for name in ("chromium", "server", "window")}
    with make["chromium"](Folders()) as chromium, make["server"](Folders()) as server:
        cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), server.notebooks / "latency.ipynb")
        with make["window"](chromium, Path(tempfile.mkdtemp())) as window:
            page = window.open(f"{server.address}/lab/tree/notebooks/latency.ipynb?token={server.token}&reset")
            page.wait_for_function(module.KERNEL_IDLE)
            notebook = module.Notebook(page)
            notebook.run_all()
            assert notebook.errors == [], notebook.errors
            measure(page, window, server.notebooks, args)


def cpu(session) -> float:
    """Milliseconds of processor time that the page's main thread has taken for its tasks."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return 1e3 * next(entry["value"] for entry in metrics if entry["name"] == "TaskDuration")


def measure(page, window, folder: Path, args) -> None:
    print("| median (95th percentile), ms | move | work | CPU a move | twin | exact |")
    print("|---|---|---|---|---|---|")
    for name, kind, target, keyed in WIDGETS:
        alone = window.open((folder / f"{kind.removeprefix('.lmc-')}.html").as_uri())
        alone.locator(kind).wait_for()
        session = alone.context.new_cdp_session(alone)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        alone.wait_for_timeout(1000)
        before = cpu(session)
        drag = alone.evaluate(DRAG, {"kind": kind, "target": target, "moves": args.moves})
        columns = [drag["moved"], drag["work"], [(cpu(session) - before) / args.moves], [], []]
        alone.close()
        if keyed:
            page.bring_to_front()
            page.locator(kind).first.scroll_into_view_if_needed()
            page.wait_for_timeout(1000)
            keys = page.evaluate(KEY.replace("SETTLE", str(SETTLE)), {"kind": kind, "target": keyed, "keys": args.keys})
            columns[3:] = keys["peer"], keys["exact"]
        print(row(name, *columns), flush=True)


if __name__ == "__main__":
    main()
