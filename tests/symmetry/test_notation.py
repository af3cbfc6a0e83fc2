import random

import numpy as np
import pytest
import torch
from torch import nn

import lmc
from lmc.errors import SpecError
from lmc.symmetry.notation.grammar import Fixed, Name, Product, Sum, ancestors, parse, write
from lmc.symmetry.notation.layout import describe, groups_from_axes


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


def test_an_axis_that_no_pattern_says_is_no_group_of_that_name():
    """Two axes printed as "table" are not one group: read so, the spec would be wrong without a word."""
    patterns = {"a": "table", "b": ". table"}
    weights = {"a": torch.ones(4), "b": torch.ones(2, 4)}
    with pytest.raises(SpecError, match="a: 'table' in 'table' stands for an axis that no pattern says"):
        lmc.PermutationSpec.from_patterns(patterns, weights)
    quoted = {name: text.replace("table", "'table'") for name, text in patterns.items()}
    spec = lmc.PermutationSpec.from_patterns(quoted, weights)
    assert spec.groups["table"].size == 4 and spec.patterns == quoted


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


def random_path(draw: random.Random) -> str:
    """A module path: parts of any characters, numbers above all, as `add_module` takes them."""
    letters = "ab_xyz0123456789'/()+-* é[]"
    parts = ["".join(draw.choices(letters, k=draw.randint(1, 4))) for _ in range(draw.randint(0, 2))]
    return ".".join([*parts, str(draw.randint(0, 12)) if draw.random() < 0.5 else draw.choice(["fc", "table", "a/b"])])


def random_axis(draw: random.Random, names: list[str], depth: int = 0):
    def factor():
        kind = draw.random()
        if kind < 0.6 or depth == 2:
            path = None if draw.random() < 0.7 else tuple(draw.sample(names, draw.randint(0, 2)))
            return Name(draw.choice(names), path)
        return Fixed(draw.choice([None, 0, 3])) if kind < 0.8 else random_axis(draw, names, depth + 1)

    return Sum(tuple(Product(tuple(factor() for _ in range(draw.randint(1, 3)))) for _ in range(draw.randint(1, 2))))


@pytest.mark.parametrize("seed", range(200))
def test_what_is_written_reads_back_whatever_the_modules_are_called(seed):
    draw = random.Random(seed)
    names = [random_path(draw) for _ in range(4)]
    axes = tuple(random_axis(draw, names) for _ in range(3))
    axes = tuple(a if len(a.terms) > 1 or len(a.terms[0].factors) > 1 or not isinstance(a.terms[0].factors[0], Sum)
                 else a.terms[0].factors[0] for a in axes)  # fmt: skip
    assert parse(write(axes)) == axes


@pytest.mark.parametrize("seed", range(20))
def test_groups_round_trip_whatever_the_modules_are_called(seed):
    draw = random.Random(seed)
    names: set[str] = set()
    while len(names) < 7:
        names.add(random_path(draw))
    patterns, shapes, sizes = ROUND_TRIPS[draw.randrange(len(ROUND_TRIPS) - 1)]
    plain = groups_of(patterns, shapes, **sizes)
    called = dict(zip(dict.fromkeys(group.family for group in plain.values()), names, strict=False))
    axes = {tensor: parse(text) for tensor, text in patterns.items()}
    groups = groups_from_axes(
        {tensor: tuple(rename(axis, called) for axis in found) for tensor, found in axes.items()},
        shapes,
        {called.get(name, name): size for name, size in sizes.items()},
    )
    spec = lmc.PermutationSpec(groups, shapes)
    again = lmc.PermutationSpec.from_dict(spec.to_dict())
    assert again == spec and list(again.groups) == list(spec.groups) == list(groups)
    assert "table" not in [word for text in spec.patterns.values() for word in text.split()]
    assert "patterns" in spec.to_dict()
    assert all(family in repr(spec).replace("''", "'") for family in spec.families)


def rename(axis, called):
    def of(factor):
        if isinstance(factor, Name):
            path = None if factor.path is None else tuple(called[part] for part in factor.path)
            return Name(called[factor.name], path)
        return rename(factor, called) if isinstance(factor, Sum) else factor

    return Sum(tuple(Product(tuple(of(factor) for factor in term.factors)) for term in axis.terms))


def test_groups_of_a_sequential_are_numbers_in_quotes():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    spec = lmc.permutation_spec(model, torch.randn(2, 4))
    assert spec.patterns == {
        "0.weight": "'0' .", "0.bias": "'0'", "2.weight": "'2' '0'", "2.bias": "'2'", "4.weight": ". '2'", "4.bias": "."
    }  # fmt: skip
    assert lmc.PermutationSpec.from_patterns(spec.patterns, model) == spec
    assert "'2' '0'" in repr(spec)
    by_wildcard = lmc.PermutationSpec.from_patterns(
        {"0.weight": "'0' .", "*.bias": "*", "2.weight": "'2' '0'", "4.weight": ". '2'"}, model
    )
    assert {"0", "2", "4"} == set(by_wildcard.families)


def test_an_empty_axis_is_a_dot():
    groups = groups_of({"tokens": ". . d", "w": "d ."}, {"tokens": (1, 0, 4), "w": (4, 3)})
    spec = lmc.PermutationSpec(groups, {"tokens": (1, 0, 4), "w": (4, 3)})
    assert spec.patterns["tokens"] == ". . d" and "tokens" in repr(spec)
    assert lmc.PermutationSpec.from_dict(spec.to_dict()) == spec
    assert spec.coverage == 1.0
