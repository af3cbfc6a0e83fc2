"""Groups that admit every orthogonal matrix, found by trying random ones.

A hidden unit that is always off, or always on, for the inputs at hand is as good as linear, and a layer of such units
seems to rotate. So a trial is made on perturbed weights, too, and on more inputs than the caller has chosen, and beside
each verdict stands its power: how much the outputs change when the rotation is broken on purpose.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmc.align.relaxed.soft import SoftMoves
from lmc.align.rotations.folding import TOLERANCE, Probe
from lmc.align.rotations.procrustes import Matrices, nearest_rotation, unmoved
from lmc.core.context import own_context, warn
from lmc.core.extras import require
from lmc.core.progress import Budget
from lmc.core.results import Result
from lmc.symmetry.spec import PermutationSpec, UnboundSpec
from lmc.weights import ModelOrWeights, Weights, agreeing

if TYPE_CHECKING:
    import pandas as pd

_FACTORS = (0.1, -1.0, 3.0)  # one for each perturbed copy of the weights: of tensors that hold one value throughout
_VISIBLE = 1e-6  # a broken rotation that changes the outputs by less is not seen


@dataclass(frozen=True, eq=False)
class RotatableGroups(Result, Mapping[str, bool]):
    """Group -> whether the matrix must leave the vector of ones alone, as behind layer normalisations.

    Attributes:
        errors: largest change of the outputs over all trials, as a share of their size.
        powers: how much the outputs change, in the same unit, where one tensor is not rotated with the others.
        unverified: groups whose rotation changes nothing, and whose breakage is not seen either; they are not rotated.
    """

    ones: dict[str, bool]
    errors: dict[str, float] = field(default_factory=dict)
    powers: dict[str, float] = field(default_factory=dict)
    unverified: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> bool:
        return self.ones[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ones)

    def __len__(self) -> int:
        return len(self.ones)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each group: group, whether the vector of ones stays, error, power."""
        rows = [(name, ones, self.errors[name], self.powers[name]) for name, ones in self.items()]
        return require("pandas").DataFrame(rows, columns=["group", "ones stay", "error", "power"])

    def __repr__(self) -> str:
        lines = [f"RotatableGroups({len(self)} groups)"]
        for name, ones in self.items():
            kept = ", ones kept" if ones else ""
            lines.append(f"  {name}{kept}: error {self.errors[name]:.1e}, broken {self.powers[name]:.1e}")
        return "\n".join(lines + [f"  {name}: not verified" for name in self.unverified])


@own_context
def rotatable_groups(
    spec: PermutationSpec | UnboundSpec,
    model: nn.Module,
    weights: ModelOrWeights,
    inputs: Any,
    *,
    seed: int = 0,
    budget: float | None = None,
) -> RotatableGroups:
    """The groups whose units any orthogonal matrix may mix, found by trying random ones in float64.

    Tried are the weights as they are and three perturbed copies (tensors that hold one value throughout, such as the
    scales of folded norms, keep doing so), each with other matrices, on the first eight examples of the inputs and as
    many made up from them.

    Args:
        spec: the symmetries of the architecture.
        model: the architecture; not touched.
        weights: with folded norms (see `fold_norms`), if residual streams are to be found; not changed.
        inputs: labelled or not.
        seed: decides the matrices, the perturbations and the inputs that are made up.
        budget: seconds after which no further group is tried (default: any); those left out are not taken as rotatable.

    Returns:
        The groups, each with whether its matrix must leave the vector of ones alone, and with error and power.

    Raises:
        SpecError: the spec does not fit the weights.
        MismatchError: weights of another architecture than the model's.
        WeightsError: weights that are not finite, or complex.
        DataError: no inputs, or outputs that are not finite.
    """
    clock = Budget(budget)
    weights = agreeing([weights], ["weights"], model=model)[0]
    spec = spec.bind(weights)
    generator = torch.Generator().manual_seed(seed)
    probe = Probe(model, weights, inputs, generator)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in weights.items()}
    copies = [wide, *(_perturbed(spec, wide, generator, factor) for factor in _FACTORS)]
    trials = [(copy, outputs) for copy in copies if bool((outputs := probe(copy)).isfinite().all())]
    still = unmoved(spec, next(t for t in wide.values() if t.is_floating_point()))
    mix = SoftMoves(spec, wide, probe.network.device)
    ones_of: dict[str, bool] = {}
    errors: dict[str, float] = {}
    powers: dict[str, float] = {}
    unverified: list[str] = []
    for names in spec.families.values():
        if clock.over:
            warn(f"no time left of {clock.seconds:g} s to try whether {names[0]}, and groups after it, can be rotated")
            break
        largest = max(spec.groups[name].size for name in names)
        for ones in (False, True) if largest > 2 else (False,):  # two units and their sum: only an exchange is left
            turns: list[Matrices] = []
            error = 0.0
            for copy, outputs in trials:
                noise = {
                    name: torch.randn(still[name].shape, generator=generator, dtype=torch.float64) for name in names
                }
                turns.append({name: nearest_rotation(x.to(still[name]), ones) for name, x in noise.items()})
                error = max(error, probe.error(mix(still | turns[-1], copy), outputs))
                if error > TOLERANCE:
                    break
            if error > TOLERANCE:
                continue
            for name in names:
                broken = (
                    probe.error(_broken(spec, mix, still, turn, copy, name), outputs)
                    for (copy, outputs), turn in zip(trials, turns, strict=True)
                )
                power = next((p for p in broken if p > _VISIBLE), 0.0)
                if power:
                    ones_of[name], errors[name], powers[name] = ones, error, power
                else:
                    unverified.append(name)
            break
    if unverified:
        warn(
            f"{', '.join(unverified[:4])}: rotations change nothing, but neither do broken ones; not taken as rotatable"
        )
    return RotatableGroups(ones_of, errors, powers, tuple(unverified))


def _perturbed(spec: PermutationSpec, weights: Weights, generator: torch.Generator, factor: float) -> Weights:
    """The weights with noise of their own size; tensors of one value, such as the scales of folded norms, get another one."""
    found = dict(weights)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and name not in spec.buffers and tensor.numel():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
            equal = bool(tensor.min() == tensor.max())
            found[name] = factor * tensor if equal else tensor + tensor.square().mean().sqrt() * noise
    return found | {second: found[first] for second, first in spec.aliases.items()}


def _broken(
    spec: PermutationSpec, mix: SoftMoves, still: Matrices, turned: Matrices, weights: Weights, name: str
) -> dict[str, Tensor]:
    """The weights rotated, but for one group in its largest tensor."""
    rotated = mix(still | turned, weights)
    largest = max(spec.groups[name].tables, key=lambda tensor: float(weights[tensor].double().norm()))
    left = mix(still | turned | {name: still[name]}, weights)[largest]
    same = {second for second, first in spec.aliases.items() if first == largest}
    return rotated | dict.fromkeys({largest, *same}, left)
