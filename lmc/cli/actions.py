"""The commands, each a function of its arguments."""

import inspect as introspect
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lmc.align
import lmc.merge
import lmc.weights
from lmc.cli.values import NOT_OPTIONS, architecture, check_options, data, method, methods, options
from lmc.errors import InputError
from lmc.landscape.path import loss_path
from lmc.symmetry.find import permutation_spec
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import StateDict, fitted
from lmc.weights.checkpoint import RECIPE
from lmc.weights.opening import open_checkpoint

ALIGNERS = {
    "weight_matching": (),
    "activation_matching": ("model", "data"),
    "straight_through_matching": ("model", "data"),
    "sinkhorn_matching": ("model", "data"),
}
GIVEN = ("spec", "model", "a", "b", "data", "inputs", "progress")


def inspect(arguments: Namespace) -> None:
    model = architecture(arguments.model) if arguments.model else None
    loaded = data(arguments.data) if arguments.data else None
    found = lmc.merge.inspect(
        arguments.models, base=arguments.base, model=model, data=loaded, progress=not arguments.quiet
    )
    print(found)
    for difference in found.differences:
        print(f"  {difference.name}: {difference.kind}: {', '.join(map(str, difference.found))}")
    if found.barriers is not None:
        print("  barriers, nats:", np.array2string(found.barriers, precision=3, suppress_small=True).replace("\n", ""))
    if arguments.layers:
        print(f"{'layer':40} {'values':>12} {'norms':30} {'cosine':>7} {'conflict':>8}")
        for layer in found.layers:
            norms = " ".join(f"{norm:.3g}" for norm in layer.norms)
            cosine = layer.cosines[np.triu_indices(len(layer.cosines), 1)]
            mean = float(cosine.mean()) if len(cosine) else float("nan")
            print(f"{layer.name:40} {layer.size:12,} {norms:30} {mean:7.3f} {layer.conflict:8.3f}")


def merge(arguments: Namespace) -> None:
    if arguments.explain:
        print(explain(arguments.explain))
        return
    if not arguments.out:
        raise InputError("say where the result goes: --out FOLDER")
    show = not arguments.quiet
    if arguments.recipe:
        if arguments.models or arguments.base or arguments.set or arguments.dry_run or arguments.dtype:
            raise InputError(
                "a recipe holds everything: --recipe goes with --out, and METHOD where it is a function of your own"
            )
        own = method(arguments.method) if arguments.method else None
        merged = lmc.merge.replay(arguments.recipe, arguments.out, method=own, progress=show)
    else:
        if not arguments.method or not arguments.models:
            raise InputError("give a method and at least one model: lmc merge average a/ b/ --out merged/")
        chosen, settings = method(arguments.method), options(arguments.set)
        check_options(chosen, settings)
        if arguments.base is None and chosen.method.needs_base:
            raise InputError(f"{arguments.method} needs the model that the others were fine-tuned from: --base FOLDER")
        plan = lmc.merge.plan(
            chosen,
            arguments.models,
            arguments.out,
            base=arguments.base,
            dtype=arguments.dtype,
            shard_size=arguments.shard_size,
            **settings,
        )
        print(plan, flush=True)
        if arguments.dry_run:
            return
        merged = plan.write(progress=show)
    if arguments.save_recipe:
        shutil.copyfile(merged.path / RECIPE, arguments.save_recipe)
    print(merged)


def align(arguments: Namespace) -> None:
    needs, settings = ALIGNERS[arguments.method], options(arguments.set)
    aligner = getattr(lmc.align, arguments.method)
    check_options(aligner, settings, GIVEN)
    model = architecture(arguments.model) if arguments.model else None
    loaded = data(arguments.data) if arguments.data else None
    if "model" in needs and (model is None or loaded is None):
        raise InputError(f"--method {arguments.method} looks at what the networks do: give --model and --data")
    spec = _spec(arguments, model, loaded)
    a, b = (_load(path, model) for path in (arguments.a, arguments.b))
    given: list[Any] = [model, _cast(a, model), _cast(b, model), loaded] if "model" in needs else [a, b]
    pi = aligner(spec, *given, progress=not arguments.quiet, **settings)
    moved = lmc.merge.write(lmc.merge.average, [pi.apply(b)], arguments.out, progress=False)
    if arguments.save_permutation:
        pi.save(arguments.save_permutation)
    before, after = lmc.weights.distance(a, b), lmc.weights.distance(a, moved)
    print(f"distance of the weights {before:.4g} before, {after:.4g} after\n{moved}")


def barrier(arguments: Namespace) -> None:
    if arguments.alphas < 3 or arguments.alphas % 2 == 0:
        raise InputError(f"--alphas {arguments.alphas}: expected an odd number, so that the middle is among them")
    model, loaded = architecture(arguments.model), data(arguments.data)
    a, b = (_cast(_load(path, model), model) for path in (arguments.a, arguments.b))
    path = loss_path(model, a, b, loaded, alphas=arguments.alphas, progress=not arguments.quiet)
    middle = int(np.argmin(np.abs(path.alphas - 0.5)))
    ends = [int(np.argmin(np.abs(path.alphas - alpha))) for alpha in (0.0, 1.0)]
    for split, measures in path.values.items():
        for name, values in measures.items():
            line = f"{split:6} {name:9} a {values[ends[0]]:.4f}   middle {values[middle]:.4f}   b {values[ends[1]]:.4f}"
            if name == "loss":
                line += f"   barrier {path.barrier_of('loss', split).value:.4f}"
            elif name == "accuracy":
                line += f"   barrier {path.barrier_of('error', split).value:.2f} percentage points of error"
            print(line)
    if arguments.html:
        path.save_html(arguments.html)


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


def _load(path: str, model: torch.nn.Module | None) -> StateDict:
    """Stored weights, under the names of the architecture; what was unwrapped is printed."""
    opened = open_checkpoint(path)
    for note in opened.notes:
        print(f"{path}: {note}")
    return opened.load() if model is None else fitted(model, opened.load(), path)


def _cast(weights: StateDict, model: torch.nn.Module | None) -> StateDict:
    """The weights in the architecture's precision, in which they are run; they may be stored in half."""
    own = {} if model is None else model.state_dict()
    return StateDict(((n, t.to(own[n].dtype) if n in own else t) for n, t in weights.items()), like=weights)


def _spec(arguments: Namespace, model: torch.nn.Module | None, loaded: Any) -> PermutationSpec:
    if arguments.spec:
        return PermutationSpec.load(Path(arguments.spec))
    if model is None:
        raise InputError("which units may move follows from the architecture: give --model, or a saved --spec")
    if loaded is None and not arguments.example:
        raise InputError("--model needs inputs to run on: give --data, or their shape as --example 2,3,32,32")
    return permutation_spec(model, _example(arguments.example, loaded), progress=not arguments.quiet)


def _example(sizes: str | None, loaded: Any) -> Tensor:
    if sizes is None:
        inputs = (loaded.train if hasattr(loaded, "train") else loaded)[0]
        return inputs[:2]
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError as error:
        raise InputError(f"--example {sizes}: expected sizes such as 2,3,32,32") from error
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _short(default: Any) -> Any:
    return default.__name__ if callable(default) else repr(default)
