"""Weight matching: time and objective, side by side with other implementations on the same weights.

    python benchmarks/weight_matching.py --peers FOLDER --cases mlp resnet20-4 --pairs 3 --restarts 3

The row "limit" is what no implementation can leave out: the matrix product of every place once, for the final B, and one
assignment for every group by the sum of its products, each timed alone (groups within groups are not counted).
FOLDER holds clones of the peers' repositories (weight_matching_peers.py has the addresses); a peer that is missing is
skipped. Times are process time on one thread, for one run, medians over pairs of networks; the objective, the sum of
<A, pi(B)>, is computed here for everyone: the mean over pairs of one run, and of the best of equally many restarts.
Networks are freshly initialised, unless `--weights` names a torch file with a list of state dicts (one case only).
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from weight_matching_networks import Case, cases
from weight_matching_peers import PEERS, Prepared, Weights, quiet_and_seeded

import lmc
from lmc.align.weight_matching.blocks import build_blocks
from lmc.align.weight_matching.gains import added
from lmc.align.weight_matching.matching import matched

# Seconds from which on a run is not repeated.
WARM_UP = 1.0


@dataclass
class Score:
    """What one implementation did, one entry per pair of networks."""

    seconds: list[float] = field(default_factory=list)
    one_run: list[float] = field(default_factory=list)
    best_run: list[float] = field(default_factory=list)

    def row(self, ours: "Score") -> str:
        ratio = statistics.median(t / o for t, o in zip(self.seconds, ours.seconds, strict=True))
        means = f"{statistics.fmean(self.one_run):.6g} | {statistics.fmean(self.best_run):.6g}"
        return f"{statistics.median(self.seconds):.3g} | {ratio:.1f} | {means}"


def ours(spec: lmc.PermutationSpec, a: Weights, b: Weights, restarts: int) -> Prepared:
    def run(seed: int) -> lmc.Permutation:
        return lmc.weight_matching(spec, a, b, seed=seed, restarts=restarts, progress=False)

    return run, lambda pi: pi.apply(b)


def limit(spec: lmc.PermutationSpec, a: Weights, b: Weights) -> Prepared:
    """The products and assignments alone, with everything at hand that they need."""
    fixed, moved = matched(spec, a), matched(spec, lmc.weight_matching(spec, a, b, progress=False).apply(b))
    blocks = build_blocks(spec, fixed)
    pairs = [
        [(place.features(fixed[place.tensor]), place.features(moved[place.tensor])) for place in block.places]
        for block in blocks
    ]

    def run(seed: int) -> lmc.Permutation:
        del seed
        for places in pairs:
            gain = reduce(lambda gain, pair: added(gain, *pair), places, None)
            linear_sum_assignment(gain.numpy(), maximize=True)
        return spec.identity()

    return run, lambda pi: moved


def measure(prepared: Prepared, a: Weights, seed: int) -> tuple[float, float]:
    """(process seconds, objective) of one run; short runs are made twice, so that first calls are not what is timed."""
    run, weights_of = prepared
    seconds, objective = 0.0, 0.0
    for _ in range(2):
        with quiet_and_seeded(seed):
            if hasattr(run, "prepare"):
                run.prepare(seed)
            started = time.process_time()
            found = run(seed)
            seconds = time.process_time() - started
        objective = lmc.weights.dot(a, weights_of(found))
        if seconds > WARM_UP:
            break
    return seconds, objective


def compare(case: Case, pairs: list[tuple[Weights, Weights]], peers: list[str], folder: Path, restarts: int):
    """Every implementation on every pair; peers that cannot be imported are reported and left out."""
    spec = lmc.PermutationSpec.from_patterns(case.patterns).bind(pairs[0][0])
    scores = {"lmc": Score(), "limit": Score()} | {peer: Score() for peer in peers}
    for a, b in pairs:
        for who in list(scores):
            score = scores[who]
            try:
                with quiet_and_seeded(0):
                    if who in ("lmc", "limit"):
                        prepared = ours(spec, a, b, 1) if who == "lmc" else limit(spec, a, b)
                    else:
                        prepared = PEERS[who](folder, case, a, b)
            except ImportError as error:
                print(f"{who} is skipped: {error}", file=sys.stderr)
                del scores[who]
                continue
            runs = [measure(prepared, a, seed) for seed in range(1 if who == "lmc" else restarts)]
            score.seconds.append(statistics.median(seconds for seconds, _ in runs))
            score.one_run.append(statistics.fmean(objective for _, objective in runs))
            best = max(objective for _, objective in runs)
            score.best_run.append(
                best if who != "lmc" or restarts == 1 else measure(ours(spec, a, b, restarts), a, 0)[1]
            )
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder with the peers' repositories")
    parser.add_argument("--only", nargs="*", default=list(PEERS), help="which peers")
    parser.add_argument("--cases", nargs="+", choices=list(cases()), default=["mlp", "resnet20-1", "resnet20-4"])
    parser.add_argument("--weights", type=Path, help="a torch file with a list of state dicts, for one case")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--restarts", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    restarts = arguments.restarts
    print(
        f"| network | who | process s | times ours | objective, one run | best of {restarts} |\n|---|---|---|---|---|---|"
    )
    for name in arguments.cases:
        case = cases()[name]
        if arguments.weights is None:
            networks = [case.weights(seed) for seed in range(2 * arguments.pairs)]
        else:
            stored = torch.load(arguments.weights, weights_only=True)[: 2 * arguments.pairs]
            networks = [{key: weights[key] for key in case.patterns} for weights in stored]
        pairs = list(zip(networks[::2], networks[1::2], strict=True))
        scores = compare(case, pairs, arguments.only, arguments.peers, restarts)
        for who, score in scores.items():
            print(f"| {name} | {who} | {score.row(scores['lmc'])} |", flush=True)


if __name__ == "__main__":
    main()
