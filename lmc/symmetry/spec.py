"""`PermutationSpec`, the permutation symmetries of one architecture, and `Permutation`, one element of their group."""

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from lmc.core.codec import decode, encode
from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError, SpecError
from lmc.symmetry import report
from lmc.symmetry.groups.action import act, act_on_disk, identity_indices, random_indices, sources
from lmc.symmetry.groups.group import Group
from lmc.symmetry.groups.kinds import ContinuousSymmetries
from lmc.symmetry.groups.symmetries import Certificate, Symmetries
from lmc.symmetry.notation.grammar import parse_all
from lmc.symmetry.notation.layout import (
    describe,
    edited,
    expand_wildcards,
    groups_as_data,
    groups_from_axes,
    groups_from_data,
)
from lmc.symmetry.proof.certify import certify_permutation, certify_spec
from lmc.symmetry.tracing.outputs import Inputs, OutputSelector
from lmc.weights import ModelOrWeights, StateDict, as_weights, tied_names
from lmc.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    import pandas as pd

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
SPEC_FORMAT = "lmc permutation spec 1"


@dataclass(frozen=True, eq=False, repr=False)
class PermutationSpec(Symmetries, Result):
    """Groups of interchangeable units of one architecture, and their places in its tensors.

    Made by `lmc.permutation_spec(model, inputs)`, or written by hand with `from_patterns`.

    Attributes:
        groups: name -> Group, outer groups before those nested in them.
        shapes: name -> shape of every tensor of the architecture that the spec knows.
        buffers: names of tensors that are statistics, not parameters: permuted, but never matched on.
        frozen: (tensor, axis) -> why that axis does not move.
        aliases: further names of tied tensors -> the first name; counted and matched on once, moved under every name.
        certificate: the proof made when the spec was discovered, if one was made.
        outputs: the names of the outputs that stay the same, if the model returns several.
        assumed: values of tensors, with the line that reads them, that decide on a size or a branch of the model: the
            symmetries are those of the sizes and branches of the example.
        continuous: the scales, signs and mixings that units admit beyond permutations, if they were looked for.

    Example:
        >>> import lmc, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> spec = lmc.PermutationSpec.from_patterns({"0.weight": "h .", "0.bias": "h", "2.weight": ". h"}, model)
        >>> spec.certify(model, torch.randn(2, 3)).max_error < 1e-12
        True
    """

    @classmethod
    def from_patterns(
        cls, patterns: Mapping[str, str], weights: ModelOrWeights | None = None, **sizes: int
    ) -> "PermutationSpec | UnboundSpec":
        """A spec written by hand, one axis pattern per tensor (see `lmc.symmetry.notation.grammar`).

        Args:
            patterns: tensor name (or a wildcard such as "blocks.*.fc.weight"; the texts that match `*` may be used
                as `*` in the pattern) -> axis pattern. Tensors that are not named stay as they are.
            weights: a module or state dict, for the shapes. Without it the sizes of the groups stay open until the
                spec meets weights: everything that takes both works; `groups` and `random` do not yet.
            sizes: sizes that do not follow from shapes, e.g. `head=4` for "(head qk) d".

        Raises:
            SpecError: the text cannot be read, or does not fit the shapes.
        """
        if not isinstance(patterns, Mapping) or not all(isinstance(pattern, str) for pattern in patterns.values()):
            raise SpecError(
                f"patterns: expected a mapping of tensor names to texts such as 'h (c .)', got {patterns!r}"
            )
        unbound = UnboundSpec(dict(patterns), sizes)
        return unbound if weights is None else unbound.bind(weights)

    def bind(self, weights: ModelOrWeights) -> "PermutationSpec":
        """This spec, after checking that it fits the weights."""
        self.check(weights)
        return self

    @cached_property
    def patterns(self) -> dict[str, str]:
        """The axis pattern of every tensor; "table" stands for an axis that the notation cannot express."""
        return describe(self.groups, self.shapes)

    def identity(self) -> "Permutation":
        """The permutation that moves nothing."""
        return Permutation(self, identity_indices(self))

    def random(self, seed: int = 0) -> "Permutation":
        """A uniformly random element of the symmetry group."""
        return Permutation(self, random_indices(self, seed))

    @own_context
    def certify(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        trials: int = 3,
        seed: int = 0,
        outputs: OutputSelector = None,
        also: Inputs | None = None,
        tolerance: float = 1e-9,
    ) -> Certificate:
        """Prove the symmetries on examples: random elements of the whole group keep the outputs, in float64 or complex128.

        Weights are drawn so that signals survive whatever the module's own are, and each group is broken on purpose, to see
        that an error would show. Those that cannot be seen are the certificate's `unverified`. Inputs of one value throughout
        (zeros, ones) hide weights: they are tried with noise as well.

        Args:
            model: gives the architecture and the size of its weights; not changed.
            inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; brought to the model's device.
            trials: number of random elements, each on other weights; where a group cannot be seen, up to two more.
            outputs: the outputs that must stay the same, as in `lmc.permutation_spec`.
            also: a second, larger input; some tensors (positions, buckets) are only used by longer inputs.
            tolerance: allowed difference of outputs, relative to their largest value; in a module that computes in float32
                alone at least 1e-5, and the certificate says so.

        Raises:
            CertificateError: groups, given by name, change the function, or the module cannot be computed.
            InputError: inputs without values, or `outputs` that the result lacks.
            SpecError: the spec does not fit the module.
        """
        return certify_spec(
            self, model, inputs, trials=trials, seed=seed, outputs=outputs, also=also, tolerance=tolerance
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
                name if any(parent in dropped for parent, _ in g.within) else g.family,
                tuple(place for place in g.within if place[0] not in dropped),
            )
            for name, g in self.groups.items()
            if name not in dropped
        }
        reasons = dict(self.frozen)
        for name in dropped:
            for tensor, tables in self.groups[name].tables.items():
                reasons.update({(tensor, d): f"group {name} left out" for table in tables for d in table.dims})
        lost = {parent for name in dropped for parent, _ in self.groups[name].within}
        families = {group.family: self.groups[name].family for name, group in kept.items() if name not in lost}
        continuous = self.continuous and self.continuous.of(families)
        return replace(self, groups=kept, frozen=reasons, certificate=None, continuous=continuous)

    def __or__(self, edits: Mapping[str, str]) -> "PermutationSpec":
        """The spec with the patterns of some tensors replaced (wildcards as in `from_patterns`)."""
        changed = expand_wildcards(edits, self.shapes)
        frozen = {place: reason for place, reason in self.frozen.items() if place[0] not in changed}
        groups = edited(self.groups, self.shapes, changed)
        return replace(self, groups=groups, frozen=frozen, certificate=None, continuous=None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PermutationSpec):
            return NotImplemented
        return not self.differences(other)

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: patterns where they say everything, else the tables themselves."""
        return {
            "format": SPEC_FORMAT,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "buffers": sorted(self.buffers),
            "aliases": self.aliases,
            "frozen": [[tensor, axis, reason] for (tensor, axis), reason in self.frozen.items()],
            "outputs": list(self.outputs),
            "assumed": list(self.assumed),
            **groups_as_data(self.groups, self.shapes),
            **({} if self.continuous is None else {"continuous": encode(self.continuous, ContinuousSymmetries, {})}),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PermutationSpec":
        """The spec that `to_dict` wrote.

        Raises:
            InputError: the content is something else.
        """
        found = content.get("format") if isinstance(content, Mapping) else type(content).__name__
        if found != SPEC_FORMAT:
            raise InputError(f"format {found!r} is not a permutation spec ({SPEC_FORMAT!r})")
        shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
        groups = groups_from_data(content, shapes)
        frozen = {(tensor, axis): reason for tensor, axis, reason in content["frozen"]}
        outputs, assumed = (tuple(content.get(key, ())) for key in ("outputs", "assumed"))
        buffers = frozenset(content["buffers"])
        found = content.get("continuous")
        return cls(
            groups,
            shapes,
            buffers,
            frozen,
            content["aliases"],
            outputs=outputs,
            assumed=assumed,
            continuous=None if found is None else decode(found, ContinuousSymmetries, {}),
        )

    def to_frame(self) -> "pd.DataFrame":
        """A row for each group: group, family, size, the number of tensors that it moves in, and what it admits beyond
        permutations, where that is known."""
        rows = [(name, group.family, group.size, len(group.tables)) for name, group in self.groups.items()]
        frame = require("pandas").DataFrame(rows, columns=["group", "family", "size", "tensors"])
        if self.continuous is not None:
            frame["beyond"] = [self.beyond(group.family) for group in self.groups.values()]
        return frame

    def __repr__(self) -> str:
        return report.as_text(self, self.patterns)

    def _repr_html_(self) -> str:
        return report.as_html(self, self.patterns)


@dataclass(frozen=True)
class UnboundSpec:
    """Patterns that have not met weights yet, so that the sizes of their groups are open."""

    patterns: dict[str, str]
    sizes: dict[str, int]

    def bind(self, weights: ModelOrWeights) -> PermutationSpec:
        """The spec for these weights.

        Raises:
            SpecError: the patterns do not fit the shapes of the weights.
        """
        weights = weights.outline() if isinstance(weights, Checkpoint) else weights
        state = as_weights(weights)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if isinstance(weights, nn.Module):
            buffers = frozenset(state) - {name for name, _ in weights.named_parameters(remove_duplicate=False)}
        else:
            buffers = frozenset(name for name in state if name.endswith(STATISTICS))
        patterns = expand_wildcards(self.patterns, shapes)
        groups = groups_from_axes(parse_all(patterns), shapes, self.sizes)
        return PermutationSpec(groups, shapes, buffers, aliases=tied_names(weights))

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise SpecError(
            f"{name}: this spec has not met weights yet, so its sizes are open; "
            "make it with from_patterns(patterns, model), or call spec.bind(model)"
        )


@dataclass(frozen=True, eq=False)
class Permutation(Result, Mapping[str, Tensor]):
    """For each group of a spec an index vector: B's unit for each unit of A, so that moved units are `x[p]`.

    Groups inside units of other groups are permuted after these: `p` of `v[2]` orders the units that have arrived
    in head 2. Acts by `apply`; `inverse` and `compose` are those of the (wreath product) group.

    Attributes:
        spec: the symmetries of the architecture.
        indices: `group name -> (n,)` int64 tensor on the CPU.
        objective: what the matching that found it maximised; None if it was not found by one.
        info: how it was found (method, seed, restarts, sweeps, seconds, ...).

    Example:
        >>> import lmc
        >>> data, model = lmc.data.digits(), lmc.data.checkpoint("digits-mlp64").model()
        >>> spec = lmc.permutation_spec(model, data.test[0][:2])
        >>> pi = spec.random(seed=0)
        >>> pi.compose(pi.inverse()) == spec.identity()
        True
    """

    spec: PermutationSpec
    indices: dict[str, Tensor]
    objective: float | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = self.spec.groups
        if set(self.indices) != set(groups):
            odd = sorted(set(self.indices) ^ set(groups))
            raise SpecError(f"group {odd[0]!r} is in only one of the spec and the permutation")
        checked = {}
        for name, group in groups.items():
            index = torch.as_tensor(self.indices[name], dtype=torch.int64, device="cpu")
            if index.shape != (group.size,) or not torch.equal(index.sort().values, torch.arange(group.size)):
                raise SpecError(
                    f"group {name!r}: expected a permutation of 0..{group.size - 1}, got {tuple(index.shape)}"
                )
            checked[name] = index
        object.__setattr__(self, "indices", checked)

    def __getitem__(self, name: str) -> Tensor:
        return self.indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Permutation) or set(self) != set(other):
            return NotImplemented if not isinstance(other, Permutation) else False
        return all(torch.equal(self[name], other[name]) for name in self)

    __hash__ = None  # type: ignore[assignment]

    @overload
    def apply(self, model: Checkpoint) -> Checkpoint: ...
    @overload
    def apply(self, model: ModelOrWeights) -> StateDict: ...
    @own_context
    def apply(self, model: ModelOrWeights) -> StateDict | Checkpoint:
        """The weights of the same function with permuted units; tensors that do not move are copied.

        Of an opened checkpoint nothing is read now: the result is one whose tensors are moved when they are read.

        Raises:
            SpecError: the spec does not fit the weights.
        """
        if isinstance(model, Checkpoint):
            self.spec.check(model)
            return act_on_disk(self.spec, self.indices, model)
        weights = as_weights(model)
        self.spec.check(weights)
        return StateDict(act(self.spec, self.indices, weights), like=weights)

    @cached_property
    def _sources(self) -> dict[str, str]:
        return sources(self.spec, self.indices)

    def inverse(self) -> "Permutation":
        """The permutation that undoes this one: `pi.inverse().apply(pi.apply(w))` gives `w` back exactly."""
        indices = {source: torch.argsort(self[name]) for name, source in self._sources.items()}
        return Permutation(self.spec, indices)

    def compose(self, first: "Permutation") -> "Permutation":
        """`self` after `first`: `pi.compose(rho).apply(w)` equals `pi.apply(rho.apply(w))`."""
        if set(first) != set(self):
            raise SpecError("permutations of different specs cannot be composed")
        indices = {name: first[self._sources[name]][index] for name, index in self.indices.items()}
        return Permutation(self.spec, indices)

    def is_identity(self) -> bool:
        return all(torch.equal(index, torch.arange(len(index))) for index in self.indices.values())

    @own_context
    def certify(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        weights: ModelOrWeights | None = None,
        outputs: OutputSelector = None,
        tolerance: float = 1e-9,
    ) -> Certificate:
        """Prove on an example, in float64 or complex128, that the permuted weights compute the same function.

        Args:
            model: gives the architecture, and the weights unless `weights` are given.
            inputs: as in `PermutationSpec.certify`.
            outputs: the outputs that must stay the same, as in `lmc.permutation_spec`.
            tolerance: allowed difference of outputs, relative to their largest value; in a module that computes in float32
                alone at least 1e-5, and the certificate says so.

        Returns:
            The certificate; groups that this permutation moves and these weights hide are its `unverified`.

        Raises:
            CertificateError: the outputs differ by more than `tolerance`, or the module cannot be computed.
            SpecError: the spec does not fit the weights.
        """
        return certify_permutation(
            self.spec, self.indices, model, inputs, weights=weights, outputs=outputs, tolerance=tolerance
        )

    def to_frame(self) -> "pd.DataFrame":
        """A row for each unit of A: group, unit, and the unit of B in its place."""
        units = [(name, unit, int(source)) for name, index in self.items() for unit, source in enumerate(index)]
        return require("pandas").DataFrame(units, columns=["group", "unit", "source"])

    def __repr__(self) -> str:
        moved = sum(int((index != torch.arange(len(index))).sum()) for index in self.indices.values())
        total = sum(len(index) for index in self.indices.values())
        found = "" if self.objective is None else f", objective {self.objective:.6g}"
        by = f", by {self.info['method']}" if "method" in self.info else ""
        return f"Permutation({len(self)} groups, {moved} of {total} units move{found}{by})"
