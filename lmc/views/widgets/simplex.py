"""The explorer of mixtures: a soup triangle for three models, a polygon and sliders for more."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import traitlets

from lmc.core.results import view
from lmc.landscape.simplices.simplex_result import Simplex
from lmc.views.legend import CYCLE, GREY, SCALE, measure_title
from lmc.views.widgets.explorer import Explorer, encode, module, style
from lmc.views.widgets.poster import Poster, curves, maps


class SimplexExplorer(Explorer):
    """A map of mixtures with a point that can be dragged, and a slider for the share of each model. While it moves, values
    are interpolated in the browser; when it is let go of, the kernel evaluates the mixture. Explorers of one result stay
    in step.

    Attributes:
        shares: what each model has in the mixture shown; follows the point, and moves it.
        measure, split: what is shown: "loss", "accuracy" or a metric, and on which data.
        exact: the last mixture that was evaluated at rest: split -> measure -> value (accuracy in percent), or empty.
    """

    _esm = module("simplex_explorer.js")
    _css = style("simplex_explorer.css")
    title = "Soups of several networks"
    shared = ("shares", "measure", "split")
    shares = traitlets.List(traitlets.Float()).tag(sync=True)
    measure = traitlets.Unicode().tag(sync=True)
    split = traitlets.Unicode().tag(sync=True)

    def __init__(self, mixtures: Simplex) -> None:
        self.mixtures = mixtures
        self.exact: dict[str, dict[str, float | None]] = {}
        super().__init__([mixtures], state(mixtures))

    @traitlets.validate("shares")
    def _mixture(self, proposal: Any) -> list[float]:
        shares, names = proposal["value"], self.mixtures.names
        fits = len(shares) == len(names) and all(math.isfinite(s) and s >= 0.0 for s in shares)
        if not fits or abs(sum(shares) - 1.0) > 1e-4:
            raise traitlets.TraitError(f"shares={shares}; expected {len(names)} numbers, at least 0, that sum to 1")
        return shares

    @traitlets.validate("measure", "split")
    def _known(self, proposal: Any) -> str:
        name, value = proposal["trait"].name, proposal["value"]
        known = list(self.mixtures.values if name == "split" else self.mixtures.values[self.mixtures.split])
        if value not in known:
            raise traitlets.TraitError(f"{name}={value!r}; expected one of {', '.join(known)}")
        return value

    def answer(self, place: Any) -> dict[str, Any]:
        told = _evaluated(self.mixtures, place)
        self.exact = told.get("values", {})
        return told

    def poster(self) -> Poster:
        """The triangle of the first three models; the line between two."""
        shown, names = self.mixtures, self.mixtures.names
        what = f"{self.split} {measure_title(self.measure, shown.unit)}"
        if len(names) == 2:
            share = np.linspace(0.0, 1.0, 49)
            values = shown.interpolate(np.stack([1.0 - share, share], 1), self.measure, self.split)
            return curves(f"{what} from {names[0]} to {names[1]}", {"mixture": (share, values, CYCLE[0])})
        across, up = np.meshgrid(np.linspace(0.0, 1.0, 121), np.linspace(1.0, 0.0, 105))
        shares = np.zeros((across.size, len(names)))
        shares[:, :3] = np.stack([up, 1.0 - across - 0.5 * up, across - 0.5 * up], -1).reshape(-1, 3)
        inside = (shares >= -1e-9).all(1)
        values = np.full(across.size, np.nan)
        values[inside] = shown.interpolate(shares[inside].clip(0.0), self.measure, self.split)
        corners = dict(
            zip((f"{names[0]} above", names[1], names[2]), ((0.5, 0.0), (0.0, 1.0), (1.0, 1.0)), strict=True)
        )
        return maps(f"{what} of mixtures", [values.reshape(across.shape)], corners)

    def __repr__(self) -> str:
        return f"SimplexExplorer({', '.join(self.mixtures.names)}; {len(self.mixtures.counts)} mixtures)"


@view(Simplex, "explore")
def explore(mixtures: Simplex) -> SimplexExplorer:
    """Open a widget in which the mixture is moved: interpolated while it moves, evaluated when it is let go of."""
    return SimplexExplorer(mixtures)


@view(Simplex, "save_html")
def save_html(
    mixtures: Simplex,
    file: str | FilePath,
    *,
    title: str | None = None,
    text: Sequence[str] = (),
    rows: Sequence[Mapping[str, str]] = (),
) -> FilePath:
    """Write the explorer as one page that needs neither a kernel nor a network, and return where it is; it interpolates.

    Args:
        title, text, rows: heading, paragraphs, and a table (column -> cell) above the explorer.
    """
    return SimplexExplorer.write(file, state(mixtures), title, text, rows)


def state(mixtures: Simplex) -> dict[str, Any]:
    """The state of the explorer: all that it draws, where it stands (the uniform soup), and what it shows."""
    count = len(mixtures.names)
    measures = list(mixtures.values[mixtures.split])
    data = {
        "names": list(mixtures.names),
        "colours": [CYCLE[i] if i < len(CYCLE) else GREY for i in range(count)],
        "scale": [list(stop) for stop in SCALE],
        "resolution": mixtures.resolution,
        "counts": encode(mixtures.counts.astype("<u2")),
        "measures": [_measure(name, mixtures) for name in measures],
        "series": {
            split: {name: encode((_unit(name) * found[name]).astype("<f4")) for name in measures}
            for split, found in mixtures.values.items()
        },
        "own": {
            split: {name: [_number(_unit(name) * value) for value in found[name]] for name in measures}
            for split, found in mixtures.own.items()
        },
        "best": {split: _best(mixtures, split) for split in mixtures.values},
    }
    shares = [round(1.0 / count, 6)] * count
    return {"data": data, "shares": shares, "measure": "loss", "split": mixtures.split}


def _evaluated(mixtures: Simplex, shares: Sequence[float]) -> dict[str, Any]:
    """split -> measure -> value of one mixture, evaluated, in the units that are shown."""
    if mixtures.exact is None:
        return {"error": "read from a file, without the models"}
    total = sum(shares)
    found = {split: score.values for split, score in mixtures.exact(*(share / total for share in shares)).items()}
    return {
        "values": {s: {m: _number(_unit(m) * value) for m, value in measures.items()} for s, measures in found.items()}
    }


def _measure(name: str, mixtures: Simplex) -> dict[str, Any]:
    """The drawing of a measure; one range for all splits, so that they can be compared."""
    everything = [
        values[name] for found in (mixtures.values, mixtures.own) for values in found.values() if name in values
    ]
    numbers = _unit(name) * np.concatenate([np.asarray(values, dtype=np.float64) for values in everything])
    known = numbers[np.isfinite(numbers)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    accuracy = name == "accuracy"
    return {
        "name": name,
        "title": measure_title(name, mixtures.unit),
        "unit": " %" if accuracy else "",
        "digits": 1 if accuracy else 3,
        "log": name == "loss" and low > 0.0,
        "high_is_good": name in mixtures.higher,
        "low": low,
        "high": high if high > low else low + 1e-3,
    }


def _best(mixtures: Simplex, split: str) -> list[float]:
    if np.isnan(mixtures.losses[split]).all():
        return [1.0 / len(mixtures.names)] * len(mixtures.names)
    return list(mixtures.best_on(split).shares.values())


def _unit(measure: str) -> float:
    return 100.0 if measure == "accuracy" else 1.0


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
