"""An image as the model receives it, cut into its patches."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.errors import InputError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.viz.figures.overlay import draw_image, layouts_of, mark_crop
from hooked_llava.viz.style import MUTED, PAGE_WIDTH, plot


def model_view(inputs: Inputs, image_processor: Any = None, *, image: int = 0) -> Float[np.ndarray, "height width 3"]:
    """One of the prompts' images as the model receives it, 0 to 1: `pixel_values` with the normalisation undone.

    Of an image that is cut into tiles the first is shown, on which the whole image is.

    Without an image processor (or one that does not normalise) the values are stretched to 0 to 1 instead. Raises
    `InputError` for an image that is not there.
    """
    if inputs.pixel_values is None or not 0 <= image < inputs.n_images:
        held = 0 if inputs.pixel_values is None else inputs.n_images
        raise InputError(f"There is no image {image}: the inputs hold {held}, counted from 0.")
    pixels = np.moveaxis(inputs.pixel_values[inputs.tiles[image].start].detach().float().cpu().numpy(), 0, -1)
    if getattr(image_processor, "do_normalize", False):
        shown = pixels * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
        if not image_processor.do_rescale:
            shown = shown / 255
    else:
        shown = (pixels - pixels.min()) / max(float(np.ptp(pixels)), 1e-12)
    return np.clip(shown, 0, 1).astype(np.float32)


def as_the_model_sees_it(inputs: Inputs, image_processor: Any = None, *, image: int = 0) -> Figure:
    """The image that the model receives, divided into its patches; beside it the original, where the two differ.

    `image_processor` (such as `model.processor.image_processor`) undoes the normalisation. Raises `InputError` for an
    image that is not there.
    """
    seen = model_view(inputs, image_processor, image=image)
    layout = layouts_of(inputs)[image]
    rows, columns = layout.grids[0].shape
    original = inputs.images[image] if inputs.images is not None else None
    both = original is not None and layout.original_size is not None and not _unchanged(layout)
    with plot(PAGE_WIDTH if both else 3.6, 2.8 if both else 3.5) as figure:
        panels = figure.subplots(1, 2 if both else 1, squeeze=False)[0]
        if both and original is not None:
            draw_image(panels[0], np.asarray(original))
            mark_crop(panels[0], layout)
            panels[0].set_anchor("N")
            panels[0].set_title(f"original, {original.width} x {original.height} pixels", fontweight="normal")
        axes = panels[-1]
        height, width = seen.shape[:2]
        draw_image(axes, (seen * 255).round().astype(np.uint8))
        _draw_grid(axes, np.linspace(0, width, columns + 1), np.linspace(0, height, rows + 1))
        axes.set_title(f"{width} x {height} pixels, {rows} x {columns} patches", fontweight="normal")
    return figure


def _unchanged(layout: ImageLayout) -> bool:
    grid, whole = layout.grids[0], layout.original_size
    return whole == (grid.rows.pixels.canvas, grid.columns.pixels.canvas) and not layout.cut_boxes()


def _draw_grid(axes: Axes, x_edges: np.ndarray, y_edges: np.ndarray) -> None:
    style = {"colors": MUTED, "linewidth": 0.5 if len(x_edges) < 20 else 0.25, "clip_on": False}
    axes.vlines(x_edges, y_edges[0], y_edges[-1], **style)
    axes.hlines(y_edges, x_edges[0], x_edges[-1], **style)
