"""An image as the model receives it, cut into its patches."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_llava.architecture.grid import Grid
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.errors import InputError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.viz.figures.overlay import draw_image, mark_crop
from hooked_llava.viz.style import MUTED, PAGE_WIDTH, plot


def model_view(
    inputs: Inputs, image_processor: Any = None, *, image: int = 0, grid: str | None = None
) -> Float[np.ndarray, "height width 3"]:
    """One of the prompts' images as the model receives it, 0 to 1: `pixel_values` with the normalisation undone.

    Of an image that is cut into tiles the first is shown, on which the whole image is; or all those of a `grid`, put
    together.

    Without an image processor (or one that does not normalise) the values are stretched to 0 to 1 instead. Raises
    `InputError` for an image that is not there, and `SpanError` for such a grid.
    """
    if inputs.pixel_values is None or not 0 <= image < inputs.n_images:
        held = 0 if inputs.pixel_values is None else inputs.n_images
        raise InputError(f"There is no image {image}: the inputs hold {held}, counted from 0.")
    layout = inputs.layouts[image]
    shown = layout.grids[0] if grid is None else layout.grid(grid)
    first, rows = inputs.tiles[image].start + shown.first_tile, shown.rows.n_tiles
    tiles = inputs.pixel_values[first : first + shown.n_tiles].detach().float().cpu().unflatten(0, (rows, -1))
    pixels = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()  # (height, width, channel)
    if getattr(image_processor, "do_normalize", False):
        view = pixels * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
        if not image_processor.do_rescale:
            view = view / 255
    else:
        view = (pixels - pixels.min()) / max(float(np.ptp(pixels)), 1e-12)
    return np.clip(view, 0, 1).astype(np.float32)


def as_the_model_sees_it(inputs: Inputs, image_processor: Any = None, *, image: int = 0) -> Figure:
    """The image that the model receives, divided into its patches; beside it the original, where the two differ.

    Where the image has several grids, each is shown. `image_processor` (such as `model.processor.image_processor`) undoes
    the normalisation. Raises `InputError` for an image that is not there.
    """
    first = model_view(inputs, image_processor, image=image)
    layout = inputs.layouts[image]
    views = [first, *(model_view(inputs, image_processor, image=image, grid=name) for name in layout.names[1:])]
    original = inputs.images[image] if inputs.images is not None else None
    both = original is not None and layout.original_size is not None and not _unchanged(layout)
    n_panels, several = len(views) + both, len(views) > 1
    look: dict[str, Any] = {"fontweight": "normal"} | ({"fontsize": 8} if several else {})
    with plot(3.6 if n_panels == 1 else PAGE_WIDTH, 3.5 if n_panels == 1 else 2.8) as figure:
        panels = list(figure.subplots(1, n_panels, squeeze=False)[0])
        if both and original is not None:
            axes = panels.pop(0)
            draw_image(axes, np.asarray(original))
            mark_crop(axes, layout)
            axes.set_anchor("N")
            size = f"{original.width} x {original.height} pixels"
            axes.set_title(f"original,\n{size}" if several else f"original, {size}", **look)
        for axes, view, grid in zip(panels, views, layout.grids, strict=True):
            draw_image(axes, (view * 255).round().astype(np.uint8))
            _draw_patches(axes, grid, view)
            axes.set_title(_said_of(grid, view, alone=not several), **look)
            if several:
                axes.set_anchor("N")
    return figure


def _said_of(grid: Grid, view: np.ndarray, *, alone: bool) -> str:
    """The sizes of what a panel shows."""
    height, width = view.shape[:2]
    pixels, (rows, columns) = f"{width} x {height} pixels", grid.shape
    if alone:
        return f"{pixels}, {rows} x {columns} patches"
    tiles = f" in {grid.n_tiles} tiles" if grid.n_tiles > 1 else ""
    return f"{grid.name}: {pixels}{tiles},\n{rows} x {columns} {'cells' if grid.pooled else 'patches'}"


def _unchanged(layout: ImageLayout) -> bool:
    grid, whole = layout.grids[0], layout.original_size
    return whole == (grid.rows.pixels.canvas, grid.columns.pixels.canvas) and not layout.cut_boxes()


def _draw_patches(axes: Axes, grid: Grid, view: np.ndarray) -> None:
    """The borders of the patches, tile by tile."""
    height, width = view.shape[:2]
    y, x = (np.linspace(0, length, axis.n_patches + 1) for length, axis in ((height, grid.rows), (width, grid.columns)))
    style = {"colors": MUTED, "linewidth": 0.5 if len(x) < 20 else 0.25, "clip_on": False}
    axes.vlines(x, y[0], y[-1], **style)
    axes.hlines(y, x[0], x[-1], **style)
