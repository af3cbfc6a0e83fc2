"""Values that modules keep beside their state dict, and which of them they derive from their weights.

A module may hold tensors in attributes, in buffers outside the state dict, in dicts by device or length, or behind an
lru_cache. Constants among them stay. What a forward pass changes, or makes again where it was removed, is a cache:
it belongs to the weights that were loaded at that time, and has to go when others come.
"""

import functools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lmc.network.places import (
    EVERY_MODULE,
    PART,
    Address,
    Container,
    containers,
    in_state,
    is_namespace,
    is_single,
    items_of,
    kept_tensors,
    name_of,
    numbers,
    tensors_of,
)
from lmc.network.stores import Absent, Shared, additions, is_torch, own_functions, stores, writes_of, written_by

# How what stands at an address is taken away: None in its place, or 0 in that of a number, deleted, or tensors and arrays without
# their values.
Way: TypeAlias = Literal["none", "zero", "deleted", "zeros", "nan", "empty"]
Removal: TypeAlias = dict[Address, Way]
_ALL = "all"  # what is in a set, which has no places


class Hidden:
    """All that a module keeps beside its state dict, as it is when this is made; `restore` puts back what changed since.

    Attributes:
        changing: whether forward passes were seen to change anything.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = list(containers(module))
        self._before = [(container, container.copy()) for _, container in self._places]
        self._tensors = [(x, x._version, x.detach().clone()) for x in kept_tensors(module)]
        self._functions = list(_lru_caches(module))
        self._changed: list[tuple[Container, Container]] = []
        self._written: list[tuple[Tensor, Tensor]] = []
        self.changing = bool(self._functions)

    def look(self, values: bool = True) -> None:
        """Note what forward passes have changed.

        Args:
            values: compare them, since writes by `.data` and to arrays do not count as changes; not while a module is traced.
        """
        known = {id(container) for container, _ in self._changed}
        self._changed += [(c, old) for c, old in self._before if id(c) not in known and not _same(c, old)]
        known = {id(tensor) for tensor, _ in self._written}
        self._written += [
            (x, old)
            for x, version, old in self._tensors
            if id(x) not in known and (x._version != version or (values and not _alike(x, old)))
        ]
        self.changing = bool(self._changed or self._written or self._functions)

    def names(self) -> list[str]:
        """The places that forward passes have changed, as attributes of the modules that hold it."""
        self.look()
        before = {id(container): old for container, old in self._changed}
        written = {id(tensor) for tensor, _ in self._written}
        found: list[str] = []
        for (module, *inside), container in self._places:
            old = dict(items_of(before.get(id(container), container)))
            for key, value in items_of(container):
                same = old.get(key, self) is value or (not inside and key in EVERY_MODULE)
                if not same or any(id(x) in written for x in tensors_of(value)):
                    own = inside[0] if inside and inside[0] != "_buffers" else key
                    found.append(f"{module}.{own}" if module else str(own))
        return list(dict.fromkeys(found))

    def restore(self, values: bool = True) -> None:
        """Everything as it was; `values` as of `look`."""
        self.look(values)
        for container, old in self._changed:
            if isinstance(container, list | deque):
                container.clear()
                container.extend(old)
                continue
            if isinstance(container, set):
                container.clear()
                container |= old  # type: ignore[operator]
                continue
            kept = {key: container[key] for key in container if key in EVERY_MODULE}
            container.clear()
            container.update(old | kept)  # type: ignore[operator]
        for tensor, old in self._written:
            if (tensor.shape, tensor.dtype) == (old.shape, old.dtype):
                tensor.detach().copy_(old)
            else:
                tensor.data = old.clone()
        for function in self._functions:
            function.cache_clear()


def _lru_caches(model: nn.Module) -> Iterator[Any]:
    """Every function under an lru_cache that modules have, as attributes, methods or properties."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule) or is_torch(module):
            continue
        own = [value for part in (vars(module), *map(vars, type(module).__mro__[:-1])) for value in part.values()]
        for value in own:
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(function, functools._lru_cache_wrapper):
                yield function


def _alike(x: Tensor, old: Tensor) -> bool:
    """Whether two tensors have the same values; NaN is NaN."""
    if (x.shape, x.dtype, x.layout) != (old.shape, old.dtype, old.layout):
        return False
    if x.layout != torch.strided or x.is_quantized:
        return True  # the count of changes has to do
    return torch.equal(x, old) or bool(((x == old) | ((x != x) & (old != old))).all())


def _same(container: Container, old: Container) -> bool:
    if len(container) != len(old):
        return False
    if isinstance(container, list | deque):
        return all(x is y for x, y in zip(container, old, strict=True))
    if isinstance(container, set):
        return container == old
    missing = object()
    return all(old.get(key, missing) is value or key in EVERY_MODULE for key, value in container.items())  # type: ignore


def removable(module: nn.Module, run: Callable[[Removal], nn.Module]) -> Removal:
    """The places in which a module that was called before keeps numbers that it makes again where they are missing.

    Each kind of place is tried alone; where that does not work, all that the forward pass of a class may set is emptied at
    once, for a flag may say that the others are there, and then tensors that it may write into lose their values, for those may
    be the flag. What is made again only under conditions of its own (in training, for longer inputs) is not told from a constant.

    Args:
        module: a fresh copy.
        run: calls another fresh copy in which these places are emptied, and returns it.
    """
    kinds: dict[Any, list[Address]] = {}
    for address, kind in _float_places(module):
        kinds.setdefault(kind, []).append(address)
    dicts = {address for address, container in containers(module) if isinstance(container, dict)}
    found: Removal = {}
    left: dict[type, set[Address]] = {}
    may = writes_of(module)
    for kind, addresses in kinds.items():
        # Where one value cannot be missed, the list or dict that holds it may be made again, or the one around that.
        tries = (_made_again(places, addresses, run, dicts) for places in (addresses, *_around(addresses)))
        if removal := next(filter(None, tries), None):
            found |= removal
        elif kind[2] is None and len(texts := {a[-1] for a in addresses if isinstance(a[-1], str)}) > 1:
            for text in texts:  # of a dict of several things
                named = [a for a in addresses if a[-1] == text]
                found |= _made_again(named, named, run, dicts)
        elif kind[2] in may.attributes:
            left.setdefault(kind[0], set()).update(addresses)
    for kind, addresses in left.items():
        together = [place for place, owner in _set_places(module) if owner is kind]
        found |= _made_again(together, addresses, run, dicts, ("none", "deleted", "zero"))
    return found | _written_again(module, found, run)


def _around(addresses: Sequence[Address]) -> Iterator[list[Address]]:
    """The places of what holds these, from the inside out."""
    for length in range(max(map(len, addresses)) - 1, 1, -1):
        places = dict.fromkeys(a[:length] for a in addresses if len(a) > length)
        inside = ("__dict__", PART)
        if places and not any(p[1] == "_buffers" or p[-1] in inside or p[-2] == PART for p in places):
            yield list(places)


def _made_again(
    places: Sequence[Address],
    wanted: Collection[Address],
    run: Callable[[Removal], nn.Module],
    dicts: Collection[Address],
    ways: Sequence[Way] = ("none", "deleted"),
) -> Removal:
    """A way to empty these places for the wanted ones to be filled again; empty where they are not.

    In modules of one class it is enough that one of them fills its own, and in a dict by length, shape or device, that one key
    is there again: these inputs need no other.
    """
    for way in ways:
        removal: Removal = dict.fromkeys(places, way)
        try:
            called = run(removal)
        except Exception:  # noqa: BLE001 (whatever it is that the forward pass misses: a constant, then)
            continue
        if way == "zero" and not _all_there(called, places):  # no call fails for want of a constant that became 0
            continue
        filled = {address for address, _ in _float_places(called)} & set(wanted)
        kinds = {_kind_of_key(address, dicts) for address in filled} - {None}
        if filled and all(_kind_of_key(address, dicts) in kinds for address in set(wanted) - filled):
            return removal
    return {}


def _all_there(module: nn.Module, places: Iterable[Address]) -> bool:
    """Whether none of these places holds None or 0."""
    held = {(*address, key): value for address, container in containers(module) for key, value in items_of(container)}
    values = [held.get(place) for place in places]
    return not any(value is None or (isinstance(value, bool | int | float) and value == 0) for value in values)


def _kind_of_key(address: Address, dicts: Collection[Address]) -> Any:
    """The part that keys have in common under which the same is kept for other inputs; None in lists, and for texts in dicts."""
    if is_namespace(address[:-1]):
        return address[-1]
    return None if address[:-1] not in dicts or isinstance(address[-1], str) else type(address[-1])


def _written_again(module: nn.Module, known: Removal, run: Callable[[Removal], nn.Module]) -> Removal:
    """The tensors and arrays, not among the known ones, which forward passes fill where zeros, NaN, or nothing stands in them."""
    found: Removal = {}
    ways: tuple[Way, ...] = ("zeros", "nan", "empty")
    for way in ways:
        places: Removal = dict.fromkeys(_tensor_places(module).keys() - known.keys() - found.keys(), way)
        while places:
            try:
                seen = _tensor_places(run(known | found | places))
            except Exception:  # noqa: BLE001 (as above)
                break
            filled: Removal = {a: way for a in places if any(_filled(x, way) for x in seen.get(a, ()))}
            if len(filled) == len(places):
                found |= filled
                break
            places = filled  # without what stayed as it was, such as masks, which others may be made by
    return found


def _filled(tensor: Tensor, way: Way) -> bool:
    if way == "empty":
        return tensor.numel() > 0
    return bool(tensor.any()) if way == "zeros" else bool((tensor == tensor).all())


def _float_places(module: nn.Module) -> Iterator[tuple[Address, Any]]:
    """The address of everything hidden that holds floating-point tensors, or numbers and tensors of any kind that forward
    passes may have set, and what kind of place it is."""
    state = in_state(module)
    classes, may = {name: type(m) for name, m in module.named_modules()}, writes_of(module)
    for address, container in containers(module):
        owner = classes[address[0]]
        for key, value in items_of(container):
            tensors = tensors_of(value)
            plain = not any(x.is_floating_point() or x.is_complex() for x in tensors)
            held = not any(id(x) in state for x in tensors)
            single = bool(numbers(value)) if isinstance(value, tuple) else is_single(value)
            if (single and not tensors) or (tensors and plain):  # a count, an index, a mask, a text: or a constant
                held &= (
                    key in may.attributes if is_namespace(address) else name_of(address) in may.items | may.attributes
                )
            else:
                held &= bool(tensors)
            if held:
                yield (*address, key), (owner, address[1:], key if is_namespace(address) else None)


def _tensor_places(module: nn.Module) -> dict[Address, list[Tensor]]:
    """Everything hidden that holds tensors or arrays into which forward passes may write."""
    state = in_state(module)
    may = writes_of(module)
    found: dict[Address, list[Tensor]] = {}
    for address, container in containers(module):
        for key, value in items_of(container):
            tensors = tensors_of(value)
            name = key if is_namespace(address) else name_of(address)
            # What is set together with a key, as a tuple, is made again by that key.
            names = may.written if isinstance(value, tuple) else may.written | may.attributes
            if tensors and name in names and not any(id(x) in state for x in tensors):
                found[*address, key] = tensors
    return found


def _set_places(module: nn.Module) -> Iterator[tuple[Address, type]]:
    """The address of every attribute and buffer that a forward pass may set and that holds something, and the class."""
    classes, may = {name: type(m) for name, m in module.named_modules()}, writes_of(module)
    for address, container in containers(module):
        if is_namespace(address) and isinstance(container, dict):
            for key, value in container.items():
                if value is not None and key not in EVERY_MODULE and key in may.attributes:
                    yield (*address, key), classes[address[0]]
        elif isinstance(container, set) and container and name_of(address) in may.items:
            yield (*address, _ALL), classes[address[0]]


def empty(module: nn.Module, removal: Removal) -> None:
    """Take away what these places hold."""
    for address, container in list(containers(module)):
        if isinstance(container, set):
            if (*address, _ALL) in removal:
                container.clear()
            continue
        for key in [key for key, _ in items_of(container)][::-1]:
            way = removal.get((*address, key))
            if way in ("zeros", "nan", "empty"):
                for tensor in tensors_of(container[key]):
                    _clear(tensor, way)
            elif way == "deleted" or (way == "none" and isinstance(container, dict) and not is_namespace(address)):
                del container[key]
            elif way is not None:
                number = way == "zero" and isinstance(container[key], bool | int | float)
                container[key] = type(container[key])(0) if number else None


def _clear(tensor: Tensor, way: Way) -> None:
    if way == "empty":
        tensor.data = tensor.new_empty(0)
    else:
        exact = not (tensor.is_floating_point() or tensor.is_complex())
        tensor.detach().fill_(0 if exact or way == "zeros" else torch.nan)


def derives_outside(module: nn.Module, runs: Sequence[Callable[[], Any]], same: Callable[[Any, Any], bool]) -> bool:
    """Whether what all copies of a module share holds numbers that come out otherwise with other weights.

    What functions of single modules and hooks of the caller's write may be a mere record: there it has to change outputs.

    Args:
        module: any copy.
        runs: each calls a fresh copy, with weights of its own, and returns the outputs. What is shared is afterwards as it was.
        same: whether two outputs are the same.
    """
    own = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    kinds = {type(m) for m in own if not is_torch(m)}
    shared = {place.key: place for kind in kinds for place in stores(kind).shared}
    if any(_differs(place, way, runs) for place in shared.values() for way in place.ways):
        return True
    single = {place.key: place for m in own for place in written_by(own_functions(m), type(m))}
    further = [place for key, place in single.items() if key not in shared]
    return any(_acts(place, way, runs, same) for place in further for way in place.ways)


def _differs(place: Shared, way: Absent, runs: Sequence[Callable[[], Any]]) -> bool:
    before, seen = place.read(), []
    try:
        for run in runs:
            place.write(_without_numbers(before), way)
            run()
            seen.append({key: [torch.as_tensor(x).clone() for x in numbers(v)] for key, v in place.read().items()})
    except Exception:  # noqa: BLE001 (constants, which the forward pass misses)
        return False
    finally:
        place.write(before, "deleted")
    # In the order in which they were put there: keys may be the identities of the copies.
    return any(
        len(x) != len(y) or not all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
        for x, y in zip(*(found.values() for found in seen), strict=False)
    )


def _acts(place: Shared, way: Absent, runs: Sequence[Callable[[], Any]], same: Callable[[Any, Any], bool]) -> bool:
    """Whether the first outputs come out otherwise with what the second run left in a place."""
    before, (first, second) = place.read(), runs
    try:
        place.write(_without_numbers(before), way)
        expected = first()
        place.write(_without_numbers(before), way)
        second()
        return not same(first(), expected)
    except Exception:  # noqa: BLE001 (constants, which the forward pass misses)
        return False
    finally:
        place.write(before, "deleted")


def _without_numbers(items: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in items.items() if not numbers(value)}


def form(model: nn.Module) -> tuple[Any, ...]:
    """The marks by which a module computes as it did, but for its weights: its modules, their flags and numbers, and the
    functions on them."""
    return tuple(
        (
            name,
            type(module),
            tuple((k, v) for k, v in vars(module).items() if isinstance(v, bool | int | str) and k != "training"),
            tuple(map(id, additions(module))),
        )
        for name, module in model.named_modules()
    )


def is_plain(module: nn.Module) -> bool:
    """Whether a module is one of torch's own, with no hook or function of the caller's on it."""
    return is_torch(module) and not any(
        not (getattr(x, "__module__", None) or type(x).__module__).startswith("torch.") for x in additions(module)
    )
