"""Maps of a number by layer and head, by layer and position, or by any two axes; one, or several on one scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.viz.style import (
    ORANGE,
    PAPER,
    ColorScale,
    add_color_bar,
    plot,
    require_dims,
    scale_of,
    tick_every,
    token_label,
    unit_of,
)
from hooked_llava.viz.titles import add_note, title_of

Collapse = Literal["mean", "sum", "max"]
"""What may stand for all patches of an image: their mean, their sum, or the one farthest from what does nothing."""
_MOST_CELLS_WITH_NUMBERS = 144
_short = partial(token_label, longest=14)
_IMAGE_WIDTH = 24  # of a text token's column: what the patches of an image take together, at most
_NARROW = 0.9  # of a text token's column: what leaves no room for gaps


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
    result = require_dims(result, rows, columns)
    name = title_of(result) if title is None else title
    return cell_maps({name: result}, rows, columns, about={} if title == "" else result.attrs)


def cell_maps(
    results: Mapping[str, xr.DataArray], rows: str, columns: str, *, about: Mapping[str, Any] | None = None
) -> Figure:
    """Several results of the same axes below each other, each under its name, on one colour scale.

    `about` are attributes of the whole, as analyses give them, which a note below tells.

    >>> maps = xr.DataArray(np.eye(2), dims=("layer", "head"))
    >>> figure = cell_maps({"q": maps, "k": 2 * maps}, "layer", "head")
    >>> [axes.get_title(loc="left") for axes in figure.axes[:2]]
    ['q', 'k']
    """
    panels = [require_dims(result, rows, columns) for result in results.values()]
    n_rows, n_columns = (max(panel.shape[axis] for panel in panels) for axis in (0, 1))
    cell, n = min(0.46, 9.0 / n_columns), len(panels)
    width, height = max(4.2, 1.9 + cell * n_columns), max(1.5 if n > 1 else 2.4, 0.9 + 0.82 * cell * n_rows)
    with plot(width, n * height) as figure:
        scale = scale_of(panels[0], _all(panel.values for panel in panels))
        all_axes = figure.subplots(n, squeeze=False)[:, 0]
        for axes, panel, title in zip(all_axes, panels, results, strict=True):
            draw_cells(axes, panel.values, scale)
            if panel.size <= _MOST_CELLS_WITH_NUMBERS:
                _write_numbers(axes, panel.values, scale)
            label_axis(axes, "x", names_along(panel, columns), _axis_label(columns))
            label_axis(axes, "y", names_along(panel, rows), _axis_label(rows))
            axes.set_title(title)
        add_color_bar(figure, list(all_axes), scale, unit_of(panels[0]), _all(panel.values for panel in panels))
        add_note(figure, about or {})
    return figure


def layer_position_map(
    result: xr.DataArray, inputs: Inputs | None = None, *, collapse: Collapse | None = None, title: str | None = None
) -> Figure:
    """A cell for every layer and token, [layer, position], with the tokens written along the axis.

    With `inputs` (one prompt) the patches of each image stand side by side, row by row, in columns narrower than those of
    the text. With `collapse` an image is one column, which says what it shows: the "mean" of its patches, their "sum", or
    the one farthest from what does nothing ("max"). Without inputs, and where the result holds positions patched
    together, tokens are named by the result's own `label` coordinate, or numbered. Raises `InputError` if the result has
    other axes longer than one, and for an unknown `collapse`.

    >>> figure = layer_position_map(xr.DataArray([[0.5, 1.0]], dims=("layer", "position"), name="probability"))
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
    ['0', '1']
    """
    result = require_dims(result, "layer", "position")
    name = title_of(result) if title is None else title
    return layer_position_maps({name: result}, inputs, collapse=collapse, about={} if title == "" else result.attrs)


def layer_position_maps(
    results: Mapping[str, xr.DataArray],
    inputs: Inputs | None = None,
    *,
    collapse: Collapse | None = None,
    marked: Sequence[int] = (),
    about: Mapping[str, Any] | None = None,
) -> Figure:
    """Several results [layer, position] of the same positions below each other, on one colour scale.

    Each stands under its name; the tokens are written below the last, those at `marked` positions in orange. `about` are
    attributes of the whole, which a note below tells. Otherwise as `layer_position_map`.

    >>> parts = xr.DataArray(np.eye(2), dims=("layer", "position"))
    >>> figure = layer_position_maps({"attn_out": parts, "mlp_out": -parts})
    >>> [axes.get_title(loc="left") for axes in figure.axes[:2]]
    ['attn_out', 'mlp_out']
    """
    if collapse is not None:
        one_of(collapse, get_args(Collapse), "collapse", expected="None, 'mean', 'sum' or 'max'")
    panels = [require_dims(result, "layer", "position") for result in results.values()]
    if any(panel["position"].values.tolist() != panels[0]["position"].values.tolist() for panel in panels):
        raise InputError("The results are about different positions; draw them one at a time with layer_position_map.")
    groups = _groups(panels[0], inputs, collapse)
    values = [_drawn(panel, groups, collapse) for panel in panels]
    edges, n_layers, n = _edges(groups), max(panel.sizes["layer"] for panel in panels), len(panels)
    each = max(1.6 if n > 1 else 2.0, 0.35 + min(0.24, (9.0 if n == 1 else 5.0) / n_layers) * n_layers)
    with plot(min(12.0, max(4.6, 1.9 + 0.3 * edges[-1])), n * each + 1.0) as figure:
        scale = scale_of(panels[0], _all(values))
        all_axes = figure.subplots(n, squeeze=False, sharex=True)[:, 0]
        for axes, panel, drawn, title in zip(all_axes, panels, values, results, strict=True):
            draw_cells(axes, drawn, scale, columns=edges)
            axes.tick_params("x", length=0)
            label_axis(axes, "y", names_along(panel, "layer"), "layer")
            axes.set_title(title)
        _name_groups(all_axes[-1], groups, marked)
        add_color_bar(figure, list(all_axes), scale, unit_of(panels[0]), _all(values))
        add_note(figure, about or {})
    return figure


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
    mesh.set_rasterized(narrow)  # as vectors, narrow neighbours would show seams
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
    """What stands at the places of an axis, by the result's own coordinates: `label` of positions, `layer_name` of streams.

    >>> names_along(xr.DataArray([1.0, 2.0], dims="layer", coords={"layer": [3, 5]}), "layer")
    ['3', '5']
    """
    of = {"position": "label", "layer": "layer_name", "stream": "layer_name"}.get(axis)
    named = of in result.coords and result[of].dims == (axis,)
    return [str(name) for name in result[of if named else axis].values]


def _all(values: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([panel.ravel() for panel in values])


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


@dataclass(frozen=True)
class _Group:
    """Neighbouring columns under one name: a token, or an image."""

    name: str
    positions: list[int]
    indices: list[int]
    """Where the result has them."""
    n_columns: int
    """As many as positions, or one."""

    @property
    def width(self) -> float:
        """In columns of text."""
        return float(min(self.n_columns, _IMAGE_WIDTH))


def _groups(result: xr.DataArray, inputs: Inputs | None, collapse: Collapse | None) -> list[_Group]:
    """What the columns are: tokens in their order, with the patches of each image together."""
    positions = [int(p) for p in result["position"].values]
    if inputs is None or "n_positions" in result.coords:
        names = names_along(result, "position")
        return [_Group(_short(name), [p], [i], 1) for i, (name, p) in enumerate(zip(names, positions, strict=True))]
    token_map = inputs.token_map
    if max(positions) >= len(token_map):
        raise InputError(
            f"The result has position {max(positions)} and the prompt {len(token_map)} positions; "
            "give the inputs that the result was made from."
        )
    image_of = {p: i for i, image in enumerate(token_map.image_ranges) for p in image}
    found: dict[object, list[int]] = {}
    for index, position in enumerate(positions):
        found.setdefault(("image", image_of[position]) if position in image_of else position, []).append(index)
    groups = []
    for key, indices in found.items():
        here = [positions[i] for i in indices]
        if not isinstance(key, tuple):
            groups.append(_Group(_short(token_map.labels[here[0]]), here, indices, 1))
            continue
        size = len(token_map.image_ranges[key[1]])
        count = str(size) if size == len(indices) else f"{len(indices)} of {size}"
        name = f"image {key[1]}" if token_map.n_images > 1 else "image"
        how = (
            f"{count} patch{'' if count == '1' else 'es'}, row by row" if collapse is None else f"{collapse} of {count}"
        )
        groups.append(_Group(f"{name} ({how})", here, indices, 1 if collapse else len(indices)))
    return groups


def _drawn(result: xr.DataArray, groups: Sequence[_Group], collapse: Collapse | None) -> np.ndarray:
    """Values [layer, column] in the order of the groups, an image collapsed where it is one column."""
    neutral = float(result.attrs.get("neutral", 0.0))
    blocks = []
    for group in groups:
        block = result.values[:, group.indices]
        one = collapse is not None and group.n_columns < len(group.indices)
        blocks.append(_collapsed(block, collapse, neutral)[:, None] if one and collapse else block)
    return np.concatenate(blocks, axis=1)


def _edges(groups: Sequence[_Group]) -> np.ndarray:
    """Borders of the columns, in columns of text."""
    widths = [group.width / group.n_columns for group in groups for _ in range(group.n_columns)]
    return np.concatenate([[0.0], np.cumsum(widths)])


def _name_groups(axes: Axes, groups: Sequence[_Group], marked: Sequence[int]) -> None:
    """Names below the columns: along them for tokens, across for an image that has room."""
    ends = np.cumsum([group.width for group in groups])
    middles = ends - [group.width / 2 for group in groups]
    size = 8 if ends[-1] <= 40 else 6
    axes.set_xticks(middles, [group.name for group in groups], rotation=90, fontsize=size)
    for label, group in zip(axes.get_xticklabels(), groups, strict=True):
        if group.n_columns > 1 and 3 * group.width >= len(group.name):
            label.set_rotation(0)
        if set(group.positions) & set(marked):
            label.set(color=ORANGE, fontweight="bold")
    for group, end in zip(groups, ends, strict=True):
        if group.n_columns > 1:
            for border in {end - group.width, end} - {0.0, ends[-1]}:
                axes.axvline(border, color=PAPER, linewidth=1.2)


def _collapsed(block: np.ndarray, collapse: Collapse, neutral: float) -> np.ndarray:
    """One value for all patches; sums are of what each differs from the neutral value by."""
    if collapse == "max":
        return np.take_along_axis(block, np.abs(block - neutral).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    return block.mean(axis=1) if collapse == "mean" else neutral + (block - neutral).sum(axis=1)
