"""Sweeps and pairwise barriers on several processes against one, and what thousands of workers would do.

    python benchmarks/sweep.py                    # all, in a few minutes of a quiet machine
    python benchmarks/sweep.py --only training

`training`: cells that train a small network each, here in one process and by `lmc.sweep`. `pairs`: barriers between every
two of stored networks. Both print the ratio with the start of the processes and without. `many`: a clock that is advanced
by hand over times that were measured here (of a pair, of handing out an empty task) and sizes to be sent: when 1 to 4,000
workers would be through with 100,000 pairs, task by task and in the parts that `pairwise_barriers` sends.
"""

import argparse
import heapq
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor

import torch

import lmc
from lmc.landscape.pairs import MOST_TASKS

BANDWIDTH = 1.25e9  # bytes a second that leave the caller, 10 Gbit/s


def trained(width: int, seed: int, epochs: int) -> float:
    """The test loss of a network trained on digits."""
    torch.set_num_threads(1)
    data = lmc.data.digits()
    model = lmc.models.mlp(64, [width, width], 10)
    (weights,) = lmc.training.train(model, data, seeds=[seed], epochs=epochs, progress=False)
    return lmc.landscape.evaluate(model, weights, data)["test"].loss


def pool(workers: int) -> ProcessPoolExecutor:
    """Processes that have imported everything."""
    made = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    list(made.map(trained, [8] * workers, range(workers), [1] * workers))
    return made


def training(workers: int) -> None:
    grid = {"width": [256], "seed": range(8), "epochs": [40]}
    trained(8, 0, 1)
    start = time.perf_counter()
    here = [trained(256, seed, 40) for seed in range(8)]
    serial = time.perf_counter() - start
    start = time.perf_counter()
    with pool(workers) as executor:
        ready = time.perf_counter()
        there = lmc.sweep(trained, grid, executor=executor, progress=False)
        done = time.perf_counter()
    assert [cell.values["value"] for cell in there.cells] == here
    say("8 networks trained, width 256, 40 epochs", serial, done - ready, done - start, workers)


def pairs(workers: int) -> None:
    stored, data = lmc.data.checkpoint("digits-cnn"), lmc.data.digits(flat=False)
    models = [stored[i % len(stored)] for i in range(12)]
    options = {"alphas": 25, "progress": False}
    torch.set_num_threads(1)
    lmc.landscape.pairwise_barriers(stored.model(), models[:2], data, **options)
    start = time.perf_counter()
    here = lmc.landscape.pairwise_barriers(stored.model(), models, data, **options)
    serial = time.perf_counter() - start
    start = time.perf_counter()
    with pool(workers) as executor:
        ready = time.perf_counter()
        there = lmc.landscape.pairwise_barriers(stored.model(), models, data, executor=executor, **options)
        done = time.perf_counter()
    assert (here.barriers == there.barriers).all()
    say("66 pairs of the digits CNN, 25 points each", serial, done - ready, done - start, workers)


def say(what: str, serial: float, ready: float, whole: float, workers: int) -> None:
    ratios = f"{serial / ready:.2f} | {serial / whole:.2f}"
    print(f"| {what} | {workers} | {serial:.1f} | {ready:.1f} | {whole:.1f} | {ratios} |", flush=True)


def nothing(_: int) -> None:
    """An empty task."""


def handing_out(workers: int) -> float:
    """Seconds that an empty task takes from beginning to end, many at a time."""
    with pool(workers) as executor:
        start = time.perf_counter()
        list(executor.map(nothing, range(2000)))
        return (time.perf_counter() - start) / 2000


def simulated(count: int, workers: int, each: float, dispatch: float, together: int, megabytes: float) -> float:
    """Seconds until all tasks are through: one scheduler hands out a task at a time, workers first read what is shared.

    What is shared leaves the caller once for each worker, one worker after the other, as fast as the line allows."""
    free = [(i + 1) * megabytes * 1e6 / BANDWIDTH for i in range(workers)]
    heapq.heapify(free)
    clock = 0.0
    for start in range(0, count, together):
        clock = max(clock + dispatch, heapq.heappop(free))
        heapq.heappush(free, clock + each * min(together, count - start))
    return max(free)


def many(each: float, dispatch: float, megabytes: float) -> None:
    count = 100_000
    parts = -(-count // MOST_TASKS)
    print(
        f"\n{count:,} pairs of {1e3 * each:.0f} ms, {1e3 * dispatch:.2f} ms to hand out a task, {megabytes:g} MB to each worker\n"
    )
    print(f"| workers | one by one, s | efficiency | {parts} together, s | efficiency |")
    print("|---|---|---|---|---|")
    for workers in (1, 10, 100, 300, 1000, 2000, 4000):
        row = []
        for together in (1, parts):
            seconds = simulated(count, workers, each, dispatch, together, megabytes)
            row.append(f"{seconds:.0f} | {count * each / seconds / workers:.0%}")
        print(f"| {workers:,} | {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("training", "pairs", "many"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--each", type=float, default=0.5, help="seconds of a pair, for `many`")
    parser.add_argument(
        "--dispatch", type=float, help="seconds to hand out a task, for `many` (default: measured here)"
    )
    parser.add_argument("--megabytes", type=float, default=50, help="sent to each worker, for `many`")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, lmc {lmc.__version__}\n")
    if args.only != "many":
        print("| what | workers | one process, s | workers, s | with their start, s | ratio | with start |")
        print("|---|---|---|---|---|---|---|")
    for name, measure in (("training", training), ("pairs", pairs)):
        if args.only in (None, name):
            measure(args.workers)
    if args.only in (None, "many"):
        many(args.each, args.dispatch if args.dispatch is not None else handing_out(args.workers), args.megabytes)


if __name__ == "__main__":
    main()
