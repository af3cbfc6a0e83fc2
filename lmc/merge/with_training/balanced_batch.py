"""BANG: fine-tuning with soft labels, so that the tuned model does not dominate its average with the base."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lmc.errors import InputError


def balanced_batch(
    inputs: Tensor,
    targets: Tensor,
    *,
    classes: int,
    smoothing: float = 0.1,
    mixup: float = 0.4,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A training batch with label smoothing and mixup, for balanced averaging (Lin et al. 2024, 2309.17230).

    A fine-tuned model is overconfident and dominates its average with the zero-shot model. BANG fine-tunes on such
    batches and then takes `wise_ft(alpha=0.5)`. The strengths of the paper could not be read; these are ours. With
    `smoothing=0, mixup=0` the batch is unchanged and the recipe is WiSE-FT.

    Args:
        inputs: `(N, ...)` floating point.
        targets: `(N,)` classes.
        classes: number of classes C.
        smoothing: share of each label spread over all classes.
        mixup: both parameters of the Beta distribution of the mixing ratio, one per batch; 0 for none.
        generator: of the partners and the ratio, on the CPU.

    Returns:
        inputs `(N, ...)` and target probabilities `(N, C)`, as `torch.nn.functional.cross_entropy` takes them.
    """
    if not 0.0 <= smoothing < 1.0 or mixup < 0.0:
        raise InputError(f"smoothing must be in [0, 1) and mixup not negative, got {smoothing} and {mixup}")
    labels = F.one_hot(targets, classes).to(inputs.dtype) * (1.0 - smoothing) + smoothing / classes
    if mixup == 0.0:
        return inputs, labels
    partner = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    first, second = torch._standard_gamma(torch.full((2,), mixup, dtype=torch.float64), generator=generator).tolist()
    ratio = first / (first + second)
    return inputs.lerp(inputs[partner], 1.0 - ratio), labels.lerp(labels[partner], 1.0 - ratio)
