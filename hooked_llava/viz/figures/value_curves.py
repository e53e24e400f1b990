"""What changes with a number that was varied: the factor of an edge, the temperature of heads, how many facts are edited."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_llava.errors import InputError
from hooked_llava.viz.figures.knockout import shown_edge
from hooked_llava.viz.kinds import check_array, check_axes
from hooked_llava.viz.lines import apart, draw_curve
from hooked_llava.viz.style import PAGE_WIDTH, SERIES, legend_below, plot, value_lines
from hooked_llava.viz.titles import add_note, shown_title

_DECADE = 10  # of numbers that span more the axis is logarithmic


def value_curves(values: xr.DataArray, along: str, *, title: str | None = None) -> Figure:
    """A curve over the numbers of one axis, for each entry of the other axis if there is one.

    Numbers that span more than a decade lie on a logarithmic axis, linear below the smallest where 0 is among them. An axis
    `statistic` with mean, low and high gives intervals.

    Args:
        values: results side by side, such as `xr.concat(effects, pd.Index(factors, name="factor"))`.
        along: the axis that holds the numbers.
        title: instead of the result's own; "" for none.

    Raises `InputError` for another axis, more than one besides, and numbers that are none or below 0.

    >>> effects = xr.DataArray([[0.0, -9.0], [0.0, -1.0]], {"factor": [1.0, 0.0], "edge": ["a->b", "c->d"]}, name="effect")
    >>> lines = value_curves(effects.T, "factor").axes[0].lines
    >>> [(line.get_label(), line.get_xdata().tolist(), line.get_ydata().tolist()) for line in lines]
    [('a → b', [0.0, 1.0], [0.0, 0.0]), ('c → d', [0.0, 1.0], [-1.0, -9.0])]
    """
    check_array(values, "value_curves", "xr.concat of results")
    check_axes(values, along, optional=[dim for dim in map(str, values.dims) if dim != along])
    others = [str(dim) for dim in values.dims if dim not in (along, "statistic")]
    if len(others) > 1:
        raise InputError(f"The axes {', '.join(others)} would both name the curves; choose an entry of all but one.")
    numbers = _numbers(values, along)
    values = values.assign_coords({along: numbers}).sortby(along)
    named = values if others else values.expand_dims(curve=[str(values.name or "value").replace("_", " ")])
    name = others[0] if others else "curve"
    mean = named.sel(statistic="mean") if "statistic" in named.dims else named
    entries = {str(entry): entry for entry in mean[name].values}
    by_name = {shown: mean.sel({name: entry}).values for shown, entry in entries.items()}
    with plot(PAGE_WIDTH, 2.7) as figure:
        axes = figure.add_subplot()
        for index, curve in enumerate(apart(by_name, shown={one: shown_edge(one) for one in by_name})):
            own = named.sel({name: entries[curve.first]})
            band = (own.sel(statistic="low"), own.sel(statistic="high")) if "statistic" in named.dims else None
            color = SERIES[index % len(SERIES)]
            draw_curve(axes, values[along].values, by_name[curve.first], curve, color, index, band=band)
        _scale(axes, values[along].values)
        axes.set_xlabel(along.replace("_", " "))
        axes.set_ylabel(str(values.attrs.get("units") or values.name or ""))
        value_lines(axes, "y")
        axes.set_title(shown_title(values, title))
        if others:
            legend_below(figure, axes)
        add_note(figure, values.attrs, title)
    return figure


def _numbers(values: xr.DataArray, along: str) -> np.ndarray:
    numbers = values[along].values
    if not np.issubdtype(numbers.dtype, np.number) or not np.isfinite(numbers).all() or (numbers < 0).any():
        raise InputError(f"The axis {along!r} holds {numbers.tolist()}; expected finite numbers of at least 0.")
    return numbers.astype(float)


def _scale(axes: Axes, numbers: np.ndarray) -> None:
    """Every number has its tick, unless a linear axis has many."""
    least, most = float(numbers[numbers > 0].min(initial=np.inf)), float(numbers.max())
    if most < _DECADE * least:
        return
    axes.set_xscale("symlog" if numbers.min() == 0 else "log", **({"linthresh": least} if numbers.min() == 0 else {}))
    axes.set_xticks(numbers, [f"{number:g}" for number in numbers], rotation=45)
    axes.minorticks_off()
