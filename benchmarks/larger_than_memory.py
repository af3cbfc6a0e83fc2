"""Weight matching of two checkpoints that are never held in memory: time, bytes read and peak memory.

    python benchmarks/larger_than_memory.py --layers 2 --width 512 --hidden 1408 --heads 8 --kv 2 --words 8000
    python benchmarks/larger_than_memory.py --kill 100                       1.1 billion parameters

Makes A, random weights in bfloat16 in the shapes of a Llama, and B, the same with the units of all groups in a random
order: residual stream, heads, queries in their groups, values within heads, hidden units. Then `lmc align A B` runs in a
process of its own, once it is killed (SIGKILL) after `--kill` seconds and started again, and what it writes is compared
with A bit for bit, and the permutation with the planted one. Memory is `VmHWM` of that process, the peak of all its
resident pages, anonymous and mapped from files, from the start of Python on; the groups are found by discovery on the
meta device (needs transformers) in a process of its own, too.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import lmc
from lmc.symmetry.groups.action import act

PEAK = """
import re, sys
from pathlib import Path
code = {run}
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""
DISCOVER = """
import json, sys, time, torch, lmc
from transformers import LlamaConfig, LlamaForCausalLM
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[1]))).eval()
    inputs = torch.zeros(2, 5, dtype=torch.long)
started = time.process_time()
spec = lmc.permutation_spec(model, inputs, progress=False)
print("seconds", time.process_time() - started)
spec.save(sys.argv[2])
"""


def config(options: argparse.Namespace) -> dict[str, object]:
    return {
        "hidden_size": options.width,
        "intermediate_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv,
        "vocab_size": options.words,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }


def make(folder: Path, spec: lmc.PermutationSpec) -> lmc.Permutation:
    """A and B, a file for each block, and the permutation that leads back from B to A."""
    planted = spec.random(seed=1)
    files: dict[str, list[str]] = {}
    for name in spec.shapes:
        block = re.match(r"model\.layers\.(\d+)", name)
        files.setdefault(f"model-{block[1] if block else name}.safetensors", []).append(name)
    for side in ("a", "b"):
        (folder / side).mkdir()
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / side / "model.safetensors.index.json").write_text(json.dumps(index))
    generator = torch.Generator().manual_seed(0)
    for file, names in files.items():
        tensors = {n: torch.empty(spec.shapes[n], dtype=torch.bfloat16).normal_(generator=generator) for n in names}
        save_file(tensors, folder / "a" / file)
        save_file(act(spec, planted.indices, tensors), folder / "b" / file)
    return planted.inverse()


def run(code: str, *arguments: str, kill: float | None = None) -> tuple[str, float, float]:
    """(what a process printed, its peak of memory in GB, seconds)."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        printed, _ = process.communicate(timeout=kill)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "", 0.0, time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"failed: {printed}")
    peak = float(match[1]) * 1024 / 1e9 if (match := re.search(r"^peak (\d+)$", printed, re.MULTILINE)) else 0.0
    return printed, peak, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("layers", 22), ("width", 2048), ("hidden", 5632), ("heads", 32), ("kv", 4), ("words", 32000)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="where both models and the result go (default: a temporary one)")
    parser.add_argument("--kill", type=float, help="seconds after which the first run is killed")
    options = parser.parse_args()
    align = PEAK.format(run="__import__('lmc.cli.command').cli.command.main(sys.argv[1:])")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        spec_file, out, kept = folder / "spec.json", folder / "out", folder / "pi.json"
        found, peak, _ = run(DISCOVER + PEAK.format(run="0"), json.dumps(config(options)), str(spec_file))
        seconds = float(re.search(r"^seconds (.*)$", found, re.MULTILINE)[1])  # type: ignore[index]
        spec = lmc.PermutationSpec.load(spec_file)
        print(f"groups by discovery on meta: {len(spec.groups)} in {seconds:.1f} s, peak {peak:.2f} GB")
        truth = make(folder, spec)
        a = lmc.open_checkpoint(folder / "a")
        values = sum(entry.size for entry in a.stored.values())
        print(f"{values / 1e9:.3f} billion parameters, {a.size / 1e9:.2f} GB each, {len(a.files)} files")
        command = ["align", *(str(folder / side) for side in "ab"), "--spec", str(spec_file), "--out", str(out)]
        command += ["--save-permutation", str(kept), "--quiet"]
        if options.kill:
            *_, seconds = run(align, *command, kill=options.kill)
            lines = (folder / ".out.matching").read_text().count("\n") if (folder / ".out.matching").exists() else 0
            print(f"killed after {seconds:.0f} s, {lines} lines in the journal; the same command again:")
        printed, peak, seconds = run(align, *command)
        print(printed)
        pi = lmc.Permutation.load(kept)
        print(f"lmc align: {seconds:.1f} s, peak {peak:.2f} GB; planned for matching {pi.info['memory'] / 1e9:.2f} GB")
        print("| run | pass | visits | GB read | seconds |\n|---|---|---|---|---|")
        for i, one in enumerate(pi.info["runs"]):
            for p in one["passes"]:
                print(f"| {i + 1} | {p['pass']} | {p['visits']} | {p['bytes_read'] / 1e9:.2f} | {p['seconds']:.1f} |")
        print(f"answers of the journal: {pi.info['found_in_journal']}, all read: {pi.info['bytes_read'] / 1e9:.2f} GB")
        result = lmc.open_checkpoint(out)
        same = all(torch.equal(result[n], a[n]) and result.entry(n).dtype == a.entry(n).dtype for n in a)
        moved = sum(int((pi[g] != torch.arange(len(pi[g]))).any()) for g in pi)
        print(f"pi is the planted one: {pi == truth}; {moved} of {len(pi)} groups moved; result equals A: {same}")
        machine = f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads"
        print(f"{machine}, Python {platform.python_version()}, torch {torch.__version__}")
        if not (same and pi == truth):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
