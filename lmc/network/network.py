"""The one way in which weights are put through a module: a private copy that takes on weight sets, one after the other.

Modules may derive values from their weights and keep them beside their state dict: attention biases gathered once for
evaluation, tables made in the first forward pass, results under an lru_cache. With other weights these are wrong, and no
error would say so. Here they are dropped with every weight set, also those that the caller's module holds because it was
called before, and each module is examined once on its first real inputs (`lmc/network/examination.py`).
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from lmc.core.context import callers_dtype, default_dtype
from lmc.errors import DataError, InputError, LmcError, WeightsError
from lmc.network.batches import tensors, to_device
from lmc.network.caches import Hidden, Removal, empty, form, is_plain
from lmc.network.copies import fresh_copy, loads_by_itself, renormalises, switches, writes_parameters
from lmc.network.examination import Examination, Verdict, few_of, leaves
from lmc.network.inputs import arguments
from lmc.network.task import tensor_of
from lmc.weights import Weights, as_weights, check_compatible
from lmc.weights.state import overlapping

# With the form that the module had: its caller may set flags, exchange layers, or add hooks.
_VERDICTS: weakref.WeakKeyDictionary[nn.Module, tuple[Verdict, Any]] = weakref.WeakKeyDictionary()


def whole(result: Any) -> Any:
    """All of a module's result, for functions that only run it."""
    return result


class Network:
    """One architecture in eval mode on one device; `load` gives it weights, calling it gives its outputs.

    Parameters are taken by reference, buffers are copied: a forward pass may write buffers, never parameters. Modules
    that are known to write parameters, such as adapters that are merged in eval mode, get copies.

    Args:
        model: the architecture; neither called nor changed.
        device: where to compute.
        read: what is taken of the module's result (default: the tensor, or its `.logits`); see `Task.read`.
        dtype: of all floating-point tensors, and the precision of complex ones (default: that of the weights).
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        read: Callable[[Any], Any] = tensor_of,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model: expected an nn.Module, which says what to compute, got {type(model).__name__}")
        if isinstance(model, torch.jit.ScriptModule):
            as_weights(model)  # raises for one that was frozen
        for name, value in model.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                raise WeightsError(
                    f"{name}: expected a tensor in the state dict of {type(model).__name__}, got {type(value).__name__}; extra "
                    "state outside parameters and buffers, as quantised layers have it, is not supported"
                )
        if (pair := overlapping(model)) is not None:
            raise WeightsError(
                f"{' and '.join(pair)} of {type(model).__name__} share a part of their memory, so that neither has values of its "
                "own; give each its own tensor, or make one a parameter and take the other from it in forward"
            )
        if device.type != "meta" and any(x.is_meta for x in (*model.parameters(), *model.buffers())):
            raise InputError(
                f"model: {type(model).__name__} is on the meta device, which has shapes and no values; "
                "model.to_empty(device=...) gives it memory, and buffers outside the state dict must be made again"
            )
        self.device, self.read = device, read
        self._model, self._dtype = model, dtype
        # What modules make without saying of which dtype.
        self._default = torch.float64 if dtype == torch.float64 else callers_dtype()
        self._renamed = renamed_entries(model)
        self._switches = switches(model)
        self._scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
        self._copies = writes_parameters(model)
        self._loads = bool(self._renamed) or loads_by_itself(model)
        self.module = fresh_copy(model, share=not self._loads).to(device)
        if dtype is not None:
            self.module._apply(lambda tensor: _cast(tensor, dtype))
        self.module.eval()
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        self.verdict: Verdict | None = None  # until the first inputs come
        self.drew = False
        self._stale: Removal = {}
        self._loaded: Weights | None = None
        self._take_stock()

    def _take_stock(self) -> None:
        self.hidden = Hidden(self.module)
        self._slots = self.module.state_dict(keep_vars=True)
        self._shapes = {name: tensor.shape for name, tensor in self._slots.items()}
        # One name for each tensor: tied parameters have several, and functional_call wants one.
        self.own_names = [name for name, _ in self.module.named_parameters()]
        self.own_names += [name for name, _ in self.module.named_buffers() if name in self._slots]
        self._ties = further_slots(self.module)

    def check(self, weights: Weights, what: str) -> None:
        """Raise `MismatchError` unless the names and shapes are the module's; dtype and device may be others."""
        if {name: tensor.shape for name, tensor in weights.items()} != self._shapes:
            check_compatible(_shapes_only(self._slots), _shapes_only(weights), ("model", what))

    def load(self, weights: Weights) -> None:
        """Take on `weights`, and drop what the module derived from those before."""
        self._loaded = weights
        self.forget()
        if self.verdict is not None and self.verdict.renews:
            self._renew_parameters()
        if not self._switches:
            self._fill(weights)
            return
        training = self.module.training
        self.module.train()
        self._fill(weights)
        if not training:
            self.module.eval()  # which some define, and not `train`

    def _fill(self, weights: Weights) -> None:
        if self._loads:
            state = self.module.state_dict()
            state.update(weights)  # keeps the metadata, in which modules look up their version
            self.module.load_state_dict(state)
            return
        for name, slot in self._slots.items():
            tensor = self.taken(weights[name])
            slot.data = tensor if isinstance(slot, nn.Parameter) and not self._copies else tensor.clone()

    def taken(self, tensor: Tensor) -> Tensor:
        """A tensor of the weights on this network's device, and in its dtype."""
        tensor = tensor.to(self.device)
        return tensor if self._dtype is None else _cast(tensor, self._dtype)

    def forget(self) -> None:
        """Drop what forward passes have left beside the state dict."""
        if self.verdict is None or self.verdict.caches:
            self.hidden.restore()

    def _renew_parameters(self) -> None:
        new: dict[int, nn.Parameter] = {}
        for module in self.module.modules():
            for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                parameter = new.setdefault(id(old), nn.Parameter(old.detach(), requires_grad=False))
                setattr(module, name, parameter)
        self._slots = self.module.state_dict(keep_vars=True)

    @property
    def by_reference(self) -> bool:
        """Whether the loaded weights may be changed in place: the module holds them, and derives nothing from them."""
        plain = self.verdict is not None and self.verdict.plain
        return plain and not (self._switches or self._copies or self._loads)

    def buffers(self) -> Weights:
        """The buffers as the last forward pass left them."""
        return {name: slot.detach() for name, slot in self._slots.items() if not isinstance(slot, nn.Parameter)}

    @torch.no_grad()
    def __call__(self, inputs: Any) -> Any:
        """The outputs (N, ...) for inputs of any accepted form."""
        return self.read(self.result(inputs))

    def _call(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        own = Tensor.detach if self.verdict is not None and not self.verdict.writes_inputs else _detached_copy
        if isinstance(inputs, Tensor):  # the usual call, made at every point of a landscape
            return (own(inputs.to(self.device)),), {}
        args, kwargs = arguments(self.module, to_device(inputs, self.device))
        return pytree.tree_map_only(Tensor, own, (args, kwargs))  # no gradients for the caller's inputs

    def result(self, inputs: Any) -> Any:
        """All that the module returns for inputs of any accepted form.

        Raises:
            DataError: the module fails on these inputs.
        """
        try:
            return self.run(inputs)
        except (LmcError, torch.cuda.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            given = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
            shapes = ", ".join(f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in given)
            where = f" on inputs {shapes}" if shapes else ""
            message = f"the model ({type(self._model).__name__}) fails{where}: {error}"
            if isinstance(inputs, Mapping) and not arguments(self.module, inputs)[1]:
                message += f"; it was given a mapping with {', '.join(map(str, inputs))}, since its forward names none of these"
            raise DataError(message) from error

    def run(self, inputs: Any) -> Any:
        """As `result`, with errors of the module itself as they are, for callers who know what they mean."""
        self._examine(inputs)
        args, kwargs = self._call(inputs)
        with self._dtypes_named(args, kwargs):
            return self._run(self.module, args, kwargs)

    @contextlib.contextmanager
    def _dtypes_named(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], weights: Weights | None = None
    ) -> Iterator[None]:
        """Raise `DataError` where a module fails on inputs of a dtype that none of its weights has."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, LmcError):
                given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                self._check_dtypes(weights or dict(self.module.named_parameters()), given, self._name)
            raise

    def _run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if torch.get_default_dtype() == self._default:
            return function(*args, **kwargs)
        with default_dtype(self._default):
            return function(*args, **kwargs)

    @torch.no_grad()
    def many(self, stacked: Weights, inputs: Any) -> Tensor:
        """The outputs (K, N, ...) of K weight sets stacked along a new first axis."""
        if not self._examine(inputs).functional or self._loads or self._scripted:
            return torch.stack([self._alone(stacked, k, inputs) for k in range(len(next(iter(stacked.values()))))])
        args, kwargs = self._call(inputs)

        def outputs(weights: Weights) -> Any:
            return self.read(self._with(weights, args, kwargs))

        # On a CPU, torch has no fused attention for a stack of networks, but the plain one.
        with attention_written_out() if self.device.type == "cpu" else nullcontext():
            return torch.vmap(outputs)(stacked)

    def _alone(self, stacked: Weights, k: int, inputs: Any) -> Any:
        self.load({name: tensor[k] for name, tensor in stacked.items()})
        return self(inputs)

    def outputs(self, weights: Weights, inputs: Any) -> Any:
        """The outputs (N, ...) as a differentiable function of `weights`; a tensor not given keeps what was loaded.

        Raises:
            InputError: the module cannot be called with other weights than its own.
        """
        verdict = self._examine(inputs)
        if self._renamed:
            raise InputError(
                f"{self._name}: hooks give entries of its state dict other names than its parameters have "
                f"({', '.join(self._renamed[:3])}), so that it cannot be differentiated by its state dict; "
                "remove the hooks for this"
            )
        if not verdict.functional:
            raise InputError(
                f"{self._name}: called with weights that it does not hold, it gives other outputs than with the same weights "
                "loaded, so that it cannot be differentiated by them; it computes something when weights are loaded or it "
                "changes mode"
            )
        args, kwargs = self._call(inputs)
        own = {name: weights[name] for name in self.own_names if name in weights}
        return self.read(self._with(own, args, kwargs))

    def _with(self, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plain = self.verdict is not None and self.verdict.plain
        if not plain:
            self.forget()
        call = _functional if plain and not self._scripted else call_with
        with self._dtypes_named(args, kwargs, weights):
            return self._run(call, (self.module, weights, args, kwargs, self._ties), {})

    def stack(self, states: Sequence[Weights]) -> Weights:
        """K weight sets as one, each tensor with a new first axis."""
        names = self._slots if self._renamed else self.own_names
        return {name: torch.stack([state[name].to(self.device) for state in states]) for name in names}

    def twin(self) -> "Network":
        """Another network of the same module, without weights, for another thread."""
        twin = Network(self._model, self.device, self.read, self._dtype)
        twin._adopt(self._stale, self.verdict)
        return twin

    def check_inputs(self, weights: Weights, inputs: Any, split: str) -> None:
        """Raise `DataError` when floating-point inputs have a dtype that none of the weights has; `WeightsError` for float8
        weights. Modules that are not torch's own may convert their inputs: they are asked when they are called."""
        if all(is_plain(module) for module in self.module.modules()):
            self._check_dtypes(weights, inputs, split)

    def _check_dtypes(self, weights: Weights, inputs: Any, split: str) -> None:
        dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
        for leaf in tensors(inputs):
            if dtypes and leaf.is_floating_point() and leaf.dtype not in dtypes:
                known = ", ".join(sorted(map(str, dtypes)))
                if all(dtype.itemsize == 1 for dtype in dtypes):
                    raise WeightsError(
                        f"weights: {known}, in which nothing is computed; convert them, for example "
                        "{name: tensor.float() for name, tensor in weights.items()}"
                    )
                raise DataError(f"{split}: inputs are {leaf.dtype}, the weights {known}; convert with .to(dtype)")

    def _adopt(self, stale: Removal, verdict: Verdict | None) -> None:
        """Empty what the caller's module holds of earlier calls, and go by a verdict that is known."""
        if stale:
            empty(self.module, stale)
            self._take_stock()
        self._stale, self.verdict = stale, verdict
        if verdict is not None:
            self._switches &= verdict.switches
            self._copies = self._switches or verdict.writes or renormalises(self._model)

    def _examine(self, inputs: Any) -> Verdict:
        """The verdict on this module, which is found at the first inputs, and kept for other copies of it."""
        if self.verdict is None and all(is_plain(module) for module in self.module.modules()):
            inplace = any(getattr(module, "inplace", False) for module in self.module.modules())
            self.verdict = Verdict(caches=False, writes=False, writes_inputs=inplace)
        if self.verdict is not None:
            return self.verdict
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            self.verdict = Verdict()  # what holds where the module fails on these inputs, which the caller will hear
            few, weights = few_of(inputs), as_weights(self._model) if self._loaded is None else self._loaded
            try:
                stale, verdict = self._found(few, weights)
            except LmcError:
                self.verdict = None
                raise
            except Exception:  # noqa: BLE001 (where the module cannot be called at all, the caller's own call will raise)
                verdict, self.verdict = self.verdict, None
                try:
                    self._trial({}, verdict, weights).repeated(few)
                except Exception:  # noqa: BLE001 (as above)
                    return verdict
                try:
                    stale, verdict = self._found(few, weights)
                except LmcError:
                    raise
                except Exception as error:
                    raise InputError(
                        f"{self._name}: it can be called, but not examined for what it keeps of other weights: "
                        f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
                    ) from error
        _VERDICTS[self._model] = verdict, form(self._model)
        self._adopt(stale, verdict)
        if (stale or verdict.writes) and self._loaded is not None:
            self.load(self._loaded)
        return verdict

    def _found(self, inputs: Any, weights: Weights) -> tuple[Removal, Verdict]:
        """The traces of earlier calls that the module holds, and the verdict on it; a known one where it is as it was."""
        examination = Examination(self._name, self.module, self._trial, weights, inputs)
        stale = examination.stale()
        known, seen = _VERDICTS.get(self._model, (None, None))
        return stale, known if known is not None and seen == form(self._model) else examination.verdict(stale)

    def alike(self, model: nn.Module) -> "Network":
        """A module of the same code in other sizes, for which the verdict on this one holds."""
        if self.verdict is not None:
            _VERDICTS[model] = self.verdict, form(model)
        return Network(model, self.device, self.read, self._dtype)

    def forget_calls(self, inputs: Any) -> None:
        """Empty what the module makes again by itself, of earlier calls by others, which `inputs` show."""
        if self.verdict is None:
            self._examine(inputs)

    def _trial(self, stale: Removal, verdict: Verdict, weights: Weights) -> "Network":
        trial = Network(self._model, self.device, self.read, self._dtype)
        trial._adopt(stale, verdict)
        trial.load(weights)
        return trial

    def repeated(self, inputs: Any, weights: Weights | None = None, *, seed: int = 0) -> Any:
        """The outputs of the module, called with other weights where they are given, as one that draws numbers repeats it;
        `drew` says afterwards whether it does."""
        torch.default_generator.manual_seed(seed)
        before = [torch.get_rng_state()]
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
            before.append(torch.cuda.get_rng_state(self.device))
        args, kwargs = self._call(inputs)
        found = self._run(self.module, args, kwargs) if weights is None else self._with(weights, args, kwargs)
        after = [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if len(before) > 1 else [])]
        self.drew = not all(map(torch.equal, before, after))
        return found

    def written(self, weights: Weights, inputs: Any) -> tuple[bool, bool]:
        """Whether a forward pass changes the parameters, and whether it changes the inputs."""
        self.load(weights)
        args, kwargs = self._call(inputs)
        places = (list(self.module.parameters()), leaves((args, kwargs)))
        before = [[(x, x._version, x.detach().clone()) for x in found] for found in places]
        with contextlib.suppress(Exception):  # of a call that the caller will make, and hear of
            self._run(self.module, args, kwargs)
        changed = [any(x._version != v or not torch.equal(x, old) for x, v, old in found) for found in before]
        return changed[0], changed[1]

    @property
    def _name(self) -> str:
        return type(self._model).__name__


def _detached_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


@contextlib.contextmanager
def attention_written_out() -> Iterator[None]:
    """Attention is computed by plain operations inside, torch's own layers included: its fused kernels can neither be
    differentiated forwards or twice, nor take a stack of networks."""
    with _WRITING_OUT:
        yield


class _WrittenOut:
    """Torch has one setting for all threads: the first to come changes it, the last to go puts it back. Were each to put back
    what it found, one that came second would leave behind what the first had set."""

    def __init__(self) -> None:
        self._lock, self._inside, self._settings = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._settings.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
                torch.backends.mha.set_fastpath_enabled(False)
                self._settings.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._settings.close()


_WRITING_OUT = _WrittenOut()


@contextlib.contextmanager
def derivatives(model: nn.Module, kind: str) -> Iterator[None]:
    """Attention is written out, and an operator of `model` that torch cannot differentiate in this way is an `InputError`.

    Args:
        kind: of the derivative, for the message.
    """
    try:
        with attention_written_out():
            yield
    except NotImplementedError as error:
        raise InputError(
            f"model: torch {torch.__version__} has no {kind} derivative of an operator in {type(model).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def anew(module: nn.Module) -> Iterator[None]:
    """Whatever a module in evaluation mode derives from its weights is derived inside, and dropped afterwards."""
    hidden = Hidden(module)
    try:
        if switches(module) and not module.training:
            module.train()
            module.eval()
        yield
    finally:
        hidden.restore(values=False)


def further_slots(module: nn.Module) -> dict[str, str]:
    """Names of parameters and buffers that modules hold under a further name -> the first; modules with several names once.

    With them `functional_call` needs to tie nothing: of modules that have several names it would put back what it had put
    there itself."""
    first = {id(x): name for name, x in (*module.named_parameters(), *module.named_buffers())}
    own = ((f"{path}.{name}" if path else name, x) for path, part in module.named_modules() for name, x in (
        *part.named_parameters(recurse=False, remove_duplicate=False),
        *part.named_buffers(recurse=False, remove_duplicate=False),
    ))  # fmt: skip
    return {name: first[id(x)] for name, x in own if first[id(x)] != name}


def _functional(
    module: nn.Module, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any], ties: Mapping[str, str]
) -> Any:
    given = weights | {name: weights[first] for name, first in ties.items() if first in weights}
    return functional_call(module, given, args, kwargs, tie_weights=False)


def call_with(
    module: nn.Module,
    weights: Weights,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ties: Mapping[str, str] | None = None,
) -> Any:
    """The outputs of the module with these parameters and buffers in place of its own; `ties` as of `further_slots`."""
    ties = further_slots(module) if ties is None else ties
    with _scripted_with(module, weights, ties) as others:
        inner = {f"module.{name}": tensor for name, tensor in others.items()}
        return _functional(_Anew(module), inner, args, kwargs, {f"module.{n}": f"module.{f}" for n, f in ties.items()})


@contextlib.contextmanager
def _scripted_with(module: nn.Module, weights: Weights, ties: Mapping[str, str]) -> Iterator[Weights]:
    """Scripted submodules, which `functional_call` cannot give other tensors, have these inside; yields those of the others."""
    scripted = {path: part for path, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)}
    if not scripted:
        yield weights
        return
    given = weights | {name: weights[first] for name, first in ties.items() if first in weights}
    places = {name: name.rpartition(".")[::2] for name in given if name.rpartition(".")[0] in scripted}
    before = {name: getattr(scripted[path], own) for name, (path, own) in places.items()}
    try:
        for name, (path, own) in places.items():
            setattr(scripted[path], own, given[name])
        with torch.jit.optimized_execution(False):  # operators one by one, as they stand in the code
            yield {name: tensor for name, tensor in weights.items() if name not in places}
    finally:
        for name, (path, own) in places.items():
            setattr(scripted[path], own, before[name])


class _Anew(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with anew(self.module):
            return self.module(*args, **kwargs)


def uncalled(model: nn.Module, inputs: Any) -> nn.Module:
    """A copy of a module in evaluation mode that holds nothing derived from its weights; they are in the same memory."""
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    network = Network(model, device)
    if device.type != "meta":
        network.forget_calls(inputs)
        if network.verdict is None or network.verdict.writes:
            network.load(as_weights(model))
    return network.module


def pick_device(device: torch.device | str | None, weights: Weights) -> torch.device:
    """The device asked for, else the one the weights are on.

    Raises:
        InputError: an unknown device, or one that this machine lacks.
    """
    if device is None:
        return next((tensor.device for tensor in weights.values()), torch.device("cpu"))
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise InputError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if chosen.type == "meta":
        raise InputError("the meta device holds no values: nothing can be computed there; load the weights elsewhere")
    return chosen


def activation_bytes(network: Network, inputs: Any) -> int:
    """Bytes that the leaf modules put out in one forward pass: what a further weight set costs beside its weights."""
    total = 0

    def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal total
        total += sum(tensor.nbytes for tensor in tensors(output))

    modules = [module for module in network.module.modules() if not isinstance(module, torch.jit.ScriptModule)]
    leaves = [module for module in modules if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    try:
        network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def renamed_entries(model: nn.Module) -> list[str]:
    """The names in a state dict under which the module holds no parameter or buffer, because hooks have changed them."""
    own = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    return [name for name in model.state_dict(keep_vars=True) if name not in own]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in a dtype, a complex one in the complex dtype of its precision, others as they are."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _shapes_only(weights: Mapping[str, Tensor]) -> Weights:
    return {name: torch.empty(tensor.shape, device="meta") for name, tensor in weights.items()}
