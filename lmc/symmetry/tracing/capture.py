"""Module -> graph of tensor operators: by `torch.export` on fake tensors, else by recording one run (see `record`).

In an export no weight is read and nothing is computed: the module runs once, with its parameters and example inputs
replaced by fakes that carry shapes only; in-place operators become ordinary ones, and operators for which we have no rule
are decomposed where torch knows how. A module on a GPU, in half precision or on the meta device is captured as it is.
"""

import keyword
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from lmc.core.context import callers_dtype, default_dtype
from lmc.errors import InputError, TraceError
from lmc.network.network import anew, call_with, uncalled
from lmc.symmetry.rules import is_pointwise, rule_of
from lmc.symmetry.tracing.failures import BY_HAND, LAZY, Stopped, call_of, explained, quiet, stopping
from lmc.symmetry.tracing.graph import PREFIX, Graph, Leaf, aliases_of, module_path, movable, source_line
from lmc.symmetry.tracing.outputs import Inputs, OutputSelector, as_call, select
from lmc.symmetry.tracing.record import record


class Selected(nn.Module):
    """A module whose forward returns the chosen output tensors of another, as a flat tuple."""

    def __init__(self, subject: nn.Module, outputs: OutputSelector):
        super().__init__()
        self.subject = subject
        self.outputs = outputs
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with stopping(), anew(self.subject):
            return tuple(select(self.subject(*args, **kwargs), self.outputs))


class Renamed(nn.Module):
    """Like `Selected`, for a module whose tensors must be known under names of ours."""

    def __init__(self, subject: nn.Module, outputs: OutputSelector):
        super().__init__()
        self.hidden = (subject,)
        self.outputs = outputs
        self.training = False
        self.original: dict[str, str] = {}
        saved = subject.state_dict(keep_vars=True)
        for k, (name, tensor) in enumerate(subject.named_parameters()):
            self.original[f"tensor_{k}"] = name
            self.register_parameter(f"tensor_{k}", tensor)
        for k, (name, tensor) in enumerate(subject.named_buffers(), start=len(self.original)):
            self.original[f"tensor_{k}"] = name
            self.register_buffer(f"tensor_{k}", tensor, persistent=name in saved)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        tensors = {name: getattr(self, alias) for alias, name in self.original.items()}
        with stopping():
            return tuple(select(call_with(self.hidden[0], tensors, args, kwargs), self.outputs))


def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: OutputSelector) -> Graph:
    """The graph of a module in evaluation mode.

    Raises:
        TraceError: if the model rejects the inputs, or what it does depends on the values of tensors.
        InputError: if `outputs` makes no sense.
    """
    subject = wrapped(model, outputs)
    with quiet(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        try:
            program = torch.export.export(subject, args, kwargs, strict=False)
            if not all(is_understood(node) for node in program.graph.nodes):
                program = program.run_decompositions(decompositions())
        except Exception as error:
            cause = error.__cause__ if isinstance(error, Stopped) and error.__cause__ else error
            if isinstance(cause, InputError):
                raise cause from None
            raise explained(model, args, kwargs, cause) from cause
    refuse_unknown_sizes(model, program)
    names = subject.original if isinstance(subject, Renamed) else {}
    return graph_of(model, program, names)


def refuse_unknown_sizes(model: nn.Module, program: Any) -> None:
    """Raise `TraceError` for results whose shape depends on the values of tensors (boolean masks, `nonzero`)."""
    for node in program.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and any(not isinstance(n, int) for n in value.shape):
                raise TraceError(
                    f"cannot trace {type(model).__name__}: the shape of the result of {node.target} in "
                    f"{module_path(node) or 'its forward pass'} {source_line(node)} depends on the values of tensors, so "
                    f"there is no fixed graph of operators. {BY_HAND}"
                )


def wrapped(model: nn.Module, outputs: OutputSelector) -> nn.Module:
    """The module to export. Export writes code with the paths of submodules in it, which fails for paths such as
    `branches.in`: those modules are called with their tensors under other names."""
    if any(keyword.iskeyword(part) for name, _ in model.named_modules() for part in name.split(".")):
        return Renamed(model, outputs)
    return Selected(model, outputs)


def is_understood(node: Node) -> bool:
    """Whether a node can be interpreted as it is: it has a rule, or is pointwise, and overwrites nothing."""
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    known = rule_of(node.target) is not None or is_pointwise(node.target)
    schema = getattr(node.target, "_schema", None)
    return known and schema is not None and not schema.is_mutable


def decompositions() -> dict[Any, Any]:
    """Decompose only what has no rule: fewer, larger operators are faster to interpret and easier to explain."""
    table = torch.export.default_decompositions()
    for op in list(table.keys()):
        if rule_of(op) is not None:
            del table[op]
    return table


def graph_of(model: nn.Module, program: Any, names: Mapping[str, str]) -> Graph:
    """The exported program in our terms: nodes that matter for the outputs, leaves with names of the state dict."""
    signature = program.graph_signature
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    held = dict(model.named_buffers(remove_duplicate=False))
    leaves: dict[str, Leaf] = {}
    for spec in signature.input_specs:
        kind, target = spec.kind.name, str(spec.target or "").removeprefix(PREFIX)
        target = names.get(target, target)
        if kind in ("PARAMETER", "BUFFER") and target in tensors and movable(tensors[target]):
            leaves[spec.arg.name] = Leaf("parameter" if kind == "PARAMETER" else "buffer", target)
        elif kind == "USER_INPUT":
            leaves[spec.arg.name] = Leaf("input", input_name(spec.arg.name))
        else:
            value = held.get(target, tensors.get(target, program.constants.get(spec.target)))
            leaves[spec.arg.name] = Leaf("constant", target, value if isinstance(value, Tensor) else None)
    by_name = {node.name: node for node in program.graph.nodes}
    outputs, mutated = [], []
    for spec in signature.output_specs:
        if spec.kind.name == "USER_OUTPUT" and spec.arg.name in by_name:
            outputs.append(by_name[spec.arg.name])
        elif spec.kind.name == "BUFFER_MUTATION":
            target = str(spec.target).removeprefix(PREFIX)
            mutated.append((by_name[spec.arg.name], names.get(target, target)))
    buffers = frozenset(name for name in held if name in tensors)
    return Graph(list(program.graph.nodes), leaves, outputs, mutated, aliases_of(tensors), tensors, buffers)


def input_name(placeholder: str) -> str:
    """`args_0` -> `0`, `kwargs_mask` or `mask` -> `mask`."""
    return re.sub(r"^(args|kwargs)_", "", placeholder)


def capture(model: nn.Module, inputs: Inputs, outputs: OutputSelector = None) -> Graph:
    """Trace one forward pass of `model` into a graph of operators.

    Args:
        model: any module; neither its weights nor its modes are changed.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        outputs: which part of the output must stay the same, see `lmc.symmetry.tracing.outputs.select`.

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
