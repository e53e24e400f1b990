"""A patch map as Yu & Ananiadou (arXiv 2411.10950) display it: as shares, enlarged smoothly, in grey over the grey image."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from PIL import Image

from hooked_llava.architecture.grid import Grid
from hooked_llava.architecture.layout import ALL, ImageLayout
from hooked_llava.errors import InputError
from hooked_llava.results.map_quality import shares
from hooked_llava.viz.style import ColorScale

_GREY, _OPAQUE = "gray", 0.8
"""The color map and the opacity of the paper's code."""


def draw_enlarged(
    axes: Axes, values: np.ndarray, layout: ImageLayout | None, size: tuple[int, int], grid: str
) -> ColorScale:
    """Lay the map over an image of this size (width, height) that is drawn already; the scale of its shares.

    Raises `InputError` for a map without a finite number.
    """
    known = _shares(values)
    drawn = _whole(known, size) if layout is None else _by_layout(known, layout, grid)
    scale = ColorScale(_GREY, 0.0, float(np.nanmax(known)) or 1.0)
    axes.imshow(drawn, extent=(0, size[0], size[1], 0), cmap=_GREY, norm=scale.norm(), alpha=_OPAQUE)
    return scale


def _shares(values: np.ndarray) -> np.ndarray:
    """The map less its smallest value, over the sum; what is no number stays so."""
    if not np.isfinite(values).any():
        raise InputError(
            "The map has no finite number, so there is nothing to display; give one with display='values'."
        )
    return shares(values, n_axes=values.ndim)


def _whole(values: Float[np.ndarray, "row col"], size: tuple[int, int]) -> Float[np.ndarray, "height width"]:
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))


def _by_layout(values: np.ndarray, layout: ImageLayout, name: str) -> Float[np.ndarray, "height width"]:
    """The mean of the enlarged grids; NaN where none shows anything."""
    by_feature = values if values.ndim == 1 else layout.fold({layout.names[0]: values})
    cells = layout.unfold(by_feature)
    chosen = layout.grids if name == ALL else (layout.grid(name),)
    drawn = [one for grid in chosen if (one := _enlarged(cells[grid.name], grid)) is not None]
    known = ~np.isnan(np.stack(drawn))
    total, count = np.where(known, np.stack(drawn), 0.0).sum(0), known.sum(0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _enlarged(cells: Float[np.ndarray, "row col"], grid: Grid) -> Float[np.ndarray, "height width"] | None:
    """One grid's map at the pixels of the original that it shows; None if it shows none, or has no number."""
    rows, columns = grid.rows.lengths > 0, grid.columns.lengths > 0
    shown = cells[np.ix_(rows, columns)]
    if not shown.size or not np.isfinite(shown).any():
        return None
    assert grid.original_size is not None
    height, width = grid.original_size
    (left, right), (top, bottom) = ((axis.stretches[0][0], axis.stretches[-1][1]) for axis in (grid.columns, grid.rows))
    x0, x1, y0, y1 = round(left), max(round(left) + 1, round(right)), round(top), max(round(top) + 1, round(bottom))
    canvas = np.full((height, width), np.nan)
    canvas[y0:y1, x0:x1] = _whole(np.nan_to_num(shown), (x1 - x0, y1 - y0))
    return canvas
