"""Seconds and memory of finding the symmetries of full-size models (tracing and solving, without the certificate).

    python benchmarks/discovery.py            # all models, each in a process of its own
    python benchmarks/discovery.py bert_base  # one model, as JSON

Needs `transformers`. Weights are random; the LLaMA-7B shape lies on the meta device and has none.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch


def hugging_face(model: str, config: str, **options: Any) -> Any:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def tokens(length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(2 * length).view(2, length) % 50}


def llama_7b() -> Any:
    with torch.device("meta"):
        return hugging_face("LlamaForCausalLM", "LlamaConfig", use_cache=False).half()


MODELS: dict[str, tuple[str, Callable[[], Any], Callable[[], Any]]] = {
    "resnet50": (
        "ResNet-50, 224 x 224",
        lambda: hugging_face("ResNetForImageClassification", "ResNetConfig", num_labels=1000),
        lambda: torch.randn(2, 3, 224, 224),
    ),
    "bert_base": ("BERT-base", lambda: hugging_face("BertForMaskedLM", "BertConfig"), lambda: tokens(8)),
    "gpt2": ("GPT-2 small", lambda: hugging_face("GPT2LMHeadModel", "GPT2Config", use_cache=False), lambda: tokens(8)),
    "vit_b16": (
        "ViT-B/16, 224 x 224",
        lambda: hugging_face("ViTForImageClassification", "ViTConfig", num_labels=1000),
        lambda: torch.randn(2, 3, 224, 224),
    ),
    "llama_7b": ("LLaMA-7B shape on meta", llama_7b, lambda: {k: v.to("meta") for k, v in tokens(8).items()}),
}


def measure(key: str) -> dict[str, Any]:
    """One model in this process. Memory is the peak of the process, weights and libraries included."""
    from lmc.symmetry.discovery.discover import discover

    warnings.filterwarnings("ignore")
    _, build, inputs = MODELS[key]
    model, example = build(), inputs()
    before = peak()
    started, processor = time.perf_counter(), time.process_time()
    found = discover(model, example, progress=False)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    groups = list(found.groups.values() if isinstance(found.groups, dict) else found.groups)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": len(groups),
        "log10_order": sum(group.log10_order for group in groups),
        "seconds": seconds,
        "processor": processor,
        "peak_before": before,
        "peak": peak(),
    }


def peak() -> float:
    """Peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=MODELS)
    options = parser.parse_args()
    if options.model:
        print(json.dumps(measure(options.model)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    columns = [
        "model",
        "parameters",
        "groups",
        "log10 of order",
        "trace + solve",
        "processor time",
        "memory before",
        "peak",
    ]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for key, (title, _, _) in MODELS.items():
        run = subprocess.run([sys.executable, __file__, key], capture_output=True, text=True)
        if run.returncode:
            print(f"| {title} | failed: {run.stderr.strip().splitlines()[-1]} |")
            continue
        row = json.loads(run.stdout.strip().splitlines()[-1])
        cells = [
            title,
            f"{row['parameters'] / 1e6:.0f} M",
            row["groups"],
            f"{row['log10_order']:.0f}",
            f"{row['seconds']:.1f} s",
            f"{row['processor']:.1f} s",
            f"{row['peak_before']:.1f} GiB",
            f"{row['peak']:.1f} GiB",
        ]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
