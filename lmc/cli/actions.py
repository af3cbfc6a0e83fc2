"""The commands, each a function of its arguments; options, methods, architectures and data, read from their text."""

import ast
import ctypes
import gc
import importlib
import inspect as introspect
import json
import operator
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

import lmc.merge
import lmc.weights
from lmc.core.workers import Processes
from lmc.errors import DataError, InputError, nearest
from lmc.weights import StateDict, fitted, tied_names
from lmc.weights.checkpoint import RECIPE, Checkpoint, readable
from lmc.weights.opening import open_checkpoint

if TYPE_CHECKING:
    from lmc.network.task import Task
    from lmc.symmetry.spec import PermutationSpec

SPLITS = ("train_", "test_")
TASKS = ("classes", "segmentation", "regression", "binary", "language", "reconstruction", "own_loss")
NOT_OPTIONS = ("models", "base", "align", "options")
SHARD_SIZE = "5GB"


def value(text: str) -> Any:
    """A number, list, mapping, true, false or null as JSON or Python write them; anything else is text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def options(settings: list[str]) -> dict[str, Any]:
    """`["density=0.2", "scale={\"*\": 1}"]` as keyword arguments; the option `method` names a method."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--set {setting}: expected KEY=VALUE, for example --set density=0.2")
        found[key] = method(text) if key == "method" else value(text)
    return found


def methods() -> dict[str, Any]:
    """The methods of `lmc.merge` that need no data: these merge on disk."""
    found = {name: getattr(lmc.merge, name) for name in lmc.merge.__all__}
    return {name: function for name, function in sorted(found.items()) if hasattr(function, "method")}


def method(name: str) -> Any:
    """A method of `lmc.merge`, or of the user's own as `package.module:function`."""
    if ":" in name:
        return imported(name)
    if name not in methods():
        apart = " (it needs data or whole models: call it in Python)"
        hint = apart if name in lmc.merge.__all__ else nearest(name, methods())
        raise InputError(f"method {name!r} does not merge on disk{hint}; choose from {', '.join(methods())}")
    return methods()[name]


def check_options(
    function: Callable[..., Any],
    given: dict[str, Any],
    skip: tuple[str, ...] = NOT_OPTIONS,
    taken: tuple[str, ...] = (),
) -> None:
    """Raise `InputError` for an option that the function does not have, or that is no number where one is expected; and for
    one of `taken`, which the command itself gives."""
    parameters = introspect.signature(function).parameters
    known = [name for name in parameters if name not in (*skip, *taken)]
    open_ended = any(p.kind is introspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name, value in given.items():
        if name in taken or (name not in known and not open_ended):
            called = getattr(function, "__name__", function)
            raise InputError(f"{called} has no option {name!r}{nearest(name, known)}; it has {known}")
        default = parameters[name].default if name in parameters else None
        if isinstance(default, int) and not isinstance(default, bool) and isinstance(value, str | float | bool | None):
            raise InputError(f"--set {name}: expected a whole number, as {default} is, got {value!r}")
        if isinstance(default, float) and isinstance(value, str | bool | None):
            raise InputError(f"--set {name}: expected a number, as {default:g} is, got {value!r}")


def architecture(text: str) -> nn.Module:
    """The module that `package.module:factory(arguments)` makes; a name without a module is one of `lmc.models`."""
    made = imported(text if ":" in text else f"lmc.models:{text}", call=True)
    if not isinstance(made, nn.Module):
        raise InputError(f"--model {text}: gave a {type(made).__name__}, expected an nn.Module")
    return made.eval()


def data(text: str, task: "Task | None" = None) -> Any:
    """Data by name, with the task that judges them if there is one.

    They are a data set of `lmc.data`, such as `digits` or `digits(flat=False)`; or what a function of the user's own makes,
    such as `package.module:loader(batch_size=64)`; or arrays in an .npz or .safetensors file. These are called `inputs`
    and `targets`, `inputs` alone for a task without targets, or as the arguments of the module and "labels"; each with
    `train_` or `test_` before it where there are two sets.
    """
    if text.endswith((".npz", ".safetensors")):
        found = _sets(_arrays(Path(text)), text, task)
    else:
        found = imported(text if ":" in text else f"lmc.data:{text}", call=True)
    return found if task is None else task.on(found)


def _sets(arrays: dict[str, Tensor], text: str, task: "Task | None") -> Any:
    """Arrays as data: one set, or a training and a test set."""
    from lmc.network.batches import LABELS

    parts = {split: {n.removeprefix(split): t for n, t in arrays.items() if n.startswith(split)} for split in SPLITS}
    if all(parts.values()) and sum(map(len, parts.values())) == len(arrays):
        train, test = (_sets(part, text, task) for part in parts.values())
        return SimpleNamespace(train=train, test=test)
    own_targets = task is not None and task.targets is not None
    if set(arrays) == {"inputs", "targets"}:
        return arrays["inputs"], arrays["targets"]
    if set(arrays) == {"inputs"} and own_targets:
        return arrays["inputs"]
    if not own_targets and not set(arrays) & set(LABELS):
        raise DataError(
            f"{text}: expected arrays inputs and targets, or arguments of the module and labels, each with train_ or test_ "
            f"before it where there are two sets; found {', '.join(arrays)}"
        )
    return arrays


def task(text: str | None) -> "Task | None":
    """A task of `lmc.Task`, such as `regression` or `classes(ignore=255)`; or of the user's own, `package.module:name`: a
    task or a loss, or with arguments a function that makes one."""
    if text is None:
        return None
    if ":" not in text and text.partition("(")[0] not in TASKS:
        raise InputError(f"--task {text}: expected {', '.join(TASKS)}, or package.module:task for one of your own")
    from lmc.network.task import Task

    found = imported(text, call="(" in text) if ":" in text else imported(f"lmc:Task.{text}", call=True)
    return found if isinstance(found, Task) else Task.of((), found)


def imported(text: str, call: bool = False) -> Any:
    """The object `module:name`, or with `call` the result of `module:name(arguments)`; arguments are literals. A name may
    have parts, as in `module:Class.method`."""
    place, _, expression = text.partition(":")
    try:
        tree = ast.parse(expression, mode="eval").body
        node = tree.func if isinstance(tree, ast.Call) else tree
        name = ast.unparse(node)
        if not all(map(str.isidentifier, name.split("."))) or (isinstance(tree, ast.Call) and not call):
            raise ValueError("not a name")
        arguments = [ast.literal_eval(a) for a in tree.args] if isinstance(tree, ast.Call) else []
        keywords = {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords} if isinstance(tree, ast.Call) else {}
    except (ValueError, SyntaxError) as error:
        raise InputError(f"{text!r}: expected module:name" + ("(numbers, texts, lists)" if call else "")) from error
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it
    try:
        found = operator.attrgetter(name)(importlib.import_module(place))
    except (ImportError, AttributeError) as error:
        raise InputError(f"{text!r}: cannot import {name} from {place} ({error})") from error
    try:
        return found(*arguments, **keywords) if call else found
    except TypeError as error:
        raise InputError(f"{text!r}: {error}") from error


def _arrays(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return open_checkpoint(path).load()
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: torch.from_numpy(content[name]) for name in content.files}
    except (OSError, ValueError, TypeError, BadZipFile) as error:
        raise DataError(f"{path}: not an .npz file of plain arrays ({error})") from error


ALIGNERS = {
    "weight_matching": (),
    "activation_matching": ("model", "data"),
    "straight_through_matching": ("model", "data"),
    "sinkhorn_matching": ("model", "data"),
}
GIVEN = ("spec", "model", "a", "b", "data", "inputs", "progress")


def inspect(arguments: Namespace) -> None:
    _check_task(arguments)
    model = architecture(arguments.model) if arguments.model else None
    loaded = data(arguments.data, task(arguments.task)) if arguments.data else None
    found = lmc.merge.inspect(
        arguments.models, base=arguments.base, model=model, data=loaded, progress=not arguments.quiet
    )
    print(found)
    for difference in found.differences:
        print(f"  {difference.name}: {difference.kind}: {', '.join(map(str, difference.found))}")
    if found.barriers is not None:
        unit = f", {found.unit}" if found.unit else ""
        print(f"  barriers{unit}:", np.array2string(found.barriers, precision=3, suppress_small=True).replace("\n", ""))
    if arguments.layers:
        print(f"{'layer':40} {'values':>12} {'norms':30} {'cosine':>7} {'conflict':>8}")
        for layer in found.layers:
            norms = " ".join(f"{norm:.3g}" for norm in layer.norms)
            cosine = layer.cosines[np.triu_indices(len(layer.cosines), 1)]
            mean = float(cosine.mean()) if len(cosine) else float("nan")
            print(f"{layer.name:40} {layer.size:12,} {norms:30} {mean:7.3f} {layer.conflict:8.3f}")


def merge(arguments: Namespace) -> None:
    _keep_memory()
    if arguments.explain:
        print(explain(arguments.explain))
        return
    if not arguments.out:
        raise InputError("say where the result goes: --out FOLDER")
    show = not arguments.quiet
    if arguments.recipe:
        others = (
            arguments.models,
            arguments.base,
            arguments.set,
            arguments.dry_run,
            arguments.dtype,
            arguments.vocabulary,
        )
        if any(others) or arguments.shard_size != SHARD_SIZE:
            raise InputError(
                "a recipe holds everything: --recipe goes with --out, --folder, and METHOD where it is a function of your own"
            )
        own = method(arguments.method) if arguments.method else None
        folders = dict(map(_folder, arguments.folder))
        with _processes(arguments.workers) as executor:
            how: dict[str, Any] = {"executor": executor, "progress": show}
            merged = lmc.merge.replay(arguments.recipe, arguments.out, method=own, folders=folders, **how)
    else:
        if not arguments.method or not arguments.models:
            raise InputError("give a method and at least one model: lmc merge average a/ b/ --out merged/")
        if arguments.folder:
            raise InputError("--folder says where the models of a recipe are: give it with --recipe")
        chosen, settings = method(arguments.method), options(arguments.set)
        check_options(chosen, settings, taken=("base", "align", "dtype", "shard_size", "vocabulary"))
        if arguments.base is None and chosen.method.needs_base:
            raise InputError(f"{arguments.method} needs the model that the others were fine-tuned from: --base FOLDER")
        plan = lmc.merge.plan(
            chosen,
            arguments.models,
            arguments.out,
            base=arguments.base,
            dtype=arguments.dtype,
            shard_size=arguments.shard_size,
            vocabulary=arguments.vocabulary,
            **settings,
        )
        print(plan, flush=True)
        if arguments.dry_run:
            return
        with _processes(arguments.workers) as executor:
            merged = plan.write(executor=executor, progress=show)
    if arguments.save_recipe:
        shutil.copyfile(merged.path / RECIPE, arguments.save_recipe)
    print(merged)


def _processes(count: int) -> AbstractContextManager[Processes | None]:
    """So many processes; one is this one."""
    if count < 1:
        raise InputError(f"--workers {count}: expected at least 1")
    return nullcontext() if count == 1 else Processes(count)


def _keep_memory() -> None:
    """Have the C library keep the memory of chunks that come and go, where it would hand it back and ask for it again; and
    what was imported be no matter of garbage collections."""
    gc.freeze()
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        for parameter, size in ((-3, 1 << 26), (-1, 1 << 29)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            library.mallopt(parameter, size)  # type: ignore[union-attr]


def _folder(text: str) -> tuple[str, str]:
    name, equals, folder = text.rpartition("=")
    if not equals:
        raise InputError(f"--folder {text}: expected NAME=DIR, the name in the recipe and where the model is")
    return name, folder


def extract(arguments: Namespace) -> None:
    chosen, settings = method(arguments.method), options(arguments.set)
    check_options(chosen, settings, taken=("base", "align", "dtype", "rank", "method", "progress"))
    found = lmc.merge.extract(
        arguments.models,
        arguments.out,
        base=arguments.base,
        rank=arguments.rank,
        method=chosen,
        dtype=arguments.dtype,
        progress=not arguments.quiet,
        **settings,
    )
    print(found)
    if arguments.layers:
        for name, rank, error in zip(found.names, found.ranks, found.errors, strict=True):
            print(f"{name:60} rank {rank:4}   relative error {error:.3g}")


def align(arguments: Namespace) -> None:
    import lmc.align
    from lmc.network.derived import derived_names

    _check_task(arguments)
    needs, settings = ALIGNERS[arguments.method], options(arguments.set)
    aligner = getattr(lmc.align, arguments.method)
    check_options(aligner, settings, GIVEN)
    model = architecture(arguments.model) if arguments.model else None
    loaded = data(arguments.data, task(arguments.task)) if arguments.data else None
    if "model" in needs and (model is None or loaded is None):
        raise InputError(f"--method {arguments.method} looks at what the networks do: give --model and --data")
    out = _new(arguments.out)
    spec = _spec(arguments, model, loaded)
    a, b = (_open(path, model) for path in (arguments.a, arguments.b))
    if "model" in needs:
        a, b = (state.load() if isinstance(state, Checkpoint) else state for state in (a, b))
        given: list[Any] = [model, _cast(a, model), _cast(b, model), loaded]
    else:
        given = [a, b]
    kept = out.with_name(f".{out.name}.matching")
    if all(isinstance(one, Checkpoint) and not derived_names(one.outline()) for one in given):
        settings = {"journal": kept} | settings
    pi = aligner(spec, *given, progress=not arguments.quiet, **settings)
    if arguments.save_permutation:
        pi.save(arguments.save_permutation)
    moved = lmc.merge.write(lmc.merge.average, [pi.apply(b)], out, progress=False)
    kept.unlink(missing_ok=True)
    if "bytes_read" in pi.info:
        passes = sum(len(run["passes"]) for run in pi.info["runs"])
        print(
            f"weight matching: {passes} passes, {readable(pi.info['bytes_read'])} read in {pi.info['seconds']:.1f} s, memory "
            f"about {readable(pi.info['memory'])}"
        )
    before, after = lmc.weights.distance(a, b), lmc.weights.distance(a, moved)
    print(f"distance of the weights {before:.4g} before, {after:.4g} after\n{moved}")


def connect(arguments: Namespace) -> None:
    import lmc.align
    from lmc.symmetry.spec import PermutationSpec

    for out in filter(None, (arguments.out, arguments.out_a)):
        _new(out)
    _check_page(arguments.html)
    model, loaded = architecture(arguments.model), data(arguments.data, task(arguments.task))
    a, b = (_cast(_load(path, model), model) for path in (arguments.a, arguments.b))
    spec = PermutationSpec.load(Path(arguments.spec)) if arguments.spec else None
    found = lmc.align.connect(
        model, a, b, loaded, spec=spec, budget=arguments.budget, seed=arguments.seed, progress=not arguments.quiet
    )
    print(found)
    for out, weights in ((arguments.out, found.weights), (arguments.out_a, found.a)):
        if out:
            print(lmc.merge.write(lmc.merge.average, [weights], out, progress=False))
    if arguments.html:
        found.save_html(arguments.html)


def barrier(arguments: Namespace) -> None:
    from lmc.landscape.path import loss_path

    if arguments.alphas < 3 or arguments.alphas % 2 == 0:
        raise InputError(f"--alphas {arguments.alphas}: expected an odd number, so that the middle is among them")
    _check_page(arguments.html)
    model, loaded = architecture(arguments.model), data(arguments.data, task(arguments.task))
    a, b = (_cast(_load(path, model), model) for path in (arguments.a, arguments.b))
    path = loss_path(model, a, b, loaded, alphas=arguments.alphas, progress=not arguments.quiet)
    middle = int(np.argmin(np.abs(path.alphas - 0.5)))
    ends = [int(np.argmin(np.abs(path.alphas - alpha))) for alpha in (0.0, 1.0)]
    for split, measures in path.values.items():
        for name, values in measures.items():
            line = f"{split:6} {name:9} a {values[ends[0]]:.4f}   middle {values[middle]:.4f}   b {values[ends[1]]:.4f}"
            if name == "loss" and path.unit:
                line += f" {path.unit}"
            if name == "loss":
                line += f"   barrier {path.barrier_of('loss', split).value:.4f}"
            elif name == "accuracy":
                line += f"   barrier {path.barrier_of('error', split).value:.2f} percentage points of error"
            print(line)
    if arguments.html:
        path.save_html(arguments.html)


def _new(out: str) -> Path:
    """The path of a folder to make; `InputError` where something is there already, before anything is computed."""
    path = Path(os.path.abspath(out))
    if path.exists() or path.is_symlink():
        raise InputError(f"{path}: exists already; remove it or choose another name")
    return path


def _check_page(file: str | None) -> None:
    """Raise `InputError` where a page could not be written, before anything is computed."""
    if file is not None and not Path(os.path.abspath(file)).parent.is_dir():
        raise InputError(f"--html {file}: there is no folder {Path(os.path.abspath(file)).parent}")


def _check_task(arguments: Namespace) -> None:
    if arguments.task and not arguments.data:
        raise InputError("--task says how data are judged: give --data as well")


def explain(name: str) -> str:
    """Signature and docstring of a method."""
    function = method(name)
    shown = ", ".join(str(p) for p in introspect.signature(function).parameters.values() if p.name != "align")
    return f"{name}({shown})\n\n{introspect.getdoc(function)}"


def catalogue() -> str:
    """The methods with their options, one line each."""
    lines = ["methods, and what --set knows (--explain METHOD prints more):"]
    for name, function in methods().items():
        parameters = introspect.signature(function).parameters.values()
        known = [p for p in parameters if p.name not in NOT_OPTIONS]
        shown = ", ".join(p.name if p.default is p.empty else f"{p.name}={_short(p.default)}" for p in known)
        base = "  needs --base" if function.method.needs_base else ""
        lines.append(f"  {name:20} {shown}{base}")
    return "\n".join(lines)


def _open(path: str, model: torch.nn.Module | None) -> Checkpoint | StateDict:
    """Stored weights, under the names of the architecture; what was unwrapped is printed. They are loaded where names differ
    by more than ties."""
    opened = open_checkpoint(path)
    for note in opened.notes:
        print(f"{path}: {note}")
    if model is None:
        return opened
    first = tied_names(model)
    there = {first.get(name, name): name for name in opened}
    names = {name: name if name in opened else there.get(first.get(name, name), "") for name in model.state_dict()}
    if all(names.values()) and opened.keys() <= names.keys():
        return opened if opened.keys() == names.keys() else opened.under(names)
    return fitted(model, opened.load(), path)


def _load(path: str, model: torch.nn.Module | None) -> StateDict:
    """As `_open`, in memory."""
    found = _open(path, model)
    return found.load() if isinstance(found, Checkpoint) else found


def _cast(weights: StateDict, model: torch.nn.Module | None) -> StateDict:
    """The weights in the architecture's precision, in which they are run; they may be stored in half."""
    own = {} if model is None else model.state_dict()
    return StateDict(((n, t.to(own[n].dtype) if n in own else t) for n, t in weights.items()), like=weights)


def _spec(arguments: Namespace, model: torch.nn.Module | None, loaded: Any) -> "PermutationSpec":
    from lmc.symmetry.find import permutation_spec
    from lmc.symmetry.spec import PermutationSpec

    if arguments.spec:
        return PermutationSpec.load(Path(arguments.spec))
    if model is None:
        raise InputError("which units may move follows from the architecture: give --model, or a saved --spec")
    if loaded is None and not arguments.example:
        raise InputError("--model needs inputs to run on: give --data, or their shape as --example 2,3,32,32")
    return permutation_spec(model, _example(arguments.example, model, loaded), progress=not arguments.quiet)


def _example(sizes: str | None, model: nn.Module, loaded: Any) -> Any:
    from lmc.network.inputs import first_of, input_batches

    if sizes is None:
        return first_of(next(input_batches(model, loaded, 2)), 2)
    try:
        shape = [int(size) for size in sizes.split(",")]
        if min(shape) < 1:
            raise ValueError("no size")
    except ValueError as error:
        raise InputError(f"--example {sizes}: expected sizes such as 2,3,32,32") from error
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _short(default: Any) -> Any:
    return default.__name__ if callable(default) else repr(default)
