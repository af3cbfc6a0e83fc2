"""Grouped matrix products: rows sorted by expert, each multiplied with the matrix of its expert."""

from typing import Any

from lmc.symmetry.discovery.rules import core
from lmc.symmetry.discovery.rules.chosen import Chosen, Operand, contract, pointwise, settle
from lmc.symmetry.discovery.rules.registry import Op, named, rule
from lmc.symmetry.discovery.tags import Tag, along


@rule(*named("_grouped_mm"), "transformers.grouped_mm_fallback", experts=True)
def grouped_mm(op: Op, x: Operand, weight: Tag, ends: Tag | None = None, bias: Tag | None = None, *_: Any) -> Operand:
    """x (t, i), weight (e, i, o), ends (e) -> (t, o): which rows are whose is data, so rows and experts stay in place,
    but the hidden units of different experts are kept apart."""
    units = op.units
    if ends is None or len(x.shape) != 2 or len(weight.shape) != 3:
        for tag in (settle(units, x), weight):
            core.freeze(units, tag, "grouped product")
        return core.still(units, op.shape, "grouped product")
    reason = "rows sorted by expert"
    core.freeze(units, ends, reason)
    fixed = core.freeze(units, weight, reason, [0])
    choice = units.memo.setdefault(("grouped", id(ends)), units.frozen(reason, weight.shape[0]).copy())
    dense = Tag((weight.shape[0], x.shape[0], *weight.shape[1:]), tuple(c[:, None] for c in fixed.coords))
    picked = Chosen(dense, (along(units.frozen(reason, x.shape[0]), 0, 3),), choice)
    product = contract(units, [(x, ["t", "i"]), (picked, ["t", "i", "o"])], ["t", "o"])
    return product if bias is None else pointwise(units, op.shape, [product, bias])
