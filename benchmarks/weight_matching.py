"""Weight matching: time and objective, side by side with other implementations on the same weights.

    python benchmarks/weight_matching.py --peers FOLDER --cases mlp resnet20-4 --seeds 3

FOLDER holds clones of the peers' repositories (weight_matching_peers.py has the addresses); a peer that is missing is
skipped. Times are process time on one thread, medians over the runs; the objective, sum <A, pi(B)>, is computed here
for everyone. `--weights FILE` replaces the two fresh initialisations by the first two state dicts of a torch file.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import statistics
import sys
import time
from pathlib import Path

import torch
from weight_matching_networks import Case, cases
from weight_matching_peers import PEERS, Prepared, Weights, quiet_and_seeded

import lmc

# Shorter runs are measured a second time, so that first calls are not what is timed.
WARM_UP = 1.0


def ours(restarts: int):
    def prepare(folder: Path, case: Case, a: Weights, b: Weights) -> Prepared:
        spec = lmc.PermutationSpec.from_patterns(case.patterns).bind(a)

        def run(seed: int) -> lmc.Permutation:
            return lmc.weight_matching(spec, a, b, seed=seed, restarts=restarts, progress=False)

        return run, lambda pi: pi.apply(b)

    return prepare


def measure(prepared: Prepared, a: Weights, seeds: int) -> tuple[float, float, float]:
    """(median process seconds, median objective, best objective) over the seeds."""
    run, weights_of = prepared

    def once(seed: int) -> tuple[float, float]:
        with quiet_and_seeded(seed):
            if hasattr(run, "prepare"):
                run.prepare(seed)
            started = time.process_time()
            found = run(seed)
            seconds = time.process_time() - started
        return seconds, lmc.weights.dot(a, weights_of(found))

    first = once(0)
    results = [first if first[0] > WARM_UP else once(0), *map(once, range(1, seeds))]
    times, objectives = zip(*results, strict=True)
    return statistics.median(times), statistics.median(objectives), max(objectives)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder with the peers' repositories")
    parser.add_argument("--only", nargs="*", default=list(PEERS), help="which peers")
    parser.add_argument("--cases", nargs="+", choices=list(cases()), default=["mlp", "resnet20-1", "resnet20-4"])
    parser.add_argument("--weights", type=Path, help="a torch file with a list of state dicts, for one case")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | who | process s, median | times ours | objective, median | best |\n|---|---|---|---|---|---|")
    for name in arguments.cases:
        case = cases()[name]
        a, b = (case.weights(0), case.weights(1)) if arguments.weights is None else load(arguments.weights, case)
        entries = {"lmc": ours(1)}
        if arguments.seeds > 1:
            entries[f"lmc, {arguments.seeds} restarts"] = ours(arguments.seeds)
        entries |= {peer: PEERS[peer] for peer in arguments.only}
        base = 0.0
        for who, prepare in entries.items():
            try:
                with quiet_and_seeded(0):
                    prepared = prepare(arguments.peers, case, a, b)
            except ImportError as error:
                print(f"{who} is skipped: {error}", file=sys.stderr)
                continue
            seconds, median, best = measure(prepared, a, arguments.seeds if "restarts" not in who else 1)
            base = base or seconds
            print(f"| {name} | {who} | {seconds:.3g} | {seconds / base:.1f} | {median:.6g} | {best:.6g} |", flush=True)


def load(file: Path, case: Case) -> tuple[Weights, Weights]:
    a, b = torch.load(file, weights_only=True)[:2]
    return {name: a[name] for name in case.patterns}, {name: b[name] for name in case.patterns}


if __name__ == "__main__":
    main()
