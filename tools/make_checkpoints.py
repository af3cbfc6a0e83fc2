"""Train the networks stored under `data/` and write them with their manifests.

    python tools/make_checkpoints.py                 all that need no download (a few minutes on two cores)
    python tools/make_checkpoints.py digits-mlp512   one
    python tools/make_checkpoints.py cifar10-resnet20   about 20 minutes a seed on one core; looks for the images as
                                                        `lmc.data.cifar10` does (LMC_DATA)
    python tools/make_checkpoints.py cifar10-resnet20 --seed 1   one seed, beside what is stored
    python tools/make_checkpoints.py cifar10-resnet20 --states folder   an interrupted run goes on from its last epoch
    python tools/make_checkpoints.py --table         the table of data/README.md, from what is stored

Rounding differs between CPUs, versions of torch and changes to the training code, and training amplifies it: remade
networks come out equally good, not equal.
"""

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterable
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
from lmc.models.convnets import ResidualBlock

DATA = Path(__file__).parents[1] / "data"
PARTS = ("train", "test")
AUGMENTATION = "random crops, mirror images"


@dataclass(frozen=True)
class Round:
    """Training on random crops and mirror images; a further round goes on from the weights as they would be stored."""

    optimizer: str
    lr: float
    crops: tuple[tuple[int, int], ...]  # (epochs, pixels)
    weight_decay: float = 0.0
    batch_size: int = 128

    @property
    def sizes(self) -> list[int]:
        return [pixels for epochs, pixels in self.crops for _ in range(epochs)]


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
    rounds: tuple[Round, ...] = ()  # instead of a recipe
    scored: int | None = None  # the first so many images of each split, rather than all
    seeds: tuple[int, ...] = (0, 1)
    keep: tuple[int, ...] | None = None


def mlp(width: int, **changes: Any) -> Job:
    text = f"two MLPs 64-{width}-{width}-{width}-10 on digits"
    job = dict(name=f"digits-mlp{width}", description=text, function="mlp", arguments=(64, [width] * 3, 10))
    return Job(**job | dict(recipe=dict(optimizer="adam", lr=3e-3, epochs=20)) | changes)


IMAGE = {"image": (1, 8, 8)}
# Most epochs see crops of 24 pixels, which cost half as much as whole images.
CROPS_SGD = Round("sgd", 0.15, ((6, 24), (4, 32)), weight_decay=5e-4)
CROPS_SHORT = Round("sgd", 0.15, ((3, 24), (2, 20), (1, 24)), weight_decay=5e-4)
CROPS_ADAM = Round("adam", 3e-3, ((8, 24), (5, 32)))
CROPS_ORTHOGONAL = Round("orthogonal", 0.012, ((7, 24), (2, 32)))
CIFAR = dict(data="cifar10", scored=1000)
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
    Job(
        "cifar10-resnet20",
        "two ResNet20 of width 1 with batch norm on CIFAR-10",
        "resnet20",
        (1,),
        {"norm": "batch"},
        **CIFAR,
        rounds=(CROPS_SGD,),
    ),
    Job(
        "cifar10-resnet20x2",
        "two ResNet20 of width 2 with batch norm on CIFAR-10",
        "resnet20",
        (2,),
        {"norm": "batch"},
        **CIFAR,
        rounds=(CROPS_SHORT,),
    ),
    Job(
        "cifar10-resnet20-layernorm",
        "two ResNet20 of width 1 with layer norm over channels on CIFAR-10",
        "resnet20",
        (1,),
        {"norm": "layer"},
        **CIFAR,
        rounds=(CROPS_ADAM, CROPS_ORTHOGONAL),
    ),
)


class Orthogonal(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): Nesterov momentum of each filter bank, made near orthogonal by Newton and Schulz.

    A bank moves by the share `lr` of its own length, as the norm behind it makes its length meaningless. The first bank,
    which sees the pixels, and all that are no filters move by Adam at a sixth of the rate: orthogonal steps of the first
    would be as large in the brightness of pixels as in their differences.
    """

    def __init__(self, model: nn.Module, lr: float):
        super().__init__(list(model.parameters()), {"lr": lr})
        self.banks = [p for p in model.parameters() if p.ndim == 4][1:]
        banks = set(self.banks)
        self.rest = torch.optim.Adam([p for p in model.parameters() if p not in banks], betas=(0.9, 0.99))

    @torch.no_grad()
    def step(self) -> None:
        lr = self.param_groups[0]["lr"]
        for bank in self.banks:
            momentum = self.state[bank].setdefault("momentum", torch.zeros_like(bank))
            momentum.mul_(0.9).add_(bank.grad)
            turned = orthogonal((bank.grad + 0.9 * momentum).flatten(1)).view_as(bank)
            bank.sub_(turned, alpha=float(lr * bank.norm() / turned.norm()))
        self.rest.param_groups[0]["lr"] = lr / 6
        self.rest.step()

    def state_dict(self) -> dict:
        return {"banks": [self.state[bank] for bank in self.banks], "rest": self.rest.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.state.update(zip(self.banks, state["banks"], strict=True))
        self.rest.load_state_dict(state["rest"])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the singular vectors of another, all its singular values near 1 (Jordan et al. 2024's quintic)."""
    tall = len(matrix) > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(4):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def begun(job: Job, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(lmc.models, job.function)(*job.arguments, **job.options)
    if job.options["norm"] == "layer":
        # Without these two, layer norm over channels learns nothing by SGD and little by Adam in its first epoch: pixels
        # between 0 and 1 look alike to filters with a mean, and blocks that begin loud drown what passes them by.
        with torch.no_grad():
            model.conv1.weight -= model.conv1.weight.mean(dim=(1, 2, 3), keepdim=True)
            for block in model.modules():
                if isinstance(block, ResidualBlock):
                    block.norm2.weight.fill_(0.2)
    return model


def train_on_crops(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, how: Round, seed: int, kept: Path | None = None
) -> dict:
    """State dict after one round, by Adam, by SGD with Nesterov momentum 0.9, or by `Orthogonal`.

    The rate rises over the first fifth of the steps and falls to zero over the rest, both linearly. Crops as large as
    the image are cut from the image padded by 4 pixels of zeros. With `kept`, a file, the state after each epoch is
    left there, and training goes on from it.
    """
    model = model.train().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    optimizer: torch.optim.Optimizer
    if how.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=how.lr)
    elif how.optimizer == "orthogonal":
        optimizer = Orthogonal(model, how.lr)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=how.lr, momentum=0.9, nesterov=True, weight_decay=how.weight_decay
        )
    sizes, steps, start = how.sizes, len(images) // how.batch_size, 0
    if kept is not None and kept.exists():
        state = torch.load(kept)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        start = state["epochs"]
    step, total, began = start * steps, steps * len(sizes), time.perf_counter()
    for epoch, pixels in enumerate(sizes[start:], start):
        order = torch.randperm(len(images), generator=generator)
        running = 0.0
        for chosen in order[: steps * how.batch_size].split(how.batch_size):
            done = step / total
            for group in optimizer.param_groups:
                group["lr"] = how.lr * min(done / 0.2, (1 - done) / 0.8)
            inputs = crops(images[chosen], pixels, generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(inputs), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running += loss.item()
            step += 1
        seconds = time.perf_counter() - began
        print(f"seed {seed} epoch {epoch + 1}/{len(sizes)} loss {running / steps:.3f} {seconds:.0f} s", flush=True)
        if not math.isfinite(running):
            raise SystemExit(f"seed {seed}: the loss is not finite")
        if kept is not None:
            now = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            kept.parent.mkdir(parents=True, exist_ok=True)
            half_written = kept.with_suffix(".part")
            torch.save(now | {"generator": generator.get_state(), "epochs": epoch + 1}, half_written)
            half_written.replace(kept)
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def crops(images: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """A random square of each image `(n, c, h, w)`, half of them mirrored: `(n, c, pixels, pixels)`."""
    if pixels == images.shape[-1]:
        images = F.pad(images, (4, 4, 4, 4))
    highest = images.shape[-1] - pixels + 1
    corner = torch.randint(highest, (2, len(images), 1), generator=generator)
    rows, columns = corner + torch.arange(pixels)
    mirrored = torch.rand(len(images), 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return images[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def make(job: Job, only: int | None, states: Path | None) -> None:
    """Train, store, and write the manifest last, so that it only ever names files that are there."""
    options = {"seed": 0} if job.data != "cifar10" else {}
    options |= {"flat": job.function == "mlp"} if job.data == "digits" else {}
    data = getattr(lmc.data, job.data)(**options)
    model = getattr(lmc.models, job.function)(*job.arguments, **job.options)
    folder = DATA / job.name
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    recipe, runs = trained(job, model, data, only, states)
    for seed, states in runs:
        for epoch, weights in states.items():
            name = f"seed{seed}-epoch{epoch:02d}.safetensors" if job.keep else f"seed{seed}.safetensors"
            stored = {key: halved(tensor) for key, tensor in weights.items()}
            content = save(stored)
            (folder / name).write_bytes(content)
            read_back = {key: t.float() if t.is_floating_point() else t for key, t in stored.items()}
            entry = {"file": name, "seed": seed, "epoch": epoch, "sha256": hashlib.sha256(content).hexdigest()}
            scores = {part: score(model, read_back, *(x[: job.scored] for x in getattr(data, part))) for part in PARTS}
            files.append(entry | {"bytes": len(content)} | scores)
    if only is not None and (folder / "manifest.json").exists():
        others = json.loads((folder / "manifest.json").read_text())["files"]
        files = sorted([*(e for e in others if e["seed"] != only), *files], key=lambda entry: entry["seed"])
    manifest = {
        "description": job.description,
        "model": {"function": job.function, "arguments": job.arguments, "options": job.options},
        "data": {"function": job.data, "options": options, "provenance": data.provenance},
        "recipe": recipe,
        "storage": "parameters with two or more axes in float16, everything else as it was",
        "command": f"python tools/make_checkpoints.py {job.name}",
        **({"scored": f"the first {job.scored} images of each split"} if job.scored else {}),
        "versions": versions(),
        "files": files,
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def trained(
    job: Job, model: nn.Module, data: Any, only: int | None, states: Path | None
) -> tuple[dict, Iterable[tuple[int, dict]]]:
    """The recipe in full; and seed by seed, weights by epoch."""
    seeds = job.seeds if only is None else (only,)
    if job.rounds:
        epochs = sum(len(how.sizes) for how in job.rounds)
        recipe = {"epochs": epochs, "rounds": [asdict(how) for how in job.rounds], "augmentation": AUGMENTATION}
        return recipe, ((seed, {epochs: in_rounds(job, data, seed, states)}) for seed in seeds)
    result = lmc.training.train(model, data, seeds=seeds, keep=job.keep, **job.recipe)
    last = result.recipe.epochs
    return asdict(result.recipe), (
        (s, result.trajectory[i] if job.keep else {last: result[i]}) for i, s in enumerate(seeds)
    )


def in_rounds(job: Job, data: Any, seed: int, states: Path | None) -> dict:
    model, weights = begun(job, seed), {}
    for k, how in enumerate(job.rounds):
        if weights:
            model.load_state_dict({name: halved(tensor) for name, tensor in weights.items()})
        kept = states / f"{job.name}-seed{seed}-round{k}.pt" if states else None
        weights = train_on_crops(model, *data.train, how, seed + 1000 * k, kept)
    return weights


def halved(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.half() if tensor.is_floating_point() and tensor.ndim >= 2 else tensor).contiguous()


def score(model: nn.Module, weights: lmc.weights.Weights, inputs: torch.Tensor, targets: torch.Tensor) -> dict:
    """Mean cross-entropy (nats) and accuracy in eval mode."""
    with torch.no_grad():
        parts = [torch.func.functional_call(model.eval(), weights, (batch,)) for batch in inputs.split(1000)]
        logits = torch.cat(parts)
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
        if job.scored:  # measured by benchmarks/cifar10.py
            continue
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
    parser.add_argument("--seed", type=int, help="train this seed alone, beside what is stored")
    parser.add_argument("--states", type=Path, help="folder for the state after each epoch of training on CIFAR-10")
    parser.add_argument("--table", action="store_true", help="print the table of data/README.md and train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {job.name: job for job in JOBS}
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"{', '.join(unknown)}: not among {', '.join(known)}")
    if args.table:
        table()
        return
    for name in args.names or [job.name for job in JOBS if job.data != "cifar10"]:
        print(name, flush=True)
        make(known[name], args.seed, args.states)


if __name__ == "__main__":
    main()
