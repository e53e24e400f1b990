"""The family's image processors at small sizes, and what they make of an image according to a layout's axes."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from hooked_llava.architecture import Grid, ImageAxis, ImageLayout, llava_next_layout, llava_onevision_layout
from hooked_llava.architecture.resampling import Filter, resampling_weights

TILE, PATCH, MAX_TILES = 56, 14, 2
REMAINDER_TILE = 60
"""As SigLIP's 384 pixels, no multiple of the patch: a strip of every tile is seen by no patch."""


def pinpoints(tile: int) -> list[list[int]]:
    return [[h * tile, w * tile] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def next_processor(tile: int = TILE) -> Any:
    crop = {"height": tile, "width": tile}
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": tile}, crop_size=crop, image_grid_pinpoints=pinpoints(tile)
    )


def onevision_processor(tile: int = TILE) -> Any:
    return LlavaOnevisionImageProcessorPil(size={"height": tile, "width": tile}, image_grid_pinpoints=pinpoints(tile))


def make_layout(kind: str, height: int, width: int, tile: int = TILE) -> ImageLayout:
    sizes: dict[str, Any] = {"tile_size": tile, "patch_size": PATCH, "pinpoints": pinpoints(tile)}
    if kind == "next":
        return llava_next_layout((height, width), **sizes)
    return llava_onevision_layout((height, width), max_tiles=MAX_TILES, several_images=kind == "several", **sizes)


def process(kind: str, image: np.ndarray, tile: int = TILE) -> np.ndarray:
    """What the real processor makes of an image, 0 to 255: [tile, height, width, channel]."""
    processor = next_processor(tile) if kind == "next" else onevision_processor(tile)
    images = [[image, image]] if kind == "several" else [image]
    pixels = processor(images, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
    return np.moveaxis(pixels, 1, -1)


def resize_rows(image: np.ndarray, n_out: int, resample: Filter = "bicubic") -> np.ndarray:
    """One pass of PIL's resizing, along the first axis of an 8-bit image."""
    pixels, weights = resampling_weights(len(image), n_out, resample)
    resized = np.einsum("ot,ot...->o...", weights, image[pixels].astype(np.float64))
    return np.clip(np.floor(resized + 0.5), 0, 255).astype(np.uint8)


def predicted_tiles(grid: Grid, image: np.ndarray, background: np.ndarray) -> list[np.ndarray]:
    """The tiles of a grid's canvas that its axes make of an image: [tile, height, width, channel].

    Twice: PIL rounds between its passes, and its version decides whether it resizes across or down first.
    """
    rows, columns = grid.rows.pixels, grid.columns.pixels
    side = rows.padded, columns.padded
    squared = np.broadcast_to(background, (*side, 3)).astype(np.uint8).copy()
    squared[rows.before : rows.before + rows.original, columns.before : columns.before + columns.original] = image
    across = resize_rows(squared.swapaxes(0, 1), columns.resized).swapaxes(0, 1)
    down = resize_rows(squared, rows.resized)
    both = resize_rows(across, rows.resized), resize_rows(down.swapaxes(0, 1), columns.resized).swapaxes(0, 1)
    return [_cut(grid, resized) for resized in both]


def _cut(grid: Grid, resized: np.ndarray) -> np.ndarray:
    """A resized image laid on the canvas, and the canvas cut into tiles."""
    rows, columns = grid.rows.pixels, grid.columns.pixels
    canvas = np.zeros((rows.canvas, columns.canvas, 3), dtype=np.uint8)
    (at_row, from_row), (at_col, from_col) = _overlap(rows), _overlap(columns)
    canvas[np.ix_(at_row, at_col)] = resized[np.ix_(from_row, from_col)]
    shape = rows.n_tiles, rows.canvas // rows.n_tiles, columns.n_tiles, columns.canvas // columns.n_tiles, 3
    tiles = canvas.reshape(shape).swapaxes(1, 2)
    return tiles.reshape(-1, *tiles.shape[2:])


def _overlap(axis: ImageAxis) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of the canvas where the resized image lies, and which of its pixels lie there."""
    at = np.arange(axis.crop)
    at = at[(at + axis.offset >= 0) & (at + axis.offset < axis.resized)]
    return at, at + axis.offset


def changed_patches(before: np.ndarray, after: np.ndarray, patch: int = PATCH) -> np.ndarray:
    """Which patches of which tiles differ: [tile, patch_row, patch_col]."""
    differs = (before != after).any(-1)
    n_rows, n_cols = differs.shape[1] // patch, differs.shape[2] // patch
    whole = differs[:, : n_rows * patch, : n_cols * patch]
    return whole.reshape(len(differs), n_rows, patch, n_cols, patch).any((2, 4))
