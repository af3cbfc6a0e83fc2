import numpy as np
import pytest

from lmc.errors import SpecError
from lmc.symmetry.notation.describe import describe
from lmc.symmetry.notation.grammar import Fixed, Name, Product, Sum, ancestors, parse
from lmc.symmetry.notation.layout import groups_from_axes


def groups_of(patterns, shapes, **sizes):
    return groups_from_axes({name: parse(text, name) for name, text in patterns.items()}, shapes, sizes)


def test_an_axis_is_parsed_as_a_sum_of_products():
    (plain, composed) = parse("conv1.out (a . + g/b 3)")
    assert plain == Sum((Product((Name("conv1.out"),)),))
    assert composed == Sum((Product((Name("a"), Fixed())), Product((Name("b", ("g",)), Fixed(3)))))


@pytest.mark.parametrize("text", ["(a", "a)", "(a + )", "()", "a $", "+ a"])
def test_unreadable_patterns_are_refused_with_the_tensor_named(text):
    with pytest.raises(SpecError, match="fc.weight"):
        parse(text, "fc.weight")


def test_flatten_gives_each_channel_a_block_and_the_other_order_a_comb():
    groups = groups_of({"w": "h (c .)", "v": "(. c)", "c": "c"}, {"w": (2, 6), "v": (6,), "c": (3,)})
    assert groups["c"].tables["w"][0].rows.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert groups["c"].tables["v"][0].rows.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_concatenation_covers_a_part_of_the_axis():
    groups = groups_of({"w": "(a + 2 + b)", "a": "a", "b": "b"}, {"w": (7,), "a": (2,), "b": (3,)})
    assert groups["a"].tables["w"][0].rows.tolist() == [[0], [1]]
    assert groups["b"].tables["w"][0].rows.tolist() == [[4], [5], [6]]


def test_nested_names_become_one_group_per_place():
    groups = groups_of({"q": "(head qk) d", "o": "d (head v)"}, {"q": (6, 4), "o": (4, 10)}, head=2)
    assert [groups[f"qk[{i}]"].within for i in (0, 1)] == [(("head", 0),), (("head", 1),)]
    assert groups["head"].tables["q"][0].rows.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert groups["v[1]"].tables["o"][0].rows.tolist() == [[5], [6], [7], [8], [9]]


def test_a_name_is_nested_only_where_it_always_stands_to_the_right():
    patterns = {"q": "(kv rep qk) d", "k": "(kv qk) d", "shared": "(kv /u)", "norm": "w", "z": "(kv w)"}
    inside = ancestors({name: parse(text) for name, text in patterns.items()})
    assert inside["rep"] == ("kv",) and inside["qk"] == ("kv",)
    assert inside["u"] == () and inside["w"] == () and inside["d"] == ()


def test_grouped_query_units_own_their_place_in_every_repetition():
    shapes = {"q": (12, 5), "k": (4, 5)}
    groups = groups_of({"q": "(kv rep qk) d", "k": "(kv qk) d"}, shapes, kv=2, rep=3)
    assert groups["qk[1]"].tables["q"][0].rows.tolist() == [[6, 8, 10], [7, 9, 11]]
    assert groups["rep[1]"].tables["q"][0].rows.tolist() == [[6, 7], [8, 9], [10, 11]]


def test_nesting_across_axes_uses_both():
    groups = groups_of({"up": "e e/f ."}, {"up": (2, 3, 4)})
    table = groups["f[1]"].tables["up"][0]
    assert table.dims == (0, 1) and table.rows.tolist() == [[3], [4], [5]]


@pytest.mark.parametrize(
    ("patterns", "shapes", "sizes", "message"),
    [
        ({"w": "h ."}, {"w": (3,)}, {}, "2 axes"),
        ({"w": "h h2", "v": "h"}, {"w": (3, 4), "v": (5,)}, {}, "3 positions.* 5|5 positions.* 3|makes"),
        ({"w": "(head v)"}, {"w": (6,)}, {}, "head=|v="),
        ({"w": "(c .)", "c": "c"}, {"w": (7,), "c": (2,)}, {}, "divide"),
        ({"w": "(c c)"}, {"w": (4,)}, {"c": 2}, "twice"),
        ({"w": "a/b a"}, {"w": (2, 2)}, {"nothing": 1}, None),
        ({"w": "x/b ."}, {"w": (2, 2)}, {}, "no tensor has"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(patterns, shapes, sizes, message):
    if message is None:
        assert groups_of(patterns, shapes, **sizes)["b[1]"].size == 2
        return
    with pytest.raises(SpecError, match=message):
        groups_of(patterns, shapes, **sizes)


ROUND_TRIPS = [
    ({"q": "(head qk) d", "o": "d (head v)", "norm": "d"}, {"q": (12, 7), "o": (7, 20), "norm": (7,)}, {"head": 4}),
    ({"q": "(kv rep qk) d", "k": "(kv qk) d", "v": "(kv v) d", "o": "d (kv rep v)"},
     {"q": (12, 5), "k": (4, 5), "v": (6, 5), "o": (5, 18)}, {"kv": 2, "rep": 3}),
    ({"q": "(head /u) d", "o": "d (head /u)"}, {"q": (6, 4), "o": (4, 6)}, {"head": 2}),
    ({"up": "e e/f d", "down": "e d e/f", "r": "e d"}, {"up": (3, 4, 5), "down": (3, 5, 4), "r": (3, 5)}, {}),
    ({"w": "(g o) g/i . .", "x": "(g i) .", "y": ". (g o)"}, {"w": (8, 3, 2, 2), "x": (6, 2), "y": (2, 8)}, {"g": 2}),
    ({"w": "o (a + 3 + b)", "a": "a .", "b": "b ."}, {"w": (2, 9), "a": (2, 3), "b": (4, 3)}, {}),
    ({"w": "o ((a + b) .)", "a": "a", "b": "b"}, {"w": (2, 12), "a": (2,), "b": (4,)}, {}),
    ({"gates": "(. h) x", "rec": "(. h) h"}, {"gates": (12, 2), "rec": (12, 3)}, {"h": 3}),
    ({"w": "(a + a)", "a": "a"}, {"w": (6,), "a": (3,)}, {}),
    ({"w": "(. a .)", "a": "a"}, None, {}),
]  # fmt: skip


@pytest.mark.parametrize(("patterns", "shapes", "sizes"), ROUND_TRIPS)
def test_what_is_described_reads_back_as_the_same_groups(patterns, shapes, sizes):
    if shapes is None:
        with pytest.raises(SpecError, match="more than one"):
            groups_of(patterns, {"w": (12,), "a": (3,)})
        return
    groups = groups_of(patterns, shapes, **sizes)
    text = describe(groups, shapes)
    again = groups_of(text, shapes, **{group.family: group.size for group in groups.values()})
    assert again == groups, text


def test_an_irregular_arrangement_is_called_a_table():
    groups = groups_of({"w": "c"}, {"w": (4,)})
    shuffled = groups["c"].tables["w"][0].rows[np.array([2, 0, 3, 1])]
    groups["c"].tables["w"] = (type(groups["c"].tables["w"][0])((0,), shuffled),)
    assert describe(groups, {"w": (4,)}) == {"w": "table"}
