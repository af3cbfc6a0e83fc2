"""Several weight sets of one architecture, read one tensor at a time: what every merging method stands on.

Each name of a state dict is one of four things, and each is treated once, here, for all methods:

- a weight: a floating-point tensor; merged by the method, in float32 or wider, and cast back;
- a statistic: BatchNorm's running mean and variance (of a module: any floating-point buffer). It is averaged and
  takes no part in norms, cosines, masks or quantiles; re-estimate it afterwards (`lmc.recalibrate_batchnorm`);
- an alias: a further name of the same storage (embedding and output head). It is merged under its first name and tied
  again;
- anything else (integers, booleans, masks with infinities that are the same everywhere): copied from the first model.

A method that treats every entry, or every row, alike is given large tensors in chunks, so that memory does not depend on
their size.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmc.errors import InputError, WeightsError
from lmc.merge.engine.chunks import Chunk, Cut, Latest, chunks
from lmc.merge.engine.in_use import in_use
from lmc.network.derived import constants_in, derived_names, gauged, warn_of_lagging
from lmc.weights import ModelOrWeights, as_weights, check_compatible, fitted, tied_names
from lmc.weights.adapter import Adapter, Changed
from lmc.weights.agreement import fitting, outline, with_prefix_of
from lmc.weights.checkpoint import Checkpoint, Mapped, Stored, flat
from lmc.weights.opening import open_checkpoint
from lmc.weights.state import check_integers, dtype_name, finite, inexact, memory, unmergeable, wide

STATISTICS = ("running_mean", "running_var")
TAME = 2.0**64  # values below, in sums by coefficients up to MOST_IN_SUM, stay in the range of float32
MOST_IN_SUM = 2.0**32


@dataclass(frozen=True)
class WeightSets:
    """The models to merge and the base they came from (or none), with the role of every name.

    Attributes:
        states: one mapping from names to tensors per model; a mapping that reads from disk works as well.
        base: the weights that all models were fine-tuned from, or None.
        weights: the names merged by the method, each stored tensor once, in the order of the first model.
        statistics: the names that are averaged.
        ties: aliases, further names of a stored tensor, each with its first name.
        dtype: the widest dtype that weights are computed in: float32, or float64 if any weight has it.
        widths: for each of these names the dtype that it is computed in.
        pairs: names of complex tensors, which are computed as pairs of real numbers, `(*shape, 2)`.
        cast: the dtype of floating-point tensors in the result; None: as in the first model.
        derived: the states are gauged: the result has tensors that are computed from others, see `lmc.network.derived`.

    Wherever a `chunk` is given, only that chunk of the flattened tensor is read, and `(*shape)` is its length.
    """

    states: tuple[Mapping[str, Tensor], ...]
    base: Mapping[str, Tensor] | None
    weights: tuple[str, ...]
    statistics: frozenset[str]
    ties: Mapping[str, str]
    dtype: torch.dtype
    widths: Mapping[str, torch.dtype]
    pairs: frozenset[str] = frozenset()
    cast: torch.dtype | None = None
    derived: bool = False
    _latest: Latest = field(default_factory=Latest, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.states)

    def __reduce__(self) -> Any:  # without what was found of it here: identities are others in another process
        return WeightSets, tuple(getattr(self, each.name) for each in fields(self) if each.init)

    @cached_property
    def _adapted(self) -> frozenset[int]:
        """The identities of the states that are a base with an adapter: what they read is computed."""
        return frozenset(id(state) for state in self.states if adapted(state))

    @cached_property
    def _tame(self) -> frozenset[str]:
        """Of models in memory the tensors of which no value is so large that sums could leave the range of float32; each
        device is asked once for all of them."""
        asked: dict[torch.device, dict[str, Tensor]] = {}
        for state in [*self.states, *([] if self.base is None else [self.base])]:
            if not isinstance(state, dict):
                return frozenset()
            for name, tensor in state.items():
                if inexact(tensor) and tensor.numel():
                    values = tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()
                    small, flags = values.abs().max() < TAME, asked.setdefault(tensor.device, {})
                    flags[name] = flags[name] & small if name in flags else small
        wild = {name for flags in asked.values() for name in _where(flags, False)}
        return frozenset(name for flags in asked.values() for name in flags) - wild

    @cached_property
    def shells(self) -> Mapping[str, Tensor]:
        """The names with tensors of the shape that rules are given, whose values are not to be read."""
        first = outline(self.states[0])
        real = {
            n: first[n].new_zeros((), dtype=first[n].dtype.to_real()).expand(*first[n].shape, 2) for n in self.pairs
        }
        return {**first, **real} if real else first

    @cached_property
    def form(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor of the result."""
        first = outline(self.states[0])
        return {n: (self.cast if self.cast and inexact(t) else t.dtype, tuple(t.shape)) for n, t in first.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of weights and statistics: those that options per name pattern can speak of."""
        return (*self.weights, *sorted(self.statistics))

    def walk(self, names: Iterable[str], cut: Cut) -> Iterator[tuple[str, Chunk]]:
        """Every name with each chunk of its tensor (None is the whole), in order."""
        return ((name, chunk) for name in names for chunk in chunks(self.shells[name], cut))

    def stack(self, name: str, chunk: Chunk = None) -> Tensor:
        """`(models, *shape)`: the tensor `name` of every model, in float32 or wider."""
        return self._finite(self._stack(name, chunk), name, chunk)

    def _stack(self, name: str, chunk: Chunk) -> Tensor:
        first = self._raw(self.states[0], name, chunk)
        kind = self.widths.get(name, first.dtype)
        together = torch.empty((len(self.states), *first.shape), dtype=kind, device=first.device)
        together[0] = first
        for i in range(1, len(self.states)):
            together[i] = self._raw(self.states[i], name, chunk)
        return together

    def tensor(self, name: str, model: int, chunk: Chunk = None) -> Tensor:
        """`(*shape)`: the tensor `name` of one model, in float32 or wider."""
        return self._finite(self._read(self.states[model], name, chunk), name, chunk)

    def base_tensor(self, name: str, chunk: Chunk = None) -> Tensor:
        """`(*shape)`: the tensor `name` of the base, in float32 or wider."""
        return self._finite(self._base(name, chunk), name, chunk)

    def deltas(self, name: str, chunk: Chunk = None) -> Tensor:
        """`(models, *shape)`: the task vectors, model minus base; of an adapter what it adds, unrounded."""
        if not self._adapted:
            return self._finite(self._stack(name, chunk).sub_(self._base(name, chunk)), name, chunk)
        base = self._base(name, chunk)
        together = base.new_empty((len(self.states), *base.shape))
        for i, state in enumerate(self.states):
            added = self._added(state, name, chunk)
            together[i] = self._read(state, name, chunk) - base if added is None else added
        return self._finite(together, name, chunk)

    def _added(self, state: Mapping[str, Tensor], name: str, chunk: Chunk) -> Tensor | float | None:
        """The change that an adapter on this base makes; 0 where it leaves the base's tensor, None for other models."""
        if not isinstance(state, Checkpoint) or id(state) not in self._adapted or name in self.pairs:
            return None
        entry = state.entry(name)
        origin = entry.stored if isinstance(entry, Changed) else entry
        if not _is_at(origin, self.base, name):
            return None
        return entry.delta(chunk) if isinstance(entry, Changed) else 0.0

    def combine(
        self, name: str, coefficients: Sequence[float], base_coefficient: float = 0.0, chunk: Chunk = None
    ) -> Tensor:
        """`base_coefficient * base + sum_i coefficients[i] * model_i`, one model at a time; all coefficients sum to 1.

        Summed as steps from the first model used, so that equal models give that model bit for bit, as a lone
        coefficient of 1 does. Models with coefficient 0 are not read.
        """
        terms = [*zip(self.states, coefficients, strict=True), (self.base, base_coefficient)]
        used = [(state, coefficient) for state, coefficient in terms if coefficient != 0.0]
        if not used:
            raise InputError(f"{name}: all coefficients are zero")
        for state, coefficient in used:
            if state is None:
                raise InputError(f"coefficients that do not sum to 1 leave {coefficient:g} to the base: pass base=")
        first = used[0][0] or {}
        if len(used) == 1:
            alone = self._raw(first, name, chunk)  # as it is stored
            return self._finite(alone if isinstance(first, Checkpoint) else alone.clone(), name, chunk)
        origin = self._read(first, name, chunk)
        total = torch.lerp(origin, self._read(used[1][0] or {}, name, chunk), used[1][1])
        for state, coefficient in used[2:]:
            total.add_(self._read(state or {}, name, chunk) - origin, alpha=coefficient)
        if sum(abs(coefficient) for _, coefficient in used) > MOST_IN_SUM:
            return self._checked(total, name, chunk)
        return self._finite(total, name, chunk)

    def _base(self, name: str, chunk: Chunk) -> Tensor:
        if self.base is None:
            raise InputError("this method needs the weights that the models were fine-tuned from: pass base=")
        base = self.base
        if not isinstance(base, Checkpoint):
            return self._read(base, name, chunk)
        where = name, chunk and chunk.start, chunk and chunk.stop
        return self._latest(
            where, "base", lambda: self._read(base, name, chunk)
        )  # to take it away, and to add it again

    def _read(self, state: Mapping[str, Tensor], name: str, chunk: Chunk) -> Tensor:
        found = self._raw(state, name, chunk)
        return found.to(self.widths.get(name, found.dtype))

    def _raw(self, state: Mapping[str, Tensor], name: str, chunk: Chunk) -> Tensor:
        """The tensor in the dtype in which it is stored; nothing may change it."""
        if name in self.pairs:
            whole = torch.view_as_real(state[name].detach().resolve_conj())
            return whole if chunk is None else flat(whole, chunk)
        if isinstance(state, Checkpoint):
            entry = state.entry(name)
            return entry.unrounded(chunk) if isinstance(entry, Changed) else entry.read(chunk)
        return state[name].detach() if chunk is None else flat(state[name].detach(), chunk)

    def _finite(self, tensor: Tensor, name: str, chunk: Chunk) -> Tensor:
        """`tensor`, which was made of the models' tensors; one question to the device checks that all were finite, unless
        that was asked for all tensors before."""
        if tensor.device.type != "cpu" and name in self._tame:
            return tensor
        return self._checked(tensor, name, chunk)

    def _checked(self, tensor: Tensor, name: str, chunk: Chunk) -> Tensor:
        if not finite(tensor) and not bool(torch.isfinite(tensor.to(wide(tensor.dtype))).all()):
            sources = [(f"models[{i}]", state) for i, state in enumerate(self.states)]
            for who, state in [*sources, *([] if self.base is None else [("base", self.base)])]:
                self._check(who, state, name, chunk)
            raise WeightsError(f"{name}: sums of the models leave the range of {dtype_name(tensor)}; scale them down")
        return tensor

    def _check(self, who: str, state: Mapping[str, Tensor], name: str, chunk: Chunk) -> None:
        tensor = self._read(state, name, chunk)
        if bool((finite := torch.isfinite(tensor)).all()):
            return
        first = int((~finite).flatten().nonzero()[0]) + (0 if chunk is None else chunk.start)
        shape = tuple(self.shells[name].shape)
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), shape)) if shape else ()
        place = f" ({state.entry(name).file})" if isinstance(state, Checkpoint) else ""
        bad = f"{int((~finite).sum())} of {tensor.numel()} values" + (" read" if chunk else "")
        raise WeightsError(f"{name} of {who}{place}: {bad} are NaN or infinite, first at {where}; leave this model out")


def weight_sets(
    models: Sequence[ModelOrWeights | str | Path],
    base: ModelOrWeights | str | Path | None = None,
    module: nn.Module | None = None,
    *,
    pairs: bool = False,
    cast: torch.dtype | None = None,
) -> WeightSets:
    """Check that all models (and the base) have one architecture, and sort their names by role.

    The buffers are known from `module`, or from the first model if it is one; of a plain state dict only those of
    BatchNorm are, by their names. The names are those of the first model, or of `module`; optional buffers that another
    model lacks are copied from the first, and where floating-point dtypes differ, sums are made in the widest.

    Args:
        models: modules, state dicts, opened checkpoints, or paths of checkpoints.
        base: what they were fine-tuned from.
        module: the architecture.
        pairs: take complex tensors, as pairs of real numbers.
        cast: the dtype of floating-point tensors in the result (default: as in the first model).

    Raises:
        InputError: no models at all, or a single model where a sequence is expected.
        MismatchError: names, shapes, kinds of numbers or devices differ.
        WeightsError: codes of quantised weights, factors of adapters, tensors without values, or complex tensors where
            they are not taken.
    """
    if isinstance(models, (nn.Module, Mapping, str, Path)):
        raise InputError("models: expected a sequence of modules or state dicts, got a single one; write [model]")
    called = [f"models[{i}]" for i in range(len(models))] + ([] if base is None else ["base"])
    everyone = on_base([_mapping(model) for model in models], None if base is None else _mapping(base))
    if not len(models):
        raise InputError("models is empty: pass at least one module or state dict")
    if module is not None:
        everyone = [_under(module, state, who) for state, who in zip(everyone, called, strict=True)]
    first, constant = everyone[0], frozenset[str]()
    for state, who in zip(everyone, called, strict=True):
        if reason := unmergeable(outline(state)):
            raise WeightsError(f"{who}: {reason}")
    for i, who in enumerate(called[1:], start=1):
        everyone[i], lacking = fitting(first, everyone[i], (called[0], who))
        constant |= lacking
        here = {name: tensor for name, tensor in outline(first).items() if name not in lacking}
        check_compatible(here, outline(everyone[i]), (called[0], who))

    module = models[0] if module is None and isinstance(models[0], nn.Module) else module
    buffers = frozenset[str]() if module is None else frozenset(name for name, _ in module.named_buffers())
    everyone, derived = _gauged(everyone, buffers, module)
    states, reference = tuple(everyone[: len(models)]), None if base is None else everyone[-1]
    ties = tied(everyone)
    outlines = [outline(state) for state in everyone]
    check_integers(
        outlines, called, lambda name, i: equal(everyone[0], everyone[i], name), lambda name, i: everyone[i][name]
    )
    constants = constants_in(outlines[0])
    finite = _certainly_finite(first)
    weights, statistics, widths, paired = [], set(), {}, set()
    for name, tensor in outlines[0].items():
        if tensor.is_complex() and not pairs:
            raise WeightsError(f"{name}: complex weights; this method takes none, those without data do")
        if tensor.is_meta:
            raise WeightsError(f"{name}: on the meta device, which holds no values; load the weights first")
        if not inexact(tensor) or name in ties or name in constant or tensor.numel() == 0:
            continue
        if name not in finite and infinite(first, name) and all(equal(first, other, name) for other in everyone[1:]):
            continue  # an attention mask with infinities, the same everywhere
        widths[name] = wide(*(seen[name].dtype for seen in outlines)).to_real()
        if tensor.is_complex():
            paired.add(name)
        if name in buffers or name in derived or name in constants or name.rpartition(".")[2] in STATISTICS:
            statistics.add(name)
        else:
            weights.append(name)
    dtype = wide(*(widths[name] for name in weights))
    return WeightSets(
        states,
        reference,
        tuple(weights),
        frozenset(statistics),
        ties,
        dtype,
        widths,
        frozenset(paired),
        cast,
        derived=bool(derived),
    )


def _mapping(model: ModelOrWeights | str | Path) -> Mapping[str, Tensor]:
    """A state dict is taken as it is; a path, or a mapping that is not a dict, is read from disk as it is needed."""
    if isinstance(model, str | Path):
        return open_checkpoint(model)
    return model if isinstance(model, Mapping) and not isinstance(model, dict) else as_weights(model)


def on_base(models: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None) -> list[Mapping[str, Tensor]]:
    """All, the base last, with adapters as the models that they are on the base."""
    if base is None:
        return list(models)
    return [*(model.on(base) if isinstance(model, Adapter) else model for model in models), base]


def adapted(state: Mapping[str, Tensor]) -> bool:
    """True for a base with an adapter: what it reads is computed."""
    return isinstance(state, Checkpoint) and any(isinstance(entry, Changed) for entry in state.stored.values())


def _is_at(stored: Stored, base: Mapping[str, Tensor] | None, name: str) -> bool:
    """True where `stored` is the base's tensor."""
    if isinstance(base, Checkpoint):
        return stored is base.entry(name) or (not isinstance(stored, Mapped) and stored == base.entry(name))
    return isinstance(stored, Mapped) and base is not None and memory(stored.tensor) == memory(base[name].detach())


def _gauged(
    states: list[Mapping[str, Tensor]], buffers: Collection[str], module: nn.Module | None
) -> tuple[list[Mapping[str, Tensor]], frozenset[str]]:
    """The states in coordinates of which averages make sense, and the names that are computed from others."""
    on_disk = any(isinstance(state, Checkpoint) for state in states)
    known = None if on_disk else module
    derived = derived_names(outline(states[0]), known) if len(states) > 1 else frozenset[str]()
    warn_of_lagging([outline(s) for s in states], buffers, lambda name, i: equal(states[0], states[i], name), derived)
    if not derived:
        return states, derived
    return [in_use(s) if isinstance(s, Checkpoint) else gauged(dict(s), known) for s in states], derived


def _under(module: nn.Module, state: Mapping[str, Tensor], who: str) -> Mapping[str, Tensor]:
    """The weights under the names of the module."""
    if not isinstance(state, Checkpoint):
        return fitted(module, state, who)
    own = module.state_dict()
    state = with_prefix_of(list(own), state, "model")
    return state if own.keys() == state.keys() else fitted(module, state.load(), who)


def infinite(state: Mapping[str, Tensor], name: str) -> bool:
    """True where the tensor holds an infinity and no NaN.

    On disk, reading all tensors for this would take as long as the merge: those called "weight" and "bias" are looked
    into at both ends only, where a causal mask has some.
    """
    if not isinstance(state, Checkpoint):
        return _holds_infinity([state[name].detach()])
    size, edge = state.entry(name).size, 256
    if name.rpartition(".")[2] in ("weight", "bias") and size > 2 * edge:
        ends = (slice(0, edge), slice(size - edge, size))
        if not any(_holds_infinity([state.read(name, end)]) for end in ends):
            return False
    return _holds_infinity(state.read(name, chunk) for chunk in chunks(outline(state)[name]))


def _certainly_finite(state: Mapping[str, Tensor]) -> frozenset[str]:
    """Of weights in memory the tensors whose sums are finite; each device is asked once for all of them."""
    asked: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in state.items() if isinstance(state, dict) else ():
        if inexact(tensor) and not tensor.is_meta and tensor.numel():
            values = tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()
            asked.setdefault(tensor.device, {})[name] = torch.isfinite(values.sum(dtype=wide(values.dtype)))
    return frozenset(name for flags in asked.values() for name in _where(flags, True))


def _where(flags: Mapping[str, Tensor], answer: bool) -> Iterator[str]:
    """The names of flags of one device that are so, by one question."""
    found = torch.stack(list(flags.values())).tolist()
    return (name for name, flag in zip(flags, found, strict=True) if flag == answer)


def _holds_infinity(pieces: Iterable[Tensor]) -> bool:
    found = False
    for piece in pieces:
        piece = piece.to(wide(piece.dtype))
        if not bool(torch.isfinite(piece.sum())):
            if bool(piece.isnan().any()):
                return False
            found = found or bool(piece.isinf().any())
    return found


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor], name: str) -> bool:
    if isinstance(a, Checkpoint) and isinstance(b, Checkpoint):
        return all(torch.equal(a.read(name, chunk), b.read(name, chunk)) for chunk in chunks(outline(a)[name]))
    return torch.equal(a[name].detach(), b[name].detach())


def tied(states: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """Second names of one storage, with the first name: tied in one weight set, and tied or equal in all others."""
    first_name: dict[str, str] = {}
    for state in states:
        for name, first in tied_names(state).items():
            first_name.setdefault(name, first)
    known = [tied_names(state) for state in states]
    ties: dict[str, str] = {}
    for name, first in first_name.items():
        if all(
            own.get(name, name) == own.get(first, first) or torch.equal(state[name], state[first])
            for own, state in zip(known, states, strict=True)
        ):
            ties[name] = ties.get(first, first)
    return ties
