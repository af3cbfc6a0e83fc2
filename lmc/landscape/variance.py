"""Variance collapse: units of a merged network vary less than those of the networks it was made from.

Averaging units that are correlated but not equal takes variance away in each layer, so the deeper the less is left
(Jordan et al. 2023, arXiv:2211.08403, section 3 and figure 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lmc.core.context import own_context
from lmc.core.extras import require
from lmc.core.progress import tqdm
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.landscape.evaluation.measured import Values
from lmc.network.inputs import first_of, input_batches
from lmc.network.layers import preactivations, run_seen
from lmc.network.moments import ChannelMoments
from lmc.network.network import Network, pick_device
from lmc.weights import ModelOrWeights, agreeing

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class VarianceRatios(Result):
    """The variances of the channels of every linear and convolutional layer, before the nonlinearity.

    Attributes:
        merged: layer -> (n,) variance of each channel in the merged network. Layers are in the order of calls.
        ends: layer -> (n,) the same in the networks that were merged, averaged over these.
    """

    merged: dict[str, Values]
    ends: dict[str, Values]

    @property
    def ratios(self) -> dict[str, float]:
        """layer -> variance in the merged network over that in its ends, both summed over channels; 1 is healthy."""
        totals = {layer: float(variances.sum()) for layer, variances in self.ends.items()}
        return {layer: float(self.merged[layer].sum()) / total if total else 1.0 for layer, total in totals.items()}

    def to_frame(self) -> "pd.DataFrame":
        """A row for each layer: layer, channels, merged and ends (mean variance of a channel), ratio."""
        pd = require("pandas")

        rows = [
            (layer, len(ends), self.merged[layer].mean(), ends.mean(), self.ratios[layer])
            for layer, ends in self.ends.items()
        ]
        return pd.DataFrame(rows, columns=["layer", "channels", "merged", "ends", "ratio"])

    def __repr__(self) -> str:
        shares = ", ".join(f"{layer} {ratio:.2f}" for layer, ratio in self.ratios.items())
        return f"VarianceRatios({shares})"


@own_context
def variance_ratios(
    model: nn.Module,
    merged: ModelOrWeights,
    ends: Sequence[ModelOrWeights],
    inputs: Any,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> VarianceRatios:
    """Measure every layer of `merged` against the networks that it was merged from, in eval mode.

    Channels are measured where a linear or convolutional layer puts them out, or, if it has no bias, behind the
    normalisation that is called next. Positions of a convolution, or of a sequence, are samples.

    Args:
        model: the architecture; not touched.
        merged: the average, or whatever else was made of `ends`: a module or state dict.
        ends: the networks that were merged, aligned as they were then: one or more, modules or state dicts.
        inputs: a tensor, a tuple or mapping of tensors, an object with `.train`, or an iterable of such batches; targets
            are not used.
        batch_size: examples at a time, where `inputs` is not cut into batches already.
        device: where to compute (default: where the weights are).
        progress: show a bar when it takes longer than two seconds.

    Raises:
        MismatchError: networks of different architectures.
        DataError: no inputs.
        WeightsError: NaN or infinity in the weights.
        InputError: no ends.
    """
    if not ends:
        raise InputError("ends: pass at least one of the networks that were merged")
    names = ["merged", *(f"ends[{k}]" for k in range(len(ends)))]
    states = agreeing([merged, *ends], names, model=model)
    network = Network(model, pick_device(device, states[0]))
    batches = list(input_batches(model, inputs, batch_size))
    network.load(states[0])
    places = preactivations(network, first_of(batches[0], 2))
    moments = [[ChannelMoments() for _ in places] for _ in states]
    for found, state in zip(
        tqdm(moments, desc="variances", unit=" networks", disable=not progress), states, strict=True
    ):
        network.load(state)
        for call in batches:
            run_seen(network, call, list(places.values()), lambda at, x, found=found: found[at].update(x[None]))
    variances = [[layer.deviation[0].square().cpu().numpy() for layer in found] for found in moments]
    averaged = [np.mean(layers, axis=0) for layers in zip(*variances[1:], strict=True)]
    return VarianceRatios(
        dict(zip(places, variances[0], strict=True)),
        dict(zip(places, averaged, strict=True)),
    )
