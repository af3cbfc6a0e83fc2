"""Editing a spec by pattern: `spec | {"blocks.*.rel_bias": ". head"}`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lmc.errors import SpecError
from lmc.symmetry.notation.describe import IRREGULAR
from lmc.symmetry.notation.grammar import parse
from lmc.symmetry.notation.layout import groups_from_axes

if TYPE_CHECKING:
    from lmc.symmetry.spec import PermutationSpec


def edit(spec: "PermutationSpec", edits: Mapping[str, str]) -> "PermutationSpec":
    """Replace the patterns of the tensors that `edits` name; families mentioned there are laid out anew.

    Groups of families that only occur in irregular tables, and in tensors that are not edited, stay as they are.
    Raises `SpecError` if a pattern does not fit, or if the result contradicts itself.
    """
    from lmc.symmetry.spec import PermutationSpec, expand_wildcards

    changed = expand_wildcards(edits, list(spec.shapes))
    irregular = {name for name, text in spec.patterns.items() if IRREGULAR in text.split() and name not in changed}
    regular = {name: text for name, text in spec.patterns.items() if name not in irregular} | changed
    sizes = {group.family: group.size for group in spec.groups.values()}
    axes = {name: parse(text, name) for name, text in regular.items()}
    known = {name: size for name, size in sizes.items() if any(name in text for text in regular.values())}
    groups = groups_from_axes(axes, spec.shapes, known)
    for name in irregular:
        for old in spec.groups.values():
            if name in old.tables:
                new = groups.get(old.name, replace(old, tables={}))
                if new.size != old.size:
                    raise SpecError(f"group {old.name!r} has {old.size} units in {name}, {new.size} after the edit")
                groups[old.name] = replace(new, tables={**new.tables, name: old.tables[name]})
    frozen = {place: reason for place, reason in spec.frozen.items() if place[0] not in changed}
    return PermutationSpec(groups, spec.shapes, spec.buffers, frozen, spec.aliases)
