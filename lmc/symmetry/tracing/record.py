"""Module -> graph of tensor operators, by recording one run on the real example: the second way in.

For modules that `torch.export` cannot take, because values of inputs, buffers or masks decide on shapes or branches, or
because they do something else while being compiled. Nothing is simulated: the module runs as it does when called, and
the operators that it issues are written down, in-place ones as ordinary ones. Integer inputs stay unknown data for the
rules; only what the run made of them (a size, a branch) is taken as given, and that is kept in `Graph.read`.

Where values decide and parameters had no part in the run (experts that no token was sent to), the module is recorded again
with its weights in other places, until all have had one: a symmetry must hold on every way that was recorded.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functionalize
from torch.fx import Node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lmc.network.network import call_with
from lmc.symmetry.tracing.failures import quiet
from lmc.symmetry.tracing.graph import Graph, Leaf, aliases_of, movable, source_line
from lmc.symmetry.tracing.outputs import OutputSelector, select

FURTHER_RUNS = 12  # at most, each with its own weights


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: OutputSelector) -> Graph:
    """The graph of a module in evaluation mode on real tensors: of one run, or of several where values decide which
    parameters have a part in it. Raises whatever the first run raises."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {name: t if isinstance(t, nn.Parameter) else t.detach().clone() for name, t in state.items()}
    graph = recorded(model, own, args, kwargs, outputs)
    for number in range(FURTHER_RUNS if graph.read else 0):
        if not (missing := without_part(graph)):
            break
        with suppress(Exception):  # other weights may lead where these inputs do not fit
            other = recorded(model, shuffled(own, number), args, kwargs, outputs)
            if not missing <= without_part(other):
                graph = both(graph, other, f"_run{number}")
    return replace(graph, unreached=tuple(sorted(without_part(graph)))) if graph.read else graph


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
        traced = make_fx(functionalize(run), _error_on_data_dependent_ops=False, record_stack_traces=True)(
            dict(weights), [flat[k] for k in where]
        )
    nodes = list(traced.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    sources = [*weights, *where]
    leaves: dict[str, Leaf] = {}
    for node, source in zip(placeholders, sources, strict=True):
        if isinstance(source, int):
            leaves[node.name] = Leaf(
                "input", ".".join(str(getattr(k, "idx", getattr(k, "key", k))) for k in paths[source][0][1:])
            )
        elif source in tensors and movable(tensors[source]):
            kind = "parameter" if isinstance(tensors[source], nn.Parameter) else "buffer"
            leaves[node.name] = Leaf(kind, source)
        else:
            leaves[node.name] = Leaf("constant", source, weights[source])
    for node in nodes:
        if node.op == "get_attr":
            value = getattr(traced, str(node.target))
            literal = all("lift_fresh" in str(user.target) for user in node.users)
            kind = "constant" if literal or value.data_ptr() in kept else "input"
            leaves[node.name] = Leaf(kind, str(node.target), value if kind == "constant" else None)
    results = nodes[-1].args[0]
    buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False) if name in tensors)
    return Graph(nodes, leaves, list(results), [], aliases, tensors, buffers, read_in(nodes))


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
        return values.tolist() if func is Tensor.tolist else values


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

    handles = [h for path, m in model.named_modules() for h in (
        m.register_forward_pre_hook(enter(path, type(m))), m.register_forward_hook(leave, always_call=True),
    )]  # fmt: skip
    with fx_traceback.preserve_node_meta():
        try:
            yield
        finally:
            fx_traceback.current_meta.pop("nn_module_stack", None)
            for handle in handles:
                handle.remove()
