"""A random program in the making: values are computed while it is written, so that every line it keeps runs."""

import linecache
import random
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIMIT = 3000  # entries of the largest value


@dataclass
class Draft:
    """Lines written so far and the value of every variable.

    Attributes:
        random: the only source of choices; one seed, one program.
        sizes: axis sizes to draw from. Few and small, so that sizes coincide and values can be combined.
        values: variable name -> value on the example input.
        module: carries parameters, buffers and submodules as attributes; `init` are the lines that make them.
    """

    random: random.Random
    sizes: tuple[int, ...] = (2, 3, 4, 6)
    limit: int = LIMIT
    values: dict[str, Tensor] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    module: nn.Module = field(default_factory=nn.Module)
    used: set[str] = field(default_factory=set)

    def size(self) -> int:
        return self.random.choice(self.sizes)

    def pick(self, min_dim: int = 1, max_dim: int = 5, rank: int | None = None) -> str:
        """A variable, later ones more likely; raises LookupError if none has the wanted number of axes."""
        if rank is not None:
            min_dim = max_dim = rank
        names = [n for n, v in self.values.items() if min_dim <= v.dim() <= max_dim]
        if not names:
            raise LookupError
        name = names[max(self.random.randrange(len(names)), self.random.randrange(len(names)))]
        self.used.add(name)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def axis(self, name: str) -> int:
        """An axis of the variable, with more than one entry if there is one, and rarely the batch."""
        shape = self.shape(name)
        wide = [k for k, n in enumerate(shape) if n > 1 and (k > 0 or self.random.random() < 0.1)]
        return self.random.choice(wide or list(range(len(shape))))

    def parameter(self, *shape: int) -> str:
        """A parameter of a shape: a new one, or one that is already used elsewhere, perhaps transposed."""
        same = [f"self.{n}" for n, p in self.module.named_parameters() if tuple(p.shape) == shape and "." not in n]
        if len(shape) == 2:
            turned = (shape[1], shape[0])
            same += [
                f"self.{n}.t()" for n, p in self.module.named_parameters() if tuple(p.shape) == turned and "." not in n
            ]
        if same and self.random.random() < 0.2:
            return self.random.choice(same)
        name = f"p{sum(1 for _ in self.module.named_parameters())}"
        fan = max(1, max(shape, default=1))
        text = f"nn.Parameter(torch.randn({', '.join(map(str, shape))}) * {fan**-0.5 + 0.2:.2f})"
        return self.attribute(name, text)

    def buffer(self, *shape: int, positive: bool = False, persistent: bool = True) -> str:
        name = f"b{len(self.init)}"
        text = (
            f"torch.rand({', '.join(map(str, shape))}) + 0.5"
            if positive
            else f"torch.randn({', '.join(map(str, shape))})"
        )
        line = f"self.register_buffer({name!r}, {text}, persistent={persistent})"
        self.run_init(line)
        return f"self.{name}"

    def submodule(self, text: str) -> str:
        return self.attribute(f"m{len(self.init)}", text)

    def attribute(self, name: str, text: str) -> str:
        self.run_init(f"self.{name} = {text}")
        return f"self.{name}"

    def run_init(self, line: str) -> None:
        exec(line, {"torch": torch, "nn": nn, "F": F, "self": self.module})
        self.module.eval()
        self.init.append(line)

    def emit(self, *statements: str) -> str:
        """Appends statements, the last of which is an expression that becomes a new variable; returns its name.

        Raises ValueError if the value is unusable: too large, not finite, constant or not a float tensor.
        """
        name = f"v{len(self.lines)}"
        lines = [*statements[:-1], f"{name} = {statements[-1]}"]
        scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "self": self.module} | self.values
        with torch.no_grad():
            for line in lines:
                exec(line, scope)
        value = scope[name]
        if not isinstance(value, Tensor) or not value.is_floating_point() or not 0 < value.numel() <= self.limit:
            raise ValueError
        if not bool(value.isfinite().all()) or float(value.abs().max()) > 300 or value.dim() > 6:
            raise ValueError
        self.lines += lines
        self.values[name] = value
        return name


@dataclass(frozen=True)
class Program:
    """A finished program: its source, and a module and inputs made from it."""

    seed: int
    source: str
    input_shape: tuple[int, ...]

    def module(self) -> nn.Module:
        """The module with random weights, float64, in eval mode."""
        name = f"<program {self.seed}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
        exec(compile(self.source, name, "exec"), scope)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            module = scope["Program"]().double().eval()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        return module

    def inputs(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        return torch.randn(self.input_shape, generator=generator, dtype=torch.float64)


def source_of(draft: Draft, result: str) -> str:
    body = [f"        {line}" for line in draft.init] or ["        pass"]
    steps = [f"        {line}" for line in draft.lines]
    return "\n".join(
        ["class Program(nn.Module):", "    def __init__(self):", "        super().__init__()", *body]
        + ["    def forward(self, x):", *steps, f"        return {result}", ""]
    )
