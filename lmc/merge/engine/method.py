"""Lifting a few lines about one tensor to a merging method for whole models.

A method is written as a plain function of one named tensor and lifted by one of three decorators:

    @linear                                  @on_tensors                       @on_task_vectors
    def last(count):                         def median(tensors):              def largest(deltas):
        return [0.0] * (count - 1) + [1.0]       return tensors.median(0).values   return deltas.amax(0)

    last([a, b, c])                          median([a, b, c])                 largest([a, b], base=base, scale=0.5)

`linear` rules give one coefficient per model (what is missing to 1 goes to the base); `tensors` and `deltas` (task
vectors, model minus base) are `(models, *shape)` in float32 or wider. Keyword-only parameters of the rule become
options of the method, each given as one value or per name pattern (`patterns.py`). A rule that names one of these
parameters receives it:

- `base`: the base's tensor `(*shape)`;
- `name`: the name of the tensor;
- `generator`: a CPU random generator that depends on the option `seed` and on the name alone;
- `uniform`: a function of a `(models, *shape)` tensor that gives random numbers from [0, 1) for its entries, which
  depend on the option `seed`, the name and the entry's place alone;
- `moments`: a function without arguments that gives the means and inner products of whole tensors (`moments.Moments`),
  of tensors minus base if the rule names `base` and there is one; it reads the tensor once more;
- `parts`: all of the tensor, chunk by chunk, as `(chunk, values)`; `parts.once(find)` keeps what a function finds in them;
- `survey`: what the method's survey found in a first pass over all tensors (thresholds of whole models).

Every method reads one tensor of all models at a time; one with a survey reads them all more than once. A rule that
treats every entry alike is declared `elementwise=True` and given large tensors in chunks, flattened to
`(models, entries)`; linear rules always are. One that treats every row alike, `cut="rows"`, is given some rows,
`(models, rows, last axis)`, and a vector, which is one row, whole; `cut="filters"` keeps together what is at one place
of the first axis, `(models, filters, rest)`. With chunks, memory does not depend on the size of tensors.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lmc.core.context import own_context
from lmc.errors import InputError
from lmc.merge.engine.aligning import PARAMETER, aligned
from lmc.merge.engine.assembly import assembler, joined
from lmc.merge.engine.call import (
    GIVEN,
    MethodCall,
    Pass,
    PerName,
    Read,
    affine,
    check_numbers_of,
    coefficients,
    convex,
    proportions,
)
from lmc.merge.engine.chunks import Chunk, Cut, Make
from lmc.merge.engine.tensors import WeightSets, weight_sets
from lmc.weights import ModelOrWeights, StateDict

Rule = Callable[..., Any]
Survey = Callable[..., Any]
Delta = Callable[..., Tensor]  # the merged task vector of a name, or of a chunk of it
Kind = Literal["linear", "tensors", "task vectors"]
Cutting = Cut | Callable[..., Cut]  # which chunks a rule may be given, or a function of its options


class MergeFunction(Protocol):
    """A merging method: `method(models, *, base=None, ...) -> weights`; `.method` holds how it is made."""

    __name__: str

    @property
    def method(self) -> "Method": ...

    def __call__(self, models: Sequence[ModelOrWeights], **options: Any) -> StateDict: ...


@dataclass(frozen=True)
class Method:
    """A rule for one tensor and how it is lifted.

    Attributes:
        rule: the function of one tensor.
        kind: what the rule is given: nothing but the number of models, their tensors, or their task vectors.
        survey: a function of a `Pass` and the options, called once before the rule; None if one tensor at a time
            suffices.
        shares: for rules on tensors, from the options to the share of each model in averaged statistics.
        cut: which chunks of large tensors the rule may be given; of linear rules, any.
        alone: whether a rule on tensors is asked about a lone model, which is given back otherwise.
    """

    rule: Rule
    kind: Kind
    survey: Survey | None = None
    shares: Callable[..., Sequence[float]] | None = None
    cut: Cutting = "whole"
    alone: bool = False

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters of the rule."""
        found = inspect.signature(self.rule).parameters.values()
        return {p.name: p for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def one_pass(self) -> bool:
        """True where each tensor is read once only, whatever the options."""
        return self.survey is None and not {"moments", "parts"} & set(self.parameters)

    @property
    def needs_base(self) -> bool:
        return self.kind == "task vectors" or (
            "base" in self.parameters and self.parameters["base"].default is inspect.Parameter.empty
        )

    @property
    def signature(self) -> inspect.Signature:
        """The signature of the lifted function."""
        keyword = inspect.Parameter.KEYWORD_ONLY
        base = inspect.Parameter("base", keyword, default=inspect.Parameter.empty if self.needs_base else None)
        extra = [inspect.Parameter("scale", keyword, default=1.0)] if self.kind == "task vectors" else []
        if "generator" in self.parameters or "uniform" in self.parameters:
            extra.append(inspect.Parameter("seed", keyword, default=0))
        own = [p for p in self.parameters.values() if p.name not in GIVEN]
        models = inspect.Parameter("models", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return inspect.Signature([models, base, *own, *extra])

    def options_of(self, base: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a call, with those that a postprocessing method hands on.

        Raises:
            InputError: an option that there is not, or one or a base that is missing.
        """
        name = self.rule.__name__
        try:
            found = self.signature.bind([], **({} if base is None else {"base": base}), **options).arguments
        except TypeError as error:
            raise InputError(f"{name}: {error}; call it as {name}{self.signature}") from None
        further = found.pop("options", {})
        return {key: value for key, value in found.items() if key not in ("models", "base")} | further

    def cuts(self, options: Mapping[str, Any]) -> Cut:
        """The chunks of large tensors that are worked on at a time."""
        if self.kind == "linear":
            return "entries"
        return self.cut(**options) if callable(self.cut) else self.cut

    def stream(self, sets: WeightSets, **options: Any) -> Iterator[tuple[str, Tensor]]:
        """The merged weights, `(name, tensor)` one at a time in the order of the first model."""
        return joined(sets, self.maker(sets, **options))

    def maker(self, sets: WeightSets, **options: Any) -> Make:
        """The maker of the tensors of names that are no aliases, in chunks, `(name, chunk, values)`; surveys come first, here."""
        check_numbers_of(options, {name: p.default for name, p in self.signature.parameters.items()})
        cut = self.cuts(options)
        if self.kind == "task vectors":
            shares = self._shares(sets, options)
            return _add_deltas(sets, self.deltas(sets, **options), shares, cut)
        if self.kind == "linear":
            call = self._prepare(sets, options, lambda name, chunk: (len(sets),), cut)

            def chosen(name: str) -> tuple[list[float], float]:
                return affine(self._rule(call, name, None))

            def combined(name: str, chunk: Chunk) -> Tensor:
                return sets.combine(name, *chosen(name), chunk=chunk)

            return assembler(sets, combined, lambda name: convex(chosen(name)), cut)
        call = self._prepare(sets, options, lambda name, chunk: (sets.stack(name, chunk),), cut)

        def merged(name: str, chunk: Chunk) -> Tensor:  # an average of one model is that model, bit for bit
            lone = len(sets) == 1 and not self.alone
            return sets.combine(name, [1.0], chunk=chunk) if lone else self._rule(call, name, chunk)

        return assembler(sets, merged, lambda name: self._average(call, name), cut)

    def deltas(self, sets: WeightSets, **options: Any) -> Delta:
        """For methods on task vectors: the merged task vector of a name, `scale` included, in float32 or wider."""
        if self.kind != "task vectors":
            raise InputError(f"{self.rule.__name__} is not a method on task vectors: it has no merged task vector")
        return self._scaled(sets, options, lambda name, chunk: (sets.deltas(name, chunk),), self.cuts(options))

    def _scaled(self, sets: WeightSets, options: dict[str, Any], read: Read, cut: Cut) -> Delta:
        scales = PerName({"scale": options.pop("scale", 1.0)}, {"scale": 1.0}, sets.names)
        call = self._prepare(sets, options, read, cut)

        def scaled(name: str, chunk: Chunk = None) -> Tensor:
            found, scale = self._rule(call, name, chunk), scales(name)["scale"]
            return found if scale == 1.0 else found * scale

        return scaled

    def _prepare(self, sets: WeightSets, options: dict[str, Any], read: Read, cut: Cut) -> MethodCall:
        if self.needs_base and sets.base is None:
            raise InputError(f"{self.rule.__name__} needs the weights that the models were fine-tuned from: pass base=")
        seed = int(options.pop("seed", 0))
        empty = inspect.Parameter.empty
        defaults = {
            p.name: p.default for p in self.parameters.values() if p.default is not empty and p.name not in GIVEN
        }
        if unknown := next((name for name in options if name not in self.parameters or name in GIVEN), None):
            own = ", ".join(name for name in self.parameters if name not in GIVEN)
            raise InputError(f"{self.rule.__name__} has no option {unknown!r}; it has {own or 'none'}")
        options = defaults | options
        found = self.survey(Pass(sets, read, cut), **options) if self.survey else None
        from_base = "base" in self.parameters and sets.base is not None
        apart = Pass(sets, (lambda name, chunk: (sets.deltas(name, chunk),)) if from_base else read, cut)
        return MethodCall(sets, PerName(options, defaults, sets.names), read, cut, seed, found, apart)

    def _rule(self, call: MethodCall, name: str, chunk: Chunk) -> Any:
        return call.apply(self.rule, self.parameters, name, chunk)

    def _average(self, call: MethodCall, name: str) -> tuple[list[float], float]:
        """Shares of the models in a statistic: the rule's own if it has them, in proportion to `weights`, or equal."""
        options = call.options(name)
        values = self.shares(**options) if self.shares else coefficients(options.get("weights"), len(call.sets))
        return convex((proportions(values), 0.0))

    def _shares(self, sets: WeightSets, options: dict[str, Any]) -> Callable[[str], tuple[list[float], float]]:
        """Statistics follow the sum `base + scale * sum_t w_t tau_t`, but never leave the range of the inputs."""
        chosen = {"scale": options.get("scale", 1.0), "weights": options.get("weights")}
        resolve = PerName(chosen, {"scale": 1.0, "weights": None}, sets.names)

        def shares(name: str) -> tuple[list[float], float]:
            here = resolve(name)
            sizes = [abs(w * here["scale"]) for w in coefficients(here["weights"], len(sets))]
            total = max(1.0, sum(sizes))
            return [size / total for size in sizes], max(0.0, 1.0 - sum(sizes))

        return shares


def _add_deltas(
    sets: WeightSets, delta: Delta, shares: Callable[[str], tuple[Sequence[float], float]], cut: Cut
) -> Make:
    """`base + delta` for every weight; where the delta is that of a lone model, that model's own bits."""

    def merged(name: str, chunk: Chunk) -> Tensor:
        move = delta(name, chunk)
        result = sets.base_tensor(name, chunk) + move
        if len(sets) == 1:  # base + (model - base) differs from the model in the last bit
            result = torch.where(move == sets.deltas(name, chunk)[0], sets.stack(name, chunk)[0], result)
        return result

    return assembler(sets, merged, shares, cut)


def linear(rule: Rule) -> MergeFunction:
    """Lift `rule(count, *, ...) -> coefficients`: one per model; what they lack to 1 is the base's share."""
    return lift(Method(rule, "linear"))


def on_tensors(
    rule: Rule | None = None,
    *,
    shares: Callable[..., Sequence[float]] | None = None,
    elementwise: bool = False,
    cut: Cutting = "whole",
    alone: bool = False,
) -> Any:
    """Lift `rule(tensors, *, ...) -> tensor`: from `(models, *shape)` to `(*shape)`; a lone model is given back.

    `shares(**options)` gives how much of each model goes into averaged statistics (default: `weights`, or equal).
    `elementwise` and `cut` say which chunks of large tensors the rule may be given. With `alone`, the rule is asked about
    a lone model as well.
    """
    if rule is None:
        return partial(on_tensors, shares=shares, elementwise=elementwise, cut=cut, alone=alone)
    return lift(Method(rule, "tensors", shares=shares, cut="entries" if elementwise else cut, alone=alone))


def on_task_vectors(
    rule: Rule | None = None, *, survey: Survey | None = None, elementwise: bool = False, cut: Cutting = "whole"
) -> Any:
    """Lift `rule(deltas, *, ...) -> delta`: task vectors `(models, *shape)` into one; `scale` of it is added.

    `elementwise`: the rule treats every entry alike, so that it may be given chunks of flattened tensors; `cut` says
    which other chunks it may be given.
    """
    if rule is None:
        return partial(on_task_vectors, survey=survey, elementwise=elementwise, cut=cut)
    return lift(Method(rule, "task vectors", survey, cut="entries" if elementwise else cut))


def lift(method: Method) -> MergeFunction:
    """The function `method(models, *, base=None, ..., align=None) -> weights`, with the rule's name and docstring."""
    name = method.rule.__name__
    if "generator" in method.parameters and method.cut != "whole":
        raise InputError(f"{name}: a generator would start again in every chunk; name `uniform` instead of `generator`")
    parameters = list(method.signature.parameters.values())
    open_ended = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    signature = inspect.Signature([*parameters[: len(parameters) - len(open_ended)], PARAMETER, *open_ended])

    @own_context
    def merge(*args: Any, **options: Any) -> StateDict:
        try:
            arguments = signature.bind(*args, **options).arguments
        except TypeError as error:
            raise InputError(f"{name}: {error}; call it as {name}{signature}") from None
        models, base = arguments.pop("models"), arguments.pop("base", None)
        align = arguments.pop("align", None)
        arguments |= arguments.pop("options", {})  # further options, of postprocessing methods
        if align is not None:
            models, base = aligned(models, align, base=base)
        sets = weight_sets(models, base, pairs=True)
        return StateDict(method.stream(sets, **arguments), like=sets.states[0])

    merge.__name__ = merge.__qualname__ = name
    merge.__module__ = method.rule.__module__
    merge.__doc__ = method.rule.__doc__
    merge.__signature__ = signature  # type: ignore[attr-defined]
    merge.method = method  # type: ignore[attr-defined]
    return merge  # type: ignore[return-value]
