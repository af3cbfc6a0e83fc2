"""Merging checkpoints on disk: time and memory, here and by mergekit, on the same random checkpoints.

    python benchmarks/merging_on_disk.py --folder /somewhere/with/8GB --mergekit /venv/bin/mergekit-yaml

Makes a base and two models "fine-tuned" from it (random, in the shapes of a small Llama), merges them by `lmc` and, if
its command is given, by mergekit, each merge in a process of its own, one thread, and compares the results. mergekit
lives in an environment of its own. Time is wall and process time with everything from the start of Python on; memory is
the peak of resident memory, and of that part of it that is not a file mapped into memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import lmc

WIDTH, HIDDEN, WORDS = 1536, 4096, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": WORDS,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

WITHOUT_BASE = ("average", "slerp", "karcher_mean", "variance_corrected")

# name -> options here, mergekit's method and parameters, whether the definitions agree
MERGES = {
    "average": ("average", {}, "linear", {"weight": 1.0}, True),
    "task arithmetic, scale 0.4": ("task_arithmetic", {"scale": 0.4}, "task_arithmetic", {"weight": 0.4}, True),
    "TIES 0.2 by tensor": (
        "ties",
        {"density": 0.2, "scope": "tensor", "undecided": "positive"},
        "ties",
        {"weight": 1.0, "density": 0.2, "normalize": True},
        True,
    ),
    "TIES 0.2 by model": ("ties", {"density": 0.2}, None, {}, False),
    "PCB 0.1": ("pcb", {"density": 0.1, "scale": 1.2}, None, {}, False),
    "SLERP": ("slerp", {}, None, {}, False),
    "Karcher mean": ("karcher_mean", {}, None, {}, False),
    "model stock": ("model_stock", {}, None, {}, False),
    "variance corrected": ("variance_corrected", {}, None, {}, False),
    "DARE 0.5": ("dare", {"scale": 0.5}, None, {}, False),
    "DELLA 0.7": ("della", {}, None, {}, False),
    "breadcrumbs 0.15": ("breadcrumbs", {"scale": 0.5}, None, {}, False),
}


def make(folder: Path, dtype: torch.dtype, layers: int) -> None:
    def shapes() -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH)}
        for i in range(layers):
            block = f"model.layers.{i}."
            found |= {f"{block}self_attn.{k}_proj.weight": (WIDTH, WIDTH) for k in "qkvo"}
            found |= {f"{block}mlp.{k}_proj.weight": (HIDDEN, WIDTH) for k in ("gate", "up")}
            found[f"{block}mlp.down_proj.weight"] = (WIDTH, HIDDEN)
            found |= {f"{block}{k}_layernorm.weight": (WIDTH,) for k in ("input", "post_attention")}
        return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}

    base: dict[str, torch.Tensor] = {}
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for key, shape in shapes().items():
            noise = torch.randn(shape, generator=generator)
            state[key] = (noise * 0.02 if name == "base" else base[key].float() + noise * 0.001).to(dtype)
        base = state if name == "base" else base
        (folder / name).mkdir(parents=True)
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(
            json.dumps(CONFIG | {"num_hidden_layers": layers, "torch_dtype": str(dtype)[6:]})
        )


def measure(command: list[str], folder: Path) -> dict[str, float]:
    """Seconds of wall and process time, and peak memory in MB."""
    log = folder / "log.txt"
    start = time.perf_counter()
    peaks = {"VmHWM": 0.0, "RssAnon": 0.0}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]) / 1e3)
            time.sleep(0.02)
        wall = time.perf_counter() - start
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed:\n{log.read_text()[-3000:]}")
    seconds = usage.ru_utime + usage.ru_stime
    return {"wall": wall, "process": seconds, "resident": peaks["VmHWM"], "private": peaks["RssAnon"]}


def ours(folder: Path, out: Path, method: str, options: dict) -> list[str]:
    based = "" if method in WITHOUT_BASE else f", base={str(folder / 'base')!r}"
    code = (
        "import torch; torch.set_num_threads(1); import lmc.merge as m; "
        f"m.write(m.{method}, [{str(folder / 'a')!r}, {str(folder / 'b')!r}], {str(out)!r}{based}, **{options!r})"
    )
    return [sys.executable, "-c", code]


def theirs(binary: str, folder: Path, out: Path, method: str, parameters: dict, dtype: str) -> list[str]:
    """mergekit takes its recipe as YAML, of which JSON is a part."""
    models = [{"model": str(folder / name), "parameters": parameters} for name in ("a", "b")]
    recipe = {"merge_method": method, "models": models, "dtype": dtype}
    if method != "linear":
        recipe["base_model"] = str(folder / "base")
        recipe["parameters"] = {"normalize": parameters.pop("normalize", False)}
    (folder / "recipe.yml").write_text(json.dumps(recipe))
    return [binary, str(folder / "recipe.yml"), str(out), "--num-threads", "1", "--quiet", "--no-copy-tokenizer"]


def compare(ours: Path, theirs: Path, base: Path) -> str:
    """How many entries differ, and by how much at most, in units of the typical task vector entry (0.001)."""
    a, b, reference = (lmc.open_checkpoint(path) for path in (ours, theirs, base))
    different = total = 0
    largest = 0.0
    for name in reference:
        x, y = a[name].float(), b[name].float()
        different += int((x != y).sum())
        total += x.numel()
        largest = max(largest, float((x - y).abs().max()))
    return f"{100 * different / total:.2g} % differ, by {largest:.1g} at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--mergekit", help="the command mergekit-yaml of another environment")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layers", type=int, default=12, help="12 make 0.44 billion values (default)")
    parser.add_argument("--only", action="append", choices=MERGES)
    arguments = parser.parse_args()
    folder = arguments.folder / f"{arguments.dtype}-{arguments.layers}"
    if not folder.exists():
        make(folder, DTYPES[arguments.dtype], arguments.layers)
    size = lmc.open_checkpoint(folder / "a").size / 1e9
    print(f"two models and their base, {size:.2f} GB each, {arguments.dtype}; torch {torch.__version__}\n")
    print("| merge | by | wall, s | process, s | resident, MB | private, MB | result |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for label in arguments.only or MERGES:
        method, options, other, parameters, agree = MERGES[label]
        runs = [("lmc", ours(folder, folder / "out-lmc", method, options))]
        if other and arguments.mergekit:
            command = theirs(arguments.mergekit, folder, folder / "out-peer", other, dict(parameters), arguments.dtype)
            runs.append(("mergekit", command))
        for out in ("out-lmc", "out-peer"):
            shutil.rmtree(folder / out, ignore_errors=True)
        for who, command in runs:
            m = measure(command, folder)
            verdict = ""
            if who == "mergekit" and agree:
                verdict = compare(folder / "out-lmc", folder / "out-peer", folder / "base")
            numbers = " | ".join(
                [f"{m['wall']:.1f}", f"{m['process']:.1f}", f"{m['resident']:.0f}", f"{m['private']:.0f}"]
            )
            print(f"| {label} | {who} | {numbers} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
