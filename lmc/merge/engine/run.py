"""One call of a merging method: what is fixed before the first tensor, and what its rule is given for each."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lmc.merge.engine.chunks import Cut, Part, grain
from lmc.merge.engine.moments import Moments
from lmc.merge.engine.passes import Read
from lmc.merge.engine.patterns import PerName
from lmc.merge.engine.rng import Uniform, generator
from lmc.merge.engine.tensors import WeightSets

GIVEN = ("base", "name", "generator", "uniform", "moments", "survey")  # parameters of rules that are not options


@dataclass(frozen=True)
class Run:
    """A call.

    Attributes:
        sets: the inputs.
        options: the rule's options for each name.
        read: what the rule is called with, for a name and a part of its tensor.
        cut: which parts it may be given.
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

    def apply(self, rule: Callable[..., Any], wanted: Container[str], name: str, part: Part) -> Any:
        """What the rule, which wants those of `GIVEN`, makes of a tensor or of a part of it, flattened."""
        rows = part is not None and self.cut != "entries"

        def shaped(value: Any) -> Any:
            return value.unflatten(-1, (-1, grain(self.sets.shells[name], self.cut))) if rows else value

        def base() -> Tensor | None:
            return None if self.sets.base is None else shaped(self.sets.base_tensor(name, part))

        makers: dict[str, Callable[[], Any]] = {
            "base": base,
            "name": lambda: name,
            "generator": lambda: generator(self.seed, name),
            "uniform": lambda: Uniform(self.seed, name, part),
            "moments": lambda: partial(self.moments, name),
            "survey": lambda: self.survey,
        }
        given = {key: make() for key, make in makers.items() if key in wanted}
        found = rule(*map(shaped, self.read(name, part)), **given, **self.options(name))
        return found.flatten() if rows else found
