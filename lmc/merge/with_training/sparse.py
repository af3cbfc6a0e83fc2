"""Sparse soups: prune, retrain several copies under one mask, average them, and again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lmc.core.context import own_context
from lmc.core.progress import tqdm
from lmc.errors import InputError
from lmc.merge.engine.assembly import Merged
from lmc.merge.engine.quantiles import kth_smallest
from lmc.merge.engine.tensors import weight_sets
from lmc.merge.rules.averaging import average
from lmc.weights import ModelOrWeights, Weights, as_weights

Masks = dict[str, Tensor]
Retrain = Callable[[Weights, Masks, int], ModelOrWeights]
Selector = Literal["global", "uniform"]


@dataclass(frozen=True)
class SparseReport:
    """The masks of a sparse soup: name -> true where a weight is kept."""

    masks: Masks

    def __str__(self) -> str:
        kept, size = (sum(f(m) for m in self.masks.values()) for f in (lambda m: int(m.sum()), lambda m: m.numel()))
        return f"{kept:,} of {size:,} weights kept in {len(self.masks)} masked tensors ({1 - kept / max(size, 1):.1%} zero)"


@own_context
def magnitude_masks(
    weights: ModelOrWeights, *, sparsity: float, selector: Selector = "global", model: nn.Module | None = None
) -> Masks:
    """Boolean masks of the weights to keep: all but the share `sparsity` smallest by magnitude.

    Matrices and kernels only; vectors (biases, norms) have no mask. "global" ranks all of them together, "uniform" each
    tensor on its own. Exactly `floor(sparsity n)` entries go, or fewer where several equal the last one.
    """
    if not 0.0 <= sparsity < 1.0:
        raise InputError(f"sparsity must be in [0, 1), got {sparsity}")
    if selector not in ("global", "uniform"):
        raise InputError(f"selector must be 'global' or 'uniform', got {selector!r}")
    sets = weight_sets([weights], module=model)
    sizes = {name: sets.tensor(name, 0).abs().to(sets.dtype) for name in sets.weights if sets.states[0][name].ndim > 1}

    def limit(values: list[Tensor]) -> Tensor:
        count = sum(value.numel() for value in values)
        return kth_smallest(lambda: (value[None] for value in values), [min(count, int(sparsity * count) + 1)], count)[
            0
        ]

    shared = limit(list(sizes.values())) if selector == "global" and sizes else None
    return {
        name: value >= (limit([value]) if shared is None else shared).to(value.device) for name, value in sizes.items()
    }


@own_context
def sparse_soup(
    weights: ModelOrWeights,
    *,
    retrain: Retrain,
    sparsity: float = 0.9,
    phases: int = 3,
    copies: int = 3,
    selector: Selector = "global",
    merge: Callable[[list[Weights]], Weights] = average,
    model: nn.Module | None = None,
    progress: bool = True,
) -> Merged[SparseReport]:
    """Sparse model soups (Zimmer, Spiegel, Pokutta 2024, 2306.16788): averages that stay sparse.

    In each phase the current weights are pruned by magnitude, `copies` are retrained from them with different seeds and
    one mask, and merged; that all have the same zeros is what keeps the soup sparse. After phase k of K the sparsity is
    `1 - (1 - sparsity)^(k/K)`. One copy is iterative magnitude pruning. Re-estimate BatchNorm statistics inside
    `retrain`, and of the result.

    Args:
        weights: trained, dense; not touched.
        retrain: `retrain(weights, masks, seed) -> weights`, which must keep the zeros of the masks at zero (mask
            gradients and weight decay); seeds count up from 0.
        merge: how copies are merged: `average`, or a greedy soup on validation data.
        model: the architecture, to distinguish buffers from weights.

    Returns:
        The soup, a state dict whose `.report` has its masks.

    Raises:
        InputError: arguments out of range, or retrained weights that are not zero where the mask is.
    """
    if not 0.0 <= sparsity < 1.0:
        raise InputError(f"sparsity must be in [0, 1), got {sparsity}")
    if phases < 1 or copies < 1:
        raise InputError(f"phases and copies must be at least 1, got {phases} and {copies}")
    soup, masks = as_weights(weights), {}
    with tqdm(total=phases * copies, desc="sparse soup", disable=not progress) as bar:
        for phase in range(1, phases + 1):
            share = 1.0 - (1.0 - sparsity) ** (phase / phases)
            masks = magnitude_masks(soup, sparsity=share, selector=selector, model=model)
            pruned = _masked(soup, masks)
            ingredients = []
            for copy in range(copies):
                seed = (phase - 1) * copies + copy
                given = {name: tensor.clone() for name, tensor in pruned.items()}
                tuned = as_weights(retrain(given, dict(masks), seed))
                _check_zeros(tuned, masks, seed)
                ingredients.append({name: tensor.clone() for name, tensor in tuned.items()})
                bar.update()
            soup = merge(ingredients)
    return Merged(soup, SparseReport(masks))


def _masked(weights: Mapping[str, Tensor], masks: Masks) -> Weights:
    return {name: tensor * masks[name] if name in masks else tensor.clone() for name, tensor in weights.items()}


def _check_zeros(weights: Weights, masks: Masks, seed: int) -> None:
    for name, mask in masks.items():
        grown = int(torch.count_nonzero(weights[name][~mask]))
        if grown:
            raise InputError(
                f"retrain with seed {seed}: {grown} pruned entries of {name} are not zero; "
                "multiply by the masks after each optimiser step"
            )
