"""One call of a merging method: the options, passes and random numbers that its rule is given for each tensor.

Options may be given per tensor by name patterns, `scale={"*": 1.0, "layers.*.attn": 0.3}`: a pattern (`*` and `?` as in the
shell) names tensors or whole modules; of several that fit, the last one counts. Tensors that no pattern fits take the
option's default.

`scale={"gradient": [0.2, 1.0]}` is a number that changes over the depth of numbered layers, interpolated between those
given; tensors outside layers take the first one. It may stand for a pattern's value or in a list:
`weights=[1.0, {"gradient": [0, 1]}]`.
"""

import hashlib
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmc.errors import InputError
from lmc.merge.engine.chunks import Chunk, Cut, Latest, blocks, chunks, grain
from lmc.merge.engine.tensors import WeightSets
from lmc.network.moments import Moments, moments
from lmc.weights.state import numbered_depths


def coefficients(weights: Iterable[float] | None, count: int, what: str = "weights") -> list[float]:
    """`weights` as floats, one per model (default: 1 each), checked."""
    try:
        values = [1.0] * count if weights is None else [float(w) for w in weights]
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: {weights!r}; expected numbers, one per model") from error
    if len(values) != count:
        raise InputError(f"{what}: {len(values)} values for {count} models; give one per model")
    if not all(abs(v) < float("inf") for v in values):
        raise InputError(f"{what}: {values} are not all finite")
    return values


def check_numbers_of(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise `InputError` for an option that is no number where one is expected, or one that is NaN or infinite."""
    for key, value in options.items():
        wanted = isinstance(defaults.get(key), int | float) and not isinstance(defaults[key], bool)
        for leaf in _leaves(value):
            if isinstance(leaf, float) and not math.isfinite(leaf):
                raise InputError(f"{key}={leaf}: expected a finite number")
            if wanted and (leaf is None or isinstance(leaf, str)):
                raise InputError(f"{key}={leaf!r}: expected a number, as {defaults[key]!r} is")


def _leaves(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    return [value] if inside is None else [leaf for item in inside for leaf in _leaves(item)]


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


def proportions(values: Sequence[float]) -> list[float]:
    """Shares in proportion to numbers; to their sizes where they sum to 0, and equal ones where all are 0."""
    total = sum(values)
    if abs(total) < 1e-12:
        values = [abs(value) for value in values]
        total = sum(values)
    return [value / total for value in values] if total else [1.0 / len(values)] * len(values)


class PerName:
    """The options of one call, resolved for each tensor name.

    Args:
        options: option name -> value, or -> `{pattern: value}`; in values `{"gradient": [...]}` stands for a number.
        defaults: option name -> value for tensors that no pattern fits.
        names: all tensor names; a pattern that fits none of them raises `InputError`.
    """

    def __init__(self, options: Mapping[str, Any], defaults: Mapping[str, Any], names: Iterable[str]) -> None:
        names = tuple(names)
        patterns = {key: value for key, value in options.items() if isinstance(value, Mapping) and not _gradient(value)}
        self.fixed = {key: value for key, value in options.items() if key not in patterns}
        self.rules: dict[str, list[tuple[re.Pattern[str], Any]]] = {}
        self.exact: dict[str, Mapping[str, Any]] = {}  # options that name every tensor by its name
        self.defaults = defaults
        self.depths = numbered_depths(names) if any(map(_has_gradient, options.values())) else {}
        for key, value in patterns.items():
            if value.keys() == set(names):
                self.exact[key] = value
                continue
            self.rules[key] = [(_compile(pattern), choice) for pattern, choice in value.items()]
            for (regex, _), pattern in zip(self.rules[key], value, strict=True):
                if not any(regex.match(name) for name in names):
                    raise InputError(f"{key}: no tensor fits the pattern {pattern!r}; names are like {names[:3]}")

    def __call__(self, name: str) -> dict[str, Any]:
        """The options for the tensor `name`."""
        chosen = self.fixed | {key: value[name] for key, value in self.exact.items()}
        for key, rules in self.rules.items():
            fitting = [value for regex, value in rules if regex.match(name)]
            if not fitting and key not in self.defaults:
                raise InputError(f"{key}: no pattern fits {name}; add a pattern '*' for all other tensors")
            chosen[key] = fitting[-1] if fitting else self.defaults[key]
        if not self.depths:
            return chosen
        return {key: _at(value, self.depths.get(name, 0.0), key) for key, value in chosen.items()}


def varies(value: Any) -> bool:
    """True for an option that is not the same for all tensors: patterns, or a gradient, also within a list."""
    return isinstance(value, Mapping) or (isinstance(value, list | tuple) and any(map(varies, value)))


def _gradient(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"gradient"}


def _has_gradient(value: Any) -> bool:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return _gradient(value) or any(map(_has_gradient, inside))


def _at(value: Any, depth: float, key: str) -> Any:
    """The value at a depth from 0 to 1: gradients, alone or in a list, are interpolated between their numbers."""
    if _gradient(value):
        points = coefficients(value["gradient"], len(value["gradient"]), f"{key}: gradient")
        if not points:
            raise InputError(f"{key}: an empty gradient")
        place = depth * (len(points) - 1)
        low = min(int(place), max(len(points) - 2, 0))
        return points[low] + (place - low) * (points[min(low + 1, len(points) - 1)] - points[low])
    return [_at(each, depth, key) for each in value] if isinstance(value, list | tuple) else value


def matches(name: str, pattern: str) -> bool:
    """True where `pattern` fits the tensor `name` or a module that contains it."""
    return _compile(pattern).match(name) is not None


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(f"{translate(pattern)}|{translate(pattern + '.*')}")


Read = Callable[[str, Chunk], tuple[Any, ...]]


@dataclass(frozen=True)
class Pass:
    """The arguments of a rule for every weight, one at a time; a survey may iterate over it several times.

    Iterating gives `(models, *shape)` tensors, or a tuple of tensors if the rule takes several; all of one dtype. Of
    rules that can be given chunks (`cut`), large tensors come in chunks, flattened.
    """

    sets: WeightSets
    read: Read
    cut: Cut = "whole"

    @property
    def size(self) -> int:
        """The number of values of each model."""
        return sum(self.sets.shells[name].numel() for name in self.sets.weights)

    def __iter__(self) -> Iterator[Any]:
        for name, chunk in self.sets.walk(self.sets.weights, self.cut):
            yield self._values(name, chunk)

    def sample(self) -> Iterator[Any]:
        """The same for up to 2048 short slices, spread evenly over the model; nothing else is read."""
        sizes = {name: self.sets.shells[name].numel() for name in self.sets.weights}
        count = min(2048, max(32, self.size >> 16))
        for name, chunk in blocks(sizes, count, sample_size(self.size) // count):
            yield self._values(name, chunk)

    def of(self, name: str) -> "Pass":
        """The same for one tensor alone."""
        return replace(self, sets=replace(self.sets, weights=(name,)))

    def _values(self, name: str, chunk: Chunk) -> Any:
        first, *rest = (value.to(self.sets.dtype) for value in self.read(name, chunk))
        return (first, *rest) if rest else first


def sample_size(size: int) -> int:
    """The number of values that are a fair sample of `size`: a sixteenth of few, a million of most, a five hundredth of very many."""
    return max(size >> 9, min(size >> 4, 1 << 20))


BLOCK = 1 << 14  # entries that are drawn together


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU random generator for one tensor: the same for the same seed and name, whatever the order of names."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Uniform:
    """Numbers from [0, 1) for the entries of a tensor, or of a chunk of it.

    What an entry is given depends on the seed, the tensor's name, the model's place in the list, and the entry's place
    in the tensor: each block of entries has a generator of its own.
    """

    seed: int
    name: str
    chunk: Chunk = None

    def at(self, chunk: Chunk) -> "Uniform":
        """The same for another chunk of the tensor."""
        return replace(self, chunk=chunk)

    def __call__(self, like: Tensor) -> Tensor:
        """As many as `like`, `(models, *shape)`, has entries; in its dtype, on its device."""
        start = 0 if self.chunk is None else self.chunk.start
        stop = start + like[0].numel()
        drawn = torch.empty(
            (len(like), stop - start), dtype=torch.float32
        )  # in float32, so that masks do not depend on the dtype
        for model, row in enumerate(drawn):
            for begin in range(start // BLOCK * BLOCK, stop, BLOCK):
                own = generator(self.seed, f"{model}/{begin}/{self.name}")
                low, high = max(begin, start), min(begin + BLOCK, stop)
                if high - low == BLOCK:
                    torch.rand(BLOCK, generator=own, out=row[low - start : high - start])
                    continue
                values = torch.rand(BLOCK, generator=own, dtype=torch.float32)
                row[low - start : high - start] = values[low - begin : high - begin]
        return drawn.reshape(like.shape).to(like)


@dataclass(frozen=True)
class Parts:
    """All of one tensor, `(chunk, values)` after each other, for rules that ask something of it before its first chunk."""

    call: "MethodCall"
    name: str

    def __iter__(self) -> Iterator[tuple[Chunk, Tensor]]:
        for chunk in chunks(self.call.sets.shells[self.name], self.call.cut):
            yield chunk, self.call.read(self.name, chunk)[0]

    @property
    def size(self) -> int:
        """The number of values of each model."""
        return self.call.sets.shells[self.name].numel()

    def sample(self) -> Iterator[Tensor]:
        """The values of short slices, spread evenly; nothing else is read."""
        for _, chunk in blocks({self.name: self.size}, 512, max(64, sample_size(self.size) // 512)):
            yield self.call.read(self.name, chunk)[0]

    def once(self, find: Callable[["Parts"], Any]) -> Any:
        """The answer of `find` for this tensor, found at its first chunk."""
        return self.call.latest(self.name, "parts", lambda: find(self))


GIVEN = (
    "base",
    "name",
    "generator",
    "uniform",
    "moments",
    "parts",
    "survey",
)  # parameters of rules that are not options


@dataclass(frozen=True)
class MethodCall:
    """A call.

    Attributes:
        sets: the inputs.
        options: the rule's options for each name.
        read: what the rule is called with, for a name and a chunk of its tensor.
        cut: which chunks it may be given.
        seed: of random numbers.
        survey: what the survey found.
        apart: what moments are taken of.
        latest: what was found of the latest tensor.
    """

    sets: WeightSets
    options: PerName
    read: Read
    cut: Cut
    seed: int
    survey: Any
    apart: Pass
    latest: Latest = field(default_factory=Latest)

    def moments(self, name: str) -> Moments:
        """The moments of the whole tensors of a name."""
        return self.latest(name, "moments", lambda: moments(self.apart.of(name)))

    def apply(self, rule: Callable[..., Any], wanted: Container[str], name: str, chunk: Chunk) -> Any:
        """The result of the rule, which wants those of `GIVEN`, for a tensor or a chunk of it, flattened."""
        rows = chunk is not None and self.cut != "entries"

        def shaped(value: Any) -> Any:
            return value.unflatten(-1, (-1, grain(self.sets.shells[name], self.cut))) if rows else value

        def base() -> Tensor | None:
            return None if self.sets.base is None else shaped(self.sets.base_tensor(name, chunk))

        makers: dict[str, Callable[[], Any]] = {
            "base": base,
            "name": lambda: name,
            "generator": lambda: generator(self.seed, name),
            "uniform": lambda: Uniform(self.seed, name, chunk),
            "moments": lambda: partial(self.moments, name),
            "parts": lambda: Parts(self, name),
            "survey": lambda: self.survey,
        }
        given = {key: make() for key, make in makers.items() if key in wanted}
        found = rule(*map(shaped, self.read(name, chunk)), **given, **self.options(name))
        return found.flatten() if rows else found
