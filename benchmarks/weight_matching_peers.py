"""Other implementations of weight matching, behind one interface, imported from where the user has put them.

Each peer is prepared with a case and two sets of weights and gives back a function `run(seed)`, the part that is
timed, and a function that turns its result into the permuted weights of B.
"""

import contextlib
import enum
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from weight_matching_networks import Case

import lmc

Weights = dict[str, Tensor]
Prepared = tuple[Callable[[int], Any], Callable[[Any], Weights]]


class _Absent(types.ModuleType):
    """Stands for a package that a peer imports but does not need for matching: every attribute is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda *_, **__: None, "__getattr__": lambda *_: lambda *_, **__: None})


def import_peer(name: str, *, file: Path | None = None, given: dict[str, types.ModuleType] | None = None) -> Any:
    """Import a module by name, or from a file, with stand-ins for packages that are not installed.

    Raises `ImportError` when the module itself, not one of its dependencies, is missing.
    """
    stand_ins = dict(given or {})
    sys.modules.update(stand_ins)
    while True:
        try:
            if file is None:
                return importlib.import_module(name)
            spec = importlib.util.spec_from_file_location(name, file)
            if spec is None or spec.loader is None or not file.exists():
                raise ImportError(f"{file} does not exist")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            return module
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing in stand_ins or name == missing or name.startswith(f"{missing}."):
                raise
            stand_ins[missing] = sys.modules[missing] = _Absent(missing)
            stand_ins[missing].__path__ = []


@contextlib.contextmanager
def quiet_and_seeded(seed: int) -> Iterator[None]:
    """No output, no gradients, and a random state of its own: the peers draw from torch's global one."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def axes_of(case: Case) -> dict[str, tuple[str | None, ...]]:
    """The specification in the form that Git Re-Basin uses: a group name, or None, for each axis."""
    return {
        name: tuple(None if item == "." else item for item in pattern.split())
        for name, pattern in case.patterns.items()
    }


def applied(case: Case, b: Weights, indices: dict[str, Any]) -> Weights:
    spec = lmc.PermutationSpec.from_patterns(case.patterns).bind(b)
    return lmc.Permutation(spec, {name: torch.as_tensor(indices[name]).long() for name in spec.groups}).apply(b)


def git_re_basin(folder: Path, case: Case, a: Weights, b: Weights) -> Prepared:
    """https://github.com/samuela/git-re-basin (JAX); one iteration is run before, so that compiling is not timed."""
    jax = importlib.import_module("jax")
    utils = types.ModuleType("utils")
    utils.rngmix = lambda key, value: jax.random.fold_in(key, hash(value))  # type: ignore[attr-defined]
    peer = import_peer(
        "jax_weight_matching", file=folder / "git-re-basin/src/weight_matching.py", given={"utils": utils}
    )
    del sys.modules["utils"]
    spec = peer.permutation_spec_from_axes_to_perm(axes_of(case))
    params = [{name: jax.numpy.asarray(tensor.numpy()) for name, tensor in weights.items()} for weights in (a, b)]

    def run(seed: int, **options: int) -> Any:
        return peer.weight_matching(jax.random.PRNGKey(seed), spec, *params, silent=True, **options)

    run(0, max_iter=1)
    return run, lambda found: applied(case, b, {name: index.tolist() for name, index in found.items()})


def git_re_basin_pytorch(folder: Path, case: Case, a: Weights, b: Weights) -> Prepared:
    """https://github.com/themrzmaster/git-re-basin-pytorch"""
    file = folder / "git-re-basin-pytorch/utils/weight_matching.py"
    peer = import_peer("torch_weight_matching", file=file)
    spec = peer.permutation_spec_from_axes_to_perm(axes_of(case))
    return lambda seed: peer.weight_matching(spec, a, b), lambda found: applied(case, b, found)


def pleas(folder: Path, case: Case, a: Weights, b: Weights) -> Prepared:
    """https://github.com/SewoongLab/PLeaS-Merging"""
    sys.path.insert(0, str(folder / "PLeaS-Merging"))
    peer = import_peer("pleas.methods.weight_matching")
    core = importlib.import_module("pleas.core.utils")
    spec, keys = {}, {}
    for name, axes in axes_of(case).items():
        for k, group in enumerate(axes):
            if group is not None:
                key = keys.setdefault(group, core.Axis(name, k))
                spec.setdefault(key, core.PermutationGroup(a[name].shape[k], set(), set())).state.add(
                    core.Axis(name, k)
                )

    def run(seed: int) -> Any:
        return peer.weight_matching(spec, a, b, verbose=False, seed=seed)

    return run, lambda found: applied(case, b, {group: found[key] for group, key in keys.items()})


def c2m3(folder: Path, case: Case, a: Weights, b: Weights) -> Prepared:
    """The weight matching in https://github.com/crisostomi/cycle-consistent-model-merging"""
    source = folder / "cycle-consistent-model-merging/src/ccmm"
    if not source.exists():
        raise ImportError(f"{source} does not exist")
    # The package's own __init__ and its training modules are left out: they import half of PyTorch Lightning.
    given = {name: types.ModuleType(name) for name in ("ccmm", "backports", "backports.strenum")}
    given["ccmm"].__path__ = [str(source)]
    given["backports"].__path__ = []
    given["backports.strenum"].StrEnum = enum.StrEnum  # type: ignore[attr-defined]
    given |= {name: _Absent(name) for name in ("scipy.misc", "ccmm.pl_modules", "ccmm.pl_modules.pl_module")}
    peer = import_peer("ccmm.matching.weight_matching", given=given)
    builder = importlib.import_module("ccmm.matching.permutation_spec").PermutationSpecBuilder()
    spec = builder.permutation_spec_from_axes_to_perm(axes_of(case))
    return lambda seed: peer.weight_matching(spec, a, b), lambda found: applied(case, b, found)


def rebasin(folder: Path, case: Case, a: Weights, b: Weights) -> Prepared:
    """https://pypi.org/project/rebasin; it works on modules that it traces, and tracing is not timed."""
    peer = importlib.import_module("rebasin")
    models = []
    for weights in (a, b):
        models.append(case.make().requires_grad_(False).eval())
        models[-1].load_state_dict(weights, strict=False)
    descents = {}

    def run(seed: int) -> Any:
        descents[seed].rebasin()
        return descents[seed].model_b

    def prepare(seed: int) -> None:
        model_b = case.make().requires_grad_(False).eval()
        model_b.load_state_dict(b, strict=False)
        descents[seed] = peer.PermutationCoordinateDescent(models[0], model_b, torch.randn(case.input_shape))

    run.prepare = prepare  # type: ignore[attr-defined]
    return run, lambda model: {name: p.detach().clone() for name, p in model.named_parameters()}


PEERS: dict[str, Callable[[Path, Case, Weights, Weights], Prepared]] = {
    "git-re-basin (JAX)": git_re_basin,
    "git-re-basin-pytorch": git_re_basin_pytorch,
    "PLeaS": pleas,
    "C2M3": c2m3,
    "rebasin": rebasin,
}
