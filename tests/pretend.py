"""A pretend accelerator: tensors on a device of their own, whose memory is the host's and whose kernels are the CPU's.

Torch has one slot for devices that it does not know, and lets Python fill it (`torch.utils.backend_registration`). What
CUDA refuses is refused: two devices in one operator (but CPU scalars without dimensions and CPU indices pass), numpy,
numbers drawn by a generator of another device. What makes a GPU wait for its queue is counted: numbers that are read, and
copies to the host.

It shows results on the wrong device, inputs that were not moved, secret trips through numpy, randomness that is not seeded
there, and how often code waits. It does not show speed, memory, races, other rounding, or what stands behind
`device.type == "cuda"`. A process has one such device.
"""

import contextlib
import copy
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map

NAME = "pretend"
aten = torch.ops.aten
# The second argument is indices, which may lie on the CPU.
INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor,
    aten._index_put_impl_.default,
}  # fmt: skip
# Operators that make a tensor of none, which a class of tensors does not see.
MAKERS = (
    "empty.memory_format", "empty_strided", "zeros", "ones", "full", "scalar_tensor", "arange", "arange.start",
    "arange.start_step", "linspace", "eye", "eye.m", "tril_indices", "triu_indices", "randperm", "randperm.generator",
    "rand", "rand.generator", "randn", "randn.generator", "randint", "randint.low", "randint.generator",
    "randint.low_generator",
)  # fmt: skip


@dataclasses.dataclass
class Counts:
    """Operators on the device; numbers read from it, by `.item()` and its kin; copies; and lines of lmc that wait."""

    launches: int = 0
    items: int = 0
    to_host: int = 0
    to_device: int = 0
    lines: Counter[str] = dataclasses.field(default_factory=Counter)

    def note(self, what: str) -> None:
        setattr(self, what, getattr(self, what) + 1)
        frame = sys._getframe(2) if what in ("items", "to_host") else None
        while frame is not None and "/lmc/" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None:
            self.lines[f"{frame.f_code.co_filename.rpartition('/lmc/')[2]}:{frame.f_lineno}"] += 1


COUNTS = [Counts()]  # of the innermost `counted` last


class Far(Tensor):
    """A tensor of the device; `near` is the same memory on the CPU."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        form = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        made = Tensor._make_wrapper_subclass(cls, near.size(), device=DEVICE, **form)
        made.near = near
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> Any:
        return ["near"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, _context: Any, _size: Any, _stride: Any) -> "Far":
        return Far(inner["near"])

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def untyped_storage(self) -> Any:
        return self.near.untyped_storage()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        COUNTS[-1].note("to_host")
        return self.near.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"far {self.near!r}"

    def __deepcopy__(self, memo: Any) -> Any:
        if id(self) not in memo:
            made = Far(self.near.detach().clone()).requires_grad_(self.requires_grad)
            memo[id(self)] = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        return memo[id(self)]

    @property
    def data(self) -> "Far":
        return Far(self.near.detach())

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, Far):
            raise RuntimeError(f"incompatible tensor type: {NAME} and cpu")
        Tensor.data.__set__(self, other)
        self.near = other.near


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator: checked, counted, computed on the host, and given back as tensors of the device."""
    counts, device = COUNTS[-1], kwargs.get("device")
    there = device is not None and torch.device(device).type == NAME
    if func is aten._to_copy.default and device is not None and there != isinstance(args[0], Far):
        counts.note("to_device" if there else "to_host")
        found = func(_near(args[0]), **{name: value for name, value in kwargs.items() if name != "device"})
        return Far(found) if there else found
    if func is aten.copy_.default and isinstance(args[0], Far) != isinstance(args[1], Far):
        counts.note("to_device" if isinstance(args[0], Far) else "to_host")
        _near(args[0]).copy_(_near(args[1]))
        return args[0]
    if func in (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default):
        counts.note("items")
    far, strangers = _sides(func, args, kwargs)
    counts.launches += func is not aten._local_scalar_dense.default
    if far and strangers:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! (in {func}, "
            f"a CPU tensor of shape {tuple(strangers[0].shape)})"
        )
    if kwargs.get("generator") is not None and (far or there):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu' (in {func})")
    plain = tree_map(_near, kwargs)
    if device is not None:
        plain["device"] = "cpu"
    if plain.get("pin_memory"):
        plain["pin_memory"] = False
    found = func(*tree_map(_near, args), **plain)
    if torch.Tag.inplace_view in func.tags:
        _reshape(func, args, kwargs)
    known = {id(tensor.near): tensor for tensor in far}  # in place, or out=
    wanted = there if device is not None else bool(far)
    return tree_map(lambda x: known.get(id(x), Far(x) if wanted else x) if isinstance(x, Tensor) else x, found)


def _sides(func: Any, args: Any, kwargs: Any) -> tuple[list[Far], list[Tensor]]:
    """The tensors of the device among arguments, and those of the CPU that may not stand beside them."""
    far: list[Far] = []
    strangers: list[Tensor] = []

    def meet(value: Any, free: bool) -> None:
        if isinstance(value, Far):
            far.append(value)
        elif isinstance(value, Tensor):
            strangers.extend([value] if value.ndim and not free else [])
        elif isinstance(value, list | tuple):
            for part in value:
                meet(part, free)

    for i, value in enumerate(args):
        meet(value, func in INDEXED and i == 1)
    for value in kwargs.values():
        meet(value, False)
    return far, strangers


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


def _reshape(func: Any, args: Any, kwargs: Any) -> None:
    """Give a tensor the sizes that an operator such as `squeeze_` has given to its memory."""
    before = torch._C._meta_in_tls_dispatch_include()
    torch._C._set_meta_in_tls_dispatch_include(True)
    try:
        with no_dispatch():
            func(*args, **kwargs)
    finally:
        torch._C._set_meta_in_tls_dispatch_include(before)


class _Module:
    """What `torch.pretend` offers; its random numbers are those of the CPU."""

    def __getattr__(self, name: str) -> Any:
        answers = {"is_available": True, "is_initialized": True, "_is_in_bad_fork": False, "device_count": 1}
        if name in (*answers, "current_device", "synchronize", "empty_cache", "set_device"):
            return lambda *_, **__: answers.get(name, 0)
        raise AttributeError(name)

    def manual_seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.default_generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    manual_seed = manual_seed_all


def _registered() -> torch.library.Library:
    """Take the free slot of devices."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    for name in MAKERS:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet), overload or "default")
        library.impl(name, lambda *args, op=op, **kwargs: run(op, args, kwargs), NAME_OF_SLOT)
    library.impl("_efficientzerotensor", lambda size, **how: run(aten.zeros.default, (size,), how), NAME_OF_SLOT)
    library.impl("_copy_from", lambda source, to, *_: run(aten.copy_.default, (to, source), {}), NAME_OF_SLOT)
    return library


NAME_OF_SLOT = "PrivateUse1"
LIBRARY = _registered()
DEVICE = torch.device(NAME, 0)


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """What the device is asked for inside."""
    COUNTS.append(Counts())
    try:
        yield COUNTS[-1]
    finally:
        COUNTS.pop()


def far(value: Any) -> Any:
    """A copy on the device of a tensor, a module, or what mappings and sequences hold."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(DEVICE)
    if isinstance(value, Tensor):
        return value.detach().to(DEVICE)
    if isinstance(value, dict):
        return {name: far(part) for name, part in value.items()}
    return type(value)(map(far, value)) if isinstance(value, list | tuple) else value
