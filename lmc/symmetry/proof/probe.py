"""A copy of a module in double precision, or in single where it knows no other, and weights that are tried out on it; the
caller's module is not touched.

Of drawn weights nothing is 0 or 1 by design, and signals survive from the input to the output. Default initialisations
hide errors: biases are zero, norms and fresh statistics are the same for all units, a scale of 1e-6 switches a branch
off, and standard deviations far below 1 / sqrt(fan-in) let signals fade below rounding. So do weights with biases of 1e4,
which rule units out or hold them where they saturate, and inputs of one value throughout.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lmc.core.context import default_dtype, forked
from lmc.errors import CertificateError, InputError, LmcError
from lmc.network.batches import is_object, mapped
from lmc.network.network import Network
from lmc.symmetry.tracing.failures import not_computed, quiet
from lmc.symmetry.tracing.outputs import Inputs, OutputSelector, as_call, kept, tensors_in
from lmc.weights import Weights
from lmc.weights.state import inexact

BLOCK = 1_000_003  # prime, so that no two rows of a larger tensor get the same piece of the repeated block
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
LARGE = 10.0  # root mean square of biases and gains that later draws have nearer 1
LOUDER = 1.5  # times 1 / sqrt(fan-in): signals that have faded so far grow through many layers


def draw(module: nn.Module, number: int, seed: int) -> Weights:
    """One set of weights for a module, on the CPU in single precision; tied tensors stay one.

    Args:
        number: draw 0 keeps the module's own weights, with noise, wherever their size lets signals through; later draws
            keep their sizes only, and of biases and gains not those that are large; from draw 2 on matrices have at
            least a size by which signals grow.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed + number)
    kinds = {id(p): (kind, part) for kind in module.modules() for part, p in kind._parameters.items() if p is not None}
    drawn: dict[int, Tensor] = {}
    result: Weights = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in drawn:
            value = tensor.detach().cpu()
            if inexact(value):
                value = value.to(torch.complex64 if value.is_complex() else torch.float32)
                if id(tensor) in kinds:
                    value = _parameter(value, *kinds[id(tensor)], number, generator)
                else:
                    value = _buffer(value, generator)
            drawn[id(tensor)] = value
        result[name] = drawn[id(tensor)]
    return result


def _parameter(own: Tensor, kind: nn.Module, part: str, number: int, generator: torch.Generator) -> Tensor:
    noise = _noise(own, generator)
    if own.ndim < 2:
        return _vector(own, noise, number)
    size = _size(own)
    wanted = 1.0 if isinstance(kind, EMBEDDINGS) else _fan_in(own, kind, part) ** -0.5
    least = wanted / 50 if isinstance(kind, EMBEDDINGS) else wanted / 4
    kept = size if least <= size <= 4 * wanted else wanted
    if number > 1 and not isinstance(kind, EMBEDDINGS):
        kept = max(kept, LOUDER * wanted)
    if number > 0 or size == 0:
        return noise.mul_(kept)
    return noise.mul_(0.3 * kept).add_(own, alpha=kept / size)


def _vector(own: Tensor, noise: Tensor, number: int) -> Tensor:
    """Biases, gains, slopes, temperatures: those of one sign keep it, and are near 1 where they are next to nothing."""
    if own.is_complex():
        return own + 0.3 * noise
    sign = float(own.sign().mean()) if own.numel() else 0.0
    size = _size(own)
    if number > 0 and size > LARGE:
        own, size = own / size, 1.0
    if abs(sign) == 1:
        base = torch.full_like(own, sign) if size < 0.05 else own
        return base * torch.exp(0.3 * noise)
    return own + 0.3 * max(size, 0.3 if number == 0 else 1.0) * noise


def _buffer(own: Tensor, generator: torch.Generator) -> Tensor:
    """Fresh statistics (all zeros, all ones) get noise; measured ones, masks and tables, constants of the architecture,
    distinguish units already and have values that the module relies on."""
    if own.numel() < 2 or own.is_complex() or bool((own != own.reshape(-1)[0]).any()) or not math.isfinite(own.sum()):
        return own
    noise = _noise(own, generator)
    return own * torch.exp(0.2 * noise) if bool(own.reshape(-1)[0] > 0) else own + 0.3 * noise


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal values; a large tensor repeats a block of them, as drawing is slower than all that follows."""
    count = like.numel()
    block = torch.randn(min(count, BLOCK), generator=generator, dtype=like.dtype)
    if count > BLOCK:
        block = block.repeat(-(-count // BLOCK))[:count]
    return block.reshape(like.shape)


def _size(tensor: Tensor) -> float:
    """The root of the mean square."""
    norm = float(torch.linalg.vector_norm(tensor))
    if not math.isfinite(norm):  # squares leave the range of single precision
        norm = float(torch.linalg.vector_norm(tensor.abs().double()))
    return norm / math.sqrt(max(1, tensor.numel()))


def varied(inputs: Inputs, seed: int) -> Inputs | None:
    """Inputs that are of one value throughout, such as zeros, with noise: weights that they are multiplied by are seen. None
    where any tensor has several values already."""
    given = [tensor for tensor in tensors_in(as_call(inputs)) if tensor.numel() > 1 and not tensor.is_meta]
    if not any(map(inexact, given)) or any(bool((x != x.reshape(-1)[0]).any()) for x in given):
        return None
    generator = torch.Generator().manual_seed(seed)

    def noisy(value: Any) -> Any:
        if not isinstance(value, Tensor) or not inexact(value):
            return value
        return value + _noise(value, generator).to(value)

    args, kwargs = as_call(inputs)
    return tree_map(noisy, kwargs or args)


def _fan_in(tensor: Tensor, kind: nn.Module, part: str) -> int:
    """The number of inputs of a unit: of a bare parameter, whose layout is not known, the larger of its last two axes."""
    if part in ("weight", "original", "original0", "original1", "weight_v", "weight_g") or part.startswith(
        ("weight_", "in_proj")
    ):
        axis = 1 if isinstance(kind, _ConvTransposeNd) else 0
        return max(1, tensor.numel() // max(1, tensor.shape[axis]))
    return max(1, *tensor.shape[-2:])


WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}


NARROW = {
    torch.float64: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex128: torch.complex64,
    torch.complex32: torch.complex64,
}
SINGLE = (
    1e-5  # the least tolerance in single precision, well above its rounding, and below what a wrong permutation changes
)


class Probe:
    """One architecture in evaluation mode, in float64 and complex128.

    Args:
        or_single: compute in float32 and complex64 where the module cannot be computed in double precision, which shows at
            the first outputs.

    Raises:
        CertificateError: the model has no numbers (meta device).
    """

    def __init__(self, model: nn.Module, outputs: OutputSelector, *, or_single: bool = False) -> None:
        if any(tensor.is_meta for tensor in model.state_dict().values()):
            raise CertificateError(
                "the model is on the meta device, so there are no numbers to certify on: "
                "certify a smaller twin of the same architecture"
            )
        state = model.state_dict()
        device = next((tensor.device for tensor in state.values()), torch.device("cpu"))
        if device.type == "mps":  # which has no float64
            device = torch.device("cpu")
        self.outputs = outputs
        self.names: tuple[str, ...] = ()
        self._model, self._device, self._or_single = model, device, or_single
        self._complex = any(tensor.is_complex() for tensor in state.values())
        self._compute_in(torch.float64)

    def _compute_in(self, dtype: torch.dtype) -> None:
        self.network = Network(self._model, self._device, dtype=dtype)
        self.single = dtype == torch.float32
        self.dtype = str(dtype.to_complex() if self._complex else dtype).removeprefix("torch.")
        self._kinds = NARROW if self.single else WIDE
        self._wide: dict[str, tuple[Tensor, Tensor]] = {}  # name -> what was given, and as it was loaded

    def tolerance(self, wanted: float) -> float:
        """The difference that is allowed in the precision of this probe, where this one is allowed in double precision."""
        return max(wanted, SINGLE) if self.single else wanted

    def outputs_of(self, inputs: Inputs, weights: Weights) -> list[Tensor]:
        """The outputs of the module on the inputs with these weights.

        Raises:
            CertificateError: the module cannot be computed in double precision, nor, where that is allowed, in single.
            InputError: inputs without values, or on a device from which they cannot be brought to the module's.
        """
        self._load(weights)
        try:
            with torch.no_grad():
                found = self._result(inputs)
        except CertificateError as error:
            if not self._or_single:
                raise
            found = self._in_single(inputs, weights, error)
        self._or_single = False
        self.names = tuple(found) if set(found) != {""} else ()
        return [tensor.detach().clone() for tensor in found.values()]

    def _in_single(self, inputs: Inputs, weights: Weights, refused: CertificateError) -> dict[str, Tensor]:
        self._compute_in(torch.float32)
        self._load(weights)
        try:
            with torch.no_grad():
                return self._result(inputs)
        except LmcError:
            self._compute_in(torch.float64)
            raise refused from None

    def slopes(self, inputs: Inputs, weights: Weights, seed: int) -> Weights:
        """The gradient, by each parameter, of a random sum of the outputs: normal coefficients over the root of the number
        of outputs, and relative to the largest, so that it moves by about as much as the outputs do. Empty where the module
        cannot be differentiated."""
        self._load(weights)
        parameters = {
            name: slot
            for name, slot in self.network.module.state_dict(keep_vars=True).items()
            if isinstance(slot, nn.Parameter) and inexact(slot)
        }
        try:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            with torch.enable_grad():
                outputs = [y for y in self._result(inputs).values() if y.requires_grad]
                generator = torch.Generator().manual_seed(seed)
                total = sum(_random_sum(y, generator) for y in outputs)
                if not isinstance(total, Tensor):
                    return {}
                with self._precision():
                    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        except Exception:  # noqa: BLE001 (operators without derivatives raise what they like)
            return {}
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
        return {name: slope.cpu() for name, slope in zip(parameters, found, strict=True) if slope is not None}

    def pullbacks(
        self, inputs: Inputs, weights: Weights, names: Collection[str], factors: Tensor, most: int
    ) -> Iterator[tuple[int, Weights]]:
        """The gradients of sums of the outputs by some tensors, statistics included, as many at once as have `most` entries.

        Args:
            factors: (R, number of outputs) of the sums; of outputs as `flat` has them.

        Returns:
            Pairs: the number of the first of some sums, and the gradients (number of sums, *shape) of what they depend on.
        """
        self._load(weights)
        slots = self.network.module.state_dict(keep_vars=True)
        wanted = {n: slots[n] for n in names}
        try:
            for slot in wanted.values():
                slot.requires_grad_(True)
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _WrittenOut():
                outputs = flat(list(self._result(inputs).values()))
            chunk = max(1, most // sum(slot.numel() for slot in wanted.values()))
            for start in range(0, len(factors), chunk):
                rows = factors[start : start + chunk].to(outputs.device)
                with self._precision():
                    found = _gradients(outputs, list(wanted.values()), rows)
                yield start, {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}
        finally:
            for slot in wanted.values():
                slot.requires_grad_(False)

    def _result(self, inputs: Inputs) -> dict[str, Tensor]:
        args, kwargs = tree_map(self._input, as_call(inputs))
        with forked(self.network.device, 0), quiet(), self._precision():
            try:
                result = self.network.run(kwargs or args)
            except LmcError:
                raise
            except Exception as error:
                raise not_computed(self.network.module, args, kwargs, error) from error
        return kept(result, self.outputs)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        if not self.single:
            with _double():
                yield
            return
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), default_dtype(torch.float32):
            yield

    def _load(self, weights: Weights) -> None:
        """Take on weights. Tensors that were loaded just before are not widened again, and where the module derives nothing
        from its weights, the memory of those that are replaced is used again."""
        device, in_place = self.network.device, self.network.by_reference
        for name, tensor in weights.items():
            source, wide = self._wide.get(name, (None, None))
            if source is not tensor:
                if wide is not None and in_place:
                    wide.copy_(tensor)
                else:
                    wide = tensor.detach().to(device, self._kinds.get(tensor.dtype, tensor.dtype), copy=True)
                self._wide[name] = (tensor, wide)
        self.network.load({name: wide for name, (_, wide) in self._wide.items()})

    def _input(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return mapped(value, self._input) if is_object(value) else value
        if value.is_meta:
            raise InputError(
                f"inputs are on the meta device, the model on {self.network.device}: pass inputs with values"
            )
        return value.to(self.network.device).to(self._kinds.get(value.dtype, value.dtype))


def flat(outputs: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Tensor:
    """All outputs in one row, each relative to its largest value, or that of `like`; values that are not finite, such as
    masked logits, are 0."""
    rows = []
    for output, measure in zip(outputs, like or outputs, strict=True):
        real, by = (torch.view_as_real(x) if x.is_complex() else x for x in (output, measure.detach()))
        size = by[by.isfinite()].abs().max() if bool(by.isfinite().any()) else by.new_zeros(())
        row = torch.where(real.detach().isfinite(), real, 0).reshape(-1).double()
        rows.append(row / size if size > 0 else row)
    return torch.cat(rows)


def _gradients(outputs: Tensor, inputs: list[Tensor], factors: Tensor) -> Sequence[Tensor | None]:
    """The gradients (R, *shape) of R sums at once, where all operators allow it, else one after the other."""
    try:
        return torch.autograd.grad(
            outputs, inputs, factors, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
    except RuntimeError:
        each = [torch.autograd.grad(outputs, inputs, row, retain_graph=True, allow_unused=True) for row in factors]
        return [None if rows[0] is None else torch.stack(rows) for rows in zip(*each, strict=True)]


class _WrittenOut(TorchFunctionMode):
    """Batch normalisation by its formula: torch gives no derivative by running statistics."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    shape = (-1, *[1] * (input.ndim - 2))
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    return input * scale.reshape(shape) + shift.reshape(shape)


def _random_sum(outputs: Tensor, generator: torch.Generator) -> Tensor:
    flat = torch.view_as_real(outputs).flatten() if outputs.is_complex() else outputs.flatten()
    finite = flat.detach().isfinite()
    size = flat.detach()[finite].abs().max() if bool(finite.any()) else flat.new_ones(())
    factors = torch.randn(flat.shape, generator=generator, dtype=torch.float64).to(flat) * finite
    return torch.where(finite, flat, 0) @ factors / (size if size > 0 else 1) / max(1, flat.numel()) ** 0.5


@contextmanager
def _double() -> Iterator[None]:
    """Computation in double precision throughout, also where a model casts down or names no dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), _Widened():
            yield
    finally:
        torch.set_default_dtype(before)


class _Widened(TorchDispatchMode):
    """Turn casts to lower precision inside a model (norms, rotary embeddings) into casts to double precision."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(_wide, args), tree_map(_wide, kwargs or {})
        if str(func).startswith("aten._grouped_mm"):
            return _grouped_product(*args, **kwargs)
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    return WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _grouped_product(
    x: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, **_: Any
) -> Tensor:
    """A product that torch computes in single precision only: rows of x (t, i) up to `offs[e]` times weight[e] (i, o), one after
    the other, for weights (e, i, o)."""
    if x.ndim != 2 or weight.ndim != 3 or offs is None or bias is not None:
        raise NotImplementedError("a grouped product of other than sorted rows (t, i) and matrices (e, i, o)")
    result = x.new_zeros(len(x), weight.shape[2])
    ends = offs.tolist()
    for start, end, matrix in zip([0, *ends], ends, weight, strict=False):
        result[start:end] = x[start:end] @ matrix
    return result
