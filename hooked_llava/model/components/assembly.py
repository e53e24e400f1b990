"""Joins the projected patches of tiles to the features of images (LLaVA-NeXT, LLaVA-OneVision).

`prompt.assembly` works out beforehand which patches these are; here they are gathered, pooled, and newlines put in.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.prompt.assembly import Assembly


def assemble(
    projected: Float[Tensor, "run_tile patch d_model"], newline: Float[Tensor, " d_model"], assembly: Assembly
) -> Float[Tensor, "run_image feature d_model"]:
    """Each image's features, from the projected patches of its tiles; of one run over all tiles, or of several.

    Shorter images are filled up with zeros.

    >>> assembly = Assembly(rows=torch.tensor([[[0], [1], [2]]]), weights=None, real=None, n_tiles=1)
    >>> assemble(torch.tensor([[[5.0], [6.0]]]), torch.tensor([7.0]), assembly).tolist()
    [[[5.0], [6.0], [7.0]]]
    """
    per_tile, d_model = projected.shape[1:]
    runs = projected.reshape(-1, assembly.n_tiles * per_tile, d_model)  # (run, tile_patch, d_model)
    ends = torch.stack([newline.to(runs), runs.new_zeros(d_model)])
    source = torch.cat([runs, ends.expand(len(runs), -1, -1)], dim=1)
    if assembly.weights is None:
        return source[:, assembly.rows[..., 0]].flatten(0, 1)
    images = 0.0
    for rows, weights in zip(assembly.rows.unbind(-1), assembly.weights.unbind(-1), strict=True):
        images = images + at_least_float32(source[:, rows]) * weights[..., None]  # (run, image, feature, d_model)
    return images.to(runs.dtype).flatten(0, 1)
