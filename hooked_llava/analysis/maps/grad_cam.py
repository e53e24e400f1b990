"""Grad-CAM of the residual stream at the image, in the language tower or in the vision tower."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.analysis.maps.gradients import Ids, Read, with_gradients
from hooked_llava.checks import as_index
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.results.image_axes import ImageAxes, take_each

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


def grad_cam(
    model: HookedLLaVA, inputs: Inputs, read: Read, ids: Ids, *, layer: int, vision: bool = False
) -> tuple[Float[Tensor, "prompt image place"], Int[Tensor, "prompt read variant"]]:
    """ReLU(sum over c of w_c A_c), w_c the mean of dy / dA_c over an image's places; and the answer's tokens.

    Equations 1 and 2 of Selvaraju et al., arXiv 1610.02391. A is the residual stream that enters a layer, at the places of
    an image (in the vision tower at the patches of all its tiles, without the class token), y the answer's logit. The
    dimensions of the residual stream take the place of channels, as pytorch-grad-cam does it for transformers. Every image
    has weights of its own.
    """
    name = f"{'vision.' if vision else ''}blocks.{layer}.hook_resid_pre"
    activations, gradients, ids = with_gradients(model, inputs, read, ids, [name])
    resid, slope = activations[name].float(), gradients[name].float()
    axes = ImageAxes.of(inputs)
    if vision:
        patches = model.config.vision.patches_along("pos")
        by_tile = [x[:, patches.start : patches.stop] for x in (resid, slope)]
        images = [_weighted(*(x[tiles.start : tiles.stop].flatten(0, 1) for x in by_tile)) for tiles in inputs.tiles]
        by_patch = torch.cat(images).unflatten(0, (-1, *model.config.vision.patch_grid))
        return axes.of_patches(by_patch).unflatten(0, (len(inputs), -1)), ids
    maps = torch.full(resid.shape[:2], torch.nan, device=resid.device)
    where = axes.positions_of_all(inputs)
    for i, places in enumerate(where):
        for image in places:
            own = image[image >= 0]
            maps[i, own] = _weighted(resid[i, own], slope[i, own])
    return take_each(maps, where), ids


def chosen_layer(model: HookedLLaVA, layer: int | None, *, vision: bool) -> int:
    """The layer that is meant: by default the last of the tower, of the vision tower the last whose output the projector reads.

    Raises `InputError` for a layer that is not there.
    """
    n_layers = model.config.vision.n_layers_run if vision else model.cfg.n_layers
    if layer is None:
        return n_layers - 1
    return as_index(layer, n_layers, "layer")


def _weighted(resid: Float[Tensor, "place d_model"], slope: Float[Tensor, "place d_model"]) -> Float[Tensor, " place"]:
    return (resid @ slope.mean(0)).relu()
