"""Run random programs through discovery and hold the result against the programs themselves."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from zoo.certificate import check_tables, error, state_of

from lmc.errors import TraceError
from lmc.symmetry.discovery.discover import read_off
from lmc.symmetry.groups.group import Group
from lmc.symmetry.rules import is_pointwise, rule_of
from lmc.symmetry.rules.registry import all_pointwise
from lmc.symmetry.tracing.capture import capture

from .program import Program

TOLERANCE = 1e-8


@dataclass(frozen=True)
class Outcome:
    """What discovery made of a program.

    Attributes:
        groups: the groups found; empty if the program could not be traced.
        error: relative change of the output under random permutations of all groups, in float64.
        guilty: the groups that change the output on their own, if the error is too large.
        untraced: why there is no graph, else "".
    """

    program: Program
    groups: tuple[Group, ...]
    error: float
    guilty: tuple[str, ...] = ()
    untraced: str = ""

    @property
    def sound(self) -> bool:
        return self.error <= TOLERANCE

    @property
    def log10_order(self) -> float:
        return sum(group.log10_order for group in self.groups)

    def __str__(self) -> str:
        names = ", ".join(f"{g.name}({g.size}): {sorted(g.tables)}" for g in self.groups)
        head = f"seed {self.program.seed}: error {self.error:.1e}; guilty {list(self.guilty)}; groups {names}"
        return f"{head}\n{self.program.source}"


class SideBySide(nn.Module):
    """Several programs in one module, each with its own input and output: tracing has a price per module."""

    def __init__(self, programs: Sequence[Program]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(program.module() for program in programs)

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        return tuple(part(x) for part, x in zip(self.parts, inputs, strict=True))


def outcomes(
    programs: Sequence[Program], trials: int = 2, met: Counter[tuple[str, str]] | None = None
) -> list[Outcome]:
    """One outcome per program. They are traced together; if that fails, one by one, to tell which cannot be traced.
    `met` counts the nodes that each rule was used for, by rule and form of the arguments."""
    try:
        graph = capture(SideBySide(programs), tuple(program.inputs() for program in programs))
        found = read_off(graph)
    except TraceError as refused:
        if len(programs) == 1:
            return [Outcome(programs[0], (), 0.0, untraced=str(refused))]
        return [outcome for program in programs for outcome in outcomes([program], trials, met)]
    if met is not None:
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        met.update((name, form(node)) for node in nodes if (name := rule_name(node.target)))
    own: list[list[Group]] = [[] for _ in programs]
    for group in found.groups.values():
        (number,) = {int(name.split(".")[1]) for name in group.tables}  # no group spans two programs
        tables = {name.split(".", 2)[2]: table for name, table in group.tables.items()}
        own[number].append(replace(group, tables=tables))
    return [certified(program, groups, trials) for program, groups in zip(programs, own, strict=True)]


def rule_name(target: Any) -> str:
    """`module.function` of the rule of an operator, empty if it has none."""
    rule = rule_of(target) or (all_pointwise if is_pointwise(target) else None)
    return "" if rule is None else f"{rule.__module__.rpartition('.')[2]}.{rule.__name__}"


def form(node: Node) -> str:
    """How a node calls its operator: the kinds of its positional arguments and the names of the others."""
    return ", ".join([*map(kind, node.args), *node.kwargs])


def kind(argument: Any) -> str:
    """The number of axes of a tensor, the sign of a number; others as they are."""
    if isinstance(argument, Node):
        value = argument.meta.get("val")
        return f"{value.dim()}d" if isinstance(value, Tensor) else "?"
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(kind, argument))}]"
    if isinstance(argument, bool) or not isinstance(argument, int | float):
        return str(argument)
    return "0" if argument == 0 else "+" if argument > 0 else "-"


def certified(program: Program, groups: Sequence[Group], trials: int) -> Outcome:
    """Check the tables, and permute everything at once `trials` times."""
    module, inputs = program.module(), program.inputs()
    check_tables(groups, {name: tuple(t.shape) for name, t in state_of(module).items()})
    worst = max((error(module, inputs, groups, seed) for seed in range(trials)), default=0.0) if groups else 0.0
    guilty: Sequence[str] = ()
    if worst > TOLERANCE:
        guilty = [g.name for g in groups if error(module, inputs, [replace(g, within=())], 0) > TOLERANCE]
    return Outcome(program, tuple(groups), worst, tuple(guilty))


def outcome(program: Program, trials: int = 2) -> Outcome:
    """The outcome of one program."""
    return outcomes([program], trials)[0]
