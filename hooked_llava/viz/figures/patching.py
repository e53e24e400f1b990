"""Figures of patching results: the one that fits the axes, in shares of the two runs' difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from hooked_llava.errors import InputError
from hooked_llava.prompt.images import ImageLike
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.results.arrays import recovered
from hooked_llava.results.image_axes import BY_FEATURE, BY_PATCH, ImageAxes, image_dims
from hooked_llava.viz.figures.contributions import plot_contributions
from hooked_llava.viz.figures.edges import edge_map
from hooked_llava.viz.figures.maps import cell_map, cell_maps, layer_head_map
from hooked_llava.viz.figures.overlay import EACH, patch_overlay, patch_overlays
from hooked_llava.viz.figures.positions import layer_position_map, layer_position_maps
from hooked_llava.viz.kinds import check_not_another
from hooked_llava.viz.titles import title_of

_MOST_PANELS = 12
_OF_ONE_RUN = ("pair", "prompt", "image", "answer", "receiver", "position")  # dropped where they have one entry


def plot_patching(
    result: xr.DataArray | xr.Dataset | Mapping[str, xr.DataArray],
    inputs: Inputs | ImageLike | None = None,
    *,
    share: bool = True,
    unfold: bool = False,
    image: int = 0,
    title: str | None = None,
) -> Figure:
    """The figure that fits a result of activation, attribution or path patching, the logit lens or attribution, by its axes.

    | axes | figure |
    |---|---|
    | layer, position | tokens along the axis, an image's patches side by side; with `unfold` the image, a panel a layer |
    | layer, head (or kv_head) | a cell for each head |
    | patch; layer, patch (or feature) | the image with its patches; a panel a layer, and of each grid where there are several |
    | receiver, layer; receiver, layer, head | a row, or a panel, for each receiver; of many, senders by receivers |
    | several results by name, or a dataset | panels on one scale; of `edge_attribution`, senders by receivers |
    | component, neuron, source, ... of `logit_attribution` | as `plot_contributions` |

    Args:
        result: what an analysis returned. Of further axes longer than one choose or average first.
        inputs: the prompt (names the tokens, knows where the patches lie), or the image alone.
        share: draw the share recovered (`recovered`: 0 corrupted, 1 clean) where the result says what the metric of
            the two runs is; otherwise the values as they are.
        unfold: draw the positions of an image on the image.
        image: which image, where patches are drawn.
        title: instead of the result's own; not for several results.

    Raises `InputError` for axes that no figure fits, and where patches are to be drawn without an image.

    >>> result = xr.DataArray(np.zeros((6, 8)), dims=("layer", "head"), name="metric")
    >>> plot_patching(result).axes[0].get_xlabel()
    'head'
    """
    check_not_another(result, ("plot_patching", "edge_map"))
    if isinstance(result, Mapping):
        shares = recovered(result) if isinstance(result, xr.Dataset) and _has_ends(result, share) else result
        parts = {str(name): _bare(_shared(part, share)) for name, part in shares.items()}
        return _several(parts, inputs, getattr(result, "attrs", {}))
    if result.name == "logit":
        return plot_contributions(result, inputs, image=image, title=title)
    drawn = _bare(_shared(result, share))
    title = title_of(drawn) if title is None else title
    if {"patch", "feature"} & set(drawn.dims) or (unfold and "position" in drawn.dims):
        return _on_image(drawn, inputs, image, title)
    return _by_axes(drawn, inputs, title)


def _by_axes(drawn: xr.DataArray, inputs: Inputs | ImageLike | None, title: str) -> Figure:
    axes = set(drawn.dims)
    if "receiver" in axes and drawn.sizes["receiver"] > _MOST_PANELS:
        return edge_map(drawn, title=title)
    if axes == {"receiver", "layer", "head"}:
        parts = {f"to {name}": drawn.sel(receiver=name) for name in drawn["receiver"].values}
        return _several(parts, inputs, drawn.attrs)
    if axes & {"head", "kv_head"}:
        return layer_head_map(drawn, title=title)
    if axes in ({"receiver", "layer"}, {"layer"}):
        one = drawn if "receiver" in axes else drawn.expand_dims(receiver=[""])
        return cell_map(one, "receiver", "layer", title=title)
    one = drawn if "layer" in axes else drawn.expand_dims(layer=[""])
    return layer_position_map(one, _prompt(inputs), title=title)


def by_patch(result: xr.DataArray, inputs: Inputs | ImageLike | None = None, *, image: int = 0) -> xr.DataArray:
    """A result by patch, or by position, on the axes of one image: patch_row and patch_col in place of it, or feature.

    Patches that the result does not have are NaN. Raises `InputError` without positions of the image, and for a
    result by position without its inputs.

    >>> places = {"patch_row": ("patch", [0, 1]), "patch_col": ("patch", [1, 0])}
    >>> result = xr.DataArray([1.0, 2.0], dims="patch", coords=places, attrs={"patch_grid": [2, 2]})
    >>> by_patch(result).values.tolist()
    [[nan, 1.0], [2.0, nan]]
    """
    prompt = _prompt(inputs)
    axes = ImageAxes.of(prompt) if prompt is not None and prompt.n_images else None
    axis, indices, places = _places(result, prompt, axes, image)
    dims, shape = (axes.dims, axes.shape) if axes is not None else _own_axes(result)
    others = [str(dim) for dim in result.dims if dim != axis]
    values = np.full((*(result.sizes[dim] for dim in others), math.prod(shape)), np.nan)
    values[..., places] = result.transpose(*others, axis).values[..., indices]
    coords = {dim: result[dim].values for dim in others if dim in result.coords}
    drawn = values.reshape(*values.shape[:-1], *shape)
    return xr.DataArray(drawn, dims=(*others, *dims), coords=coords, name=result.name).assign_attrs(result.attrs)


def _places(
    result: xr.DataArray, prompt: Inputs | None, axes: ImageAxes | None, image: int
) -> tuple[str, list[int], list[int]]:
    """The axis that is the image's, which of its entries lie in the image, and at which places."""
    if "feature" in result.dims:
        return "feature", list(range(result.sizes["feature"])), result["feature"].values.tolist()
    if "patch" in result.dims:
        columns = (axes.shape if axes is not None else _own_axes(result)[1])[-1]
        places = (result["patch_row"].values * columns + result["patch_col"].values).tolist()
        return "patch", list(range(len(places))), places
    if prompt is None or axes is None or "position" not in result.dims:
        raise InputError(
            f"Patches need a result by patch, or by position together with its inputs; the result has the axes "
            f"{', '.join(map(str, result.dims))}{'' if prompt is not None else ' and no inputs were given'}."
        )
    place_of = {p: place for place, p in enumerate(axes.positions(prompt.token_map)[image].tolist()) if p >= 0}
    positions = result["position"].values.tolist()
    indices = [index for index, position in enumerate(positions) if position in place_of]
    if not indices or "n_positions" in result.coords:
        raise InputError(
            f"The result has no positions of patches of image {image} by themselves, so none can be drawn."
        )
    return "position", indices, [place_of[positions[index]] for index in indices]


def _own_axes(result: xr.DataArray) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The axes of the image as the result itself knows them."""
    if "feature" in result.dims:
        return BY_FEATURE, (int(result["feature"].max()) + 1,)
    if "patch_grid" not in result.attrs:
        raise InputError(
            "The result does not say how many patches the image has (attribute patch_grid), so where these patches lie is "
            "not known; give the inputs that it was made from."
        )
    rows, columns = result.attrs["patch_grid"]
    return BY_PATCH, (rows, columns)


def _several(parts: Mapping[str, xr.DataArray], inputs: Inputs | ImageLike | None, about: Mapping[Any, Any]) -> Figure:
    """Panels on one scale; of edges, that have another sender each, one map."""
    if not parts or len(parts) > _MOST_PANELS:
        raise InputError(f"There are {len(parts)} results to draw; expected 1 to {_MOST_PANELS}. Choose some of them.")
    axes = {frozenset(map(str, part.dims)) for part in parts.values()}
    kinds = [("layer", "head"), ("layer", "kv_head"), ("receiver", "layer"), ("layer", "position")]
    fitting = [kind for kind in kinds if axes == {frozenset(kind)}]
    if not fitting and len(axes) == len(parts) and all("receiver" in part.dims for part in parts.values()):
        return edge_map(parts, about=about)
    if not fitting:
        found = "; ".join(f"{name}: {', '.join(map(str, part.dims))}" for name, part in parts.items())
        raise InputError(
            f"Results with these axes have no common figure ({found}); expected all by layer and position, or all by "
            "layer and head. Draw one, for example plot_patching(recovered(result)['z'].sel(position=...))."
        )
    if fitting[0] == ("layer", "position"):
        return layer_position_maps(parts, _prompt(inputs), about=about)
    return cell_maps(parts, *fitting[0], about=about)


def _on_image(result: xr.DataArray, inputs: Inputs | ImageLike | None, image: int, title: str) -> Figure:
    if inputs is None:
        raise InputError("A result by patch is drawn on the image; give the inputs, or the image itself.")
    if "image" in result.dims:
        result = result.sel(image=image, drop=True)
    grid = by_patch(result, inputs, image=image)
    if grid.ndim == len(image_dims(grid)):
        return patch_overlay(inputs, grid, image=image, title=title, grid=EACH)
    return patch_overlays(inputs, grid, image=image, title=title, grid=EACH)


def _has_ends(result: Any, share: bool) -> bool:
    return share and "clean" in result.attrs and "corrupted" in result.attrs


def _shared(result: xr.DataArray, share: bool) -> xr.DataArray:
    return recovered(result) if _has_ends(result, share) else result


def _bare(result: xr.DataArray) -> xr.DataArray:
    """Without axes of one entry that say nothing in a figure, as long as the others still make one."""
    dropped = [dim for dim in _OF_ONE_RUN if dim in result.dims and result.sizes[dim] == 1]
    if "layer" in result.dims and not set(result.dims) & {"head", "kv_head", "patch", "feature"}:
        dropped = [dim for dim in dropped if dim != "position"]  # a map of one column
    return result.squeeze(dropped, drop=True)


def _prompt(inputs: Inputs | ImageLike | None) -> Inputs | None:
    return inputs if isinstance(inputs, Inputs) else None
