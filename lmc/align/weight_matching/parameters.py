"""The numbers that alignment compares, and the way back to weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lmc.network.derived import derived_names, gauged
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights


def matched(spec: PermutationSpec, weights: Mapping[str, Tensor]) -> Weights:
    """The parameters (tied ones once), in float32 at least, in the order of their names.

    Buffers are no part of them, and of normalised or pruned weights it is the weight in use that is compared, under the
    name of the tensor that has its shape (`lmc.network.derived`). Complex ones are seen as real, with a last axis for the real and the imaginary part:
    `Re <x, y>` is then the inner product. Their order decides how sums round, so it is not left to the caller's files.
    """
    found: Weights = {}
    derived = derived_names(weights)
    weights = gauged(dict(weights)) if derived else weights
    for name in sorted(weights.keys() - spec.buffers - spec.aliases.keys() - derived):
        tensor = weights[name]
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        if tensor.is_floating_point():
            found[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return found


def in_form_of(like: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that `matched` made of one in the form of `like`, or a mixture of such, as it was: complex, in its dtype."""
    return (torch.view_as_complex(tensor.contiguous()) if like.is_complex() else tensor).to(like.dtype)
