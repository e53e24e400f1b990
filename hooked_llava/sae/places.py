"""Where an activation comes from, in whole numbers: its prompt, image, tile, cell, position and token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.prompt.token_map import TokenMap

PLACE_COLUMNS = ("row", "image", "tile", "cell", "position", "token")
"""What the numbers of a place are.

row: the prompt's number in the data. image: which image of the prompt. tile: which of the image's tiles the cell comes from (the
one that weighs most, where it is pooled). cell: what `layout.cell_at` takes. position: in the prompt, padding not counted.
token: the token's id. image, tile and cell are -1 at text; tile and cell at newlines and class tokens.
"""
_NONE = -1
_LAYOUTS_KEPT = 256


def places_of(token_map: TokenMap, row: int, positions: Sequence[int]) -> Int[Tensor, "position column"]:
    """The places of some positions of a prompt, one number for each of `PLACE_COLUMNS`.

    >>> from hooked_llava.architecture.layouts import llava_layout
    >>> token_map = TokenMap(
    ...     token_ids=(0, 7, 9, 9, 5), real=range(1, 5), image_starts=(2,), layouts=(llava_layout(1, 2),)
    ... )
    >>> places_of(token_map, 3, [1, 3]).tolist()
    [[3, -1, -1, -1, 0, 7], [3, 0, 0, 1, 2, 9]]
    """
    at = np.full((len(token_map), len(PLACE_COLUMNS)), _NONE, dtype=np.int32)
    at[:, 0], at[:, 4], at[:, 5] = row, np.arange(len(token_map)) - token_map.real.start, token_map.token_ids
    for image, (here, layout) in enumerate(zip(token_map.image_ranges, token_map.layouts, strict=True)):
        at[here.start : here.stop, 1] = image
        at[here.start : here.stop, 2:4] = _tiles_and_cells(layout)
    return torch.from_numpy(at[list(positions)])


@lru_cache(maxsize=_LAYOUTS_KEPT)
def _tiles_and_cells(layout: ImageLayout) -> Int[np.ndarray, "feature 2"]:
    found = np.full((layout.n_features, 2), _NONE, dtype=np.int32)
    for grid in layout.grids:
        cells = layout.cell_features(grid.name)
        patches, weights = grid.patches()  # (row, col, tap, 3), (row, col, tap)
        tiles = np.take_along_axis(patches[..., 0], weights.argmax(-1)[..., None], axis=-1)[..., 0]
        found[cells, 0], found[cells, 1] = tiles, cells
    return found
