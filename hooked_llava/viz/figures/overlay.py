"""Numbers by patch, drawn on the original image where the patches lie."""

from __future__ import annotations

import textwrap
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

from hooked_llava.architecture.layout import ALL, ImageLayout
from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.prompt.images import ImageLike, load_image
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.results.image_axes import BY_FEATURE, BY_PATCH, image_dims
from hooked_llava.viz.figures.enlarged import draw_enlarged
from hooked_llava.viz.style import (
    DIVERGING,
    INK,
    PAGE_WIDTH,
    PAPER,
    ColorScale,
    Plot,
    add_color_bar,
    add_heading,
    color_scale,
    hide_axes,
    plot,
    scale_of,
    unit_of,
)
from hooked_llava.viz.titles import add_note, shown_title, title_of

Values = xr.DataArray | np.ndarray | Tensor
"""Values by patch, [patch_row, patch_col]; or by position of the image, [feature]."""
Underlay = Literal["grey", "color"]
"""How the image below the values looks: without its colors, which could be taken for values, or with them, faded."""
Display = Literal["values", "paper"]
"""How values are laid over the image: as they are, patch by patch; or as in arXiv 2411.10950, smooth shares in grey."""
EACH = "each"
"""`grid=` for a panel of each grid."""
MOST_OPAQUE = 0.92
"""Opacity of the largest value."""
_SMALL = 160
_LETTERS_PER_INCH = 16  # of a panel's label
_BAR = 0.9  # inches of the color bar with its numbers and its unit
_LEAST_HEIGHT = 1.7  # inches: the unit beside the color bar needs so much
_FADE = 0.75
_GROUND = 0.8  # the grey that stands for the image in the color bar


def patch_overlay(
    inputs: Inputs | ImageLike,
    values: Values,
    *,
    image: int = 0,
    layout: ImageLayout | None = None,
    grid: str = ALL,
    underlay: Underlay = "grey",
    display: Display = "values",
    title: str | None = None,
) -> Figure:
    """One number for each patch, [patch_row, patch_col], laid over the original image.

    With `Inputs` every patch is drawn where the processor's resizing and cropping took it from
    (`token_map.patch_box`), and what was cut away is dimmed. With an image alone the patches divide all of it, unless
    `layout` says otherwise. The image is faded to grey, so that every color in the figure is a value; underlay="color"
    keeps its colors, faded. A patch is the more opaque the larger its value.

    display="paper" is that of Yu & Ananiadou (arXiv 2411.10950): the map less its smallest value, over its sum, enlarged
    bicubically and laid over the image in grey, light where it is large. It looks smooth, but knows no more than the
    patches; negative values, and how large values are, cannot be seen in it.

    Where an image has several grids of patches, give one number for each of its positions, [feature]: the mean of the
    grids is drawn, each by the area that its patches show (`ImageLayout.draw`). `grid` names the one that is drawn
    ("base", "fine"); "each" draws them beside each other.

    Raises `InputError` for another number of values than the image has patches, and `SpanError` for a grid that the image
    does not have.

    >>> figure = patch_overlay(np.zeros((30, 60, 3), dtype=np.uint8), np.eye(3))
    >>> figure.axes[0].collections[0].get_coordinates()[-1, -1].tolist()
    [60.0, 30.0]
    """
    one_of(display, get_args(Display), "display")
    array = _place_values(values)
    original, layout = original_and_layout(inputs, image, layout)
    array = _fitting(array, layout, array.ndim)
    if grid == EACH and display == "paper":
        raise InputError("display='paper' draws one grid, or all of them in one; name it with grid=, not grid='each'.")
    if grid == EACH and len(drawn_grids(layout, grid)) > 1:
        about = {"name": values.name, "attrs": values.attrs} if isinstance(values, xr.DataArray) else {}
        panels = xr.DataArray(array[None], dims=("panel", "feature"), coords={"panel": [""]}, **about)
        return patch_overlays(original, panels, layout=layout, grid=EACH, underlay=underlay, title=title)
    scale = scale_of(values, array) if isinstance(values, xr.DataArray) else color_scale(array)
    width, height = _panel_size(original, 3.6)
    with plot(width + _BAR, height + 0.4) as figure:
        axes, (one, *_) = figure.add_subplot(), drawn_grids(layout, grid)
        subject, unit = (title_of(values), unit_of(values)) if isinstance(values, xr.DataArray) else ("", "value")
        if display == "paper":
            _draw_as_in_the_paper(figure, axes, original, array, layout, underlay, one)
        else:
            draw_overlay(axes, original, array, scale, layout, underlay, one)
            add_color_bar(figure, axes, scale, unit, array, colors=as_overlaid(scale))
        axes.set_title(subject if title is None else title)
        add_note(figure, values.attrs if isinstance(values, xr.DataArray) else {}, title)
    return figure


def patch_overlays(
    inputs: Inputs | ImageLike,
    result: xr.DataArray,
    *,
    image: int = 0,
    layout: ImageLayout | None = None,
    grid: str = ALL,
    columns: int = 4,
    underlay: Underlay = "grey",
    title: str | None = None,
) -> Figure:
    """Small multiples of `patch_overlay` on one color scale: result has one axis besides patch_row and patch_col (or feature).

    With grid="each" there is a panel for each grid of every entry. Raises as `patch_overlay`, and `InputError` for a
    result with other axes.

    >>> maps = xr.DataArray(np.ones((3, 2, 2)), dims=("layer", "patch_row", "patch_col"))
    >>> figure = patch_overlays(np.zeros((8, 8, 3), dtype=np.uint8), maps)
    >>> [axes.get_title() for axes in figure.axes[:3]]
    ['layer 0', 'layer 1', 'layer 2']
    """
    places = image_dims(result)
    over = [str(dim) for dim in result.dims if dim not in places]
    if len(over) != 1 or set(places) not in (set(BY_FEATURE), set(BY_PATCH)):
        raise InputError(
            f"patch_overlays draws one image along one axis; the result has {', '.join(map(str, result.dims))}. "
            "Expected patch_row, patch_col and one more; choose or average the others first."
        )
    result = result.transpose(over[0], *(dim for dim in (*BY_PATCH, *BY_FEATURE) if dim in places))
    original, layout = original_and_layout(inputs, image, layout)
    values, grids = _fitting(result.values, layout, len(places)), drawn_grids(layout, grid)
    names = [str(name) if isinstance(name, str) else f"{over[0]} {name}" for name in result[over[0]].values]
    n = len(names) * len(grids)
    columns = max(1, min(columns, n) // len(grids)) * len(grids)  # the grids of an entry stay in one row
    scale, rows, heading = scale_of(result, values), -(-n // columns), shown_title(result, title)
    width, height = _panel_size(original, (PAGE_WIDTH - _BAR) / max(columns, 3))
    drawn = [
        (_panel_label(name, one if len(grids) > 1 else "", width), own, one)
        for name, own in zip(names, values, strict=True)
        for one in grids
    ]
    each = height + 0.08 + 0.16 * max(label.count("\n") + 1 for label, _, _ in drawn)
    with plot(columns * width + _BAR, max(rows * each, _LEAST_HEIGHT) + (0.3 if heading else 0.1)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes, (label, own, one) in zip(panels.flat, drawn, strict=False):
            draw_overlay(axes, original, own, scale, layout, underlay, one)
            axes.set_title(label, fontsize=8 if len(grids) == 1 else 7, fontweight="normal", loc="center", pad=3)
        for axes in panels.flat[n:]:
            axes.set_visible(False)
        add_heading(figure, heading)
        add_note(figure, result.attrs, title)
        add_color_bar(figure, panels, scale, unit_of(result), values, colors=as_overlaid(scale))
    return figure


def _panel_label(name: str, grid: str, inches: float) -> str:
    """What a panel shows, in lines no wider than it, and its grid below."""
    return "\n".join([*textwrap.wrap(name, max(8, int(_LETTERS_PER_INCH * inches))), *([grid] if grid else [])])


def _draw_as_in_the_paper(
    figure: Plot,
    axes: Axes,
    original: Image.Image,
    values: np.ndarray,
    layout: ImageLayout | None,
    underlay: Underlay,
    grid: str,
) -> None:
    """The image, the enlarged map of shares in grey over it, and its color bar."""
    one_of(underlay, get_args(Underlay), "underlay")
    draw_image(axes, np.asarray(original if underlay == "color" else original.convert("L").convert("RGB")))
    scale = draw_enlarged(axes, values, layout, original.size, grid)
    if layout is not None:
        mark_crop(axes, layout, grid)
    add_color_bar(figure, axes, scale, "share of the map", np.array([0.0, scale.high]))


def draw_overlay(
    axes: Axes,
    original: Image.Image,
    values: np.ndarray,
    scale: ColorScale,
    layout: ImageLayout | None,
    underlay: Underlay = "grey",
    grid: str = ALL,
    opaque: float = MOST_OPAQUE,
) -> None:
    """An image in its own pixel coordinates, what the crop cut away dimmed, and the patches over it.

    `opaque` is the opacity of the largest value.
    """
    one_of(underlay, get_args(Underlay), "underlay")
    draw_image(axes, np.asarray(original if underlay == "color" else original.convert("L").convert("RGB")), fade=_FADE)
    how: dict[str, Any] = {"cmap": _vivid(scale), "norm": scale.norm()}
    borders = _borders(original, values, layout)
    if borders is None:
        assert layout is not None
        by_feature = values if values.ndim == 1 else layout.fold({layout.names[0]: values})
        values = layout.draw(by_feature, grid)
        mapped: Any = axes.imshow(
            values, extent=(0, original.width, original.height, 0), interpolation="nearest", **how
        )
    else:
        # As vectors, neighboring patches would show seams.
        mapped = axes.pcolormesh(*borders, values, linewidth=0, rasterized=True, **how)
    mapped.set_alpha(_opacity(values, scale, opaque))  # one for each patch, which matplotlib's types leave out
    if layout is not None:
        mark_crop(axes, layout, grid)
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


def original_and_layout(
    inputs: Inputs | ImageLike, image: int, layout: ImageLayout | None
) -> tuple[Image.Image, ImageLayout | None]:
    """The image to draw on, and its layout if it knows the original's pixels."""
    if isinstance(inputs, Inputs):
        if inputs.images is None or not 0 <= image < len(inputs.images):
            held = "none are known" if inputs.images is None else f"there are {len(inputs.images)}"
            raise InputError(
                f"Cannot draw on original image {image}: {held}. Use prepare(question, images=...), which keeps "
                "them, or give an image in place of the inputs."
            )
        layout, original = inputs.layouts[image], inputs.images[image]
    else:
        original = load_image(inputs)
    return original, None if layout is None or layout.original_size is None else layout


def _fitting(values: np.ndarray, layout: ImageLayout | None, n_axes: int) -> np.ndarray:
    """Values [..., *place] that the image shows: NaN for newlines, and without what fills up images shorter than others.

    Raises `InputError` for another number of values than the image has patches.
    """
    shape = values.shape[-n_axes:]
    if layout is None:
        if n_axes == 1:
            raise InputError("Values by position of an image need its layout; give inputs made by prepare, or layout=.")
        return values
    if n_axes == 1 and np.isnan(values[..., layout.n_features :]).all():
        shape = (min(shape[0], layout.n_features),)
    if shape not in [(layout.n_features,), *(grid.shape for grid in layout.grids if len(layout.grids) == 1)]:
        given = f"{shape[0]} by position" if len(shape) == 1 else f"{shape[0]} x {shape[1]} (patch_row x patch_col)"
        several = "" if len(layout.grids) == 1 else f" in several grids, {layout.n_features} positions in all"
        raise InputError(
            f"The values are {given} and the image has {layout} patches{several}; "
            f"give one value per {'position' if several else 'patch'}."
        )
    return layout.fold(layout.unfold(values)) if n_axes == 1 else values


def drawn_grids(layout: ImageLayout | None, grid: str) -> tuple[str, ...]:
    """The grids that have a panel each."""
    if layout is None or grid == ALL:
        return (ALL,)
    if grid == EACH:
        return tuple(one.name for one in layout.grids if min(one.shape))
    return (layout.grid(grid).name,)


def _place_values(values: Values) -> Float[np.ndarray, "*place"]:
    if isinstance(values, xr.DataArray):
        kept = [dim for dim in values.dims if dim in image_dims(values) or values.sizes[dim] > 1]
        one = values.squeeze([dim for dim in values.dims if dim not in kept], drop=True)
        array = (one.transpose(*BY_PATCH) if set(kept) == set(BY_PATCH) else one).values
    else:
        array = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else values
    if array.ndim not in (1, 2):
        raise InputError(
            f"The values have the shape {array.shape}; expected one number per patch, [patch_row, patch_col]. "
            "Choose or average the other axes first, or draw one axis with patch_overlays."
        )
    return array.astype(np.float64)


def _panel_size(image: Image.Image, longest: float) -> tuple[float, float]:
    """Width and height in inches, the longer of them as given."""
    scale = longest / max(image.size)
    return max(0.5, image.width * scale), max(0.5, image.height * scale)


def mark_crop(axes: Axes, layout: ImageLayout, grid: str = ALL) -> None:
    """Dim what no patch shows, and draw a line around what patches show, if that is not the whole image."""
    cut = layout.cut_boxes(grid)
    if not cut:
        return
    for x0, y0, x1, y1 in cut:
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=PAPER, alpha=0.7, linewidth=0))
    left, top, right, bottom = layout.visible_box(grid)
    frame = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=INK, linewidth=1.0, label="seen")
    frame.set_clip_on(False)
    axes.add_patch(frame)


def _vivid(scale: ColorScale) -> Colormap:
    """The scale's map without its palest part where values only grow: faint patches are transparent already."""
    return scale.map if scale.name == DIVERGING else ListedColormap(scale.map(np.linspace(0.25, 1.0, 256)))


def _opacity(values: np.ndarray, scale: ColorScale, opaque: float) -> np.ndarray:
    """0 at the neutral value, and rising fastest there, so that half the largest effect is still seen well."""
    away = np.abs(np.nan_to_num(values - scale.neutral))  # what is not a number is not drawn
    part = np.clip(away / (scale.high - scale.neutral), 0, 1)
    return opaque * np.sqrt(part)


def as_overlaid(scale: ColorScale, opaque: float = MOST_OPAQUE) -> Colormap:
    """The colors as they look on a light grey image, for the color bar."""
    values = np.linspace(scale.low, scale.high, 256)
    share = _opacity(values, scale, opaque)[:, None]
    return ListedColormap(share * _vivid(scale)(scale.norm()(values))[:, :3] + (1 - share) * _GROUND)
