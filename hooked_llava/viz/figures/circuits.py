"""How much of the answer a circuit restores, by its number of edges."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from hooked_llava.viz.kinds import check_axes, check_dataset
from hooked_llava.viz.lines import apart, draw_curve
from hooked_llava.viz.style import MUTED, PAGE_WIDTH, SERIES, legend_below, plot, value_lines
from hooked_llava.viz.titles import add_note, title_of

_RANDOM = "random edges"


def faithfulness_curves(curve: xr.Dataset, *, title: str | None = None) -> Figure:
    """A curve for each way to score edges, and the mean of random circuits of the same sizes with their range as a band.

    1 is the clean run, 0 the corrupted one; over several pairs their mean. Sizes are on a logarithmic axis, linear near 0.

    Args:
        curve: what `faithfulness_curve` gives.
        title: instead of the result's own; "" for none.

    Raises `InputError` for another result.

    >>> parts = {"faithfulness": (("scores", "size"), [[0.0, 1.0]]), "random": (("draw", "size"), [[0.0, 0.2]])}
    >>> curve = xr.Dataset(parts, coords={"scores": ["EAP-IG"], "size": [0, 10], "draw": [0]})
    >>> [line.get_ydata().tolist() for line in faithfulness_curves(curve).axes[0].lines[2:]]
    [[0.0, 1.0], [0.0, 0.2]]
    """
    check_dataset(curve, ("faithfulness", "random"), "faithfulness_curves", "faithfulness_curve")
    check_axes(curve["faithfulness"], "scores", "size", optional=["pair"])
    ordered = curve.sortby("size")
    found, control = (
        ordered[name].mean("pair") if "pair" in ordered[name].dims else ordered[name]
        for name in ("faithfulness", "random")
    )
    sizes = ordered["size"].values
    by_name = {str(name): found.sel(scores=name).values for name in found["scores"].values}
    if control.sizes["draw"]:
        by_name[_RANDOM] = control.mean("draw").values
    with plot(PAGE_WIDTH, 2.7) as figure:
        axes = figure.add_subplot()
        for level in (0, 1):
            axes.axhline(level, color=MUTED, linewidth=0.8)
        drawn = apart(by_name)
        for index, one in enumerate(drawn):
            is_control = one.first == _RANDOM
            band = (control.min("draw").values, control.max("draw").values) if is_control else None
            color = MUTED if is_control else SERIES[index % len(SERIES)]
            draw_curve(axes, sizes, by_name[one.first], one, color, index, band=band)
        axes.set_xscale("symlog", linthresh=max(1, int(np.min(sizes[sizes > 0], initial=1))))
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axes.minorticks_off()
        of_all = f" (of {curve.attrs['n_edges']})" if "n_edges" in curve.attrs else ""
        axes.set_xlabel(f"edges of the circuit{of_all}")
        axes.set_ylabel("faithfulness")
        value_lines(axes, "y")
        axes.set_title(title_of(curve) if title is None else title)
        legend_below(figure, axes)
        add_note(figure, curve.attrs, title)
    return figure
