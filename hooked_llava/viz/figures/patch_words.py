"""The words that the logit lens reads at the image's positions, written on the patches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.errors import InputError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.viz.figures.lens import lens_title
from hooked_llava.viz.figures.overlay import (
    EACH,
    Underlay,
    as_overlaid,
    draw_overlay,
    drawn_grids,
    original_and_layout,
)
from hooked_llava.viz.kinds import check_axes, check_dataset
from hooked_llava.viz.style import (
    INK,
    PAGE_WIDTH,
    PAPER,
    SEQUENTIAL,
    ColorScale,
    add_color_bar,
    add_heading,
    plot,
    token_label,
)
from hooked_llava.viz.titles import add_note

_PROBABILITY = ColorScale(SEQUENTIAL, 0.0, 1.0)
_CELL = 0.46  # inches that a patch is wide at least, so that its word can be read
_POINTS = 6.0
_OPAQUE = 0.5  # of the shade, so that the image is seen below the words
_LETTER = 0.6  # of the size of the font: how wide a letter is
_BAR = 0.9  # inches of the color bar with its numbers and its unit


class _Words(NamedTuple):
    """By feature of the image, "" and NaN where nothing was read.

    Attributes:
        token (np.ndarray): The most probable words.
        probability (np.ndarray): Their probabilities.
    """

    token: np.ndarray
    probability: np.ndarray


def patch_words(
    inputs: Inputs,
    lens: xr.Dataset,
    layer: int | None = None,
    *,
    image: int = 0,
    grid: str = EACH,
    underlay: Underlay = "grey",
    title: str | None = None,
) -> Figure:
    """The most probable word that `logit_lens` reads at each patch, written on the patch and shaded by its probability.

    A word says what the vector resembles, read with the final norm and the unembedding, which were trained on the final
    residual stream only: not what the patch shows, nor that the answer uses it.

    Args:
        inputs: the prompt, made by `prepare` with its images.
        lens: `logit_lens(model, inputs, positions="image")`, of any hook; patches that it did not read stay empty.
        layer: which layer of it, from the end where negative; not needed where it has one.
        image: which image of the prompt.
        grid: the name of the grid that is drawn ("base", "fine"); by default there is a panel for each grid.
        underlay: the image below, "grey" or with its colors, "color", faded.
        title: instead of the lens's own; "" for none.

    Raises `InputError` for a layer that was not read, a lens of several prompts or heads, one without positions of this
    image, and inputs without their original images; `SpanError` for a grid that the image does not have.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.analysis import logit_lens
    >>> from hooked_llava.toy.images import image_path
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> inputs = model.prepare("What color is the star?", images=image_path("demo"))
    >>> figure = patch_words(inputs, logit_lens(model, inputs, positions="image"), layer=3)
    >>> len(figure.axes[0].texts) == len(inputs.token_map["image"])
    True
    """
    one = _of_layer(lens, layer)
    original, layout = original_and_layout(inputs, image, None)
    if layout is None:
        raise InputError("patch_words needs to know how the image became patches; give inputs made by model.prepare.")
    words = _by_feature(one, inputs.token_map.image_ranges[image])
    names = drawn_grids(layout, grid)
    width = max(2.6, _CELL * max(layout.grid(name).columns.cells for name in names))
    height, beside = width * original.height / original.width, original.height >= original.width
    shape = (1, len(names)) if beside else (len(names), 1)
    heading = _title(one) if title is None else title
    size = max(shape[1] * width + _BAR, PAGE_WIDTH), shape[0] * (height + 0.25) + (0.4 if heading else 0.1)
    with plot(*size) as figure:
        panels = figure.subplots(*shape, squeeze=False)
        for axes, name in zip(panels.flat, names, strict=True):
            draw_overlay(axes, original, words.probability, _PROBABILITY, layout, underlay, name, _OPAQUE)
            _write(axes, layout, words, name, width / original.width)
            if len(names) > 1:
                axes.set_title(name, fontsize=8, fontweight="normal", loc="center", pad=3)
        add_heading(figure, heading)
        add_note(figure, lens.attrs, title)
        add_color_bar(
            figure, panels, _PROBABILITY, "probability", words.probability, colors=as_overlaid(_PROBABILITY, _OPAQUE)
        )
    return figure


def _write(axes: Axes, layout: ImageLayout, words: _Words, name: str, inches_per_pixel: float) -> None:
    """The words of one grid, each in the middle of what its patch shows."""
    outline: Any = [withStroke(linewidth=1.2, foreground=PAPER)]
    features = layout.cell_features(name)
    for (row, column), feature in np.ndenumerate(features):
        x0, y0, x1, y1 = layout.grid(name).boxes[row, column]
        if x1 > x0 and y1 > y0 and np.isfinite(words.probability[feature]):
            longest = max(2, int((x1 - x0) * inches_per_pixel * 72 / (_LETTER * _POINTS)))
            label = token_label(words.token[feature], longest=longest)
            text = axes.text((x0 + x1) / 2, (y0 + y1) / 2, label, ha="center", va="center", fontsize=_POINTS, color=INK)
            text.set_path_effects(outline)


def _of_layer(lens: xr.Dataset, layer: int | None) -> xr.Dataset:
    """Token and probability [position] of one layer, the best word of each."""
    check_dataset(lens, ("token", "probability"), "patch_words", "logit_lens(..., positions='image')")
    for name in ("token", "probability"):
        check_axes(
            lens[name], "position", "rank", optional=["layer"], advice=" Take one prompt, or one head, with isel."
        )
    best = lens[["token", "probability"]].isel(rank=0)
    if "layer" not in best.dims:
        return best
    read = [int(number) for number in best["layer"].values]
    places = {number: i for i, number in enumerate(read)} | {i - len(read): i for i in range(len(read))}
    wanted = read[0] if layer is None and len(read) == 1 else layer
    if wanted not in places:
        raise InputError(f"layer={layer}; the lens has read the layers {', '.join(map(str, read))}: give one of them.")
    return best.isel(layer=places[wanted])


def _by_feature(one: xr.Dataset, own: range) -> _Words:
    """The words by feature of the image that has these positions."""
    words = _Words(np.full(len(own), "", dtype=object), np.full(len(own), np.nan))
    here = [
        (place, own.index(position))
        for place, position in enumerate(one["position"].values.tolist())
        if position in own
    ]
    if not here:
        raise InputError(
            f"The lens has read no position of the image, which has {own.start} to {own.stop - 1}; make it with "
            "logit_lens(model, inputs, positions='image')."
        )
    for place, feature in here:
        words.token[feature] = one["token"].values[place]
        words.probability[feature] = one["probability"].values[place]
    return words


def _title(one: xr.Dataset) -> str:
    """The lens and the layer that it read."""
    called = f"{lens_title(one)}: top word of each patch"
    name = str(one.coords.get("layer_name", one.coords.get("layer", xr.DataArray(""))).item())
    return called + (", final" if name == "final" else f", layer {name}" if name else "")
