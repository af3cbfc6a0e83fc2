"""The ledger, the joining of coordinates and the solver, on facts written by hand and on random facts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph as FxGraph

from lmc.symmetry.discovery.discover import assumptions, first_uses
from lmc.symmetry.discovery.provenance import differ, dim_before
from lmc.symmetry.discovery.solve import Solution, count_of, rank_within, solve
from lmc.symmetry.discovery.tables import same
from lmc.symmetry.groups.group import Group, Table
from lmc.symmetry.rules.tags import along, block, join, make
from lmc.symmetry.rules.units import Ids, Units
from lmc.symmetry.tracing.capture import capture
from lmc.symmetry.tracing.graph import Graph, Leaf


def solved(units: Units, *parameters: Ids) -> Solution:
    mask = np.zeros(units.total, np.bool_)
    for ids in parameters:
        mask[ids] = True
    return solve(units, mask)


def fibres(solution: Solution) -> list[list[list[int]]]:
    return [np.sort(f.units, axis=1).tolist() for f in solution.fibres]


def test_codes_number_by_first_occurrence() -> None:
    units = Units()
    ids = units.fresh(10)
    code, k = units.codes(ids[[7, 3, 7, 0, 3]])
    assert (code.tolist(), k) == ([0, 1, 0, 2, 1], 3)
    assert units.distinct(ids[[7, 3, 7]]) == 2
    assert units.determines(ids[[1, 2, 1]], ids[[5, 6, 5]]) and not units.determines(ids[[1, 2, 1]], ids[[5, 6, 7]])


def test_rank_within() -> None:
    assert rank_within(np.array([1, 0, 1, 1]), np.array([9, 9, 3, 5])).tolist() == [2, 0, 0, 1]


def test_different_numbers_are_counted() -> None:
    for keys in ([], [4], [2, 7, 2], [1, 1, 1, 0], [3, 2, 1]):
        assert count_of(np.array(keys, np.uint64)) == len(set(keys))


def test_locked_axes_are_one_group_and_apart_ones_two() -> None:
    units = Units()
    a, b, c = units.fresh(3), units.fresh(3), units.fresh(4)
    units.lock(a, b[[2, 0, 1]])
    assert fibres(solved(units, a, b, c)) == [[[0, 5], [1, 3], [2, 4]], [[6], [7], [8], [9]]]


def test_frozen_and_counted_units_stay() -> None:
    units = Units()
    a, b = units.fresh(3), units.fresh(5)
    units.lock(a, units.frozen("input", 3))
    units.count(b[[1, 3]])
    assert fibres(solved(units, a, b)) == [[[4], [6]], [[3], [5], [7]]]


def test_units_of_different_multisets_stay_apart() -> None:
    """Two halves of an axis, each read by itself: as many units in each, and yet none may change halves."""
    units = Units()
    a = units.fresh(4)
    units.count(a[:2])
    units.count(a[2:])
    assert sorted(fibres(solved(units, a))) == [[[0], [1]], [[2], [3]]]


def test_the_image_of_fixed_units_is_fixed() -> None:
    units = Units()
    a = units.fresh(2)
    units.map(units.frozen("input", 4), a[[0, 0, 1, 1]])
    assert fibres(solved(units, a)) == []


def test_blocks_and_the_units_within() -> None:
    """Six units in two blocks of three: the blocks move, and the units of each."""
    units = Units()
    u = units.fresh(6)
    h = units.fresh(2)
    units.map(u, h[[0, 0, 0, 1, 1, 1]])
    solution = solved(units, u)
    assert fibres(solution) == [[[0, 1, 2, 6], [3, 4, 5, 7]], [[0], [1], [2]], [[3], [4], [5]]]
    assert [f.parents.size for f in solution.fibres] == [0, 1, 1]


def test_common_quotient_of_two_parents() -> None:
    """Four query heads read two key heads: query units live in query heads and in key units. Key units know their
    heads only through the query units."""
    units = Units()
    key, query, heads = units.fresh(4), units.fresh(8), units.fresh(4)
    units.map(query, key[[0, 1, 0, 1, 2, 3, 2, 3]])
    units.map(query, heads[[0, 0, 1, 1, 2, 2, 3, 3]])
    sizes = [f.roots.size for f in solved(units, key, query).fibres]
    assert sizes == [2, 2, 2, 2, 2]  # key heads, query heads and key units of each


def test_a_shift_is_no_free_group() -> None:
    units = Units()
    u = units.fresh(6)
    units.map(u, np.roll(u, 2))
    (fibre,) = solved(units, u).fibres
    assert np.sort(fibre.units, axis=1).tolist() == [[0, 2, 4], [1, 3, 5]]


def test_pairs_of_one_group_are_refused() -> None:
    """Pairs i < j: no exchange of units has an image."""
    units = Units()
    u = units.fresh(4)
    rows, columns = np.triu_indices(4, 1)
    units.pair(u[rows], u[columns])
    assert fibres(solved(units, u)) == []


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_proposed_respects_every_fact(seed: int) -> None:
    """Random maps between sorts: a permutation of the rows of a fibre commutes with all of them."""
    rng = np.random.default_rng(seed)
    units = Units()
    sorts = [units.fresh(int(n)) for n in rng.choice([2, 3, 4, 6, 8, 12], 4)]
    for _ in range(int(rng.integers(1, 5))):
        child, parent = (sorts[k] for k in rng.choice(4, 2))
        regular = parent.size <= child.size and child.size % parent.size == 0 and rng.random() < 0.8
        image = (
            np.arange(child.size) * parent.size // child.size if regular else rng.integers(0, parent.size, child.size)
        )
        shift = int(rng.integers(0, 3))
        units.map(child, parent[(image + shift) % parent.size])
    if rng.random() < 0.4:
        units.count(rng.choice(sorts[0], 2))
    for fibre in solved(units, *sorts).fibres:
        assert np.unique(fibre.units).size == fibre.units.size
        g = np.arange(units.total)
        g[fibre.units] = fibre.units[rng.permutation(fibre.roots.size)]
        for m in units.maps:
            image = dict(zip(m.child.tolist(), m.parent.tolist(), strict=True))
            assert all(image.get(int(g[c])) == g[p] for c, p in image.items())
        for count in units.counts:
            times = dict(zip(count.ids.tolist(), count.times.tolist(), strict=True))
            assert all(times.get(int(g[u])) == n for u, n in times.items())


def test_join_keeps_products_and_drops_what_is_determined() -> None:
    units = Units()
    h, d, b = units.fresh(2), units.fresh(3), units.fresh(6)
    rows, columns = np.repeat(h, 3), np.tile(d, 2)
    assert len(join(units, (6,), [rows, columns])) == 2 and not units.maps
    assert join(units, (6,), [rows, columns, b])[0] is b  # finest
    assert len(units.maps) == 2  # its two functions


def test_join_pairs_what_is_neither() -> None:
    units = Units()
    a, b = units.fresh(2), units.fresh(2)
    (pairs,) = join(units, (5,), [a[[0, 0, 1, 1, 1]], b[[0, 0, 0, 1, 1]]])
    assert units.distinct(pairs) == 3


def test_join_takes_a_flattened_axis_apart() -> None:
    """Rows (2, 3) that were flattened: one coordinate on the first digit, one on both, as before they were flattened."""
    flat, apart = Units(), Units()
    results = []
    for units, shape in ((flat, (6,)), (apart, (2, 3))):
        a, inner = units.fresh(2), units.fresh(6)
        rows = np.broadcast_to(a[:, None], (2, 3)).reshape(shape) if units is flat else along(a, 0, 2)
        both = np.where(np.arange(6) < 3, inner, inner[[0, 1, 2, 0, 1, 2]]).reshape(shape)
        results.append(
            (len(join(units, shape, [rows, both])), sorted(len(f.roots) for f in solved(units, a, inner).fibres))
        )
    assert results[0] == results[1]


def test_join_relates_blocks_where_dims_overlap_in_part() -> None:
    """Rows o, and columns that belong to the group of the row, as in the weight of a grouped convolution."""
    units = Units()
    rows, inner = units.fresh(4), units.fresh(6)
    columns = inner.reshape(2, 3).repeat(2, axis=0)
    tag = make(units, (4, 3), [along(rows, 0, 2), columns])
    assert len(tag.coords) == 2
    sizes = sorted(f.roots.size for f in solved(units, rows, inner).fibres)
    assert sizes == [2, 2, 2, 3, 3]  # the groups; rows and columns of each


def test_block_of_overlapping_windows_leaves_nothing_free() -> None:
    units = Units()
    u = units.fresh(4)
    windows = np.stack([u[:3], u[1:]])
    blocks = block(units, windows, (1,))
    assert units.distinct(blocks.ravel()) == 2
    assert all(f.roots.size == 2 for f in solved(units, u).fibres)  # the middle two, or the mirror image


class Values(nn.Module):
    def __init__(self, of: Callable[["Values", Tensor], Tensor]) -> None:
        super().__init__()
        self.p, self.q, self.of = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4)), of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, x)


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (lambda m, x: m.p * 2.0, [True, True]),
        (lambda m, x: m.p.t(), [True, True]),
        (lambda m, x: m.p.permute(1, 0).tanh(), [True, True]),
        (lambda m, x: m.p.view(6, 1, 4), [False, False, True]),  # only the last dim of a view is followed
        (lambda m, x: m.p.t().transpose(0, 1), [True, True]),
        (lambda m, x: m.p.sum(1), [True]),
        (lambda m, x: torch.linalg.vector_norm(m.p, dim=1), [True]),
        (lambda m, x: m.p.mean(0, keepdim=True), [False, True]),
        (lambda m, x: m.p + m.q, [True, True]),
        (lambda m, x: x - m.q, [False, True]),
        (lambda m, x: m.p * m.q, [False, False]),
        (lambda m, x: x @ m.p.t(), [False, True]),
        (lambda m, x: m.p.relu(), [False, False]),
        (lambda m, x: m.p.round(), [False, False]),
        (lambda m, x: x.tanh(), [False, False]),
    ],
)
def test_values_are_known_to_differ_where_parameters_keep_them_apart(of, expected):
    graph = capture(Values(of), torch.randn(3, 4))
    (result,) = graph.outputs
    found = [differ(graph, result, dim) for dim in range(result.meta["val"].dim())]
    assert found == expected


def test_groups_are_the_same_where_all_their_rows_are() -> None:
    def group(*rows: list[int]) -> Group:
        return Group("h", 2, {"w": tuple(Table((0,), np.array(r).reshape(2, 1)) for r in rows)})

    assert same(group([0, 1], [2, 3]), group([0, 1], [2, 3]))
    assert not same(group([0, 1], [2, 3]), group([0, 1], [3, 2]))
    assert not same(group([1, 0]), group([0, 1]))


@pytest.mark.parametrize(
    "unreached, said",
    [((), ()), (("a", "b"), ("that a, b have no part",)), (("a", "b", "c"), ("that a, b and 1 more have no part",))],
)
def test_parameters_without_a_part_are_assumed_by_name(unreached: tuple[str, ...], said: tuple[str, ...]) -> None:
    graph = Graph([], {}, [], [], {}, {}, frozenset(), {}, unreached)
    assert assumptions(graph) == said


def test_dims_are_followed_back_through_moves_sums_and_the_last_one_of_a_view() -> None:
    graph = FxGraph()
    source = graph.placeholder("x")
    source.meta["val"] = torch.empty(2, 3, 5)

    def dims(operator: Callable, *args: Any) -> list[int | None]:
        node = graph.call_function(operator, (source, *args))
        node.meta["val"] = operator(source.meta["val"], *args)
        return [dim_before(node, dim) for dim in range(node.meta["val"].dim())]

    aten = torch.ops.aten
    assert dims(aten.permute.default, [2, 0, -2]) == [2, 0, 1]
    assert dims(aten.transpose.int, 0, -1) == [2, 1, 0]
    assert dims(aten.sum.dim_IntList, [1]) == [0, 2]
    assert dims(aten.sum.dim_IntList, [1], True) == [0, None, 2]
    assert dims(aten.linalg_vector_norm.default, 2, [-1]) == [0, 1]
    assert dims(aten.view.default, [6, 5]) == [None, 2]
    assert dims(aten.view.default, [2, 15]) == [None, None]
    free = graph.call_function(aten.zeros.default, ([2],))
    free.meta["val"] = torch.zeros(2)
    assert dim_before(free, 0) is None


def test_tensors_are_ranked_by_their_first_use_statistics_included() -> None:
    graph = FxGraph()
    x, statistic, weight, tied = (graph.placeholder(name) for name in ("x", "statistic", "weight", "tied"))
    graph.call_function(torch.ops.aten.sub.Tensor, (x, statistic))
    graph.call_function(torch.ops.aten.mul.Tensor, (tied, weight))
    leaves = {
        "x": Leaf("input", "0"),
        "statistic": Leaf("buffer", "norm.running_mean"),
        "weight": Leaf("parameter", "a.weight"),
        "tied": Leaf("parameter", "b.weight"),
    }
    aliases = {"norm.running_mean": "norm.running_mean", "a.weight": "a.weight", "b.weight": "a.weight"}
    traced = Graph(list(graph.nodes), leaves, [], [], aliases, {}, frozenset({"norm.running_mean"}))
    assert first_uses(traced) == {"norm.running_mean": 0, "a.weight": 1}
