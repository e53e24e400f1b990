"""What writes the answer's logit, drawn by whatever it was divided among."""

from __future__ import annotations

import xarray as xr
from matplotlib.figure import Figure

from hooked_llava.errors import InputError
from hooked_llava.prompt.images import ImageLike
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.results.image_axes import image_dims
from hooked_llava.viz.figures.bars import contribution_bars, top_bars
from hooked_llava.viz.figures.maps import cell_map, layer_head_map
from hooked_llava.viz.figures.overlay import EACH, patch_overlays
from hooked_llava.viz.figures.positions import layer_position_map
from hooked_llava.viz.titles import title_of


def plot_contributions(
    result: xr.DataArray, inputs: Inputs | ImageLike | None = None, *, image: int = 0, title: str | None = None
) -> Figure:
    """The figure that fits a result of `logit_attribution`, by what the logit was divided among.

    | by | figure |
    |---|---|
    | component | bars: attention and MLP of each layer, and their running sum |
    | layer | a row of cells |
    | head | a cell for each head |
    | neuron | bars of the neurons that contribute most, either way |
    | source | layer by token, summed over the heads; each image one column, the sum of its patches |
    | patch | the image with its patches, a panel a layer (and of each grid), summed over the heads |

    Args:
        result: what `logit_attribution` returned for one prompt.
        inputs: the prompt (names the tokens, knows where the patches lie), or the image alone.
        image: which image, where patches are drawn.
        title: instead of the result's own.

    Raises `InputError` for other axes, several prompts, and patches without an image to draw them on.

    >>> import numpy as np
    >>> parts = xr.DataArray(np.eye(3), dims=("layer", "neuron"), name="logit")
    >>> [label.get_text() for label in plot_contributions(parts).axes[0].get_yticklabels()[:3]]
    ['L0 N0', 'L1 N1', 'L2 N2']
    """
    title = title_of(result) if title is None else title
    axes = {str(dim) for dim in result.dims}
    if image_dims(result):
        if inputs is None:
            raise InputError("A result by patch is drawn on the image; give the inputs, or the image itself.")
        one = result.sel(image=image, drop=True) if "image" in axes else result
        return patch_overlays(inputs, _over_heads(one), image=image, title=title, grid=EACH)
    if "source" in axes:
        prompt = inputs if isinstance(inputs, Inputs) else None
        tokens = _over_heads(result).rename(source="position")
        return layer_position_map(tokens, prompt, collapse="sum", title=title)
    if "component" in axes:
        return contribution_bars(result, title=title)
    if "neuron" in axes:
        return top_bars(result, title=title)
    if "head" in axes:
        return layer_head_map(result, title=title)
    return cell_map(result.expand_dims(position=[""]), "position", "layer", title=title)  # an axis without a name


def _over_heads(result: xr.DataArray) -> xr.DataArray:
    return result.sum("head", min_count=1, keep_attrs=True) if "head" in result.dims else result  # NaN stays NaN
