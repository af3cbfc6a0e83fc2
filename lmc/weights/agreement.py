"""The check that weight sets fit each other and a module, made by every function that takes several."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lmc.core.context import warn
from lmc.errors import InputError, MismatchError, WeightsError
from lmc.weights.checkpoint import Checkpoint
from lmc.weights.state import (
    ModelOrWeights,
    StateDict,
    Weights,
    check_codes,
    check_integers,
    dtype_name,
    inexact,
    tied_names,
    wide,
)

# Buffers that one file has and another lacks, and that no function of the weights depends on: counters of batches,
# tables of positions, and masks, which are constants of the architecture.
OPTIONAL = re.compile(
    r"(^|\.)(num_batches_tracked|position_ids|token_type_ids|(original_)?inv_freq|cos_cached|sin_cached|masked_bias|"
    r"relative_position_index|attn_mask)$"
)
BUFFER = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked)$")
VOCABULARY = re.compile(r"(embed|wte|vocab|lm_head|tok)", re.IGNORECASE)
HEAD = re.compile(r"(^|\.)(head|heads|classifier|score|lm_head|fc|cls|predictor|decoder)(\.|$)", re.IGNORECASE)
# The matrix from the last layer to the tokens, which files leave out where it is that of the embedding.
UNEMBEDDING = re.compile(
    r"(^|\.)(lm_head|head|embed_out|unembed|output|generator|to_logits|decoder|output_projection)\.weight$",
    re.IGNORECASE,
)
SUMMED = frozenset({torch.float32, torch.float64})  # as they are; others in a wider dtype
TWINS = 8  # matrices that one side lacks: with more these are other architectures, of which no values are compared
EMBEDDING = re.compile(r"(embed|wte|tok|vocab|shared)", re.IGNORECASE)


def as_weights(model: ModelOrWeights) -> StateDict:
    """The state dict of a module, or a shallow copy of a mapping, detached from autograd.

    Raises:
        WeightsError: neither a module nor a mapping of names to tensors; extra state beside the tensors; lazy layers;
            TorchScript that was frozen; sparse and nested tensors; tensors inside `torch.vmap`.
    """
    if isinstance(model, torch.jit.ScriptModule) and not hasattr(model, "training"):
        raise WeightsError(
            f"{type(model).__name__}: TorchScript that was frozen (torch.jit.freeze) holds its weights as constants of its code; "
            "take the module from before it was frozen"
        )
    state = model.state_dict() if isinstance(model, nn.Module) else model
    if not isinstance(state, Mapping):
        opened = "; lmc.open_checkpoint(path) opens a file or a folder" if isinstance(model, str | Path) else ""
        raise WeightsError(
            f"expected an nn.Module or a mapping of names to tensors, got {type(model).__name__}{opened}"
        )
    if isinstance(state, Checkpoint):
        state = state.load()  # aliases share their tensor
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # type: ignore[attr-defined]
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise WeightsError(
                f"{name}: expected a tensor, got {type(tensor).__name__}; "
                "extra state outside parameters and buffers is not supported"
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            form = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.").removeprefix("_")
            raise WeightsError(
                f"{name}: a tensor of layout {form}, with which weights are not computed; convert it, for example with .to_dense(), "
                "or merge models from before it was converted"
            )
        if wrapped(tensor):
            raise WeightsError(
                f"{name}: a tensor inside torch.vmap or another transform of torch.func, whose values cannot be looked at: call "
                "this outside, once for each weight set"
            )
        if type(tensor) is not Tensor and is_lazy(tensor):
            raise WeightsError(f"{name}: a lazy layer, which has no weights yet: call the model once on inputs first")
    return StateDict({name: tensor.detach() for name, tensor in state.items()}, like=state)


def agreeing(
    models: Sequence[ModelOrWeights], names: Sequence[str] | None = None, *, model: nn.Module | None = None
) -> list[Weights]:
    """All as finite weights of one architecture, with the names of the first, or of the module if one is given.

    Optional buffers (`OPTIONAL`) that some lack are completed or left out, with a warning; tied tensors that a file
    keeps once are completed from `model`. Where floating-point dtypes differ, each tensor takes the widest.

    Args:
        models: modules, state dicts or opened checkpoints.
        names: what messages call them (default: `models[i]`).
        model: the module that the weights are for.

    Raises:
        MismatchError: names, shapes, kinds of numbers or devices differ.
        WeightsError: NaN, infinity, codes of quantised weights, or tensors without values.
    """
    called = [f"models[{i}]" for i in range(len(models))] if names is None else list(names)
    if model is not None:
        models = [_named_as(model, given) for given in models]
    states: list[Weights] = [as_weights(given) for given in models]
    if not states:
        return states
    if model is not None:
        states = [fitted(model, state, name) for state, name in zip(states, called, strict=True)]
    check_codes(states[0], called[0])
    check_finite(states[0], called[0])
    for i, (state, name) in enumerate(zip(states[1:], called[1:], strict=True), start=1):
        states[i] = shared(states[0], state, (called[0], name))
        _check_same_names(states[0], states[i], (called[0], name))
        check_codes(states[i], name)
        _check_same_kinds(states[0], states[i], (called[0], name))
        check_finite(state, name)
    check_integers(states, called)
    if len({tuple(tensor.dtype for tensor in state.values()) for state in states}) == 1:
        return states
    for name in states[0]:
        if len(dtypes := {state[name].dtype for state in states}) > 1 and inexact(states[0][name]):
            widest = wide(*dtypes)
            for state in states:
                state[name] = state[name].to(widest)
    return states


def fitted(model: nn.Module, weights: Mapping[str, Tensor], name: str = "weights") -> StateDict:
    """`weights` under the names of a module's state dict.

    A name that the module ties to a tensor that is there is completed with it; so is, with a warning, an output matrix that
    the module could tie to an embedding and does not. Optional buffers (`OPTIONAL`) are completed from the module, or
    left out.

    Raises:
        MismatchError: further names are missing, or not known; the first is named, with what may be the reason.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected an nn.Module, which says what to compute, got {type(model).__name__}")
    own = model.state_dict(keep_vars=True)
    if not all(isinstance(entry, Tensor) for entry in own.values()):
        as_weights(model)  # says which is none
    first = tied_names(model)
    for again, kept in first.items():
        if again in weights and kept in weights and not _same_values(weights[again], weights[kept]):
            raise MismatchError(
                f"{again}: the model ties it to {kept}, in {name} they differ, so that the model cannot hold both; pass a "
                "model that does not tie them, or tie them in the weights"
            )
    if own.keys() == weights.keys():
        return StateDict(weights)
    _check_prefix(own, weights, ("model", name))
    held: Weights = {}
    for n, tensor in weights.items():
        held.setdefault(first.get(n, n), tensor)
    where = next((tensor.device for tensor in weights.values()), None)
    found: Weights = {}
    for n, tensor in own.items():
        if n in weights:
            found[n] = weights[n]
        elif (origin := first.get(n, n)) in held:
            found[n] = held[origin]
        elif optional(n, tensor):
            found[n] = tensor.detach().to(where, copy=True)
        elif origin := embedding_for(n, tensor, weights, tieable(model)):
            _warn_of_tie(n, origin, name)
            found[n] = weights[origin]
    extra = {n: t for n, t in weights.items() if n not in own and not optional(n, t)}
    if len(found) < len(own) or extra:
        raise MismatchError(_different_names(own, {**weights, **found}, ("model", name)))
    return StateDict(found, like=weights)


def _same_values(x: Tensor, y: Tensor) -> bool:
    if x is y or x.is_meta or y.is_meta or x.shape != y.shape:
        return True
    same_memory = x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.device == y.device
    return same_memory or bool(((x == y) | (x.isnan() & y.isnan())).all())


def tieable(model: nn.Module) -> dict[str, str]:
    """The names that a module may tie to others, as those of transformers say."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        declared = getattr(module, "_tied_weights_keys", None)
        if isinstance(declared, Mapping):
            before = f"{path}." if path else ""
            found |= {before + str(name): before + str(origin) for name, origin in declared.items()}
    return found


def embedding_for(
    name: str, tensor: Tensor, weights: Mapping[str, Tensor], known: Mapping[str, str] | None = None
) -> str:
    """The embedding that a file without the output matrix `name` has in its place: the one that is `known`, or the only one of
    this shape; empty where there is none."""
    if (origin := (known or {}).get(name, "")) in weights and weights[origin].shape == tensor.shape:
        return origin
    if tensor.ndim != 2 or not UNEMBEDDING.search(name):
        return ""
    fitting = [n for n, other in weights.items() if EMBEDDING.search(n) and other.shape == tensor.shape]
    return fitting[0] if len(fitting) == 1 else ""


def _warn_of_tie(name: str, origin: str, who: str) -> None:
    warn(f"{name}: not in {who}, whose output matrix is taken to be tied to {origin}, as files leave out such names")


def shared(first: Mapping[str, Tensor], other: Mapping[str, Tensor], names: tuple[str, str]) -> StateDict:
    """`other` under the names of `first`; optional buffers that it lacks are taken from there."""
    if first.keys() == other.keys():
        return StateDict(other)
    states = first, other
    known, lacking = corresponding(first, other, names, lambda k, n, m: _same_values(states[k][n], states[k][m]))
    found = {
        name: other[known[name]] if name in known else first[name] for name in first if name in known or name in lacking
    }
    rest = {new: other[old] for new, old in known.items() if new not in first}
    return StateDict({**found, **rest}, like=other)


def corresponding(
    first: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    names: tuple[str, str],
    same: Callable[[int, str, str], bool],
) -> tuple[dict[str, str], frozenset[str]]:
    """The names of `first` -> those of `other`, and the optional buffers of `first` that `other` lacks.

    A name that is tied in one to a name that both have, or is a matrix with the same values, stands for the same tensor in
    the other. So does, with a warning, an output matrix for the embedding of an `other` without one. Optional buffers that
    `first` lacks are left out. A warning names the buffers that one side lacks. Names that correspond to nothing stay.

    Args:
        first, other: the weight sets, or outlines of them.
        same: whether two tensors of `first` (0) or `other` (1) hold the same values.
    """
    _check_prefix(first, other, names)
    both = [name for name in first if name in other and first[name].ndim > 1]
    alone = [t for x, y in ((first, other), (other, first)) for n, t in x.items() if n not in y and t.ndim > 1]

    def twin(k: int, name: str) -> str:
        """A matrix that both have, and whose values are those of one that only this one has."""
        own, tensor = (first, other)[k], (first, other)[k][name]
        if len(alone) > TWINS or tensor.ndim < 2 or tensor.numel() < 2 or tensor.is_meta:
            return ""
        alike = [n for n in both if own[n].shape == tensor.shape and own[n].dtype == tensor.dtype]
        return next((n for n in alike if same(k, name, n)), "")

    ties, further_ties = tied_names(first), tied_names(other)
    there = {ties.get(name, name): name for name in reversed(list(first)) if name in other}
    found: dict[str, str] = {}
    lacking: list[str] = []
    for name, tensor in first.items():
        if name in other:
            found[name] = name
        elif (root := ties.get(name, name)) in there:
            found[name] = there[root]
        elif optional(name, tensor):
            lacking.append(name)
        elif origin := twin(0, name):
            found[name] = origin
        elif origin := embedding_for(name, tensor, other):
            _warn_of_tie(name, origin, names[1])
            found[name] = origin
    here = {further_ties.get(name, name) for name in other if name in first}
    further = []
    for name, tensor in other.items():
        if name in first or further_ties.get(name, name) in here:
            continue
        if optional(name, tensor):
            further.append(name)
        elif not twin(1, name):
            found[name] = name
    for missing, (has, lacks) in ((lacking, names), (further, names[::-1])):
        if missing:
            more = f" and {len(missing) - 1} more buffers" if len(missing) > 1 else ""
            kept = f"taken from {has}" if missing is lacking else "left out"
            warn(f"{missing[0]}{more}: in {has}, not in {lacks}; {kept}")
    return found, frozenset(lacking)


@overload
def fitting(
    first: Mapping[str, Tensor], other: Checkpoint, names: tuple[str, str]
) -> tuple[Checkpoint, frozenset[str]]: ...
@overload
def fitting(
    first: Mapping[str, Tensor], other: Mapping[str, Tensor], names: tuple[str, str]
) -> tuple[Mapping[str, Tensor], frozenset[str]]: ...
def fitting(
    first: Mapping[str, Tensor], other: Mapping[str, Tensor], names: tuple[str, str]
) -> tuple[Mapping[str, Tensor], frozenset[str]]:
    """`other` under the names of `first`, and the optional buffers that it lacks; a file's prefix is stripped."""
    if first.keys() == other.keys():
        return other, frozenset()
    if isinstance(other, Checkpoint):
        longer, shorter = prefix_between(list(first), list(other)), prefix_between(list(other), list(first))
        if longer:
            other = other.under({n.removeprefix(longer): n for n in other}, f"prefix {longer!r} stripped")
        elif shorter:
            other = other.under({shorter + n: n for n in other}, f"prefix {shorter!r} added, which {names[0]} has")
    states = first, other
    known, lacking = corresponding(
        outline(first), outline(other), names, lambda k, n, m: _same_values(states[k][n], states[k][m])
    )
    if isinstance(other, Checkpoint):
        return other.under(known), lacking
    return {new: other[old] for new, old in known.items()}, lacking


def with_prefix_of(names: Sequence[str], opened: Checkpoint, who: str) -> Checkpoint:
    """A file with the prefix that these names have, or without one that they lack."""
    longer, shorter = prefix_between(names, list(opened)), prefix_between(list(opened), names)
    if longer:
        return opened.under({n.removeprefix(longer): n for n in opened}, f"prefix {longer!r} stripped")
    if shorter:
        return opened.under({shorter + n: n for n in opened}, f"prefix {shorter!r} added, which {who} has")
    if len(found := prefixes(names, list(opened))) == 1:
        inside = {n.removeprefix(found[0]): n for n in opened if n.startswith(found[0])}
        left = ", ".join(n for n in opened if not n.startswith(found[0]))
        return opened.under(inside, f"prefix {found[0]!r} stripped, by which {who} was found; left out: {left}")
    return opened


def _named_as(model: nn.Module, given: ModelOrWeights) -> ModelOrWeights:
    return with_prefix_of(list(model.state_dict()), given, "model") if isinstance(given, Checkpoint) else given


def outline(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The names with tensors of the right shape and dtype; nothing is read from a checkpoint on disk."""
    return state.outline() if isinstance(state, Checkpoint) else state


def optional(name: str, tensor: Tensor) -> bool:
    """True for a buffer that weights may lack: a counter, a table of positions, or a mask."""
    parent, _, last = name.rpartition(".")
    if last == "bias" and parent.rpartition(".")[2] in ("attn", "attention"):
        return tensor.ndim == 4 and tensor.shape[:2] == (1, 1)  # GPT-2's causal mask, which is called a bias
    return OPTIONAL.search(name) is not None


def check_compatible(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: tuple[str, str] = ("a", "b")) -> None:
    """Check that two weight sets can be added, tensor by tensor; floating-point dtypes may differ.

    Raises:
        MismatchError: the first tensor whose presence, shape, kind of numbers or device differs.
        WeightsError: codes of quantised weights.
    """
    _check_same_names(a, b, names)
    for state, what in zip((a, b), names, strict=True):
        check_codes(state, what)
    _check_same_kinds(a, b, names)


def _check_same_names(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: tuple[str, str]) -> None:
    if a.keys() != b.keys():
        _check_prefix(a, b, names)
        raise MismatchError(_different_names(a, b, names))


def _check_same_kinds(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: tuple[str, str]) -> None:
    left, right = names
    for name, x in a.items():
        y = b[name]
        if x.shape != y.shape:
            hint = _why_shapes(name, x, y)
            raise MismatchError(f"{name}: shape {tuple(x.shape)} in {left}, {tuple(y.shape)} in {right}{hint}")
        if x.dtype != y.dtype and not (x.is_floating_point() and y.is_floating_point()):
            raise MismatchError(
                f"{name}: dtype {dtype_name(x)} in {left}, {dtype_name(y)} in {right}: not the same kind of numbers; "
                "convert one with .to(dtype)"
            )
        if x.device != y.device:
            raise MismatchError(f"{name}: on {x.device} in {left}, on {y.device} in {right}; move one with .to(device)")


def check_finite(weights: Mapping[str, Tensor], what: str = "weights") -> None:
    """Raise `WeightsError` naming the first tensor that holds NaN or infinity, and where, or that holds no values."""
    far: dict[torch.device, list[Tensor]] = defaultdict(list)
    doubtful = False
    for name, tensor in weights.items():
        if tensor.is_meta:
            raise WeightsError(f"{name} of {what}: on the meta device, which holds no values; load the weights first")
        if (dtype := tensor.dtype) in SUMMED:
            total = tensor.sum()
        elif inexact(tensor):
            total = tensor.to(wide(dtype)).sum().abs()  # one number, also of complex ones
        else:
            continue
        if not total.is_cpu:
            far[total.device].append(total.float())
        elif not math.isfinite(total):
            doubtful = True
    # One sum for each tensor, and one question to another device for all of them. A sum may overflow, so after a suspicious
    # one all are looked into.
    if not doubtful and all(bool(torch.isfinite(torch.stack(sums)).all()) for sums in far.values()):
        return
    for name, tensor in weights.items():
        if inexact(tensor) and not bool((finite := torch.isfinite(tensor.to(wide(tensor.dtype)))).all()):
            where = tuple(int(i) for i in (~finite).nonzero()[0])
            raise WeightsError(
                f"{name} of {what}: {int((~finite).sum())} of {tensor.numel()} values are NaN or infinite, "
                f"first at {where}"
            )


def prefix_between(a: Sequence[str], b: Sequence[str]) -> str:
    """The words that all names of `b` have before those of `a`; empty if that is not how they differ."""
    known, plain = set(a), [name for name in b if name in a]
    if plain or not known or not b:
        return ""
    for name in b:
        for start in [i + 1 for i, letter in enumerate(name) if letter == "."]:
            if name[start:] in known and all(other.startswith(name[:start]) for other in b):
                return name[:start]
    return ""


def prefixes(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """The words behind which all names of `a` are found among those of `b`, beside others; none where they stand there too."""
    known = set(b)
    if not a or known.issuperset(a):
        return []
    starts = [name.removesuffix(a[0]) for name in b if name.endswith("." + a[0])]
    return [start for start in starts if all(start + name in known for name in a)]


def _check_prefix(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: tuple[str, str]) -> None:
    for short, long, without, having in ((a, b, *names), (b, a, *names[::-1])):
        if prefix := prefix_between(list(short), list(long)):
            raise MismatchError(
                f"{next(iter(long))}: all names in {having} have the prefix {prefix!r}, those in {without} have not "
                "(DataParallel, torch.compile and Lightning put one before every name): take the weights of the module "
                f"inside, strip it with name.removeprefix({prefix!r}), or open the file with prefix={prefix!r}"
            )
        behind = prefixes(list(short), list(long))
        if found := [start for start in behind if all(long[start + n].shape == t.shape for n, t in short.items())]:
            raise MismatchError(
                f"{found[0]}{next(iter(short))}: {having} has all names of {without} behind "
                f"{' and behind '.join(map(repr, found))}, beside others: take that part alone "
                f"(of a file: lmc.open_checkpoint(file, prefix={found[0]!r}))"
            )


def _different_names(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: tuple[str, str]) -> str:
    """The first name that is on one side only, and what may be the reason."""
    left, right = names
    for x, y, here, there in ((a, b, left, right), (b, a, right, left)):
        for name, tensor in x.items():
            if name in y:
                continue
            missing = f"{name}: in {here} {tuple(tensor.shape)} {dtype_name(tensor)}, missing in {there}"
            if "_orig_mod." in name or any("_orig_mod." in other for other in y):
                return f"{missing}: one is compiled (the prefix '_orig_mod.'); take the weights of the module inside"
            if BUFFER.search(name):
                return (
                    f"{missing}: a buffer of batch normalisation; load both into modules of one architecture, "
                    "load_state_dict(..., strict=False), and pass the modules"
                )
            if origin := embedding_for(name, tensor, y):
                return (
                    f"{missing}, where it seems to be tied to {origin}: both in one need a network that does not tie them; put "
                    f"{here} first"
                )
            if HEAD.search(name):
                return f"{missing}: the heads differ; give both the same head, or leave it out of both"
            return f"{missing}: different architectures"
    return ""


def _why_shapes(name: str, x: Tensor, y: Tensor) -> str:
    if x.ndim != y.ndim or x.ndim == 0 or x.shape[1:] != y.shape[1:]:
        return ""
    if VOCABULARY.search(name):
        return (
            f": vocabularies of {len(x)} and {len(y)} entries; bring both to one size first "
            "(model.resize_token_embeddings), or cut the rows that one lacks"
        )
    if HEAD.search(name):
        return f": heads with {len(x)} and {len(y)} outputs; give both the same head, or leave it out of both"
    return ""
