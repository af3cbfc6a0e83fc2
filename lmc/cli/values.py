"""Options, methods, architectures and data, read from the text of a command line."""

import ast
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lmc.data
import lmc.merge
from lmc.errors import DataError, InputError
from lmc.weights.opening import open_checkpoint

NOT_OPTIONS = ("models", "base", "align", "options")


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
        hint = " (it needs data or whole models: call it in Python)" if name in lmc.merge.__all__ else ""
        raise InputError(f"method {name!r} does not merge on disk{hint}; choose from {', '.join(methods())}")
    return methods()[name]


def check_options(function: Callable[..., Any], given: dict[str, Any], skip: tuple[str, ...] = NOT_OPTIONS) -> None:
    """Raise `InputError` for an option that the function does not have."""
    parameters = inspect.signature(function).parameters
    known = [name for name in parameters if name not in skip]
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in given:
        if name not in known and not open_ended:
            raise InputError(f"{getattr(function, '__name__', function)} has no option {name!r}; it has {known}")


def architecture(text: str) -> nn.Module:
    """The module that `package.module:factory(arguments)` makes; a name without a module is one of `lmc.models`."""
    made = imported(text if ":" in text else f"lmc.models:{text}", call=True)
    if not isinstance(made, nn.Module):
        raise InputError(f"--model {text}: gave a {type(made).__name__}, expected an nn.Module")
    return made.eval()


def data(text: str) -> Any:
    """A data set of `lmc.data`, such as `digits` or `digits(flat=False)`, or arrays in an .npz or .safetensors file.

    Arrays are called `inputs` and `targets`, or `train_inputs`, `train_targets`, `test_inputs` and `test_targets`.
    """
    if not text.endswith((".npz", ".safetensors")):
        return imported(f"lmc.data:{text}", call=True)
    arrays = _arrays(Path(text))
    if {"inputs", "targets"} <= set(arrays):
        return arrays["inputs"], arrays["targets"]
    names = [f"{split}_{part}" for split in ("train", "test") for part in ("inputs", "targets")]
    if not set(names) <= set(arrays):
        raise DataError(f"{text}: expected arrays inputs and targets, or {', '.join(names)}; found {', '.join(arrays)}")
    train, test = (tuple(arrays[f"{split}_{part}"] for part in ("inputs", "targets")) for split in ("train", "test"))
    return SimpleNamespace(train=train, test=test)


def imported(text: str, call: bool = False) -> Any:
    """The object `module:name`, or with `call` the result of `module:name(arguments)`; arguments are literals."""
    place, _, expression = text.partition(":")
    try:
        tree = ast.parse(expression, mode="eval").body
        node = tree.func if isinstance(tree, ast.Call) else tree
        if not isinstance(node, ast.Name) or (isinstance(tree, ast.Call) and not call):
            raise ValueError("not a name")
        arguments = [ast.literal_eval(a) for a in tree.args] if isinstance(tree, ast.Call) else []
        keywords = {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords} if isinstance(tree, ast.Call) else {}
    except (ValueError, SyntaxError) as error:
        raise InputError(f"{text!r}: expected module:name" + ("(numbers, texts, lists)" if call else "")) from error
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it
    try:
        found = getattr(importlib.import_module(place), node.id)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{text!r}: cannot import {node.id} from {place} ({error})") from error
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
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not an .npz file of plain arrays ({error})") from error
