"""The merging methods of mergekit's configuration files, by the rules of this package that compute the same.

Each translation turns the parameters that hold for one tensor into the options of a rule. Defaults are those of mergekit
0.1.5, which differ from the papers' and from the rules': it trims tensors one by one, restores the L1 norm of sparsified
tensors instead of dividing by the density, and takes undecided entries of TIES as positive. Random masks have other
numbers. Sums are made in float32, there in `dtype`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from lmc.errors import InputError, nearest
from lmc.merge.engine.method import MergeFunction
from lmc.merge.rules import averaging, selection, task_vectors, ties


class Parameters(Protocol):
    """The parameters that a configuration sets for one tensor."""

    @property
    def size(self) -> int:
        """The number of values of the tensor."""
        ...

    def one(self, name: str, default: Any) -> Any:
        """A parameter of the method."""
        ...

    def each(self, name: str, default: Any = ...) -> list[Any]:
        """A parameter of each model; without a default, one that must be set."""
        ...


@dataclass(frozen=True)
class Translation:
    """The computation here of a method of mergekit.

    Attributes:
        function: the rule.
        options: from the parameters of a tensor to the rule's options for it.
        known: the names of all parameters.
        base: "task vectors" are taken from the base and its weight is none; it is "first" of the models, one of them
            ("input"), or "optional" (the origin of steps where there is one).
        models: how many there are besides the base at least and at most.
    """

    function: MergeFunction
    options: Callable[[Parameters], dict[str, Any]]
    known: tuple[str, ...]
    base: str = "task vectors"
    models: tuple[int, int] = (1, 1 << 30)

    @property
    def each(self) -> tuple[str, ...]:
        """The names of the parameters that every model may have of its own."""
        own = ("weight", "density", "gamma", "scale", *(("epsilon",) if "density" in self.known else ()))
        return tuple(name for name in self.known if name in own)


def _linear(p: Parameters) -> dict[str, Any]:
    weights = p.each("weight")
    if p.one("normalize", True):
        if abs(sum(weights)) < 1e-12:
            raise InputError(f"linear: weights {weights} sum to 0; set normalize: false, or other weights")
        weights = [weight / sum(weights) for weight in weights]
    return {"weights": weights}


def _added(p: Parameters, normalize: bool) -> dict[str, Any]:
    """Weights of task vectors, and the factor of their sum."""
    weights, scale = p.each("weight"), float(p.one("lambda", 1.0))
    if p.one("normalize", normalize):
        total = sum(weights)
        weights = [weight / (total if abs(total) >= 1e-8 else 1.0) for weight in weights]
    if len(set(weights)) == 1:  # a factor of the sum, which takes one product instead of one for each model
        weights, scale = [1.0] * len(weights), scale * weights[0]
    return {"weights": weights, "scale": scale}


def _elected(p: Parameters, normalize: bool) -> dict[str, Any]:
    weights = p.each("weight")
    normal = bool(p.one("normalize", normalize))
    if normal and min(weights) < 0:
        raise InputError(
            f"negative weights {weights} with normalize: true: the sum of the weights that agree may vanish or change its "
            "sign; set normalize: false"
        )
    return {"weights": weights, "scale": float(p.one("lambda", 1.0)), "combine_by": "ties" if normal else "ties-sum"}


def _ties(p: Parameters) -> dict[str, Any]:
    if p.one("rescale", False):
        raise InputError("ties with rescale: true is not supported; leave it out, or use dare_ties")
    found = _elected(p, True)
    normalize = {"ties": "weights", "ties-sum": "none"}[found.pop("combine_by")]
    return found | {
        "density": _shares(p, 1.0), "normalize": normalize, "scope": "tensor", "undecided": "positive"
    }  # fmt: skip


def _dare(elect: bool) -> Callable[[Parameters], dict[str, Any]]:
    def options(p: Parameters) -> dict[str, Any]:
        rescale = "l1" if p.one("rescale", True) else "none"
        merged = _elected(p, False) if elect else _added(p, False)
        return merged | {"density": _shares(p, 1.0), "rescale": rescale}

    return options


def _della(elect: bool) -> Callable[[Parameters], dict[str, Any]]:
    def options(p: Parameters) -> dict[str, Any]:
        rescale = "l1" if p.one("rescale", True) else "none"
        merged = _elected(p, True) if elect else _added(p, False) | {"combine_by": "sum"}
        density, epsilon = _shares(p, 1.0), [float(e) for e in p.each("epsilon", 0.15)]
        epsilon = [0.0 if share >= 1.0 else e for share, e in zip(density, epsilon, strict=True)]
        return merged | {"density": density, "epsilon": epsilon, "rescale": rescale}

    return options


def _breadcrumbs(elect: bool) -> Callable[[Parameters], dict[str, Any]]:
    def options(p: Parameters) -> dict[str, Any]:
        if p.one("rescale", False):
            raise InputError("breadcrumbs with rescale: true is not supported; leave it out")
        merged = _elected(p, False) if elect else _added(p, False)
        shares, outliers = [], []
        for density, gamma in zip(_shares(p, 1.0), p.each("gamma", 0.01), strict=True):
            # There the counts are rounded down, and few outliers make room for the density.
            kept, dropped = int(density * p.size), int(float(gamma) * p.size)
            dropped = 0 if density >= 1.0 else min(dropped, p.size - kept)
            shares.append(min(1.0, (kept + dropped) / p.size))
            outliers.append(dropped / p.size)
        return merged | {"density": shares, "outliers": outliers, "scope": "tensor"}

    return options


def _shares(p: Parameters, default: float) -> list[float]:
    return [min(1.0, float(value)) for value in p.each("density", default)]


def _nuslerp(p: Parameters) -> dict[str, Any]:
    if p.one("nuslerp_row_wise", False):
        raise InputError(
            "nuslerp_row_wise: true, which normalises columns, is not supported; set nuslerp_flatten: false"
        )
    return {"weights": p.each("weight"), "row_wise": not p.one("nuslerp_flatten", True)}


def _multislerp(p: Parameters) -> dict[str, Any]:
    weights = p.each("weight")
    if not p.one("normalize_weights", True) and abs(sum(weights) - 1.0) > 1e-9:
        raise InputError(f"multislerp with normalize_weights: false and weights {weights} is not supported")
    return {"weights": weights}


def _passthrough(p: Parameters) -> dict[str, Any]:
    return {"weights": [1.0 if scale is None else float(scale) for scale in p.each("scale", None)]}


ARITHMETIC = ("weight", "density", "normalize", "rescale", "lambda", "int8_mask")
MANY = 1 << 30
METHODS: dict[str, Translation] = {
    "linear": Translation(averaging.weighted_sum, _linear, ("weight", "normalize"), "input"),
    "passthrough": Translation(averaging.weighted_sum, _passthrough, ("scale",), "input", (1, 1)),
    "slerp": Translation(averaging.slerp, lambda p: {"t": float(p.one("t", ...))}, ("t",), "first", (1, 1)),
    "nuslerp": Translation(
        averaging.nuslerp, _nuslerp, ("weight", "nuslerp_flatten", "nuslerp_row_wise"), "optional", (2, 2)
    ),
    "multislerp": Translation(
        averaging.multislerp, _multislerp, ("weight", "normalize_weights", "eps"), "optional", (1, MANY)
    ),
    "karcher": Translation(
        averaging.karcher_mean,
        lambda p: {"iterations": int(p.one("max_iter", 10)), "tolerance": float(p.one("tol", 1e-5))},
        ("max_iter", "tol"),
        "input",
    ),
    "model_stock": Translation(
        averaging.model_stock,
        lambda p: {"row_wise": bool(p.one("filter_wise", False)), "signed": True},
        ("filter_wise",),
        models=(2, MANY),
    ),
    "nearswap": Translation(selection.nearswap, lambda p: {"t": float(p.one("t", ...))}, ("t",), models=(1, 1)),
    "arcee_fusion": Translation(selection.arcee_fusion, lambda p: {}, (), models=(1, 1)),
    "sce": Translation(
        selection.sce,
        lambda p: {"select": float(p.one("select_topk", 1.0)), "least": 1e-6},
        ("select_topk", "int8_mask"),
    ),
    "ram": Translation(selection.ram, lambda p: {"epsilon": float(p.one("epsilon", 1e-5))}, ("epsilon",)),
    "ramplus_tl": Translation(
        selection.ram,
        lambda p: {
            "epsilon": float(p.one("epsilon", 1e-5)),
            "boost": float(p.one("r", 0.1)),
            "cap": float(p.one("alpha", 0.2)),
            "scope": "tensor",
        },
        ("r", "alpha", "epsilon"),
    ),
    "task_arithmetic": Translation(task_vectors.task_arithmetic, lambda p: _added(p, False), ARITHMETIC),
    "ties": Translation(ties.ties, _ties, ARITHMETIC),
    "dare_ties": Translation(task_vectors.dare, _dare(True), ARITHMETIC),
    "dare_linear": Translation(task_vectors.dare, _dare(False), ARITHMETIC),
    "breadcrumbs": Translation(task_vectors.breadcrumbs, _breadcrumbs(False), (*ARITHMETIC, "gamma")),
    "breadcrumbs_ties": Translation(task_vectors.breadcrumbs, _breadcrumbs(True), (*ARITHMETIC, "gamma")),
    "della": Translation(task_vectors.della, _della(True), (*ARITHMETIC, "epsilon")),
    "della_linear": Translation(task_vectors.della, _della(False), (*ARITHMETIC, "epsilon")),
}


def translation(name: Any) -> Translation:
    """The computation of a method.

    Raises:
        InputError: there is none of that name; the nearest is named.
    """
    if name not in METHODS:
        raise InputError(
            f"merge_method: {name!r} is not supported{nearest(name, METHODS)}; known are {', '.join(METHODS)}"
        )
    return METHODS[name]
