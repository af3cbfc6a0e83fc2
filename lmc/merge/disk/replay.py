"""Merges from recipes: those kept beside merged checkpoints, bit for bit, and configurations of mergekit."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lmc.core.context import own_context
from lmc.errors import DataError, InputError
from lmc.merge.disk.mergekit import plan_configuration
from lmc.merge.disk.mergekit_language import read_configuration
from lmc.merge.disk.recipe import source
from lmc.merge.disk.stacking import stack
from lmc.merge.disk.write import write
from lmc.merge.engine.method import MergeFunction
from lmc.weights.checkpoint import RECIPE, Checkpoint, read_json, sampled_checksum
from lmc.weights.opening import open_checkpoint


@own_context
def replay(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    method: MergeFunction | None = None,
    folders: Mapping[str, str | Path] | None = None,
    seed: int = 0,
    executor: Any = None,
    progress: bool = True,
) -> Checkpoint:
    """Do the merge of a recipe, into a new folder: repeat one of `write`, or carry out a configuration of mergekit.

    Configurations of mergekit are read as mergekit 0.1.5 reads them, see `lmc.merge.disk.mergekit_language`; sums are made in
    float32, where mergekit makes most of them in `dtype`, and random masks have other numbers.

    Args:
        recipe: `merge.json` of a merged checkpoint, its folder, another copy of that file, or what it holds; or a YAML file
            of mergekit, or what it holds.
        out: the folder to make.
        method: the function, where it is not one of `lmc.merge`.
        folders: for a configuration of mergekit, names of models -> where they are: nothing is downloaded.
        seed: for a configuration of mergekit, of random masks.
        executor: as for `Plan.write`.

    Raises:
        InputError: models that were not on disk, or are not here; a method that is not known, or has been changed since;
            what of a configuration is not supported, by name.
        DataError: inputs of other sizes than those that were merged, or a result that differs; the file is named.
    """
    near, yaml = Path("."), False
    if not isinstance(recipe, Mapping):
        path = Path(recipe)
        near = path.parent
        yaml = path.suffix in (".yml", ".yaml")
        recipe = read_configuration(path) if yaml else read_json(path / RECIPE if path.is_dir() else path)
    if yaml or "merge_method" in recipe:
        planned = plan_configuration(recipe, out, folders=folders or {}, near=near, seed=seed)
        if progress:
            print(planned, flush=True)
        return planned.write(executor=executor, progress=progress)
    missing = [key for key in ("method", "rule", "options", "models", "base", "shard_size") if key not in recipe]
    if missing:
        raise DataError(f"recipe: not one of lmc.merge.write: it lacks {', '.join(missing)}")
    chosen = find_method(recipe, method)
    options = {key: find_method(v) if _is_method(v) else v for key, v in recipe["options"].items()}
    models = [_input(model, f"models[{i}]") for i, model in enumerate(recipe["models"])]
    base = None if recipe["base"] is None else _input(recipe["base"], "base")
    for file, digest in recipe.get("inputs", {}).items():
        if Path(file).is_file() and sampled_checksum(Path(file)) != digest:
            raise DataError(f"{file}: is not what was merged: its SHA-256 differs from the one in the recipe")
    how: dict[str, Any] = {key: recipe.get(key) for key in ("dtype", "shard_size", "vocabulary")} | options
    merged = write(chosen, models, out, base=base, executor=executor, progress=progress, **how)
    made = read_json(merged.path / RECIPE)["files"]
    for file, digest in recipe.get("files", {}).items():
        if made.get(file) != digest:
            raise DataError(
                f"{merged.path / file}: differs from the file of the recipe: its inputs, or the version of torch "
                f"({recipe.get('torch')} then), have changed"
            )
    return merged


# Where the methods are defined that a recipe may name; soups bring the judging of models with them, if they are asked for.
CATALOGUE = tuple(
    f"lmc.merge.rules.{name}" for name in ("averaging", "postprocess", "selection", "spectral", "task_vectors", "ties")
)
CATALOGUE += ("lmc.merge.with_data.soups",)


def find_method(recipe: Mapping[str, Any], given: MergeFunction | None = None) -> MergeFunction:
    """The method that a recipe names; its source must be what it was."""
    name = recipe["method"]
    named = (getattr(import_module(module), str(name), None) for module in CATALOGUE)
    method: Any = next(filter(None, named), None) if given is None else given
    if not hasattr(method, "method"):
        raise InputError(f"recipe: {name!r} is not a method of lmc.merge; pass your function as method=")
    if source(method) != recipe["rule"]:
        raise InputError(f"recipe: {name!r} is not the function that the recipe was made with: its source differs")
    return method


def _is_method(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"method", "rule"}


def _input(recorded: Mapping[str, Any], who: str) -> Checkpoint:
    if "units moved" in recorded:
        raise InputError(
            f"recipe: {who} had its units moved on the way; align it again, pi.apply(lmc.open_checkpoint(path))"
        )
    if "path" in recorded:
        checkpoint = open_checkpoint(recorded["path"])
        sizes = {file.name: file.stat().st_size for file in checkpoint.files}
    else:
        checkpoint = _composed(recorded, who)
        sizes = {str(file.resolve()): file.stat().st_size for file in checkpoint.files}
    before = {name: size for name, (size, _) in recorded["files"].items()}
    if sizes != before:
        raise DataError(f"{checkpoint.path}: {who} is not what it was: files and sizes {sizes}, then {before}")
    return checkpoint


def _composed(recorded: Mapping[str, Any], who: str) -> Checkpoint:
    if "stack" in recorded:
        return stack([(path, start, stop) for path, start, stop in recorded["stack"]])
    if "adapter" in recorded:
        return open_checkpoint(recorded["adapter"]).on(open_checkpoint(recorded["on"]))
    raise InputError(f"recipe: {who} was in memory; only checkpoints on disk can be merged again")
