"""Every public function under every accident of its surroundings: the same result, and nothing of the caller's changed.

`CALLS` has a small call of each public function of the package; a new one without a call makes a test fail. Methods of
merging that are rules lifted to models are called alike.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lmc
from lmc import align, landscape, merge, training, weights

MODULES = ("lmc", "lmc.align", "lmc.landscape", "lmc.merge", "lmc.weights", "lmc.training")
SIZES = (6, 5, 3)
Q: dict[str, Any] = {"progress": False}


class Small(nn.Module):
    """One hidden layer; what it computes does not depend on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(*SIZES[:2])
        self.head = nn.Linear(*SIZES[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def _weights(seed: int, near: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"body.weight": (5, 6), "body.bias": (5,), "head.weight": (3, 5), "head.bias": (3,)}
    drawn = {name: torch.randn(shape, generator=rng, dtype=torch.float32) * 0.5 for name, shape in shapes.items()}
    return drawn if near is None else {name: near[name] + 0.2 * tensor for name, tensor in drawn.items()}


class World:
    """What a call is given, made anew for each."""

    def __init__(self) -> None:
        self.model = Small()
        self.model.load_state_dict(_weights(9))
        self.base = _weights(0)
        self.a, self.b, self.c = (_weights(seed, self.base) for seed in (1, 2, 3))
        rng = torch.Generator().manual_seed(4)
        self.x = torch.randn(24, SIZES[0], generator=rng, dtype=torch.float32)
        self.y = torch.arange(24) % SIZES[-1]
        self.spec: Any = SPEC
        self.cut: dict[str, Any] = {}  # how data are cut, for functions whose result does not depend on it

    @property
    def models(self) -> list[dict[str, Tensor]]:
        return [self.a, self.b]

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y


SPEC = lmc.PermutationSpec.from_patterns(
    {"body.weight": "h .", "body.bias": "h", "head.weight": ". h", "head.bias": "."}, _weights(0)
)


def _tuned(w: World) -> Callable[..., Any]:
    return lambda start, *_, **__: {
        name: tensor + 0.01 * w.b[name] for name, tensor in weights.as_weights(start).items()
    }


def _masked(w: World) -> Callable[..., Any]:
    return lambda start, masks, _seed: {n: t * masks.get(n, 1.0) for n, t in _tuned(w)(start).items()}


CALLS: dict[str, Callable[[World], Any]] = {
    # lmc
    "activation_matching": lambda w: lmc.activation_matching(w.spec, w.model, w.a, w.b, w.x, **w.cut, **Q),
    "bezier_curve": lambda w: lmc.bezier_curve(w.model, w.a, w.b, w.data, epochs=2, **Q),
    "canonical": lambda w: lmc.canonical(w.spec, w.model, w.a, inputs=w.x),
    "connect": lambda w: lmc.connect(w.model, w.a, w.b, w.data, spec=w.spec, steps=3, budget=None, **Q),
    "continuous_symmetries": lambda w: str(lmc.continuous_symmetries(w.spec, w.model, w.x, **Q)),
    "loss_path": lambda w: lmc.loss_path(w.model, w.a, w.b, w.data, alphas=3, **w.cut, **Q),
    "loss_plane": lambda w: lmc.loss_plane(w.model, [w.a, w.b, w.c], w.data, resolution=5, **w.cut, **Q),
    "loss_simplex": lambda w: lmc.loss_simplex(w.model, [w.a, w.b, w.c], w.data, resolution=2, **w.cut, **Q),
    "loss_triangle": lambda w: lmc.loss_triangle(w.model, [w.a, w.b, w.c], w.data, resolution=2, **w.cut, **Q),
    "match_many": lambda w: lmc.match_many(w.spec, [w.a, w.b, w.c], **Q),
    "ot_fusion": lambda w: lmc.ot_fusion(w.model, w.a, w.b, w.x, spec=w.spec, **w.cut, **Q),
    "permutation_spec": lambda w: str(lmc.permutation_spec(w.model, w.x, **Q)),
    "polygonal_chain": lambda w: lmc.polygonal_chain(w.model, w.a, w.b, w.data, epochs=2, **Q),
    "random_plane": lambda w: lmc.random_plane(w.model, w.a, w.data, resolution=5, **w.cut, **Q),
    "recalibrate_batchnorm": lambda w: lmc.recalibrate_batchnorm(w.model, w.a, w.x, **w.cut),
    "repair": lambda w: lmc.repair(w.model, w.models, w.x, **w.cut, **Q),
    "sinkhorn_matching": lambda w: lmc.sinkhorn_matching(w.spec, w.model, w.a, w.b, w.data, steps=3, **Q),
    "straight_through_matching": lambda w: lmc.straight_through_matching(
        w.spec, w.model, w.a, w.b, w.data, epochs=2, **Q
    ),
    "trajectory_plane": lambda w: lmc.trajectory_plane(
        w.model, [w.a, w.b, w.c, w.base], w.data, resolution=5, **w.cut, **Q
    ),
    "weight_matching": lambda w: lmc.weight_matching(w.spec, w.a, w.b, **Q),
    # align
    "barrier_over_time": lambda w: align.barrier_over_time(
        w.model, {0: w.base, 1: w.a}, {0: w.base, 1: w.b}, w.data, spec=w.spec, alphas=3, **Q, **w.cut
    ),
    "align.compare": lambda w: align.compare(
        w.spec, w.model, w.a, w.b, w.data, methods=["weight matching"], alphas=3, **Q
    ),
    "fold_norms": lambda w: align.fold_norms(w.spec, w.model, w.a, w.x),
    "group_matching": lambda w: align.group_matching(w.spec, w.model, w.a, w.b, inputs=w.x, **Q),
    "inspect_matching": lambda w: align.inspect_matching(
        lmc.weight_matching(w.spec, w.a, w.b, **Q), w.a, w.b, model=w.model, data=w.data, steps=2, alphas=3, **Q
    ),
    "rotatable_groups": lambda w: align.rotatable_groups(w.spec, w.model, w.a, w.x),
    "rotation_matching": lambda w: align.rotation_matching(w.spec, w.model, w.a, w.b, w.data, steps=2, **Q),
    "singular_alignment": lambda w: align.singular_alignment(w.a, w.b),
    # landscape
    "curvature": lambda w: landscape.curvature(w.model, w.a, w.data, top=1, probes=2, steps=3, **w.cut, **Q),
    "evaluate": lambda w: landscape.evaluate(w.model, w.a, w.data, **w.cut),
    "geodesic_path": lambda w: landscape.geodesic_path(w.model, w.a, w.b, w.data, points=3, epochs=2, **Q),
    "low_loss_path": lambda w: landscape.low_loss_path(w.model, w.a, w.b, w.data, ticks=2, rounds=(1, 3), **Q),
    "linear_cka": lambda w: landscape.linear_cka(w.x, w.x[:, :3]),
    "pairwise_barriers": lambda w: landscape.pairwise_barriers(
        w.model, [w.a, w.b, w.c], w.data, alphas=3, **w.cut, **Q
    ),
    "similarity": lambda w: landscape.similarity(w.model, w.a, w.b, w.data, **w.cut),
    "layerwise_barriers": lambda w: landscape.layerwise_barriers(w.model, w.a, w.b, w.data, alphas=3, **w.cut, **Q),
    "multiplicity": lambda w: landscape.multiplicity(w.model, w.models, w.data, **w.cut),
    "telescope": lambda w: landscape.telescope(w.model, w.models, w.x),
    "gradient_change": lambda w: landscape.gradient_change(w.model, w.a, w.b, w.x, probes=2),
    "variance_ratios": lambda w: landscape.variance_ratios(
        w.model, weights.mean(w.models), w.models, w.x, **w.cut, **Q
    ),
    # merge
    "adamerging": lambda w: merge.adamerging(w.model, w.models, [w.x, w.x], base=w.base, steps=2, **Q),
    "aligned": lambda w: merge.aligned(w.models, w.spec),
    "ama": lambda w: merge.ama(w.model, w.models, w.data, base=w.base, steps=2, groups=2, **Q),
    "cat_merging": lambda w: merge.cat_merging(w.model, w.models, [w.x, w.x], base=w.base, **w.cut, **Q),
    "merge.compare": lambda w: merge.compare(w.model, w.models, w.data, base=w.base, methods=["average"], **Q),
    "compare_soups": lambda w: merge.compare_soups(w.model, w.models, w.data, epochs=1, **Q),
    "diwa": lambda w: merge.diwa(w.model, w.base, w.data, fine_tune=_tuned(w), runs=2, **Q),
    "ema": lambda w: merge.ema([w.a, w.b]),
    "evolve": lambda w: merge.evolve(
        w.model,
        w.models,
        w.data,
        method=merge.task_arithmetic,
        space={"scale": (0.0, 1.0)},
        base=w.base,
        evaluations=3,
        **Q,
    ),
    "fisher": lambda w: merge.fisher(w.model, w.models, [w.x, w.x], samples=8, **Q),
    "fisher_information": lambda w: merge.fisher_information(w.model, w.a, w.x, samples=8),
    "fisher_weighted": lambda w: merge.fisher_weighted(
        w.models, [{name: tensor.abs() + 0.1 for name, tensor in state.items()} for state in w.models]
    ),
    "greedy_soup": lambda w: merge.greedy_soup(w.model, w.models, w.data, **Q),
    "merge.inspect": lambda w: merge.inspect(w.models, base=w.base, model=w.model, data=w.data, alphas=3, **Q),
    "lawa": lambda w: merge.lawa([w.a, w.b]),
    "lcsc": lambda w: merge.lcsc(w.model, w.models, w.data, evaluations=4, **Q),
    "learned_soup": lambda w: merge.learned_soup(w.model, w.models, w.data, epochs=1, **Q),
    "magnitude_masks": lambda w: merge.magnitude_masks(w.a, sparsity=0.5),
    "mix_experts": lambda w: merge.mix_experts([{"w": w.a["head.weight"]}, {"w": w.b["head.weight"]}], beta=0.3),
    "mixer": lambda w: merge.mixer(  # of that many models no grid is evaluated beforehand
        w.model, [w.a, w.b, w.c] * 3, {"one": w.data, "two": w.data}, base=w.base, **Q
    ).scores([0.1, 0.2, 0.3] * 3),
    "pleas": lambda w: merge.pleas(w.model, w.models, w.x, spec=w.spec, **w.cut, **Q).module.state_dict(),
    "ratatouille": lambda w: merge.ratatouille(
        w.model, w.models, w.data, base=w.base, fine_tune=_tuned(w), head="head.*", runs=2, **Q
    ),
    "regmean": lambda w: merge.regmean(w.model, w.models, [w.x, w.x], **w.cut, **Q),
    "regmean_plus_plus": lambda w: merge.regmean_plus_plus(w.model, w.models, [w.x, w.x], **w.cut, **Q),
    "sparse_soup": lambda w: merge.sparse_soup(w.a, retrain=_masked(w), sparsity=0.5, phases=1, copies=2, **Q),
    "star_model": lambda w: merge.star_model(w.model, w.models, w.data, epochs=2, **Q),
    "swa": lambda w: merge.swa([w.a, w.b]),
    "tall_masks": lambda w: merge.tall_masks(w.models, base=w.base),
    "task_vector": lambda w: merge.task_vector(w.a, base=w.base),
    "trajectory_averages": lambda w: merge.trajectory_averages(w.model, [w.base, w.a, w.b], w.data, **Q),
    "wise_ft_line": lambda w: merge.wise_ft_line(
        w.model, w.a, {"reference": w.data, "shifted": w.data}, base=w.base, alphas=3, **Q
    ),
    "zipit": lambda w: merge.zipit(w.model, w.models, w.x, spec=w.spec, **w.cut, **Q).module.state_dict(),
    # weights
    "agreeing": lambda w: weights.agreeing([w.a, w.b], model=w.model),
    "as_weights": lambda w: weights.as_weights(w.model),
    "check_compatible": lambda w: weights.check_compatible(w.a, w.b),
    "check_finite": lambda w: weights.check_finite(w.a),
    "distance": lambda w: weights.distance(w.a, w.b),
    "dot": lambda w: weights.dot(w.a, w.b),
    "fitted": lambda w: weights.fitted(w.model, w.a),
    "lerp": lambda w: weights.lerp(w.a, w.b, 0.3),
    "mean": lambda w: weights.mean([w.a, w.b]),
    "tied_names": lambda w: weights.tied_names(w.a),
    # training
    "branches": lambda w: [
        found.weights
        for found in training.branches(w.model, w.data, at=[1], epochs=2, batch_size=8, **Q).children.values()
    ],
    "projection": lambda w: training.projection({"w": (5, 3)}, 2)(w.x[0, :2]),
    "intrinsic_dimension": lambda w: training.intrinsic_dimension(
        w.model, {"train": w.data, "test": w.data}, [2], baseline=0.5, seeds=[0], epochs=1, batch_size=8, **Q
    ),
    "train": lambda w: training.train(w.model, w.data, seeds=range(2), epochs=1, batch_size=8, **Q).weights,
}
# Options that lifted rules cannot do without.
OPTIONS = {
    "nearswap": {"t": 0.1, "models": 1},
    "tall_mask": {"task": 0},
    "emr": {"task": 0},
    "twin": {"weights": [0.3, 0.7]},
    "metrics_weighted": {"losses": [0.3, 0.4]},
    "wise_ft": {"models": 1},
    "arcee_fusion": {"models": 1},
    "lines": {"blocks": ["body.*", "head.*"]},
}
# Public functions that compute on no weights, or only with files, which have tests of their own.
NOT_HERE = {
    "open_checkpoint", "plan", "write", "replay", "extract", "stack", "barrier", "balanced_batch", "linear", "on_tensors",
    "on_task_vectors", "on_merged", "sweep",
}  # fmt: skip


def _public() -> dict[str, Any]:
    """Every public function by name, with its wing where a name has two homes."""
    found: dict[str, Any] = {}
    for home in MODULES:
        module = importlib.import_module(home)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) and value not in found.values():
                found[f"{home.removeprefix('lmc.')}.{name}" if name in ("compare", "inspect") else name] = value
    return found


PUBLIC = _public()
LIFTED = [name for name, value in PUBLIC.items() if hasattr(value, "method") and name not in CALLS]


def call(name: str, w: World) -> Any:
    if name in CALLS:
        return CALLS[name](w)
    options = dict(OPTIONS.get(name, {}))
    models = w.models[: options.pop("models", 2)]
    return PUBLIC[name](models, base=w.base, **options)


NAMES = sorted([*CALLS, *LIFTED])


# Weights are trained or moved by batches: another size is another result, and not here.
BY_BATCHES = {
    "bezier_curve", "polygonal_chain", "low_loss_path", "geodesic_path", "sinkhorn_matching", "straight_through_matching", "rotation_matching",
    "adamerging", "ama", "learned_soup", "star_model", "train", "intrinsic_dimension",
}  # fmt: skip


def test_batches_are_cut_otherwise_wherever_that_may_change_nothing():
    source = inspect.getsource(inspect.getmodule(World))  # type: ignore[arg-type]
    cut = {name for name in PUBLIC if "batch_size" in inspect.signature(PUBLIC[name]).parameters}
    lines = source[source.index("CALLS:") : source.index("OPTIONS =")].split('\n    "')
    told = {line[: line.index('"')] for line in lines if "**w.cut" in line}
    assert told == cut - BY_BATCHES


def test_every_public_function_is_here():
    missing = set(PUBLIC) - set(CALLS) - set(LIFTED) - NOT_HERE
    assert not missing, f"give {sorted(missing)} a small call in CALLS"
    assert not set(CALLS) - set(PUBLIC)


def numbers(value: Any, seen: frozenset[int] = frozenset()) -> list[Tensor]:
    """Everything that a result holds, as tensors of float64 in an order of its own."""
    if id(value) in seen or isinstance(value, nn.Module | torch.dtype | torch.device | Path) or callable(value):
        return []
    seen = seen | {id(value)}
    if isinstance(value, Tensor):
        return [value.detach().double() if not value.is_complex() else torch.view_as_real(value.detach()).double()]
    if isinstance(value, np.ndarray):
        return numbers(value.tolist(), seen)
    if isinstance(value, str):
        return [torch.tensor([ord(c) for c in value], dtype=torch.float64)] if "certified" not in value else []
    if isinstance(value, bool | int | float | np.number):
        return [torch.tensor(float(value), dtype=torch.float64)]
    if isinstance(value, Mapping):
        return [x for key in sorted(value, key=str) if key not in TIMES for x in numbers(value[key], seen)]
    if isinstance(value, list | tuple | set | frozenset):
        return [x for item in value for x in numbers(item, seen)]
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return numbers({name: item for name, item in fields.items() if name not in TIMES}, seen)
    return numbers(vars(value), seen) if hasattr(value, "__dict__") else []


TIMES = {"seconds", "seconds_each", "spec", "runs", "info", "certificate"}


@contextlib.contextmanager
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shuffled_keys(w: World) -> None:
    w.b = {name: w.b[name] for name in reversed(w.b)}
    w.c = {name: w.c[name] for name in sorted(w.c, key=lambda n: n[::-1])}


def not_contiguous(w: World) -> None:
    for name in ("a", "b", "c", "base"):
        state = getattr(w, name)
        setattr(
            w,
            name,
            {n: t.T.contiguous().T if t.ndim == 2 else t.repeat(2).view(2, -1).T[:, 0] for n, t in state.items()},
        )
    w.x = w.x.T.contiguous().T


def other_batches(w: World) -> None:
    w.cut = {"batch_size": 7}


def called_in_training_mode(w: World) -> None:
    w.model.train()(w.x).sum().backward()


def nothing(_: World) -> None: ...


# Where a tolerance stands, sums are made in another order: of parts for threads and batches, along other axes for other
# layouts. Tensors of this size are not shared among threads; see the test of larger ones below.
ACCIDENTS: dict[str, tuple[Callable[[], Any], Callable[[World], None], float]] = {
    "no_grad": (torch.no_grad, nothing, 0.0),
    "inference_mode": (torch.inference_mode, nothing, 0.0),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), nothing, 0.0),
    "default float64": (default_float64, nothing, 0.0),
    "two threads": (two_threads, nothing, 1e-6),
    "shuffled keys": (contextlib.nullcontext, shuffled_keys, 1e-4),
    "not contiguous": (contextlib.nullcontext, not_contiguous, 1e-5),
    "batches of 7": (contextlib.nullcontext, other_batches, 1e-4),
    "called in training mode": (contextlib.nullcontext, called_in_training_mode, 0.0),
}


def result(name: str, w: World) -> list[Tensor]:
    """The numbers of a result; the world and the random state must be as they were."""
    before = {key: {n: t.clone() for n, t in getattr(w, key).items()} for key in ("a", "b", "c", "base")}
    own, mode = {n: t.clone() for n, t in w.model.state_dict().items()}, w.model.training
    inputs, state = w.x.clone(), torch.get_rng_state()
    found = numbers(call(name, w))
    assert torch.equal(torch.get_rng_state(), state), "the global random state moved"
    assert all(torch.equal(getattr(w, key)[n], t) for key, kept in before.items() for n, t in kept.items())
    assert all(torch.equal(t, own[n]) for n, t in w.model.state_dict().items()) and w.model.training == mode
    assert torch.equal(w.x, inputs)
    return found


@pytest.fixture(scope="module")
def reference() -> Callable[[str], list[Tensor]]:
    known: dict[str, list[Tensor]] = {}

    def of(name: str) -> list[Tensor]:
        if name not in known:
            known[name] = result(name, World())
        return known[name]

    return of


def accidents_of(name: str) -> list[str]:
    """Every accident; by default a quarter of them, another quarter for the next function."""
    nth = 1 if os.environ.get("LMC_THOROUGH") else 4
    return [accident for k, accident in enumerate(ACCIDENTS) if (k - NAMES.index(name)) % nth == 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_the_same_under_every_accident(name, reference):
    expected = reference(name)
    failures = []
    for accident in accidents_of(name):
        context, change, tolerance = ACCIDENTS[accident]
        w = World()
        change(w)
        try:
            with context():
                found = result(name, w)
        except Exception as error:  # every accident is reported, not the first alone
            failures.append(f"{accident}: {type(error).__name__}: {str(error)[:150]}")
            continue
        if [x.shape for x in found] != [x.shape for x in expected]:
            failures.append(f"{accident}: another form")
            continue
        for x, y in zip(found, expected, strict=True):
            if not torch.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True):
                failures.append(f"{accident}: differs by {float((x - y).abs().max()):.1e}")
                break
    assert not failures, "\n".join(failures)


@pytest.fixture(scope="module")
def large() -> dict[str, Any]:
    """A network and data whose sums torch shares among threads (of more than 32,768 numbers)."""
    rng = torch.Generator().manual_seed(0)

    def state() -> dict[str, Tensor]:
        shapes = {"0.weight": (128, 64), "0.bias": (128,), "2.weight": (5, 128), "2.bias": (5,)}
        return {name: 0.1 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 5))
    x = torch.randn(1000, 64, generator=rng)
    return {"model": model, "a": state(), "b": state(), "base": state(), "x": x, "y": torch.arange(1000) % 5}


OF_THREADS: dict[str, Callable[..., Any]] = {
    "loss_path": lambda model, a, b, x, y, **_: lmc.loss_path(model, a, b, (x, y), alphas=3, **Q).values["data"],
    "activation_matching": lambda model, a, b, x, **_: lmc.activation_matching(
        lmc.permutation_spec(model, x[:2], **Q), model, a, b, x, **Q
    ).apply(b),
    "ot_fusion": lambda model, a, b, x, **_: lmc.ot_fusion(model, a, b, x, **Q).weights,
    "weight_matching": lambda model, a, b, x, **_: lmc.weight_matching(
        lmc.permutation_spec(model, x[:2], **Q), a, b, **Q
    ).apply(b),
    "regmean": lambda model, a, b, x, **_: merge.regmean(model, [a, b], [x, x], samples=1000, **Q),
    "fisher_information": lambda model, a, x, **_: merge.fisher_information(model, a, x, samples=100),
    "repair": lambda model, a, b, x, **_: lmc.repair(model, [a, b], x, **Q),
    "ties": lambda a, b, base, **_: merge.ties([a, b], base=base),
    "slerp": lambda a, b, **_: merge.slerp([a, b]),
}


SHARED = ("loss_path", "activation_matching", "fisher_information", "ties")  # by default one of each way to make sums


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHARED else pytest.mark.thorough) for name in OF_THREADS]
)
@pytest.mark.filterwarnings("ignore")
def test_threads_that_share_sums_change_only_rounding(name, large):
    """Decisions (units, signs, what is trimmed) are the same; sums of parts differ by their rounding in float32."""
    alone = OF_THREADS[name](**large)
    with two_threads():
        together = OF_THREADS[name](**large)
    for x, y in zip(numbers(alone), numbers(together), strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


# The same to the last bit in another process, where strings have other hashes, so that sets have another order.
ELSEWHERE = (
    "permutation_spec", "weight_matching", "match_many", "activation_matching", "ot_fusion", "fold_norms", "rotatable_groups",
    "loss_path", "curvature", "merge.inspect", "merge.compare", "greedy_soup", "fisher", "regmean", "pleas", "zipit", "ties",
    "dare", "lines", "model_stock", "slerp", "train",
)  # fmt: skip


def digests() -> dict[str, str]:
    """A hash of the result of each of these functions; by default of a third of them."""
    found = {}
    for name in ELSEWHERE[:: 1 if os.environ.get("LMC_THOROUGH") else 3]:
        torch.manual_seed(0)
        parts = numbers(call(name, World()))
        found[name] = hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in parts)).hexdigest()
    return found


@pytest.mark.filterwarnings("ignore")
def test_the_same_in_another_process():
    root = Path(lmc.__file__).parents[1]
    code = "import json, test_accidents; print(json.dumps(test_accidents.digests()))"
    paths = os.pathsep.join([str(root), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == digests()


@pytest.mark.parametrize("name", [n for n in NAMES if "model" in inspect.signature(PUBLIC[n]).parameters])
@pytest.mark.filterwarnings("ignore")
def test_a_module_without_values_is_refused_or_not_needed(name, reference):
    """The module on the meta device, which has shapes and no numbers; the weights are where they were."""
    w = World()
    w.model.to("meta")
    try:
        found = numbers(call(name, w))
    except lmc.LmcError as error:
        assert "meta" in str(error)
        return
    if any(x.is_meta for x in found):
        return
    expected = reference(name)
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(found, expected, strict=True))


PRECISION = {"inputs": "x", "b": "b"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_another_precision_works_or_is_named(name):
    """Inputs, or the weights of one model, in float64, the rest in float32."""
    for k, (what, key) in enumerate(PRECISION.items()):
        if (k - NAMES.index(name)) % 2 and not os.environ.get("LMC_THOROUGH"):
            continue  # by default one of both, the other for the next function
        w = World()
        old = getattr(w, key)
        setattr(w, key, old.double() if isinstance(old, Tensor) else {n: t.double() for n, t in old.items()})
        try:
            call(name, w)
        except lmc.LmcError as error:
            assert "float" in str(error), what
