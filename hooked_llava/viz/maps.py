"""Maps of a number by layer and head, by layer and position, or by any two axes; one, or several on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from hooked_llava.errors import InputError
from hooked_llava.input_batch import Inputs
from hooked_llava.viz.style import (
    PAPER,
    ColorScale,
    add_color_bar,
    only,
    plot,
    scale_of,
    subject_of,
    tick_every,
    unit_of,
)

COLLAPSES = ("mean", "sum", "max")
"""What may stand for all patches of a picture: their mean, their sum, or the one farthest from 0."""
_MOST_CELLS_WITH_NUMBERS = 144
_LONGEST_LABEL = 14


def layer_head_map(result: xr.DataArray, *, title: str | None = None) -> Figure:
    """A cell for every head, [layer, head] (or kv_head), coloured by its value; small maps also show the numbers.

    Raises `InputError` if the result has other axes longer than one.

    >>> figure = layer_head_map(xr.DataArray([[0.5, -1.0]], dims=("layer", "head"), name="logit"))
    >>> figure.axes[0].get_xlabel(), figure.axes[0].get_title(loc="left")
    ('head', 'Logit')
    """
    return cell_map(result, "layer", "kv_head" if "kv_head" in result.dims else "head", title=title)


def cell_map(result: xr.DataArray, rows: str, columns: str, *, title: str | None = None) -> Figure:
    """A cell for every pair of places on two axes, coloured by its value; small maps also show the numbers.

    Raises `InputError` if the result has other axes longer than one.

    >>> figure = cell_map(xr.DataArray([[0.5], [1.0]], dims=("receiver", "layer")), "receiver", "layer")
    >>> figure.axes[0].get_ylabel()
    'receiver'
    """
    result = only(result, rows, columns)
    return cell_maps({subject_of(result) if title is None else title: result}, rows, columns)


def cell_maps(results: Mapping[str, xr.DataArray], rows: str, columns: str) -> Figure:
    """Several results of the same axes below each other, each under its name, on one colour scale.

    >>> maps = xr.DataArray(np.eye(2), dims=("layer", "head"))
    >>> figure = cell_maps({"q": maps, "k": 2 * maps}, "layer", "head")
    >>> [axes.get_title(loc="left") for axes in figure.axes[:2]]
    ['q', 'k']
    """
    panels = [only(result, rows, columns) for result in results.values()]
    n_rows, n_columns = (max(panel.shape[axis] for panel in panels) for axis in (0, 1))
    cell, n = min(0.46, 9.0 / n_columns), len(panels)
    width, height = max(4.2, 1.9 + cell * n_columns), max(1.5 if n > 1 else 2.4, 0.9 + 0.82 * cell * n_rows)
    with plot(width, n * height) as figure:
        scale = _common_scale(panels, [panel.values for panel in panels])
        all_axes = figure.subplots(n, squeeze=False)[:, 0]
        for axes, panel, title in zip(all_axes, panels, results, strict=True):
            draw_cells(axes, panel.values, scale)
            if panel.size <= _MOST_CELLS_WITH_NUMBERS:
                _write_numbers(axes, panel.values, scale)
            label_axis(axes, "x", _names(panel, columns), _axis_label(columns))
            label_axis(axes, "y", _names(panel, rows), _axis_label(rows))
            axes.set_title(title)
        add_color_bar(figure, list(all_axes), scale, unit_of(panels[0]))
    return figure


def layer_position_map(
    result: xr.DataArray, inputs: Inputs | None = None, *, collapse: str = "mean", title: str | None = None
) -> Figure:
    """A cell for every layer and token, [layer, position], with the tokens written along the axis.

    With `inputs` (one prompt) each picture is one column: the "mean" of its patches, their "sum", or the one farthest
    from what does nothing ("max"). Without, and where the result holds positions patched together, tokens are named by
    the result's own `label` coordinate, or numbered. Raises `InputError` if the result has other axes longer than one,
    and for an unknown `collapse`.

    >>> figure = layer_position_map(xr.DataArray([[0.5, 1.0]], dims=("layer", "position"), name="probability"))
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
    ['0', '1']
    """
    result = only(result, "layer", "position")
    name = subject_of(result) if title is None else title
    return layer_position_maps({name: result}, inputs, collapse=collapse)


def layer_position_maps(
    results: Mapping[str, xr.DataArray], inputs: Inputs | None = None, *, collapse: str = "mean"
) -> Figure:
    """Several results [layer, position] of the same positions below each other, on one colour scale.

    Each stands under its name; the tokens are written below the last. Otherwise as `layer_position_map`.

    >>> parts = xr.DataArray(np.eye(2), dims=("layer", "position"))
    >>> figure = layer_position_maps({"attn_out": parts, "mlp_out": -parts})
    >>> [axes.get_title(loc="left") for axes in figure.axes[:2]]
    ['attn_out', 'mlp_out']
    """
    panels = [only(result, "layer", "position") for result in results.values()]
    if any(panel["position"].values.tolist() != panels[0]["position"].values.tolist() for panel in panels):
        raise InputError("The results are about different positions; draw them one at a time with layer_position_map.")
    labels, columns = zip(*(_columns(panel, inputs, collapse) for panel in panels), strict=True)
    n_layers, n_columns, n = max(values.shape[0] for values in columns), len(labels[0]), len(panels)
    each = max(1.6 if n > 1 else 2.0, 0.35 + min(0.24, (9.0 if n == 1 else 5.0) / n_layers) * n_layers)
    with plot(min(12.0, max(4.6, 1.9 + 0.3 * n_columns)), n * each + 1.0) as figure:
        scale = _common_scale(panels, list(columns))
        all_axes = figure.subplots(n, squeeze=False, sharex=True)[:, 0]
        for axes, panel, values, title in zip(all_axes, panels, columns, results, strict=True):
            draw_cells(axes, values, scale)
            axes.tick_params("x", length=0)
            label_axis(axes, "y", panel["layer"].values, "layer")
            axes.set_title(title)
        size = 8 if n_columns <= 40 else 6
        all_axes[-1].set_xticks(np.arange(n_columns) + 0.5, labels[0], rotation=90, fontsize=size)
        add_color_bar(figure, list(all_axes), scale, unit_of(panels[0]))
    return figure


def draw_cells(axes: Axes, values: np.ndarray, scale: ColorScale) -> QuadMesh:
    """Values [row, column] as cells with thin gaps, row 0 on top; cell (r, c) covers c to c + 1 and r to r + 1."""
    gap = 0.8 if values.size <= 2000 else 0.0
    mesh = axes.pcolormesh(values, cmap=scale.map, norm=scale.norm(), edgecolors=PAPER, linewidth=gap)
    axes.invert_yaxis()
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def label_axis(axes: Axes, which: Literal["x", "y"], names: Sequence[object] | np.ndarray, label: str) -> None:
    """Names at the middle of the cells along one axis, thinned out where there are many."""
    step = tick_every(len(names))
    at = np.arange(0, len(names), step)
    texts = [str(names[i]) for i in at]
    if which == "x":
        axes.set_xticks(at + 0.5, texts)
        axes.set_xlabel(label)
    else:
        axes.set_yticks(at + 0.5, texts)
        axes.set_ylabel(label)
    axes.tick_params(which, length=0)


def _common_scale(panels: Sequence[xr.DataArray], values: Sequence[np.ndarray]) -> ColorScale:
    return scale_of(panels[0], np.concatenate([drawn.ravel() for drawn in values]))


def _names(result: xr.DataArray, axis: str) -> np.ndarray:
    """What stands at the places of an axis."""
    return result["label"].values if axis == "position" and "label" in result.coords else result[axis].values


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


def _columns(result: xr.DataArray, inputs: Inputs | None, collapse: str) -> tuple[list[str], np.ndarray]:
    """Labels and values [layer, column], with each picture's patches in one column."""
    positions = result["position"].values.tolist()
    if inputs is None or "n_positions" in result.coords:
        names = result["label"].values if "label" in result.coords else positions
        return [_short(str(name)) for name in names], result.values
    token_map = inputs.token_map
    if max(positions) >= len(token_map):
        raise InputError(
            f"The result has position {max(positions)} and the prompt {len(token_map)} positions; "
            "give the inputs that the result was made from."
        )
    picture_of = {p: i for i in range(token_map.n_images) for p in token_map.image(i)}
    labels, columns = [], []
    groups: dict[object, list[int]] = {}
    for index, position in enumerate(positions):
        groups.setdefault(("picture", picture_of[position]) if position in picture_of else position, []).append(index)
    for key, indices in groups.items():
        block = result.values[:, indices]
        if isinstance(key, tuple):
            number = f" {key[1]}" if token_map.n_images > 1 else ""
            labels.append(f"picture{number} ({collapse} of {len(indices)})")
            columns.append(_collapsed(block, collapse, float(result.attrs.get("neutral", 0.0))))
        else:
            labels.append(_short(token_map.labels[positions[indices[0]]]))
            columns.append(block[:, 0])
    return labels, np.stack(columns, axis=1)


def _collapsed(block: np.ndarray, collapse: str, neutral: float) -> np.ndarray:
    """One value for all patches; sums are of what each differs from the neutral value by."""
    if collapse == "max":
        return np.take_along_axis(block, np.abs(block - neutral).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    if collapse not in COLLAPSES:
        raise InputError(f"collapse={collapse!r}; expected 'mean', 'sum' or 'max'.")
    return block.mean(axis=1) if collapse == "mean" else neutral + (block - neutral).sum(axis=1)


def _short(label: str) -> str:
    """A token's text that fits on an axis; `$` would begin a formula."""
    shown = (label.strip(" ") or repr(label)).replace("\n", "\\n").replace("$", r"\$")
    return shown if len(shown) <= _LONGEST_LABEL else shown[: _LONGEST_LABEL - 1] + "…"
