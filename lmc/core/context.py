"""The public doors: inside, torch is in one known state, whatever the caller's is, and warnings point at the caller.

Autocast, `no_grad`, `inference_mode`, `parametrize.cached`, a default dtype or a default device that surround a call are
meant for the caller's own computations. Inside they would change results (a Gram matrix in bfloat16) or end in errors.
"""

import copy
import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lmc.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")

# With a separator at the end: torchvision is not torch.
_HOME, _TORCH = (f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], Path(torch.__file__).parent))
_DTYPES = [torch.float32]  # the default dtypes of callers, the innermost last


def own_context(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function: gradients are on, autocast is off, the defaults are float32 and the CPU; afterwards all
    is as it was. Inference tensors among the arguments, of which autograd can make nothing, are copied, and whole numbers of
    numpy, which torch's generators refuse, are Python's.

    Modules are run under the caller's default dtype, see `callers_dtype`.
    """

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            _enter(stack)
            _check_seed(kwargs.get("seed", 0))
            plain_args = [_plain(value) for value in args]
            plain_kwargs = {name: _plain(value) for name, value in kwargs.items()}
            return function(*plain_args, **plain_kwargs)  # type: ignore[arg-type]

    return inside


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not hasattr(type(seed), "__index__"):
        raise InputError(f"seed={seed!r}: expected a whole number")


def _enter(stack: ExitStack) -> None:
    """Set what is not as it should be; each setting costs more than to look."""
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(False))
    if not torch.is_grad_enabled():
        stack.enter_context(torch.enable_grad())
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    if torch.get_default_device().type != "cpu":
        stack.enter_context(torch.device("cpu"))
    if parametrize._cache_enabled:  # what other weights gave would be used again
        kept = parametrize._cache_enabled, parametrize._cache
        stack.callback(_set_parametrize, *kept)
        _set_parametrize(0, {})
    if (dtype := torch.get_default_dtype()) != torch.float32:
        _DTYPES.append(dtype)
        stack.callback(_DTYPES.pop)
        stack.enter_context(default_dtype(torch.float32))


def _set_parametrize(enabled: int, cache: dict[Any, Any]) -> None:
    parametrize._cache_enabled, parametrize._cache = enabled, cache


def callers_dtype() -> torch.dtype:
    """The default dtype under which the caller's modules were made and are run."""
    return _DTYPES[-1]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Another default dtype inside; it is the same for all threads."""
    before = torch.get_default_dtype()
    if before == dtype:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def forked(device: torch.device, seed: int) -> Iterator[None]:
    """The global random state, from which dropout and initialisation draw, starts at `seed` inside and is as it was afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # torch.manual_seed keeps a stack trace of each call where CUDA sleeps
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _plain(value: Any) -> Any:
    """The value itself, or a copy in which inference tensors are ordinary ones and numpy's whole numbers are Python's."""
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, nn.Module):
        found = [t for t in (*value.parameters(), *value.buffers()) if not is_lazy(t) and t.is_inference()]
        memo = {id(t): nn.Parameter(t.clone()) if isinstance(t, nn.Parameter) else t.clone() for t in found}
        return copy.deepcopy(value, memo) if found else value
    if isinstance(value, dict):  # other mappings may read each tensor from disk
        changed = {key: new for key, old in value.items() if (new := _plain(old)) is not old}
        return {**value, **changed} if changed else value
    if type(value) in (list, tuple):
        new = [_plain(item) for item in value]
        return value if all(x is y for x, y in zip(new, value, strict=True)) else type(value)(new)
    # Looked up without asking the object: one may answer every name, or raise an error of its own.
    if all(inspect.getattr_static(value, name, None) is not None for name in ("train", "test")):
        changed = {key: new for key, old in getattr(value, "__dict__", {}).items() if (new := _plain(old)) is not old}
        if changed:
            value = copy.copy(value)
            vars(value).update(changed)
    return value


def warn(message: str) -> None:
    """A `UserWarning` that points at the line of the caller's which called this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_HOME, _TORCH)):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
