"""Experts weights averaging: parallel copies of a layer that are pulled towards each other during training."""

from collections.abc import Sequence

from lmc.core.context import own_context
from lmc.errors import InputError
from lmc.merge.rules.averaging import average
from lmc.weights import ModelOrWeights, StateDict


@own_context
def mix_experts(models: Sequence[ModelOrWeights], *, beta: float) -> list[StateDict]:
    """Each expert takes a share of all others: `(1 - beta) E_i + beta / (E - 1) sum_{j != i} E_j`.

    Done after every optimiser step while training (Huang et al. 2023, 2308.06093), with a small, growing `beta`; at the
    end the experts are replaced by their `average`. The normalisation of the mix is ours: the paper's could not be
    read. With `beta = (E - 1) / E` all experts become their mean at once.

    Raises:
        InputError: no models, or a `beta` outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise InputError(f"beta must be in [0, 1], got {beta}")
    count = len(models)
    if count == 1:
        return [average(models)]
    shares = [[1.0 - beta if i == j else beta / (count - 1) for j in range(count)] for i in range(count)]
    return [average(models, weights=row) for row in shares]
