"""One axis of an image on its way to the patches: pad to square -> resize -> crop or pad -> tiles -> patches.

Every step is affine and takes each axis by itself, so a box or a mask over patches is a product of two axes.
Coordinates are continuous: pixel column i covers i to i + 1, and its center is i + 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from math import ceil, floor
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from hooked_llava.architecture.resampling import Filter, resampling_weights
from hooked_llava.errors import ConfigError

Number: TypeAlias = float | int


@dataclass(frozen=True, kw_only=True)
class ImageAxis:
    """Height or width of an image, from the original to the patches of its tiles; all lengths in pixels.

    What the tiles are cut from is the canvas. A remainder of a tile shorter than a patch is seen by no patch.

    >>> axis = ImageAxis(original=100, padded=100, before=0, resized=64, offset=0, crop=64, canvas=64, patch_size=16)
    >>> axis.starts, axis.patch_of(30)
    (array([ 0., 25., 50., 75.]), 1)

    Attributes:
        original (int): Length of the original image.
        padded (int): Length after padding to a square, where the processor does so before it resizes.
        before (int): How much of that padding comes before the image.
        resized (int): Length after resizing.
        offset (int): Where the canvas begins in the resized image; negative where it begins with padding.
        crop (int): Length up to which the canvas shows the resized image and the padding around it.
        canvas (int): Length of the canvas: the crop, and what the processor may append to it.
        patch_size (int): Length of a patch.
        n_tiles (int): How many vision tiles of equal length the canvas is cut into.
    """

    original: int
    padded: int
    before: int
    resized: int
    offset: int
    crop: int
    canvas: int
    patch_size: int
    n_tiles: int = 1

    def __post_init__(self) -> None:
        positive = [field.name for field in fields(self) if field.name not in ("before", "offset", "n_tiles")]
        for name in (*positive, "n_tiles"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ImageAxis({name}={getattr(self, name)}): expected 1 or more.")
        if self.canvas % self.n_tiles:
            raise ConfigError(
                f"A canvas of {self.canvas} pixels cannot be cut into {self.n_tiles} tiles of equal length."
            )

    @property
    def patches_per_tile(self) -> int:
        """Patches along one tile."""
        return self.canvas // self.n_tiles // self.patch_size

    @property
    def n_patches(self) -> int:
        """Patches along this axis, over all tiles."""
        return self.n_tiles * self.patches_per_tile

    def to_canvas(self, x: Number) -> float:
        """Original pixel coordinate -> coordinate on the canvas."""
        return (x + self.before) * self.resized / self.padded - self.offset

    def to_original(self, u: Number) -> float:
        """Coordinate on the canvas -> original pixel coordinate."""
        return (u + self.offset) * self.padded / self.resized - self.before

    @cached_property
    def visible(self) -> tuple[float, float]:
        """The stretch of the original from the first patch to the last."""
        end = int(self._patch_starts[-1]) + self.patch_size if self.n_patches else 0
        return self._clip(self.to_original(0)), self._clip(self.to_original(min(self.crop, end)))

    @cached_property
    def starts(self) -> Float[np.ndarray, " patch"]:
        """Where each patch begins in the original, cut to the visible stretch."""
        return self._borders(0)

    @cached_property
    def stops(self) -> Float[np.ndarray, " patch"]:
        """Where each patch ends in the original, cut to the visible stretch; its start where it shows only padding."""
        return self._borders(self.patch_size)

    def patch_of(self, x: Number) -> int | None:
        """The patch that shows an original coordinate, or None where none does."""
        # By the borders, not by division: so a pixel's patch contains the pixel exactly, whatever the rounding.
        patch = int(np.searchsorted(self.starts, x, side="right")) - 1
        return patch if patch >= 0 and x < self.stops[patch] else None

    def overlaps(self, start: Number, stop: Number) -> Float[np.ndarray, " patch"]:
        """How many original pixels each patch shares with a stretch of the original."""
        return np.clip(np.minimum(self.stops, stop) - np.maximum(self.starts, start), 0, None)

    def pixel_overlaps(self) -> Float[np.ndarray, "patch pixel"]:
        """How much of every original pixel each patch shows."""
        pixels = np.arange(self.original)
        shared = np.minimum(self.stops[:, None], pixels + 1) - np.maximum(self.starts[:, None], pixels)
        return np.clip(shared, 0, None)

    def footprint(self, start: Number, stop: Number, resample: Filter = "bicubic") -> Float[np.ndarray, " patch"]:
        """How much of a pixel of the canvas comes from a stretch of the original: the most for each patch.

        The sum of the absolute weights of the original pixels that the stretch touches, as the filter blends them in
        resizing; it reaches a little further than the patch's own stretch of the original.
        """
        pixels, weights = resampling_weights(self.padded, self.resized, resample)
        first, end = max(floor(start), 0) + self.before, min(ceil(stop), self.original) + self.before
        of_resized = (np.abs(weights) * ((pixels >= first) & (pixels < end))).sum(1)
        of_canvas = np.zeros(self.canvas)
        shown = np.arange(min(self.crop, self.canvas)) + self.offset
        inside = (shown >= 0) & (shown < self.resized)
        of_canvas[np.flatnonzero(inside)] = of_resized[shown[inside]]
        tiles = of_canvas.reshape(self.n_tiles, -1)[:, : self.patches_per_tile * self.patch_size]
        return tiles.reshape(self.n_patches, self.patch_size).max(1)

    @cached_property
    def _patch_starts(self) -> np.ndarray:
        """Where each patch begins on the canvas."""
        tiles = np.arange(self.n_tiles)[:, None] * (self.canvas // self.n_tiles)
        return (tiles + np.arange(self.patches_per_tile) * self.patch_size).ravel()

    def _borders(self, shift: int) -> Float[np.ndarray, " patch"]:
        low, high = self.visible
        borders = (self._patch_starts + shift + self.offset) * self.padded / self.resized - self.before
        return np.minimum(np.maximum(borders, low), high)

    def _clip(self, x: Number) -> float:
        return float(min(max(x, 0), self.original))
