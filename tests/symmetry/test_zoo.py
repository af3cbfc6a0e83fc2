"""Every architecture of the zoo: the symmetries found are the ones derived by hand, and they hold."""

import functools
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from zoo import ENTRIES, Entry
from zoo.certificate import check_tables, error, widen

import lmc


@functools.cache
def discovered(number: int) -> tuple[nn.Module, lmc.PermutationSpec]:
    entry = ENTRIES[number]
    model = entry.build()
    return model, lmc.permutation_spec(model, entry.example(), outputs=entry.outputs, certify=False)


# A tenth of the entries runs by default, with one at least from each file of the zoo; what is found in it is looked for once.
EVERY = [
    pytest.param(k, id=entry.name, marks=[] if k % 10 == 1 else [pytest.mark.thorough])
    for k, entry in enumerate(ENTRIES)
]


@pytest.mark.parametrize("number", EVERY)
def test_zoo(number: int) -> None:
    entry = ENTRIES[number]
    model, spec = discovered(number)
    check_groups(entry, spec)
    check_certificate(entry, model, spec)
    check_coverage(entry, model, spec)


def check_groups(entry: Entry, spec: lmc.PermutationSpec) -> None:
    """As many groups of each size as derived by hand, hence the same order."""
    expected = entry.found or entry.expected
    sizes = Counter(group.size for group in spec.groups.values())
    assert sizes == expected.sizes, f"expected {expected}, found {dict(sizes)}\n{spec}"
    assert spec.log10_order == pytest.approx(expected.log10_order)


def check_certificate(entry: Entry, model: nn.Module, spec: lmc.PermutationSpec) -> None:
    """By the library's certificate, and by a check that shares no code with it, at the traced and at a larger shape."""
    certificate = spec.certify(
        model, entry.example(1), trials=2, seed=1, outputs=entry.outputs, also=entry.larger_example(1)
    )
    assert certificate.max_error < 1e-9
    assert set(certificate.families) == set(spec.families)
    assert certificate.unverified == ()  # each group, broken on purpose, is noticed
    check_tables(spec.groups.values(), spec.shapes)
    twin = entry.build(seed=5).double()
    for example in (entry.example(2), entry.larger_example(2)):
        if example is not None:
            # models that compute in float32 inside agree to its rounding; a wrong group is off by 1e-3 or more
            assert error(twin, widen(example), spec.groups.values(), seed=3, outputs=entry.outputs) < 1e-5


def check_coverage(entry: Entry, model: nn.Module, spec: lmc.PermutationSpec) -> None:
    if not entry.found:
        assert spec.coverage == pytest.approx(entry.share_moving(model), abs=1e-9), spec.frozen


@pytest.mark.parametrize("number", EVERY)
def test_a_wrong_edit_is_refused(number: int) -> None:
    """A family that forgets one of the tensors that it must move is refused, by the shapes or by the certificate."""
    entry = ENTRIES[number]
    model, spec = discovered(number)
    families = {
        family: tensors
        for family, names in spec.families.items()
        if len(tensors := {spec.aliases.get(t, t) for t in spec.groups[names[0]].tables}) > 1
    }
    if not families:
        assert all(len(group.tables) == 1 for group in spec.groups.values())
        return
    family = sorted(families)[number % len(families)]
    forgotten = max(sorted(families[family]), key=lambda t: math.prod(spec.shapes[t]))
    groups = {
        name: replace(group, tables={t: x for t, x in group.tables.items() if spec.aliases.get(t, t) != forgotten})
        if group.family == family
        else group
        for name, group in spec.groups.items()
    }
    with pytest.raises((lmc.CertificateError, lmc.SpecError), match=re.escape(family)):
        wrong = lmc.PermutationSpec(groups, spec.shapes, spec.buffers, aliases=spec.aliases)
        wrong.certify(model, entry.example(1), trials=2, seed=1, outputs=entry.outputs, also=entry.larger_example(1))


@pytest.mark.parametrize("number", [each for each, entry in zip(EVERY, ENTRIES, strict=True) if entry.recover])
def test_planted_permutation_is_recovered(number: int) -> None:
    """A random element of the whole group, heads and nested units included, is found again by weight matching."""
    model, spec = discovered(number)
    a = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    b = spec.random(seed=4).apply(a)
    found = lmc.weight_matching(spec, a, b, seed=0, progress=False)
    for name, tensor in found.apply(b).items():
        assert torch.equal(tensor, a[name]), name


def test_the_zoo_is_large_and_names_are_unique() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names) >= 110
    assert all(bool(entry.found) == bool(entry.short) for entry in ENTRIES)
