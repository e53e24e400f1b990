"""Where the patches of every prompt are, and maps of one number for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.errors import InputError
from hooked_llava.prompt.prepare import Inputs

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


def patch_positions(inputs: Inputs) -> Int[Tensor, "prompt image patch"]:
    """The sequence position of every patch.

    Raises `InputError` unless all prompts have equally many images, one at least, and all images one grid of one shape.
    """
    counts = set(inputs.images_per_prompt)
    if len(counts) != 1 or counts == {0}:
        raise InputError(
            f"A patch map needs images, equally many in every prompt; the prompts have "
            f"{', '.join(map(str, inputs.images_per_prompt))}."
        )
    _ = inputs.patch_grid
    rows = [[m.patches(image).tensor() for image in range(m.n_images)] for m in inputs.token_maps]
    return torch.stack([torch.stack(row) for row in rows]).to(inputs.device)


def at_patches(
    values: Float[Tensor, "prompt key"], where: Int[Tensor, "prompt image patch"]
) -> Float[Tensor, "prompt image patch"]:
    """Values by position as values by patch."""
    return values.gather(1, where.flatten(1)).reshape(where.shape)


def sum_pixels(
    model: HookedLLaVA,
    values: Float[Tensor, "all_images channel height width"],
    where: Int[Tensor, "prompt image patch"],
) -> Float[Tensor, "prompt image patch"]:
    """Values by pixel, added up over every patch."""
    size = model.config.vision.patch_size
    boxes = values.sum(1).unfold(1, size, size).unfold(2, size, size)  # (image, row, column, size, size)
    return boxes.sum((-1, -2)).reshape(where.shape)
