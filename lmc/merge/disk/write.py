"""Merge checkpoints on disk, tensor by tensor: memory for a few copies of the largest tensor, not for the models.

The methods of `lmc.merge` work on chunks of large tensors and need some 100 MB whatever the models' size; DARE and DELLA
that restore norms (`rescale="l1"`), and rules of your own that do not say that they may be given chunks, hold whole
tensors of all models. A thread writes what is done while the next chunk is made.

    plan = lmc.merge.plan(lmc.merge.ties, ["math/", "code/"], "merged/", base="base/", density=0.3)
    print(plan)                     # sizes, files, memory, what is done already
    merged = plan.write()           # or all at once: lmc.merge.write(lmc.merge.ties, [...], "merged/", ...)

The files grow in a hidden folder beside the output, which takes its name when all of them are complete. After an
interrupt the same call goes on behind the last tensors that are whole in each unfinished file; the result is the same,
bit for bit. With an executor, workers make parts of the files, a quarter of a gigabyte each, and write them to their places.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lmc.core.context import own_context
from lmc.core.files import write_text
from lmc.core.progress import tqdm
from lmc.core.workers import crew
from lmc.errors import InputError, LmcError
from lmc.merge.disk.recipe import MergeRecipe, make_recipe, record, recorded
from lmc.merge.disk.shards import (
    QUEUE,
    Begun,
    Naming,
    Shard,
    begun,
    fill,
    layout,
    naming,
    parse_dtype,
    parse_size,
    write_apart,
    write_shard,
)
from lmc.merge.disk.stacking import Stack
from lmc.merge.disk.vocabulary import by_token
from lmc.merge.engine.call import sample_size
from lmc.merge.engine.chunks import VALUES, Make, grain
from lmc.merge.engine.in_use import InUse, settling
from lmc.merge.engine.method import MergeFunction, Method
from lmc.merge.engine.quantiles import SAMPLE
from lmc.merge.engine.tensors import WeightSets, weight_sets
from lmc.symmetry.groups.action import moved_entries
from lmc.weights import ModelOrWeights
from lmc.weights.adapter import Adapter
from lmc.weights.checkpoint import RECIPE, Checkpoint, checksum, read_json, readable, sampled_checksum
from lmc.weights.opening import open_checkpoint
from lmc.weights.state import wide

Source: TypeAlias = str | Path | ModelOrWeights
BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken")
TRAINING = ("trainer_state.json", "optimizer.json")  # of the run, not of the model


@dataclass(frozen=True)
class Plan:
    """A merge to disk that has not begun. `print` it, then `write()`.

    Attributes:
        out: the folder that the result will be.
        recipe: method, options and inputs, as stored beside the result.
        shards: the files, in order.
        naming: what they and their index are called: as those of the first model.
        done: the files that an interrupted run has finished, with their SHA-256.
        begun: what it has left of the files that it was at, by their names.
        ties: further names of stored tensors, which are not stored again.
        memory: bytes of memory at most, about, besides what the program holds already.
        whole: whether tensors are held whole, so that the largest decides about memory; else in chunks.
        one_pass: whether each tensor is read once only; else thresholds of whole models or angles are found first.
        beside: the files that are copied: configuration and tokenizer, of the base or else the first model in a folder.
        texts: files that are made beside the weights: their names and contents, such as a configuration that is changed.
        notes: what was unwrapped or stripped in the files of the models.
        inputs: the files that are read; SHA-256 of samples of them are kept beside the result.
    """

    out: Path
    recipe: MergeRecipe
    shards: tuple[Shard, ...]
    naming: Naming
    done: Mapping[str, str]
    begun: Mapping[str, Begun]
    ties: Mapping[str, str]
    memory: int
    whole: bool
    one_pass: bool
    beside: tuple[Path, ...]
    texts: Mapping[str, str]
    notes: tuple[str, ...]
    inputs: tuple[Path, ...]
    _merge: Mapping[str, Any] = field(repr=False)  # the method, the models and the options, as `_maker` takes them

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(shard.size for shard in self.shards)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={_short(value)}" for key, value in self.recipe["options"].items())
        inputs = f"{len(self.recipe['models'])} models" + (" and their base" if self.recipe["base"] else "")
        tensors = sum(len(shard.tensors) for shard in self.shards)
        lines = [
            f"{self.recipe['method']}({options}) of {inputs} -> {self.out}",
            f"  result: {readable(self.size)}, {tensors} tensors (and {len(self.ties)} tied names) "
            f"in {len(self.shards)} files",
            f"  memory: about {readable(self.memory)}{' for whole tensors' if self.whole else ''}; every tensor is read {'once' if self.one_pass else 'repeatedly'}",
        ]
        if self.beside:
            lines.append(f"  copied from {self.beside[0].parent}: {', '.join(file.name for file in self.beside)}")
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  {len(self.done)} files are complete already"] if self.done else []
        lines += [f"  {len(left.tensors)} tensors of {file} are complete already" for file, left in self.begun.items()]
        return "\n".join(lines)

    def write(self, *, executor: Any = None, progress: bool = True) -> Checkpoint:
        """Do it, and return the opened result.

        Args:
            executor: a `concurrent.futures.Executor` or a dask `Client`, whose workers make the files, a part of 0.27 GB or a
                tensor at a time, on a disk that they and the caller see (default: here, one tensor after the other). What
                is kept of an interrupted run is the same, and so is the result, bit for bit: torch uses one thread in
                each worker, as it does here but for methods that hold whole tensors. Each worker needs the memory of the
                plan, and finds for itself what a method finds of whole models first. Opened checkpoints travel by path,
                those in `.pt` files and models in memory with their values, once.
            progress: show a bar.

        Raises:
            InputError: no executor, or one that takes no more work; too little space on the disk (nothing is written); `out`
                exists by now.
            WeightsError: a tensor with values that are not finite; it, its model and its file are named.
            WorkerError: an executor that has lost its workers. What was finished is kept: the same call goes on.
        """
        todo = [shard for shard in self.shards if shard.file not in self.done]
        needed = sum(shard.size for shard in todo) + sum(file.stat().st_size for file in self.beside)
        needed -= sum(left.size for left in self.begun.values())
        free = shutil.disk_usage(next(folder for folder in self.out.parents if folder.exists())).free
        if needed > free:
            raise InputError(f"{self.out}: needs {readable(needed)}, its disk has {readable(free)} free; make room")
        partial, files = _partial(self.out), dict(self.done)
        partial.mkdir(parents=True, exist_ok=True)
        record(partial, self.recipe, files)
        made = bool(self.done or self.begun)

        def written(size: int) -> None:
            nonlocal made
            made = True
            bar.update(size)

        try:
            with (
                _threads(torch.get_num_threads() if executor is None and self.whole else 1),
                tqdm(total=needed, unit="B", unit_scale=True, desc="merging", disable=not progress) as bar,
            ):
                for file, digest in self._files(partial, todo, executor, written):
                    files[file] = digest
                    files = {
                        s.file: files[s.file] for s in self.shards if s.file in files
                    }  # in whatever order they came
                    record(partial, self.recipe, files)
        except LmcError:
            if not made:  # nothing to go on from: an option that was refused must not stand in the way of a better one
                shutil.rmtree(partial, ignore_errors=True)
            raise
        record(partial, self.recipe, files, {str(file.resolve()): sampled_checksum(file) for file in self.inputs})
        for file in self.beside:
            if file.name not in self.texts:
                shutil.copyfile(file, partial / file.name)
        for name, text in self.texts.items():
            write_text(partial / name, text)
        if len(self.shards) > 1:
            weight_map = {name: shard.file for shard in self.shards for name in shard.tensors}
            index = {"metadata": {"total_size": self.size}, "weight_map": weight_map}
            write_text(partial / self.naming.index, json.dumps(index, indent=2) + "\n")
        for stray in partial.glob(".*"):  # notes of progress, and half-written text of a run that was killed
            stray.unlink()
        _must_not_exist(self.out)
        os.rename(partial, self.out)
        return open_checkpoint(self.out)

    def _files(
        self, folder: Path, todo: Sequence[Shard], executor: Any, written: Callable[[int], object]
    ) -> Iterator[tuple[str, str]]:
        """Name and SHA-256 of each file that is missing, as it is complete."""
        if executor is not None:
            shared = {"folder": folder, "ties": self.ties, **self._merge}
            with crew(executor, _elsewhere, shared) as work:
                yield from write_apart(folder, todo, self.ties, work, written, self.begun)
            return
        make = _maker(**self._merge)
        for shard in todo:
            start = self.begun.get(shard.file)
            names = [name for name in shard.tensors if start is None or name not in start.tensors]
            yield shard.file, write_shard(folder / shard.file, shard, self.ties, make(names), written, start)


def _maker(method: MergeFunction, sets: WeightSets, options: Mapping[str, Any]) -> Make:
    make = method.method.maker(sets, **options)
    return settling(make, sets.states[0]) if sets.derived else make


def _elsewhere(folder: Path, ties: Mapping[str, str], **merge: Any) -> Callable[[tuple[Shard, tuple[str, ...]]], None]:
    """A worker's task: make some tensors of a file, and write them to their places."""
    make = own_context(_maker)(**merge)

    @own_context
    def part(task: tuple[Shard, tuple[str, ...]]) -> None:
        shard, names = task
        fill(folder / shard.file, shard, ties, make(names))

    return part


@own_context
def write(
    method: MergeFunction,
    models: Sequence[Source],
    out: str | Path,
    /,
    *,
    base: Source | None = None,
    dtype: torch.dtype | str | None = None,
    shard_size: int | str = "5GB",
    vocabulary: str | Mapping[str, Any] | None = None,
    executor: Any = None,
    progress: bool = True,
    **options: Any,
) -> Checkpoint:
    """Merge into a folder of safetensors files: `plan(...)`, printed, and `Plan.write()`.

    Returns:
        The opened result, as `lmc.open_checkpoint(out)` gives it.

    Raises: as `plan` and `Plan.write`; after an interrupt or an error, the same call goes on where this one stopped.
    """
    planned = plan(method, models, out, base=base, dtype=dtype, shard_size=shard_size, vocabulary=vocabulary, **options)
    if progress:
        print(planned, flush=True)
    return planned.write(executor=executor, progress=progress)


@own_context
def plan(
    method: MergeFunction,
    models: Sequence[Source],
    out: str | Path,
    /,
    *,
    base: Source | None = None,
    dtype: torch.dtype | str | None = None,
    shard_size: int | str = "5GB",
    vocabulary: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """Check all that can be checked before a merge to disk, and say what it will take.

    Args:
        method: a function of `lmc.merge` that needs no data, or one of your own made by its decorators.
        models: paths of checkpoints (see `lmc.open_checkpoint`), opened checkpoints, modules or state dicts.
        out: the folder to make. Names of tensors and files, and dtypes, are those of the first model. Beside the weights,
            `merge.json` keeps the recipe and the SHA-256 of every file (`lmc.open_checkpoint(out).verify()`).
        base: the weights that the models were fine-tuned from.
        dtype: of floating-point tensors in the result, such as "bfloat16" (default: as in the first model).
        shard_size: bytes per file at most, as a number or like "5GB"; a larger tensor has a file of its own.
        vocabulary: for models whose tokenizers differ: "union", "base" or a mapping that says more, see
            `lmc.merge.disk.vocabulary`; rows of embeddings and heads follow their tokens.
        options: those of the method.

    Raises:
        InputError: `out` exists, or an unfinished merge into it had another recipe; a method that holds whole models;
            a bad option.
        DataError: a checkpoint that cannot be read; its file is named.
        MismatchError: names, shapes or dtypes of the models differ.
    """
    if options.pop("align", None) is not None:
        raise InputError("align: moving units needs whole models; align first, store the moved models, and merge those")
    how = getattr(method, "method", None)
    if isinstance(method, str):
        raise InputError(f"method={method!r}: expected a function, such as lmc.merge.average, got a name")
    if not isinstance(how, Method):
        raise InputError(
            f"{getattr(method, '__name__', method)!r} does not merge tensor by tensor; "
            "merge in memory and store what it gives: lmc.merge.write(lmc.merge.average, [merged], out)"
        )
    if isinstance(models, str | Path | nn.Module | Mapping):
        raise InputError("models: expected a sequence of models, got a single one; write [model]")
    out, limit, dtype = Path(os.path.abspath(out)), parse_size(shard_size), parse_dtype(dtype)
    _must_not_exist(out)
    opened = [open_checkpoint(model) if isinstance(model, str | Path) else model for model in models]
    reference = open_checkpoint(base) if isinstance(base, str | Path) else base
    arguments = how.options_of(reference, options)
    recipe = make_recipe(method, arguments, opened, reference, limit, dtype)
    joined, texts = opened, {}
    if vocabulary is not None:
        joined, reference, texts = by_token(opened, reference, vocabulary)
        recipe["vocabulary"] = vocabulary
    sets = weight_sets(joined, reference, pairs=True, cast=dtype)
    names = naming(opened[0])
    shards = layout({name: form for name, form in sets.form.items() if name not in sets.ties}, limit, names)

    done = _finished(out, recipe, shards)
    rest = [shard for shard in shards if shard.file not in done]
    left = {shard.file: found for shard in rest if (found := begun(_partial(out), shard, sets.ties)) is not None}
    memory, beside = _memory(how, sets, arguments), _beside([reference, *opened])
    whole = how.cuts(arguments) == "whole"
    on_disk = [one for one in (*sets.states, sets.base) if isinstance(one, Checkpoint)]
    notes = tuple(f"{one.path}: {note}" for one in on_disk for note in one.notes)
    adapters = [model for model in opened if isinstance(model, Adapter)]
    changed = [adapter.changes for adapter in adapters]
    if len(set(changed)) > 1:
        every, common = frozenset.union(*changed), frozenset.intersection(*changed)
        notes += (
            f"the adapters change different modules: {len(every)} are changed by one at least, {len(common)} by all; where an "
            "adapter changes nothing, its task vector is zero",
        )
    read = tuple(dict.fromkeys(file for one in (*on_disk, *adapters) for file in one.files))
    texts |= _changed(beside, opened, dtype, texts)
    return Plan(
        out,
        recipe,
        shards,
        names,
        done,
        left,
        sets.ties,
        memory,
        whole,
        how.one_pass,
        beside,
        texts,
        notes,
        read,
        {"method": method, "sets": sets, "options": arguments},
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Another number of threads for the arithmetic of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _memory(how: Method, sets: WeightSets, options: Mapping[str, Any]) -> int:
    """Working copies of a chunk or of the largest tensor, and what a survey of the whole models collects.

    The rule that needs most (DELLA, which ranks) has eight copies per model, and moments are taken of two more in float64; chunks
    that were read or wait to be written are added. Where tensors are small, the C library's allocator may keep more than is in use.
    """
    cut = how.cuts(options)
    sizes = {name: sets.shells[name].numel() for name in sets.names}
    widest = max((wide(sets.shells[name].dtype).itemsize for name in sets.names), default=0)
    at_once = max((min(sizes[name], max(VALUES, grain(sets.shells[name], cut))) for name in sizes), default=0)
    survey = 0
    if how.survey is not None:  # a sample, sorted, and the values near thresholds
        total = sum(sizes[name] for name in sets.weights)
        survey = len(sets) * (4 * max(min(total, SAMPLE), sample_size(total)) + total // 50)
    waiting = QUEUE + len(sets) + 1
    each = 12 if "moments" in how.parameters else 8
    on_disk = (state for state in (*sets.states, sets.base) if isinstance(state, Checkpoint))
    moved = 0
    for state in on_disk:
        remade = [*moved_entries(state).values(), *(e for e in state.stored.values() if isinstance(e, InUse))]
        moved += max((entry.held for entry in remade), default=0)
    return ((each * len(sets) + 2) * at_once + waiting * min(at_once, VALUES) + survey) * widest + moved


def _beside(sources: Sequence[ModelOrWeights | None]) -> tuple[Path, ...]:
    """Configuration and tokenizer of the first folder that has any: small texts, without indices and old recipes."""
    for given in sources:
        if isinstance(given, Checkpoint) and not isinstance(given, Adapter) and given.path.is_dir():
            found = sorted(file for file in given.path.iterdir() if file.suffix in BESIDE and file.is_file())
            found = [f for f in found if not f.name.endswith(".index.json") and f.name not in (RECIPE, *TRAINING)]
            if found:
                return tuple(found)
    return ()


def _changed(
    beside: Sequence[Path], models: Sequence[ModelOrWeights], dtype: torch.dtype | None, texts: Mapping[str, str]
) -> dict[str, str]:
    """The configuration, where the result has other layers or another dtype than it says."""
    file = next((file for file in beside if file.name == "config.json"), None)
    if file is None:
        return {}
    before = json.loads(texts[file.name]) if file.name in texts else read_json(file)
    changes: dict[str, Any] = {}
    for model in models:
        if isinstance(model, Stack):
            changes |= model.configured(before)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        changes |= {key: name for key in ("torch_dtype", "dtype") if key in before}
    return {file.name: json.dumps(before | changes, indent=2) + "\n"} if changes else {}


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.unfinished")


def _must_not_exist(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: exists already; remove it or choose another name")


def _finished(out: Path, recipe: MergeRecipe, shards: Sequence[Shard]) -> dict[str, str]:
    """The files that an interrupted merge of the same recipe has completed, checked against their checksums."""
    partial = _partial(out)
    if not partial.exists() or not any(partial.iterdir()):
        return {}
    before, files = recorded(partial)
    if before != recipe:
        old = {} if before is None else before
        changed = ", ".join(key for key in recipe if recipe[key] != old.get(key))
        raise InputError(
            f"{partial}: an unfinished merge that differs in {changed}; finish it by the call that began it, "
            "or remove that folder"
        )
    here = {shard.file for shard in shards if (partial / shard.file).is_file()}
    return {file: files[file] for file in files if file in here and checksum(partial / file) == files[file]}


def _short(value: Any) -> Any:
    return value["method"] if isinstance(value, dict) and "method" in value else value
