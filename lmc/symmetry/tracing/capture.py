"""Module -> graph of tensor operators: by `torch.export` on fake tensors, else by recording one run.

In an export no weight is read and nothing is computed: the module runs once, with its parameters and example inputs
replaced by fakes that carry shapes only; in-place operators become ordinary ones, and operators for which we have no rule
are decomposed where torch knows how. A module on a GPU, in half precision or on the meta device is captured as it is.

Recorded are modules that `torch.export` cannot take, because they are TorchScript, because values of inputs, buffers or masks
decide on shapes or branches, or because they do something else while being compiled. Nothing is simulated: the module runs as it does when
called, and the operators that it issues are written down, in-place ones as ordinary ones. Integer inputs stay unknown data
for the rules; only what the run made of them (a size, a branch) is taken as given, and that is kept in `Graph.read`.
Where values decide and parameters had no part in the run (experts that no token was sent to), the module is recorded again
with its weights in other places, until all have had one: a symmetry must hold on every way that was recorded.
"""

import keyword
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functionalize
from torch.fx import GraphModule, Interpreter, Node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lmc.core.context import callers_dtype, default_dtype
from lmc.errors import InputError, TraceError
from lmc.network.network import anew, call_with, uncalled
from lmc.symmetry.rules import is_deterministic, is_pointwise, rule_of
from lmc.symmetry.tracing.failures import BY_HAND, Stopped, explained, quiet, stopping
from lmc.symmetry.tracing.graph import PREFIX, Graph, Leaf, aliases_of, module_path, source_line
from lmc.symmetry.tracing.outputs import Inputs, OutputSelector, as_call, select
from lmc.weights.state import inexact

FURTHER_RUNS = 12  # at most, each with its own weights


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: OutputSelector) -> Graph:
    """The graph of a module in evaluation mode on real tensors: of one run, or of several where values decide which
    parameters have a part in it. Raises whatever the first run raises."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {name: t if isinstance(t, nn.Parameter) else t.detach().clone() for name, t in state.items()}
    graph = recorded(model, own, args, kwargs, outputs)
    for number in range(FURTHER_RUNS if decided_by_weights(graph) else 0):
        if not (missing := without_part(graph)):
            break
        with suppress(Exception):  # other weights may lead where these inputs do not fit
            other = recorded(model, shuffled(own, number), args, kwargs, outputs)
            if not missing <= without_part(other):
                graph = both(graph, other, f"_run{number}")
    return replace(graph, unreached=tuple(sorted(without_part(graph)))) if graph.read else graph


def decided_by_weights(graph: Graph) -> bool:
    """Whether values that were read depend on parameters, so that other weights may lead elsewhere."""
    seen: set[Node] = set()
    todo = list(graph.read)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return any((leaf := graph.leaves.get(node.name)) is not None and leaf.kind == "parameter" for node in seen)


def without_part(graph: Graph) -> set[str]:
    """The parameters that no operator takes."""
    taken = {leaf.name for node in graph.nodes if node.users and (leaf := graph.leaves.get(node.name))}
    return {
        name for name, t in graph.tensors.items() if isinstance(t, nn.Parameter) and graph.aliases[name] not in taken
    }


def shuffled(weights: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The numbers of each parameter in other places: of the same size, so that signals survive, but choosing otherwise."""
    generator = torch.Generator().manual_seed(number)

    def moved(tensor: Tensor) -> Tensor:
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return nn.Parameter(tensor.detach().reshape(-1)[order].view(tensor.shape), tensor.requires_grad)

    return {name: moved(t) if isinstance(t, nn.Parameter) else t for name, t in weights.items()}


def both(first: Graph, second: Graph, suffix: str) -> Graph:
    """Two runs side by side, as one graph. The nodes of the second get names of their own."""
    leaves = dict(first.leaves)
    for node in second.nodes:
        leaf = second.leaves.get(node.name)
        node._rename(f"{node.name}{suffix}")
        if leaf is not None:
            leaves[node.name] = leaf
    return replace(
        first,
        nodes=first.nodes + second.nodes,
        leaves=leaves,
        outputs=first.outputs + second.outputs,
        read=first.read | second.read,
    )


def recorded(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: OutputSelector,
) -> Graph:
    """The graph of one run with the given parameters and buffers."""
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    aliases = aliases_of(tensors)
    paths, spec = pytree.tree_flatten_with_path((args, kwargs))
    flat = [value for _, value in paths]
    where = [k for k, value in enumerate(flat) if isinstance(value, Tensor)]

    def run(given: dict[str, Tensor], values: list[Tensor]) -> tuple[Tensor, ...]:
        filled = list(flat)
        for k, value in zip(where, values, strict=True):
            filled[k] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return tuple(select(call_with(model, given, args, kwargs), outputs))

    # tensors that are neither weights nor arguments: attributes and literals are known, what came inside of objects is data
    kept = {t.data_ptr() for m in model.modules() for t in pytree.tree_leaves(vars(m)) if isinstance(t, Tensor)}
    with torch.no_grad(), quiet(), sdpa_kernel(SDPBackend.MATH), modules_noted(model), Lists():
        traced = functional(run, dict(weights), [flat[k] for k in where])
        if any(map(overwrites, traced.graph.nodes)):  # some operators write in place when they are taken apart
            traced = functional(Interpreter(traced).run, dict(weights), [flat[k] for k in where])
    nodes = list(traced.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    sources = [*weights, *where]
    leaves: dict[str, Leaf] = {}
    for node, source in zip(placeholders, sources, strict=True):
        if isinstance(source, int):
            leaves[node.name] = Leaf(
                "input", ".".join(str(getattr(k, "idx", getattr(k, "key", k))) for k in paths[source][0][1:])
            )
        elif source in tensors and inexact(tensors[source]):
            kind = "parameter" if isinstance(tensors[source], nn.Parameter) else "buffer"
            leaves[node.name] = Leaf(kind, source)
        else:
            leaves[node.name] = Leaf("constant", source, weights[source])
    for node in nodes:
        if node.op == "get_attr":
            value = getattr(traced, str(node.target))
            literal = all("lift_fresh" in str(user.target) for user in node.users)
            known = isinstance(value, Tensor) and (literal or value.data_ptr() in kept)  # a generator is not
            leaves[node.name] = Leaf("constant" if known else "input", str(node.target), value if known else None)
    results = nodes[-1].args[0]
    buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False) if name in tensors)
    return Graph(nodes, leaves, list(results), [], aliases, tensors, buffers, read_in(nodes))


def functional(function: Callable[..., Any], weights: dict[str, Tensor], values: list[Tensor]) -> GraphModule:
    """The operators of a function on real tensors, in-place ones as ordinary ones."""
    tracer = make_fx(functionalize(function), _error_on_data_dependent_ops=False, record_stack_traces=True)
    return tracer(weights, values)


def overwrites(node: Node) -> bool:
    """Whether an operator writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def read_in(nodes: list[Node]) -> dict[Node, str]:
    """The nodes whose values were read as numbers, or decided on the size of a result, and what was done with each."""
    found: dict[Node, str] = {}
    for node in nodes:
        tags = getattr(node.target, "tags", ())
        if node.target is torch.ops.aten.index.Tensor:
            indices: Any = node.args[1]
            masks = [i for i in indices if i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8)]
            found |= {mask: f"how many are true in a mask ({source_line(node)})" for mask in masks}
        elif torch.Tag.data_dependent_output in tags:
            found |= {source: f"a number that is read ({source_line(node)})" for source in node.all_input_nodes}
        elif torch.Tag.dynamic_output_shape in tags:
            name = str(node.target).removeprefix("aten.").partition(".")[0]
            found |= {source: f"the size of {name} ({source_line(node)})" for source in node.all_input_nodes}
    return found


class Lists(TorchFunctionMode):
    """Lets tensors that are being recorded become lists and arrays, number by number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (Tensor.tolist, Tensor.numpy):
            return func(*args, **(kwargs or {}))
        values = np.array([number.item() for number in args[0].reshape(-1).unbind()]).reshape(args[0].shape)
        return values.tolist() if func is Tensor.tolist else values.astype(str(args[0].dtype).removeprefix("torch."))


@contextmanager
def modules_noted(model: nn.Module) -> Iterator[None]:
    """Every operator recorded within knows the path of the submodule that issued it."""
    stack: list[dict[str, Any]] = [{}]

    def enter(path: str, kind: type) -> Any:
        def hook(*_: Any) -> None:
            stack.append({**stack[-1], path: (path, kind)})
            fx_traceback.current_meta["nn_module_stack"] = stack[-1]

        return hook

    def leave(*_: Any) -> None:
        stack.pop()
        fx_traceback.current_meta["nn_module_stack"] = stack[-1]

    handles = [h for path, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule) for h in (
        m.register_forward_pre_hook(enter(path, type(m))), m.register_forward_hook(leave, always_call=True),
    )]  # fmt: skip
    with fx_traceback.preserve_node_meta():
        try:
            yield
        finally:
            fx_traceback.current_meta.pop("nn_module_stack", None)
            for handle in handles:
                handle.remove()


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
            refuse_unknown_sizes(model, program)
            if not all(is_understood(node) for node in program.graph.nodes):
                program = program.run_decompositions(decompositions())
        except Exception as error:
            cause = error.__cause__ if isinstance(error, Stopped) and error.__cause__ else error
            if isinstance(cause, InputError | TraceError):
                raise cause from None
            raise explained(model, args, kwargs, cause) from cause
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
    """Whether a node can be interpreted as it is: it has a rule, is pointwise, or is made of nothing that varies, and
    overwrites nothing."""
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    known = rule_of(node.target) is not None or is_pointwise(node.target)
    made = not node.all_input_nodes and is_deterministic(node.target)
    schema = getattr(node.target, "_schema", None)
    return (known or made) and schema is not None and not overwrites(node)


@cache
def decompositions() -> dict[Any, Any]:
    """Decompose only what has no rule: fewer, larger operators are faster to interpret and easier to explain."""
    table = torch.export.default_decompositions()
    return {op: table[op] for op in list(table.keys()) if rule_of(op) is None}


def graph_of(model: nn.Module, program: Any, names: Mapping[str, str]) -> Graph:
    """The exported program in our terms: nodes that matter for the outputs, leaves with names of the state dict."""
    signature = program.graph_signature
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    held = dict(model.named_buffers(remove_duplicate=False))
    leaves: dict[str, Leaf] = {}
    for spec in signature.input_specs:
        kind, target = spec.kind.name, str(spec.target or "").removeprefix(PREFIX)
        target = names.get(target, target)
        if kind in ("PARAMETER", "BUFFER") and target in tensors and inexact(tensors[target]):
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
    return not any(p.is_meta for p in model.parameters())


def on_device_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For a model without weights (meta device), inputs without values."""
    if not any(t.is_meta for t in model.parameters()):
        return args, kwargs
    return pytree.tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, (args, kwargs))
