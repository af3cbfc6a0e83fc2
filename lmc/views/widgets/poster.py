"""Posters: a still picture of what an explorer shows, for readers of a notebook in which no script may run.

A notebook that was not trusted yet, as every fresh clone is, shows neither scripts nor styles nor SVG. So these are PNG,
drawn here with numpy alone, in the colours of the explorer, on no ground of their own: they stand on light and on dark pages.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lmc.views.legend import BLACK, GREY, SCALE

WIDTH, HEIGHT, GAP = 600, 220, 20
STROKE = 3.0  # pixels
DISC = 8  # pixels from the middle of a mark to where nothing of it is left
Values = npt.NDArray[np.float64]
Curve = tuple[npt.ArrayLike, npt.ArrayLike, str]  # x, y and colour


@dataclass(frozen=True)
class Poster:
    """A picture (PNG), what it shows in words, and the colours of what has names in it."""

    png: bytes
    caption: str
    names: Mapping[str, str] = field(default_factory=dict)


def curves(what: str, lines: Mapping[str, Curve]) -> Poster:
    """Lines over a common stretch; what is not finite is left out."""
    known = {name: (*_finite(x, y), colour) for name, (x, y, colour) in lines.items()}
    (left, right), (low, high) = (_range(np.concatenate([curve[axis] for curve in known.values()])) for axis in (0, 1))
    canvas = np.zeros((HEIGHT, WIDTH, 4))
    for share in np.linspace(0.0, 1.0, 5):
        row = np.full(2, STROKE + share * (HEIGHT - 2 * STROKE))
        _stroke(canvas, np.array([0.0, WIDTH - 1.0]), row, GREY, 1.0, 0.35)
    for x, y, colour in known.values():
        across = STROKE + (x - left) / (right - left) * (WIDTH - 2 * STROKE)
        down = STROKE + (high - y) / (high - low) * (HEIGHT - 2 * STROKE)
        _stroke(canvas, across, down, colour, STROKE)
    names = {name: colour for name, (_, _, colour) in known.items()}
    return Poster(png(canvas), f"{what}: from {low:.3g} (below) to {high:.3g} (above)", names)


def maps(what: str, grids: Sequence[Values], marks: Mapping[str, tuple[float, float]] | None = None) -> Poster:
    """Values on grids (rows from the top, NaN: nothing) side by side, light for low and dark for high; by their logarithms,
    where all are positive and span more than a power of ten.

    Args:
        marks: places in each grid, as shares of its width and height from the upper left, that get a disc.
    """
    low, high = _range(np.concatenate([grid[np.isfinite(grid)] for grid in grids]))
    bend = np.log if high > 10.0 * low > 0.0 else np.asarray
    parts = []
    for grid in map(bend, grids):
        rows, columns = grid.shape
        height, width = HEIGHT, max(1, min(WIDTH // len(grids), round(HEIGHT * columns / rows)))
        picked = between(grid, np.linspace(0.0, rows - 1.0, height), np.linspace(0.0, columns - 1.0, width))
        part = np.zeros((height, width, 4))
        part[..., :3] = _coloured((picked - bend(low)) / (bend(high) - bend(low)))
        part[..., 3] = np.isfinite(picked)
        if marks:  # those of corners are as round as others
            part = np.pad(part, ((DISC, DISC), (DISC, DISC), (0, 0)))
        for x, y in (marks or {}).values():
            at = np.array([DISC + x * (width - 1)]), np.array([DISC + y * (height - 1)])
            _stroke(part, *at, BLACK, 14.0)
            _stroke(part, *at, "#FFFFFF", 9.0)
        parts += [part, np.zeros((part.shape[0], GAP, 4))]
    places = f"; discs: {', '.join(marks)}" if marks else ""
    return Poster(
        png(np.concatenate(parts[:-1], axis=1)), f"{what}: from {low:.3g} (light) to {high:.3g} (dark){places}"
    )


def png(canvas: Values) -> bytes:
    """A picture (rows, columns, red green blue alpha from 0 to 1) as a PNG with a palette."""
    for bits in (5, 4, 3):
        steps = 2**bits - 1
        codes = np.round(canvas * steps).astype(np.int64) @ (1 << (bits * np.arange(4)))
        colours, index = np.unique(codes, return_inverse=True)
        if len(colours) <= 256:
            break
    else:
        raise ValueError(f"{len(colours)} colours, more than a palette holds")
    palette = np.round((colours[:, None] >> (bits * np.arange(4)) & steps) * (255 / steps)).astype(np.uint8)
    height, width = canvas.shape[:2]
    rows = index.reshape(height, width).astype(np.uint8)
    filtered = np.insert(rows, 0, 0, axis=1)  # each row begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = {b"IHDR": header, b"PLTE": palette[:, :3].tobytes(), b"tRNS": palette[:, 3].tobytes()}
    chunks |= {b"IDAT": zlib.compress(filtered.tobytes(), 9), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks.items()
    )


def _finite(x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[Values, Values]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    known = np.isfinite(y)
    return x[known], y[known]


def _range(values: Values) -> tuple[float, float]:
    """The smallest and the largest; never the same."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def between(grid: Values, rows: Values, columns: Values) -> Values:
    """The grid at these rows and columns, which may lie between its own; linear there."""
    for axis, at in enumerate((rows, columns)):
        low = np.minimum(at.astype(int), max(0, grid.shape[axis] - 2))
        share = (at - low).reshape((-1, 1) if axis == 0 else (1, -1))
        lower, upper = (np.take(grid, np.minimum(low + i, grid.shape[axis] - 1), axis) for i in (0, 1))
        grid = np.where(share == 0.0, lower, (1.0 - share) * lower + share * upper)
    return grid


def _rgb(colour: str) -> Values:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255.0


def _coloured(shares: Values) -> Values:
    """Colours of values from 0 to 1, in as many steps as a map has contours."""
    steps = np.floor(24 * np.nan_to_num(shares).clip(0.0, 1.0 - 1e-9)) / 23
    stops = np.array([at for at, _ in SCALE])
    tints = np.stack([_rgb(colour) for _, colour in SCALE])
    return np.stack([np.interp(steps, stops, tints[:, channel]) for channel in range(3)], axis=-1)


def _stroke(canvas: Values, x: Values, y: Values, colour: str, width: float, strength: float = 1.0) -> None:
    """A line through points given in pixels (a disc, where it is one), with soft edges, over what is there."""
    far = np.full(canvas.shape[:2], np.inf)
    reach = int(width) + 2
    for (ax, ay), (bx, by) in zip(
        np.stack([x, y], 1), np.stack([x[1:], y[1:]], 1) if len(x) > 1 else np.stack([x, y], 1), strict=False
    ):
        left, top = (max(0, int(min(p, q)) - reach) for p, q in ((ax, bx), (ay, by)))
        part = far[top : int(max(ay, by)) + reach + 1, left : int(max(ax, bx)) + reach + 1]
        px, py = np.meshgrid(np.arange(part.shape[1]) + left - ax, np.arange(part.shape[0]) + top - ay)
        long = (bx - ax) ** 2 + (by - ay) ** 2
        along = np.clip((px * (bx - ax) + py * (by - ay)) / long, 0.0, 1.0) if long > 0.0 else np.zeros_like(px)
        np.minimum(part, np.hypot(px - along * (bx - ax), py - along * (by - ay)), out=part)
    share = strength * np.round(np.clip(0.5 * width + 0.5 - far, 0.0, 1.0) * 4) / 4
    under = canvas[..., 3] * (1.0 - share)
    total = share + under
    mixed = share[..., None] * _rgb(colour) + under[..., None] * canvas[..., :3]
    canvas[..., :3] = np.divide(mixed, total[..., None], out=np.zeros_like(mixed), where=total[..., None] > 0.0)
    canvas[..., 3] = total
