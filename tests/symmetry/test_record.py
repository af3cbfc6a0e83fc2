"""Modules that export refuses: sizes, branches and masks decided by values, code that differs while compiling. One run
on the example is recorded, what it assumed is kept, and what decides stays in place."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmc
from lmc.errors import TraceError
from lmc.network.network import uncalled
from lmc.symmetry.discovery.discover import Discovery, discover
from lmc.symmetry.tracing.capture import FURTHER_RUNS, export, record, recorded
from lmc.symmetry.tracing.failures import is_user_file


class Layers(nn.Module):
    """Three layers, and what to do with them."""

    def __init__(self, function: Callable[..., Tensor], table: bool = False) -> None:
        super().__init__()
        self.function = function
        self.a: nn.Module = nn.Embedding(9, 8) if table else nn.Linear(5, 8)
        self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 3)
        self.edges = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 2]])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(self, *args, **kwargs)


def branch(m: Layers, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    return m.c(m.b(h).relu() if (x[:, 0] > 100).any().item() else h)


def branch_on_units(m: Layers, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(h.relu() if h.mean() > -100 else h)


def branch_on_one_unit(m: Layers, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(h.relu() if h[0, 0] > -100 else h)


def lengths(m: Layers, x: Tensor, n: Tensor) -> Tensor:
    return m.c(torch.cat([m.b(part.relu()).softmax(0) for part in m.a(x).split(n.tolist())]))


def array(m: Layers, x: Tensor, n: Tensor) -> Tensor:
    return m.c(m.a(x)[: int(n.numpy().max())].relu())


def through_numpy(m: Layers, x: Tensor) -> Tensor:
    return m.c(m.a(torch.from_numpy(x.numpy())).relu())


def rows(m: Layers, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(h[x[:, 0] > -100].relu())


def units_by_mask(m: Layers, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(h.relu()) * h[h > 0].sum()


def masked_rows(m: Layers, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    h[x[:, 0] > 0] = 0.0
    return m.c(h[torch.nonzero(x[:, 1] > -100)[:, 0]])


def convolve(m: Layers, layer: nn.Module, x: Tensor, edges: Tensor) -> Tensor:
    edges = edges[:, edges[0] != edges[1]]
    return layer(x) + torch.zeros_like(layer(x)).index_add(0, edges[1], layer(x)[edges[0]])


def graph(m: Layers, x: Tensor, edges: Tensor) -> Tensor:
    return m.c(convolve(m, m.b, convolve(m, m.a, x, edges).relu(), edges).relu())


def stored_graph(m: Layers, x: Tensor) -> Tensor:
    return graph(m, x, m.edges)


def attention_over_edges(m: Layers, x: Tensor, edges: Tensor) -> Tensor:
    h = m.a(x)
    edges = edges[:, edges[0] != edges[1]]
    score = (h[edges[0]] * m.b(h)[edges[1]]).sum(-1).exp()
    total = x.new_zeros(len(x)).index_add(0, edges[1], score)
    return m.c(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]] * (score / total[edges[1]])[:, None]).relu())


def while_compiling(m: Layers, x: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is None and not torch.compiler.is_compiling():
        mask = torch.ones(len(x))
    return m.c(m.a(x).relu() * mask[:, None])  # type: ignore[index]


def circular(m: Layers, x: Tensor) -> Tensor:
    h = F.pad(m.a(x).relu()[None], (0, 0, 1, 1), mode="circular")[0]
    return m.c(h[:-2] + h[2:]) * (2.0 if x.max().item() > 100 else 1.0)


def repeated(m: Layers, x: Tensor, n: Tensor) -> Tensor:
    return m.c(m.a(x).relu().repeat_interleave(n, dim=0))


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def noise_of_units(m: Layers, x: Tensor) -> Tensor:
    return m.c(m.a(x).relu() + noise((8,))) * (2.0 if x.max().item() > 100 else 1.0)


def noise_of_rows(m: Layers, x: Tensor) -> Tensor:
    return m.c(m.a(x).relu() + noise((len(x), 1))) * (2.0 if x.max().item() > 100 else 1.0)


def words(m: Layers, ids: Tensor) -> Tensor:
    return m.c(m.a(ids).relu()) * (2.0 if ids.max().item() > 3 else 1.0)


X, N, E = torch.randn(5, 5), torch.tensor([2, 3]), torch.tensor([[0, 1, 2, 3, 2], [1, 2, 0, 4, 2]])
CASES: dict[Callable[..., Tensor], tuple[tuple[Any, ...], list[int], str]] = {
    branch: ((X,), [8], "a number that is read"),
    branch_on_units: ((X,), [8], "a number that is read"),
    branch_on_one_unit: ((X,), [7], "a number that is read"),
    lengths: ((X, N), [8, 8], "a number that is read"),
    array: ((X, N), [8], "a number that is read"),
    through_numpy: ((X,), [8], "a number that is read"),
    rows: ((X,), [8], "how many are true in a mask"),
    units_by_mask: ((X,), [], "how many are true in a mask"),
    masked_rows: ((X,), [8], "the size of nonzero"),
    graph: ((X, E), [8, 8], "how many are true in a mask"),
    stored_graph: ((X[:3],), [8, 8], ""),
    attention_over_edges: ((X, E[:, :3]), [8], "how many are true in a mask"),
    while_compiling: ((X,), [8], ""),
    circular: ((X,), [8], "a number that is read"),
    repeated: ((X, torch.tensor([1, 2, 0, 1, 1])), [8], "the size of repeat_interleave"),
    noise_of_units: ((X,), [], "a number that is read"),
    noise_of_rows: ((X,), [8], "a number that is read"),
    words: ((torch.tensor([0, 5, 5]),), [8], "a number that is read"),
}


# By default one of each kind: the others stop and are recorded at the same operators, on other ways there.
OTHERS = (branch_on_units, array, through_numpy, graph, attention_over_edges, circular, noise_of_rows)
RECORDED = [pytest.param(f, id=f.__name__, marks=[pytest.mark.thorough] if f in OTHERS else []) for f in CASES]


@pytest.mark.parametrize("function", RECORDED)
def test_recorded(function: Callable[..., Tensor]) -> None:
    inputs, sizes, assumed = CASES[function]
    model = Layers(function, table=function is words)
    with pytest.raises(TraceError):
        export(uncalled(model, inputs), inputs, {}, None)
    spec = lmc.permutation_spec(model, inputs)
    assert [group.size for group in spec.groups.values()] == sizes, spec
    assert spec.certify(model, inputs, seed=3).max_error < 1e-9
    told = spec.assumed
    assert any(assumed in line and "test_record.py" in line for line in told) if assumed else True, told
    assert all(line in str(spec) for line in told)
    assert lmc.PermutationSpec.from_dict(spec.to_dict()).assumed == told


class Routed(nn.Module):
    """Each token goes through the expert that its router chooses; an expert without tokens is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        chosen, result = self.router(h).argmax(-1), torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                result = result + expert(h) * (chosen == number).unsqueeze(-1)
        return self.head(result.relu())


def test_experts_that_the_example_does_not_reach_are_recorded_with_other_weights() -> None:
    """One token goes to one expert, and yet the stream moves in all three, as it does for many tokens."""
    torch.manual_seed(0)
    model = Routed()
    few, many = (lmc.permutation_spec(model, x) for x in (torch.randn(1, 5), 10 * torch.randn(200, 5)))
    assert [set(group.tables) for group in few.groups.values()] == [set(group.tables) for group in many.groups.values()]
    assert {f"experts.{k}.weight" for k in range(3)} < set(few.groups["embed"].tables)
    assert few.certify(model, 10 * torch.randn(200, 5)).max_error < 1e-9
    assert few.assumed and not any("no part" in line for line in few.assumed + many.assumed)


def far(m: Layers, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x)) if x.abs().max() > 100 else m.a(x).relu())


def test_parameters_that_no_weights_lead_to_are_told() -> None:
    spec = lmc.permutation_spec(Layers(far), X)
    assert set(spec.groups["a"].tables) == {"a.weight", "a.bias", "c.weight"}
    assert "that b.bias, b.weight have no part" in spec.assumed


def of_weights(m: Layers, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x)) if m.a(x).abs().max() > 1e9 else m.a(x).relu())


@pytest.mark.parametrize(("way", "runs"), [(far, 1), (of_weights, 1 + FURTHER_RUNS)])
def test_other_weights_are_tried_only_where_weights_decide(way, runs, monkeypatch) -> None:
    made = []

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return recorded(*arguments)

    monkeypatch.setattr("lmc.symmetry.tracing.capture.recorded", counted)
    graph = record(Layers(way), (X,), {}, None)
    assert len(made) == runs and set(graph.unreached) == {"b.weight", "b.bias"}


def other_way(m: Layers, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(h.relu() if h.mean() > 0 else h * torch.arange(8.0))


def test_another_symmetry_on_another_way_is_refused() -> None:
    torch.manual_seed(0)
    model, bias = Layers(other_way), "a.bias"
    model.get_parameter(bias).data.fill_(5.0)
    spec = lmc.permutation_spec(model, X, certify=False)
    assert [group.size for group in spec.groups.values()] == [8]
    model.get_parameter(bias).data.fill_(-5.0)
    with pytest.raises(lmc.CertificateError, match="Guilty groups: 'a'"):
        spec.certify(model, X)


def test_lines_of_libraries_named_like_torch_are_shown() -> None:
    """torchvision and torch_geometric lie beside torch in a folder whose name begins alike; ours are not shown."""
    site, ours = Path(torch.__file__).parents[1], Path(lmc.__file__).parent
    assert is_user_file(str(site / "torchvision" / "ops" / "misc.py"))
    assert is_user_file(str(ours.parent / "lmc_study" / "net.py")) and is_user_file(str(ours / "models" / "vit.py"))
    assert not is_user_file(str(site / "torch" / "nn" / "modules" / "module.py"))
    assert not is_user_file(str(ours / "network" / "network.py"))


def test_rows_of_a_table_that_the_example_does_not_use_stay() -> None:
    """Integer inputs are data: what holds for these numbers only is no symmetry."""
    result = discover(Layers(words, table=True), torch.tensor([0, 5, 5]))
    assert ("a.weight", 0) in result.frozen


def test_both_ways_in_agree() -> None:
    """Where export works, the recorded run has the same symmetries, in-place operators and buffers included."""

    def forward(m: Layers, x: Tensor) -> Tensor:
        h = m.get_submodule("norm")(m.a(x).relu_())
        h[:, :2] *= 2
        return m.c(h.view(-1, 2, 4).transpose(1, 2).flatten(1))

    model = Layers(forward)
    model.norm = nn.BatchNorm1d(8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ways = [way(uncalled(model, X), (X,), {}, None) for way in (export, record)]
    found = [groups_of(model, way) for way in ways]
    assert found[0] == found[1]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def groups_of(model: nn.Module, graph: Any) -> list[tuple[int, list[str]]]:
    from unittest.mock import patch

    with patch("lmc.symmetry.discovery.discover.capture", lambda *_: graph):
        result: Discovery = discover(model, X)
    return [(group.size, sorted(group.tables)) for group in result.groups.values()]


def test_the_module_of_the_caller_is_not_touched() -> None:
    """What a forward pass keeps in attributes stays in a copy."""

    def forward(m: Layers, x: Tensor) -> Tensor:
        m.cache = m.a(x) if x.sum() > -1e9 else x
        return m.c(m.cache)

    model = Layers(forward).train()
    discover(model, X)
    assert not hasattr(model, "cache") and model.training


def test_a_run_that_fails_tells_the_model_s_own_error() -> None:
    with pytest.raises(TraceError, match=r"test_record.py:.*reduction dim|mat1 and mat2"):
        discover(Layers(branch), torch.randn(5, 4))


class OfObject(nn.Module):
    """Takes a data object, as models of graphs do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, data: Any) -> Tensor:
        hidden = self.inner(data.x).relu()
        return self.head(hidden.index_add(0, data.edge_index[0], hidden[data.edge_index[1]]))


@dataclass(frozen=True)
class GraphData:
    x: Tensor
    edge_index: Tensor


@pytest.mark.parametrize("kind", [GraphData, SimpleNamespace])
def test_a_data_object_is_computed_in_double_precision(kind):
    data = kind(x=torch.randn(5, 4), edge_index=torch.randint(5, (2, 9)))
    spec = lmc.permutation_spec(OfObject(), data, progress=False)
    assert [group.size for group in spec.groups.values()] == [6] and spec.certificate.max_error < 1e-9
    assert data.x.dtype == torch.float32
