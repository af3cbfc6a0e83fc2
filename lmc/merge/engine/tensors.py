"""Several weight sets of one architecture, read one tensor at a time: what every merging method stands on.

Each name of a state dict is one of four things, and each is treated once, here, for all methods:

- a weight: a floating-point tensor; merged by the method, in float32 or wider, and cast back;
- a statistic: BatchNorm's running mean and variance (of a module: any floating-point buffer). It is averaged and
  takes no part in norms, cosines, masks or quantiles; re-estimate it afterwards (`lmc.recalibrate_batchnorm`);
- a tie: a second name of the same storage (embedding and output head). It is merged under its first name and tied
  again;
- anything else (integers, booleans, masks with infinities that are the same everywhere): copied from the first model.

A method that treats every entry, or every row, alike is given large tensors in parts, so that memory does not depend on
their size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from lmc.errors import InputError, WeightsError
from lmc.merge.engine.chunks import Ahead, Cut, Part, parts
from lmc.merge.engine.roles import equal, infinite, outline, tied
from lmc.weights import ModelOrWeights, as_weights, check_compatible
from lmc.weights.checkpoints.formats import flat
from lmc.weights.checkpoints.opening import Checkpoint, open_checkpoint
from lmc.weights.numbers import wide

STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class WeightSets:
    """The models to merge and the base they came from (or none), with the role of every name.

    Attributes:
        states: one mapping from names to tensors per model; a mapping that reads from disk works as well.
        base: the weights that all models were fine-tuned from, or None.
        weights: the names merged by the method, each stored tensor once, in the order of the first model.
        statistics: the names that are averaged.
        ties: second names of a stored tensor, each with its first name.
        dtype: the widest dtype that weights are computed in: float32, or float64 if any weight has it.
        skip: names that the result is to leave out.

    Wherever a `part` is given, only that part of the flattened tensor is read, and `(*shape)` is its length.
    """

    states: tuple[Mapping[str, Tensor], ...]
    base: Mapping[str, Tensor] | None
    weights: tuple[str, ...]
    statistics: frozenset[str]
    ties: Mapping[str, str]
    dtype: torch.dtype
    skip: frozenset[str] = frozenset()
    _ahead: Ahead = field(default_factory=Ahead, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.states)

    @cached_property
    def shells(self) -> Mapping[str, Tensor]:
        """The names with tensors of the right shape and dtype, whose values are not to be read."""
        return outline(self.states[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of weights and statistics: those that options per name pattern can speak of."""
        return (*self.weights, *sorted(self.statistics))

    def walk(self, names: Iterable[str], cut: Cut) -> Iterator[tuple[str, Part]]:
        """Every name with each part of its tensor (None is the whole), in order.

        What comes next is read from disk meanwhile, where it is small.
        """
        steps = ((name, part) for name in names for part in parts(self.shells[name], cut))
        sources = [(s, f"models[{i}]") for i, s in enumerate(self.states)] + [(self.base, "base")]
        lazy = [(state, who) for state, who in sources if isinstance(state, Checkpoint)]
        return self._ahead.walk(steps, self.shells, lazy, self._load)

    def stack(self, name: str, part: Part = None) -> Tensor:
        """`(models, *shape)`: the tensor `name` of every model, in float32 or wider."""
        first = self.tensor(name, 0, part)
        together = first.new_empty((len(self.states), *first.shape))
        together[0] = first
        for i in range(1, len(self.states)):
            together[i] = self.tensor(name, i, part)
        return together

    def tensor(self, name: str, model: int, part: Part = None) -> Tensor:
        """`(*shape)`: the tensor `name` of one model, in float32 or wider."""
        return self._read(self.states[model], name, f"models[{model}]", part)

    def base_tensor(self, name: str, part: Part = None) -> Tensor:
        """`(*shape)`: the tensor `name` of the base, in float32 or wider."""
        if self.base is None:
            raise InputError("this method needs the weights that the models were fine-tuned from: pass base=")
        return self._read(self.base, name, "base", part)

    def deltas(self, name: str, part: Part = None) -> Tensor:
        """`(models, *shape)`: the task vectors, model minus base."""
        return self.stack(name, part).sub_(self.base_tensor(name, part))

    def combine(
        self, name: str, coefficients: Sequence[float], base_coefficient: float = 0.0, part: Part = None
    ) -> Tensor:
        """`base_coefficient * base + sum_i coefficients[i] * model_i`, one model at a time; all coefficients sum to 1.

        Summed as steps from the first model used, so that equal models give that model bit for bit, as a lone
        coefficient of 1 does. Models with coefficient 0 are not read.
        """
        terms: list[tuple[Mapping[str, Tensor] | None, float, str]] = [
            (state, c, f"models[{i}]") for i, (state, c) in enumerate(zip(self.states, coefficients, strict=True))
        ]
        used = [term for term in [*terms, (self.base, base_coefficient, "base")] if term[1] != 0.0]
        if not used:
            raise InputError(f"{name}: all coefficients are zero")
        origin = total = torch.empty(0)
        for i, (state, coefficient, who) in enumerate(used):
            if state is None:
                raise InputError(f"coefficients that do not sum to 1 leave {coefficient:g} to the base: pass base=")
            tensor = self._read(state, name, who, part)
            if i == 0:
                origin, total = tensor, tensor.clone()
            else:
                total.add_(tensor - origin, alpha=coefficient)
        return total

    def _read(self, state: Mapping[str, Tensor], name: str, who: str, part: Part) -> Tensor:
        found = self._ahead.take(state, name, part)
        return self._load(state, name, who, part) if found is None else found

    def _load(self, state: Mapping[str, Tensor], name: str, who: str, part: Part) -> Tensor:
        if isinstance(state, Checkpoint):
            tensor = state.read(name, part)
        else:
            tensor = state[name].detach() if part is None else flat(state[name].detach(), part)
        tensor = tensor.to(wide(tensor.dtype))
        if not bool(torch.isfinite(tensor.sum())) and not bool((finite := torch.isfinite(tensor)).all()):
            first = int((~finite).flatten().nonzero()[0]) + (0 if part is None else part.start)
            shape = tuple(outline(state)[name].shape)
            where = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), shape)) if shape else ()
            place = f" ({state.entry(name).file})" if isinstance(state, Checkpoint) else ""
            bad = f"{int((~finite).sum())} of {tensor.numel()} values" + (" read" if part else "")
            raise WeightsError(
                f"{name} of {who}{place}: {bad} are NaN or infinite, first at {where}; leave this model out"
            )
        return tensor


def weight_sets(
    models: Sequence[ModelOrWeights | str | Path],
    base: ModelOrWeights | str | Path | None = None,
    module: nn.Module | None = None,
) -> WeightSets:
    """Check that all models (and the base) have one architecture, and sort their names by role.

    The buffers are known from `module`, or from the first model if it is one; of a plain state dict only those of
    BatchNorm are, by their names.

    Raises:
        InputError: no models at all, or a single model where a sequence is expected.
        MismatchError: names, shapes, dtypes or devices differ.
        WeightsError: complex tensors, which no method here is defined for, or tensors without values.
    """
    if isinstance(models, (nn.Module, Mapping, str, Path)):
        raise InputError("models: expected a sequence of modules or state dicts, got a single one; write [model]")
    states = tuple(_mapping(model) for model in models)
    if not states:
        raise InputError("models is empty: pass at least one module or state dict")
    reference = None if base is None else _mapping(base)
    others = [(f"models[{i}]", state) for i, state in enumerate(states[1:], start=1)]
    others += [] if reference is None else [("base", reference)]
    first = outline(states[0])
    for who, other in others:
        _check_compatible(first, outline(other), ("models[0]", who))

    module = models[0] if module is None and isinstance(models[0], nn.Module) else module
    buffers = set() if module is None else {name for name, _ in module.named_buffers()}
    ties = tied([*states, *([] if reference is None else [reference])])
    weights, statistics, dtype = [], set(), torch.float32
    for name in first:
        tensor = first[name]
        if tensor.is_complex():
            raise WeightsError(f"{name}: complex weights are not merged; store torch.view_as_real of them")
        if tensor.is_meta:
            raise WeightsError(f"{name}: on the meta device, which holds no values; load the weights first")
        if not tensor.is_floating_point() or name in ties:
            continue
        if tensor.numel() == 0 or (infinite(states[0], name) and all(equal(states[0], o, name) for _, o in others)):
            continue  # an attention mask with infinities, the same everywhere
        if name in buffers or name.rpartition(".")[2] in STATISTICS:
            statistics.add(name)
        else:
            weights.append(name)
            dtype = torch.promote_types(dtype, tensor.dtype)
    return WeightSets(states, reference, tuple(weights), frozenset(statistics), ties, dtype)


def assemble(
    sets: WeightSets, merged: Callable[[str], Tensor], shares: Callable[[str], tuple[Sequence[float], float]]
) -> Iterator[tuple[str, Tensor]]:
    """Every name of the result with its tensor, in the order of the first model, one tensor at a time.

    Args:
        sets: the inputs.
        merged: the merged tensor for the name of a weight; any dtype, cast here.
        shares: for the name of a statistic the share of each model and of the base in its average; they sum to 1.
    """
    return joined(sets, assemble_parts(sets, lambda name, part: merged(name), shares, "whole"))


def assemble_parts(
    sets: WeightSets,
    merged: Callable[[str, Part], Tensor],
    shares: Callable[[str], tuple[Sequence[float], float]],
    cut: Cut,
) -> Iterator[tuple[str, Part, Tensor]]:
    """As `assemble`, large tensors in parts that `cut` allows; second names of ties are left out."""
    weights = frozenset(sets.weights)
    first = sets.shells
    names = [name for name in first if name not in sets.skip and name not in sets.ties]
    for name, part in sets.walk(names, cut):
        original = first[name]
        if name in weights:
            tensor = merged(name, part)
        elif name in sets.statistics:
            tensor = sets.combine(name, *shares(name), part=part)
        else:
            whole = sets.states[0][name].detach()
            tensor = whole.clone() if part is None else flat(whole, part).clone()
        shape = tuple(original.shape) if part is None else (part.stop - part.start,)
        if tensor.shape != shape:
            raise InputError(f"{name}: the method gave shape {tuple(tensor.shape)}, expected {shape}")
        yield name, part, tensor.to(original.dtype)


def joined(sets: WeightSets, found: Iterable[tuple[str, Part, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors from `assemble_parts`, and the second names of ties, in the order of the first model."""
    first = sets.shells
    names = iter([name for name in first if name not in sets.skip])
    again = {sets.ties[name] for name in first if name in sets.ties and name not in sets.skip}
    done: dict[str, Tensor] = {}

    def ties_before(stop: str | None) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            if name == stop:
                return
            yield name, done[sets.ties[name]]

    whole = torch.empty(0)
    for name, part, tensor in found:
        if part is not None:
            if part.start == 0:
                whole = torch.empty(first[name].shape, dtype=tensor.dtype, device=tensor.device)
            whole.view(-1)[part] = tensor
            if part.stop < whole.numel():
                continue
            tensor = whole
        yield from ties_before(name)
        if name in again:
            done[name] = tensor
        yield name, tensor
    yield from ties_before(None)


def _mapping(model: ModelOrWeights | str | Path) -> Mapping[str, Tensor]:
    """A state dict is taken as it is; a path, or a mapping that is not a dict, is read from disk as it is needed."""
    if isinstance(model, str | Path):
        return open_checkpoint(model)
    return model if isinstance(model, Mapping) and not isinstance(model, dict) else as_weights(model)


def _check_compatible(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: tuple[str, str]) -> None:
    """`check_compatible`, one tensor at a time where a mapping reads from disk."""
    if isinstance(a, dict) and isinstance(b, dict):
        check_compatible(a, b, names)
        return
    for name in [*a, *(name for name in b if name not in a)]:
        left, right = ({name: state[name]} if name in state else {} for state in (a, b))
        check_compatible(left, right, names)
