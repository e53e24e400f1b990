"""Norm against attention of every image position."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from hooked_llava.results.image_axes import image_dims
from hooked_llava.viz.kinds import check_axes, check_dataset
from hooked_llava.viz.style import BLUE, MUTED, ORANGE, PAGE_WIDTH, plot
from hooked_llava.viz.titles import add_note, shown_title

_NAMES = ("norm", "attention")


def sink_scatter(sinks: xr.Dataset, *, title: str | None = None) -> Figure:
    """A dot for each position of the images, in the layer in which it is nearest to both thresholds of `sink_positions`.

    Dashed lines are the thresholds. Sinks are the dots at the top right, with their positions in the prompt. Raises
    `InputError` for another result, or several prompts.

    >>> ratios = xr.DataArray([[[[1.0, 9.0]]]], dims=("layer", "image", "patch_row", "patch_col"))
    >>> about = {"analysis": "sink_positions", "norm": 5.0, "attention": 5.0, "positions": [3]}
    >>> found = xr.Dataset({"norm": ratios, "attention": ratios, "sink": ratios[0] > 5}, attrs=about)
    >>> [text.get_text() for text in sink_scatter(found).axes[0].texts]
    ['3']
    """
    found = check_dataset(sinks, [*_NAMES, "sink"], "sink_scatter", "sink_positions")
    for name in _NAMES:
        check_axes(
            found[name], "layer", "image", *image_dims(found[name]), advice=" Choose one prompt with isel(prompt=0)."
        )
    ratios = {name: found[name].values.reshape(found.sizes["layer"], -1) for name in _NAMES}
    nearest = np.min([ratios[name] / found.attrs[name] for name in _NAMES], axis=0)
    layer = np.nan_to_num(nearest, nan=-1.0).argmax(0)
    x, y = (ratios[name][layer, np.arange(len(layer))] for name in _NAMES)
    chosen = found["sink"].values.ravel().astype(bool)
    with plot(PAGE_WIDTH, 2.8) as figure:
        axes = figure.add_subplot()
        axes.scatter(x[~chosen], y[~chosen], s=9, color=BLUE, linewidths=0, alpha=0.7, label="other")
        axes.scatter(x[chosen], y[chosen], s=22, color=ORANGE, linewidths=0, label="sink")
        for across, up, position in zip(x[chosen], y[chosen], found.attrs["positions"], strict=True):
            axes.annotate(str(position), (across, up), xytext=(4, 2), textcoords="offset points", fontsize=7)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.axvline(found.attrs["norm"], color=MUTED, linewidth=0.8, linestyle="--")
        axes.axhline(found.attrs["attention"], color=MUTED, linewidth=0.8, linestyle="--")
        axes.set_xlabel("norm, over the median of the image")
        axes.set_ylabel("attention, over the mean of the image")
        axes.set_title(shown_title(found, title))
        add_note(figure, found.attrs, title)
    return figure
