"""Numbers by patch, drawn on the original image where the patches lie."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.prompt.images import ImageLike, load_image
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.viz.style import (
    DIVERGING,
    INK,
    PAGE_WIDTH,
    PAPER,
    ColorScale,
    add_color_bar,
    add_heading,
    color_scale,
    hide_axes,
    plot,
    scale_of,
    unit_of,
)
from hooked_llava.viz.titles import add_note, shown_title, title_of

Grid = xr.DataArray | np.ndarray | Tensor
"""Values by patch, [patch_row, patch_col]; or by position of the image, [feature]."""
Underlay = Literal["grey", "color"]
"""How the image below the values looks: without its colors, which could be taken for values, or with them, faded."""
_PLACES = ("patch_row", "patch_col", "feature")
_SMALL = 160
_BAR = 0.9  # inches of the color bar with its numbers and its unit
_FADE = 0.75
_MOST_OPAQUE = 0.92
_GROUND = 0.8  # the grey that stands for the image in the color bar


def patch_overlay(
    inputs: Inputs | ImageLike,
    grid: Grid,
    *,
    image: int = 0,
    layout: ImageLayout | None = None,
    underlay: Underlay = "grey",
    title: str | None = None,
) -> Figure:
    """One number for each patch, [patch_row, patch_col], laid over the original image.

    With `Inputs` every patch is drawn where the processor's resizing and cropping took it from
    (`token_map.patch_box`), and what was cut away is dimmed. With an image alone the patches divide all of it, unless
    `layout` says otherwise. The image is faded to grey, so that every color in the figure is a value; underlay="color"
    keeps its colors, faded. A patch is the more opaque the larger its value.

    Where an image has several grids of patches, give one number for each of its positions, [feature]: the mean of the
    grids is drawn, each by the area that its patches show (`ImageLayout.draw`).

    Raises `InputError` for another number of values than the image has patches.

    >>> figure = patch_overlay(np.zeros((30, 60, 3), dtype=np.uint8), np.eye(3))
    >>> figure.axes[0].collections[0].get_coordinates()[-1, -1].tolist()
    [60.0, 30.0]
    """
    values = _grid_values(grid)
    original, layout = _original(inputs, image, layout, values.shape)
    scale = scale_of(grid, values) if isinstance(grid, xr.DataArray) else color_scale(values)
    width, height = _panel_size(original, 3.6)
    with plot(width + _BAR, height + 0.4) as figure:
        axes = figure.add_subplot()
        draw_overlay(axes, original, values, scale, layout, underlay)
        subject, unit = (title_of(grid), unit_of(grid)) if isinstance(grid, xr.DataArray) else ("", "value")
        axes.set_title(subject if title is None else title)
        add_color_bar(figure, axes, scale, unit, values, colors=_as_overlaid(scale))
        add_note(figure, grid.attrs if isinstance(grid, xr.DataArray) else {}, title)
    return figure


def patch_overlays(
    inputs: Inputs | ImageLike,
    result: xr.DataArray,
    *,
    image: int = 0,
    layout: ImageLayout | None = None,
    columns: int = 4,
    underlay: Underlay = "grey",
    title: str | None = None,
) -> Figure:
    """Small multiples of `patch_overlay` on one color scale: result has one axis besides patch_row and patch_col (or feature).

    Raises `InputError` as `patch_overlay`, and for a result with other axes.

    >>> maps = xr.DataArray(np.ones((3, 2, 2)), dims=("layer", "patch_row", "patch_col"))
    >>> figure = patch_overlays(np.zeros((8, 8, 3), dtype=np.uint8), maps)
    >>> [axes.get_title() for axes in figure.axes[:3]]
    ['layer 0', 'layer 1', 'layer 2']
    """
    over = [str(dim) for dim in result.dims if dim not in _PLACES]
    places = [dim for dim in _PLACES if dim in result.dims]
    if len(over) != 1 or places not in (["feature"], ["patch_row", "patch_col"]):
        raise InputError(
            f"patch_overlays draws one image along one axis; the result has {', '.join(map(str, result.dims))}. "
            "Expected patch_row, patch_col and one more; choose or average the others first."
        )
    result = result.transpose(over[0], *places)
    original, layout = _original(inputs, image, layout, result.shape[1:])
    scale, n = scale_of(result), result.shape[0]
    columns = min(columns, n)
    rows, heading = -(-n // columns), shown_title(result, title)
    width, height = _panel_size(original, (PAGE_WIDTH - _BAR) / max(columns, 3))
    with plot(columns * width + _BAR, rows * (height + 0.24) + (0.3 if heading else 0.1)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes, values, name in zip(panels.flat, result.values, result[over[0]].values, strict=False):
            draw_overlay(axes, original, values, scale, layout, underlay)
            label = str(name) if isinstance(name, str) else f"{over[0]} {name}"
            axes.set_title(label, fontsize=8, fontweight="normal", loc="center", pad=3)
        for axes in panels.flat[n:]:
            axes.set_visible(False)
        add_heading(figure, heading)
        add_note(figure, result.attrs, title)
        add_color_bar(figure, panels, scale, unit_of(result), result.values, colors=_as_overlaid(scale))
    return figure


def draw_overlay(
    axes: Axes,
    original: Image.Image,
    values: np.ndarray,
    scale: ColorScale,
    layout: ImageLayout | None,
    underlay: Underlay = "grey",
) -> None:
    """An image in its own pixel coordinates, what the crop cut away dimmed, and the patches over it."""
    one_of(underlay, get_args(Underlay), "underlay")
    draw_image(axes, np.asarray(original if underlay == "color" else original.convert("L").convert("RGB")), fade=_FADE)
    how: dict[str, Any] = {"cmap": _vivid(scale), "norm": scale.norm()}
    borders = _borders(original, values, layout)
    if borders is None:
        assert layout is not None
        values = layout.draw(_by_feature(values, layout))
        mapped: Any = axes.imshow(
            values, extent=(0, original.width, original.height, 0), interpolation="nearest", **how
        )
    else:
        # As vectors, neighbouring patches would show seams.
        mapped = axes.pcolormesh(*borders, values, linewidth=0, rasterized=True, **how)
    mapped.set_alpha(_opacity(values, scale))  # one for each patch, which matplotlib's types leave out
    if layout is not None:
        mark_crop(axes, layout)
    axes.set_xlim(0, original.width)
    axes.set_ylim(original.height, 0)


def draw_image(axes: Axes, pixels: np.ndarray, *, fade: float = 0.0) -> None:
    """An image [height, width, 3] such that pixel column i covers i to i + 1; `fade` mixes it with its light grey."""
    height, width = pixels.shape[:2]
    if fade:
        grey = pixels.astype(np.float64).mean(axis=-1, keepdims=True)
        pixels = ((1 - fade) * pixels + fade * (120 + grey * 135 / 255)).astype(np.uint8)
    how = "nearest" if max(height, width) <= _SMALL else "antialiased"
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation=how)
    hide_axes(axes)


def _borders(
    original: Image.Image, values: np.ndarray, layout: ImageLayout | None
) -> tuple[Float[np.ndarray, " column_border"], Float[np.ndarray, " row_border"]] | None:
    """The borders of patch columns and rows in the original's pixels, where the patches lie side by side.

    Without a layout they divide the image evenly.
    """
    if layout is None:
        rows, columns = values.shape
        return np.linspace(0.0, original.width, columns + 1), np.linspace(0.0, original.height, rows + 1)
    if values.ndim == 1:
        return None
    x, y = layout.grids[0].columns.borders, layout.grids[0].rows.borders
    return None if x is None or y is None else (x, y)


def _by_feature(values: np.ndarray, layout: ImageLayout) -> Float[np.ndarray, " feature"]:
    """Values by patch of the only grid as values by position."""
    if values.ndim == 1:
        return values
    by_feature = np.full(layout.n_features, np.nan)
    by_feature[layout.cell_features(layout.names[0])] = values
    return by_feature


def _original(
    inputs: Inputs | ImageLike, image: int, layout: ImageLayout | None, shape: tuple[int, ...]
) -> tuple[Image.Image, ImageLayout | None]:
    """The image to draw on, and its layout if it knows the original's pixels."""
    if isinstance(inputs, Inputs):
        if inputs.images is None or not 0 <= image < len(inputs.images):
            held = "none are known" if inputs.images is None else f"there are {len(inputs.images)}"
            raise InputError(
                f"Cannot draw on original image {image}: {held}. Use prepare(question, images=...), which keeps "
                "them, or give an image in place of the inputs."
            )
        layout = layouts_of(inputs)[image]
        original = inputs.images[image]
    else:
        original = load_image(inputs)
    if layout is None or layout.original_size is None:
        if len(shape) == 1:
            raise InputError("Values by position of an image need its layout; give inputs made by prepare, or layout=.")
        return original, None
    expected = [(layout.n_features,), *(grid.shape for grid in layout.grids if len(layout.grids) == 1)]
    if shape not in expected:
        given = f"{shape[0]} by position" if len(shape) == 1 else f"{shape[0]} x {shape[1]} (patch_row x patch_col)"
        several = "" if len(layout.grids) == 1 else f" in several grids, {layout.n_features} positions in all"
        raise InputError(
            f"The values are {given} and the image has {layout} patches{several}; "
            f"give one value per {'position' if several else 'patch'}."
        )
    return original, layout


def layouts_of(inputs: Inputs) -> list[ImageLayout]:
    """The layouts of the images of all prompts."""
    return [layout for token_map in inputs.token_maps for layout in token_map.layouts]


def _grid_values(grid: Grid) -> Float[np.ndarray, "..."]:
    if isinstance(grid, xr.DataArray):
        kept = [dim for dim in grid.dims if dim in _PLACES or grid.sizes[dim] > 1]
        values = grid.squeeze([dim for dim in grid.dims if dim not in kept], drop=True)
        if set(kept) == {"patch_row", "patch_col"}:
            values = values.transpose("patch_row", "patch_col")
        values = values.values
    else:
        values = grid.detach().float().cpu().numpy() if isinstance(grid, Tensor) else grid
    if values.ndim not in (1, 2):
        raise InputError(
            f"The values have the shape {values.shape}; expected one number per patch, [patch_row, patch_col]. "
            "Choose or average the other axes first, or draw one axis with patch_overlays."
        )
    return values.astype(np.float64)


def _panel_size(image: Image.Image, longest: float) -> tuple[float, float]:
    """Width and height in inches, the longer of them as given."""
    scale = longest / max(image.size)
    return max(0.5, image.width * scale), max(0.5, image.height * scale)


def mark_crop(axes: Axes, layout: ImageLayout) -> None:
    """Dim what no patch shows, and draw a line around what patches show, if that is not the whole image."""
    cut = layout.cut_boxes()
    if not cut:
        return
    for x0, y0, x1, y1 in cut:
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=PAPER, alpha=0.7, linewidth=0))
    left, top, right, bottom = layout.visible_box()
    frame = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=INK, linewidth=1.0, label="seen")
    frame.set_clip_on(False)
    axes.add_patch(frame)


def _vivid(scale: ColorScale) -> Colormap:
    """The scale's map without its palest part where values only grow: faint patches are transparent already."""
    return scale.map if scale.name == DIVERGING else ListedColormap(scale.map(np.linspace(0.25, 1.0, 256)))


def _opacity(values: np.ndarray, scale: ColorScale) -> np.ndarray:
    """0 at the neutral value, and rising fastest there, so that half the largest effect is still seen well."""
    away = np.abs(np.nan_to_num(values - scale.neutral))  # what is not a number is not drawn
    part = np.clip(away / (scale.high - scale.neutral), 0, 1)
    return _MOST_OPAQUE * np.sqrt(part)


def _as_overlaid(scale: ColorScale) -> Colormap:
    """The colors as they look on a light grey image, for the color bar."""
    values = np.linspace(scale.low, scale.high, 256)
    opaque = _opacity(values, scale)[:, None]
    return ListedColormap(opaque * _vivid(scale)(scale.norm()(values))[:, :3] + (1 - opaque) * _GROUND)
