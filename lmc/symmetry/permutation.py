"""One element of the symmetry group of an architecture, and how it acts on weights."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmc.core.files import write_text
from lmc.errors import InputError, SpecError
from lmc.symmetry.actions import permute_tensor, sources
from lmc.symmetry.outputs import ExampleInputs, OutputSelector
from lmc.weights.arithmetic import ModelOrWeights, Weights, as_weights

if TYPE_CHECKING:
    from lmc.symmetry.certify import Certificate
    from lmc.symmetry.spec import PermutationSpec


@dataclass(frozen=True, eq=False)
class Permutation(Mapping[str, Tensor]):
    """For each group of a spec an index vector: B's unit for each unit of A, so that moved units are `x[p]`.

    Groups inside units of other groups are permuted after these: `p` of `v[2]` orders the units that have arrived
    in head 2. Acts by `apply`; `inverse` and `compose` are those of the (wreath product) group.

    Attributes:
        spec: the symmetries of the architecture.
        indices: `group name -> (n,)` int64 tensor on the CPU.
        objective: what the matching that found it maximised; None if it was not found by one.
        info: how it was found (method, seed, restarts, sweeps, seconds, ...).
    """

    spec: "PermutationSpec"
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

    def apply(self, model: ModelOrWeights) -> Weights:
        """The weights of the same function with permuted units; tensors that do not move are copied.

        Raises `SpecError` if the spec does not fit the weights.
        """
        weights = as_weights(model)
        self.spec.check(weights)
        moved = {
            tensor: permute_tensor(weights[tensor], tables, self.indices)
            for tensor, tables in self.spec.tables_by_tensor.items()
            if tensor in weights
        }
        return {name: moved[name] if name in moved else tensor.clone() for name, tensor in weights.items()}

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

    def certify(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        weights: ModelOrWeights | None = None,
        outputs: OutputSelector = None,
        tolerance: float = 1e-9,
    ) -> "Certificate":
        """Prove on an example, in float64, that the permuted weights compute the same function.

        Args:
            model: gives the architecture, and the weights unless `weights` are given.

        Raises:
            CertificateError: the outputs differ by more than `tolerance` relative to their largest value.
        """
        from lmc.symmetry.certify import certify_permutation

        return certify_permutation(self, model, example_inputs, weights=weights, outputs=outputs, tolerance=tolerance)

    def save(self, path: str | Path) -> None:
        """Write spec, indices and provenance as JSON (atomically)."""
        content = {
            "format": "lmc permutation 1",
            "spec": self.spec.to_dict(),
            "indices": {name: index.tolist() for name, index in self.indices.items()},
            "objective": self.objective,
            "info": self.info,
        }
        write_text(path, json.dumps(content))

    @classmethod
    def load(cls, path: str | Path) -> "Permutation":
        """Read what `save` wrote. Raises `InputError` if the file is something else."""
        from lmc.symmetry.spec import PermutationSpec

        try:
            content = json.loads(Path(path).read_text())
            if content["format"] != "lmc permutation 1":
                raise InputError(f"{path}: format {content['format']!r} is not a permutation")
            indices = {name: torch.tensor(index) for name, index in content["indices"].items()}
            spec = PermutationSpec.from_dict(content["spec"])
            return cls(spec, indices, content["objective"], content["info"])
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a permutation saved by lmc ({error})") from error

    def __repr__(self) -> str:
        moved = sum(int((index != torch.arange(len(index))).sum()) for index in self.indices.values())
        total = sum(len(index) for index in self.indices.values())
        found = "" if self.objective is None else f", objective {self.objective:.6g}"
        by = f", by {self.info['method']}" if "method" in self.info else ""
        return f"Permutation({len(self)} groups, {moved} of {total} units move{found}{by})"
