"""Numbers by position of the images as labelled arrays: the one place that knows their axes.

| images | axes | a place is |
|---|---|---|
| one grid each, all of one shape (LLaVA-1.5) | image, patch_row, patch_col | a patch |
| all others (LLaVA-NeXT, OneVision) | image, feature | a position of the image, newlines included |

`feature` counts the positions of an image from its first, as the axis of `hook_image_embed` does. Shorter images are filled
up with NaN, and a place for which a method measures nothing is NaN. The coordinate `label` says what each feature is
("img.fine[0,3]"); where one layout serves for all images, so do `grid`, `row` and `col` (-1 for what is no cell).
`ImageLayout.unfold` makes [..., feature] into [..., row, col] for each grid, and `ImageLayout.fold` the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.layouts import same_positions
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.requirements import an_image, images_alike
from hooked_llava.prompt.token_map import TokenMap

if TYPE_CHECKING:
    import xarray as xr

BY_PATCH, BY_FEATURE = ("patch_row", "patch_col"), ("feature",)
"""The axes of one image."""


@dataclass(frozen=True, eq=False)
class ImageAxes:
    """How numbers by position of some images are laid out.

    >>> from hooked_llava.architecture.layouts import llava_layout
    >>> ImageAxes((llava_layout(2, 3), llava_layout(2, 3))).shape
    (2, 3)
    >>> axes = ImageAxes((llava_layout(1, 2), llava_layout(3, 1)))
    >>> axes.dims, axes.features(axes.layouts[0]).tolist()
    (('feature',), [0, 1, -1])

    Attributes:
        layouts (tuple[ImageLayout, ...]): The images, one at least.
    """

    layouts: tuple[ImageLayout, ...]

    @classmethod
    def of(cls, inputs: Inputs) -> ImageAxes:
        """For the images of all prompts; raises `InputError` where there is none."""
        if missing := an_image(inputs.n_images):
            raise InputError(f"A patch map {missing}")
        return cls(inputs.layouts)

    @cached_property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the one grid that every image has; None where images have several, or unequal ones."""
        shapes = {tuple(grid.shape for grid in layout.grids) for layout in self.layouts}
        first = next(iter(shapes))
        return first[0] if len(shapes) == len(first) == 1 else None

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes of one image."""
        return BY_PATCH if self.grid else BY_FEATURE

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Their lengths."""
        return self.grid or (max(layout.n_features for layout in self.layouts),)

    @property
    def n_places(self) -> int:
        """Places of one image, those that fill up shorter ones included."""
        return math.prod(self.shape)

    def features(self, layout: ImageLayout) -> Int[np.ndarray, " place"]:
        """The feature of an image at every place; -1 where it has none."""
        if self.grid:
            return layout.object_features()
        places = np.arange(self.n_places)
        return np.where(places < layout.n_features, places, -1)

    def ranked(
        self,
        values: Float[np.ndarray, "image ..."],
        layouts: Sequence[ImageLayout] | None = None,
        *,
        cells_only: bool = True,
    ) -> Int[np.ndarray, "ranked 2"]:
        """(image, feature) from the largest of some values to the smallest, equal ones in their order.

        What is NaN is left out, and with `cells_only` newlines. `layouts` are those of the images, by default all.
        """
        layouts = self.layouts if layouts is None else layouts
        features = np.stack([self.features(layout) for layout in layouts])
        flat = np.asarray(values, dtype=np.float64).reshape(features.shape)
        counted = (features >= 0) & ~np.isnan(flat)
        if cells_only:
            cells = zip(features, layouts, strict=True)
            counted &= np.stack([np.isin(own, layout.object_features()) for own, layout in cells])
        order = np.argsort(-flat[counted], kind="stable")
        return np.stack([np.nonzero(counted)[0], features[counted]], axis=-1)[order]

    def positions(self, token_map: TokenMap) -> Int[Tensor, "image place"]:
        """The sequence position of every place of one prompt's images; -1 where there is none."""
        found = [self.features(layout) for layout in token_map.layouts]
        starts = np.array(token_map.image_starts)[:, None]
        return torch.from_numpy(np.where(np.stack(found) < 0, -1, found + starts))

    def positions_of_all(self, inputs: Inputs) -> Int[Tensor, "prompt image place"]:
        """The same for several prompts; raises `InputError` unless they have equally many images, one at least."""
        if missing := images_alike(inputs.images_per_prompt):
            raise InputError(f"A patch map {missing}")
        return to_device(torch.stack([self.positions(m) for m in inputs.token_maps]), inputs.device)

    def at_images(self, by_image: Iterable[Float[Tensor, " _"]]) -> Float[Tensor, "image place"]:
        """Numbers by feature, image by image, as numbers by place."""
        pairs = zip(by_image, self.layouts, strict=True)
        return torch.stack([take(own, torch.from_numpy(self.features(layout))) for own, layout in pairs])

    def of_patches(self, by_patch: Float[Tensor, "tile patch_row patch_col"]) -> Float[Tensor, "image place"]:
        """Numbers by patch of all vision tiles as numbers by place: a pooled cell has the weighted mean of its patches.

        NaN for newlines and class tokens, and where an image has no place.
        """
        of_image = by_patch.detach().cpu().split([layout.n_tiles for layout in self.layouts])
        by_image = [_pooled(layout, own.numpy()) for layout, own in zip(self.layouts, of_image, strict=True)]
        return to_device(self.at_images(map(torch.from_numpy, by_image)), by_patch.device, by_patch.dtype)

    def labelled(
        self,
        values: Float[np.ndarray, "*rest place"],
        dims: Sequence[str],
        *,
        layouts: Sequence[ImageLayout] | None = None,
        coords: Mapping[str, Any] | None = None,
        **about: Any,
    ) -> xr.DataArray:
        """Numbers [*dims, place] as an array with the images' axes in place of the last.

        Fewer places than the axes have are filled up with NaN. `layouts` are those of the images along the axes "prompt"
        and "image" of `dims`, by default all. `coords` and `about` go to the array.
        """
        import xarray as xr

        layouts = self.layouts if layouts is None else layouts
        owners = [dim for dim in dims if dim in ("prompt", "image")]
        sizes = [values.shape[list(dims).index(dim)] for dim in owners]
        missing = self.n_places - values.shape[-1]
        if missing:
            values = np.pad(values, [(0, 0)] * len(dims) + [(0, missing)], constant_values=np.nan)
        return xr.DataArray(
            values.reshape(*values.shape[:-1], *self.shape),
            dims=(*dims, *self.dims),
            coords={**self._coords(layouts, owners, sizes), **(coords or {})},
            **about,
        )

    def _coords(self, layouts: Sequence[ImageLayout], owners: list[str], sizes: list[int]) -> dict[str, Any]:
        if self.grid:
            return {}
        n = self.n_places
        labels = np.array([[*layout.labels(), *[""] * (n - layout.n_features)] for layout in layouts])
        coords: dict[str, Any] = {"feature": np.arange(n)}
        if not all(same_positions(self.layouts[0], layout) for layout in self.layouts):
            return coords | {"label": ((*owners, "feature"), labels.reshape(*sizes, n))}
        return coords | {"label": ("feature", labels[0])} | _cell_coords(self.layouts[0])


def take(values: Float[Tensor, "*rest pos"], where: Int[Tensor, "*place"]) -> Float[Tensor, "*rest *place"]:
    """Numbers by position at some places; NaN where `where` is negative.

    >>> take(torch.tensor([0.5, 2.0]), torch.tensor([[1, 0], [1, -1]])).tolist()
    [[2.0, 0.5], [2.0, nan]]
    """
    where = to_device(where, values.device)
    return values[..., where.clamp(min=0)].masked_fill(where < 0, float("nan"))


def take_each(
    values: Float[Tensor, "prompt pos"], where: Int[Tensor, "prompt image place"]
) -> Float[Tensor, "prompt image place"]:
    """The same for several prompts, each of which has places of its own."""
    return torch.stack([take(own, places) for own, places in zip(values, where, strict=True)])


def image_dims(result: Any) -> list[str]:
    """Those axes of a result that are an image's own: to sum or average over its places.

    >>> import xarray as xr
    >>> image_dims(xr.DataArray(np.ones((1, 2, 2)), dims=("layer", "patch_row", "patch_col")))
    ['patch_row', 'patch_col']
    """
    return [str(dim) for dim in result.dims if dim in (*BY_PATCH, *BY_FEATURE)]


def _cell_coords(layout: ImageLayout) -> dict[str, Any]:
    """For each feature the name of its grid, and its row and column there."""
    names = np.full(layout.n_features, "", dtype=f"U{max(map(len, layout.names))}")
    rows, columns = (np.full(layout.n_features, -1) for _ in range(2))
    for grid in layout.grids:
        first = layout.first_features[grid.name]
        names[first : first + grid.n_features] = grid.name
        rows[layout.cell_features(grid.name)] = np.arange(grid.rows.cells)[:, None]
        columns[layout.cell_features(grid.name)] = np.arange(grid.columns.cells)
    return {"grid": ("feature", names), "row": ("feature", rows), "col": ("feature", columns)}


def patches_of_cells(layout: ImageLayout) -> dict[int, dict[int, list[int]]]:
    """For the feature of every cell the vision patches that it is made of: by tile, counted row by row.

    >>> from hooked_llava.architecture.layouts import llava_layout
    >>> patches_of_cells(llava_layout(1, 2, class_token=True))
    {1: {0: [0]}, 2: {0: [1]}}
    """
    found: dict[int, dict[int, list[int]]] = {}
    for grid in layout.grids:
        patches, weights = grid.patches()
        number = patches[..., 1] * grid.columns.patches_per_tile + patches[..., 2]
        for (row, col), feature in np.ndenumerate(layout.cell_features(grid.name)):
            found[int(feature)] = own = {}
            for tap in np.flatnonzero(weights[row, col]).tolist():
                own.setdefault(int(patches[row, col, tap, 0]), []).append(int(number[row, col, tap]))
    return found


def _pooled(
    layout: ImageLayout, by_patch: Float[np.ndarray, "tile patch_row patch_col"]
) -> Float[np.ndarray, " feature"]:
    """Numbers by patch of one image's tiles as numbers by feature."""
    cells = {}
    for grid in layout.grids:
        patches, weights = grid.patches()
        cells[grid.name] = (by_patch[tuple(np.moveaxis(patches, -1, 0))] * weights).sum(-1)
    return layout.fold(cells)
