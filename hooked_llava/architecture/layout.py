"""How one image becomes positions: the one place that knows of grids, tiles, pooled cells, newlines and class tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple, SupportsFloat, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_llava.architecture.boxes import Box, BoxLike, checked_box, format_box, outside_share
from hooked_llava.architecture.grid import Cell, Grid
from hooked_llava.architecture.image_axis import Number
from hooked_llava.architecture.region import Region
from hooked_llava.architecture.resampling import Filter
from hooked_llava.errors import ConfigError, InputError, SpanError, did_you_mean

ALL = "all"
"""`grid=` for every grid of the layout."""
_Array = TypeVar("_Array", np.ndarray, Tensor)


class Selection(NamedTuple):
    """The cells that a box or mask covers.

    Attributes:
        features (Int[np.ndarray, " feature"]): Their features, counted from the image's first position, ascending.
        outside (float): Share (0 to 1) of the box or mask that no cell of the grids shows.
    """

    features: Int[np.ndarray, " feature"]
    outside: float


@dataclass(frozen=True, kw_only=True)
class ImageLayout:
    """The positions of one image, its features: perhaps a class token, then the grids one after the other.

    A grid's cells show parts of the original image; class token and newlines show none and belong to no object.
    `grid=` is the name of a grid, or "all". Pixels and boxes raise `SpanError` if the original's size is not known.

    >>> from hooked_llava.architecture.grid import GridAxis
    >>> layout = ImageLayout(grids=(Grid(name="base", rows=GridAxis.of(2), columns=GridAxis.of(2), newline="end"),))
    >>> layout.n_features, layout.cell_at(2), layout.feature_of(1, 0), layout.labels()[-2:]
    (5, Cell(grid='base', row=1, col=0), 2, ['img[1,1]', 'img[newline]'])

    Attributes:
        grids (tuple[Grid, ...]): Its grids, in the order of their positions.
        class_token (bool): Whether the features begin with the class token (LLaVA-1.5 with the select strategy "full").
        resample (Filter | None): The processor's resampling filter; None if it is not known, nor any footprint.
    """

    grids: tuple[Grid, ...]
    class_token: bool = False
    resample: Filter | None = "bicubic"

    def __post_init__(self) -> None:
        if not self.grids or len({*self.names, ALL}) != len(self.grids) + 1:
            raise ConfigError(
                f"ImageLayout(grids={list(self.names)}): expected different names, at least one, none {ALL!r}."
            )
        if len(sizes := {grid.original_size for grid in self.grids}) > 1:
            raise ConfigError(f"The grids of one image show originals of different sizes: {sizes}.")

    def __str__(self) -> str:
        return " + ".join(f"{rows} x {columns}" for rows, columns in (grid.shape for grid in self.grids))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the grids, in order."""
        return tuple(grid.name for grid in self.grids)

    @property
    def original_size(self) -> tuple[int, int] | None:
        """(height, width) of the original image, if it is known."""
        return self.grids[0].original_size

    @cached_property
    def n_features(self) -> int:
        """Positions of the image, newlines and class token included."""
        return self.class_token + sum(grid.n_features for grid in self.grids)

    @property
    def n_cells(self) -> int:
        """Cells of all grids."""
        return sum(grid.rows.cells * grid.columns.cells for grid in self.grids)

    @property
    def n_tiles(self) -> int:
        """Images that the vision tower is given for this image."""
        return max(grid.first_tile + grid.n_tiles for grid in self.grids)

    def grid(self, name: str) -> Grid:
        """The grid of that name; raises `SpanError` for a name that the layout does not have."""
        if name not in self.names:
            raise SpanError(
                f"The image has no grid {name!r}; it has {', '.join(self.names)}.{did_you_mean(name, self.names)}"
            )
        return self.grids[self.names.index(name)]

    # Which feature is which

    @cached_property
    def first_features(self) -> dict[str, int]:
        """The first feature of every grid."""
        firsts = np.cumsum([self.class_token, *(grid.n_features for grid in self.grids[:-1])]).tolist()
        return dict(zip(self.names, firsts, strict=True))

    def cell_features(self, grid: str) -> Int[np.ndarray, "row col"]:
        """The features of one grid's cells."""
        return self.grid(grid).cell_offsets + self.first_features[grid]

    def newline_features(self, grid: str = ALL) -> Int[np.ndarray, " newline"]:
        """The features that are newlines."""
        return np.concatenate([self.first_features[g.name] + g.newline_offsets for g in self._chosen(grid)])

    def object_features(self, grid: str = ALL) -> Int[np.ndarray, " cell"]:
        """The features that are cells, in order: what is neither a newline nor a class token."""
        return np.concatenate([self.cell_features(g.name).ravel() for g in self._chosen(grid)])

    def feature_of(self, row: int, col: int, grid: str | None = None) -> int:
        """The feature of a cell, of the first grid by default; raises `SpanError` outside the grid."""
        chosen = self._cell_grid(row, col, grid)
        return self.first_features[chosen.name] + row * chosen.row_stride + col

    def cell_at(self, feature: int) -> Cell:
        """The cell at a feature; raises `SpanError` for a newline, the class token, and outside the image."""
        if not 0 <= feature < self.n_features:
            raise SpanError(f"The image has no feature {feature}; its features go from 0 to {self.n_features - 1}.")
        for grid in self.grids:
            index = feature - self.first_features[grid.name]
            if 0 <= index < grid.n_features:
                row, col = divmod(index, grid.row_stride)
                if row < grid.rows.cells and col < grid.columns.cells:
                    return Cell(grid.name, row, col)
                raise SpanError(f"Feature {feature} is a newline of the {grid.name} grid, which is no patch.")
        raise SpanError(f"Feature {feature} is the class token, which is no patch.")

    def labels(self, name: str = "img") -> list[str]:
        """What stands at every feature: "img[row,col]", or "img.base[row,col]" where there are several grids.

        >>> from hooked_llava.architecture.grid import GridAxis
        >>> grids = (Grid(name="base", rows=GridAxis.of(1), columns=GridAxis.of(1)),
        ...          Grid(name="fine", rows=GridAxis.of(1), columns=GridAxis.of(2), newline="row"))
        >>> ImageLayout(grids=grids).labels()
        ['img.base[0,0]', 'img.fine[0,0]', 'img.fine[0,1]', 'img.fine[0,newline]']
        """
        labels = [f"{name}[cls]"] * self.class_token
        for grid in self.grids:
            called = name if len(self.grids) == 1 else f"{name}.{grid.name}"
            columns = [*map(str, range(grid.columns.cells)), *["newline"] * (grid.newline == "row")]
            labels += [f"{called}[{row},{col}]" for row in range(grid.rows.cells) for col in columns]
            labels += [f"{called}[newline]"] * (grid.newline == "end")
        return labels

    def unfold(self, values: _Array) -> dict[str, _Array]:
        """Numbers [..., feature], an array or a tensor, as numbers by cell: for each grid [..., row, col].

        Newlines, and what comes after the last feature, are left out. Raises `InputError` for too few numbers.
        """
        if (n := values.shape[-1]) < self.n_features:
            raise InputError(f"There are {n} numbers for {self.n_features} features; expected one for each.")
        return {name: values[..., self.cell_features(name)] for name in self.names}

    def fold(self, by_grid: Mapping[str, Float[np.ndarray, "*batch row col"]]) -> Float[np.ndarray, "*batch feature"]:
        """The reverse of `unfold`; NaN for newlines, the class token, and grids that are not given."""
        batch = next(iter(by_grid.values())).shape[:-2]
        values = np.full((*batch, self.n_features), np.nan)
        for name, cells in by_grid.items():
            values[..., self.cell_features(name)] = cells
        return values

    # Pixels of the original image

    def visible_box(self, grid: str = ALL) -> Box:
        """The box around everything that cells show; of no area where they show nothing."""
        stretches = [(g.columns.stretches, g.rows.stretches) for g in self._chosen(grid)]
        shown = [(x, y) for x, y in stretches if x and y] or [([(0.0, 0.0)], [(0.0, 0.0)])]
        left, top = (min(axes[i][0][0] for axes in shown) for i in range(2))
        right, bottom = (max(axes[i][-1][1] for axes in shown) for i in range(2))
        return left, top, right, bottom

    def cell_box(self, row: int, col: int, grid: str | None = None) -> Box:
        """The part (x0, y0, x1, y1) of the original that a cell shows, of the first grid by default.

        Raises `SpanError` outside the grid, and for a cell that shows nothing but the processor's padding.
        """
        chosen = self._cell_grid(row, col, grid)
        x0, y0, x1, y1 = chosen.boxes[row, col].tolist()
        if x0 == x1 or y0 == y1:
            raise SpanError(
                f"Patch ({row}, {col}) shows only the padding that the processor adds, and no part of the image; "
                f"the image lies under the patches that box_to_patches({format_box(self.visible_box(chosen.name))}) gives."
            )
        return x0, y0, x1, y1

    def pixel_to_cells(self, x: SupportsFloat, y: SupportsFloat, grid: str = ALL) -> dict[Cell, float]:
        """The cells that show the point (x, y) of the original, and the weight of its patch in each.

        The weight is 1 where cells are not pooled. Empty where the point is cut away. Raises `SpanError` for a point
        outside the image.
        """
        x, y = float(x), float(y)
        height, width = self._known_size()
        if not (0 <= x < width and 0 <= y < height):
            raise SpanError(
                f"Pixel ({x:g}, {y:g}) is outside the image of {width} x {height} (width x height) pixels; "
                "give x first, then y, counted from the top left corner."
            )
        return {cell: weight for g in self._chosen(grid) for cell, weight in g.at_pixel(x, y).items()}

    def pixel_to_cell(self, x: SupportsFloat, y: SupportsFloat, grid: str | None = None) -> tuple[int, int]:
        """The (row, col) of the cell of one grid, by default the first, that shows a point (most of all, where pooled).

        Raises `SpanError` for a point outside the image or cut away before the model sees it.
        """
        name = self.names[0] if grid is None else grid
        cells = self.pixel_to_cells(x, y, grid=name)
        if not cells:
            height, width = self._known_size()
            raise SpanError(
                f"Pixel ({float(x):g}, {float(y):g}) is cut away before the model sees the image; "
                f"it sees the box {format_box(self.visible_box(name))} of {width} x {height} pixels."
            )
        best = max(cells, key=cells.__getitem__)
        return best.row, best.col

    def box_shares(self, box: BoxLike, grid: str = ALL) -> dict[str, Float[np.ndarray, "row col"]]:
        """For each grid the share (0 to 1) of what each cell shows that the box covers; 0 for cells of padding.

        Raises `SpanError` for a box that is no box, or that lies wholly outside what the cells show.
        """
        box, (height, width) = checked_box(box), self._known_size()
        if self.outside(box, grid) == 1.0:
            raise SpanError(
                f"The box {format_box(box)} lies wholly outside what the model sees, which is "
                f"{format_box(self.visible_box(grid))} of an image of {width} x {height} pixels; boxes are "
                "(x0, y0, x1, y1) in pixels of the original image."
            )
        return {g.name: g.box_shares(box) for g in self._chosen(grid)}

    def outside(self, box: BoxLike, grid: str = ALL) -> float:
        """Share (0 to 1) of the box's area that no cell shows: outside the image, or cut away."""
        x0, y0, x1, y1 = box = checked_box(box)
        grids = self._chosen(grid)
        seen = grids[0].shared(box) if len(grids) == 1 else Region.of(grids).area_in_box(box)
        return outside_share(seen, (x1 - x0) * (y1 - y0))

    def mask_shares(
        self, mask: Bool[np.ndarray, "height width"], grid: str = ALL
    ) -> tuple[dict[str, Float[np.ndarray, "row col"]], float]:
        """For each grid the share of what each cell shows that the mask covers; and the share of the mask that none shows.

        Raises `SpanError` for a mask of another size than the image, an empty one, and one wholly out of sight.
        """
        size = self._known_size()
        if mask.shape != size:
            raise SpanError(
                f"The mask is {mask.shape[0]} x {mask.shape[1]} (height x width) and the original image "
                f"{size[0]} x {size[1]}; give one mask value per pixel of the original."
            )
        if not mask.any():
            raise SpanError("The mask is empty: no pixel is set. Give a mask with at least one True.")
        grids = self._chosen(grid)
        found = {g.name: g.mask_shares(mask) for g in grids}
        seen = found[grids[0].name][1] if len(grids) == 1 else Region.of(grids).area_in_mask(mask)
        outside = outside_share(seen, float(mask.sum()))
        if outside == 1.0:
            raise SpanError(
                "The mask lies wholly outside what the model sees, which is "
                f"{format_box(self.visible_box(grid))} (x0, y0, x1, y1) of the original image."
            )
        return {name: shares for name, (shares, _) in found.items()}, outside

    def box_to_features(
        self, box: BoxLike, *, coverage: Number = 0.5, grid: str = ALL, called: str = "the image"
    ) -> Selection:
        """The cells of which a box covers at least the share `coverage`; 0 takes every cell that it touches.

        `called` is how errors call the image. Raises `SpanError` as `box_shares`, and if no cell is covered enough.
        """
        box = checked_box(box)
        return self._covered(
            self.box_shares(box, grid), coverage, self.outside(box, grid), f"{called} is covered by the box"
        )

    def mask_to_features(
        self,
        mask: Bool[np.ndarray, "height width"],
        *,
        coverage: Number = 0.5,
        grid: str = ALL,
        called: str = "the image",
    ) -> Selection:
        """The cells of which a mask over the original covers at least the share `coverage`; as `box_to_features`."""
        shares, outside = self.mask_shares(mask, grid)
        return self._covered(shares, coverage, outside, f"{called} is covered by the mask")

    def cut(self, grid: str = ALL) -> float:
        """Share (0 to 1) of the original image that no cell shows: cropped, or lost where a grid was unpadded."""
        height, width = self._known_size()
        return self.outside((0, 0, width, height), grid)

    def cut_boxes(self, grid: str = ALL) -> list[Box]:
        """Boxes that together are the part of the original image that no cell shows."""
        return Region.of(self._chosen(grid)).boxes_outside()

    def draw(
        self, values: Float[np.ndarray, "*batch feature"], grid: str = ALL
    ) -> Float[np.ndarray, "*batch height width"]:
        """Numbers by feature as an image of the original's size: the mean of the grids, each by the area its cells show.

        A pixel's value within a grid is the mean of the cells that show it, weighted by area and pooling. NaN where no
        cell shows a pixel; cells whose number is not finite are left out.
        """
        self._known_size()
        unfolded = self.unfold(values)
        drawn = np.stack([g.draw(unfolded[g.name].astype(np.float64)) for g in self._chosen(grid)])
        known = ~np.isnan(drawn)
        total, count = np.where(known, drawn, 0.0).sum(0), known.sum(0)
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    def patch_footprint(self, box: BoxLike) -> Float[np.ndarray, "tile patch_row patch_col"]:
        """How much of a pixel of each vision patch comes from a box of the original: the most within the patch.

        Not zero for exactly the patches whose pixels can change when the box is painted over: resampling blends neighbors
        in. Patches that unpadding cuts away are counted, and touched pixels whole. Raises `ConfigError` if
        the filter is not known.
        """
        box = checked_box(box)
        self._known_size()
        if self.resample is None:
            raise ConfigError("The image processor's resampling filter is not followed here, so no footprint is known.")
        parts = sorted(self.grids, key=lambda grid: grid.first_tile)
        return np.concatenate([grid.patch_footprint(box, self.resample) for grid in parts])

    def footprint(self, box: BoxLike) -> dict[str, Bool[np.ndarray, "row col"]]:
        """For each grid the cells of which some patch takes something of a box, however little; see `patch_footprint`."""
        reached = self.patch_footprint(box) > 0
        found = {}
        for grid in self.grids:
            patches, weights = grid.patches()
            tile, row, col = np.moveaxis(patches, -1, 0)
            found[grid.name] = (reached[tile, row, col] & (weights > 0)).any(-1)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The layout as numbers, names, lists and dicts, for JSON."""
        return {**asdict(self), "grids": [asdict(grid) for grid in self.grids]}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ImageLayout:
        """The layout that `to_dict` wrote; raises `InputError` for anything else.

        >>> from hooked_llava.architecture.grid import GridAxis
        >>> layout = ImageLayout(grids=(Grid(name="base", rows=GridAxis.of(2), columns=GridAxis.of(3)),))
        >>> ImageLayout.from_dict(layout.to_dict()) == layout
        True
        """
        try:
            return cls(**{**stored, "grids": tuple(Grid.from_dict(grid) for grid in stored["grids"])})
        except (TypeError, KeyError, ConfigError) as error:
            raise InputError(
                f"This is no stored image layout ({error}); expected what ImageLayout.to_dict() gives."
            ) from error

    def _chosen(self, grid: str) -> tuple[Grid, ...]:
        return self.grids if grid == ALL else (self.grid(grid),)

    def _cell_grid(self, row: int, col: int, name: str | None) -> Grid:
        grid = self.grids[0] if name is None else self.grid(name)
        rows, columns = grid.shape
        if not (0 <= row < rows and 0 <= col < columns):
            called = "grid" if len(self.grids) == 1 else f"{grid.name} grid"
            raise SpanError(
                f"Patch ({row}, {col}) is outside the {called} of {rows} x {columns} patches; "
                f"rows go from 0 to {rows - 1} and columns from 0 to {columns - 1}."
            )
        return grid

    def _known_size(self) -> tuple[int, int]:
        grid = self.grids[0]
        return grid.rows.pixels.original, grid.columns.pixels.original

    def _covered(self, shares: Mapping[str, np.ndarray], coverage: Number, outside: float, covered: str) -> Selection:
        if not 0 <= coverage <= 1:
            raise SpanError(f"coverage={coverage} is not a share of a patch's area; expected 0 to 1.")
        # Full coverage must survive rounding; 0 means any overlap at all.
        chosen = [self.cell_features(name)[(share > 0) & (share >= coverage - 1e-9)] for name, share in shares.items()]
        features = np.concatenate(chosen)
        if not len(features):
            most = max(float(share.max(initial=0.0)) for share in shares.values())
            raise SpanError(
                f"No patch of {covered} to a share of {coverage:g}; the most is {most:.2g}. "
                "Lower coverage= (0 takes every patch that it touches)."
            )
        return Selection(features, outside)
