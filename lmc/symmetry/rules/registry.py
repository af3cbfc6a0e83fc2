"""The table of rules, and what happens to an operator that has none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from lmc.symmetry.rules import core
from lmc.symmetry.rules.chosen import Chosen, Operand, pointwise, settle
from lmc.symmetry.rules.tags import Shape, Tag
from lmc.symmetry.rules.units import Units


class Parts:
    """The results of a split, each worked out when it is first asked for: parts that nobody uses impose nothing."""

    def __init__(self, parts: Sequence[Callable[[], Operand]]):
        self.parts = parts
        self.known: dict[int, Operand] = {}

    def __getitem__(self, k: int) -> Operand:
        if k not in self.known:
            self.known[k] = self.parts[k]()
        return self.known[k]


Result = Operand | tuple[Any, ...] | Parts
Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
RULES: dict[Any, Rule] = {}
CHOICES: set[Rule] = set()
EXPERTS: set[Rule] = set()
AXES: set[Rule] = set()


@dataclass(frozen=True)
class Op:
    """One node being interpreted.

    Attributes:
        units: the ledger.
        target: the operator.
        shapes: of its results.
        no_ties: for an operator that chooses among values, whether these are known to differ from each other.
        masks: for an indexing operator, which of its indices are masks.
        layout: where the first operand lies in its storage, as its strides and its offset.
    """

    units: Units
    target: Any
    shapes: tuple[Shape, ...]
    no_ties: bool = False
    masks: frozenset[int] = frozenset()
    layout: tuple[Shape, int] = ((), 0)

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def name(self) -> str:
        return str(self.target).removesuffix(".default")


def rule(*packets: Any, choices: bool = False, experts: bool = False, axes: bool = False) -> Callable[[R], R]:
    """Register a rule for some operators (all overloads).

    `choices`: it knows what to do with integers that stand for units (`Tag.points`), in any argument but the first of
    an indexing operator; for other rules they become fixed. `experts`: it knows tensors computed for chosen experts
    (`Chosen`); other rules get them settled. `axes`: it needs a first operand that has axes; scalars have nothing to move.
    """

    def register(function: R) -> R:
        for packet in packets:
            RULES[packet] = function
        if choices:
            CHOICES.add(function)
        if experts:
            EXPERTS.add(function)
        if axes:
            AXES.add(function)
        return function

    return register


def named(*names: str) -> list[Any]:
    """The aten operators of these names (several to a string) that this version of torch has."""
    return [getattr(torch.ops.aten, name) for name in " ".join(names).split() if hasattr(torch.ops.aten, name)]


def tags_in(args: object) -> list[Tag]:
    return [a for a in pytree.tree_leaves(args, is_leaf=lambda x: isinstance(x, Tag)) if isinstance(a, Tag)]


def interpret(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
    """The tags of an operator's results: by its rule, as pointwise if torch marks it so, else everything frozen."""
    found = rule_of(op.target)
    if found is None and is_pointwise(op.target):
        found = all_pointwise
    if found not in CHOICES:
        args, kwargs = pytree.tree_map(partial(fixed, op.units), (args, kwargs), is_leaf=is_operand)
    if found not in EXPERTS:
        args, kwargs = pytree.tree_map(partial(settled, op.units), (args, kwargs), is_leaf=is_operand)
    if found in AXES and is_operand(args[0]) and not args[0].shape:
        return unknown(op, tags_in((args, kwargs)))
    return apart(found(op, *args, **kwargs)) if found is not None else unknown(op, tags_in((args, kwargs)))


def apart(result: Result) -> Result:
    """Results with the same knowledge are different tensors still, and so different objects: parts of a concatenation that
    are one object are taken for one tensor."""
    if not isinstance(result, tuple):
        return result
    return tuple(replace(x) if any(x is y for y in result[:k]) else x for k, x in enumerate(result))


def rule_of(target: Any) -> Rule | None:
    """The rule of an operator, registered by itself or, for operators of other libraries, by name."""
    packet = getattr(target, "overloadpacket", target)
    return RULES.get(packet) or RULES.get(str(packet))


def is_operand(value: Any) -> bool:
    return isinstance(value, (Tag, Chosen))


def settled(units: Units, value: Any) -> Any:
    return settle(units, value) if isinstance(value, Chosen) else value


def all_pointwise(op: Op, *args: Any, **kwargs: Any) -> Result:
    """The rule of operators that torch marks as pointwise."""
    result = pointwise(op.units, op.shape, operands_in((args, kwargs)))
    return result if len(op.shapes) == 1 else (result,) * len(op.shapes)


EXPERTS.add(all_pointwise)


def operands_in(args: object) -> list[Operand]:
    return [a for a in pytree.tree_leaves(args, is_leaf=is_operand) if is_operand(a)]


def fixed(units: Units, value: Any) -> Any:
    """Integers that stand for units, where they are used as numbers: the units may not move."""
    if not isinstance(value, Tag) or value.points is None:
        return value
    core.freeze_points(units, value)
    return replace(value, points=None)


def is_deterministic(target: Any) -> bool:
    """Whether an operator gives the same each time: it draws no numbers."""
    return torch.Tag.nondeterministic_seeded not in getattr(target, "tags", [torch.Tag.nondeterministic_seeded])


def is_pointwise(target: Any) -> bool:
    tags = getattr(target, "tags", [])
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def unknown(op: Op, tags: list[Tag]) -> Result:
    """No rule: nothing that enters may move, and what comes out does not move either."""
    for tag in tags:
        core.freeze(op.units, tag, f"no rule for {op.name}")
    results = tuple(core.still(op.units, shape, "no rule for " + op.name) for shape in op.shapes)
    return results[0] if len(results) == 1 else results
