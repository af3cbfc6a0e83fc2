"""Groups as plain data for files: patterns where they say everything, tables where they do not."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lmc.errors import SpecError
from lmc.symmetry.group import Group, Table
from lmc.symmetry.notation.describe import describe
from lmc.symmetry.notation.grammar import IRREGULAR, parse
from lmc.symmetry.notation.layout import groups_from_axes

Shapes = Mapping[str, tuple[int, ...]]


def groups_as_data(groups: Mapping[str, Group], shapes: Shapes) -> dict[str, Any]:
    """Either `patterns` and the `sizes` of the families, or `groups` with all their tables."""
    patterns = describe(groups, shapes)
    sizes = {group.family: group.size for group in groups.values()}
    if _say_everything(patterns, sizes, groups, shapes):
        return {"sizes": sizes, "patterns": patterns}
    return {"groups": [_group_as_data(group) for group in groups.values()]}


def groups_from_data(content: Mapping[str, Any], shapes: Shapes) -> dict[str, Group]:
    """What `groups_as_data` was given, in the same order."""
    if "patterns" not in content:
        return {item["name"]: _group_from_data(item) for item in content["groups"]}
    axes = {name: parse(text, name) for name, text in content["patterns"].items()}
    order = {family: place for place, family in enumerate(content["sizes"])}
    laid_out = groups_from_axes(axes, shapes, content["sizes"])
    return dict(sorted(laid_out.items(), key=lambda item: order[item[1].family]))


def _say_everything(
    patterns: Mapping[str, str], sizes: Mapping[str, int], groups: Mapping[str, Group], shapes: Shapes
) -> bool:
    if any(IRREGULAR in pattern.split() for pattern in patterns.values()):
        return False
    axes = {name: parse(text, name) for name, text in patterns.items()}
    try:
        again = groups_from_axes(axes, shapes, sizes)
    except SpecError:
        return False
    return again.keys() == groups.keys() and all(again[n] == groups[n] for n in again)


def _group_as_data(group: Group) -> dict[str, Any]:
    tables = {
        tensor: [{"dims": list(table.dims), "rows": table.rows.tolist()} for table in tables]
        for tensor, tables in group.tables.items()
    }
    within = [list(place) for place in group.within]
    return {"name": group.name, "size": group.size, "family": group.family, "within": within, "tables": tables}


def _group_from_data(item: Mapping[str, Any]) -> Group:
    tables = {
        tensor: tuple(Table(tuple(t["dims"]), np.asarray(t["rows"], dtype=np.int64)) for t in tables)
        for tensor, tables in item["tables"].items()
    }
    return Group(item["name"], item["size"], tables, item["family"], tuple((p, u) for p, u in item["within"]))
