"""Curves of attention knockout and of the answer's probability, by layer."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_llava.datasets.study import OF_ALL
from hooked_llava.errors import InputError
from hooked_llava.experiments.edges import Edges, edge_names
from hooked_llava.viz.figures.maps import names_along
from hooked_llava.viz.kinds import check_array, check_dataset
from hooked_llava.viz.lines import MARKERS, Curve, apart, name_layers
from hooked_llava.viz.style import INK, MUTED, PAGE_WIDTH, SERIES, Plot, add_heading, legend_below, plot, value_lines
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
    """The effect of blocking each edge, by the centre of the window: a line for each edge, a panel for each kind.

    Args:
        result: what `attention_knockout` gives for one prompt, or `by_kind` of a study, whose intervals become bands.
        edges: which edges, named as for `attention_knockout`; all by default.
        title: instead of the result's own; "" for none.

    Raises `InputError` for a result with other axes than edge, layer, kind and statistic.

    >>> dims = ("edge", "layer")
    >>> result = xr.Dataset({"effect": (dims, [[0.0, -9.0]])}, coords={"edge": ["image->last"], "layer": [0, 1]})
    >>> [float(y) for y in knockout_curves(result).axes[0].lines[1].get_ydata()]
    [0.0, -9.0]
    """
    check_dataset(result, ("effect",), "knockout_curves", "attention_knockout, or by_kind of a study,")
    effect = _of(result, "effect", "edge", "layer")
    effect = effect if edges is None else effect.sel(edge=edge_names(edges))
    effect = effect.sortby("layer")
    names = [str(edge) for edge in effect["edge"].values]
    curves = apart({e: effect.sel(edge=e).values for e in names}, shown={e: shown_edge(e) for e in names})
    looks = {edge: (index, dash, at) for at, (edge, (index, dash)) in enumerate(_looks(names).items())}
    layers = effect["layer"].values
    panels = _panels(effect)
    with plot(PAGE_WIDTH, _height(len(panels))) as figure:
        every = _grid(figure, len(panels))
        for axes, (kind, panel) in zip(every, panels.items(), strict=True):
            axes.axhline(0, color=MUTED, linewidth=0.8)
            for curve in curves:
                _line(axes, layers, panel.sel(edge=curve.first), curve, *looks[curve.first])
            name_layers(axes, layers, names_along(effect, "layer"), 8)
            if kind:
                axes.set_title(kind)
        legend_below(figure, every[0], handlelength=_HANDLE)
        _outer(figure, every, effect, result)
        add_heading(figure, shown_title(result, title))
        add_note(figure, result.attrs, title)
    return figure


def probability_curves(result: xr.DataArray, *, norm: str = "none", title: str | None = None) -> Figure:
    """The probability of the answer's spellings by layer: a panel for each kind, the false option dotted.

    Args:
        result: what `answer_probability` gives for one prompt, or its means by kind.
        norm: which reading, "none" or "final".
        title: instead of the result's own; "" for none.

    Raises `InputError` for a result with other axes than norm, layer (or stream), form, kind and statistic.

    >>> dims, names = ("norm", "layer", "form"), {"norm": ["none"], "form": ["lower"]}
    >>> figure = probability_curves(xr.DataArray([[[0.25], [0.5]]], dims=dims, coords=names))
    >>> figure.axes[0].lines[0].get_ydata().tolist()
    [0.25, 0.5]
    """
    result = check_array(result, "probability_curves", "answer_probability")
    if "stream" in result.dims:
        result = result.rename(stream="layer")
    values = _of(result.to_dataset(name="p"), "p", "norm", "layer", "form").sel(norm=norm).sortby("layer")
    panels, layers = _panels(values), values["layer"].values
    forms = [f for f in map(str, values["form"].values) if np.isfinite(values.sel(form=f).values).any()]
    curves = apart({form: values.sel(form=form).values for form in forms})
    with plot(PAGE_WIDTH, _height(len(panels))) as figure:
        every = _grid(figure, len(panels))
        for axes, (kind, panel) in zip(every, panels.items(), strict=True):
            for curve in curves:
                color, dash = _FORMS.get(curve.first, (4, "-"))
                if np.isfinite(panel.sel(form=curve.first).values).any():
                    _line(axes, layers, panel.sel(form=curve.first), curve, color, dash, forms.index(curve.first))
            name_layers(axes, layers, names_along(values, "layer"), 8)
            axes.set_ylim(-0.02, 1.04)
            if kind:
                axes.set_title(kind)
        for axes in every:
            axes.set_xlabel("residual stream entering layer")
        every[0].set_ylabel("probability")
        legend_below(figure, every[0], handlelength=_HANDLE)
        add_heading(figure, shown_title(result, title))
        add_note(figure, result.attrs, title)
    return figure


def shown_edge(edge: str) -> str:
    """An edge's name as it is written in figures and tables.

    >>> shown_edge("image->question|rest")
    'image → question, rest'
    """
    return edge.replace("->", " → ").replace("|", ", ")


def _of(result: xr.Dataset, name: str, *dims: str) -> xr.DataArray:
    """The variable with these axes, and of others only kind and statistic."""
    values = result[name]
    missing = [dim for dim in dims if dim not in values.dims]
    surplus = [str(d) for d in values.dims if d not in (*dims, "kind", "statistic")]
    if missing or surplus:
        raise InputError(
            f"{name!r} has the axes {', '.join(map(str, values.dims))}; expected {', '.join(dims)}, with kind and "
            "statistic in front or not. Choose one prompt with result.isel(prompt=0), or average with by_kind(result)."
        )
    return values


def _panels(values: xr.DataArray) -> dict[str, xr.DataArray]:
    if "kind" not in values.dims:
        return {"": values}
    return {kind: values.sel(kind=kind) for kind in kinds_in_order(values)}


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


def _grid(figure: Plot, n: int) -> list[Axes]:
    columns = min(_COLUMNS, n)
    grid = figure.subplots(-(-n // columns), columns, sharey=True, squeeze=False).flatten().tolist()
    for unused in grid[n:]:
        unused.remove()
    return grid[:n]


def _line(
    axes: Axes, at: np.ndarray, values: xr.DataArray, curve: Curve, color_index: int, dash: object, index: int
) -> None:
    """A curve, with its interval as a band if it has one; colors, dashes and markers tell curves apart."""
    color = SERIES[color_index % len(SERIES)]
    mean = values.sel(statistic="mean") if "statistic" in values.dims else values
    if "statistic" in values.dims:
        low, high = (values.sel(statistic=end).values for end in ("low", "high"))
        axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
    axes.plot(
        at,
        mean.values,
        color=color,
        linestyle=dash,
        linewidth=curve.width,
        marker=MARKERS[index % len(MARKERS)],
        markersize=curve.marker_size,
        label=curve.label,
    )


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
    label = units if units.startswith("change") or not units else f"change, {units}"
    label = textwrap.fill(label, _LABEL)
    if len(every) == 1:
        every[0].set_ylabel(label)
    else:
        middle = (1 + figure.below / figure.get_size_inches()[1]) / 2
        figure.supylabel(label, y=middle, fontsize=9, color=INK, multialignment="center")
