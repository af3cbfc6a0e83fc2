"""The permutation symmetries of any module: capture its operators, interpret them on units, solve, name the groups, and say
for each axis that does not move which fact ties it."""

import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn
from torch.fx import Node

from lmc.core.progress import tqdm
from lmc.symmetry.discovery.interpret import Facts, gather_facts
from lmc.symmetry.discovery.solve import Fibre, Links, Solution, links, solve
from lmc.symmetry.discovery.tables import Places, conforming
from lmc.symmetry.groups.group import Group, Table
from lmc.symmetry.rules.units import Ids, Units
from lmc.symmetry.tracing.capture import capture
from lmc.symmetry.tracing.graph import Graph, module_path, source_line
from lmc.symmetry.tracing.outputs import Inputs, OutputSelector

Tables = Mapping[str, tuple[Table, ...]]

MANY = 6


def module_of(tensor: str) -> str:
    """The module path of a parameter, with the suffix that distinguishes the parameters of one module (`in_proj`, `cls_token`)."""
    path, _, last = tensor.rpartition(".")
    last = re.sub(r"^(weight|bias|running_mean|running_var|original\d*|weight_[vg])$|[_.]?(weight|bias)$", "", last)
    path = path.replace("parametrizations.", "")
    path = re.sub(r"\.(weight|bias)$", "", path)
    return ".".join(part for part in (path, last) if part)


def base_name(
    tables: Tables, used: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], nested: bool, parent: bool
) -> str:
    """The name of a family, before it is made unique.

    Args:
        tables: of one group of the family.
        used: for each tensor, when it is first used in the network.
        shapes: of the tensors.
        nested: whether the group lives inside units of another group.
        parent: whether other groups live inside its units.
    """
    tensors = sorted(tables, key=lambda name: (used.get(name, len(used)), name))
    first = tensors[0]
    table = tables[first][0]
    modules = [module_of(t) for t in tensors]
    name, many = modules[0], not nested and len(set(modules)) > MANY
    producers = modules[:1] + [module_of(t) for t in tensors if any(0 in table.dims for table in tables[t])]
    stacks = [
        t for t in tensors if len(shapes[t]) == 3 and tables[t][0].dims[0] == 0 and tables[t][0].rows.shape[1] == 1
    ]
    if parent and stacks:
        path = shared_path([module_of(t) for t in stacks])
        return path if path.endswith("experts") else f"{path}.experts".lstrip(".")
    if has_blocks(table) and (parent or not nested):
        path = shared_path(modules) or name
        if sum("att" in m.lower() for m in modules) > len(modules) / 2:
            return f"{path}.heads"
        return f"{path}.stream.blocks" if many else f"{name}.blocks"
    if many:
        return f"{shared_path(producers, share=1)}.stream".lstrip(".")
    if nested and is_fused(first, shapes):
        # a unit of queries and keys has one row or more of each, a unit of values one
        return f"{name}.qk" if table.rows.shape[1] > 1 else f"{name}.v"
    return name


def has_blocks(table: Table) -> bool:
    """Whether units are runs of neighbouring positions."""
    return table.rows.shape[1] > 1 and bool((table.rows[0, 1:] - table.rows[0, :-1] == 1).any())


def is_fused(tensor: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether one tensor holds queries, keys and values together."""
    return bool(re.search(r"qkv|in_proj|c_attn|query_key_value", tensor)) and len(shapes[tensor]) <= 2


def shared_path(modules: Sequence[str], share: float = 0.9) -> str:
    """The longest module path that at least this share of the modules is under."""
    paths: Counter[tuple[str, ...]] = Counter()
    for module in modules:
        parts = tuple(module.split("."))
        paths.update(parts[:k] for k in range(len(parts)))
    common = [path for path, times in paths.items() if times >= share * len(modules)]
    return ".".join(max(common, key=len, default=()))


def safe(name: str) -> str:
    """Only letters, digits, `_`, `.` and `-`."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", name) or "units"


def unique(names: Sequence[str]) -> list[str]:
    """Repeated names get a number."""
    taken: set[str] = set()
    result = []
    for name in names:
        chosen, k = name, 2
        while chosen in taken:
            chosen, k = f"{name}.{k}", k + 1
        taken.add(chosen)
        result.append(chosen)
    return result


@dataclass(frozen=True)
class Discovery:
    """The symmetries found in a module.

    Attributes:
        groups: name -> group, as met along the network, outer groups before the groups within them.
        shapes: name -> shape of every tensor of the state dict.
        buffers: names of persistent buffers (they move with their units, but are statistics, not weights).
        aliases: second names of tied tensors -> the first name (both names have the same tables).
        frozen: (tensor, axis) -> why it does not move, for every axis of size > 1 that does not.
        assumed: values of tensors, with the line that reads them, that decide on a size or a branch in the forward
            pass: the groups are those of the sizes and branches of the example; and the parameters that took no part.
    """

    groups: dict[str, Group]
    shapes: dict[str, tuple[int, ...]]
    buffers: frozenset[str]
    aliases: dict[str, str]
    frozen: dict[tuple[str, int], str]
    assumed: tuple[str, ...] = ()


@dataclass(eq=False)
class Draft:
    """A group in the making: its fibre, tables, the drafts it lives within (with the unit), and its family."""

    fibre: Fibre
    tables: dict[str, tuple[Table, ...]]
    within: list[tuple["Draft", int]] = field(default_factory=list)
    children: int = 0
    name: str = ""
    family: str = ""

    @property
    def index(self) -> tuple[int, ...]:
        """The path of units it lives in, outermost first."""
        return tuple(i for parent, unit in self.within for i in (*parent.index, unit))

    @property
    def depth(self) -> int:
        return 1 + max((parent.depth for parent, _ in self.within), default=-1)


def discover(
    model: nn.Module, example_inputs: Inputs, outputs: OutputSelector = None, *, progress: bool = True
) -> Discovery:
    """Find groups of interchangeable units of a module.

    Every permutation of the units of every group, applied to all tensors that the group touches, leaves the selected
    outputs of the module unchanged. The groups follow from the operators of one forward pass on inputs of the given
    shapes; weights are never read. What is not understood stays frozen.

    Args:
        model: any module (on any device, the meta device included); not changed.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Sizes of at least 2
            for batch and sequence are safest: sizes of 1 hide what depends on them.
        outputs: which outputs must stay the same: a key or attribute, a position, or a function of the model's output;
            by default the output tensor, its `.logits`, or all output tensors.
        progress: show a progress bar when this takes longer than two seconds.

    Raises:
        TraceError: if the forward pass cannot be captured as a graph of operators.
        InputError: if `example_inputs` or `outputs` make no sense.
    """
    with tqdm(total=2, desc="symmetries: capturing the graph", disable=not progress) as bar:
        graph = capture(model, example_inputs, outputs)
        bar.update()
        bar.set_description("symmetries: following units and solving", refresh=False)
        return read_off(graph, progress)


def read_off(graph: Graph, progress: bool = False) -> Discovery:
    """The symmetries of a captured graph: interpret its operators on units, solve, name the groups."""
    facts = gather_facts(graph, progress)
    solution = solve(facts.units, parameter_units(facts))
    drafts = draft_groups(facts, solution)
    shapes = {name: tuple(tensor.shape) for name, tensor in graph.tensors.items()}
    used = first_uses(graph)
    name_drafts(drafts, used, shapes)
    position = {name: k for k, name in enumerate(shapes)}
    drafts.sort(key=lambda d: (_first_use(d, used), d.depth, position[next(iter(d.tables))], d.family, d.index))
    copies: dict[str, list[str]] = {}
    for name, first in graph.aliases.items():
        copies.setdefault(first, []).append(name)
    groups = conforming({d.name: finished(d, used, copies) for d in drafts}, shapes)
    moved = {
        (name, axis)
        for group in groups.values()
        for name, tables in group.tables.items()
        for table in tables
        for axis in table.dims
    }
    frozen = reasons(graph, facts, moved)
    second = {name: first for name, first in graph.aliases.items() if name != first}
    return Discovery(groups, shapes, graph.buffers, second, frozen, assumptions(graph))


def assumptions(graph: Graph) -> tuple[str, ...]:
    """The decisions made by values of the example, and the parameters that therefore had no part."""
    told = dict.fromkeys(graph.read.values())
    if graph.unreached:
        more = f" and {len(graph.unreached) - 2} more" if len(graph.unreached) > 2 else ""
        told[f"that {', '.join(graph.unreached[:2])}{more} have no part"] = None
    return tuple(told)


def parameter_units(facts: Facts) -> np.ndarray:
    """For each unit, whether it is an index of an axis of a parameter."""
    mask = np.zeros(facts.units.total, np.bool_)
    for tag in facts.tags.values():
        for c in tag.coords:
            mask[c] = True
    return mask


def draft_groups(facts: Facts, solution: Solution) -> list[Draft]:
    """Fibres that move parameters and are in use, with the fibres they live in."""
    places = Places(facts.tags, facts.units.total)
    live = facts.units.live_mask()
    drafts: list[Draft] = []
    root: dict[int, tuple[Draft, int]] = {}
    above = parents_of(solution)
    for fibre in solution.fibres:
        if not live[fibre.units].any():
            continue
        tables = places.tables(fibre.units)
        if not tables:
            continue
        draft = Draft(fibre, tables, outer_units(fibre.parents.tolist(), root, above))
        for parent, _ in draft.within:
            parent.children += 1
        drafts.append(draft)
        root.update({unit: (draft, row) for row, unit in enumerate(fibre.roots.tolist())})
    return drafts


def parents_of(solution: Solution) -> Links:
    """For each super-unit, the super-units it lives in."""
    found = solution.structure
    climbs = np.flatnonzero(found.climbs)
    child, parent = found.owner[found.edges.child[climbs]], found.owner[found.edges.parent[climbs]]
    pairs = np.unique(child * found.kind.size + parent)
    above = links(pairs // found.kind.size, found.kind.size)
    return Links((pairs % found.kind.size)[above.items], above.start)


def outer_units(parents: list[int], root: dict[int, tuple[Draft, int]], above: Links) -> list[tuple[Draft, int]]:
    """The units of other groups that super-units live in: the nearest on each way up."""
    found: list[tuple[Draft, int]] = []
    queue, seen = list(parents), set(parents)
    while queue:
        unit = queue.pop(0)
        if unit in root:
            if root[unit] not in found:
                found.append(root[unit])
            continue
        for higher in above.of(np.array([unit])).tolist():
            if higher not in seen:
                seen.add(higher)
                queue.append(higher)
    nested = {(id(p), u) for draft, _ in found for p, u in draft.within}
    return sorted((f for f in found if (id(f[0]), f[1]) not in nested), key=lambda f: int(f[0].fibre.roots[0]))


def first_uses(graph: Graph) -> dict[str, int]:
    """The rank of the first use of each tensor along the network."""
    used: dict[str, int] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for source in node.all_input_nodes:
            leaf = graph.leaves.get(source.name)
            if leaf is not None and leaf.kind in ("parameter", "buffer"):
                used.setdefault(graph.aliases.get(leaf.name, leaf.name), len(used))
    return used


def _first_use(draft: Draft, used: dict[str, int]) -> int:
    return min(used.get(name, len(used)) for name in draft.tables)


def name_drafts(drafts: list[Draft], used: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
    """Families are groups of one class that live in the same outer families; each gets one name."""
    families: dict[tuple[object, ...], list[Draft]] = {}
    keys: dict[int, tuple[object, ...]] = {}
    for draft in drafts:
        outer = tuple(keys[id(parent)] for parent, _ in draft.within)
        keys[id(draft)] = (draft.fibre.kind, outer) if outer else (draft.fibre.kind, id(draft))
        families.setdefault(keys[id(draft)], []).append(draft)
    ordered = sorted(families.values(), key=lambda f: (_first_use(f[0], used), f[0].depth))
    names = [safe(base_name(f[0].tables, used, shapes, bool(f[0].within), f[0].children > 0)) for f in ordered]
    for name, family in zip(unique(names), ordered, strict=True):
        for draft in family:
            draft.family = name
            draft.name = f"{name}[{','.join(map(str, draft.index))}]" if draft.within else name


def finished(draft: Draft, used: dict[str, int], copies: dict[str, list[str]]) -> Group:
    """The public group: tables in order of use, tied tensors under all their names."""
    names = sorted(draft.tables, key=lambda name: used.get(name, len(used)))
    tables = {copy: draft.tables[name] for name in names for copy in copies.get(name, [name])}
    within = tuple((parent.name, unit) for parent, unit in draft.within)
    return Group(draft.name, draft.fibre.roots.size, tables, draft.family, within)


def reasons(graph: Graph, facts: Facts, moved: set[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """A short reason for every axis of size > 1 of a tensor of the state dict on which nothing moves."""
    nearest = nearest_fixed(facts.units)
    live = reached(facts.units)
    result: dict[tuple[str, int], str] = {}
    for name, tensor in graph.tensors.items():
        first = graph.aliases.get(name, name)
        for axis, size in enumerate(tensor.shape):
            if size <= 1 or (name, axis) in moved:
                continue
            units = facts.axes.get((first, axis))
            if units is None:
                result[name, axis] = "integer buffer"
            elif not live[units].any():
                result[name, axis] = "unused for these inputs"
            else:
                result[name, axis] = reason_of(graph, facts.units, units, nearest)
    return result


def reached(units: Units) -> np.ndarray:
    """Units that reach a computation, themselves or through units tied to them."""
    live = units.live_mask().copy()
    before = -1
    while before != (before := int(live.sum())):
        for m in units.maps:
            live[m.child] |= live[m.parent]
            live[m.parent[live[m.child]]] = True
    return live


def reason_of(graph: Graph, units: Units, ids: Ids, nearest: dict[int, tuple[str, int]]) -> str:
    sorts = np.unique(np.searchsorted(np.array(units.starts), ids.ravel(), side="right") - 1)
    found = next((nearest[int(s)] for s in sorts if int(s) in nearest), None)
    if found is None:
        return "no exchange of its indices was found to be free"
    reason, site = found
    node = graph.nodes[site] if site >= 0 else None
    return reason if node is None or reason == "output" else f"{reason} ({where(node)})"


def where(node: Node) -> str:
    """`operator in module, file:line`."""
    op = str(node.target).removeprefix("aten.").partition(".")[0]
    path, line = module_path(node), source_line(node)
    return op + (f" in {path}" if path else "") + (f", {line}" if line else "")


def nearest_fixed(units: Units) -> dict[int, tuple[str, int]]:
    """For each sort, the reason and graph node of the fixed thing that is fewest facts away."""
    starts = np.array(units.starts)
    neighbours: dict[int, list[tuple[int, int]]] = {}
    for m in units.maps:
        child, parent = (np.unique(np.searchsorted(starts, ids, side="right") - 1) for ids in (m.child, m.parent))
        for c in child.tolist():
            for p in parent.tolist():
                neighbours.setdefault(c, []).append((p, m.site))
                neighbours.setdefault(p, []).append((c, m.site))
    found: dict[int, tuple[str, int]] = {}
    queue: deque[int] = deque()
    for s, sort in enumerate(units.sorts):
        if sort.frozen:
            queue.append(s)
            found[s] = (sort.frozen, -2)
    for count in units.counts:
        s = int(np.searchsorted(starts, count.ids[0], side="right")) - 1
        if s not in found:
            found[s] = ("only some indices are used", count.site)
            queue.append(s)
    while queue:
        s = queue.popleft()
        reason, site = found[s]
        for other, at in neighbours.get(s, []):
            if other not in found:
                found[other] = (reason, at if site == -2 else site)
                queue.append(other)
    return found
