"""Reasons for which an axis does not move: the nearest fact that ties its units to something fixed, with operator and source line."""

from collections import deque

import numpy as np
from torch.fx import Node

from lmc.symmetry.discovery.interpret import Facts
from lmc.symmetry.discovery.solve import Solution
from lmc.symmetry.rules.units import Ids, Units
from lmc.symmetry.tracing.graph import Graph, module_path, source_line


def reasons(graph: Graph, facts: Facts, solution: Solution, moved: set[tuple[str, int]]) -> dict[tuple[str, int], str]:
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
