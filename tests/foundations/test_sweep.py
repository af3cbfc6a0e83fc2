"""One function over a grid: what is finished is kept, once; what fails says so; on threads, processes and a dask cluster."""

import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lmc
from lmc.core import workers
from lmc.core.sweep import _processors
from lmc.errors import DataError, InputError, WorkerError

QUIET = {"progress": False}


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def noted(log: str, seed: int) -> float:
    """The cell writes that it ran."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{seed}\n")
    return seed + 0.5


def faulty(log: str, seed: int) -> float:
    """Cell 1 raises, cell 2 kills its process, cell 3 does so the first time only."""
    found = noted(log, seed)
    if seed == 1:
        raise RuntimeError("cell 1 may not")
    if seed == 2 or (seed == 3 and ran(log).count(3) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def interrupting(log: str, seed: int) -> float:
    """Cell 2 presses the caller's Stop button, and goes on."""
    if seed == 2:
        deadline = time.monotonic() + 30
        while len(ran(log)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
    return noted(log, seed)


def greedy(log: str, seed: int) -> float:
    """Cell 1 asks for more memory than its process may have."""
    import resource

    if seed == 1:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
        torch.zeros(1 << 33)
    return noted(log, seed)


def ran(log: str) -> list[int]:
    return [int(line) for line in Path(log).read_text().split()] if Path(log).exists() else []


def test_systems_that_do_not_say_which_processors_may_be_used_count_all(monkeypatch):
    assert 1 <= _processors() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert _processors() == os.cpu_count()


def test_numbers_of_numpy_are_numbers(threads):
    grid = {"seed": np.arange(2), "rate": [np.float32(0.5)], "flag": [np.True_]}
    found = lmc.sweep(lambda seed, rate, flag: seed + rate * flag, grid, executor=threads, **QUIET)
    assert [cell.parameters["seed"] for cell in found.cells] == [0, 1] and found.cells[1].values == {"value": 1.5}


def test_every_combination_comes_back_in_the_order_of_the_grid(threads):
    def cell(width, word, seed):
        time.sleep(0.01 * (width == 8))  # finished last
        return {"sum": width + seed, "said": word, "loss": torch.tensor(0.5), "nothing": float("nan")}

    found = lmc.sweep(cell, {"width": [8, 9], "word": ["a"], "seed": range(2)}, executor=threads, **QUIET)
    frame = found.to_frame()
    assert frame[["width", "seed", "sum"]].values.tolist() == [[8, 0, 8], [8, 1, 9], [9, 0, 9], [9, 1, 10]]
    assert frame["loss"].tolist() == [0.5] * 4 and frame["nothing"].isna().all() and "error" not in frame
    assert found.complete and len(found.cells) == 4 and "2 width x 1 word x 2 seed, 4 of 4 cells" in str(found)


def test_a_second_call_computes_what_is_missing_and_what_failed(threads, tmp_path):
    folder, log, broken = tmp_path / "cells", str(tmp_path / "log"), {2}

    def cell(log, seed):
        if seed in broken:
            noted(log, seed)
            raise ValueError(f"seed {seed} is broken")
        return noted(log, seed)

    options = {"executor": threads, "folder": folder, **QUIET}
    with pytest.warns(UserWarning, match="1 of 3 cells failed, the first, .*seed=2, with ValueError: seed 2 is broken"):
        first = lmc.sweep(cell, {"log": [log], "seed": range(3)}, **options)
    assert not first.complete and "in cell" in first.failed[0].trace and "raise ValueError" in first.failed[0].trace
    assert first.to_frame()["error"].tolist() == ["", "", "ValueError: seed 2 is broken"]
    broken.clear()
    again = lmc.sweep(cell, {"log": [log], "seed": range(4)}, **options)
    assert sorted(ran(log)) == [0, 1, 2, 2, 3] and again.complete
    assert again.to_frame()["value"].tolist() == [0.5, 1.5, 2.5, 3.5]
    assert again.cells[0].seconds == first.cells[0].seconds, "read, not computed"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_an_interrupt_keeps_what_is_finished(tmp_path):
    def cell(seed):
        if seed == 1:
            raise KeyboardInterrupt
        return seed

    with ThreadPoolExecutor(1) as pool, pytest.warns(UserWarning, match="interrupted: 1 of 3 cells are finished"):
        found = lmc.sweep(cell, {"seed": range(3)}, executor=pool, folder=tmp_path, **QUIET)
    assert [cell.values["value"] for cell in found.cells] == [0]


def test_what_is_large_is_sent_once_for_all_tasks(monkeypatch):
    weights, sent = torch.arange(1 << 17, dtype=torch.float32), []

    class Counted(ThreadPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):
            sent.append(sum(len(str(arg)) for arg in args))
            return super().submit(fn, *args, **kwargs)

    with Counted(1) as pool:
        found = lmc.sweep(lambda seed: float(weights[seed]), {"seed": range(5)}, executor=pool, **QUIET)
    assert [cell.values["value"] for cell in found.cells] == [0, 1, 2, 3, 4]
    assert max(sent) < 1000


def test_what_cannot_be_sent_is_named():
    lock = threading.Lock()

    def helper():
        return lock

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(InputError, match=r"guarded > helper > lock \(lock\) cannot be sent to a worker"):

            def guarded(x):
                return helper()

            lmc.sweep(guarded, {"x": [1]}, executor=pool, **QUIET)


def test_executors_that_take_no_work_are_refused():
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(InputError, match="executor: it takes no more work .*shutdown.*pass a new one"):
        lmc.sweep(noted, {"log": [""], "seed": [1]}, executor=pool, **QUIET)
    with pytest.raises(InputError, match="executor: expected a concurrent.futures.Executor or a dask Client, got int"):
        lmc.sweep(noted, {"log": [""], "seed": [1]}, executor=2, **QUIET)


def test_workers_of_another_version_are_refused(threads, monkeypatch):
    work = workers._work
    monkeypatch.setattr(workers, "_work", lambda version, *rest: work("0.0.9", *rest))
    with pytest.raises(WorkerError, match=f"has lmc {lmc.__version__}, the caller 0.0.9: install one version"):
        lmc.sweep(lambda x: x, {"x": [1]}, executor=threads, **QUIET)


def test_a_folder_belongs_to_one_sweep(threads, tmp_path):
    def one(x):
        return x

    def two(x):
        return x

    options = {"executor": threads, "folder": tmp_path / "cells", **QUIET}
    lmc.sweep(one, {"x": [1]}, **options)
    with pytest.raises(DataError, match="holds the sweep of .*one over x, not of .*two over x: name another folder"):
        lmc.sweep(two, {"x": [1]}, **options)

    def one(x):  # noqa: F811 (it has been edited)
        return x + 1

    with pytest.warns(UserWarning, match="has been changed since cells"):
        assert lmc.sweep(one, {"x": [1]}, **options).cells[0].values == {"value": 1}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(DataError, match="is not empty and holds no sweep"):
        lmc.sweep(one, {"x": [1]}, executor=threads, folder=tmp_path / "other", **QUIET)
    (tmp_path / "cells" / "sweep.json").write_text("{}")
    with pytest.raises(DataError, match="does not say whose sweep this is"):
        lmc.sweep(one, {"x": [1]}, **options)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "at least one name"),
        ({"x": "abc"}, "x has 'abc'; expected a list"),
        ({"x": 3}, "x has 3; expected a list"),
        ({"x": []}, "at least one value, each once"),
        ({"x": [1, 2, 1]}, "at least one value, each once"),
        ({"x": [torch.zeros(2)]}, "x has a Tensor; .*travels by its path"),
        ({1: [1]}, "1 is no name"),
    ],
)
def test_grids_that_cannot_be_used_are_refused(grid, message):
    with pytest.raises(InputError, match=message):
        lmc.sweep(noted, grid, **QUIET)


def test_values_may_not_hide_parameters(threads):
    with pytest.warns(UserWarning, match="'x' is no name for a value"):
        assert lmc.sweep(lambda x: {"x": 2}, {"x": [1]}, executor=threads, **QUIET).failed


@pytest.mark.thorough
def test_a_process_that_dies_is_replaced(tmp_path):
    """Processes of this machine: one cell raises, one loses its process once."""
    log, grid = str(tmp_path / "log"), {"log": [str(tmp_path / "log")], "seed": [0, 1, 3, 4]}
    with pytest.warns(UserWarning, match="1 of 4 cells failed"):
        found = lmc.sweep(faulty, grid, folder=tmp_path / "cells", **QUIET)
    assert [cell.error for cell in found.failed] == ["RuntimeError: cell 1 may not"]
    assert sorted(ran(log)) == [0, 1, 3, 3, 4], "no finished cell ran twice"
    assert [cell.values.get("value") for cell in found.cells] == [0.5, None, 3.5, 4.5]
    assert not multiprocessing.active_children()


@pytest.mark.thorough
def test_a_cell_that_always_kills_its_process_costs_itself_only(tmp_path):
    log, grid = str(tmp_path / "log"), {"log": [str(tmp_path / "log")], "seed": [0, 2, 4]}
    with pytest.warns(UserWarning, match="1 of 3 cells failed"):
        found = lmc.sweep(faulty, grid, **QUIET)
    assert found.failed[0].error == (
        "DiedWithTask: the process that ran this died: by SIGKILL, most often for lack of memory"
    )
    assert sorted(ran(log)) == [0, 2, 2, 4]


def test_a_pool_that_breaks_keeps_what_was_finished(tmp_path):
    log, grid = str(tmp_path / "log"), {"log": [str(tmp_path / "log")], "seed": [0, 4, 3, 5]}
    options = {"folder": tmp_path / "cells", **QUIET}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        with pytest.raises(WorkerError, match="a worker died and took the whole executor with it"):
            lmc.sweep(faulty, grid, executor=pool, **options)
        with pytest.raises(WorkerError, match="a worker of it died"):
            lmc.sweep(faulty, grid, executor=pool, **options)
    with ThreadPoolExecutor(1) as pool:
        found = lmc.sweep(faulty, grid, executor=pool, **options)
    assert found.complete and ran(log) == [0, 4, 3, 3, 5]


@pytest.mark.thorough
def test_the_stop_button_ends_the_processes_and_keeps_the_cells(tmp_path):
    log = str(tmp_path / "log")
    started = time.monotonic()
    with pytest.warns(UserWarning, match=r"interrupted: \d of 4 cells are finished; the same call goes on"):
        found = lmc.sweep(interrupting, {"log": [log], "seed": range(4)}, folder=tmp_path / "c")
    assert time.monotonic() - started < 50, "cell 2 sleeps for a minute"
    assert {0, 1} <= {cell.parameters["seed"] for cell in found.cells} and not multiprocessing.active_children()


@pytest.mark.thorough
def test_a_cell_without_memory_is_recorded(tmp_path):
    with pytest.warns(UserWarning, match="1 of 3 cells failed"):
        found = lmc.sweep(greedy, {"log": [str(tmp_path / "log")], "seed": range(3)}, **QUIET)
    assert "memory" in found.failed[0].error and len(ran(str(tmp_path / "log"))) == 2


def test_a_scheduler_that_is_gone_is_not_waited_for(monkeypatch):
    class Gone(Executor):
        """Its first task is done, and nothing after that."""

        _client = SimpleNamespace(status="closed")
        count = 0

        def submit(self, fn, /, *args, **kwargs):
            future: Future = Future()
            if not self.count:
                future.set_result(fn(*args, **kwargs))
            self.count += 1
            return future

    monkeypatch.setattr(workers, "PATIENCE", 0.05)
    found = workers.spread(Gone(), lambda: lambda task: task, {}, [1, 2, 3])
    assert next(found) == (0, 1)
    with pytest.raises(WorkerError, match="the scheduler is gone: connect to a new one"):
        next(found)


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        local = distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit="1200MB", silence_logs=50
        )
        with local, distributed.Client(local) as client:
            yield client


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_dask_cluster_replaces_what_dies(cluster, tmp_path):
    """The same faults on a scheduler with worker processes, given the client or its executor."""
    grid = {"log": [str(tmp_path / "log")], "seed": range(5)}
    with pytest.warns(UserWarning, match="2 of 5 cells failed"):
        found = lmc.sweep(faulty, grid, executor=cluster, folder=tmp_path / "cells", **QUIET)
    raised, killed = (cell.error for cell in found.failed)
    assert raised == "RuntimeError: cell 1 may not" and killed.startswith("KilledWorker:")
    assert [cell.values.get("value") for cell in found.cells] == [0.5, None, None, 3.5, 4.5]
    executor: Executor = cluster.get_executor(pure=False)
    large = torch.arange(1 << 17, dtype=torch.float32)
    found = lmc.sweep(lambda seed: float(large[seed]), {"seed": range(9)}, executor=executor, **QUIET)
    assert [cell.values["value"] for cell in found.cells] == list(range(9))


@pytest.mark.thorough
def test_what_was_sent_is_sent_again_when_all_that_held_it_died(cluster, tmp_path):
    large, log = torch.arange(1 << 17, dtype=torch.float32), str(tmp_path / "log")

    def deadly(seed):
        noted(log, seed)
        if seed == 0 and ran(log).count(0) == 1:
            for pid in json.loads((tmp_path / "pids").read_text()):
                os.kill(pid, signal.SIGKILL)
        return float(large[seed])

    (tmp_path / "pids").write_text(json.dumps(list(cluster.run(os.getpid).values())))
    found = lmc.sweep(deadly, {"seed": range(6)}, executor=cluster, **QUIET)
    assert [cell.values["value"] for cell in found.cells] == list(range(6))
