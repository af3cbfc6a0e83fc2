"""A matching, step by step: which unit goes where, how alike the units become, how the barrier shrinks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lmc.align.weight_matching.blocks import UnitBlock, build_blocks
from lmc.align.weight_matching.gains import inner_product
from lmc.align.weight_matching.matching import matched
from lmc.core.context import own_context, warn
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError, SpecError
from lmc.landscape.path import Path, loss_path
from lmc.network.batches import reread
from lmc.symmetry.spec import Permutation, PermutationSpec
from lmc.weights import ModelOrWeights, Weights, agreeing

if TYPE_CHECKING:
    import pandas as pd

FIELD_BYTES = 300_000  # of the pictures of one group, which are made smaller where they take more
MOST_UNITS = 64  # of a group whose similarities are kept
MOST_GROUPS = 8  # that are shown unless others are named
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MatchedGroup:
    """One group of units on the way from B's own order to A's.

    Attributes:
        index: (n,) B's unit for each unit of A.
        order: (n,) the places in the order in which they are filled: the most alike pairs first.
        similarity: (T, m, m) cosine of all that A's unit i and the unit in B's place j own, at each step, for the first m
            places (at most 64).
        agreement: (T,) mean cosine of the units that stand in the same place, over all n.
        fields: what feeds the units of A and of B (in B's own order), (n, height, width) each; None where it is no picture.
    """

    name: str
    index: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float32] = field(repr=False)
    agreement: Values
    fields: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        return len(self.index)


@dataclass(frozen=True, eq=False)
class Matching(Result):
    """A permutation carried out in T steps. At every step B is the same function; only its way to A changes.

    Attributes:
        shares: (T,) share of the places that are filled rightly in every group, from 0 (B as it is) to 1.
        groups: name -> what happens in the group.
        objective: (T,) `sum <A, B_t>` over the parameters.
        paths: the line from A to B at each step; empty without a model and data.
    """

    shares: Values
    groups: dict[str, MatchedGroup]
    objective: Values
    paths: tuple[Path, ...] = ()

    @property
    def barriers(self) -> Values:
        """(T,) the loss barrier at each step; NaN without a model and data."""
        return np.array([path.barrier for path in self.paths] or [math.nan] * len(self.shares))

    def to_frame(self) -> "pd.DataFrame":
        """A row for each step: share placed, objective, mean agreement of each group, barrier."""
        pd = require("pandas")

        agreement = {f"agreement of {name}": group.agreement for name, group in self.groups.items()}
        columns = {"placed": self.shares, "objective": self.objective, **agreement, "barrier": self.barriers}
        return pd.DataFrame(columns)

    def known(self, group: str | None) -> str:
        """`group`, or the first one for None; `InputError` for one that is not here."""
        if group is not None and group not in self.groups:
            raise InputError(f"group={group!r}; expected one of {', '.join(self.groups)}")
        return next(iter(self.groups)) if group is None else group

    def __str__(self) -> str:
        lines = [f"Matching of {len(self.groups)} groups in {len(self.shares)} steps"]
        for name, group in self.groups.items():
            moved = int((group.index != np.arange(group.size)).sum())
            similar = f"mean cosine {group.agreement[0]:.3f} to {group.agreement[-1]:.3f}"
            lines.append(f"  {name}: {moved} of {group.size} units move, {similar}")
        if self.paths:
            lines.append(f"  barrier {self.barriers[0]:.3f} to {self.barriers[-1]:.3f} ({self.paths[0].split} loss)")
        return "\n".join(lines)

    __repr__ = __str__


@own_context
def inspect_matching(
    permutation: Permutation,
    a: ModelOrWeights,
    b: ModelOrWeights,
    *,
    model: nn.Module | None = None,
    data: Any = None,
    groups: Sequence[str] | None = None,
    steps: int = 12,
    alphas: int = 13,
    image_shape: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Matching:
    """Carry out the permutation that brings B onto A in steps, and look at each one.

    At step t a share t / steps of the places of every group is filled with the right unit of B, the most alike pairs
    first, by swaps; the units that had these places wait in those that came free. So each step is a permutation of its
    own, and B stays the same function. With a model and data the straight line from A to B is evaluated at every step.

    Args:
        permutation: what a matching of b to a returned.
        a, b: the two networks, modules or state dicts; b as it was before the matching.
        model, data: the architecture, and data as for `loss_path`; both or neither.
        groups: which to show (default: the first eight that are not nested in others).
        steps: how many after the start.
        alphas: points of each line, as for `loss_path`.
        image_shape: (channels, height, width) of flattened inputs, for the receptive fields of a first linear layer
            (default: square pictures of one channel where the size allows it).
        device: where the lines are evaluated (default: where the weights are).
        progress: show a bar.

    An interrupt keeps the steps that are done, with a warning; the first and the last come first.

    Raises:
        MismatchError: weights that do not fit together.
        WeightsError: weights that are not finite.
        SpecError: a permutation that does not fit them.
        InputError: an unusable argument.
    """
    if steps < 1:
        raise InputError(f"steps={steps}; expected at least 1")
    if (model is None) != (data is None):
        raise InputError("model and data: pass both, so that the lines can be evaluated, or neither")
    data = reread(data)
    a, b = agreeing([a, b], "ab", model=model)
    spec = permutation.spec
    spec.check(a)
    ours = matched(spec, a)
    blocks = {block.name: block for block in build_blocks(spec, ours)}
    chosen = _chosen(blocks, groups)
    last = matched(spec, permutation.apply(b))
    cosines = {name: alikeness(block, ours, last).diagonal() for name, block in blocks.items()}
    orders = {name: torch.argsort(cosine, descending=True, stable=True) for name, cosine in cosines.items()}

    shares = np.linspace(0.0, 1.0, steps + 1)
    done: dict[int, tuple[float, dict[str, Tensor], Path | None]] = {}
    try:
        for t in tqdm([0, steps, *range(1, steps)], desc="steps of the matching", disable=not progress):
            moved = placed(permutation, orders, float(shares[t])).apply(b)
            theirs = matched(spec, moved)
            similar = {name: alikeness(blocks[name], ours, theirs) for name in chosen}
            done[t] = inner_product(ours, theirs), similar, _line(model, a, moved, data, alphas, device)
    except KeyboardInterrupt:
        if len(done) < 2:
            raise
        warn(f"interrupted: {len(done)} of {steps + 1} steps were made")
    seen = [done[t] for t in sorted(done)]
    return Matching(
        shares[sorted(done)],
        {
            name: MatchedGroup(
                name,
                permutation[name].numpy(),
                orders[name].numpy(),
                np.stack([similar[name][:MOST_UNITS, :MOST_UNITS].numpy() for _, similar, _ in seen]).astype(
                    np.float32
                ),
                np.array([float(similar[name].diagonal().mean()) for _, similar, _ in seen]),
                _fields(permutation, name, a, b, image_shape),
            )
            for name in chosen
        },
        np.array([objective for objective, _, _ in seen]),
        tuple(path for _, _, path in seen if path is not None),
    )


def _chosen(blocks: dict[str, UnitBlock], groups: Sequence[str] | None) -> list[str]:
    if groups is None:
        if not blocks:
            raise SpecError("this permutation has no groups: there is nothing to see")
        return list(blocks)[:MOST_GROUPS]
    for name in groups:
        if name not in blocks:
            raise InputError(f"groups: no group {name!r} that stands by itself; there are {', '.join(blocks)}")
    if not groups:
        raise InputError(f"groups: name at least one of {', '.join(blocks)}")
    return list(groups)


def _fields(
    permutation: Permutation, name: str, a: Weights, b: Weights, image_shape: Sequence[int] | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    ours, theirs = (receptive_fields(permutation.spec, name, weights, image_shape) for weights in (a, b))
    return None if ours is None or theirs is None else (ours, theirs)


def _line(
    model: nn.Module | None, a: Weights, b: Weights, data: Any, alphas: int, device: torch.device | str | None
) -> Path | None:
    return None if model is None else loss_path(model, a, b, data, alphas=alphas, device=device, progress=False)


def partial(index: Tensor, order: Tensor, count: int) -> Tensor:
    """The index vector after `count` swaps, each of which puts the right unit in the next place of `order`.

    With all places in order it is `index`; with none, the identity. Every one is a permutation.
    """
    now = list(range(len(index)))
    where = list(range(len(index)))  # of each unit
    for place in order[:count].tolist():
        unit = int(index[place])
        other, old = now[place], where[unit]
        now[place], now[old] = unit, other
        where[unit], where[other] = place, old
    return torch.tensor(now)


def placed(permutation: Permutation, orders: dict[str, Tensor], share: float) -> Permutation:
    """The permutation with a share of the places of every group filled rightly, in the given orders."""
    indices = {
        name: partial(index, orders.get(name, torch.arange(len(index))), round(share * len(index)))
        for name, index in permutation.items()
    }
    return Permutation(permutation.spec, indices)


def alikeness(block: UnitBlock, ours: Weights, theirs: Weights) -> Tensor:
    """`(n, n)` cosines between all that A's unit i owns and all that B's unit j owns; 0 for units that own nothing.

    The numerator is the gain that weight matching assigns by: the inner products summed over all places of the block.
    """
    gain = torch.zeros(block.size, block.size, dtype=torch.float64)
    squares = [torch.zeros(block.size, dtype=torch.float64) for _ in range(2)]
    for place in block.places:
        a, b = (place.features(weights[place.tensor]).to("cpu", torch.float64) for weights in (ours, theirs))
        gain += a @ b.T
        for total, features in zip(squares, (a, b), strict=True):
            total += features.square().sum(1)
    norms = squares[0].sqrt()[:, None] * squares[1].sqrt()
    return torch.where(norms > 0, gain / norms.clamp_min(1e-300), 0.0)


def receptive_fields(
    spec: PermutationSpec, group: str, weights: Weights, image_shape: Sequence[int] | None
) -> npt.NDArray[np.float32] | None:
    """`(n, height, width)`: what feeds each unit, as pictures; None where the units are fed by no picture.

    Looked for is a tensor whose rows are the units and whose columns no group moves: a linear layer on flattened pictures
    or a convolution kernel; several channels are averaged. Without an `image_shape` (channels, height, width) the inputs
    of a linear layer are taken for a square picture, if their number is a square of at least 4.
    """
    for name, tables in spec.groups[group].tables.items():
        tensor = weights[name]
        alone = len(spec.tables_by_tensor[name]) == 1 and tables[0].dims == (0,) and tables[0].rows.shape[1] == 1
        if not alone or tensor.ndim not in (2, 4) or len(tensor) != spec.groups[group].size:
            continue
        if tensor.ndim == 4 and min(tensor.shape[2:]) > 1:
            return _small(tensor.float().mean(1).cpu().numpy())
        if tensor.ndim == 2:
            side = math.isqrt(tensor.shape[1])
            shape = tuple(image_shape) if image_shape is not None else (1, side, side)
            if len(shape) == 3 and math.prod(shape) == tensor.shape[1] and min(shape[1:]) >= 4:
                return _small(tensor.float().reshape(-1, *shape).mean(1).cpu().numpy())
    return None


def _small(pictures: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The pictures, halved in size as often as it takes."""
    while pictures.size > FIELD_BYTES and min(pictures.shape[1:]) >= 8:
        n, height, width = pictures.shape
        even = pictures[:, : height // 2 * 2, : width // 2 * 2]
        pictures = even.reshape(n, height // 2, 2, width // 2, 2).mean((2, 4))
    return pictures
