"""Run the rules over a graph: tags for every tensor, facts about the units in the ledger."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from lmc.core.progress import tqdm
from lmc.errors import TraceError
from lmc.symmetry.discovery.provenance import Piece, chooses_without_ties, piece_tag, pieces, sorted_runs
from lmc.symmetry.rules import core, interpret, is_deterministic
from lmc.symmetry.rules.chosen import settle
from lmc.symmetry.rules.indexing import run_of
from lmc.symmetry.rules.registry import Op, Parts, fixed, is_operand, operands_in
from lmc.symmetry.rules.tags import Tag, along, make, shrink
from lmc.symmetry.rules.units import Ids, Units
from lmc.symmetry.tracing.failures import BY_HAND, first_line
from lmc.symmetry.tracing.graph import Graph, Leaf, module_path, source_line
from lmc.weights.state import inexact

LARGEST_CONSTANT = 1 << 24
FILLS = ("aten.zeros", "aten.ones", "aten.full", "aten.scalar_tensor", "aten.empty")  # one number everywhere


@dataclass(frozen=True)
class Facts:
    """The facts after interpreting a graph: the ledger, the tag of every parameter and persistent buffer, and the units
    of each of their axes."""

    units: Units
    tags: dict[str, Tag]
    axes: dict[tuple[str, int], Ids]


def gather_facts(graph: Graph, progress: bool) -> Facts:
    """Interpret every node that the outputs depend on; nothing moves on the outputs themselves."""
    facts, known = interpret_nodes(graph, progress)
    facts.units.site = -1
    for node in graph.outputs:
        core.freeze(facts.units, settle(facts.units, known[node]), "output")
    for node in graph.read:
        if is_operand(known.get(node)):
            core.freeze(facts.units, settle(facts.units, known[node]), "value that decides on a size or a branch")
    for node, name in graph.mutated:
        buffer = facts.tags.get(graph.aliases.get(name, name))
        if buffer is not None and is_operand(known.get(node)):
            core.pointwise(facts.units, buffer.shape, [settle(facts.units, known[node]), buffer])
    return facts


def interpret_nodes(graph: Graph, progress: bool) -> tuple[Facts, dict[Node, Any]]:
    """Tags for the parameters and for the result of every node that matters."""
    units = Units()
    tags, axes = parameter_tags(units, graph)
    known: dict[Node, Any] = {}
    direct, runs = pieces(graph.nodes), sorted_runs(graph)
    wanted = needed(graph, direct)
    for number, node in enumerate(tqdm(graph.nodes, "units", disable=not progress)):
        units.site = number
        if node.name not in graph.leaves and (node.op != "call_function" or node not in wanted):
            continue
        try:
            if node.name in graph.leaves:
                known[node] = leaf_tag(units, graph.leaves[node.name], node, tags, graph)
            elif node in direct:
                part = settle(units, known[direct[node].part])
                known[node] = piece_tag(units, part, direct[node], tuple(node.meta["val"].shape))
            else:
                known[node] = call(units, node, known, chooses_without_ties(graph, node))
            if node in runs:
                rows, experts = runs[node]
                known[node] = run_of(units, known[node], rows.name, experts)
        except Exception as error:
            raise TraceError(
                f"cannot follow units through {node.target} in {module_path(node) or 'the forward pass'} "
                f"{source_line(node)}: {type(error).__name__}: {first_line(error)}. {BY_HAND}"
            ) from error
    return Facts(units, tags, axes), known


def parameter_tags(units: Units, graph: Graph) -> tuple[dict[str, Tag], dict[tuple[str, int], Ids]]:
    """A tag for every parameter and saved floating-point buffer, and the units of each of their axes."""
    grouped = grouped_weights(graph)
    stacks = stacked_shapes(graph, grouped)
    rows = {(s[0], s[1]) for s in stacks} | {(s[0], s[2]) for s in stacks}
    tags: dict[str, Tag] = {}
    axes: dict[tuple[str, int], Ids] = {}
    for name, tensor in graph.tensors.items():
        shape = tuple(tensor.shape)
        if graph.aliases.get(name) == name and inexact(tensor):
            coords = parameter_coords(units, shape, grouped.get(name, 0), shape in rows)
            axes.update({(name, d): c for d, c in coords.items()})
            tags[name] = make(units, shape, list(coords.values()))
    return tags, axes


def needed(graph: Graph, direct: dict[Node, Piece]) -> set[Node]:
    """The nodes that outputs and overwritten buffers depend on."""
    stack = [*graph.outputs, *graph.read, *(node for node, _ in graph.mutated)]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            sources = [direct[node].part] if node in direct else node.all_input_nodes
            stack += [] if takes_shape_only(node) else sources
    return seen


def takes_shape_only(node: Node) -> bool:
    """Whether an operator looks at the shape of its operands only, such as `zeros_like`."""
    name = str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")
    return name.endswith("_like") or name.startswith("new_")


def stacked_shapes(graph: Graph, grouped: dict[str, int]) -> list[tuple[int, ...]]:
    """Shapes of three-dimensional parameters that are not weights of convolutions: stacks of matrices."""
    shapes = [tuple(t.shape) for name, t in graph.tensors.items() if graph.aliases.get(name) not in grouped]
    return [shape for shape in shapes if len(shape) == 3 and shape[0] > 1]


def parameter_coords(units: Units, shape: tuple[int, ...], groups: int, is_row_of_stack: bool) -> dict[int, Ids]:
    """A unit for each index of each axis. Two finer choices where more may move: the inner axis of a grouped
    convolution has units of its own for each group, and the axes of a stack of matrices (experts, heads), and of the
    stack of their biases, have units of their own for each index of the first axis."""
    ndim = len(shape)
    stacked = groups == 0 and shape[:1] > (1,) and (ndim == 3 or is_row_of_stack)
    coords: dict[int, Ids] = {}
    for d, n in enumerate(shape):
        if n == 1:
            continue
        if d == 1 and groups > 1:
            inner = units.fresh(groups * n).reshape(groups, n)
            coords[d] = np.repeat(inner, shape[0] // groups, axis=0).reshape(shape[:2] + (1,) * (ndim - 2))
        elif d > 0 and stacked:
            own = tuple(m if e in (0, d) else 1 for e, m in enumerate(shape))
            coords[d] = units.fresh(shape[0] * n).reshape(own)
        else:
            coords[d] = along(units.fresh(n), d, ndim)
    return coords


def grouped_weights(graph: Graph) -> dict[str, int]:
    """The number of groups of every parameter that is the weight of a convolution, possibly after steps that keep its
    shape (weight norm)."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        name = str(node.target)
        if not name.startswith("aten.conv") or len(node.args) < 2 or not isinstance(node.args[1], Node):
            continue
        at = 8 if name.startswith("aten.convolution") else 6
        groups = node.args[at] if len(node.args) > at else 1
        for source in sources_of_shape(node.args[1]):
            leaf = graph.leaves.get(source.name)
            if leaf is not None and leaf.kind == "parameter" and isinstance(groups, int):
                found[graph.aliases.get(leaf.name, leaf.name)] = groups
    return found


def sources_of_shape(node: Node, most: int = 16) -> list[Node]:
    """The placeholders of the same shape that a node comes from, within a few steps."""
    stack, seen, found = [node], {node}, []
    while stack:
        source = stack.pop()
        if source.op == "placeholder" and source.meta["val"].shape == node.meta["val"].shape:
            found.append(source)
        fresh = [s for s in source.all_input_nodes if s not in seen] if len(seen) < most else []
        seen.update(fresh)
        stack += fresh
    return found


def leaf_tag(units: Units, leaf: Leaf, node: Node, tags: dict[str, Tag], graph: Graph) -> Tag:
    if leaf.kind in ("parameter", "buffer"):
        return tags[graph.aliases.get(leaf.name, leaf.name)]
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return Tag(())
    shape = tuple(int(n) for n in value.shape)
    if leaf.kind == "input":
        return core.still(units, shape, f"input {leaf.name}")
    real = leaf.value
    if real is None or real.is_meta or type(real) not in (Tensor, torch.nn.Parameter):
        return Tag(shape, core.still(units, shape, f"constant {leaf.name}").coords, constant=True)
    return constant_tag(units, real.detach().cpu(), f"constant {leaf.name}")


def constant_tag(units: Units, value: Tensor, reason: str) -> Tag:
    """A known tensor: indices along a dim with equal slices need not be told apart."""
    shape = tuple(value.shape)
    if value.numel() > LARGEST_CONSTANT:
        return Tag(shape, core.still(units, shape, reason).coords, constant=True)
    coords = [
        along(units.frozen(reason, n)[slice_classes(value, d)], d, len(shape))
        for d, n in enumerate(shape)
        if n > 1 and value.numel()
    ]
    return Tag(shape, tuple(c for c in map(shrink, coords) if c.size > 1), value=value, constant=True)


def slice_classes(value: Tensor, dim: int) -> np.ndarray:
    """Number the indices along `dim` so that equal slices get equal numbers (the first index of each)."""
    rows = value.movedim(dim, 0).reshape(value.shape[dim], -1)
    first: dict[bytes, int] = {}
    if inexact(rows):
        rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
        data = rows.double().numpy()
    else:
        data = rows.numpy()
    data = np.ascontiguousarray(data)
    return np.array([first.setdefault(data[i].tobytes(), i) for i in range(data.shape[0])], np.int64)


def call(units: Units, node: Node, known: dict[Node, Any], differ: bool) -> Any:
    """The tag (or tuple of tags) of one operator's result."""
    args, kwargs = pytree.tree_map(
        lambda a: known.get(a, a) if isinstance(a, Node) else a,
        (tuple(node.args), dict(node.kwargs)),
        is_leaf=lambda a: isinstance(a, Node),
    )
    if getattr(node.target, "__name__", "") == "getitem":
        return args[0][args[1]] if isinstance(args[0], (tuple, Parts)) else args[0]
    values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    shapes = tuple(tuple(int(n) for n in v.shape) for v in values)
    inputs = operands_in((args, kwargs))
    if not shapes:
        for tag in inputs if torch.Tag.data_dependent_output in getattr(node.target, "tags", ()) else ():
            core.freeze(units, settle(units, tag), "value that is read as a number")
        return Tag(())
    if (
        all(isinstance(t, Tag) and t.constant for t in inputs)
        and is_deterministic(node.target)
        and not takes_shape_only(node)
    ):
        return evaluated(units, node, args, kwargs, shapes)
    result = interpret(Op(units, node.target, shapes, differ, masks_in(node), layout_of(node)), args, kwargs)
    if isinstance(result, Tag) and result.points is not None and not told_apart(result.points.size, values[0].dtype):
        return fixed(units, result)
    return result


def told_apart(count: int, dtype: torch.dtype) -> bool:
    """Whether numbers 0 ... count - 1 are still themselves in a dtype, as they are not where they become true or false."""
    numbers = torch.arange(count)
    return bool((numbers.to(dtype).to(numbers.dtype) == numbers).all())


def masks_in(node: Node) -> frozenset[int]:
    """The places of the masks among the indices of an indexing operator."""
    indices = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], (list, tuple)) else ()
    return frozenset(
        number
        for number, index in enumerate(indices)
        if isinstance(index, Node) and index.meta["val"].dtype in (torch.bool, torch.uint8)
    )


def layout_of(node: Node) -> tuple[tuple[int, ...], int]:
    """The strides and the offset of the first operand of a node."""
    value = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], Node) else None
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return (), 0
    return tuple(map(int, value.stride())), int(value.storage_offset())


def evaluated(units: Units, node: Node, args: Any, kwargs: Any, shapes: tuple[tuple[int, ...], ...]) -> Any:
    """An operator on known tensors is computed, so that later operators know indices and masks. Floating-point numbers
    computed from the shapes traced (angles of a rotary embedding) may be equal at these shapes only: their coordinates
    come from the rules, not from the values."""
    reason = f"constant computed by {node.target}"
    values = computed_values(node, args, kwargs, shapes)
    if str(node.target).startswith(FILLS):
        by_rule: Any = tuple(Tag(s) for s in shapes)
    elif not operands_in((args, kwargs)):
        by_rule = tuple(core.still(units, s, reason) for s in shapes)
    else:
        by_rule = interpret(Op(units, node.target, shapes, masks=masks_in(node), layout=layout_of(node)), args, kwargs)
    parts = [
        settle(units, by_rule if len(shapes) == 1 and is_operand(by_rule) else by_rule[k]) for k in range(len(shapes))
    ]
    tags = tuple(
        replace(part, constant=True, points=None, value=value)
        if value is None or inexact(value)
        else constant_tag(units, value, reason)
        for part, value in zip(parts, values, strict=True)
    )
    return tags[0] if len(tags) == 1 else tags


def computed_values(node: Node, args: Any, kwargs: Any, shapes: tuple[tuple[int, ...], ...]) -> list[Tensor | None]:
    """The values of a constant operator, none where they are unknown (no data on the meta device) or huge."""
    small = all(np.prod(s, dtype=float) <= LARGEST_CONSTANT for s in shapes)
    if not small or any(not isinstance(t, Tag) or t.value is None for t in operands_in((args, kwargs))):
        return [None] * len(shapes)
    args, kwargs = pytree.tree_map(known_value, (args, kwargs), is_leaf=is_operand)
    target: Any = node.target
    with torch.no_grad():
        result = target(*args, **kwargs)
    return [r for r in pytree.tree_leaves(result) if isinstance(r, Tensor)]


def known_value(value: Any) -> Any:
    """An argument for computing constants, here on the CPU."""
    if isinstance(value, Tag):
        return value.value
    return torch.device("cpu") if isinstance(value, torch.device) else value
