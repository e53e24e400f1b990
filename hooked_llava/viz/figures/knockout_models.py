"""The same edges in several models, from the files of their studies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import TypeVar

import xarray as xr
from matplotlib.figure import Figure

from hooked_llava.datasets.study import OF_ALL, as_kinds, by_kind
from hooked_llava.errors import InputError
from hooked_llava.experiments.edges import Edges, edge_change, edge_names
from hooked_llava.results.arrays import load
from hooked_llava.viz.figures.knockout import change_label, shown_edge
from hooked_llava.viz.kinds import check_axes, check_dataset
from hooked_llava.viz.lines import apart, draw_curve
from hooked_llava.viz.style import MUTED, PAGE_WIDTH, SERIES, add_heading, label_across, legend_below, plot, value_lines

_COLUMNS = 2
Value = TypeVar("Value", str, float)


def knockout_models(
    results: Mapping[str, xr.Dataset | str | PathLike[str]],
    *,
    edges: Edges | None = None,
    kind: str = OF_ALL,
    title: str | None = None,
) -> Figure:
    """The effect of blocking an edge in several models: a panel for each edge, a line for each model, along the relative depth.

    Depth is the center of the window over the last layer's number, so that models of 32 and of 40 layers lie on one axis: what is
    compared is the shape. Windows are each model's own, and so are the questions that it answers correctly: a difference of two
    lines may be one of questions.

    Args:
        results: by the names of the models, what `attention_knockout`, `knockout_study` or `by_kind` gives, or its file.
        edges: which edges; by default those that all have.
        kind: of question, where results have kinds.
        title: by default none, or which weight the edges were given where they were not blocked.

    Raises `InputError` for no results, results with other axes, units or factors (edges blocked, or weighted), and edges or kinds
    that not all of them have.

    >>> dims = ("edge", "layer")
    >>> one, two = (
    ...     xr.Dataset({"effect": (dims, [values])}, coords={"edge": ["image->last"], "layer": range(len(values))})
    ...     for values in ([0.0, -9.0], [0.0, -5.0, -1.0])
    ... )
    >>> figure = knockout_models({"small": one, "large": two})
    >>> [line.get_xdata().tolist() for line in figure.axes[0].lines[1:]]
    [[0.0, 1.0], [0.0, 0.5, 1.0]]
    """
    effects = {name: _effect(name, given, kind) for name, given in results.items()}
    names = _common(effects, edges)
    units = _same("units", (str(effect.attrs.get("units", "")) for effect in effects.values()))
    factor = _same("factor", (effect.attrs["factor"] for effect in effects.values()))
    if title is None and factor:
        title = f"Attention {edge_change(factor)}"
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    with plot(PAGE_WIDTH, 0.3 + 2.0 * rows) as figure:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten().tolist()
        for unused in grid[len(names) :]:
            unused.remove()
        for axes, edge in zip(grid, names, strict=False):
            axes.axhline(0, color=MUTED, linewidth=0.8)
            for index, (name, effect) in enumerate(effects.items()):
                own = effect.sel(edge=edge)
                (curve,) = apart({name: own.sel(statistic="mean").values})
                band = (own.sel(statistic="low"), own.sel(statistic="high")) if own.sizes["statistic"] > 1 else None
                depth = own["layer"].values / max(1, int(own["layer"].max()))
                draw_curve(axes, depth, own.sel(statistic="mean"), curve, SERIES[index % len(SERIES)], index, band=band)
            axes.set_title(shown_edge(edge))
            axes.set_xlabel("relative depth")
            value_lines(axes, "y")
        legend_below(figure, grid[0])
        label_across(figure, change_label(units) or "effect")
        add_heading(figure, title or "")
    return figure


def _effect(name: str, given: xr.Dataset | str | PathLike[str], kind: str) -> xr.DataArray:
    """A result's effect [edge, layer, statistic] for one kind of question."""
    result = given if isinstance(given, xr.Dataset) else load(given)
    result = check_dataset(result, ("effect",), "knockout_models", "attention_knockout, or a study,")
    assert isinstance(result, xr.Dataset)
    result = by_kind(result) if "question" in result.dims else result
    effect = as_kinds(check_axes(result["effect"], "edge", "layer", optional=("kind", "statistic"))).sortby("layer")
    kinds = [str(one) for one in effect["kind"].values]
    if kind not in kinds and len(kinds) > 1:
        raise InputError(f"The result of {name!r} has no questions of the kind {kind!r}; it has {', '.join(kinds)}.")
    effect = effect.assign_attrs(factor=result.attrs.get("factor", 0.0))
    return effect.sel(kind=kind) if kind in kinds else effect.isel(kind=0)


def _same(name: str, values: Iterable[Value]) -> Value:
    """What all results say of themselves; raises `InputError` where they differ."""
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        said = ", ".join(map(str, found))
        raise InputError(f"The results differ in {name} ({said}) and cannot be compared; give those of one.")
    return found[0]


def _common(effects: Mapping[str, xr.DataArray], edges: Edges | None) -> list[str]:
    """The edges that are drawn, which every result has."""
    if not effects:
        raise InputError("No results are given; expected {'name of a model': its result or file, ...}.")
    held = {name: [str(edge) for edge in effect["edge"].values] for name, effect in effects.items()}
    first = next(iter(held.values()))
    wanted = (
        [edge for edge in first if all(edge in own for own in held.values())] if edges is None else edge_names(edges)
    )
    missing = {name: [edge for edge in wanted if edge not in own] for name, own in held.items()}
    if not wanted or any(missing.values()):
        lacking = ", ".join(f"{name!r} lacks {edges}" for name, edges in missing.items() if edges)
        raise InputError(f"The results share no such edges ({lacking or 'none in common'}); they have {held}.")
    return wanted
