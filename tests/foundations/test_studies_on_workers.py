"""Studies whose parts go to workers: the same results as one after the other here."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import classifier, same, splits, trained

import lmc
from lmc import align, merge
from lmc.errors import SpecError

QUIET = {"progress": False}
DATA = splits(96, 48)
MODEL = classifier(0, norm=True)
SPEC = lmc.permutation_spec(MODEL, DATA.train[0], **QUIET)


class Pickling(ThreadPoolExecutor):
    """Threads whose results are pickled, as those of processes are."""

    def submit(self, fn, /, *args, **kwargs):
        return super().submit(lambda: pickle.loads(pickle.dumps(fn(*args, **kwargs))))


@pytest.fixture
def workers():
    with Pickling(2) as pool:
        yield pool


def both(function, *args, executor, **options):
    return function(*args, **options, **QUIET), function(*args, executor=executor, **options, **QUIET)


@pytest.fixture(scope="module")
def nets():
    return [trained(classifier(seed, norm=True), DATA.train).state_dict() for seed in range(3)]


def test_align_compare(nets, workers):
    names = ["naive", "weight matching", "activation matching", "OT, weights"]
    here, there = both(align.compare, SPEC, MODEL, *nets[:2], DATA, methods=names, alphas=3, executor=workers)
    assert list(here) == list(there) == names and here.split == there.split
    frames = [found.to_frame().drop(columns="seconds") for found in (here, there)]
    assert frames[0].equals(frames[1])
    assert all(same(here[name].weights, there[name].weights) for name in names)
    assert there["weight matching"].permutation == here["weight matching"].permutation


def test_align_compare_passes_on_what_methods_refuse(nets, workers):
    def refusing(spec, model, a, b, data):
        raise SpecError("not for this architecture")

    with pytest.raises(SpecError, match="not for this architecture"):
        align.compare(SPEC, MODEL, *nets[:2], DATA, methods={"own": refusing}, executor=workers, **QUIET)


def test_merge_compare(nets, workers):
    names = ["average", "task_arithmetic", "greedy_soup"]
    options = {"base": nets[2], "test": DATA.test, "methods": names, "evaluations": 3}
    here, there = both(merge.compare, MODEL, nets[:2], DATA.train, executor=workers, **options)
    frames = [found.to_frame().drop(columns="seconds") for found in (here, there)]
    assert frames[0].equals(frames[1]) and same(here.weights, there.weights)
    assert (here.metric, here.higher, here.unit) == (there.metric, there.higher, there.unit)


def test_merge_compare_with_a_budget(nets, workers):
    found = merge.compare(
        MODEL, nets[:2], DATA.train, base=nets[2], methods=["average", "ties"], seconds=0.01, executor=workers, **QUIET
    )
    average, ties = found.to_frame().loc[["average", "ties"], "tried"].tolist()
    assert average == 1 and 1 <= ties < 20, "what has begun is finished, and no more begins"


def test_barrier_over_time(nets, workers):
    runs = [{0: nets[i], 3: nets[i + 1]} for i in (0, 1)]
    here, there = both(align.barrier_over_time, MODEL, *runs, DATA, spec=SPEC, alphas=3, executor=workers)
    assert here.epochs == there.epochs and here.to_frame().equals(there.to_frame())
    assert torch.equal(
        torch.tensor(here.paths["aligned"][1].losses["test"]), torch.tensor(there.paths["aligned"][1].losses["test"])
    )
