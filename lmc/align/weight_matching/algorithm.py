"""Git Re-Basin's algorithm 1: coordinate descent over groups of interchangeable units (Ainsworth et al. 2023, section 3.2).

    repeat
        for each group of units, in some order:
            C[i, j] = sum over all tensors of <what A's unit i owns, what B's unit j owns>, B as permuted so far
            p = the assignment that maximises sum_i C[i, p[i]];  B's units of the group take the order p
    until no group moves

`Descent.run` is the loop, `visit` its body: the gain, the assignment, the move. What makes it quick is called from there:
`gains` keeps each C up to date while its neighbours move and remembers the prices of its last assignment; `nested` solves
groups within units for all pairs of units; `outwards` chooses a first pass from what is fixed. B is kept permuted, and a
group is visited again only after one that shares a tensor with it has moved.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

from torch import Tensor

from lmc.align.weight_matching.blocks import Shift, UnitBlock
from lmc.align.weight_matching.gains import Gains, Step, inner_product, nested_assignment
from lmc.core.progress import Budget
from lmc.symmetry.groups.action import compose_moves
from lmc.symmetry.spec import PermutationSpec

_INNER_SWEEPS = 10
# Improvements below the rounding of a float32 product are not moves: they could go round in circles.
_ROUNDING = 1e-6


class Descent:
    """One problem: tensors of A, tensors of B (permuted as it goes), and the blocks that may move.

    Attributes:
        state: the tensors of B, permuted by all moves so far.
        pi: the moves so far, composed (groups that are not named have not moved).
        dirty: blocks whose neighbours moved since they were last visited.
        sweeps, visits: how many were made.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        blocks: Sequence[UnitBlock],
        fixed: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        pi: Mapping[str, Tensor] | None = None,
        on_visit: Callable[[], object] | None = None,
    ) -> None:
        self.spec, self.blocks, self.fixed, self.state = spec, blocks, fixed, dict(state)
        self.pi: Step = dict(pi or {})
        self.on_visit = on_visit
        self.dirty = set(range(len(blocks)))
        self.sweeps = self.visits = 0
        self.sharing: dict[str, set[int]] = {}
        for i, block in enumerate(blocks):
            for name in block.tables:
                self.sharing.setdefault(name, set()).add(i)
        self._gains = Gains(blocks, fixed)

    def run(self, max_sweeps: int, *orders: Sequence[int], clock: Budget | None = None) -> "Descent":
        """Sweep over the blocks until none is dirty or time is up, in the given orders by turns (default: as they come)."""
        for order in islice(cycle(orders or [range(len(self.blocks))]), max_sweeps):
            if not self.dirty or (clock is not None and clock.over):
                break
            self.sweep(order)
            self.sweeps += 1
        return self

    def sweep(self, order: Sequence[int]) -> None:
        """Visit each block that is dirty when its turn comes."""
        for i in order:
            if i in self.dirty:
                self.visit(i)

    def grow_outwards(self) -> "Descent":
        """A first pass that matches each block only against what is already matched."""
        for i, settled in outwards(self.blocks, self.sizes()):
            self.visit(i, settled)
        return self

    def sizes(self) -> dict[str, int]:
        """The numbers in each tensor."""
        return {name: self.fixed[name].numel() for name in self.sharing}

    def visit(self, i: int, only: frozenset[str] | None = None) -> None:
        """Move block i to its best place given all others, judged by the tensors `only` (default: all)."""
        self.visits += 1
        if self.on_visit is not None:
            self.on_visit()
        block = self.blocks[i]
        if only is None or only.issuperset(block.tables):
            self.dirty.discard(i)
        if step := self.step(i, only):
            self.move(i, step, linear=not block.quadratic or only is not None)

    def step(self, i: int, only: frozenset[str] | None) -> Step | None:
        """The best step of block i, and of what is nested in it, judged by the tensors `only`; None: it stays."""
        block = self.blocks[i]
        used = [k for k, p in enumerate(block.places) if p.tensor in self.fixed and (only is None or p.tensor in only)]
        if block.inner:
            step, improvement, size = nested_assignment(block, used, self.fixed, self.state, self._solve_inside)
        else:
            index, improvement, size = self.assignment(i, used)
            step = {block.name: index}
        return step if improvement > _ROUNDING * size else None

    def assignment(self, i: int, used: Sequence[int]) -> tuple[Tensor, float, float]:
        """The best permutation of block i by its places `used`, its improvement, and the size of the terms involved."""
        gain = self._gains.of(i, used, self.state)
        index, improvement = self._gains.assign(i, gain)
        return index, improvement, float(gain.diagonal().abs().sum())

    def _solve_inside(
        self, inner: Sequence[UnitBlock], fixed: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> tuple[Step, float]:
        """The same problem inside one pair of units: (moves, optimum)."""
        problem = Descent(self.spec, inner, fixed, state).run(_INNER_SWEEPS)
        return problem.pi, problem.value()

    def move(self, i: int, step: Step, *, linear: bool) -> None:
        """Make a step of block i, and let its neighbours know; a step by a linearised gain only if it really helps."""
        block = self.blocks[i]
        changed = block.move(step, self.state)
        if not linear and not self._improves({name: after for name, (after, _) in changed.items()}):
            return
        if block.quadratic:
            self._gains.forget(i)
            self.dirty.add(i)
        else:
            self._gains.reorder(i, step[block.name])
        for name, (after, shift) in changed.items():
            self._tell_neighbours(i, name, shift, after)
            self.state[name] = after
        self.pi = compose_moves(self.spec, step, self.pi)

    def _tell_neighbours(self, i: int, name: str, shift: Shift | None, after: Tensor) -> None:
        neighbours = self.sharing[name] - {i}
        for j in neighbours:
            self._gains.update(j, name, shift, self.state[name], after)
        self.dirty |= neighbours

    def _improves(self, changed: Mapping[str, Tensor]) -> bool:
        """Whether a move of a group that meets itself in a tensor, whose gain is only a linearisation, really helps."""
        before = inner_product({name: self.fixed[name] for name in changed}, self.state)
        after = inner_product({name: self.fixed[name] for name in changed}, changed)
        return raised(before, after)

    def value(self) -> float:
        """`sum <A, B>`, B as moved so far, in float64."""
        return inner_product(self.fixed, self.state)

    def report(self) -> dict[str, Any]:
        """The numbers of sweeps and visits, and whether it converged."""
        return {"sweeps": self.sweeps, "visits": self.visits, "converged": not self.dirty}


def raised(before: float, after: float) -> bool:
    """Whether a sum has grown by more than its rounding."""
    return after > before + _ROUNDING * abs(before)


def outwards(blocks: Sequence[UnitBlock], sizes: Mapping[str, int]) -> Iterator[tuple[int, frozenset[str] | None]]:
    """A first pass, from what is fixed outwards: the blocks, the best-informed first, each with the tensors that no
    unmatched block shares with it.

    A block is the better informed, the larger the share of its numbers that lies in such tensors; None stands for all
    tensors, where a block has none of its own.
    """
    waiting: dict[str, int] = {}  # for each tensor the blocks on it that are still to come
    for block in blocks:
        for name in block.tables:
            waiting[name] = waiting.get(name, 0) + 1
    todo = dict.fromkeys(range(len(blocks)))

    def settled_share(i: int) -> float:
        tensors = blocks[i].tables
        return sum(sizes[name] for name in tensors if waiting[name] == 1) / sum(sizes[name] for name in tensors)

    while todo:
        i = max(todo, key=settled_share)
        del todo[i]
        yield i, frozenset(name for name in blocks[i].tables if waiting[name] == 1) or None
        for name in blocks[i].tables:
            waiting[name] -= 1
