"""Editing groups by pattern: `spec | {"blocks.*.rel_bias": ". head"}`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lmc.errors import SpecError
from lmc.symmetry.group import Group
from lmc.symmetry.notation.describe import IRREGULAR, describe
from lmc.symmetry.notation.grammar import parse
from lmc.symmetry.notation.layout import groups_from_axes


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
    known = {name: size for name, size in sizes.items() if any(name in text for text in regular.values())}
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
            text = pattern
            for part in match.groups():
                text = text.replace("*", part, 1)
            if "*" in text:
                raise SpecError(f"{glob!r}: the pattern {pattern!r} has more wildcards than the name")
            found[name] = text
    return found
