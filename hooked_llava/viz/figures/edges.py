"""Every sender against every receiver: which component speaks to which."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_llava.errors import InputError
from hooked_llava.viz.figures.maps import draw_cells
from hooked_llava.viz.style import RULE, add_color_bar, plot, scale_of, tick_every, unit_of
from hooked_llava.viz.titles import add_note, title_of

_LAYER = re.compile(r"L(\d+)")
_ESTIMATES = ("heads", "mlps", "embed")


def edge_map(
    result: xr.DataArray | Mapping[str, xr.DataArray],
    *,
    title: str | None = None,
    about: Mapping[Any, Any] | None = None,
) -> Figure:
    """A cell for every edge, senders down and receivers across, both in the order in which the model computes them.

    The result is a dataset of `edge_attribution`, some of its arrays by name (`heads`, `mlps`, `embed`), or one array
    with the axes receiver, layer (and head) of `path_patching`. Where a sender does not lie before the receiver, and no
    edge is, the map is empty. `about` are attributes of parts that have none. Raises `InputError` for other axes.

    >>> heads = xr.DataArray(np.ones((1, 2, 3)), dims=("receiver", "layer", "head"), coords={"receiver": ["L1 mlp"]})
    >>> edge_map(heads).axes[0].collections[0].get_array().shape
    (6, 1)
    """
    parts = dict(result) if isinstance(result, Mapping) else {"": result}
    rows: list[tuple[tuple[float, float], np.ndarray]] = []
    for name, part in parts.items():
        rows += _senders(str(name), part)
    rows.sort(key=lambda row: row[0])
    first = next(iter(parts.values()))
    values = np.stack([row for _, row in rows])  # (sender, receiver)
    senders = ["embed" if layer < 0 else f"L{layer:.0f}" for (layer, _), _ in rows]
    receivers = [(m[0] if (m := _LAYER.match(label)) else label) for label in map(str, first["receiver"].values)]
    width, height = (min(11.0, max(4.4, 1.9 + 0.07 * n)) for n in values.shape[::-1])
    attrs = getattr(result, "attrs", {}) if about is None else about
    with plot(width, max(2.8, height)) as figure:
        axes = figure.add_subplot()
        scale = scale_of(first, values)
        draw_cells(axes, values, scale).set_linewidth(0)  # gaps would be as wide as the cells
        _layers(axes, "x", receivers)
        _layers(axes, "y", senders)
        axes.set_xlabel("receiver (in each layer queries, keys, values by head, then the MLP)")
        axes.set_ylabel("sender (heads, then the MLP)")
        own = title_of(xr.Dataset(attrs=attrs)) if "analysis" in attrs else "Edges"
        axes.set_title(own if title is None else title)
        add_note(figure, attrs, title)
        unit = "change of the metric" if unit_of(first) in _ESTIMATES else unit_of(first)
        add_color_bar(figure, axes, scale, unit, values)
    return figure


def _senders(name: str, part: xr.DataArray) -> list[tuple[tuple[float, float], np.ndarray]]:
    """Each sender's values [receiver] and its place in the model's order: (layer, head), -1 the embedding, inf an MLP."""
    axes = [axis for axis in ("layer", "head") if axis in part.dims]
    if set(part.dims) != {"receiver", *axes} or axes == ["head"]:
        raise InputError(
            f"{name or 'The result'} has the axes {', '.join(map(str, part.dims))}; expected receiver, layer, head (or "
            "receiver, layer; receiver), as edge_attribution and path_patching return them for one pair."
        )
    part = part.transpose("receiver", *axes)
    if not axes:
        return [((-1.0, 0.0), part.values)]
    layers = [float(layer) for layer in part["layer"].values]
    if axes == ["layer"]:
        return [((layer, np.inf), part.values[:, i]) for i, layer in enumerate(layers)]
    heads = [float(head) for head in part["head"].values]
    return [((layer, head), part.values[:, i, j]) for i, layer in enumerate(layers) for j, head in enumerate(heads)]


def _layers(axes: Axes, which: Literal["x", "y"], names: list[str]) -> None:
    """The layer in the middle of its cells, and a line between one and the next."""
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    stops = [*starts[1:], len(names)]
    shown = range(0, len(starts), tick_every(len(starts)))
    at, texts = [(starts[i] + stops[i]) / 2 for i in shown], [names[starts[i]] for i in shown]
    (axes.set_xticks if which == "x" else axes.set_yticks)(at, texts, rotation=90 if which == "x" else 0)
    axes.tick_params(which, length=0)
    for border in starts[1:]:
        (axes.axvline if which == "x" else axes.axhline)(border, color=RULE, linewidth=0.8)
