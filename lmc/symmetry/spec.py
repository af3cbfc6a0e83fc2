"""`PermutationSpec`: the permutation symmetries of one architecture."""

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lmc.core.files import write_text
from lmc.errors import InputError, SpecError
from lmc.symmetry.actions import outermost_first
from lmc.symmetry.checks import absence, check_groups
from lmc.symmetry.group import Group, Table
from lmc.symmetry.notation.describe import describe
from lmc.symmetry.notation.grammar import parse
from lmc.symmetry.notation.layout import groups_from_axes
from lmc.symmetry.outputs import ExampleInputs, OutputSelector
from lmc.symmetry.permutation import Permutation
from lmc.weights.arithmetic import ModelOrWeights, as_weights, tied_names

if TYPE_CHECKING:
    from lmc.symmetry.certify import Certificate

Shape = tuple[int, ...]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False)
class PermutationSpec:
    """Groups of interchangeable units of one architecture, and where they lie in its tensors.

    Made by `lmc.permutation_spec(model, example_inputs)`, or written by hand with `from_patterns`.

    Attributes:
        groups: name -> Group, outer groups before those nested in them.
        shapes: name -> shape of every tensor of the architecture that the spec knows.
        buffers: names of tensors that are statistics, not parameters: permuted, but never matched on.
        frozen: (tensor, axis) -> why that axis does not move.
        aliases: second names of tied tensors -> the first name; counted and matched on once, moved under every name.
        certificate: the proof made when the spec was discovered, if one was made.
    """

    groups: dict[str, Group]
    shapes: dict[str, Shape]
    buffers: frozenset[str] = frozenset()
    frozen: dict[tuple[str, int], str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    certificate: "Certificate | None" = None

    def __post_init__(self) -> None:
        groups = {group.name: group for group in outermost_first(self.groups) if group.size > 1}
        check_groups(groups, self.shapes)
        object.__setattr__(self, "groups", groups)

    @classmethod
    def from_patterns(
        cls, patterns: Mapping[str, str], weights: ModelOrWeights | None = None, **sizes: int
    ) -> "PermutationSpec | UnboundSpec":
        """A spec written by hand, one axis pattern per tensor (see `lmc.symmetry.notation`).

        Args:
            patterns: tensor name (or a wildcard such as "blocks.*.fc.weight"; the texts that match `*` may be used
                as `*` in the pattern) -> axis pattern. Tensors that are not named stay as they are.
            weights: a module or state dict, for the shapes. Without it the sizes of the groups stay open until the
                spec meets weights: everything that takes both works; `groups` and `random` do not yet.
            sizes: sizes that shapes do not tell, e.g. `head=4` for "(head qk) d".

        Raises:
            SpecError: the text cannot be read, or does not fit the shapes.
        """
        if not isinstance(patterns, Mapping) or not all(isinstance(pattern, str) for pattern in patterns.values()):
            raise SpecError(f"patterns: expected a mapping of tensor names to texts such as 'h (c .)', got {patterns!r}")
        unbound = UnboundSpec(dict(patterns), sizes)
        return unbound if weights is None else unbound.bind(weights)

    def bind(self, weights: ModelOrWeights) -> "PermutationSpec":
        """This spec, after checking that it fits the weights."""
        self.check(weights)
        return self

    def check(self, weights: ModelOrWeights) -> None:
        """Raise `SpecError` naming the first tensor that the spec knows and the weights lack, or of another shape."""
        weights = as_weights(weights)
        for name in self.tables_by_tensor:
            if name not in weights:
                why = absence(name, self.aliases, weights)
                raise SpecError(f"the spec moves {name} {self.shapes[name]}, which the weights do not have{why}")
        for name, tensor in weights.items():
            if name in self.shapes and tuple(tensor.shape) != self.shapes[name]:
                raise SpecError(f"{name}: the spec was made for shape {self.shapes[name]}, got {tuple(tensor.shape)}")

    @cached_property
    def tables_by_tensor(self) -> dict[str, list[tuple[str, Table]]]:
        """For each tensor that moves its (group name, table) pairs, outermost group first."""
        found: dict[str, list[tuple[str, Table]]] = {}
        for group in self.groups.values():
            for tensor, tables in group.tables.items():
                found.setdefault(tensor, []).extend((group.name, table) for table in tables)
        return found

    @cached_property
    def families(self) -> dict[str, list[str]]:
        """The names of the groups of each family: one, or as many as there are places to live in."""
        found: dict[str, list[str]] = {}
        for group in self.groups.values():
            found.setdefault(group.family, []).append(group.name)
        return found

    @cached_property
    def by_place(self) -> dict[tuple[str, tuple[tuple[str, int], ...]], str]:
        """The group of a family that lives in given units."""
        return {(group.family, group.within): group.name for group in self.groups.values()}

    @cached_property
    def patterns(self) -> dict[str, str]:
        """The axis pattern of every tensor; "table" stands for an axis that the notation cannot say."""
        return describe(self.groups, self.shapes)

    @property
    def log10_order(self) -> float:
        """log10 of the number of symmetries, the product of n! over the groups."""
        return sum(group.log10_order for group in self.groups.values())

    @cached_property
    def coverage(self) -> float:
        """Share of the parameters (buffers not counted) that lie on an axis that moves."""
        moving = sum(self.moving_share(name) * size for name, size in self.parameters.items())
        return moving / max(1, sum(self.parameters.values()))

    @property
    def parameters(self) -> dict[str, int]:
        """The number of entries of each parameter: buffers left out, tied tensors under their first name only."""
        return {
            name: int(np.prod(shape, dtype=np.int64))
            for name, shape in self.shapes.items()
            if name not in self.buffers and name not in self.aliases
        }

    def moving_share(self, tensor: str) -> float:
        """Share of one tensor's entries that lie on a moving position of some axis."""
        shape = self.shapes[tensor]
        merged: dict[tuple[int, ...], np.ndarray] = {}
        for _, table in self.tables_by_tensor.get(tensor, ()):
            covered = np.zeros(int(np.prod([shape[d] for d in table.dims])), dtype=bool)
            covered[table.rows] = True
            merged[table.dims] = merged.get(table.dims, False) | covered
        still = 1.0
        joint = {dims: mask for dims, mask in merged.items() if len(dims) > 1}
        for dims, mask in joint.items():
            grid = mask.reshape([shape[d] for d in dims])
            for position, d in enumerate(dims):
                single = merged.pop((d,), None)
                if single is not None:
                    grid = grid | single.reshape([-1 if p == position else 1 for p in range(len(dims))])
            still *= 1.0 - float(grid.mean())
        for dims, mask in merged.items():
            if dims not in joint:
                still *= 1.0 - float(mask.mean())
        return 1.0 - still

    def identity(self) -> Permutation:
        """The permutation that moves nothing."""
        return Permutation(self, {name: torch.arange(group.size) for name, group in self.groups.items()})

    def random(self, seed: int = 0) -> Permutation:
        """A uniformly random element of the symmetry group."""
        generator = torch.Generator().manual_seed(seed)
        indices = {name: torch.randperm(group.size, generator=generator) for name, group in self.groups.items()}
        return Permutation(self, indices)

    def certify(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        trials: int = 3,
        seed: int = 0,
        *,
        outputs: OutputSelector = None,
        also: ExampleInputs | None = None,
        tolerance: float = 1e-9,
    ) -> "Certificate":
        """Prove the symmetries on examples: random elements of the whole group, in float64, on perturbed weights.

        Args:
            also: a second, larger input; some tensors (positions, buckets) are only used by longer inputs.

        Raises:
            CertificateError: naming the groups that change the function.
        """
        from lmc.symmetry.certify import certify_spec

        return certify_spec(
            self, model, example_inputs, trials=trials, seed=seed, outputs=outputs, also=also, tolerance=tolerance
        )

    def without(self, *names: str) -> "PermutationSpec":
        """The spec in which the named groups or families (wildcards allowed) stay as they are."""
        dropped = {
            name
            for name, group in self.groups.items()
            if any(fnmatch.fnmatchcase(text, glob) for glob in names for text in (name, group.family))
        }
        if not dropped:
            raise SpecError(
                f"no group matches {', '.join(map(repr, names))}; groups: {', '.join(list(self.groups)[:8])}"
            )
        kept = {
            name: Group(
                name,
                g.size,
                g.tables,
                g.family if not _lost(g, dropped) else name,
                tuple(place for place in g.within if place[0] not in dropped),
            )
            for name, g in self.groups.items()
            if name not in dropped
        }
        reasons = dict(self.frozen)
        for name in dropped:
            for tensor, tables in self.groups[name].tables.items():
                reasons.update({(tensor, d): f"group {name} left out" for table in tables for d in table.dims})
        return PermutationSpec(kept, self.shapes, self.buffers, reasons, self.aliases)

    def __or__(self, edits: Mapping[str, str]) -> "PermutationSpec":
        """The spec with the patterns of some tensors replaced (wildcards as in `from_patterns`)."""
        from lmc.symmetry.notation.edit import edit

        return edit(self, edits)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PermutationSpec):
            return NotImplemented
        return not self.differences(other)

    __hash__ = None  # type: ignore[assignment]

    def differences(self, other: "PermutationSpec") -> list[str]:
        """What tells two specs apart, whatever their groups are called; empty if they describe the same symmetries."""
        from lmc.symmetry.compare import differences

        return differences(self, other)

    def contains(self, other: "PermutationSpec") -> bool:
        """Whether every symmetry of `other` is one of this spec."""
        from lmc.symmetry.compare import contains

        return contains(self, other)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: patterns where they say everything, else the tables themselves."""
        from lmc.symmetry.notation.store import to_dict

        return to_dict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PermutationSpec":
        from lmc.symmetry.notation.store import from_dict

        return from_dict(content)

    def save(self, path: str | Path) -> None:
        """Write the spec as JSON (atomically)."""
        write_text(path, json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "PermutationSpec":
        """Read what `save` wrote. Raises `InputError` if the file is something else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a spec saved by lmc ({error})") from error

    def __repr__(self) -> str:
        from lmc.symmetry.report import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from lmc.symmetry.report import as_html

        return as_html(self)

    def plot(self):
        """A picture of the layers and the groups that tie them (plotly figure)."""
        from lmc.views.plots.symmetry import plot_spec

        return plot_spec(self)


def _lost(group: Group, dropped: set[str]) -> bool:
    return any(parent in dropped for parent, _ in group.within)


@dataclass(frozen=True)
class UnboundSpec:
    """Patterns that have not met weights yet, so that the sizes of their groups are open."""

    patterns: dict[str, str]
    sizes: dict[str, int]

    def bind(self, weights: ModelOrWeights) -> PermutationSpec:
        """The spec for these weights. Raises `SpecError` if the patterns do not fit their shapes."""
        state = as_weights(weights)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if isinstance(weights, nn.Module):
            buffers = frozenset(state) - {name for name, _ in weights.named_parameters(remove_duplicate=False)}
        else:
            buffers = frozenset(name for name in state if name.endswith(STATISTICS))
        patterns = expand_wildcards(self.patterns, list(shapes))
        axes = {name: parse(text, name) for name, text in patterns.items()}
        groups = groups_from_axes(axes, shapes, self.sizes)
        return PermutationSpec(groups, shapes, buffers, aliases=tied_names(weights))

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise SpecError(
            f"{name}: this spec has not met weights yet, so its sizes are open; "
            "make it with from_patterns(patterns, model), or call spec.bind(model)"
        )


def expand_wildcards(patterns: Mapping[str, str], names: list[str]) -> dict[str, str]:
    """Patterns with each wildcard name written out; later entries win. Raises `SpecError` for names that match nothing."""
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
