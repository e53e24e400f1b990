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

In the vision tower and the projector the position is that within the tile, and the token is -1; the cell is the one in which
the patch weighs most, and -1 for class tokens and for patches that no cell shows.
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


def places_in_tiles(
    token_map: TokenMap, row: int, positions: Sequence[int], patches: range
) -> Int[Tensor, "position column"]:
    """The places of some positions of every tile of a prompt's images, of which `patches` are patches.

    >>> from hooked_llava.architecture.layouts import llava_layout
    >>> token_map = TokenMap(token_ids=(0, 9, 9), real=range(3), image_starts=(1,), layouts=(llava_layout(1, 2),))
    >>> places_in_tiles(token_map, 3, [0, 2], range(1, 3)).tolist()
    [[3, 0, 0, -1, 0, -1], [3, 0, 0, 1, 2, -1]]
    """
    found = []
    at_patches = np.array([position in patches for position in positions], dtype=bool)
    for image, layout in enumerate(token_map.layouts):
        at = np.full((layout.n_tiles, len(positions), len(PLACE_COLUMNS)), _NONE, dtype=np.int32)
        at[..., 0], at[..., 1], at[..., 4] = row, image, positions
        at[..., 2] = np.arange(layout.n_tiles)[:, None]
        at[:, at_patches, 3] = _cells_of_patches(layout)[:, np.array(positions)[at_patches] - patches.start]
        found.append(at.reshape(-1, len(PLACE_COLUMNS)))
    return torch.from_numpy(np.concatenate(found))


@lru_cache(maxsize=_LAYOUTS_KEPT)
def _cells_of_patches(layout: ImageLayout) -> Int[np.ndarray, "tile patch"]:
    per_row, per_column = (axis.patches_per_tile for axis in (layout.grids[0].columns, layout.grids[0].rows))
    found = np.full((layout.n_tiles, per_column * per_row), _NONE, dtype=np.int32)
    for grid in layout.grids:
        patches, weights = grid.patches()  # (row, col, tap, 3), (row, col, tap)
        cells = np.broadcast_to(layout.cell_features(grid.name)[..., None], weights.shape)
        order = weights.argsort(axis=None, kind="stable")  # the cell of the largest weight is written last
        order = order[weights.flat[order] > 0]
        tile, row, col = patches.reshape(-1, 3)[order].T
        found[tile, row * per_row + col] = cells.flat[order]
    return found


@lru_cache(maxsize=_LAYOUTS_KEPT)
def _tiles_and_cells(layout: ImageLayout) -> Int[np.ndarray, "feature 2"]:
    found = np.full((layout.n_features, 2), _NONE, dtype=np.int32)
    for grid in layout.grids:
        cells = layout.cell_features(grid.name)
        patches, weights = grid.patches()  # (row, col, tap, 3), (row, col, tap)
        tiles = np.take_along_axis(patches[..., 0], weights.argmax(-1)[..., None], axis=-1)[..., 0]
        found[cells, 0], found[cells, 1] = tiles, cells
    return found
