"""One architecture of the zoo: how to build it, what to feed it, and which symmetries it has by hand derivation."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Symmetry:
    """A direct or iterated product of symmetric groups, written as a sum: `S(64) + 2 * (S(4) + 4 * S(16))`.

    `sizes` counts the factors by size; a wreath product such as "16 units in each of 4 heads that may be exchanged"
    is `S(4) + 4 * S(16)`. Adding them up gives the number of groups and the logarithm of the order at once.
    """

    sizes: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: "Symmetry") -> "Symmetry":
        return Symmetry(self.sizes + other.sizes)

    def __radd__(self, other: int) -> "Symmetry":
        return self  # lets sum() start at 0

    def __rmul__(self, times: int) -> "Symmetry":
        return Symmetry(Counter({n: times * k for n, k in self.sizes.items()}))

    @property
    def groups(self) -> int:
        return sum(self.sizes.values())

    @property
    def log10_order(self) -> float:
        return sum(k * math.lgamma(n + 1) for n, k in self.sizes.items()) / math.log(10)

    def __str__(self) -> str:
        return " + ".join(f"{k} x S({n})" for n, k in sorted(self.sizes.items(), reverse=True)) or "none"


def S(n: int) -> Symmetry:
    """The symmetric group on n units; nothing for n < 2."""
    return Symmetry(Counter({n: 1}) if n > 1 else Counter())


def heads(h: int, unit: int, qk: int | None = None) -> Symmetry:
    """Attention with h heads: exchange heads, the `unit` value units of each head, and its `qk` query/key units."""
    return S(h) + h * (S(unit) + S(unit if qk is None else qk))


def grouped_query(kv: int, repeat: int, unit: int, qk: int = 0) -> Symmetry:
    """Attention with kv key/value heads, each read by `repeat` query heads; with a full rotary embedding qk = 0."""
    return S(kv) + kv * (S(repeat) + S(unit) + S(qk))


@dataclass(frozen=True)
class Entry:
    """An architecture and what must be found in it.

    Attributes:
        name: unique, used as the test's name.
        model: builds the module; called under a fixed seed.
        inputs: makes the example inputs (tensor, tuple or dict) from a generator.
        expected: the whole permutation symmetry, derived by hand from the architecture.
        larger: makes inputs of another batch size, length or resolution on which the symmetry must hold too.
        outputs: the output that must stay the same, if not the default.
        still: patterns of the parameters that lie on no moving axis (biases of the output, temperatures, ...).
        still_entries: number of further entries that stay, in parameters of which a part moves.
        found: what is found where that is less than `expected`; `short` says why.
        recover: whether weight matching can recover a planted permutation (needs weights that tell units apart).
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    expected: Symmetry
    larger: Callable[[torch.Generator], Any] | None = None
    outputs: Any = None
    still: tuple[str, ...] = ()
    still_entries: int = 0
    found: Symmetry | None = None
    short: str = ""
    recover: bool = True

    def build(self, seed: int = 0) -> nn.Module:
        """The module in eval mode, every parameter and float buffer random: no zeros, no ones."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model().eval()
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for tensor in list(model.parameters()) + persistent_buffers(model):
                if tensor.is_floating_point():
                    positive = bool((tensor > 0.5).all())  # scales and variances stay positive
                    tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor), alpha=0.1)
                    if positive:
                        tensor.abs_()
        return model

    def example(self, seed: int = 0) -> Any:
        return self.inputs(torch.Generator().manual_seed(seed))

    def larger_example(self, seed: int = 0) -> Any:
        return None if self.larger is None else self.larger(torch.Generator().manual_seed(seed))

    def share_moving(self, model: nn.Module) -> float:
        """Expected share of the parameters that lie on a moving axis."""
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        still = sum(n for name, n in sizes.items() if any(fnmatch(name, pattern) for pattern in self.still))
        return 1 - (still + self.still_entries) / sum(sizes.values())


def persistent_buffers(model: nn.Module) -> list[Tensor]:
    state = model.state_dict(keep_vars=True)
    return [b for name, b in model.named_buffers() if name in state]


def vectors(*shape: int) -> Callable[[torch.Generator], Tensor]:
    """Standard normal inputs of a shape."""
    return lambda generator: torch.randn(shape, generator=generator)


def tokens(batch: int, length: int, vocabulary: int) -> Callable[[torch.Generator], Tensor]:
    """Token indices (batch, length)."""
    return lambda generator: torch.randint(0, vocabulary, (batch, length), generator=generator)
