"""Grouped matrix products: rows sorted by expert, each multiplied with the matrix of its expert."""

from typing import Any

from lmc.symmetry.discovery.rules import core
from lmc.symmetry.discovery.rules.chosen import Chosen, Operand, contract, pointwise, settle
from lmc.symmetry.discovery.rules.registry import Op, named, rule
from lmc.symmetry.discovery.tags import Tag, along
from lmc.symmetry.discovery.units import Ids, Units

SORTED = "rows sorted by expert"


def run_of(units: Units, tag: Operand, run: str, experts: int) -> Tag:
    """Experts' numbers in sorted order, or the ends of their runs, as a choice: its values stand for experts. Rows and
    experts stay in place. The same `run` gives the same choice."""
    fixed = core.freeze(units, settle(units, tag), SORTED)
    choice = units.memo.setdefault(("run", run), units.frozen(SORTED, experts).copy())
    rows = rows_of(units, choice, fixed.shape[0])
    return Tag(fixed.shape, (along(rows, 0, 1),) if fixed.shape[0] != 1 else (), points=choice)


def rows_of(units: Units, choice: Ids, n: int) -> Ids:
    """The frozen units of the n rows that follow a choice."""
    return units.memo.setdefault(("rows", id(choice), n), units.frozen(SORTED, n))


@rule(*named("_grouped_mm"), "transformers.grouped_mm_fallback", choices=True, experts=True)
def grouped_mm(op: Op, x: Operand, weight: Tag, ends: Tag | None = None, bias: Tag | None = None, *_: Any) -> Operand:
    """x (t, i), weight (e, i, o), ends (e) -> (t, o): which rows are whose is data, so rows and experts stay in place,
    but the hidden units of different experts are kept apart."""
    units = op.units
    if ends is None or len(x.shape) != 2 or len(weight.shape) != 3:
        for tag in (settle(units, x), weight):
            core.freeze(units, tag, "grouped product")
        return core.still(units, op.shape, "grouped product")
    if ends.points is None or ends.points.size != weight.shape[0]:
        ends = run_of(units, ends, f"ends {id(ends)}", weight.shape[0])
    assert ends.points is not None
    fixed = core.freeze(units, weight, SORTED, [0])
    dense = Tag((weight.shape[0], x.shape[0], *weight.shape[1:]), tuple(c[:, None] for c in fixed.coords))
    picked = Chosen(dense, (along(rows_of(units, ends.points, x.shape[0]), 0, 3),), ends.points)
    product = contract(units, [(x, ["t", "i"]), (picked, ["t", "i", "o"])], ["t", "o"])
    return product if bias is None else pointwise(units, op.shape, [product, bias])
