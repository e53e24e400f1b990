"""Curves in one panel that can be distinguished, also where they coincide."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from hooked_llava.viz.style import tick_every

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Markers of curves, in the order in which they are used."""
_LONGEST_LABEL = 44
_SAME = 1e-6  # of the largest value: what is left of equal curves that were computed in other batches
_INDISTINCT = 0.004  # of the drawn range: about a pixel
_NEAR = 0.015  # of the drawn range: closer than this one curve hides another
_WIDTH, _WIDER, _MOST = 1.6, 1.6, 2
_MARKER, _LARGER = 3.4, 1.8


@dataclass(frozen=True)
class Curve:
    """One line to draw: how it is called, how wide it is, and how large its markers are.

    Attributes:
        first (str): Name of the first of the curves that it stands for.
        label (str): The names of all of them, joined by = or ≈.
        width (float): Line width in points.
        marker_size (float): Marker size in points.
    """

    first: str
    label: str
    width: float
    marker_size: float


def apart(curves: Mapping[str, np.ndarray], *, shown: Mapping[str, str] | None = None) -> list[Curve]:
    """What to draw so that every curve is seen: indistinguishable ones as one line, and wider those that another covers.

    `curves` are values by name, all of one shape (several panels' one after another), in the order of drawing; `shown`
    names them for the legend. Equal ones are joined by =, those less than a pixel apart by ≈. What is NaN counts as equal
    to NaN.

    >>> a, b = np.array([0.0, 1.0]), np.array([5.0, 6.0])
    >>> [curve.label for curve in apart({"a": a, "same": a, "almost": a + 0.001, "b": b})]
    ['a = same ≈ almost', 'b']
    >>> wide, thin = apart({"a": np.array([0.0, 1.0, 2.0]), "b": np.array([0.0, 1.0, 9.0])})
    >>> wide.width > thin.width
    True
    """
    shown = shown or {}
    flat = {name: np.asarray(values, dtype=float).ravel() for name, values in curves.items()}
    finite = np.concatenate([v[np.isfinite(v)] for v in flat.values()] or [np.zeros(0)])
    scale, span = (float(np.abs(finite).max()), float(np.ptp(finite))) if finite.size else (0.0, 0.0)
    labels: dict[str, str] = {}
    for name, values in flat.items():
        distances = {head: _distance(flat[head], values) for head in labels}
        head = min(distances, key=lambda h: distances[h], default=name)
        if distances.get(head, np.inf) > max(_INDISTINCT * span, _SAME * scale):
            labels[name] = shown.get(name, name)
            continue
        sign = "=" if distances[head] <= _SAME * scale else "≈"
        labels[head] = f"{labels[head]} {sign} {shown.get(name, name)}"
    heads = list(labels)
    found = []
    for i, head in enumerate(heads):
        above = min(_MOST, sum(_covers(flat[head], flat[later], _NEAR * span) for later in heads[i + 1 :]))
        label = _wrapped(labels[head])
        found.append(Curve(head, label, _WIDTH + _WIDER * above, _MARKER + _LARGER * above))
    return found


def _wrapped(label: str) -> str:
    """A long label on several lines, broken before = and ≈ only."""
    parts = re.split(r" (?=[=≈] )", label)
    lines = parts[:1]
    for part in parts[1:]:
        lines += [part] if len(lines[-1]) + len(part) >= _LONGEST_LABEL else [f"{lines.pop()} {part}"]
    return "\n".join(lines)


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    """How far two curves are from each other at most; infinitely where only one of them is."""
    if (np.isnan(first) != np.isnan(second)).any():
        return np.inf
    distances = np.abs(first - second)
    return float(distances[np.isfinite(distances)].max(initial=0.0))


def _covers(below: np.ndarray, above: np.ndarray, near: float) -> bool:
    """Whether at two neighboring points one curve runs on the other, or at the only point."""
    close = np.abs(below - above) <= near  # NaN is never close
    return bool((close[:-1] & close[1:]).any()) if len(close) > 1 else bool(close.any())


def draw_curve(
    axes: Axes,
    at: np.ndarray,
    values: np.ndarray | xr.DataArray,
    curve: Curve,
    color: str,
    index: int,
    dash: Any = "-",
    band: tuple[np.ndarray | xr.DataArray, np.ndarray | xr.DataArray] | None = None,
) -> None:
    """A curve with the marker of its index, and its interval from low to high as a band if it has one."""
    if band is not None:
        low, high = map(np.asarray, band)
        axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
    marker = MARKERS[index % len(MARKERS)]
    look = {"color": color, "linestyle": dash, "marker": marker, "linewidth": curve.width}
    axes.plot(at, np.asarray(values), markersize=curve.marker_size, label=curve.label, **look)


def name_layers(axes: Axes, layers: np.ndarray, names: list[str], most: int = 16) -> None:
    """Names of the layers along the horizontal axis, thinned out where there are many; the last is always named.

    `layers` are where they lie, `names` what they are called.
    """
    step = tick_every(len(layers), most)
    kept = sorted({*range(0, len(layers) - 1, step), len(layers) - 1})
    if len(kept) > 1 and kept[-1] - kept[-2] < step:
        del kept[-2]
    axes.set_xticks([layers[i] for i in kept], [names[i] for i in kept])
