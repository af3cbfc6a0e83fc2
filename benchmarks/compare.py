"""All alignment methods on one pair of networks each, in one table per architecture.

`python benchmarks/compare.py` takes all stored pairs (about half an hour on one core), `python benchmarks/compare.py
digits-vit toy-text-gpt` some of them. With `--pairs 3` that many further pairs of each network are trained by the recipe of
the stored one, and the barriers of the methods that `--methods` names are given as median and range. With `--limit` one call of `lmc.align.compare`
with all its methods is timed, beside the time that forward passes, backward passes and assignments alone took of it.
"""

import argparse
import time
import warnings
from functools import partial
from statistics import median

import scipy.optimize
import torch

import lmc
from lmc.align import METHODS

PAIRS = (
    "digits-mlp256",
    "digits-vgg11",
    "digits-resnet20",
    "digits-resnet20-layernorm",
    "digits-vit",
    "toy-text-gpt",
)
TRANSFORMERS = ("digits-vit", "toy-text-gpt")
COLUMNS = ("objective", "distance", "R", "barrier", "with repair", "seconds")


def restarts(spec, model, a, b, data):
    return lmc.weight_matching(spec, a, b, restarts=5, progress=False)


def cross_product(spec, model, a, b, data):
    return lmc.activation_matching(spec, model, a, b, data, method="cross-product", progress=False)


def cycle_consistent(spec, model, a, b, data):
    """C2M3's matching to a common order; two models, so its pair is B onto A."""
    return lmc.match_many(spec, [a, b], method="cycle_consistent", progress=False)[1]


def rotations(spec, model, a, b, data, steps):
    """Its B, to be compared with an A whose norms are folded."""
    return lmc.align.rotation_matching(spec, model, a, b, data, steps=steps, progress=False).weights


ALIGNERS = {
    "naive": METHODS["naive"],
    "weight matching": METHODS["weight matching"],
    "weight matching, 5 restarts": restarts,
    "activations, cross-product": cross_product,
    "activations, correlation": METHODS["activation matching"],
    "straight-through": METHODS["straight-through"],
    "Sinkhorn, l2": METHODS["Sinkhorn, l2"],
    "Sinkhorn, midpoint": METHODS["Sinkhorn, midpoint"],
    "cycle-consistent": cycle_consistent,
    "OT, weights": METHODS["OT, weights"],
    "OT, activations": METHODS["OT, activations"],
}
ROTATIONS = {
    "rotations, from weights": partial(rotations, steps=0),
    "rotations, learned": partial(rotations, steps=300),
}
FEW = ("naive", "weight matching", "activations, correlation", "straight-through", *ROTATIONS)


def opened(name: str):
    """A stored pair, its data, module and symmetries."""
    stored = lmc.data.checkpoint(name)
    source = stored.manifest["data"]
    data = getattr(lmc.data, source["function"])(**source["options"])
    model = stored.model()
    return stored, data, model, lmc.permutation_spec(model, data.train[0][:2], progress=False)


def measured(spec, model, a, b, data, methods, alphas: int):
    """(method, what `lmc.align.compare` finds) one by one; rotations are measured from an A with folded norms."""
    for method in methods:
        start = lmc.align.fold_norms(spec, model, a, data) if method in ROTATIONS else a
        aligner = {method: (ALIGNERS | ROTATIONS)[method]}
        yield (
            method,
            lmc.align.compare(spec, model, start, b, data, methods=aligner, alphas=alphas, progress=False)[method],
        )


def table(name: str, alphas: int) -> None:
    """All methods on one stored pair."""
    stored, data, model, spec = opened(name)
    print(f"\n### {stored.manifest['description']} (`{name}`)\n\n| method | {' | '.join(COLUMNS)} |")
    print("|---|" + "---|" * len(COLUMNS), flush=True)
    methods = [*ALIGNERS, *(ROTATIONS if name in TRANSFORMERS else ())]
    for method, found in measured(spec, model, *stored, data, methods, alphas):
        cells = f"{found.objective:.1f} | {found.distance:.2f} | {found.r:.3f}"
        barriers = f"{found.barrier:.3f} | {found.barrier_repaired:.3f}"
        print(f"| {method} | {cells} | {barriers} | {found.seconds:.1f} |", flush=True)


def medians(name: str, pairs: int, methods: list[str], alphas: int) -> None:
    """Barriers over several pairs."""
    stored, data, model, spec = opened(name)
    recipe = {key: value for key, value in stored.manifest["recipe"].items() if key != "init"}
    weights = lmc.training.train(model, data, seeds=range(2 * pairs), progress=False, **recipe)
    barriers = {method: [] for method in methods}
    for k in range(pairs):
        a, b = weights[2 * k], weights[2 * k + 1]
        for method, found in measured(spec, model, a, b, data, methods, alphas):
            barriers[method].append(found.barrier)
    for method, values in barriers.items():
        print(f"| {name} | {method} | {median(values):.3f} | {min(values):.3f} to {max(values):.3f} |", flush=True)


def counted(seconds: dict[str, float], kind: str, function):
    """`function`, whose process time is added to `seconds[kind]`; not a second time where it is called by itself."""
    inside = False

    def timed(*args, **kwargs):
        nonlocal inside
        if inside:
            return function(*args, **kwargs)
        inside, started = True, time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            inside = False
            seconds[kind] = seconds.get(kind, 0.0) + time.process_time() - started

    return timed


def limit(name: str) -> None:
    """One comparison by all methods: its time, and that of passes and assignments alone."""
    stored, data, model, spec = opened(name)
    seconds: dict[str, float] = {}
    call, solve = torch.nn.Module.__call__, scipy.optimize.linear_sum_assignment
    run_backward = torch.autograd._engine_run_backward
    torch.nn.Module.__call__ = counted(seconds, "forward", call)
    scipy.optimize.linear_sum_assignment = counted(seconds, "assignments", solve)
    torch.autograd._engine_run_backward = counted(seconds, "backward", run_backward)
    try:
        started = time.process_time()
        lmc.align.compare(spec, model, *stored, data, progress=False)
        total = time.process_time() - started
    finally:
        torch.nn.Module.__call__, scipy.optimize.linear_sum_assignment = call, solve
        torch.autograd._engine_run_backward = run_backward
    cells = " | ".join(f"{seconds[kind]:.1f}" for kind in ("forward", "backward", "assignments"))
    print(f"| {name} | {total:.1f} | {cells} | {total / sum(seconds.values()):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=PAIRS, metavar="NAME", help=", ".join(PAIRS))
    parser.add_argument("--alphas", type=int, default=11, help="points on each way")
    parser.add_argument("--pairs", type=int, default=0, help="train so many pairs, and give medians")
    parser.add_argument("--methods", nargs="+", default=FEW, metavar="METHOD", help="with --pairs")
    parser.add_argument("--limit", action="store_true", help="time one comparison, and passes and assignments alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.pairs:
        print(f"| network | method | barrier, median of {args.pairs} pairs | range |\n|---|---|---|---|", flush=True)
    if args.limit:
        print("| pair | process seconds | forward | backward | assignments | ours / limit |\n|---|---|---|---|---|---|")
    for name in args.names:
        if args.limit:
            limit(name)
        elif args.pairs:
            medians(name, args.pairs, args.methods, args.alphas)
        else:
            table(name, args.alphas)


if __name__ == "__main__":
    main()
