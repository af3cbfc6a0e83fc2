"""A module and an example -> the graph of operators, by the first way in that takes it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from lmc.core.context import callers_dtype, default_dtype
from lmc.errors import InputError, TraceError
from lmc.network.network import uncalled
from lmc.symmetry.discovery.tracing.export import export
from lmc.symmetry.discovery.tracing.failures import LAZY, call_of
from lmc.symmetry.discovery.tracing.graph import Graph
from lmc.symmetry.discovery.tracing.record import record
from lmc.symmetry.outputs import Inputs, OutputSelector, as_call


def capture(model: nn.Module, inputs: Inputs, outputs: OutputSelector = None) -> Graph:
    """Trace one forward pass of `model` into a graph of operators.

    Args:
        model: any module; neither its weights nor its modes are changed.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        outputs: which part of the output must stay the same, see `lmc.symmetry.outputs.select`.

    Raises:
        TraceError: if the model rejects the inputs, or its forward pass cannot be captured in either way.
        InputError: if `outputs` makes no sense.
    """
    args, kwargs = on_device_of(model, *as_call(inputs))
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise TraceError(f"cannot trace {call_of(model, args, kwargs)}. {LAZY}")
    with default_dtype(callers_dtype()):
        try:
            return export(uncalled(model, kwargs or args), args, kwargs, outputs)
        except TraceError:
            if not can_run(model):
                raise
            try:
                return record(uncalled(model, kwargs or args), args, kwargs, outputs)
            except InputError:
                raise
            except Exception:
                pass
            raise


def can_run(model: nn.Module) -> bool:
    """Whether a module can be called here and now on real tensors, operator by operator."""
    return not any(p.is_meta for p in model.parameters()) and not any(
        isinstance(m, torch.jit.ScriptModule) for m in model.modules()
    )


def on_device_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For a model without weights (meta device), inputs without values."""
    if not any(t.is_meta for t in model.parameters()):
        return args, kwargs
    return pytree.tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, (args, kwargs))
