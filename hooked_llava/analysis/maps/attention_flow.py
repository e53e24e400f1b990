"""Attention followed through all layers: rollout, and relevancy.

Only the answer's row of the products is carried, from the top layer down, so no matrix of positions by positions is ever
multiplied by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.analysis.maps.gradients import Ids, Read, with_gradients
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.hook_point import reads_only
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.results.image_axes import ImageAxes, take_each

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

Steps = list[Float[Tensor, "row query key"]]
"""For each layer from the first to the last, what passes from keys to queries."""


@torch.no_grad()
def attention_rollout(
    model: HookedLLaVA, inputs: Inputs, read: Read, *, vision: bool = False
) -> Float[Tensor, "prompt image place"]:
    """Rows of the product over layers of (A + I) / 2, A averaged over heads (Abnar & Zuidema, arXiv 2005.00928).

    With `vision` the product goes on through the vision tower.
    """
    language, tower = _pattern_names(model, vision=vision)
    means: dict[str, Tensor] = {}

    @reads_only
    def keep_mean(pattern: Tensor, hook: Any) -> None:
        means[hook.name] = pattern.float().mean(1).to(inputs.device)

    model.run_with_hooks(inputs, fwd_hooks=[([*language, *tower], keep_mean)], stop_at_layer=model.cfg.n_layers)
    row = _one_hot(to_device(read, inputs.device), inputs.shape[1]) / read.shape[1]
    row = _descend(row, [means[name] for name in language], keep=0.5, pass_on=0.5)
    return _to_places(model, inputs, row, [means[name] for name in tower], keep=0.5, pass_on=0.5, vision=vision)


def relevancy(
    model: HookedLLaVA, inputs: Inputs, read: Read, ids: Ids, *, vision: bool = False
) -> tuple[Float[Tensor, "prompt image place"], Int[Tensor, "prompt read variant"]]:
    """R <- R + E_h[(dA * A)+] R from the first layer to the last (Chefer et al., arXiv 2103.15679), the answer's rows;
    and the answer's tokens.

    dA is the gradient of the answer's logit. With `vision` it goes on through the vision tower (its highest layer that the
    projector reads), as LVLM-Interpret does.
    """
    language, tower = _pattern_names(model, vision=vision)
    patterns, gradients, ids = with_gradients(model, inputs, read, ids, [*language, *tower])
    flow = {name: (gradients[name] * pattern).float().clamp(min=0).mean(1) for name, pattern in patterns.items()}
    row = _descend(
        _one_hot(to_device(read, inputs.device), inputs.shape[1]),
        [flow[name] for name in language],
        keep=1.0,
        pass_on=1.0,
    )
    maps = _to_places(model, inputs, row, [flow[name] for name in tower], keep=1.0, pass_on=1.0, vision=vision)
    return maps, ids


def _pattern_names(model: HookedLLaVA, *, vision: bool) -> tuple[list[str], list[str]]:
    language = model.hooks_table.resolve("pattern")
    return language, model.hooks_table.resolve("vision.blocks.*.attn.hook_pattern") if vision else []


def _one_hot(read: Int[Tensor, "prompt read"], n_positions: int) -> Float[Tensor, "prompt pos"]:
    return torch.zeros(len(read), n_positions, device=read.device).scatter(1, read, 1.0)


def _descend(row: Float[Tensor, "row pos"], steps: Steps, *, keep: float, pass_on: float) -> Float[Tensor, "row pos"]:
    """The row times (keep I + pass_on step) of every layer, the last layer first."""
    for step in reversed(steps):
        row = keep * row + pass_on * (row[:, None] @ step)[:, 0]
    return row


def _to_places(
    model: HookedLLaVA,
    inputs: Inputs,
    row: Float[Tensor, "prompt pos"],
    steps: Sequence[Float[Tensor, "tile query key"]],
    *,
    keep: float,
    pass_on: float,
    vision: bool,
) -> Float[Tensor, "prompt image place"]:
    """The row at the images' places; or carried on through the vision tower to the patches, and pooled as its cells are."""
    axes = ImageAxes.of(inputs)
    where = axes.positions_of_all(inputs)
    if not vision:
        return take_each(row, where)
    cfg = model.config.vision
    at_patches = _descend(_at_tower(model, inputs, row), list(steps), keep=keep, pass_on=pass_on)
    patches = cfg.patches_along("pos")
    by_patch = at_patches[:, patches.start : patches.stop].unflatten(1, cfg.patch_grid)
    return axes.of_patches(by_patch).unflatten(0, (len(inputs), -1))


def _at_tower(model: HookedLLaVA, inputs: Inputs, row: Float[Tensor, "prompt pos"]) -> Float[Tensor, "tile tower_pos"]:
    """Numbers by position as numbers at the vision tower's output: a pooled cell's go to its patches by weight.

    A class token that is dropped gets 0; what is at newlines goes nowhere.
    """
    cfg = model.config.vision
    patches, (_, columns) = cfg.patches_along("pos"), cfg.patch_grid
    arriving = row.new_zeros(sum(map(len, inputs.tiles)), patches.stop)
    images = ((i, image) for i, n in enumerate(inputs.images_per_prompt) for image in range(n))
    for (i, image), layout, tiles in zip(images, inputs.layouts, inputs.tiles, strict=True):
        of_image = row[i, inputs.token_maps[i].image(image).tensor(row.device)]  # (feature)
        if layout.class_token:
            arriving[tiles.start, 0] = of_image[0]
        for grid in layout.grids:
            (tile, patch_row, patch_col), weights = np.moveaxis(grid.patches()[0], -1, 0), grid.patches()[1]
            index = (
                tiles.start + tile,
                patches.start + patch_row * columns + patch_col,
                layout.cell_features(grid.name),
            )
            tile, patch, feature = (to_device(torch.from_numpy(axis), row.device) for axis in index)
            shares = to_device(torch.from_numpy(weights), row.device, row.dtype)
            arriving.index_put_((tile, patch), of_image[feature][..., None] * shares, accumulate=True)
    return arriving
