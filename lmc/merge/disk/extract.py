"""Adapters from task vectors: the leading singular vectors of what fine-tuning, or a merge, adds to each weight.

    found = lmc.merge.extract(["fine-tuned/"], "adapter/", base="base/", rank=16)
    found = lmc.merge.extract(["adapter-a/", "adapter-b/"], "merged/", base="base/", rank=32, method=lmc.merge.ties)
    print(found)                    # how much of each layer is lost

The result is a folder as PEFT reads it. Tensors are read one at a time; the factors of the result are held in memory.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lmc.core.context import own_context, warn
from lmc.core.extras import require
from lmc.core.files import write_text
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.merge.disk.recipe import make_recipe, record
from lmc.merge.disk.shards import parse_dtype
from lmc.merge.disk.write import Source
from lmc.merge.engine.method import MergeFunction
from lmc.merge.engine.tensors import WeightSets, weight_sets
from lmc.merge.rules.task_vectors import task_arithmetic
from lmc.weights.adapter import CONFIG, PREFIX
from lmc.weights.checkpoint import Checkpoint, checksum, read_json
from lmc.weights.opening import open_checkpoint
from lmc.weights.state import narrowed

if TYPE_CHECKING:
    import pandas

FILE = "adapter_model.safetensors"
EMBEDDINGS = (
    "embed",
    "embedding",
    "embeddings",
    "embed_tokens",
    "word_embeddings",
    "wte",
    "wpe",
    "shared",
    "tok_embeddings",
)
ACROSS = (
    "gpt2",
    "openai-gpt",
    "decision_transformer",
    "imagegpt",
    "clvp",
)  # models of transformers whose weights are (in, out)
CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")  # their modules
LARGE, MORE, ROUNDS = 1024, 16, 4  # from this size on by subspace iteration: further columns, and rounds


@dataclass(frozen=True, eq=False)
class Extraction(Result):
    """An adapter that was made: its folder, and for each weight the rank and what is lost.

    Attributes:
        path: the folder; `open()` opens it.
        names: of the weights that moved, in the order of the base.
        ranks: of the two factors of each; 0 where the tensor is stored whole.
        errors: the relative error of each, `|delta - B A| / |delta|` in the Frobenius norm; 0 where it is stored whole, 1
            where it is left out.
        error: the same of all together.
        left_out: the tensors that adapters cannot hold.
    """

    path: str
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    errors: tuple[float, ...]
    error: float
    left_out: tuple[str, ...]

    def open(self) -> Checkpoint:
        """The adapter."""
        return open_checkpoint(self.path)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per weight."""
        pandas = require("pandas")
        return pandas.DataFrame({"rank": self.ranks, "relative error": self.errors}, index=list(self.names))

    def __repr__(self) -> str:
        factored = [rank for rank in self.ranks if rank]
        whole = len(self.ranks) - len(factored) - len(self.left_out)
        lines = [
            f"Extraction({self.path!r}: rank {max(factored, default=0)} at most on {len(factored)} weights, {whole} tensors "
            f"whole; relative error {self.error:.3g})"
        ]
        worst = sorted(zip(self.errors, self.names, strict=True), reverse=True)[:3]
        lines += [f"{name}: relative error {error:.3g}" for error, name in worst if error > 1e-6]
        return "\n  ".join(lines + [f"{name}: moves, but adapters cannot hold it" for name in self.left_out[:3]])


@own_context
def extract(
    models: Sequence[Source],
    out: str | Path,
    *,
    base: Source,
    rank: int = 16,
    method: MergeFunction = task_arithmetic,
    dtype: torch.dtype | str = "float32",
    progress: bool = True,
    **options: Any,
) -> Extraction:
    """Make a LoRA adapter of a fine-tuned model, or of the merge of several: the best one of its rank, weight by weight.

    The merged task vector of each matrix is cut to its `rank` leading singular triples (Eckart, Young 1936), so that the
    squared error is the sum of the squared singular values left out. Matrices of more than 1024 rows and columns are
    decomposed by subspace iteration (Halko et al. 2011, 0909.4061, Algorithm 4.4), and the error is that of what it finds.
    Kernels of convolutions are taken as matrices (filters, rest), embeddings are known by their names. Norms and biases
    are stored whole.

    Args:
        models: as for `write`: paths, adapters too, opened checkpoints, modules or state dicts; one for a plain extraction.
        out: the folder to make: `adapter_model.safetensors` and its configuration, whose scale is 1.
        base: the weights that the models were fine-tuned from.
        rank: of the factors at most; tensors whose task vector has a smaller one take that.
        method: how several are merged, a method on task vectors.
        dtype: of what is stored.
        options: those of the method.

    Raises:
        InputError: `out` exists, a rank below 1, or a method that is none on task vectors.
        WeightsError: nothing moved.
        MismatchError: models that do not fit the base.
    """
    kind = parse_dtype(dtype)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"rank must be a whole number of at least 1, got {rank!r}")
    how = getattr(method, "method", None)
    if how is None or how.kind != "task vectors":
        raise InputError(f"method: expected a method on task vectors, such as lmc.merge.ties, got {method!r}")
    if isinstance(models, str | Path) or not isinstance(models, Sequence):
        raise InputError("models: expected a sequence of models, got a single one; write [model]")
    folder = Path(os.path.abspath(out))
    if folder.exists():
        raise InputError(f"{folder}: exists already; remove it or choose another name")
    opened = [open_checkpoint(model) if isinstance(model, str | Path) else model for model in models]
    reference = open_checkpoint(base) if isinstance(base, str | Path) else base
    arguments = how.options_of(reference, options)
    sets = weight_sets(opened, reference)
    made = _Making(sets, rank, kind or torch.float32, _across(reference))
    delta = how.deltas(sets, **arguments)
    for name in tqdm(sets.weights, desc="extract", unit=" tensors", disable=not progress):
        made.add(name, delta(name))
    recipe = make_recipe(method, arguments, opened, reference, 0, kind) | {"rank": rank}
    _write(folder, made, recipe, reference)
    return made.result(folder)


class _Making:
    """The tensors of the adapter, and what they lack."""

    def __init__(self, sets: WeightSets, rank: int, dtype: torch.dtype, across: bool) -> None:
        self.sets, self.rank, self.dtype, self.across = sets, rank, dtype, across
        self.tensors: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}  # of modules with factors
        self.whole: set[str] = set()  # modules that are stored whole
        self.rows: list[tuple[str, int, float, float]] = []  # name, rank, squares of what is lost and of all
        self.left_out: list[str] = []

    def add(self, name: str, delta: Tensor) -> None:
        size = float(delta.double().square().sum())
        if size == 0.0:
            return
        names = [name, *(again for again, first in self.sets.ties.items() if first == name)]
        module, _, last = name.rpartition(".")
        if last not in ("weight", "bias") or delta.ndim == 0:
            self.left_out.append(name)
            self.rows.append((name, 0, size, size))
            return
        if last == "bias" or delta.ndim == 1:
            whole = self.sets.base_tensor(name) + delta
            for each in names:
                self._keep(each, whole)
                if last == "weight":
                    self.whole.add(each.rpartition(".")[0])
            self.rows.append((name, 0, 0.0, size))
            return
        left, right, lost = _factors(delta.flatten(1), self.rank, size)
        for each in names:
            self._keep_factors(each.rpartition(".")[0], left, right, delta.shape)
        self.rows.append((name, len(right), lost, size))

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.tensors[PREFIX + name] = narrowed(tensor, self.dtype, name).contiguous().clone()

    def _keep_factors(self, module: str, left: Tensor, right: Tensor, shape: torch.Size) -> None:
        self.ranks[module] = rank = len(right)
        last = module.rpartition(".")[2]
        if last in EMBEDDINGS and len(shape) == 2:
            self._keep(f"{module}.lora_embedding_A", left.T)
            self._keep(f"{module}.lora_embedding_B", right.T)
            return
        if self.across and last in CONV1D:
            left, right = right.T, left.T
        elif len(shape) > 2:
            left, right = left.reshape(-1, rank, *[1] * (len(shape) - 2)), right.reshape(rank, *shape[1:])
        self._keep(f"{module}.lora_A.weight", right)
        self._keep(f"{module}.lora_B.weight", left)

    def config(self, base: object) -> dict[str, Any]:
        """As PEFT writes it; alpha is the rank everywhere, so that the scale is 1."""
        rank = max(self.ranks.values(), default=self.rank)
        others = {module: own for module, own in self.ranks.items() if own != rank}
        biases = any(name.endswith(".bias") for name in self.tensors)
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": str(base.path) if isinstance(base, Checkpoint) else None,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(self.ranks),
            "modules_to_save": sorted(self.whole) or None,
            "bias": "all" if biases else "none",
            "fan_in_fan_out": self.across,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "inference_mode": True,
            "task_type": None,
        }

    def result(self, folder: Path) -> Extraction:
        names, ranks, lost, sizes = zip(*self.rows, strict=True) if self.rows else ((), (), (), ())
        errors = tuple((gone / size) ** 0.5 for gone, size in zip(lost, sizes, strict=True))
        total = (sum(lost) / sum(sizes)) ** 0.5 if sizes else 0.0
        return Extraction(str(folder), names, ranks, errors, total, tuple(self.left_out))


def _factors(matrix: Tensor, rank: int, size: float) -> tuple[Tensor, Tensor, float]:
    """`(out, k)` and `(k, in)`, each with the roots of the singular values, and the square of what their product lacks."""
    least = min(matrix.shape)
    if least > LARGE and rank + MORE < least // 4:
        draw = torch.Generator().manual_seed(0)
        start = torch.randn(matrix.shape[1], rank + MORE, generator=draw, dtype=torch.float32).to(matrix)
        frame = torch.linalg.qr(matrix @ start).Q
        for _ in range(ROUNDS):
            frame = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ frame).Q).Q
        inner, values, right = torch.linalg.svd(frame.T @ matrix, full_matrices=False)
        left = frame @ inner
        outside = max(0.0, size - float(values.double().square().sum()))
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        outside = 0.0
    rounding = float(values[0]) * max(matrix.shape) * torch.finfo(values.dtype).eps
    kept = max(1, min(rank, int((values > rounding).sum())))
    roots = values[:kept].sqrt()
    left, right = left[:, :kept] * roots, roots[:, None] * right[:kept]
    return left, right, outside + float(values[kept:].double().square().sum())


def _across(base: object) -> bool:
    """True for models of transformers that store the weights of their Conv1D modules as (in, out)."""
    if not isinstance(base, Checkpoint) or not (file := base.path / "config.json").is_file():
        return False
    return read_json(file).get("model_type") in ACROSS


def _write(folder: Path, made: _Making, recipe: dict[str, Any], base: object) -> None:
    """The folder, whole or not at all."""
    if made.left_out:
        warn(
            f"{made.left_out[0]}: moves, but is neither weight nor bias of a module, so that no adapter holds it; left out"
        )
    if not made.tensors:
        raise InputError("the models equal the base: there is nothing that an adapter could add")
    partial = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # Biases of modules with factors are those of the wrapped layer.
    inside = {f"{PREFIX}{module}.bias": f"{PREFIX}{module}.base_layer.bias" for module in made.ranks}
    save_file(
        {inside.get(name, name): tensor for name, tensor in made.tensors.items()}, partial / FILE, {"format": "pt"}
    )
    write_text(partial / CONFIG, json.dumps(made.config(base), indent=2) + "\n")
    record(partial, recipe, {file: checksum(partial / file) for file in (FILE, CONFIG)})
    os.rename(partial, folder)
