"""Patterns of many tensors: wildcards, edits, and plain data for JSON."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lmc.errors import SpecError
from lmc.symmetry.groups.group import Group, Table
from lmc.symmetry.notation.grammar import IRREGULAR, names_in, parse, word
from lmc.symmetry.notation.layout import describe, groups_from_axes


def edited(
    groups: Mapping[str, Group], shapes: Mapping[str, tuple[int, ...]], changed: Mapping[str, str]
) -> dict[str, Group]:
    """The groups after the patterns of the tensors in `changed` are replaced; families named there are laid out again.

    Groups of families that only occur in irregular tables, and in tensors that are not edited, stay as they are.

    Raises:
        SpecError: a pattern does not fit, or the result contradicts itself.
    """
    patterns = describe(groups, shapes)
    irregular = {name for name, text in patterns.items() if IRREGULAR in text.split() and name not in changed}
    regular = {name: text for name, text in patterns.items() if name not in irregular} | dict(changed)
    sizes = {group.family: group.size for group in groups.values()}
    axes = {name: parse(text, name) for name, text in regular.items()}
    known = {name: sizes[name] for found in axes.values() for axis in found for name in names_in(axis) if name in sizes}
    result = groups_from_axes(axes, shapes, known)
    for name in irregular:
        for old in groups.values():
            if name in old.tables:
                new = result.get(old.name, replace(old, tables={}))
                if new.size != old.size:
                    raise SpecError(f"group {old.name!r} has {old.size} units in {name}, {new.size} after the edit")
                result[old.name] = replace(new, tables={**new.tables, name: old.tables[name]})
    return result


def expand_wildcards(patterns: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Patterns with each wildcard name written out; later entries win. Raises `SpecError` for names that match nothing."""
    names = list(names)
    found: dict[str, str] = {}
    for glob, pattern in patterns.items():
        expression = re.compile(re.escape(glob).replace(r"\*", "(.*?)") + r"\Z")
        matches = [(name, match) for name in names if (match := expression.match(name))]
        if not matches:
            raise SpecError(f"{glob!r}: the weights have no such tensor; they have {', '.join(names[:6])}, ...")
        for name, match in matches:
            found[name] = _filled(pattern, match.groups(), glob)
    return found


def _filled(pattern: str, parts: Sequence[str], glob: str) -> str:
    """The pattern with its wildcards replaced by what those of the name matched; words that need it are quoted."""
    left = iter(parts)

    def fill(match: re.Match[str]) -> str:
        try:
            return word(re.sub(r"\*", lambda _: next(left), match.group()))
        except StopIteration:
            raise SpecError(f"{glob!r}: the pattern {pattern!r} has more wildcards than the name") from None

    return re.sub(r"[^\s()+/*]*\*[^\s()+/]*", fill, pattern)


Shapes = Mapping[str, tuple[int, ...]]


def groups_as_data(groups: Mapping[str, Group], shapes: Shapes) -> dict[str, Any]:
    """Either `patterns` and the `sizes` of the families, or `groups` with all their tables."""
    patterns = describe(groups, shapes)
    sizes = {group.family: group.size for group in groups.values()}
    if _say_everything(patterns, sizes, groups, shapes):
        return {"sizes": sizes, "patterns": patterns}
    return {"groups": [_group_as_data(group) for group in groups.values()]}


def groups_from_data(content: Mapping[str, Any], shapes: Shapes) -> dict[str, Group]:
    """The inverse of `groups_as_data`: the groups, in the same order."""
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
