"""A small map for every token of an answer."""

from __future__ import annotations

import xarray as xr
from matplotlib.figure import Figure

from hooked_llava.architecture.layout import ALL, ImageLayout
from hooked_llava.prompt.images import ImageLike
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.results.image_axes import image_dims
from hooked_llava.viz.figures.overlay import Underlay, patch_overlays
from hooked_llava.viz.kinds import check_array, check_axes

_COLUMNS = 6


def answer_strip(
    inputs: Inputs | ImageLike,
    maps: xr.DataArray,
    *,
    image: int = 0,
    layout: ImageLayout | None = None,
    grid: str = ALL,
    columns: int = _COLUMNS,
    underlay: Underlay = "grey",
    title: str | None = None,
) -> Figure:
    """The maps of `answer_maps`, token by token in the order of the answer, on one color scale.

    `image` is the one of the prompt that is drawn; the others are as for `patch_overlay`. Raises `InputError` for a result
    of another analysis, and as `patch_overlays`.

    >>> import numpy as np
    >>> words = ("token", ["red", "star"])
    >>> maps = xr.DataArray(np.ones((2, 1, 2, 2)), dims=("token", "image", "patch_row", "patch_col"), coords={"word": words})
    >>> figure = answer_strip(np.zeros((8, 8, 3), dtype=np.uint8), maps)
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['red', 'star']
    """
    own = check_array(maps, "answer_strip", "answer_maps")
    own = check_axes(own, "token", *image_dims(own), optional=("image",))
    own = own.isel(image=image) if "image" in own.dims else own
    words = [str(word).strip() or repr(str(word)) for word in own["word"].values]
    own = own.drop_vars(["token", "word"], errors="ignore").assign_coords(token=words)
    how = {"image": image, "layout": layout, "grid": grid}
    return patch_overlays(inputs, own, columns=columns, underlay=underlay, title=title, **how)
