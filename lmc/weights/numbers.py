"""Numbers of weights: which take part in sums, in which dtype these are made, and the way back; which are codes.

Codes of quantised weights and factors of adapters are no coordinates of a weight space: the mean of two codes is not the
code of a mean, and the mean of products `B A` is not the product of the means.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from lmc.errors import WeightsError
from lmc.weights.state import dtype_name

# What bitsandbytes, GPTQ, AWQ, compressed-tensors, block fp8 and torchao put beside or in place of a weight.
CODES = re.compile(
    r"(^|[._])(qweight|qzeros|scales_and_zeros|SCB|weight_format|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|"
    r"weight_global_scale|weight_g_idx|absmax|nested_absmax|quant_map|nested_quant_map|quant_state(\..*)?)$"
)
# Of a LoRA, DoRA, LoHa, LoKr, VeRA, IA3 or prompt adapter.
FACTORS = re.compile(
    r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|lora_(down|up)|lora\.(down|up)|hada_w[12]_[ab]|"
    r"lokr_w[12](_[ab])?|vera_lambda_[bd]|ia3_l|dora_scale|prompt_embeddings)(\.|$)"
)
NARROW = (torch.int8, torch.uint8, torch.int16, torch.int32)
DEQUANTISE = (
    "dequantise it first, by loading it with the library that quantised it and saving float weights, or take the "
    "weights it was made from"
)


def inexact(tensor: Tensor) -> bool:
    """True where the values take part in sums: floating-point or complex, not integers or booleans."""
    return tensor.is_floating_point() or tensor.is_complex()


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of these are summed: float32, complex64, or the widest of them if that is wider."""
    found = torch.float32
    for dtype in dtypes:  # torch does not promote float8
        found = torch.promote_types(found, torch.float32 if dtype.itemsize == 1 else dtype)
    return found


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`.

    Raises:
        WeightsError: a finite value leaves the range of `dtype`, such as 65504 of float16; the tensor is named.
    """
    if dtype.itemsize < tensor.dtype.itemsize and dtype.is_floating_point and tensor.numel():
        values = tensor.to(wide(tensor.dtype)).abs()
        # Asked of the values, not of the result: casts to float8 may stop at its largest number.
        if bool(((values > torch.finfo(dtype).max) & torch.isfinite(values)).any()):
            raise WeightsError(
                f"{name}: the result leaves the range of {str(dtype).removeprefix('torch.')}, up to "
                f"{torch.finfo(dtype).max:g}; convert the models to float32 or bfloat16 first, or use a smaller scale"
            )
    return tensor.to(dtype)


def code(state: Mapping[str, Tensor]) -> str:
    """Why a weight set holds codes instead of weights, naming the first tensor; empty where it does not."""
    scaled = {name.rpartition(".")[0] for name in state if "scale" in name.rpartition(".")[2]}
    for name, tensor in state.items():
        parent, _, last = name.rpartition(".")
        if tensor.is_quantized or _named_code(name):
            return f"{name} ({dtype_name(tensor)}) belongs to a quantised weight"
        if last == "weight" and not inexact(tensor) and tensor.dtype in NARROW:
            return f"{name} holds {dtype_name(tensor)} codes of a quantised weight"
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1 and parent in scaled and "scale" not in last:
            return f"{name} holds {dtype_name(tensor)} codes with a scale of their own"
    return ""


@lru_cache(maxsize=2**16)  # the same names are asked for again with every weight set of an architecture
def _named_code(name: str) -> bool:
    return CODES.search(name) is not None


def factor(state: Mapping[str, Tensor]) -> str:
    """The first name of an adapter's factor; empty where there is none."""
    return next((name for name in state if FACTORS.search(name)), "")


def unmergeable(state: Mapping[str, Tensor]) -> str:
    """Why a weight set cannot be merged, and the way out; empty where it can."""
    if reason := code(state):
        return f"{reason}, which are no numbers to add and scale; {DEQUANTISE}"
    if name := factor(state):
        return (
            f"{name} is a factor of an adapter, and the mean of products is not the product of means; merge each "
            "adapter into its base first (peft: model.merge_and_unload()), and merge those"
        )
    return ""


def check_codes(state: Mapping[str, Tensor], what: str) -> None:
    """Check that tensors are no codes of quantised weights; factors of an adapter are parameters like others.

    Raises:
        WeightsError: they are; the message names the first and the way out.
    """
    if code(state):
        raise WeightsError(f"{what}: {unmergeable(state)}")
