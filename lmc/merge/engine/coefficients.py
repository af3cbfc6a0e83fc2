"""Coefficients of models in sums and averages, checked."""

from collections.abc import Iterable, Sequence

from lmc.errors import InputError


def coefficients(weights: Iterable[float] | None, count: int, what: str = "weights") -> list[float]:
    """`weights` as floats, one per model (default: 1 each), checked."""
    values = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(values) != count:
        raise InputError(f"{what}: {len(values)} values for {count} models; give one per model")
    if not all(abs(v) < float("inf") for v in values):
        raise InputError(f"{what}: {values} are not all finite")
    return values


def affine(values: Sequence[float]) -> tuple[list[float], float]:
    """Coefficients of the models and of the base, which takes what they lack to 1 (rounding aside)."""
    rest = 1.0 - sum(values)
    return list(values), rest if abs(rest) > 1e-9 else 0.0


def convex(coefficients: tuple[list[float], float]) -> tuple[list[float], float]:
    """Shares in an average of statistics: the coefficients where they are an average, else their sizes over the sum."""
    values, rest = coefficients
    if min(*values, rest) >= 0.0:
        return coefficients
    sizes = [abs(v) for v in (*values, rest)]
    return [size / sum(sizes) for size in sizes[:-1]], sizes[-1] / sum(sizes)
