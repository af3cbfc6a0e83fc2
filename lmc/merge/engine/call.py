"""One call of a merging method: what is fixed before the first tensor, and what its rule is given for each."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lmc.merge.engine.chunks import Chunk, Cut, grain
from lmc.merge.engine.passes import Read
from lmc.merge.engine.patterns import PerName
from lmc.merge.engine.rng import Uniform, generator
from lmc.merge.engine.tensors import WeightSets
from lmc.network.moments import Moments

GIVEN = ("base", "name", "generator", "uniform", "moments", "survey")  # parameters of rules that are not options


@dataclass(frozen=True)
class MethodCall:
    """A call.

    Attributes:
        sets: the inputs.
        options: the rule's options for each name.
        read: what the rule is called with, for a name and a chunk of its tensor.
        cut: which chunks it may be given.
        seed: of random numbers.
        survey: what the survey found.
        moments: for a name, the moments of its whole tensors.
    """

    sets: WeightSets
    options: PerName
    read: Read
    cut: Cut
    seed: int
    survey: Any
    moments: Callable[[str], Moments]

    def apply(self, rule: Callable[..., Any], wanted: Container[str], name: str, chunk: Chunk) -> Any:
        """The result of the rule, which wants those of `GIVEN`, for a tensor or a chunk of it, flattened."""
        rows = chunk is not None and self.cut != "entries"

        def shaped(value: Any) -> Any:
            return value.unflatten(-1, (-1, grain(self.sets.shells[name], self.cut))) if rows else value

        def base() -> Tensor | None:
            return None if self.sets.base is None else shaped(self.sets.base_tensor(name, chunk))

        makers: dict[str, Callable[[], Any]] = {
            "base": base,
            "name": lambda: name,
            "generator": lambda: generator(self.seed, name),
            "uniform": lambda: Uniform(self.seed, name, chunk),
            "moments": lambda: partial(self.moments, name),
            "survey": lambda: self.survey,
        }
        given = {key: make() for key, make in makers.items() if key in wanted}
        found = rule(*map(shaped, self.read(name, chunk)), **given, **self.options(name))
        return found.flatten() if rows else found
