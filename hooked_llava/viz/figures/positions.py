"""Maps of a number by layer and token; one, or several on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.spans import image_parts
from hooked_llava.viz.figures.maps import label_axis, names_along, stacked_maps
from hooked_llava.viz.style import (
    ORANGE,
    PAGE_WIDTH,
    PAPER,
    require_dims,
    token_label,
)
from hooked_llava.viz.titles import title_of

Collapse = Literal["mean", "sum", "max"]
"""What may stand for all patches of an image: their mean, their sum, or the one farthest from what does nothing."""
_short = partial(token_label, longest=14)
_IMAGE_WIDTH = 24  # of a text token's column: what the patches of an image take together, at most


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
    """Several results [layer, position] of the same positions below each other, on one color scale.

    Each has its name as title; the tokens are written below the last, those at `marked` positions in orange. `about` are
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
    size = min(12.0, max(PAGE_WIDTH, 1.4 + 0.2 * edges[-1])), n * each + 1.0
    with stacked_maps(results, values, panels[0], size, columns=edges, about=about) as (figure, all_axes, _):
        for axes, panel in zip(all_axes, panels, strict=True):
            axes.tick_params("x", length=0)
            label_axis(axes, "y", names_along(panel, "layer"), "layer")
        _name_groups(all_axes[-1], groups, marked)
    return figure


@dataclass(frozen=True)
class _Group:
    """Neighboring columns under one name: a token, or an image.

    Attributes:
        indices (list[int]): Where the result has them.
        n_columns (int): As many as positions, or one.
    """

    name: str
    positions: list[int]
    indices: list[int]
    n_columns: int

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
    parts = image_parts(token_map.image_starts, token_map.layouts)
    part_of = {p: i for i, (_, part) in enumerate(parts) for p in part}
    found: dict[object, list[int]] = {}
    for index, position in enumerate(positions):
        found.setdefault(("image", part_of[position]) if position in part_of else position, []).append(index)
    groups = []
    for key, indices in found.items():
        here = [positions[i] for i in indices]
        if not isinstance(key, tuple):
            groups.append(_Group(_short(token_map.labels[here[0]]), here, indices, 1))
            continue
        name, size = parts[key[1]][0], len(parts[key[1]][1])
        count = str(size) if size == len(indices) else f"{len(indices)} of {size}"
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
