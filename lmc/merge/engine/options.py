"""Options of one call, checked: coefficients of models, and values given per tensor by name patterns.

`scale={"*": 1.0, "layers.*.attn": 0.3}`: a pattern (`*` and `?` as in the shell) names tensors or whole modules; of
several that fit, the last one counts. Tensors that no pattern fits take the option's default.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import translate
from typing import Any

from lmc.errors import InputError


def coefficients(weights: Iterable[float] | None, count: int, what: str = "weights") -> list[float]:
    """`weights` as floats, one per model (default: 1 each), checked."""
    values = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(values) != count:
        raise InputError(f"{what}: {len(values)} values for {count} models; give one per model")
    if not all(abs(v) < float("inf") for v in values):
        raise InputError(f"{what}: {values} are not all finite")
    return values


def affine(values: Sequence[float]) -> tuple[list[float], float]:
    """Coefficients of the models and of the base, which takes what they lack to 1 (rounding aside)."""
    rest = 1.0 - sum(values)
    return list(values), rest if abs(rest) > 1e-9 else 0.0


def convex(coefficients: tuple[list[float], float]) -> tuple[list[float], float]:
    """Shares in an average of statistics: the coefficients where they are an average, else their sizes over the sum."""
    values, rest = coefficients
    if min(*values, rest) >= 0.0:
        return coefficients
    sizes = [abs(v) for v in (*values, rest)]
    return [size / sum(sizes) for size in sizes[:-1]], sizes[-1] / sum(sizes)


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
