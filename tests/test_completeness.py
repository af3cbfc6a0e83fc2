"""On small programs, discovery against every permutation of every axis tried out."""

from fuzz.brute import AxisSymmetries, all_alive, brute_force, combinations
from fuzz.check import Outcome, outcome
from fuzz.generate import random_program

INPUTS = ((2, 2), (2, 3), (2, 2, 3), (2, 3, 2))
SEEDS, LIMIT = 400, 100_000


def small_programs():
    for seed in range(SEEDS):
        program = random_program(seed, steps=(1, 6), sizes=(2, 3), inputs=INPUTS, limit=150)
        module = program.module()
        if combinations(module) <= LIMIT and all_alive(module, program.inputs()):
            yield program, brute_force(module, program.inputs())


def axis_wise(found: Outcome) -> bool:
    """Whether all groups act on single axes, so that their orders can be compared with the brute force."""
    return all(len(table.dims) == 1 for group in found.groups for tables in group.tables.values() for table in tables)


def test_discovery_finds_what_brute_force_finds(record_property) -> None:
    compared: list[tuple[Outcome, AxisSymmetries]] = []
    for program, truth in small_programs():
        found = outcome(program, trials=1)
        assert found.sound, str(found)
        if axis_wise(found):
            compared.append((found, truth))
            assert found.log10_order <= truth.log10_order + 1e-9, f"more than exists ({len(truth.elements)}): {found}"
    nontrivial = [(found, truth) for found, truth in compared if truth.log10_order > 0]
    missed = [found for found, truth in nontrivial if found.log10_order < truth.log10_order - 1e-9]
    record_property("programs", len(compared))
    record_property("with symmetries", len(nontrivial))
    record_property("missed", [found.program.seed for found in missed])
    assert len(compared) >= 100 and len(nontrivial) >= 40
    assert len(missed) <= 0.1 * len(nontrivial), "\n".join(map(str, missed))
