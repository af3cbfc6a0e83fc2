"""Activation matching, cycle-consistent matching and OT fusion against the authors' own implementations.

The same trained weights in one run, one thread each, process time. What is worked out once for an architecture is not
timed: our specification, PLeaS's and C2M3's. Copies of the modules, hooks and fused graphs belong to each call, ours and
theirs, and are. The limit of activation matching is what nobody can leave out: both networks' forward passes, one product for
each group and batch, and one assignment for each group, timed alone. The others' code is imported from where the user has put clones of
https://github.com/sidak/otfusion, https://github.com/crisostomi/cycle-consistent-model-merging and
https://github.com/SewoongLab/PLeaS-Merging: `python benchmarks/alignment.py --peers FOLDER`.
"""

import argparse
import contextlib
import enum
import importlib
import io
import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from weight_matching_peers import _Absent, import_peer

import lmc
from lmc.align.many import objective


def network(width: int, bias: bool) -> nn.Module:
    """Three hidden layers on the digits."""
    sizes = [64, width, width, width, 10]
    layers: dict[str, nn.Module] = {}
    for i, (into, out) in enumerate(itertools.pairwise(sizes), start=1):
        layers[f"fc{i}"] = nn.Linear(into, out, bias=bias)
        layers[f"relu{i}"] = nn.ReLU()
    del layers["relu4"]
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def patterns(bias: bool) -> dict[str, str]:
    found = {"fc1.weight": "h1 .", "fc2.weight": "h2 h1", "fc3.weight": "h3 h2", "fc4.weight": ". h3"}
    return found | ({f"fc{i}.bias": f"h{i}" for i in (1, 2, 3)} if bias else {})


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The shortest of several runs, in seconds of this process, and what the last one gave; nothing is printed."""
    best, result = float("inf"), None
    for _ in range(repeats):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            start = process_time()
            result = run()
            best = min(best, process_time() - start)
    return best, result


@contextlib.contextmanager
def without_cuda():
    """Lets code run on a machine without a GPU that calls `.cuda()` outright."""
    original = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = original  # type: ignore[method-assign]


@torch.no_grad()
def products_and_assignments(models: list[nn.Module], batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The least that matching by activations takes: hidden units of both on every batch, their products, and assignments."""
    sums: list[torch.Tensor | None] = [None, None, None]
    for inputs, _ in batches:
        hidden: list[list[torch.Tensor]] = []
        for model in models:
            x, kept = inputs, []
            for layer in model:
                x = layer(x)
                kept += [x] if isinstance(layer, nn.ReLU) else []
            hidden.append(kept)
        for k, (mine, theirs) in enumerate(zip(*hidden, strict=True)):
            product = mine.T @ theirs
            sums[k] = product if sums[k] is None else sums[k] + product
    for total in sums:
        linear_sum_assignment(total.numpy(), maximize=True)


def activation_matching(folder: Path, width: int, repeats: int) -> list[tuple]:
    """PLeaS's activation matching with inner products, at all activations where it finds a group, and at those that we use."""
    sys.path.insert(0, str(folder / "PLeaS-Merging"))
    peer = import_peer("pleas.methods.activation_matching")
    core = importlib.import_module("pleas.core.utils")
    vision = _Absent("torchvision")  # PLeaS's compiler names operators of it that no network here uses
    vision.ops, vision.__path__ = _Absent("torchvision.ops"), []
    compiler = import_peer("pleas.core.compiler", given={"torchvision": vision, "torchvision.ops": vision.ops})
    model, data = network(width, bias=True), lmc.data.digits()
    a, b = lmc.training.train(model, data, seeds=(0, 1), epochs=5, progress=False)
    spec = lmc.PermutationSpec.from_patterns(patterns(bias=True), model)
    models = [network(width, bias=True) for _ in range(2)]
    for module, weights in zip(models, (a, b), strict=True):
        module.load_state_dict(weights)
    inputs, targets = data.train
    batches = list(zip(inputs.split(256), targets.split(256), strict=True))
    own = compiler.get_permutation_spec(models[0], ((5, 64),), verbose=False)
    after = {
        axis: core.PermutationGroup(width, group.state, {node for node in group.node if node.key.startswith("relu")})
        for axis, group in own.items()
    }
    ours_seconds, ours = timed(
        lambda: lmc.activation_matching(spec, model, a, b, batches, method="cross-product", progress=False), repeats
    )
    limit, _ = timed(lambda: products_and_assignments(models, batches), repeats)
    print(
        f"limit of activation matching, MLP 3 x {width}: {limit:.3f} s, ours {ours_seconds / limit:.2f} times as much"
    )
    rows = []
    for name, theirs in {"as it finds them": own, "after the nonlinearity only": after}.items():
        with without_cuda():
            seconds, found = timed(
                lambda theirs=theirs: peer.activation_matching(
                    theirs, *models, batches, len(batches), cross_features=peer.cross_features_inner_product
                ),
                repeats,
            )
        indices = {f"h{i}": torch.as_tensor(found[core.Axis(f"fc{i}.weight", 0)]) for i in (1, 2, 3)}
        moved = lmc.Permutation(spec, indices).apply(b)
        value = lmc.activation_matching(spec, model, a, moved, batches, method="cross-product", progress=False)
        task = f"activation matching, MLP 3 x {width}, activations {name}"
        rows.append((task, "PLeaS", seconds, value.info["objective_at_identity"], ours_seconds, ours.objective))
    return rows


def cycle_consistent(folder: Path, width: int, count: int, repeats: int) -> list[tuple]:
    """C2M3's synchronised Frank-Wolfe from both of its usual starting points."""
    source = folder / "cycle-consistent-model-merging/src/ccmm"
    given = {name: types.ModuleType(name) for name in ("ccmm", "backports", "backports.strenum")}
    given["ccmm"].__path__ = [str(source)]
    given["backports"].__path__ = []
    given["backports.strenum"].StrEnum = enum.StrEnum  # type: ignore[attr-defined]
    given |= {name: _Absent(name) for name in ("scipy.misc", "ccmm.pl_modules", "ccmm.pl_modules.pl_module")}
    given |= {"pytorch_lightning": _Absent("pytorch_lightning"), "ccmm.utils": types.ModuleType("ccmm.utils")}
    given["ccmm.utils"].__path__ = []
    given["ccmm.utils.utils"] = _Absent("ccmm.utils.utils")
    peer = import_peer("ccmm.matching.frank_wolfe_sync_matching", given=given)
    parts = importlib.import_module("ccmm.matching.frank_wolfe_matching")
    for function in (parts.initialize_perturbed_uniform, parts.sinkhorn_knopp):
        function.__defaults__ = tuple("cpu" if value == "cuda" else value for value in function.__defaults__)
    builder = importlib.import_module("ccmm.matching.permutation_spec").PermutationSpecBuilder()
    axes = {k: tuple(None if x == "." else x for x in v.split()) for k, v in patterns(bias=False).items()}
    theirs = builder.permutation_spec_from_axes_to_perm(axes)
    model = network(width, bias=False)
    models = list(lmc.training.train(model, lmc.data.digits(), seeds=range(count), epochs=5, progress=False))
    spec = lmc.PermutationSpec.from_patterns(patterns(bias=False), model)
    symbols = [chr(97 + k) for k in range(count)]
    named = dict(zip(symbols, models, strict=True))
    rows = []
    ours_seconds, ours = timed(lambda: lmc.match_many(spec, models, progress=False), repeats)
    for start in ("identity", "sinkhorn"):
        torch.manual_seed(0)
        pairs = list(itertools.combinations(symbols, 2))
        with without_cuda():
            seconds, (found, _) = timed(
                lambda start=start, pairs=pairs: peer.frank_wolfe_synchronized_matching(
                    named, theirs, symbols, pairs, 200, start, device="cpu"
                ),
                repeats,
            )
        # Their permutations lead from the universe to a model, ours from a model to the universe.
        moves = [
            lmc.Permutation(spec, {g: torch.as_tensor(found[s][g]).long() for g in spec.groups}).inverse()
            for s in symbols
        ]
        value = objective(spec, [pi.apply(w) for pi, w in zip(moves, models, strict=True)])
        name = f"{count} models, MLP 3 x {width}, theirs from {'the identity' if start == 'identity' else 'the centre'}"
        rows.append((name, "C2M3", seconds, value, ours_seconds, ours.objective))
    return rows


def ot_fusion(folder: Path, width: int, repeats: int) -> list[tuple]:
    """otfusion on weights, exact couplings, Euclidean ground metric, the last layer left as it is; the value is
    the cosine of B and the aligned A over all layers (A moves, as in their code)."""
    sys.path.insert(0, str(folder / "otfusion"))
    peer = import_peer("wasserstein_ensemble")
    args = types.SimpleNamespace(
        unbalanced=False, eval_aligned=False, gpu_id=-1, skip_last_layer=True, ensemble_step=0.5, importance=None,
        exact=True, correction=True, proper_marginals=False, debug=False, past_correction=True, ground_metric="euclidean",
        ground_metric_normalize="none", ground_metric_eff=True, normalize_wts=False, not_squared=True, reg=1e-2,
        clip_gm=False, clip_min=0, clip_max=5, act_num_samples=100, dist_normalize=False, activation_histograms=False,
        tmap_stats=False, width_ratio=1, geom_ensemble_type="wts",
    )  # fmt: skip
    model, data = network(width, bias=False), lmc.data.digits()
    a, b = lmc.training.train(model, data, seeds=(0, 1), epochs=5, progress=False)
    models = [network(width, bias=False) for _ in range(2)]
    for module, weights in zip(models, (a, b), strict=True):
        module.load_state_dict(weights)
    spec = lmc.PermutationSpec.from_patterns(patterns(bias=False), model)
    seconds, layers = timed(lambda: peer.get_wassersteinized_layers_modularized(args, models), repeats)
    fused = dict(zip(b, (layer.detach() for layer in layers), strict=True))
    aligned = {name: 2.0 * tensor - b[name] for name, tensor in fused.items()}
    ours_seconds, ours = timed(lambda: lmc.ot_fusion(model, b, a, spec=spec, progress=False), repeats)

    def cosine(weights) -> float:
        return lmc.weights.dot(weights, b) / (lmc.weights.dot(weights, weights) * lmc.weights.dot(b, b)) ** 0.5

    name = f"OT fusion of weights, MLP 3 x {width}"
    return [(name, "otfusion", seconds, cosine(aligned), ours_seconds, cosine(ours.transported[0]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, required=True, help="folder with clones of the other implementations")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--many-width", type=int, default=128, help="width of the models matched many at a time")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = activation_matching(options.peers, options.width, options.repeats)
    rows += ot_fusion(options.peers, options.width, options.repeats)
    rows += cycle_consistent(options.peers, options.many_width, options.models, max(1, options.repeats // 3))
    print("| task | other | its seconds | its value | our seconds | our value | faster by |")
    print("|---|---|---|---|---|---|---|")
    for name, other, seconds, value, ours_seconds, ours in rows:
        ratio = seconds / ours_seconds
        print(f"| {name} | {other} | {seconds:.3f} | {value:.6g} | {ours_seconds:.3f} | {ours:.6g} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
