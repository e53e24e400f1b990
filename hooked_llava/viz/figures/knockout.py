"""Curves of attention knockout and of the answer's probability, by layer."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_llava.analysis.answer_probability import with_released_norm
from hooked_llava.datasets.study import OF_ALL, as_kinds
from hooked_llava.experiments.edges import Edges, edge_names
from hooked_llava.viz.figures.maps import names_along
from hooked_llava.viz.kinds import check_array, check_axes, check_dataset
from hooked_llava.viz.lines import Curve, apart, draw_curve, name_layers
from hooked_llava.viz.style import (
    MUTED,
    PAGE_WIDTH,
    SERIES,
    Plot,
    add_heading,
    label_across,
    legend_below,
    plot,
    value_lines,
)
from hooked_llava.viz.titles import add_note, shown_title

_DASHES = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)))
_COLUMNS = 2
_HANDLE = 2.6
_LABEL = 26  # letters of the vertical axis in a line
_LEAST_PERCENT = 10.0  # how far the axis of a relative change reaches at least
_FORMS = {
    "lower": (0, "-"),
    "capitalised": (1, "-"),
    "false lower": (0, _DASHES[2]),
    "false capitalised": (1, _DASHES[2]),
}


def knockout_curves(result: xr.Dataset, *, edges: Edges | None = None, title: str | None = None) -> Figure:
    """The effect of blocking each edge, by the center of the window: a line for each edge, a panel for each kind.

    Args:
        result: what `attention_knockout` or `output_knockout` gives for one prompt, or `by_kind` of a study, whose intervals
            become bands.
        edges: which edges, named as for `attention_knockout`; all by default.
        title: instead of the result's own; "" for none.

    Raises `InputError` for a result with other axes than edge, layer, kind and statistic.

    >>> dims = ("edge", "layer")
    >>> result = xr.Dataset({"effect": (dims, [[0.0, -9.0]])}, coords={"edge": ["image->last"], "layer": [0, 1]})
    >>> [float(y) for y in knockout_curves(result).axes[0].lines[1].get_ydata()]
    [0.0, -9.0]
    """
    check_dataset(result, ("effect",), "knockout_curves", "attention_knockout, or by_kind of a study,")
    result = result.rename(output="edge") if "output" in result.dims else result
    effect = _of(result, "effect", "edge", "layer")
    effect = effect if edges is None else effect.sel(edge=edge_names(edges))
    names = [str(edge) for edge in effect["edge"].values]
    curves = apart({e: effect.sel(edge=e).values for e in names}, shown={e: shown_edge(e) for e in names})
    kinds, looks = kinds_in_order(effect), _looks(names)
    with plot(PAGE_WIDTH, _height(len(kinds))) as figure:
        every = _grid(figure, kinds)
        for axes, kind in zip(every, kinds, strict=True):
            axes.axhline(0, color=MUTED, linewidth=0.8)
            _draw(axes, effect.sel(kind=kind), "edge", curves, looks)
        legend_below(figure, every[0], handlelength=_HANDLE)
        _outer(figure, every, effect, result)
        add_heading(figure, shown_title(result, title))
        add_note(figure, result.attrs, title)
    return figure


def probability_curves(result: xr.DataArray, *, norm: str = "none", title: str | None = None) -> Figure:
    """The probability of the answer's variants by layer: a panel for each kind, the false option dotted.

    Args:
        result: what `answer_probability` gives for one prompt, or its means by kind.
        norm: which reading, "none", "final", or "released": raw below and with the final norm at the last point, whose jump is
            an artefact of reading (the title says so).
        title: instead of the result's own; "" for none.

    Raises `InputError` for a result with other axes than norm, layer (or resid), form, kind and statistic.

    >>> dims, names = ("norm", "layer", "form"), {"norm": ["none"], "form": ["lower"]}
    >>> figure = probability_curves(xr.DataArray([[[0.25], [0.5]]], dims=dims, coords=names))
    >>> figure.axes[0].lines[0].get_ydata().tolist()
    [0.25, 0.5]
    """
    result = check_array(result, "probability_curves", "answer_probability")
    if "resid" in result.dims:
        result = result.rename(resid="layer")
    result = with_released_norm(result) if norm == "released" else result
    values = _of(result.to_dataset(name="p"), "p", "norm", "layer", "form").sel(norm=norm)
    forms = [f for f in map(str, values["form"].values) if np.isfinite(values.sel(form=f).values).any()]
    curves = apart({form: values.sel(form=form).values for form in forms})
    kinds, looks = kinds_in_order(values), {form: _FORMS.get(form, (4, "-")) for form in forms}
    with plot(PAGE_WIDTH, _height(len(kinds))) as figure:
        every = _grid(figure, kinds)
        for axes, kind in zip(every, kinds, strict=True):
            _draw(axes, values.sel(kind=kind), "form", curves, looks)
            axes.set_ylim(-0.02, 1.04)
            axes.set_xlabel("residual stream entering layer")
        every[0].set_ylabel("probability")
        legend_below(figure, every[0], handlelength=_HANDLE)
        joined = " (raw, but the last point with the final norm: an artefact)" if norm == "released" else ""
        add_heading(figure, shown_title(result, title) + joined if title is None else title)
        add_note(figure, result.attrs, title)
    return figure


def shown_edge(edge: str) -> str:
    """An edge's name as it is written in figures and tables.

    >>> shown_edge("image->question|rest")
    'image → question, rest'
    """
    return edge.replace("->", " → ").replace("|", ", ")


def change_label(units: str) -> str:
    """What an axis of effects shows, of these units, in short lines.

    >>> change_label("nats"), change_label("change of the metric")
    ('change, nats', 'change of the metric')
    """
    label = units if units.startswith("change") or not units else f"change, {units}"
    return textwrap.fill(label, _LABEL)


def _of(result: xr.Dataset, name: str, *dims: str) -> xr.DataArray:
    """The variable with these axes, kind and statistic, layers in order; raises `InputError` for others."""
    advice = " Choose one prompt with result.isel(prompt=0), or average with by_kind(result)."
    values = check_axes(result[name], *dims, optional=("kind", "statistic"), advice=advice)
    return as_kinds(values).sortby("layer")


def kinds_in_order(values: xr.DataArray | xr.Dataset) -> list[str]:
    """The kinds of question, that of all together first."""
    kinds = [str(kind) for kind in values["kind"].values]
    return sorted(kinds, key=lambda kind: kind != OF_ALL)  # the others as they come


def _looks(edges: Sequence[str]) -> dict[str, tuple[int, object]]:
    """Color and dash of every edge: edges from one source share a color."""
    sources = [edge.partition("->")[0] for edge in edges]
    colors = {source: i for i, source in enumerate(dict.fromkeys(sources))}
    earlier = [sources[:i].count(source) for i, source in enumerate(sources)]
    dashes = [_DASHES[n % len(_DASHES)] for n in earlier]
    return {edge: (colors[s], dash) for edge, s, dash in zip(edges, sources, dashes, strict=True)}


def _height(n_panels: int) -> float:
    rows = -(-n_panels // _COLUMNS)
    return 2.7 if rows == 1 else 1.9 * rows


def _grid(figure: Plot, kinds: Sequence[str]) -> list[Axes]:
    """A panel for each kind, under its name."""
    n, columns = len(kinds), min(_COLUMNS, len(kinds))
    grid = figure.subplots(-(-n // columns), columns, sharey=True, squeeze=False).flatten().tolist()
    for unused in grid[n:]:
        unused.remove()
    for axes, kind in zip(grid, kinds, strict=False):
        axes.set_title(kind)
    return grid[:n]


def _draw(
    axes: Axes, values: xr.DataArray, along: str, curves: Sequence[Curve], looks: Mapping[str, tuple[int, object]]
) -> None:
    """The curves along an axis, with the color and the dash of each; intervals are bands."""
    layers, order = values["layer"].values, list(looks)
    for curve in curves:
        one, (color, dash) = values.sel({along: curve.first}), looks[curve.first]
        band = (one.sel(statistic="low"), one.sel(statistic="high")) if one.sizes["statistic"] > 1 else None
        color = SERIES[color % len(SERIES)]
        draw_curve(axes, layers, one.sel(statistic="mean"), curve, color, order.index(curve.first), dash, band)
    name_layers(axes, layers, names_along(values, "layer"), 8)


def _outer(figure: Plot, every: list[Axes], effect: xr.DataArray, result: xr.Dataset) -> None:
    """Labels, thin lines to read values by, and an axis on which a tiny effect looks tiny."""
    window = result.attrs.get("window")
    units = str(effect.attrs.get("units", ""))
    for axes in every:
        value_lines(axes, "y")
        axes.set_xlabel("layer" if window in (None, 1) else f"layer (middle of {window})")
    if units.startswith("%"):
        low, high = every[0].get_ylim()
        every[0].set_ylim(min(low, -_LEAST_PERCENT), max(high, _LEAST_PERCENT / 10))
    label = change_label(units)
    if len(every) == 1:
        every[0].set_ylabel(label)
    else:
        label_across(figure, label)
