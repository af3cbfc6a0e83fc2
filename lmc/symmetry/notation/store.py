"""Specs as plain data: patterns where they say everything, tables where they do not."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lmc.errors import InputError, SpecError
from lmc.symmetry.group import Group, Table
from lmc.symmetry.notation.describe import IRREGULAR
from lmc.symmetry.notation.grammar import parse
from lmc.symmetry.notation.layout import groups_from_axes

if TYPE_CHECKING:
    from lmc.symmetry.spec import PermutationSpec

FORMAT = "lmc permutation spec 1"


def to_dict(spec: "PermutationSpec") -> dict[str, Any]:
    content: dict[str, Any] = {
        "format": FORMAT,
        "shapes": {name: list(shape) for name, shape in spec.shapes.items()},
        "buffers": sorted(spec.buffers),
        "aliases": spec.aliases,
        "frozen": [[tensor, axis, reason] for (tensor, axis), reason in spec.frozen.items()],
    }
    sizes = {group.family: group.size for group in spec.groups.values()}
    if _patterns_say_everything(spec, sizes):
        return content | {"sizes": sizes, "patterns": spec.patterns}
    return content | {"groups": [_group_to_dict(group) for group in spec.groups.values()]}


def from_dict(content: Mapping[str, Any]) -> "PermutationSpec":
    from lmc.symmetry.spec import PermutationSpec

    found = content.get("format") if isinstance(content, Mapping) else type(content).__name__
    if found != FORMAT:
        raise InputError(f"format {found!r} is not a permutation spec ({FORMAT!r})")
    shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
    if "patterns" in content:
        axes = {name: parse(text, name) for name, text in content["patterns"].items()}
        order = {family: place for place, family in enumerate(content["sizes"])}
        laid_out = groups_from_axes(axes, shapes, content["sizes"])
        groups = dict(sorted(laid_out.items(), key=lambda item: order[item[1].family]))
    else:
        groups = {item["name"]: _group_from_dict(item) for item in content["groups"]}
    frozen = {(tensor, axis): reason for tensor, axis, reason in content["frozen"]}
    return PermutationSpec(groups, shapes, frozenset(content["buffers"]), frozen, content["aliases"])


def _patterns_say_everything(spec: "PermutationSpec", sizes: Mapping[str, int]) -> bool:
    if any(IRREGULAR in pattern.split() for pattern in spec.patterns.values()):
        return False
    axes = {name: parse(text, name) for name, text in spec.patterns.items()}
    try:
        groups = groups_from_axes(axes, spec.shapes, sizes)
    except SpecError:
        return False
    return groups.keys() == spec.groups.keys() and all(groups[n] == spec.groups[n] for n in groups)


def _group_to_dict(group: Group) -> dict[str, Any]:
    tables = {
        tensor: [{"dims": list(table.dims), "rows": table.rows.tolist()} for table in tables]
        for tensor, tables in group.tables.items()
    }
    within = [list(place) for place in group.within]
    return {"name": group.name, "size": group.size, "family": group.family, "within": within, "tables": tables}


def _group_from_dict(item: Mapping[str, Any]) -> Group:
    tables = {
        tensor: tuple(Table(tuple(t["dims"]), np.asarray(t["rows"], dtype=np.int64)) for t in tables)
        for tensor, tables in item["tables"].items()
    }
    return Group(item["name"], item["size"], tables, item["family"], tuple((p, u) for p, u in item["within"]))
