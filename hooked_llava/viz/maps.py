"""Maps of a number by layer and head, or by layer and position."""

from __future__ import annotations

from collections.abc import Sequence
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
    """A cell for every head, [layer, head], coloured by its value; small maps also show the numbers.

    Raises `InputError` if the result has other axes longer than one.

    >>> figure = layer_head_map(xr.DataArray([[0.5, -1.0]], dims=("layer", "head"), name="logit"))
    >>> figure.axes[0].get_xlabel(), figure.axes[0].get_title(loc="left")
    ('head', 'Logit')
    """
    result = only(result, "layer", "head")
    n_layers, n_heads = result.shape
    cell = min(0.46, 9.0 / n_heads)
    with plot(max(4.2, 1.9 + cell * n_heads), max(2.4, 0.9 + 0.82 * cell * n_layers)) as figure:
        axes, scale = figure.add_subplot(), scale_of(result)
        draw_cells(axes, result.values, scale)
        if result.size <= _MOST_CELLS_WITH_NUMBERS:
            _write_numbers(axes, result.values, scale)
        label_axis(axes, "x", result["head"].values, "head")
        label_axis(axes, "y", result["layer"].values, "layer")
        axes.set_title(subject_of(result) if title is None else title)
        add_color_bar(figure, axes, scale, unit_of(result))
    return figure


def layer_position_map(
    result: xr.DataArray, inputs: Inputs | None = None, *, collapse: str = "mean", title: str | None = None
) -> Figure:
    """A cell for every layer and token, [layer, position], with the tokens written along the axis.

    With `inputs` (one prompt) each picture is one column: the "mean" of its patches, their "sum", or the one farthest
    from 0 ("max"). Without, tokens are named by the result's own `label` coordinate, or numbered. Raises `InputError`
    if the result has other axes longer than one, and for an unknown `collapse`.

    >>> figure = layer_position_map(xr.DataArray([[0.5, 1.0]], dims=("layer", "position"), name="probability"))
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
    ['0', '1']
    """
    result = only(result, "layer", "position")
    labels, values = _columns(result, inputs, collapse)
    n_layers, n_columns = values.shape
    with plot(min(12.0, max(4.6, 1.9 + 0.3 * n_columns)), max(2.8, 1.7 + 0.24 * n_layers)) as figure:
        axes, scale = figure.add_subplot(), scale_of(result, values)
        draw_cells(axes, values, scale)
        axes.set_xticks(np.arange(n_columns) + 0.5, labels, rotation=90, fontsize=8 if n_columns <= 40 else 6)
        axes.tick_params("x", length=0)
        label_axis(axes, "y", result["layer"].values, "layer")
        axes.set_title(subject_of(result) if title is None else title)
        add_color_bar(figure, axes, scale, unit_of(result))
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


def _write_numbers(axes: Axes, values: np.ndarray, scale: ColorScale) -> None:
    digits = 2 if scale.high < 1 else 1
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value) and abs(value) >= 0.5 * 10**-digits:  # what rounds to 0 stays empty
            text = f"{value:.{digits}f}"
            axes.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=scale.ink(float(value))
            )


def _columns(result: xr.DataArray, inputs: Inputs | None, collapse: str) -> tuple[list[str], np.ndarray]:
    """Labels and values [layer, column], with each picture's patches in one column."""
    positions = result["position"].values.tolist()
    if inputs is None:
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
            columns.append(_collapsed(block, collapse))
        else:
            labels.append(_short(token_map.labels[positions[indices[0]]]))
            columns.append(block[:, 0])
    return labels, np.stack(columns, axis=1)


def _collapsed(block: np.ndarray, collapse: str) -> np.ndarray:
    if collapse == "max":
        return np.take_along_axis(block, np.abs(block).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    if collapse not in COLLAPSES:
        raise InputError(f"collapse={collapse!r}; expected 'mean', 'sum' or 'max'.")
    return block.mean(axis=1) if collapse == "mean" else block.sum(axis=1)


def _short(label: str) -> str:
    """A token's text that fits on an axis; `$` would begin a formula."""
    shown = (label.strip(" ") or repr(label)).replace("\n", "\\n").replace("$", r"\$")
    return shown if len(shown) <= _LONGEST_LABEL else shown[: _LONGEST_LABEL - 1] + "…"
