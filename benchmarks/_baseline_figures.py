"""What a matplotlib figure shows, as arrays and words."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def drawn(figure: Figure) -> dict[str, Any]:
    """Titles, labels, and the data of every line, bar, map and image, panel by panel."""
    legends = [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]
    words = {"title": figure.get_suptitle(), "x": figure.get_supxlabel(), "y": figure.get_supylabel()}
    panels = {f"panel{i}": _panel(axes) for i, axes in enumerate(figure.axes)}
    return {"words": words, "legends": legends, "size": figure.get_size_inches(), **panels}


def _panel(axes: Axes) -> dict[str, Any]:
    titles = [axes.get_title(loc) for loc in ("left", "center", "right")]
    legend = axes.get_legend()
    return {
        "words": [*titles, axes.get_xlabel(), axes.get_ylabel()],
        "ticks": [[label.get_text() for label in axis.get_ticklabels()] for axis in (axes.xaxis, axes.yaxis)],
        "limits": np.array([*axes.get_xlim(), *axes.get_ylim()]),
        "texts": [text.get_text() for text in axes.texts],
        "legend": [] if legend is None else [text.get_text() for text in legend.get_texts()],
        "lines": [_line(line) for line in axes.lines],
        "maps": [_map(collection) for collection in axes.collections],
        "bars": np.array([_extent(patch) for patch in axes.patches]),
        "images": [np.asarray(image.get_array()) for image in axes.images],
    }


def _line(line: Any) -> dict[str, Any]:
    look = [str(line.get_label()), str(line.get_color()), str(line.get_linestyle()), str(line.get_marker())]
    return {"look": look, "x": np.asarray(line.get_xdata(), float), "y": np.asarray(line.get_ydata(), float)}


def _map(collection: Any) -> dict[str, Any]:
    values = collection.get_array()
    found: dict[str, Any] = {"kind": type(collection).__name__}
    if values is not None:
        found |= {"values": np.ma.filled(np.ma.asarray(values, float), np.nan), "range": collection.get_clim()}
    return found


def _extent(patch: Any) -> list[float]:
    return list(patch.get_path().get_extents(patch.get_patch_transform()).extents)
