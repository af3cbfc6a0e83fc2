"""Editing groups by pattern: `spec | {"blocks.*.rel_bias": ". head"}`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lmc.errors import SpecError
from lmc.symmetry.group import Group
from lmc.symmetry.notation.describe import describe
from lmc.symmetry.notation.grammar import IRREGULAR, names_in, parse, word
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
