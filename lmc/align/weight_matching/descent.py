"""Coordinate descent over blocks of interchangeable units: the engine under weight matching.

B is kept permuted. A block is visited by a linear assignment over its gain matrix, and again only after one that shares
a tensor with it has changed.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lmc.align.weight_matching.assignment import assign
from lmc.align.weight_matching.blocks import Shift, UnitBlock, sub_tensor
from lmc.align.weight_matching.gains import Gains
from lmc.align.weight_matching.nested import Solutions, Step, separate_pairs
from lmc.symmetry.actions import compose_moves
from lmc.symmetry.spec import PermutationSpec

_INNER_SWEEPS = 10
# Improvements below the rounding of a float32 product are not moves: they could go round in circles.
_ROUNDING = 1e-6
_PIECE = 1 << 18


class Descent:
    """One problem: tensors of A, tensors of B (moved as it goes), and the blocks that may move.

    Attributes:
        state: the tensors of B, permuted by all moves so far.
        pi: the moves so far, composed (groups that are not named have not moved).
        dirty: blocks whose surroundings changed since they were last visited.
        visits: number of blocks visited.
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
        self.visits = 0
        self._gains = Gains(blocks, fixed)
        self._sharing: dict[str, set[int]] = {}
        for i, block in enumerate(blocks):
            for name in block.tables:
                self._sharing.setdefault(name, set()).add(i)

    def sweep(self, order: Sequence[int]) -> None:
        """Visit, in order, every block whose surroundings changed since its last visit."""
        for i in order:
            if i in self.dirty:
                self.visit(i)

    def grow_outwards(self) -> None:
        """A first pass that matches each block only against what is already matched, the best-informed block first."""
        waiting = {name: len(blocks) for name, blocks in self._sharing.items()}
        sizes = {name: self.fixed[name].numel() for name in waiting}
        todo = dict.fromkeys(range(len(self.blocks)))

        def settled_share(i: int) -> float:
            tensors = self.blocks[i].tables
            return sum(sizes[name] for name in tensors if waiting[name] == 1) / sum(sizes[name] for name in tensors)

        while todo:
            i = max(todo, key=settled_share)
            del todo[i]
            self.visit(i, frozenset(name for name in self.blocks[i].tables if waiting[name] == 1) or None)
            for name in self.blocks[i].tables:
                waiting[name] -= 1

    def visit(self, i: int, only: frozenset[str] | None = None) -> None:
        """Move block i to its best place given all others, judged by the tensors `only` (default: all)."""
        self.visits += 1
        if self.on_visit is not None:
            self.on_visit()
        block = self.blocks[i]
        used = [k for k, p in enumerate(block.places) if p.tensor in self.fixed and (only is None or p.tensor in only)]
        if only is None or only.issuperset(block.tables):
            self.dirty.discard(i)
        if block.inner:
            step, improvement, size = self._best_nested(block, used)
        else:
            index, improvement, size = self._gains.best(i, used, self.state)
            step = {block.name: index}
        if improvement <= _ROUNDING * size:
            return
        changed = block.move(step, self.state)
        if (
            block.quadratic
            and only is None
            and not self._improves({name: after for name, (after, _) in changed.items()})
        ):
            return
        self._accept(i, step, changed)

    def _accept(self, i: int, step: Step, changed: Mapping[str, tuple[Tensor, Shift | None]]) -> None:
        """Make a step of block i, and let its neighbours know."""
        block = self.blocks[i]
        if block.quadratic:
            self._gains.forget(i)
            self.dirty.add(i)
        else:
            self._gains.reorder(i, step[block.name])
        for name, (after, shift) in changed.items():
            neighbours = self._sharing[name] - {i}
            for j in neighbours:
                self._gains.update(j, name, shift, self.state[name], after)
            self.dirty |= neighbours
            self.state[name] = after
        self.pi = compose_moves(self.spec, step, self.pi)

    def _best_nested(self, block: UnitBlock, used: Sequence[int]) -> tuple[Step, float, float]:
        """Nested assignment: the gain of a pair of units is the optimum of the problem inside them."""
        places = {sub_tensor(k): block.places[k] for k in used}
        mine = {name: place.slices(self.fixed[place.tensor]) for name, place in places.items()}
        theirs = {name: place.slices(self.state[place.tensor]) for name, place in places.items()}
        gain, solutions = separate_pairs(block, mine, theirs) if block.separable else self._pairs(block, mine, theirs)
        index, _ = assign(gain)
        stay = inner_product(mine, theirs)
        improvement = float(gain[torch.arange(block.size), index].sum()) - stay
        step: Step = {block.name: index}
        for unit, names in enumerate(block.names):
            solved = solutions[unit, int(index[unit])]
            step |= {n: solved[t] for t, n in zip(block.names[0], names, strict=True) if t in solved}
        return step, improvement, abs(stay)

    def _pairs(
        self, block: UnitBlock, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Solutions]:
        """The optimum inside every pair of units, and how it is reached, by a descent of its own for each pair."""
        inner = [b for b in block.inner if any(name in mine for name in b.tables)]
        gain = torch.zeros(block.size, block.size, dtype=torch.float64)
        solutions: Solutions = {}
        for i, j in itertools.product(range(block.size), repeat=2):
            fixed = {name: tensor[i] for name, tensor in mine.items()}
            problem = Descent(self.spec, inner, fixed, {name: tensor[j] for name, tensor in theirs.items()})
            for _ in range(_INNER_SWEEPS):
                problem.sweep(range(len(inner)))
                if not problem.dirty:
                    break
            solutions[i, j] = problem.pi
            gain[i, j] = inner_product(fixed, problem.state)
        return gain, solutions

    def _improves(self, changed: Mapping[str, Tensor]) -> bool:
        """Whether a move of a group that meets itself in a tensor, whose gain is only a linearisation, really helps."""
        before = inner_product({name: self.fixed[name] for name in changed}, self.state)
        after = inner_product({name: self.fixed[name] for name in changed}, changed)
        return after > before + _ROUNDING * abs(before)


def inner_product(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """`sum <a, b>` over the tensors of `a`, in float64."""
    return sum(_dot(x.flatten(), b[name].flatten()) for name, x in a.items())


def _dot(x: Tensor, y: Tensor) -> float:
    """`<x, y>` in float64, widened piece by piece: pieces stay in the cache, whole layers would not."""
    if len(x) <= _PIECE:
        return float(torch.dot(x.double(), y.double()))
    return sum(map(_dot, x.split(_PIECE), y.split(_PIECE)))
