"""Coordinate descent over blocks of interchangeable units: the engine under weight matching.

B is kept permuted; the gain of moving a block further is one matrix product over everything that its units own, and a
linear assignment. A block is visited again only when one that shares a tensor with it has changed.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lmc.align.assignment import assign
from lmc.align.blocks import Block, Place, sub_tensor
from lmc.symmetry.actions import compose_moves
from lmc.symmetry.spec import PermutationSpec

Step = dict[str, Tensor]

_INNER_SWEEPS = 10
# Improvements below the rounding of a float32 product are not moves: they could go round in circles.
_ROUNDING = 1e-6


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
        blocks: Sequence[Block],
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
        self._mine: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._sharing: dict[str, set[int]] = {}
        for i, block in enumerate(blocks):
            for name in block.tensors:
                self._sharing.setdefault(name, set()).add(i)

    def sweep(self, order: Sequence[int]) -> None:
        """Visit, in order, every block whose surroundings changed since its last visit."""
        for i in order:
            if i in self.dirty:
                self.visit(i)

    def grow_outwards(self) -> None:
        """A first pass that matches each block only against what is already matched, the best-informed block first."""
        todo = set(range(len(self.blocks)))
        while todo:
            known = {i: self._settled(i, todo) for i in todo}
            i = max(sorted(todo), key=lambda j: self._share(j, known[j]))
            todo.remove(i)
            self.visit(i, known[i] or None)
        self.dirty = set(range(len(self.blocks)))

    def visit(self, i: int, only: frozenset[str] | None = None) -> None:
        """Move block i to its best place given all others, judged by the tensors `only` (default: all)."""
        self.visits += 1
        if self.on_visit is not None:
            self.on_visit()
        self.dirty.discard(i)
        block = self.blocks[i]
        used = [
            k for k, p in enumerate(block.places) if p.tensor in self.fixed and (only is None or p.tensor in only)
        ]
        step, improvement, size = self._best_nested(block, used) if block.inner else self._best(i, used)
        if improvement <= _ROUNDING * size:
            return
        changed = block.move(step, self.state)
        if block.quadratic and only is None and not self._improves(changed):
            return
        self.state.update(changed)
        self.pi = compose_moves(self.spec, step, self.pi)
        for name in changed:
            self.dirty |= self._sharing[name] - {i}
        if block.quadratic:
            self.dirty.add(i)

    def _best(self, i: int, used: Sequence[int]) -> tuple[Step, float, float]:
        """The best permutation of one group: (step, improvement, size of the terms involved)."""
        block = self.blocks[i]
        places = [block.places[k] for k in used]
        key = (i, tuple(used))
        if key not in self._mine:
            self._mine[key] = _features(places, self.fixed)
        gain = self._mine[key] @ _features(places, self.state).T
        index, improvement = assign(gain)
        return {block.name: index}, improvement, float(gain.diagonal().abs().sum())

    def _best_nested(self, block: Block, used: Sequence[int]) -> tuple[Step, float, float]:
        """Nested assignment: the gain of a pair of units is the optimum of the problem inside them."""
        mine = {sub_tensor(k): block.places[k].slices(self.fixed[block.places[k].tensor]) for k in used}
        theirs = {sub_tensor(k): block.places[k].slices(self.state[block.places[k].tensor]) for k in used}
        inner = [b for b in block.inner if any(name in mine for name in b.tensors)]
        gain = torch.zeros(block.size, block.size, dtype=torch.float64)
        solutions: dict[tuple[int, int], Step] = {}
        for i in range(block.size):
            fixed = {name: tensor[i] for name, tensor in mine.items()}
            for j in range(block.size):
                problem = Descent(self.spec, inner, fixed, {name: tensor[j] for name, tensor in theirs.items()})
                for _ in range(_INNER_SWEEPS if inner else 0):
                    problem.sweep(range(len(inner)))
                    if not problem.dirty:
                        break
                solutions[i, j] = problem.pi
                gain[i, j] = inner_product(fixed, problem.state)
        index, _ = assign(gain)
        stay = inner_product(mine, theirs)
        improvement = float(gain[torch.arange(block.size), index].sum()) - stay
        step: Step = {block.name: index}
        for unit, names in enumerate(block.names):
            solved = solutions[unit, int(index[unit])]
            step |= {n: solved[t] for t, n in zip(block.names[0], names, strict=True) if t in solved}
        return step, improvement, abs(stay)

    def _improves(self, changed: Mapping[str, Tensor]) -> bool:
        """Whether a move of a group that meets itself in a tensor, whose gain is only a linearisation, really helps."""
        before = inner_product({name: self.fixed[name] for name in changed}, self.state)
        after = inner_product({name: self.fixed[name] for name in changed}, changed)
        return after > before + _ROUNDING * abs(before)

    def _settled(self, i: int, todo: set[int]) -> frozenset[str]:
        """The tensors of block i in which every other block is already matched."""
        return frozenset(name for name in self.blocks[i].tensors if not (self._sharing[name] - {i}) & todo)

    def _share(self, i: int, known: frozenset[str]) -> float:
        sizes = {name: self.fixed[name].numel() for name in self.blocks[i].tensors}
        return sum(sizes[name] for name in known) / sum(sizes.values())


def inner_product(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """`sum <a, b>` over the tensors of `a`, in float64."""
    return sum(float((tensor.double() * b[name].double()).sum()) for name, tensor in a.items())


def _features(places: Sequence[Place], tensors: Mapping[str, Tensor]) -> Tensor:
    """Everything that each unit owns, side by side: `(n, features)`."""
    return torch.cat([place.features(tensors[place.tensor]) for place in places], dim=1)
