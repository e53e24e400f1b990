"""A grid of cells: positions of one image in rows and columns, with the patches they come from and the pixels they show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_llava.architecture.boxes import Box
from hooked_llava.architecture.image_axis import ImageAxis, Number
from hooked_llava.architecture.resampling import Filter
from hooked_llava.errors import ConfigError, SpanError

Newline: TypeAlias = Literal["", "row", "end"]
"""Newline positions of a grid: none, one after each row, or one after the whole grid."""


class Cell(NamedTuple):
    """One cell of an image's layout.

    Attributes:
        grid (str): Name of its grid.
        row (int): Its row in that grid, counted from 0.
        col (int): Its column.
    """

    grid: str
    row: int
    col: int


@dataclass(frozen=True, kw_only=True)
class GridAxis:
    """The rows or the columns of a grid, and the patches of the canvas that they come from.

    Of the `n_tiles * patches_per_tile` patches along the canvas, `kept` are kept from `first` on (the others are cut
    away as padding), and these are pooled bilinearly to `cells` cells, each the weighted mean of at most two of them.
    With `cells` equal to `kept` nothing is pooled, and every cell is one patch.

    >>> GridAxis(n_tiles=2, patches_per_tile=3, first=1, kept=4, cells=2).weights
    array([[0. , 0.5, 0.5, 0. , 0. , 0. ],
           [0. , 0. , 0. , 0.5, 0.5, 0. ]])

    Attributes:
        n_tiles (int): Vision tiles along the canvas.
        patches_per_tile (int): Patches along one tile.
        first (int): The first patch that is kept.
        kept (int): How many patches are kept from there on.
        cells (int): How many cells these are pooled to.
        image (ImageAxis | None): How the original image came to the canvas; None if the original's size is not known.
    """

    n_tiles: int = 1
    patches_per_tile: int
    first: int = 0
    kept: int
    cells: int
    image: ImageAxis | None = None

    def __post_init__(self) -> None:
        if not (self.first >= 0 and self.kept >= 0 and self.first + self.kept <= self.n_patches):
            raise ConfigError(
                f"GridAxis(first={self.first}, kept={self.kept}): expected a stretch of the {self.n_patches} patches."
            )
        if self.cells > self.kept or self.cells < min(self.kept, 1):
            raise ConfigError(f"GridAxis(cells={self.cells}): expected 1 to kept={self.kept} cells.")
        of_image = (self.image.n_tiles, self.image.patches_per_tile) if self.image else None
        if of_image is not None and of_image != (self.n_tiles, self.patches_per_tile):
            raise ConfigError(
                f"GridAxis(n_tiles={self.n_tiles}, patches_per_tile={self.patches_per_tile}): the axis of the image has "
                f"{of_image[0]} and {of_image[1]}; expected the same."
            )

    @classmethod
    def of(
        cls, patches: ImageAxis | int, *, first: int = 0, kept: int | None = None, cells: int | None = None
    ) -> GridAxis:
        """From an image's axis, or from a number of patches on one tile; by default every patch is a cell.

        >>> GridAxis.of(24).cells
        24
        """
        image = patches if isinstance(patches, ImageAxis) else None
        n_tiles = patches.n_tiles if isinstance(patches, ImageAxis) else 1
        per_tile = patches.patches_per_tile if isinstance(patches, ImageAxis) else patches
        kept = n_tiles * per_tile - first if kept is None else kept
        cells = kept if cells is None else cells
        return cls(n_tiles=n_tiles, patches_per_tile=per_tile, first=first, kept=kept, cells=cells, image=image)

    @property
    def n_patches(self) -> int:
        """Patches along the canvas."""
        return self.n_tiles * self.patches_per_tile

    @property
    def pooled(self) -> bool:
        """Whether a cell is made of several patches."""
        return self.cells != self.kept

    @cached_property
    def taps(self) -> tuple[Int[np.ndarray, "cell tap"], Float[np.ndarray, "cell tap"]]:
        """For each cell the patches (counted along the canvas) that it is made of, and their weights.

        One tap, or two where the axis is pooled, as `torch.nn.functional.interpolate(mode="bilinear")` weighs them.
        """
        cell = np.arange(self.cells)[:, None]
        if not self.pooled:
            return self.first + cell, np.ones(cell.shape)
        # In whole numbers: a weight that is zero must come out as zero.
        place, part = np.divmod(np.maximum((2 * cell + 1) * self.kept - self.cells, 0), 2 * self.cells)
        share = part / (2 * self.cells)
        patches = np.minimum(np.concatenate([place, place + 1], axis=1), self.kept - 1)
        return self.first + patches, np.concatenate([1 - share, share], axis=1)

    @cached_property
    def weights(self) -> Float[np.ndarray, "cell patch"]:
        """Weight of each patch along the canvas in each cell; every row sums to 1."""
        weights = np.zeros((self.cells, self.n_patches))
        patches, shares = self.taps
        np.add.at(weights, (np.arange(self.cells)[:, None], patches), shares)
        return weights

    @cached_property
    def shown(self) -> Bool[np.ndarray, " patch"]:
        """The patches that are part of some cell."""
        return np.any(self.weights > 0, axis=0)

    @property
    def pixels(self) -> ImageAxis:
        """How the original image came to the canvas; raises `SpanError` if the original's size is not known."""
        if self.image is None:
            raise SpanError(
                "The original images are not known, since pixel_values were given; pixels and boxes need "
                "prepare(question, images=...), which follows the processor's resizing and cropping."
            )
        return self.image

    @cached_property
    def starts(self) -> Float[np.ndarray, " cell"]:
        """Where in the original each cell begins: the first of its patches."""
        patches, shares = self.taps
        return np.where(shares > 0, self.pixels.starts[patches], np.inf).min(1)

    @cached_property
    def stops(self) -> Float[np.ndarray, " cell"]:
        """Where in the original each cell ends: the last of its patches."""
        patches, shares = self.taps
        return np.where(shares > 0, self.pixels.stops[patches], -np.inf).max(1)

    @cached_property
    def lengths(self) -> Float[np.ndarray, " cell"]:
        """How many original pixels each cell shows; the weighted mean over its patches."""
        return self.pool(self.pixels.stops - self.pixels.starts)

    @property
    def borders(self) -> Float[np.ndarray, " border"] | None:
        """The lines between the cells in the original, the outer ones included; None unless cells lie side by side."""
        if self.pooled or (self.starts[1:] != self.stops[:-1]).any():
            return None
        return np.append(self.starts, self.stops[-1:])

    @cached_property
    def stretches(self) -> list[tuple[float, float]]:
        """The stretches of the original that cells show, neighbors joined."""
        joined: list[tuple[float, float]] = []
        for start, stop in zip(
            self.pixels.starts[self.shown].tolist(), self.pixels.stops[self.shown].tolist(), strict=True
        ):
            if start == stop:
                continue
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, stop))
        return joined

    def pool(self, by_patch: Float[np.ndarray, " patch *rest"]) -> Float[np.ndarray, " cell *rest"]:
        """Numbers for each patch along the canvas as numbers for each cell: the weighted mean of its patches."""
        kept = by_patch[self.first : self.first + self.kept]
        return self.weights[:, self.first : self.first + self.kept] @ kept if self.pooled else kept

    def overlaps(self, start: Number, stop: Number) -> Float[np.ndarray, " cell"]:
        """How many original pixels each cell shares with a stretch of the original; pooled as `lengths`."""
        return self.pool(self.pixels.overlaps(start, stop))

    def shared(self, start: Number, stop: Number) -> float:
        """How many pixels of a stretch of the original some cell shows."""
        return float(self.pixels.overlaps(start, stop)[self.shown].sum())


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows x columns of cells, one position each, row by row, perhaps with newline positions.

    The tiles of its canvas are the vision tower's inputs `first_tile`, `first_tile + 1`, ..., row by row.

    >>> grid = Grid(name="fine", rows=GridAxis.of(2), columns=GridAxis.of(3), newline="row")
    >>> grid.shape, grid.n_features, grid.cell_offsets.tolist(), grid.newline_offsets.tolist()
    ((2, 3), 8, [[0, 1, 2], [4, 5, 6]], [3, 7])

    Attributes:
        name (str): "base" or "fine".
        rows (GridAxis): Its rows.
        columns (GridAxis): Its columns.
        newline (Newline): "row": a newline position after each row; "end": one after the last; "": none.
        first_tile (int): The first of its vision tiles.
    """

    name: str
    rows: GridAxis
    columns: GridAxis
    newline: Newline = ""
    first_tile: int = 0

    def __post_init__(self) -> None:
        if self.newline not in get_args(Newline):
            raise ConfigError(f"Grid(newline={self.newline!r}): expected one of {get_args(Newline)}.")
        if (self.rows.image is None) != (self.columns.image is None):
            raise ConfigError("The original's size is known along one axis of the grid only; expected both or none.")

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Grid:
        """The grid that `dataclasses.asdict` wrote."""

        def axis(fields: Mapping[str, Any]) -> GridAxis:
            image = fields["image"]
            return GridAxis(**{**fields, "image": None if image is None else ImageAxis(**image)})

        return cls(**{**stored, "rows": axis(stored["rows"]), "columns": axis(stored["columns"])})

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return self.rows.cells, self.columns.cells

    @property
    def pooled(self) -> bool:
        """Whether a cell is made of several patches."""
        return self.rows.pooled or self.columns.pooled

    @property
    def n_tiles(self) -> int:
        """Tiles of its canvas."""
        return self.rows.n_tiles * self.columns.n_tiles

    @property
    def original_size(self) -> tuple[int, int] | None:
        """(height, width) of the original image, if it is known."""
        if self.rows.image is None or self.columns.image is None:
            return None
        return self.rows.image.original, self.columns.image.original

    @property
    def row_stride(self) -> int:
        """Positions from the beginning of one row to the beginning of the next."""
        return self.columns.cells + (self.newline == "row")

    @property
    def n_features(self) -> int:
        """Positions of its cells and newlines."""
        return self.rows.cells * self.row_stride + (self.newline == "end")

    @property
    def cell_offsets(self) -> Int[np.ndarray, "row col"]:
        """The position of every cell, counted from the grid's first."""
        return np.arange(self.rows.cells)[:, None] * self.row_stride + np.arange(self.columns.cells)

    @property
    def newline_offsets(self) -> Int[np.ndarray, " newline"]:
        """The positions of its newlines, counted from the grid's first."""
        if self.newline == "end":
            return np.array([self.n_features - 1])
        return np.arange(self.rows.cells if self.newline == "row" else 0) * self.row_stride + self.columns.cells

    @property
    def boxes(self) -> Float[np.ndarray, "row col 4"]:
        """The part (x0, y0, x1, y1) of the original that each cell shows; of no area where it shows only padding."""
        x0, y0 = np.meshgrid(self.columns.starts, self.rows.starts)
        x1, y1 = np.meshgrid(self.columns.stops, self.rows.stops)
        return np.stack([x0, y0, x1, y1], axis=-1)

    def patches(self) -> tuple[Int[np.ndarray, "row col tap 3"], Float[np.ndarray, "row col tap"]]:
        """For each cell the (tile, patch_row, patch_col) of the vision patches that it is made of, and their weights.

        One tap; or up to four where the grid is pooled, of which some may have weight 0.
        """
        (rows, row_weights), (cols, col_weights) = self.rows.taps, self.columns.taps
        row_tile, row = np.divmod(rows[:, None, :, None], self.rows.patches_per_tile)
        col_tile, col = np.divmod(cols[None, :, None, :], self.columns.patches_per_tile)
        tile = self.first_tile + row_tile * self.columns.n_tiles + col_tile
        taps = np.stack(np.broadcast_arrays(tile, row, col), axis=-1)
        weights = row_weights[:, None, :, None] * col_weights[None, :, None, :]
        n_taps = rows.shape[1] * cols.shape[1]
        return taps.reshape(*self.shape, n_taps, 3), weights.reshape(*self.shape, n_taps)

    def at_pixel(self, x: Number, y: Number) -> dict[Cell, float]:
        """The cells that show a point of the original, and the weight of its patch in each; none where it is cut away."""
        row, col = self.rows.pixels.patch_of(y), self.columns.pixels.patch_of(x)
        if row is None or col is None:
            return {}
        weights = np.outer(self.rows.weights[:, row], self.columns.weights[:, col])
        return {Cell(self.name, int(r), int(c)): float(weights[r, c]) for r, c in np.argwhere(weights > 0)}

    def box_shares(self, box: Box) -> Float[np.ndarray, "row col"]:
        """Share (0 to 1) of what each cell shows that the box covers; 0 where a cell shows only padding."""
        x0, y0, x1, y1 = box
        return self._shares(np.outer(self.rows.overlaps(y0, y1), self.columns.overlaps(x0, x1)))

    def mask_shares(self, mask: Bool[np.ndarray, "height width"]) -> tuple[Float[np.ndarray, "row col"], float]:
        """Share of what each cell shows that the mask covers, and how many pixels of the mask some cell shows."""
        covered = self.rows.pixels.pixel_overlaps() @ mask.astype(np.float64) @ self.columns.pixels.pixel_overlaps().T
        seen = float(covered[np.ix_(self.rows.shown, self.columns.shown)].sum())
        return self._shares(self.columns.pool(self.rows.pool(covered).T).T), seen

    def draw(self, values: Float[np.ndarray, "*batch row col"]) -> Float[np.ndarray, "*batch height width"]:
        """Values of the cells as an image: each pixel the mean of the cells that show it, by area and weight.

        NaN where no cell shows a pixel. Cells whose value is not finite are left out.
        """
        rows = self.rows.pool(self.rows.pixels.pixel_overlaps())
        columns = self.columns.pool(self.columns.pixels.pixel_overlaps())
        finite = np.isfinite(values)
        total = rows.T @ np.where(finite, values, 0.0) @ columns
        if finite.all():
            weight = np.broadcast_to(np.outer(rows.sum(0), columns.sum(0)), total.shape)
        else:
            weight = rows.T @ finite.astype(np.float64) @ columns
        return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)

    def patch_footprint(self, box: Box, resample: Filter = "bicubic") -> Float[np.ndarray, "tile patch_row patch_col"]:
        """How much of a pixel of each patch comes from a box of the original: the most within the patch.

        With resampling, so a little beyond what the patch shows; patches that unpadding cuts away are counted too.
        """
        x0, y0, x1, y1 = box
        rows = self.rows.pixels.footprint(y0, y1, resample).reshape(self.rows.n_tiles, -1)
        columns = self.columns.pixels.footprint(x0, x1, resample).reshape(self.columns.n_tiles, -1)
        product = rows[:, None, :, None] * columns[None, :, None, :]
        return product.reshape(self.n_tiles, rows.shape[1], columns.shape[1])

    def shared(self, box: Box) -> float:
        """How many square pixels of a box some cell shows."""
        x0, y0, x1, y1 = box
        return self.rows.shared(y0, y1) * self.columns.shared(x0, x1)

    def _shares(self, covered: Float[np.ndarray, "row col"]) -> Float[np.ndarray, "row col"]:
        areas = np.outer(self.rows.lengths, self.columns.lengths)
        shares = np.divide(covered, areas, out=np.zeros_like(areas), where=areas > 0)
        return np.minimum(shares, 1.0)  # rounding can lift a fully covered cell a hair over 1
