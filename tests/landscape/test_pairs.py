"""Barriers between every two of many networks: the paths themselves, in order, on threads and processes alike."""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from support import classifier, splits, trained

import lmc
from lmc.errors import InputError
from lmc.landscape import PairwiseBarriers, pairwise_barriers

QUIET = {"progress": False}
DATA = splits(96, 48)
MODEL = classifier(0)
SPEC = lmc.permutation_spec(MODEL, DATA.train[0], **QUIET)
ALIGN = functools.partial(lmc.weight_matching, SPEC, progress=False)


@pytest.fixture(scope="module")
def families():
    """Three networks and, mixed with them, a permuted copy of each, far away and in truth the same."""
    parents = [trained(classifier(seed), DATA.train).state_dict() for seed in range(3)]
    return [*parents, *(SPEC.random(seed).apply(parent) for seed, parent in enumerate(parents))]


@pytest.fixture(scope="module")
def serial(families) -> PairwiseBarriers:
    return pairwise_barriers(MODEL, families, DATA, alphas=5, **QUIET)


def equal(one: PairwiseBarriers, two: PairwiseBarriers) -> bool:
    names = ("barriers", "error_barriers", "losses")
    return all(np.array_equal(getattr(one, name), getattr(two, name), equal_nan=True) for name in names)


def test_each_entry_is_the_barrier_of_the_path(families, serial):
    path = lmc.loss_path(MODEL, families[1], families[3], DATA, alphas=5, **QUIET)
    assert serial.barriers[1, 3] == serial.barriers[3, 1] == path.barrier > 0
    assert serial.error_barriers[1, 3] == path.error_barrier
    assert serial.losses[1] == path.losses["test"][0] and serial.split == "test"
    assert serial.complete and (np.diag(serial.barriers) == 0).all()
    assert len(serial.to_frame()) == 15 and "6 networks, 15 of 15 pairs on test" in str(serial)


def test_alignment_finds_the_copies_again(families):
    found = pairwise_barriers(MODEL, families, DATA, align=ALIGN, alphas=5, **QUIET)
    assert all(found.barriers[i, i + 3] < 1e-6 for i in range(3))
    assert sorted(found.basins(1e-6)) == [("0", "3"), ("1", "4"), ("2", "5")]
    order = found.order
    assert all(abs(order.index(i) - order.index(i + 3)) == 1 for i in range(3)), "copies stand beside each other"
    axis = found.plot().data[0].x
    assert list(axis) == [str(i) for i in order]


def test_moves_may_be_given_as_weights(families):
    by_weights = pairwise_barriers(
        MODEL, families[:3], DATA, align=lambda a, b: ALIGN(a, b).apply(b), alphas=3, **QUIET
    )
    assert equal(by_weights, pairwise_barriers(MODEL, families[:3], DATA, align=ALIGN, alphas=3, **QUIET))


def test_workers_give_the_same_bits(families, serial, tmp_path):
    with ThreadPoolExecutor(3) as threads:
        assert equal(serial, pairwise_barriers(MODEL, families, DATA, alphas=5, executor=threads, **QUIET))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        assert equal(serial, pairwise_barriers(MODEL, families, DATA, alphas=5, executor=processes, **QUIET))


def test_checkpoints_are_read_where_they_are_needed(families, serial, tmp_path):
    from safetensors.torch import save_file

    opened = []
    for i, weights in enumerate(families):
        save_file({name: x.contiguous() for name, x in weights.items()}, tmp_path / f"{i}.safetensors")
        opened.append(lmc.open_checkpoint(tmp_path / f"{i}.safetensors"))
    with ThreadPoolExecutor(1) as pool:
        assert equal(serial, pairwise_barriers(MODEL, opened, DATA, alphas=5, executor=pool, **QUIET))


def test_an_interrupt_keeps_what_is_done(families, serial):
    calls: list[int] = []

    def stopping(a, b):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return b

    with pytest.warns(UserWarning, match="interrupted: 3 of 15 pairs were evaluated, .*resume="):
        part = pairwise_barriers(MODEL, families, DATA, align=stopping, alphas=5, **QUIET)
    assert not part.complete and np.isnan(part.barriers).sum() == 24 and len(part.order) == 6
    calls.extend([0] * 10)
    again = pairwise_barriers(MODEL, families, DATA, align=stopping, alphas=5, resume=part, **QUIET)
    assert equal(again, serial) and len(calls) == 4 + 10 + 12
    assert np.isnan(part.barriers).sum() == 24, "what was given is not changed"
    with pytest.raises(InputError, match="resume: barriers of other networks"):
        pairwise_barriers(MODEL, families, DATA, resume=part, **QUIET)


def test_unusable_arguments_are_refused(families, serial):
    with pytest.raises(InputError, match="at least two networks, got 1"):
        pairwise_barriers(MODEL, families[:1], DATA, **QUIET)
    with pytest.raises(InputError, match="expected 6 different names"):
        pairwise_barriers(MODEL, families, DATA, names="aabcde", **QUIET)
    with pytest.raises(InputError, match="expected 'loss' or 'error'"):
        serial.plot("accuracy")
