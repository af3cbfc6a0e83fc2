"""The examination of a module on its first inputs: what it keeps, and how weights may be put through it.

With other weights loaded in between, a copy must give what a fresh copy gives; what it derives from its weights and keeps is
found and dropped, and a module that keeps it where it cannot be dropped is refused.
"""

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lmc.core.context import warn
from lmc.errors import DataError, InputError
from lmc.network.caches import Hidden, Removal, derives_outside, removable
from lmc.network.copies import switches
from lmc.network.inputs import first_of
from lmc.network.opaque import disturb, opaque
from lmc.network.places import Address, hidden_tensors
from lmc.weights import Weights


@dataclass(frozen=True)
class Verdict:
    """The way in which weights may be put through a module.

    Attributes:
        caches: it keeps values beside its state dict that change.
        renews: its parameters must be other objects for each weight set, since something is kept under their identity.
        functional: it may be called with other weights than those that it holds.
        switches: what it does of its own in `train` or `eval` changes its outputs, so that it must pass through both with each
            weight set.
        writes: it changes its parameters in a forward pass, so that it must be given copies.
        writes_inputs: it changes its inputs, so that it must be given copies.
    """

    caches: bool = True
    renews: bool = False
    functional: bool = True
    switches: bool = True
    writes: bool = True
    writes_inputs: bool = True

    @property
    def plain(self) -> bool:
        """Whether it derives nothing from its weights that would have to be dropped."""
        return self.functional and not (self.caches or self.renews or self.writes)


class Trial(Protocol):
    """A fresh copy of a module to try weights on; see `lmc.network.network.Network`."""

    module: nn.Module
    verdict: Verdict | None
    hidden: Hidden
    own_names: list[str]
    drew: bool

    def load(self, weights: Weights) -> None: ...
    def forget(self) -> None: ...
    def taken(self, tensor: Tensor) -> Tensor: ...
    def repeated(self, inputs: Any, weights: Weights | None = None, *, seed: int = 0) -> Any: ...
    def written(self, weights: Weights, inputs: Any) -> tuple[bool, bool]: ...


_SHADOWED = 64  # parameters that are looked at one by one


@dataclass(frozen=True)
class Examination:
    """The questions that one module is asked.

    Attributes:
        name: of its class, for warnings and errors.
        module: a copy.
        trial: makes another, emptied at these places, that goes by this verdict and holds these weights.
        weights: to try it with, and others near them.
        inputs: few examples.
    """

    name: str
    module: nn.Module
    trial: Callable[[Removal, Verdict, Weights], Trial]
    weights: Weights
    inputs: Any

    def stale(self) -> Removal:
        """The places where the module holds what it makes again by itself, of earlier calls; `InputError` where its outputs
        depend on what cannot be examined."""
        found = removable(self.module, self._called)
        kinds = {place: kind for place, kind in opaque(self.module).items() if place not in found}
        if kinds and self._matters(kinds, found):
            named = ", ".join(
                f"{'.'.join(filter(None, map(str, place[:2])))} ({kind})" for place, kind in list(kinds.items())[:3]
            )
            raise InputError(
                f"{self.name}: its outputs depend on {named}, which calls may change and which can be neither looked into nor put "
                "back, so that it may be of other weights; keep such values in tensors, numbers, lists or dicts"
            )
        return found

    def _matters(self, places: Collection[Address], stale: Removal) -> bool:
        """Whether the outputs come out otherwise, or not at all, where these places hold something else."""
        expected = self._given_out(stale, self.weights)
        trial = self.trial(stale, Verdict(), self.weights)
        disturb(trial.module, places)
        trial.verdict = Verdict(caches=False)  # keeps what was changed
        try:
            return not _equal(trial.repeated(self.inputs), expected)
        except Exception:  # noqa: BLE001 (whatever it is that the forward pass cannot do with it)
            return True

    def _called(self, removal: Removal) -> nn.Module:
        trial = self.trial(removal, Verdict(), self.weights)
        trial.repeated(self.inputs)
        return trial.module

    def _given_out(self, removal: Removal, weights: Weights) -> Any:
        return self.trial(removal, Verdict(), weights).repeated(self.inputs)

    def verdict(self, stale: Removal) -> Verdict:
        """A verdict: as a fresh copy gives for `weights`, so must a copy that had other weights before."""
        between = _perturbed(self.weights)
        runs = [partial(self._given_out, stale, given) for given in (self.weights, between)]
        if derives_outside(self.module, runs, _equal):
            raise self._kept_for_good()
        expected = self._repeated(stale)
        near = None
        for renews in (False, True):
            trial = self.trial(stale, Verdict(renews=renews), between)
            with contextlib.suppress(Exception):  # of weights that nobody asked for
                near = trial.repeated(self.inputs)
            trial.load(self.weights)
            again = False
            with contextlib.suppress(Exception):  # a copy that was called before may miss what it made once
                again = _equal(trial.repeated(self.inputs), expected)
            if again:
                break
        else:
            raise self._kept_for_good()
        if renews:
            warn(
                f"{self.name} keeps values derived from its weights outside itself: its parameters are replaced for each "
                "weight set, which takes longer"
            )
        switching = switches(self.module) and not self._alike_without_switching(stale, between)
        trial.forget()
        caches = trial.hidden.changing
        writes, writes_inputs = trial.written(self.weights, self.inputs)
        if not self._warn_of_shadows(stale, expected):
            with contextlib.suppress(Exception):  # of weights that nobody asked for
                if _equal(near, expected):
                    self._warn_of_weights_elsewhere(stale, expected)
        trial.load(between)
        functional = False
        with contextlib.suppress(Exception):  # what cannot be called so is not
            own = {name: trial.taken(self.weights[name]).clone() for name in trial.own_names}
            functional = _equal(trial.repeated(self.inputs, own), expected)
            functional &= all(torch.equal(tensor, trial.taken(self.weights[name])) for name, tensor in own.items())
        return Verdict(caches, renews, functional, switching, writes, writes_inputs)

    def _kept_for_good(self) -> InputError:
        return InputError(
            f"{self.name}: what it computes from one set of weights is used again with the next, and cannot be dropped, "
            "since it is shared by all modules of its kind (a dict of a class or a file, a cached function) or hidden in an "
            "object; keep such values in attributes of the module, or drop them in its train method"
        )

    def _alike_without_switching(self, stale: Removal, between: Weights) -> bool:
        """Whether a copy that goes from weights to others, and back, in evaluation mode gives what fresh ones give."""
        trial = self.trial(stale, Verdict(switches=False), self.weights)
        with contextlib.suppress(Exception):  # of a copy that misses what it makes in `eval`
            trial.repeated(self.inputs)
            for weights in (between, self.weights):
                expected = self._given_out(stale, weights)
                trial.load(weights)
                if not _equal(trial.repeated(self.inputs), expected):
                    return False
            return True
        return False

    def _repeated(self, stale: Removal) -> Any:
        """The outputs of a fresh copy; `InputError` where it gives something else when it is called again."""
        trial, again = self.trial(stale, Verdict(), self.weights), None
        expected = trial.repeated(self.inputs)
        if trial.drew and not _equal(trial.repeated(self.inputs, seed=1), expected):
            warn(
                f"{self.name}: it draws random numbers in evaluation mode, as dropout that is not told training=self.training "
                "does, so that every value comes out otherwise at each call"
            )
            trial = self.trial(stale, Verdict(), self.weights)
            trial.repeated(self.inputs)
        with contextlib.suppress(Exception):  # of a second call that nobody asked for
            again = _equal(trial.repeated(self.inputs), expected)
        if again is not False:
            return expected
        state = trial.module.state_dict(keep_vars=True)
        changed = [
            n for n, x in state.items() if n in self.weights and not torch.equal(x, trial.taken(self.weights[n]))
        ]
        named = ", ".join((changed + trial.hidden.names())[:3])
        raise InputError(
            f"{self.name}: called twice with the same inputs in evaluation mode, it gives other outputs the second time"
            f"{f' ({named} changed)' if named else ''}: they depend on how often it was called before, and no weights can be "
            "judged by them; let it count, draw or remember in training mode only"
        )

    def _warn_of_weights_elsewhere(self, stale: Removal, expected: Any) -> None:
        """Warn of a module that gives the same, which is no constant, with other weights: near by it does, where outputs of few
        values may, and with far ones too."""
        given = [x.reshape(-1)[:1000] for x in leaves(expected) if x.is_floating_point()]
        varied = any(len(x[x.isfinite()].unique()) > 1 for x in given)  # each NaN would count as a value
        own = [n for n, _ in self.module.named_parameters() if n in self.weights]
        far = _perturbed(self.weights) | {name: -self.weights[name] for name in own}
        if varied and own and _equal(self._given_out(stale, far), expected):
            warn(
                f"{self.name}: its outputs do not change with the weights that are loaded; it computes with tensors that "
                "it keeps beside its state dict, such as views of its parameters, or with those of another module: all "
                "weights are evaluated alike. Read the parameters in forward"
            )

    def _warn_of_shadows(self, stale: Removal, expected: Any) -> bool:
        """Warn of parameters in whose place the module uses copies that are not in its state dict (moving averages)."""
        if not _shadows(self.module):
            return False
        trial = self.trial(stale, Verdict(), self.weights)
        kept = _shadows(trial.module)
        alike = [
            n for n in trial.own_names if n in self.weights and any(x.shape == self.weights[n].shape for x in kept)
        ]
        if not alike or len(alike) > _SHADOWED:
            return False
        with contextlib.suppress(Exception):  # of values that nobody asked for
            for tensor in kept:
                tensor.detach().copy_(next(iter(_perturbed({"": tensor}).values())))
            trial.verdict = Verdict(caches=False)  # keeps what was changed
            if _equal(trial.repeated(self.inputs), expected):
                return False
            other = _perturbed(self.weights)
            for name in alike:
                changed = self._given_out(stale, {**self.weights, name: other[name]})
                if _equal(changed, expected):
                    warn(
                        f"{self.name}: its outputs do not depend on {name}; it uses a tensor of that shape which it keeps "
                        "beside its state dict, such as a moving average: all weights are evaluated with the module's own. "
                        "Make it a buffer, or copy it into the parameters"
                    )
                    return True
        return False


def _shadows(module: nn.Module) -> list[Tensor]:
    """The tensors beside the state dict that may be copies of parameters."""
    return [x for x in hidden_tensors(module) if x.is_floating_point() and x.numel() > 1]


def few_of(inputs: Any) -> Any:
    """The first two examples, where it is clear what an example is."""
    try:
        return first_of(inputs, 2)
    except DataError:
        return inputs


def _perturbed(weights: Weights) -> Weights:
    """Other weights that the module can make something of: about a tenth larger or smaller; what is positive stays so."""
    rng = torch.Generator().manual_seed(0)

    def other(tensor: Tensor) -> Any:
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
            return tensor
        noise = torch.rand(tensor.shape, generator=rng, dtype=torch.float32).to(tensor.device)
        if tensor.is_complex():
            return (tensor.detach() * (1.0 + 0.2 * noise) + 0.01 * noise).to(tensor.dtype)
        wide = tensor.detach().float()
        least = 0.1 * wide.abs().mean().clamp_min(0.1)  # zeros are moved as well
        return torch.where(wide > 0, wide * (1.0 + 0.2 * noise), wide - least * noise).to(tensor.dtype)

    return {name: other(tensor) for name, tensor in weights.items()}


def _equal(found: Any, expected: Any) -> bool:
    """Whether the real and complex tensors of two results agree, up to what another order of sums may change."""
    for x, y in zip(leaves(found), leaves(expected), strict=True):
        if x.shape != y.shape:
            return False
        x, y = (torch.view_as_real(z) if z.is_complex() else z for z in (x, y))
        if x.is_floating_point() and x.numel():
            rounding = torch.finfo(y.dtype).eps ** 0.5
            x, y = x.double(), y.double()
            scale = float(y[y.isfinite()].abs().amax()) if bool(y.isfinite().any()) else 0.0
            if not torch.allclose(x, y, rounding, rounding * scale, equal_nan=True):
                return False
    return True


def leaves(result: Any) -> list[Tensor]:
    """The tensors in a result, in attributes of its objects as well."""
    found = []
    for leaf in pytree.tree_leaves(result):
        found += [leaf] if isinstance(leaf, Tensor) else pytree.tree_leaves(getattr(leaf, "__dict__", None))
    return [leaf for leaf in found if isinstance(leaf, Tensor)]
