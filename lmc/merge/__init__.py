"""Combine the weights of several models: `method(models, *, base=None, ...) -> weights`.

Models are modules or state dicts of one architecture; the result is a state dict; nothing given is changed. What a
method needs besides the models:

- nothing: `average` (and `uniform_soup`), `weighted_sum`, `slerp`, `nuslerp`, `multislerp`, `karcher_mean`, `variance_corrected`; over
  the checkpoints of one run `swa`, `ema`, `lawa`, and with a metric for each `metrics_weighted`;
- the base they were fine-tuned from: `model_stock`, `wise_ft`, and on task vectors `task_arithmetic`, `ties`, `dare`,
  `della`, `breadcrumbs`, `pcb`, `sce`, `ram`, `magmax`, `nearswap`, `arcee_fusion`, `emr`, by singular vectors `tsv_m`,
  `iso_c`, `iso_cts`, `wudi`, `knots`, `twin`; as postprocessing of any of these `lines`, `consensus`, `tall_mask`;
- unlabelled inputs, `method(model, models, inputs)`: `fisher`, `regmean`, `regmean_plus_plus`, `cat_merging`, `adamerging`;
- labelled validation data, `method(model, models, validation)`: `greedy_soup`, `learned_soup`, `ama`, `lcsc`, `evolve`;
- training: `sparse_soup`, `mix_experts`, `balanced_batch`, `diwa`, `ratatouille`, `star_model`.

Two networks in one module of a chosen width, `method(model, models, inputs)`: `zipit`, `pleas`.

Soups side by side: `compare_soups`; averages along a run: `trajectory_averages`; base to fine-tuned on shifted data:
`wise_ft_line`.

Options of the first two kinds can be given per name pattern: `scale={"*": 1.0, "layers.*.attn": 0.3}`. A method of
your own is a function of one tensor under `@on_tensors`, `@on_task_vectors`, `@on_merged` or `@linear` (see
`lmc.merge.engine.method`) and goes wherever these go. BatchNorm statistics are averaged: re-estimate them with
`lmc.recalibrate_batchnorm`.

Before: `inspect(models, base=base)` says whether they fit, how they differ and which method suits them. With validation data
at hand: `compare(model, models, validation, base=...)` tries them all, ranks them and reports scores on other data,
and `mixer(model, models, data, base=...).explore()` puts task vectors under sliders.

Networks that were trained independently are brought into one order of units first by `align=spec`, an option of every
method that takes several models (see `lmc.merge.engine.aligning`).

Models may be checkpoints on disk (`lmc.open_checkpoint`). Methods of the first two kinds merge them into a new folder
with little memory: `write(method, models, out, base=..., ...)`; `plan(...)` says beforehand what that takes, and
`replay(recipe, out)` does one again. The command `lmc merge` does the same. Folders of LoRA adapters are models where
`base=` is given; `extract(models, out, base=base, rank=16)` makes an adapter of a fine-tuned model, or of a merge.
`stack(slices)` opens layers of several models as one.

Their parts: `task_vector`; the masks `tall_masks` and `magnitude_masks`; `fisher_information`, and `fisher_weighted` with
information of one's own; `aligned`, what `align=` does.

Results: `Extraction`, `Inspection`, `MergeComparison`, `Mixer`, `Plan`, `Soups`, `Star` and its `StarPaths`,
`TrajectoryAverages`, `WiseLine`, `Zipped`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmc.merge.disk.extract import Extraction, extract
    from lmc.merge.disk.replay import replay
    from lmc.merge.disk.stacking import stack
    from lmc.merge.disk.write import Plan, plan, write
    from lmc.merge.engine.aligning import aligned
    from lmc.merge.engine.method import linear, on_task_vectors, on_tensors
    from lmc.merge.partial.growth import Zipped
    from lmc.merge.partial.pleas import pleas
    from lmc.merge.partial.zipit import zipit
    from lmc.merge.rules.averaging import (
        average,
        ema,
        karcher_mean,
        lawa,
        metrics_weighted,
        mix_experts,
        model_stock,
        multislerp,
        nuslerp,
        slerp,
        swa,
        variance_corrected,
        weighted_sum,
    )
    from lmc.merge.rules.postprocess import consensus, lines, on_merged, tall_mask, tall_masks
    from lmc.merge.rules.selection import arcee_fusion, emr, magmax, nearswap, ram, sce
    from lmc.merge.rules.spectral import iso_c, iso_cts, knots, tsv_m, twin, wudi
    from lmc.merge.rules.task_vectors import breadcrumbs, dare, della, task_arithmetic, task_vector
    from lmc.merge.rules.ties import pcb, ties
    from lmc.merge.study.compare import MergeComparison, compare
    from lmc.merge.study.inspect import Inspection, inspect
    from lmc.merge.study.mixer import Mixer, mixer
    from lmc.merge.study.robust_line import WiseLine, wise_ft_line
    from lmc.merge.study.trajectory import TrajectoryAverages, trajectory_averages
    from lmc.merge.with_data.adamerging import adamerging
    from lmc.merge.with_data.ama import ama
    from lmc.merge.with_data.cat import cat_merging
    from lmc.merge.with_data.compare_soups import Soups, compare_soups
    from lmc.merge.with_data.fisher import fisher, fisher_information, fisher_weighted
    from lmc.merge.with_data.regmean import regmean, regmean_plus_plus
    from lmc.merge.with_data.search import evolve, lcsc
    from lmc.merge.with_data.soups import greedy_soup, learned_soup, uniform_soup, wise_ft
    from lmc.merge.with_training.sparse import magnitude_masks, sparse_soup
    from lmc.merge.with_training.star import Star, StarPaths, star_model
    from lmc.merge.with_training.trained_soups import balanced_batch, diwa, ratatouille

__all__ = [
    "Extraction",
    "Inspection",
    "MergeComparison",
    "Mixer",
    "Plan",
    "Soups",
    "Star",
    "StarPaths",
    "TrajectoryAverages",
    "WiseLine",
    "Zipped",
    "adamerging",
    "aligned",
    "ama",
    "arcee_fusion",
    "average",
    "balanced_batch",
    "breadcrumbs",
    "cat_merging",
    "compare",
    "compare_soups",
    "consensus",
    "dare",
    "della",
    "diwa",
    "ema",
    "emr",
    "evolve",
    "extract",
    "fisher",
    "fisher_information",
    "fisher_weighted",
    "greedy_soup",
    "inspect",
    "iso_c",
    "iso_cts",
    "karcher_mean",
    "knots",
    "lawa",
    "lcsc",
    "learned_soup",
    "linear",
    "lines",
    "magmax",
    "magnitude_masks",
    "metrics_weighted",
    "mix_experts",
    "mixer",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "on_merged",
    "on_task_vectors",
    "on_tensors",
    "pcb",
    "plan",
    "pleas",
    "ram",
    "ratatouille",
    "regmean",
    "regmean_plus_plus",
    "replay",
    "sce",
    "slerp",
    "sparse_soup",
    "stack",
    "star_model",
    "swa",
    "tall_mask",
    "tall_masks",
    "task_arithmetic",
    "task_vector",
    "ties",
    "trajectory_averages",
    "tsv_m",
    "twin",
    "uniform_soup",
    "variance_corrected",
    "weighted_sum",
    "wise_ft",
    "wise_ft_line",
    "write",
    "wudi",
    "zipit",
]

# Where names are defined: a merge on disk wants few of these, and the others bring the other wings with them.
_HOMES = {
    name: home
    for home, names in {
        "lmc.merge.disk.extract": (
            "Extraction",
            "extract",
        ),
        "lmc.merge.disk.replay": ("replay",),
        "lmc.merge.disk.stacking": ("stack",),
        "lmc.merge.disk.write": (
            "Plan",
            "plan",
            "write",
        ),
        "lmc.merge.engine.aligning": ("aligned",),
        "lmc.merge.engine.method": (
            "linear",
            "on_task_vectors",
            "on_tensors",
        ),
        "lmc.merge.partial.growth": ("Zipped",),
        "lmc.merge.partial.pleas": ("pleas",),
        "lmc.merge.partial.zipit": ("zipit",),
        "lmc.merge.rules.averaging": (
            "average",
            "ema",
            "karcher_mean",
            "lawa",
            "metrics_weighted",
            "mix_experts",
            "model_stock",
            "multislerp",
            "nuslerp",
            "slerp",
            "swa",
            "variance_corrected",
            "weighted_sum",
        ),
        "lmc.merge.rules.postprocess": (
            "consensus",
            "lines",
            "on_merged",
            "tall_mask",
            "tall_masks",
        ),
        "lmc.merge.rules.selection": (
            "arcee_fusion",
            "emr",
            "magmax",
            "nearswap",
            "ram",
            "sce",
        ),
        "lmc.merge.rules.spectral": (
            "iso_c",
            "iso_cts",
            "knots",
            "tsv_m",
            "twin",
            "wudi",
        ),
        "lmc.merge.rules.task_vectors": (
            "breadcrumbs",
            "dare",
            "della",
            "task_arithmetic",
            "task_vector",
        ),
        "lmc.merge.rules.ties": (
            "pcb",
            "ties",
        ),
        "lmc.merge.study.compare": (
            "MergeComparison",
            "compare",
        ),
        "lmc.merge.study.inspect": (
            "Inspection",
            "inspect",
        ),
        "lmc.merge.study.mixer": (
            "Mixer",
            "mixer",
        ),
        "lmc.merge.study.robust_line": (
            "WiseLine",
            "wise_ft_line",
        ),
        "lmc.merge.study.trajectory": (
            "TrajectoryAverages",
            "trajectory_averages",
        ),
        "lmc.merge.with_data.adamerging": ("adamerging",),
        "lmc.merge.with_data.ama": ("ama",),
        "lmc.merge.with_data.cat": ("cat_merging",),
        "lmc.merge.with_data.compare_soups": (
            "Soups",
            "compare_soups",
        ),
        "lmc.merge.with_data.fisher": (
            "fisher",
            "fisher_information",
            "fisher_weighted",
        ),
        "lmc.merge.with_data.regmean": (
            "regmean",
            "regmean_plus_plus",
        ),
        "lmc.merge.with_data.search": (
            "evolve",
            "lcsc",
        ),
        "lmc.merge.with_data.soups": (
            "greedy_soup",
            "learned_soup",
            "uniform_soup",
            "wise_ft",
        ),
        "lmc.merge.with_training.sparse": (
            "magnitude_masks",
            "sparse_soup",
        ),
        "lmc.merge.with_training.star": (
            "Star",
            "StarPaths",
            "star_model",
        ),
        "lmc.merge.with_training.trained_soups": (
            "balanced_batch",
            "diwa",
            "ratatouille",
        ),
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lmc.merge' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return __all__
