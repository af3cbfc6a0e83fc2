"""The same configurations of mergekit, carried out by mergekit and by `lmc`: processor time, memory, and results.

    python benchmarks/merging_peers.py --folder /somewhere/with/8GB --mergekit /venv/bin/mergekit-yaml

The models are those of `merging_on_disk.py`: a base and two "fine-tuned" from it, random, in the shapes of a small Llama.
Each merge has a process of its own, one thread, everything from the start of Python on. mergekit lives in an environment of
its own. The limit is a process that imports torch, reads the files that the merge reads in chunks, converts them to
float32, adds them up, converts the sum and writes it: no checks, no checksum, no waiting for the disk.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from merging_on_disk import DTYPES, compare, make, measure

import lmc


def recipes(folder: Path, layers: int) -> dict[str, dict[str, Any]]:
    """Configurations by name."""
    base, a, b = (str(folder / name) for name in ("base", "a", "b"))

    def models(**parameters: Any) -> list[dict[str, Any]]:
        return [{"model": model, "parameters": parameters} for model in (a, b)]

    def piece(model: str, first: int, last: int) -> dict[str, Any]:
        return {"sources": [{"model": model, "layer_range": [first, last]}]}

    third = layers // 3
    return {
        "linear": {"models": models(weight=0.5)},
        "task_arithmetic": {"models": models(weight=0.4), "base_model": base},
        "ties": {"models": models(weight=1.0, density=0.2), "base_model": base},
        "slerp": {"models": [{"model": base}, {"model": a}], "base_model": base, "parameters": {"t": [0.2, 0.8]}},
        "sce": {"models": models(), "base_model": base, "parameters": {"select_topk": 0.3}},
        "dare_ties": {"models": models(weight=0.5, density=0.5), "base_model": base},
        "passthrough": {"slices": [piece(a, 0, 2 * third), piece(b, third, layers)]},
    }


LIMIT = """
import sys
import torch
from lmc.weights.checkpoint import as_bytes
torch.set_num_threads(1)
*inputs, out = sys.argv[1:]
files, values = [open(name, "rb") for name in inputs], 1 << 18
chunk = torch.empty(values, dtype=torch.bfloat16)
with open(out, "wb") as result:
    while True:
        total = torch.zeros(values)
        counts = []
        for file in files:
            counts.append(file.readinto(as_bytes(chunk)))
            total += chunk.float()
        if not counts[0]:
            break
        result.write(as_bytes(total.bfloat16())[: counts[0]])
"""


def limit(folder: Path, content: dict[str, Any]) -> float:
    """Process time of the least that the merge of a configuration could be."""
    parts = content.get("models") or [source for part in content["slices"] for source in part["sources"]]
    inputs = {entry["model"] for entry in parts} | ({content["base_model"]} if "base_model" in content else set())
    if "slices" in content:  # layers of two models, as many as one has
        inputs = set(list(inputs)[:1])
    files = [f"{name}/model.safetensors" for name in sorted(inputs)]
    return measure([sys.executable, "-c", LIMIT, *files, str(folder / "limit.bin")], folder)["process"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--mergekit", help="the command mergekit-yaml of another environment")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layers", type=int, default=12, help="12 make 0.44 billion values (default)")
    parser.add_argument("--workers", type=int, default=1, help="processes of lmc, threads of mergekit (default 1)")
    parser.add_argument("--only", action="append")
    arguments = parser.parse_args()
    folder = arguments.folder / f"{arguments.dtype}-{arguments.layers}"
    if not folder.exists():
        make(folder, DTYPES[arguments.dtype], arguments.layers)
    size = lmc.open_checkpoint(folder / "a").size / 1e9
    print(f"two models and their base, {size:.2f} GB each, {arguments.dtype}; torch {torch.__version__}\n")
    print(
        "| merge_method | limit, process s | lmc, process s | mergekit, process s | lmc, wall s | mergekit, wall s | lmc, MB | "
        "mergekit, MB | time | memory | result |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, content in recipes(folder, arguments.layers).items():
        if arguments.only and name not in arguments.only:
            continue
        file, outs = folder / f"{name}.yml", [folder / "out-lmc", folder / "out-peer"]
        file.write_text(json.dumps(content | {"merge_method": name, "dtype": arguments.dtype}))
        for out in outs:
            shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "lmc", "merge", "--recipe", str(file), "--out", str(outs[0]), "--quiet"]
        mine = measure([*command, "--workers", str(arguments.workers)], folder)
        least = limit(folder, content) if arguments.dtype == "bfloat16" else float("nan")
        cells = [f"{least:.1f}", f"{mine['process']:.1f}", "", f"{mine['wall']:.1f}", "", f"{mine['resident']:.0f}"]
        cells += ["", "", "", ""]
        if arguments.mergekit:
            threads = str(arguments.workers)
            command = [arguments.mergekit, str(file), str(outs[1]), "--num-threads", threads, "--quiet"]
            peer = measure([*command, "--no-copy-tokenizer"], folder)
            cells[2], cells[4], cells[6] = (
                f"{peer[key]:.{d}f}" for key, d in (("process", 1), ("wall", 1), ("resident", 0))
            )
            cells[7:9] = [f"{100 * mine[key] / peer[key]:.0f} %" for key in ("process", "resident")]
            cells[9] = "random masks" if name.startswith("dare") else compare(*outs, outs[1])
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
