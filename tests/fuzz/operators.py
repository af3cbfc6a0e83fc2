"""Torch's own database of operators and sample arguments, each sample put between two parameters: the tensors that go in
are parameters, and others read what comes out, so that a symmetry of the operator is a symmetry of the whole."""

import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from zoo.certificate import check_tables, permuted

from lmc.symmetry.discovery.discover import Discovery, read_off
from lmc.symmetry.rules import is_pointwise, rule_of
from lmc.symmetry.tracing.capture import decompositions, is_understood
from lmc.symmetry.tracing.graph import Graph, Leaf

from .check import form

TOLERANCE = 1e-8
# Samples of one operator, spread over the first that torch makes of it: it makes thousands of some, which takes longest.
MOST, MADE = (6, 400) if os.environ.get("LMC_THOROUGH") else (1, 24)
LARGEST = 4000  # entries of an operand or result
TAKEN_APART = decompositions()
WITHOUT = 4  # samples without any rule after which an operator is left


@dataclass
class Tally:
    """What was met: samples by operator (those drawn, those that reached a rule, those of these with groups), argument forms
    by operator with a rule, failures."""

    drawn: Counter[str] = field(default_factory=Counter)
    samples: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    forms: dict[str, set[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.drawn += other.drawn
        self.samples += other.samples
        self.groups += other.groups
        self.failures += other.failures
        for name, forms in other.forms.items():
            self.forms.setdefault(name, set()).update(forms)


def operators() -> list[Any]:
    """The entries of the database that take float64 and compute something; by default a third of those that compute each
    value alone, for which there is one rule."""
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds to import
    from torch.testing._internal.opinfo.core import BinaryUfuncInfo, UnaryUfuncInfo

    no_use = ("empty", "new_empty", "linalg.svd")  # nothing is written, or the result has no fixed sign
    found = [op for op in op_db if torch.float64 in op.supported_dtypes("cpu") and not op.name.startswith(no_use)]
    alone = [op for op in found if isinstance(op, BinaryUfuncInfo | UnaryUfuncInfo)]
    left = set() if os.environ.get("LMC_THOROUGH") else {id(op) for k, op in enumerate(alone) if k % 3}
    return [op for op in found if id(op) not in left]


def tally(entries: list[Any]) -> Tally:
    """Every chosen sample of some operators."""
    total = Tally()
    for entry in entries:
        without = 0
        for number, sample in samples(entry):
            if without >= WITHOUT:
                break
            result = examined(
                f"{entry.name} {entry.variant_test_name} sample {number}", entry, sample, as_input=number % 2 == 1
            )
            total.add(result)
            without += not result.forms
    return total


def samples(entry: Any) -> list[tuple[int, Any]]:
    """Some samples of an operator with their numbers, the same in every run."""
    # The database looks through the whole stack for the test that asks, which takes longer than everything else here.
    nobody = {"extract_test_fn": lambda: None}
    internal = "torch.testing._internal"
    with (
        warnings.catch_warnings(),
        patch.multiple(f"{internal}.common_utils", **nobody),
        patch.multiple(f"{internal}.opinfo.core", **nobody),
    ):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        try:
            every = list(islice(entry.sample_inputs("cpu", torch.float64, requires_grad=False), MADE))
        except (RuntimeError, ValueError, TypeError, ImportError):
            return []  # the database cannot make samples of this one here
    first, count = zlib.crc32(entry.name.encode()), len(every)
    numbers = sorted({(first + k * count // MOST) % count for k in range(MOST)}) if every else []
    return [(number, every[number]) for number in numbers]


def examined(title: str, entry: Any, sample: Any, as_input: bool) -> Tally:
    """One sample: its rules, and whether what is found holds. Integers are known constants, or inputs (`as_input`)."""
    result = Tally(drawn=Counter([entry.name]))
    try:
        placed = Placed.of(entry, sample, as_input)
        if placed is None:
            return result
        graph = placed.graph()
    except Exception:  # torch cannot compute or trace this sample
        return result
    result.forms = forms_in(graph)
    if not result.forms:
        return result
    result.samples[entry.name] += 1
    try:
        found = read_off(graph)
        check_tables(found.groups.values(), found.shapes)
        error = placed.error(found)
    except Exception as wrong:
        result.failures.append(f"{title}: {type(wrong).__name__}: {wrong}\n{placed}")
        return result
    result.groups[entry.name] += bool(found.groups)
    if not error <= TOLERANCE:
        names = [f"{g.name}({g.size}) {list(g.tables)}" for g in found.groups.values()]
        result.failures.append(f"{title}: error {error:.1e}; {names}\n{placed}")
    return result


@dataclass
class Placed:
    """A function of parameters: an operator's operands, and what reads its results."""

    call: Callable[..., Any]
    flat: list[Any]
    spec: Any
    floats: list[int]
    integers: list[int]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, entry: Any, sample: Any, as_input: bool) -> "Placed | None":
        flat, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
        tensors = [k for k, v in enumerate(flat) if isinstance(v, Tensor)]
        if any(flat[k].layout != torch.strided or flat[k].numel() > LARGEST or flat[k].is_complex() for k in tensors):
            return None
        floats = [k for k in tensors if flat[k].is_floating_point()]
        integers = [k for k in tensors if k not in floats] if as_input else []
        placed = cls(entry.op, flat, spec, floats, integers, {})
        generator = torch.Generator().manual_seed(0)
        for k in floats:  # equal numbers would hide that they are told apart
            noise = torch.rand(flat[k].shape, generator=generator, dtype=torch.float64)
            placed.weights[f"a{k}"] = flat[k].detach().contiguous().clone() * (1 - 1e-3 * noise)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            results = placed.results(placed.weights, [flat[k] for k in integers])
        if not floats or not results or any(r.numel() > LARGEST or not bool(r.isfinite().all()) for r in results):
            return None
        for k, r in enumerate(results):
            placed.weights[f"b{k}"] = torch.rand((*r.shape, 2), generator=generator, dtype=torch.float64) + 0.5
        return placed

    def results(self, weights: dict[str, Tensor], integers: list[Tensor]) -> list[Tensor]:
        """The floating-point results (complex ones by their real and imaginary parts, integers as numbers)."""
        flat = list(self.flat)
        for k in self.floats:
            flat[k] = weights[f"a{k}"]
        for k, value in zip(self.integers, integers, strict=True):
            flat[k] = value
        args, kwargs = pytree.tree_unflatten(flat, self.spec)
        found = [r for r in pytree.tree_leaves(self.call(*args, **kwargs)) if isinstance(r, Tensor)]
        found = [torch.view_as_real(r) if r.is_complex() else r for r in found]
        return [r if r.dtype == torch.float64 else r.double() for r in found if r.numel()]

    def output(self, weights: dict[str, Tensor], integers: list[Tensor]) -> Tensor:
        """Two numbers: all results, read by parameters."""
        found = enumerate(self.results(weights, integers))
        return reduce(torch.add, [torch.tensordot(r.sin(), weights[f"b{k}"], dims=r.dim()) for k, r in found])

    def graph(self) -> Graph:
        given = [self.flat[k] for k in self.integers]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")

            def run(weights: dict[str, Tensor], integers: list[Tensor]) -> Tensor:
                return self.output(weights, integers)

            traced = make_fx(run, pre_dispatch=True, _error_on_data_dependent_ops=False)(self.weights, given)
            if not all(is_understood(node) for node in traced.graph.nodes):  # taken apart, as `export` does
                traced = make_fx(run, decomposition_table=TAKEN_APART, _error_on_data_dependent_ops=False)(
                    self.weights, given
                )
                traced = make_fx(functionalize(traced), _error_on_data_dependent_ops=False)(self.weights, given)
        nodes = list(traced.graph.nodes)
        names: list[str | int] = [*self.weights, *range(len(given))]
        leaves = {
            node.name: Leaf("parameter", name) if isinstance(name, str) else Leaf("input", str(name))
            for node, name in zip((n for n in nodes if n.op == "placeholder"), names, strict=True)
        }
        for node in nodes:
            if node.op == "get_attr":
                leaves[node.name] = Leaf("constant", node.target, getattr(traced, node.target))
        (output,) = [a for a in pytree.tree_leaves(nodes[-1].args) if isinstance(a, Node)]
        return Graph(nodes, leaves, [output], [], {n: n for n in self.weights}, self.weights, frozenset())

    def error(self, found: Discovery) -> float:
        """Relative change of the output under a random element of all groups."""
        if not found.groups:
            return 0.0
        integers = [self.flat[k] for k in self.integers]
        worst = 0.0
        with torch.no_grad():
            for seed in range(2):
                before = self.output(self.weights, integers)
                after = self.output(permuted(self.weights, found.groups.values(), seed), integers)
                worst = max(worst, float((after - before).abs().max() / before.abs().max().clamp_min(1e-3)))
        return worst

    def __str__(self) -> str:
        shown = [f"{v.dtype}{list(v.shape)}" if isinstance(v, Tensor) else repr(v) for v in self.flat]
        return f"  {self.spec}\n  {shown}, integers as {'inputs' if self.integers else 'constants'}"


def forms_in(graph: Graph) -> dict[str, set[str]]:
    """For each operator with a rule of its own: the kinds of the arguments with which it was met."""
    forms: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and (rule_of(node.target) or is_pointwise(node.target)):
            name = str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")
            forms.setdefault(name, set()).add(form(node))
    for reader in ("tensordot", "sin", "add"):
        forms.pop(reader, None)
    return forms
