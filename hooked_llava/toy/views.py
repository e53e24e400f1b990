"""What the vision tower is shown of an image: one view of the whole, or with tiles a base view and one for each tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hooked_llava.toy.objects import PATCH_SIZE
from hooked_llava.toy.scenes import Scene, patch_coverage, shown_object


@dataclass(frozen=True)
class View:
    """One input of the vision tower and what it shows, for the alignment of patches with words.

    Attributes:
        pixels (uint8 [size, size, 3]): What the tower sees.
        silhouette (float32 [size, size]): The share of each pixel that objects cover.
        labels (int64 [patch]): The index of the object that each patch shows, -1 for none.
        middles (bool [patch]): Whether the middle of an object lies there.
        places (float32 [patch, 2]): Where the middle of the patch lies in the image, (x, y) from -1 to 1; 0 in a tile, from
            which that cannot be seen.
        grid (str): "whole" where there is no other view, else "base" or "fine".
    """

    pixels: NDArray[np.uint8]
    silhouette: NDArray[np.float32]
    labels: NDArray[np.int64]
    middles: NDArray[np.bool_]
    places: NDArray[np.float32]
    grid: str


def whole_view(scene: Scene) -> View:
    """The image as it is."""
    width, height = scene.size
    places = _places(width // PATCH_SIZE, height // PATCH_SIZE)
    nowhere = np.zeros(len(places), bool)  # a model with one view is not taught to count
    return View(scene.pixels, _silhouette(scene.masks), scene.patch_labels().reshape(-1), nowhere, places, "whole")


def tiled_views(scene: Scene, canvas: tuple[int, int], tile: int) -> list[View]:
    """The whole image in one tile, then the tiles of the image in the middle of a canvas (width, height), row by row."""
    (width, height), (canvas_width, canvas_height) = scene.size, canvas
    left, top = (canvas_width - width) // 2, (canvas_height - height) // 2
    pad = ((top, canvas_height - height - top), (left, canvas_width - width - left))
    pixels = np.pad(scene.pixels, (*pad, (0, 0)))
    masks = np.pad(scene.masks, ((0, 0), *pad))
    views = [_base_view(scene, tile)]
    for y in range(0, canvas_height, tile):
        for x in range(0, canvas_width, tile):
            here = np.s_[y : y + tile, x : x + tile]
            views.append(_tile_view(scene, pixels[here], masks[:, here[0], here[1]], (x - left, y - top)))
    return views


def _tile_view(scene: Scene, pixels: NDArray[np.uint8], masks: NDArray[np.bool_], corner: tuple[int, int]) -> View:
    grid = len(pixels) // PATCH_SIZE
    labels = shown_object(patch_coverage(masks)).reshape(-1)
    middles = np.zeros((grid, grid), bool)
    for o in scene.objects:
        column, row = (int((at - first) // PATCH_SIZE) for at, first in zip(o.center, corner, strict=True))
        if 0 <= row < grid and 0 <= column < grid:
            middles[row, column] = True
    nowhere = np.zeros((grid**2, 2), np.float32)
    return View(pixels, _silhouette(masks), labels, middles.reshape(-1), nowhere, "fine")


def _base_view(scene: Scene, size: int) -> View:
    """The whole image, squeezed into a square. Small objects are not looked for there."""
    pixels = np.asarray(scene.render().resize((size, size), Image.Resampling.BICUBIC))
    masks = scene.masks.astype(np.float32)
    (width, height), grid = scene.size, size // PATCH_SIZE
    silhouette = (_shares(size, height) @ _silhouette(scene.masks) @ _shares(size, width).T).astype(np.float32)
    coverage = (_shares(grid, height) @ masks @ _shares(grid, width).T).reshape(len(masks), -1)
    coverage[[o.small for o in scene.objects]] = 0.0
    return View(pixels, silhouette, shown_object(coverage), np.zeros(grid**2, bool), _places(grid, grid), "base")


def _silhouette(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Where any object is, as 0 and 1."""
    return masks.max(axis=0).astype(np.float32)


def _shares(n: int, length: int) -> NDArray[np.float32]:
    """How much each of `length` pixels weighs in each of n equal parts of them, rows that sum to 1, [n, length]."""
    edges = np.arange(n + 1) * (length / n)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (overlap.clip(0) * (n / length)).astype(np.float32)


def _places(columns: int, rows: int) -> NDArray[np.float32]:
    """The middles of the patches of a grid, (x, y) from -1 to 1, [patch, 2]."""
    x, y = ((np.arange(n) + 0.5) / n * 2 - 1 for n in (columns, rows))
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)
