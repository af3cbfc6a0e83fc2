"""TSV-M, Iso-C, Iso-CTS and the alignment of KnOTS beside FusionBench's functions: agreement and processor time.

    git clone https://github.com/tanganke/fusion_bench && python benchmarks/spectral_peers.py fusion_bench/

Three of its files are read by themselves, so that nothing of it need be installed. Task vectors are those of models in
float32, as both programs see them; the deviation is `|ours - theirs| / |theirs|` of the merged task vector, the largest of
five tensors (matrices 256 x 192, 128 x 512, 400 x 64, two vectors).
"""

import argparse
import contextlib
import importlib.util
import io
import platform
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lmc.merge as merge
from lmc.merge.rules.spectral import _aligned

SHAPES = {"a": (256, 192), "b": (128, 512), "embed": (400, 64), "bias": (128,), "norm": (256,)}
FILES = {
    "tsv": "task_singular_vector/utils/TSVM_utils.py",
    "iso": "isotropic_merging/iso_utils.py",
    "knots": "knots/knots_utils.py",
}
State = dict[str, Tensor]


def functions(folder: Path) -> dict[str, Any]:
    """FusionBench's modules of functions, with what they import from it in its place."""
    package, utils, kinds = (types.ModuleType(f"fusion_bench{name}") for name in ("", ".utils", ".utils.type"))
    utils.timeit_context = lambda *_: contextlib.nullcontext()  # type: ignore[attr-defined]
    kinds.StateDictType = dict  # type: ignore[attr-defined]
    sys.modules.update({module.__name__: module for module in (package, utils, kinds)})
    found = {}
    for name, file in FILES.items():
        spec = importlib.util.spec_from_file_location(name, folder / "fusion_bench" / "method" / file)
        assert spec is not None and spec.loader is not None
        found[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    return found


def models(kind: str, count: int) -> tuple[State, list[State]]:
    """A base, and models whose task vectors are full, of rank 8, or equal."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: drawn(*shape) for name, shape in SHAPES.items()}
    tasks = []
    for _ in range(1 if kind == "equal" else count):
        low = kind == "rank 8"
        tasks.append(
            {
                n: 0.05 * drawn(s[0], 8) @ drawn(8, s[1]) if low and len(s) == 2 else 0.1 * drawn(*s)
                for n, s in SHAPES.items()
            }
        )
    tasks = tasks * count if kind == "equal" else tasks
    return base, [{n: base[n] + task[n] for n in base} for task in tasks]


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the least processor time of three runs in milliseconds."""
    best, found = float("inf"), None
    for _ in range(3):
        with contextlib.redirect_stdout(io.StringIO()):
            start = time.process_time()
            found = function()
        best = min(best, 1e3 * (time.process_time() - start))
    return found, best


def rows(peer: dict[str, Any], kind: str, count: int) -> Iterator[str]:
    base, tuned = models(kind, count)
    tasks = [{n: model[n] - base[n] for n in base} for model in tuned]

    def copies() -> list[State]:
        return [{n: t.clone() for n, t in task.items()} for task in tasks]

    pairs: dict[str, tuple[Callable[[], State], Callable[[], State]]] = {
        "tsv_m": (
            lambda: merge.tsv_m(tuned, base=base),
            lambda: peer["tsv"].compute_and_sum_svd_mem_reduction(copies(), accelerator="cpu"),
        ),
        "iso_c": (lambda: merge.iso_c(tuned, base=base), lambda: peer["iso"].iso_c(copies(), accelerator="cpu")),
        "iso_cts": (
            lambda: merge.iso_cts(tuned, base=base),
            lambda: peer["iso"].iso_cts(copies(), 0.8, accelerator="cpu"),
        ),
    }
    for name, (ours, theirs) in pairs.items():
        (mine, here), (other, there) = timed(ours), timed(theirs)
        off = max(float((mine[n] - base[n] - other[n]).norm() / other[n].norm()) for n in SHAPES)
        yield f"| {name} | {kind} | {count} | {off:.1g} | {here:.0f} | {there:.0f} |"
    stacked = torch.stack([task["a"] for task in tasks])
    (_, parts), here = timed(lambda: _aligned(stacked))
    (_, values, right), there = timed(lambda: peer["knots"].subspace_alignment(list(stacked)))
    other = torch.stack([values[:, None] * v for v in right]).abs()
    off = float((parts.flip(1).abs()[:, : other.shape[1]] - other).norm() / other.norm())  # signs are free
    yield f"| parts of KnOTS | {kind} | {count} | {off:.1g} | {here:.0f} | {there:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkout of FusionBench")
    peer = functions(parser.parse_args().folder)
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, 1 thread\n")
    print("| method | task vectors | models | deviation | lmc, ms | FusionBench, ms |\n|---|---|---|---|---|---|")
    for kind in ("full", "rank 8", "equal"):
        for count in (2, 8):
            for row in rows(peer, kind, count):
                print(row, flush=True)


if __name__ == "__main__":
    main()
