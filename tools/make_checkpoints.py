"""Train the networks stored under `data/` and write them with their manifests.

    python tools/make_checkpoints.py                 all of them (a few minutes on two cores)
    python tools/make_checkpoints.py digits-mlp512   one
    python tools/make_checkpoints.py --table         the table of data/README.md, from what is stored

Rounding differs between CPUs, versions of torch and changes to the training code, and training amplifies it: remade
networks come out equally good, not equal.
"""

import argparse
import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import sklearn
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

import lmc
from lmc.core.files import write_text

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Job:
    """One folder below `data/`: an architecture, a recipe, the seeds, and which epochs are stored."""

    name: str
    description: str
    function: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    data: str = "digits"
    seeds: tuple[int, ...] = (0, 1)
    keep: tuple[int, ...] | None = None


def mlp(width: int, **changes: Any) -> Job:
    text = f"two MLPs 64-{width}-{width}-{width}-10 on digits"
    job = dict(name=f"digits-mlp{width}", description=text, function="mlp", arguments=(64, [width] * 3, 10))
    return Job(**job | dict(recipe=dict(optimizer="adam", lr=3e-3, epochs=20)) | changes)


IMAGE = {"image": (1, 8, 8)}
TEN_EPOCHS = dict(optimizer="adam", lr=3e-3, epochs=10)
JOBS = (
    *(mlp(width) for width in (32, 64, 128, 256, 512)),
    mlp(
        64,
        name="digits-mlp64-trajectory",
        description="two MLPs 64-64-64-64-10 on digits, along their training",
        keep=(0, 1, 2, 3, 5, 8, 12, 16, 20),
    ),
    Job("digits-cnn", "two CNNs with 32 and 64 channels on digits", "cnn", ((32, 64),), IMAGE, TEN_EPOCHS),
    Job(
        "digits-vgg11",
        "two VGG11 with batch norm, an eighth as wide as the paper's, on digits",
        "vgg",
        (1 / 8,),
        IMAGE,
        dict(optimizer="sgd", lr=0.05, weight_decay=5e-4, epochs=10),
    ),
    Job(
        "digits-resnet20",
        "two ResNet20 of width 1 with batch norm on digits",
        "resnet20",
        (1,),
        {"norm": "batch", "in_channels": 1},
        TEN_EPOCHS,
    ),
    Job(
        "digits-resnet20-layernorm",
        "two ResNet20 of width 1 with layer norm over channels on digits",
        "resnet20",
        (1,),
        {"norm": "layer", "in_channels": 1},
        TEN_EPOCHS,
    ),
    Job(
        "digits-vit",
        "two vision transformers of width 32 with two blocks of four heads on digits",
        "vit",
        ((1, 8, 8),),
        {"dim": 32, "depth": 2, "heads": 4},
        dict(optimizer="adam", lr=3e-3, epochs=30),
    ),
    Job(
        "toy-text-gpt",
        "two character-level GPTs of width 32 with two blocks of four heads on toy sentences",
        "gpt",
        (28, 32),
        {"dim": 32, "depth": 2, "heads": 4},
        dict(optimizer="adam", lr=3e-3, epochs=20),
        data="toy_text",
    ),
)


def make(job: Job) -> None:
    """Train, store, and write the manifest last, so that it only ever names files that are there."""
    options = {"seed": 0} | ({"flat": job.function == "mlp"} if job.data == "digits" else {})
    data = getattr(lmc.data, job.data)(**options)
    model = getattr(lmc.models, job.function)(*job.arguments, **job.options)
    trained = lmc.training.train(model, data, seeds=job.seeds, keep=job.keep, **job.recipe)
    folder = DATA / job.name
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, seed in enumerate(job.seeds):
        states = trained.trajectory[i] if job.keep else {trained.recipe.epochs: trained[i]}
        for epoch, weights in states.items():
            name = f"seed{seed}-epoch{epoch:02d}.safetensors" if job.keep else f"seed{seed}.safetensors"
            stored = {key: halved(tensor) for key, tensor in weights.items()}
            content = save(stored)
            (folder / name).write_bytes(content)
            read_back = {key: t.float() if t.is_floating_point() else t for key, t in stored.items()}
            entry = {"file": name, "seed": seed, "epoch": epoch, "sha256": hashlib.sha256(content).hexdigest()}
            scores = {part: score(model, read_back, *getattr(data, part)) for part in ("train", "test")}
            files.append(entry | {"bytes": len(content)} | scores)
    manifest = {
        "description": job.description,
        "model": {"function": job.function, "arguments": job.arguments, "options": job.options},
        "data": {"function": job.data, "options": options, "provenance": data.provenance},
        "recipe": asdict(trained.recipe),
        "storage": "parameters with two or more axes in float16, everything else as it was",
        "command": f"python tools/make_checkpoints.py {job.name}",
        "versions": versions(),
        "files": files,
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def halved(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.half() if tensor.is_floating_point() and tensor.ndim >= 2 else tensor).contiguous()


def score(model: nn.Module, weights: lmc.weights.Weights, inputs: torch.Tensor, targets: torch.Tensor) -> dict:
    """Mean cross-entropy (nats) and accuracy in eval mode."""
    with torch.no_grad():
        logits = torch.func.functional_call(model.eval(), weights, (inputs,))
    logits, targets = logits.flatten(0, -2), targets.flatten()
    accuracy = (logits.argmax(dim=1) == targets).float().mean()
    return {"loss": round(float(F.cross_entropy(logits, targets)), 6), "accuracy": round(float(accuracy), 6)}


def versions() -> dict[str, str]:
    return {
        "lmc": lmc.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scikit-learn": sklearn.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def table() -> None:
    """Accuracies and barriers of what is stored, as a markdown table."""
    print("| name | content | MB | test accuracy | barrier, naive | barrier, weight matching |")
    print("|---|---|---|---|---|---|")
    for job in JOBS:
        stored = lmc.data.checkpoint(job.name, DATA)
        last = max(stored.epochs)
        a, b = (stored.at(seed, last) for seed in job.seeds)
        size = sum(entry["bytes"] for entry in stored.manifest["files"]) / 1e6
        tests = [e["test"]["accuracy"] for e in stored.manifest["files"] if e["epoch"] == last]
        data = getattr(lmc.data, job.data)(**stored.manifest["data"]["options"])
        model = stored.model()
        spec = lmc.permutation_spec(model, data.train[0][:2])
        moved = lmc.weight_matching(spec, a, b, seed=0, restarts=3).apply(b)
        naive, aligned = (lmc.loss_path(model, a, end, data).barrier for end in (b, moved))
        accuracies = ", ".join(f"{accuracy:.3f}" for accuracy in tests)
        row = [f"`{job.name}`", stored.manifest["description"], f"{size:.2f}", accuracies]
        print("|", " | ".join([*row, f"{naive:.2f}", f"{aligned:.3f}"]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(job.name for job in JOBS))
    parser.add_argument("--table", action="store_true", help="print the table of data/README.md and train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {job.name: job for job in JOBS}
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"{', '.join(unknown)}: not among {', '.join(known)}")
    if args.table:
        table()
        return
    for name in args.names or known:
        print(name, flush=True)
        make(known[name])


if __name__ == "__main__":
    main()
