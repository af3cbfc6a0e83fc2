"""The operators of one forward pass, however they were found."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Node

from lmc.symmetry.tracing.failures import is_user_file, named_lines
from lmc.weights import tied_names

PREFIX = "subject."


@dataclass(frozen=True)
class Leaf:
    """The source of a placeholder of the graph: a parameter, a saved buffer, a constant, or an input."""

    kind: str
    name: str
    value: Tensor | None = None


@dataclass(frozen=True)
class Graph:
    """The operators of one forward pass, in order.

    Attributes:
        nodes: the graph's nodes.
        leaves: for each placeholder, by node name, where it comes from.
        outputs: the nodes whose values must stay the same.
        mutated: (node, buffer name) for buffers that the forward pass overwrites.
        aliases: for each name in the state dict, the first name of the same tensor.
        tensors: the state dict, by reference (not copied).
        buffers: names of persistent buffers.
        read: nodes whose values the forward pass read to decide on a size or a branch, and to what end: the graph is the
            one of these values, so no symmetry may change them.
        unreached: parameters that had no part in any way that values led to on the example.
    """

    nodes: list[Node]
    leaves: dict[str, Leaf]
    outputs: list[Node]
    mutated: list[tuple[Node, str]]
    aliases: dict[str, str]
    tensors: dict[str, Tensor]
    buffers: frozenset[str]
    read: dict[Node, str] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()


def aliases_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name, the first name under which the same memory is known (tied weights)."""
    return {name: name for name in tensors} | tied_names(tensors)


def module_path(node: Node) -> str:
    """The path of the submodule that issued a node."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    path = paths[-1] if paths else ""
    return path.removeprefix("L['self'].").removeprefix(PREFIX).removeprefix(PREFIX[:-1])


def source_line(node: Node) -> str:
    """`file.py:line` of the user's code that issued a node, empty if unknown."""
    frames = [f for f in named_lines(node.meta.get("stack_trace") or "") if is_user_file(f[0])]
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""
