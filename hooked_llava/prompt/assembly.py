"""Which projected patches the positions of each image are made of, as index tensors, worked out before the model runs.

Only where images are cut into tiles (LLaVA-NeXT, LLaVA-OneVision); `model.components.assembly` applies the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.machine.devices import to_device


@dataclass(frozen=True, eq=False, kw_only=True)
class Assembly:
    """How the patches of all tiles become the features of all images.

    Rows are counted over the patches of all tiles, one tile after the other; after them come the newline and a row of
    zeros, which fills up images with fewer features than the longest. A feature is one row (one tap), or where a grid
    is pooled (LLaVA-OneVision) the weighted sum of up to four.

    Attributes:
        rows (Int[Tensor, "image feature tap"]): For each feature the rows that it is made of.
        weights (Float[Tensor, "image feature tap"] | None): Their weights; None where every feature is one row as it is.
        real (Int[Tensor, " real"] | None): Indices, in [image feature] flattened, of the features that are not zeros to
            fill up an image; None if all are.
        n_tiles (int): Tiles of all images.

    >>> from hooked_llava.architecture import Grid, GridAxis
    >>> grid = Grid(name="base", rows=GridAxis.of(1), columns=GridAxis.of(2), newline="end")
    >>> assembly = Assembly.of([ImageLayout(grids=(grid,))])
    >>> assembly.rows.tolist(), assembly.weights, assembly.real
    ([[[0], [1], [2]]], None, None)
    """

    rows: Int[Tensor, "image feature tap"]
    weights: Float[Tensor, "image feature tap"] | None
    real: Int[Tensor, " real"] | None
    n_tiles: int

    @classmethod
    def of(cls, layouts: Sequence[ImageLayout]) -> Assembly:
        """For images of these layouts, none of which has a class token; on the CPU."""
        per_tile = [_patches_per_tile(layout) for layout in layouts]
        firsts = np.cumsum([0, *(layout.n_tiles * n for layout, n in zip(layouts, per_tile, strict=True))])
        newline = int(firsts[-1])
        taps = max(4 if any(grid.pooled for grid in layout.grids) else 1 for layout in layouts)
        longest = max(layout.n_features for layout in layouts)
        rows = np.full((len(layouts), longest, taps), newline + 1)
        weights = np.zeros((len(layouts), longest, taps))
        for image, layout in enumerate(layouts):
            rows[image, : layout.n_features] = newline
            weights[image, : layout.n_features, 0] = 1.0
            for grid in layout.grids:
                here = layout.cell_features(grid.name)
                (tile, row, col), shares = np.moveaxis(grid.patches()[0], -1, 0), grid.patches()[1]
                patch = row * grid.columns.patches_per_tile + col
                n = shares.shape[-1]
                rows[image, here, :n] = firsts[image] + tile * per_tile[image] + patch
                weights[image, here, :n] = shares
        filled = np.arange(longest) < np.array([[layout.n_features] for layout in layouts])
        return cls(
            rows=torch.from_numpy(rows),
            weights=torch.from_numpy(weights).float() if taps > 1 else None,
            real=None if filled.all() else torch.from_numpy(np.flatnonzero(filled)),
            n_tiles=sum(layout.n_tiles for layout in layouts),
        )

    def to(self, device: torch.device | str) -> Assembly:
        """The same on a device."""
        tensors = {name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def _patches_per_tile(layout: ImageLayout) -> int:
    grid = layout.grids[0]
    return grid.rows.patches_per_tile * grid.columns.patches_per_tile
