"""Maps of a number by layer and head, or by any two axes; one, or several on one scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from hooked_llava.viz.style import (
    PAPER,
    ColorScale,
    Plot,
    add_color_bar,
    plot,
    require_dims,
    scale_of,
    tick_every,
    unit_of,
)
from hooked_llava.viz.titles import add_note, title_of

_MOST_CELLS_WITH_NUMBERS = 144
_NARROW = 0.9  # of a text token's column: what leaves no room for gaps


def layer_head_map(result: xr.DataArray, *, title: str | None = None) -> Figure:
    """A cell for every head, [layer, head] (or kv_head), colored by its value; small maps also show the numbers.

    Raises `InputError` if the result has other axes longer than one.

    >>> figure = layer_head_map(xr.DataArray([[0.5, -1.0]], dims=("layer", "head"), name="logit"))
    >>> figure.axes[0].get_xlabel(), figure.axes[0].get_title(loc="left")
    ('head', 'Logit')
    """
    return cell_map(result, "layer", "kv_head" if "kv_head" in result.dims else "head", title=title)


def cell_map(result: xr.DataArray, rows: str, columns: str, *, title: str | None = None) -> Figure:
    """A cell for every pair of places on two axes, colored by its value; small maps also show the numbers.

    Raises `InputError` if the result has other axes longer than one.

    >>> figure = cell_map(xr.DataArray([[0.5], [1.0]], dims=("receiver", "layer")), "receiver", "layer")
    >>> figure.axes[0].get_ylabel()
    'receiver'
    """
    result = require_dims(result, rows, columns)
    name = title_of(result) if title is None else title
    return cell_maps({name: result}, rows, columns, about={} if title == "" else result.attrs)


def cell_maps(
    results: Mapping[str, xr.DataArray], rows: str, columns: str, *, about: Mapping[str, Any] | None = None
) -> Figure:
    """Several results of the same axes below each other, each under its name, on one color scale.

    `about` are attributes of the whole, as analyses give them, which a note below tells.

    >>> maps = xr.DataArray(np.eye(2), dims=("layer", "head"))
    >>> figure = cell_maps({"q": maps, "k": 2 * maps}, "layer", "head")
    >>> [axes.get_title(loc="left") for axes in figure.axes[:2]]
    ['q', 'k']
    """
    panels = [require_dims(result, rows, columns) for result in results.values()]
    n_rows, n_columns = (max(panel.shape[axis] for panel in panels) for axis in (0, 1))
    cell, n = min(0.42, 3.5 / n_columns), len(panels)
    width, height = max(4.2, 1.7 + cell * n_columns), max(1.5 if n > 1 else 2.4, 0.9 + 0.82 * cell * n_rows)
    values = [panel.values for panel in panels]
    with stacked_maps(results, values, panels[0], (width, n * height), about=about) as (figure, all_axes, scale):
        for axes, panel in zip(all_axes, panels, strict=True):
            if panel.size <= _MOST_CELLS_WITH_NUMBERS:
                _write_numbers(axes, panel.values, scale)
            label_axis(axes, "x", names_along(panel, columns), _axis_label(columns))
            label_axis(axes, "y", names_along(panel, rows), _axis_label(rows))
    return figure


@contextmanager
def stacked_maps(
    titles: Iterable[str],
    values: Sequence[np.ndarray],
    result: xr.DataArray,
    size: tuple[float, float],
    *,
    columns: np.ndarray | None = None,
    about: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Plot, list[Axes], ColorScale]]:
    """Maps of values [row, column] below each other on the color scale of a result, to be labelled inside the block.

    `size` is in inches, `columns` are as for `draw_cells`, and a note below tells what `about` says.
    """
    every = np.concatenate([panel.ravel() for panel in values])
    scale = scale_of(result, every)
    with plot(*size) as figure:
        all_axes = figure.subplots(len(values), squeeze=False, sharex=columns is not None)[:, 0].tolist()
        for axes, title, panel in zip(all_axes, titles, values, strict=True):
            draw_cells(axes, panel, scale, columns=columns)
            axes.set_title(title)
        yield figure, all_axes, scale
        add_color_bar(figure, all_axes, scale, unit_of(result), every)
        add_note(figure, about or {})


def draw_cells(
    axes: Axes, values: np.ndarray, scale: ColorScale, *, columns: Sequence[float] | np.ndarray | None = None
) -> QuadMesh:
    """Values [row, column] as cells with thin gaps, row 0 on top; cell (r, c) covers r to r + 1 and c to c + 1.

    `columns` are other borders of the columns, one more than there are columns.
    """
    across = np.arange(values.shape[1] + 1) if columns is None else np.asarray(columns, dtype=float)
    narrow = bool((np.diff(across) < _NARROW).any())
    gap = 0.8 if values.size <= 2000 and not narrow else 0.0
    down = np.arange(values.shape[0] + 1)
    mesh = axes.pcolormesh(across, down, values, cmap=scale.map, norm=scale.norm(), edgecolors=PAPER, linewidth=gap)
    mesh.set_rasterized(narrow)  # as vectors, narrow neighbors would show seams
    axes.invert_yaxis()
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def label_axis(axes: Axes, which: Literal["x", "y"], names: Sequence[object] | np.ndarray, label: str) -> None:
    """Names at the middle of the cells along one axis, thinned out where there are many."""
    step = tick_every(len(names))
    at = np.arange(0, len(names), step)
    texts = [str(names[i]) for i in at.tolist()]
    if which == "x":
        axes.set_xticks(at + 0.5, texts)
        axes.set_xlabel(label)
    else:
        axes.set_yticks(at + 0.5, texts)
        axes.set_ylabel(label)
    axes.tick_params(which, length=0)


def names_along(result: xr.DataArray | xr.Dataset, axis: str) -> list[str]:
    """Names of the places of an axis, by the result's own coordinates: `label` of positions, `layer_name` of layers.

    >>> names_along(xr.DataArray([1.0, 2.0], dims="layer", coords={"layer": [3, 5]}), "layer")
    ['3', '5']
    """
    of = {"position": "label", "layer": "layer_name", "resid": "layer_name"}.get(axis)
    named = of in result.coords and result[of].dims == (axis,)
    return [str(name) for name in result[of if named else axis].values]


def _axis_label(axis: str) -> str:
    return {"kv_head": "key-value head", "position": ""}.get(axis, axis)


def _write_numbers(axes: Axes, values: np.ndarray, scale: ColorScale) -> None:
    digits = 2 if scale.high < 1 else 1
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value) and abs(value - scale.neutral) >= 0.5 * 10**-digits:  # what rounds to nothing is empty
            text = f"{value:.{digits}f}"
            axes.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=scale.ink(float(value))
            )
