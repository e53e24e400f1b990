"""The layout of an image in each model of the LLaVA family, from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.grid import Grid, GridAxis
from hooked_llava.architecture.image_axis import ImageAxis
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.processor_axes import processor_axes
from hooked_llava.architecture.resampling import Filter, filter_of
from hooked_llava.architecture.sizes import VisionConfig
from hooked_llava.architecture.tiles import Size, Tiling, best_resolution, pooled_grid, scaled_size, unpadding
from hooked_llava.errors import ConfigError, InputError

BASE, FINE = "base", "fine"
"""The grid that shows the whole image on one tile, and the grid over the tiles of a canvas."""


def layout_of(
    config: LLaVAConfig, image_processor: Any, *, height: int, width: int, several_images: bool = False
) -> ImageLayout:
    """The layout of an image of that size, as the model's image processor and vision tower treat it.

    `several_images` says that its prompt has others besides it. Where images are cut into tiles, the image processor may
    be None: the config says it all. Raises as `processor_axes`, and as the layouts of each family.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> layout = layout_of(model.config, model.processor.image_processor, height=64, width=128)
    >>> layout.cell_box(0, 0)
    (32.0, 0.0, 40.0, 8.0)
    """
    vision, resample = config.vision, None
    with suppress(ConfigError):  # an unknown filter only leaves footprints unknown
        resample = "bicubic" if image_processor is None else filter_of(image_processor.resample)
    if config.tiling is not None:
        return _tiled_layout((height, width), vision, config.tiling, several_images, resample)
    axes = processor_axes(image_processor, height=height, width=width, patch_size=vision.patch_size)
    return llava_layout(*axes, class_token=vision.keeps_class_token, resample=resample)


@lru_cache(maxsize=256)
def _tiled_layout(
    image_size: Size, vision: VisionConfig, tiling: Tiling, several_images: bool, resample: Filter | None
) -> ImageLayout:
    """The layout in LLaVA-NeXT, or where the tiling has `max_tiles`, in LLaVA-OneVision."""
    tile: dict[str, Any] = {"tile_size": vision.image_size, "patch_size": vision.patch_size, "resample": resample}
    if tiling.max_tiles is None:
        return llava_next_layout(image_size, pinpoints=tiling.pinpoints, **tile)
    pooled: dict[str, Any] = {"max_tiles": tiling.max_tiles, "several_images": several_images}
    return llava_onevision_layout(image_size, pinpoints=tiling.pinpoints, **pooled, **tile)


@lru_cache
def layout_without_original(vision: VisionConfig) -> ImageLayout:
    """LLaVA-1.5: the layout of an image known by its pixel values only, which has positions, and no pixels of an original."""
    return llava_layout(*vision.patch_grid, class_token=vision.keeps_class_token)


def same_positions(first: ImageLayout, second: ImageLayout) -> bool:
    """Whether two images take the same positions in a prompt, cell by cell and newline by newline, and as many tiles.

    >>> same_positions(llava_layout(2, 3), llava_layout(2, 3)), same_positions(llava_layout(2, 3), llava_layout(3, 2))
    (True, False)
    """
    shapes = [[(g.name, g.shape, g.newline, g.n_tiles) for g in layout.grids] for layout in (first, second)]
    return first.class_token == second.class_token and shapes[0] == shapes[1]


def llava_layout(
    rows: ImageAxis | int, columns: ImageAxis | int, *, class_token: bool = False, resample: Filter | None = "bicubic"
) -> ImageLayout:
    """LLaVA-1.5: one grid, perhaps with the class token in front.

    Rows and columns are the image's axes, as `processor_axes` gives them; or two numbers where the original is not known.

    >>> llava_layout(2, 3, class_token=True).n_features
    7
    """
    grid = Grid(name=BASE, rows=GridAxis.of(rows), columns=GridAxis.of(columns))
    return ImageLayout(grids=(grid,), class_token=class_token, resample=resample)


def llava_next_layout(
    image_size: Size,
    *,
    tile_size: int,
    patch_size: int,
    pinpoints: Sequence[Sequence[int]],
    resample: Filter | None = "bicubic",
) -> ImageLayout:
    """LLaVA-NeXT (1.6): the whole image squeezed onto one tile, then the patches of a canvas of tiles, row by row.

    Sizes are (height, width) in pixels; `pinpoints` are the canvases to choose from. Raises `ConfigError` for a canvas
    that is not made of whole tiles, and `InputError` for an image without pixels.

    >>> layout = llava_next_layout((300, 500), tile_size=336, patch_size=14, pinpoints=[[336, 672], [672, 336]])
    >>> [(grid.name, grid.shape) for grid in layout.grids], layout.n_features
    ([('base', (24, 24)), ('fine', (24, 40))], 1560)
    >>> layout.cut("fine")
    0.0
    """
    _check_sizes(image_size, tile_size, patch_size)
    fine = _fine_grid(image_size, tile_size, patch_size, pinpoints, max_tiles=None)
    return ImageLayout(grids=(_one_tile_grid(image_size, tile_size, patch_size), fine), resample=resample)


def llava_onevision_layout(
    image_size: Size,
    *,
    tile_size: int,
    patch_size: int,
    pinpoints: Sequence[Sequence[int]],
    max_tiles: int,
    several_images: bool = False,
    resample: Filter | None = "bicubic",
) -> ImageLayout:
    """LLaVA-OneVision: as LLaVA-NeXT, the fine grid pooled where it has more patches than `max_tiles` tiles.

    `max_tiles` is the number in the config's "anyres_max_9". In a prompt of several images each is padded to a square
    and has its base grid alone, with one newline at the end. Raises as `llava_next_layout`, and `InputError` for an
    image of which pooling leaves nothing.

    >>> sizes = {"tile_size": 384, "patch_size": 14, "pinpoints": [[768, 768], [1152, 384]], "max_tiles": 2}
    >>> [grid.shape for grid in llava_onevision_layout((600, 500), **sizes).grids]
    [(27, 27), (41, 35)]
    >>> llava_onevision_layout((600, 500), several_images=True, **sizes).n_features
    730
    """
    _check_sizes(image_size, tile_size, patch_size)
    if max_tiles < 1:
        raise ConfigError(f"max_tiles={max_tiles}; expected 1 or more, the number in the config's 'anyres_max_9'.")
    if several_images:
        return ImageLayout(grids=(_one_tile_grid(image_size, tile_size, patch_size, squared=True),), resample=resample)
    fine = _fine_grid(image_size, tile_size, patch_size, pinpoints, max_tiles=max_tiles)
    return ImageLayout(grids=(_one_tile_grid(image_size, tile_size, patch_size), fine), resample=resample)


def _check_sizes(image_size: Size, tile_size: int, patch_size: int) -> None:
    if min(image_size) < 1:
        raise InputError(f"image_size={image_size}; expected (height, width) of 1 pixel or more.")
    if not 1 <= patch_size <= tile_size:
        raise ConfigError(f"patch_size={patch_size}, tile_size={tile_size}; expected patches no larger than a tile.")


def _one_tile_grid(image_size: Size, tile_size: int, patch_size: int, *, squared: bool = False) -> Grid:
    """The whole image on one tile: resized to it whatever its aspect ratio, or padded to a square first."""
    axes = []
    for length in image_size:
        padded = max(image_size) if squared else length
        axis = ImageAxis(
            original=length,
            padded=padded,
            before=(padded - length) // 2,
            resized=tile_size,
            offset=0,
            crop=tile_size,
            canvas=tile_size,
            patch_size=patch_size,
        )
        axes.append(GridAxis.of(axis))
    return Grid(name=BASE, rows=axes[0], columns=axes[1], newline="end" if squared else "")


def _fine_grid(
    image_size: Size, tile_size: int, patch_size: int, pinpoints: Sequence[Sequence[int]], *, max_tiles: int | None
) -> Grid:
    """The image resized into the middle of its canvas, the padding cut away again by whole patches, perhaps pooled."""
    canvas = best_resolution(image_size, pinpoints)
    if any(length < 1 or length % tile_size for length in canvas):
        raise ConfigError(f"image_grid_pinpoints has {canvas}; expected multiples of the tile's {tile_size} pixels.")
    scaled = scaled_size(image_size, canvas)
    axes = [
        ImageAxis(
            original=image_size[axis],
            padded=image_size[axis],
            before=0,
            resized=scaled[axis],
            offset=-((canvas[axis] - scaled[axis]) // 2),
            crop=canvas[axis],
            canvas=canvas[axis],
            patch_size=patch_size,
            n_tiles=canvas[axis] // tile_size,
        )
        for axis in range(2)
    ]
    patches = axes[0].n_patches, axes[1].n_patches
    first = unpadding(image_size, patches)
    kept = patches[0] - 2 * first[0], patches[1] - 2 * first[1]
    cells = kept if max_tiles is None else pooled_grid(kept, axes[0].patches_per_tile, max_tiles)
    rows, columns = (GridAxis.of(axes[i], first=first[i], kept=kept[i], cells=cells[i]) for i in range(2))
    return Grid(name=FINE, rows=rows, columns=columns, newline="row", first_tile=1)
