"""Options given per tensor: a value for all tensors, or a mapping from name patterns to values.

`scale={"*": 1.0, "layers.*.attn": 0.3}`: a pattern (`*` and `?` as in the shell) names tensors or whole modules; of
several that fit, the last one counts. Tensors that no pattern fits take the option's default.
"""

import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from typing import Any

from lmc.errors import InputError


class PerName:
    """The options of one call, resolved for each tensor name.

    Args:
        options: option name -> value, or -> `{pattern: value}`.
        defaults: option name -> value for tensors that no pattern fits.
        names: all tensor names; a pattern that fits none of them raises `InputError`.
    """

    def __init__(self, options: Mapping[str, Any], defaults: Mapping[str, Any], names: Iterable[str]) -> None:
        names = tuple(names)
        self.fixed = {key: value for key, value in options.items() if not isinstance(value, Mapping)}
        self.rules: dict[str, list[tuple[re.Pattern[str], Any]]] = {}
        self.defaults = defaults
        for key, value in options.items():
            if isinstance(value, Mapping):
                self.rules[key] = [(_compile(pattern), choice) for pattern, choice in value.items()]
                for (regex, _), pattern in zip(self.rules[key], value, strict=True):
                    if not any(regex.match(name) for name in names):
                        raise InputError(f"{key}: no tensor fits the pattern {pattern!r}; names are like {names[:3]}")

    def __call__(self, name: str) -> dict[str, Any]:
        """The options for the tensor `name`."""
        chosen = dict(self.fixed)
        for key, rules in self.rules.items():
            fitting = [value for regex, value in rules if regex.match(name)]
            if not fitting and key not in self.defaults:
                raise InputError(f"{key}: no pattern fits {name}; add a pattern '*' for all other tensors")
            chosen[key] = fitting[-1] if fitting else self.defaults[key]
        return chosen


def matches(name: str, pattern: str) -> bool:
    """True where `pattern` fits the tensor `name` or a module that contains it."""
    return _compile(pattern).match(name) is not None


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(f"{translate(pattern)}|{translate(pattern + '.*')}")
