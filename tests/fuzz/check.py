"""Run one random program through discovery and hold the result against the program itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from lmc.symmetry.discover import discover
from zoo.certificate import check_tables, error, state_of

from lmc.errors import TraceError
from lmc.symmetry.group import Group

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
        return f"seed {self.program.seed}: error {self.error:.1e}; guilty {list(self.guilty)}; groups {names}\n{self.program.source}"


def outcome(program: Program, trials: int = 2) -> Outcome:
    """Discover, check the tables, permute everything at once `trials` times, on weights drawn for the program."""
    module, inputs = program.module(), program.inputs()
    try:
        groups = tuple(as_list(discover(module, inputs).groups))
    except TraceError as refused:
        return Outcome(program, (), 0.0, untraced=str(refused))
    check_tables(groups, {name: tuple(t.shape) for name, t in state_of(module).items()})
    worst = max(error(module, inputs, groups, seed) for seed in range(trials)) if groups else 0.0
    guilty: Sequence[str] = ()
    if worst > TOLERANCE:
        guilty = [g.name for g in groups if error(module, inputs, [g], 0) > TOLERANCE]
    return Outcome(program, groups, worst, tuple(guilty))


def as_list(groups: object) -> list[Group]:
    return list(groups.values()) if isinstance(groups, dict) else list(groups)  # type: ignore[call-overload]
