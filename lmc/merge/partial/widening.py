"""A module with tensors of other sizes."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import InputError
from lmc.merge.partial.units import MergedUnits
from lmc.network.copies import fresh_copy
from lmc.weights import StateDict, Weights, as_weights

if TYPE_CHECKING:
    import pandas as pd


def widened(module: nn.Module, weights: Weights) -> nn.Module:
    """A copy of a module that holds `weights`, which may have other shapes, with the sizes that its layers remember.

    Sizes that a module of one's own has written into its forward are not known here: whether it runs is to be tried.
    """
    wide = fresh_copy(module)
    for name, tensor in weights.items():
        path, _, leaf = name.rpartition(".")
        owner = wide.get_submodule(path)
        old = getattr(owner, leaf)
        if old.shape == tensor.shape:
            old.data = tensor.clone()
        elif isinstance(old, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(tensor.clone(), requires_grad=old.requires_grad))
        else:
            setattr(owner, leaf, tensor.clone())
    for layer in wide.modules():
        for attribute, value in _sizes(layer).items():
            setattr(layer, attribute, value)
    return wide


def _sizes(layer: Any) -> dict[str, Any]:
    """The attributes in which a layer of torch remembers sizes, as its tensors have them."""
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.RNNBase):
        tensors = dict(layer.named_parameters())
        return {"input_size": tensors["weight_ih_l0"].shape[1], "hidden_size": tensors["weight_hh_l0"].shape[1]}
    if isinstance(layer, _BatchNorm | _InstanceNorm):
        known = weight if weight is not None else layer.running_mean
        return {} if known is None else {"num_features": len(known)}
    if not isinstance(weight, Tensor):
        return {}
    shape = tuple(weight.shape)
    if isinstance(layer, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(layer, _ConvTransposeNd):
        return {"in_channels": shape[0], "out_channels": shape[1] * layer.groups}
    if isinstance(layer, _ConvNd):  # in groups: one filter, or several, for each channel
        groups = 1 if layer.groups == 1 else shape[0] * layer.groups // layer.out_channels
        return {"out_channels": shape[0], "groups": groups, "in_channels": shape[1] * groups}
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": shape}
    if isinstance(layer, nn.GroupNorm):
        return {"num_channels": shape[0]}
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(layer, nn.PReLU):
        return {"num_parameters": weight.numel()}
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # GPT-2's linear layer, weight (in, out)
        return {"nf": shape[1]}
    return {}


@dataclass(frozen=True, eq=False)
class Zipped(Result):
    """Two networks in one module, which may be wider than either.

    Attributes:
        module: computes; in eval mode, on the device and in the dtype of the networks.
        units: for each group that may change its size, which units of A and of B (in A's order) each new unit stands for.
        kept: the other groups, whose units were averaged one to one -> why.
        heads: tensors that either network answers with alone, where that was asked for; see `answering`.
        parameters: (stored, used): the parameters of `module` relative to those of one network, and without the zeros
            between what is A's alone and what is B's alone.
        info: how it was made.
    """

    module: nn.Module = field(repr=False)
    units: dict[str, MergedUnits]
    kept: dict[str, str]
    parameters: tuple[float, float]
    heads: tuple[Weights, Weights] = field(default=({}, {}), repr=False)
    info: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def weights(self) -> StateDict:
        """The state dict of the module."""
        return as_weights(self.module)

    def answering(self, network: int) -> nn.Module:
        """A copy of the module with the heads of A (0) or of B (1) on the merged body.

        Raises:
            InputError: another number, or no heads were named when the networks were merged.
        """
        if network not in (0, 1) or not self.heads[0]:
            raise InputError(f"network={network!r}: expected 0 or 1, and heads=[...] named when merging")
        return widened(self.module, self.weights | self.heads[network]).eval()

    def to_frame(self) -> "pd.DataFrame":
        """A row for each group that may change its size: group, and its units made of both networks', of A's and of B's."""
        rows = [(group, *units.counts) for group, units in self.units.items()]
        return require("pandas").DataFrame(rows, columns=["group", "of both", "of A", "of B"])

    @classmethod
    def load(cls, file: str | Path, model: nn.Module) -> "Zipped":
        """Read what `save` wrote, weights into a copy of `model` (the architecture of one network) that is made to fit.

        Raises:
            DataError: a file that holds something else.
        """
        found = super().load(file)
        return replace(found, module=widened(model, cast(Weights, found.module)).eval())  # written as its weights

    def __str__(self) -> str:
        stored, used = self.parameters
        lines = [
            f"Zipped by {self.info.get('method')}: {used:.2f} times the parameters of one network "
            f"({stored:.2f} with the zeros between the two)"
        ]
        lines += [f"  {name}: {units!r}" for name, units in self.units.items()]
        for reason in dict.fromkeys(self.kept.values()):
            names = [name for name, why in self.kept.items() if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {', '.join(names[:3])}{more}: one to one, {reason}")
        return "\n".join(lines)

    __repr__ = __str__
