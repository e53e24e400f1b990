"""Where a patch of the vision tower lies in the original image, through the processor's resizing and cropping.

Pure functions of sizes. Each axis goes its own way, original -> pad to square -> resize -> center crop -> patches,
and every step is affine, so one axis is a scale and a shift, and a box or mask over patches is a product of two axes.
Coordinates are continuous: pixel column i covers i to i + 1, and its center is i + 0.5.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, SupportsFloat, TypeAlias

import numpy as np
from jaxtyping import Bool, Float
from transformers.image_transforms import get_size_with_aspect_ratio

from hooked_llava.errors import ConfigError, InputError, SpanError

Box: TypeAlias = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels of the original image: left, top, right, bottom."""
BoxLike: TypeAlias = Iterable[SupportsFloat]
"""Four numbers in that order, in a tuple, list, array or tensor."""
Number: TypeAlias = float | int


@dataclass(frozen=True, kw_only=True)
class AxisGeometry:
    """One axis of an image on its way to the patches; all lengths in pixels."""

    original: int
    """Length of the original image."""
    padded: int
    """Length after padding to a square, where the processor does so before it resizes."""
    before: int
    """How much of that padding comes before the image."""
    resized: int
    """Length after resizing."""
    offset: int
    """Where the crop begins in the resized image; negative if the crop is larger and padded with zeros."""
    crop: int
    """Length of the crop."""
    canvas: int
    """Length of what the model sees: the crop, and what the processor may append to it."""
    patch_size: int
    """Length of a patch."""

    @property
    def n_patches(self) -> int:
        """Patches along this axis; a remainder shorter than a patch is seen by none."""
        return self.canvas // self.patch_size

    def to_canvas(self, x: Number) -> float:
        """Original pixel coordinate -> coordinate in what the model sees."""
        return (x + self.before) * self.resized / self.padded - self.offset

    def to_original(self, u: Number) -> float:
        """Coordinate in what the model sees -> original pixel coordinate."""
        return (u + self.offset) * self.padded / self.resized - self.before

    @cached_property
    def visible(self) -> tuple[float, float]:
        """The stretch of the original that patches see."""
        stop = min(self.crop, self.n_patches * self.patch_size)
        return self._clip(self.to_original(0)), self._clip(self.to_original(stop))

    @cached_property
    def edges(self) -> tuple[float, ...]:
        """Original coordinates of the n_patches + 1 patch borders, cut to the visible stretch."""
        low, high = self.visible
        borders = (self.to_original(i * self.patch_size) for i in range(self.n_patches + 1))
        return tuple(min(max(x, low), high) for x in borders)

    def patch_of(self, x: float) -> int | None:
        """The patch that an original coordinate falls into, or None where no patch sees it."""
        low, high = self.visible
        if not low <= x < high:
            return None
        # By the edges, not by division: so a pixel's patch contains the pixel exactly, whatever the rounding.
        return bisect_right(self.edges, x) - 1

    def overlaps(self, start: float, stop: float) -> Float[np.ndarray, " patch"]:
        """How many original pixels each patch shares with a stretch of the original."""
        edges = np.array(self.edges)
        return np.clip(np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start), 0, None)

    def pixel_overlaps(self) -> Float[np.ndarray, "patch pixel"]:
        """How much of every original pixel lies in each patch."""
        edges, pixels = np.array(self.edges), np.arange(self.original)
        ends = np.minimum(edges[1:, None], pixels + 1)
        return np.clip(ends - np.maximum(edges[:-1, None], pixels), 0, None)

    def _clip(self, x: Number) -> float:
        return float(min(max(x, 0), self.original))


@dataclass(frozen=True)
class ImageGeometry:
    """Patches <-> pixels of one original image.

    >>> from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    >>> processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    >>> geometry = ImageGeometry.from_processor(processor, height=100, width=200, patch_size=8)
    >>> geometry.resized_size, geometry.crop_offset, geometry.grid
    ((64, 128), (0, 32), (8, 8))
    >>> geometry.patch_box(0, 0)
    (50.0, 0.0, 62.5, 12.5)
    >>> geometry.pixel_to_patch(51, 1)
    (0, 0)
    """

    vertical: AxisGeometry
    """From top to bottom: rows of patches."""
    horizontal: AxisGeometry
    """From left to right: columns of patches."""

    @classmethod
    def from_processor(cls, image_processor: Any, *, height: int, width: int, patch_size: int) -> ImageGeometry:
        """Read a Hugging Face CLIP or LLaVA image processor's own settings for an image of that size.

        Raises `ConfigError` for a way of resizing or padding that this library does not follow, and `InputError` for
        an image so thin that resizing leaves nothing of it.
        """
        before, padded = _pad_to_square(image_processor, height, width)
        resized = _resized_size(image_processor, *padded)
        if 0 in resized:
            raise InputError(
                f"An image of {width} x {height} (width x height) pixels has nothing left when the image processor "
                f"resizes it to {resized[1]} x {resized[0]}; give one that is less thin."
            )
        offset, crop = _center_crop(image_processor, *resized)
        canvas = _appended_size(image_processor, *crop)
        vertical, horizontal = (
            AxisGeometry(
                original=(height, width)[axis],
                padded=padded[axis],
                before=before[axis],
                resized=resized[axis],
                offset=offset[axis],
                crop=crop[axis],
                canvas=canvas[axis],
                patch_size=patch_size,
            )
            for axis in range(2)
        )
        return cls(vertical, horizontal)

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the original image."""
        return self.vertical.original, self.horizontal.original

    @property
    def resized_size(self) -> tuple[int, int]:
        """(height, width) after resizing."""
        return self.vertical.resized, self.horizontal.resized

    @property
    def crop_offset(self) -> tuple[int, int]:
        """(top, left) of the crop in the resized image; negative where the crop is padded with zeros."""
        return self.vertical.offset, self.horizontal.offset

    @property
    def canvas_size(self) -> tuple[int, int]:
        """(height, width) of what the model sees."""
        return self.vertical.canvas, self.horizontal.canvas

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.vertical.n_patches, self.horizontal.n_patches

    @property
    def visible_box(self) -> Box:
        """The part of the original image that patches see."""
        (top, bottom), (left, right) = self.vertical.visible, self.horizontal.visible
        return left, top, right, bottom

    def patch_box(self, row: int, col: int) -> Box:
        """The part of the original image under a patch, cut to the image.

        Raises `SpanError` outside the grid, and for a patch that shows nothing but the processor's padding.
        """
        rows, columns = self.grid
        if not (0 <= row < rows and 0 <= col < columns):
            raise SpanError(
                f"Patch ({row}, {col}) is outside the grid of {rows} x {columns} patches; "
                f"rows go from 0 to {rows - 1} and columns from 0 to {columns - 1}."
            )
        (top, bottom), (left, right) = self.vertical.edges[row : row + 2], self.horizontal.edges[col : col + 2]
        if top == bottom or left == right:
            raise SpanError(
                f"Patch ({row}, {col}) shows only the padding that the processor adds, and no part of the image; "
                f"the image lies under the patches that box_to_patches({_format_box(self.visible_box)}) gives."
            )
        return left, top, right, bottom

    def pixel_to_patch(self, x: SupportsFloat, y: SupportsFloat) -> tuple[int, int]:
        """The (row, col) of the patch that sees the point (x, y) of the original image.

        Raises `SpanError` for a point outside the image or cut away by the crop.
        """
        x, y = float(x), float(y)
        height, width = self.original_size
        if not (0 <= x < width and 0 <= y < height):
            raise SpanError(
                f"Pixel ({x:g}, {y:g}) is outside the image of {width} x {height} (width x height) pixels; "
                "give x first, then y, counted from the top left corner."
            )
        row, col = self.vertical.patch_of(y), self.horizontal.patch_of(x)
        if row is None or col is None:
            raise SpanError(
                f"Pixel ({x:g}, {y:g}) is cut away before the model sees the image; "
                f"it sees the box {_format_box(self.visible_box)} of {width} x {height} pixels."
            )
        return row, col

    def box_shares(self, box: BoxLike) -> Float[np.ndarray, "row col"]:
        """Share (0 to 1) of each patch's part of the image that the box covers; 0 where a patch shows only padding.

        Raises `SpanError` for a box that is no box, or that lies wholly outside what the model sees.
        """
        x0, y0, x1, y1 = box = checked_box(box)
        if self.outside(box) == 1.0:
            raise SpanError(
                f"The box {_format_box(box)} lies wholly outside what the model sees, which is "
                f"{_format_box(self.visible_box)} of an image of {self.horizontal.original} x "
                f"{self.vertical.original} pixels; boxes are (x0, y0, x1, y1) in pixels of the original image."
            )
        return self._shares(np.outer(self.vertical.overlaps(y0, y1), self.horizontal.overlaps(x0, x1)))

    def outside(self, box: BoxLike) -> float:
        """Share (0 to 1) of the box's area that lies outside the image or is cut away by the crop."""
        x0, y0, x1, y1 = checked_box(box)
        seen = float(self.vertical.overlaps(y0, y1).sum() * self.horizontal.overlaps(x0, x1).sum())
        return _outside_share(seen, (x1 - x0) * (y1 - y0))

    def mask_shares(self, mask: Bool[np.ndarray, "height width"]) -> tuple[Float[np.ndarray, "row col"], float]:
        """Share of each patch's part of the image that the mask covers, and the share of the mask that no patch sees.

        Raises `SpanError` for a mask of another size than the image, an empty one, and one wholly out of sight.
        """
        if mask.shape != self.original_size:
            raise SpanError(
                f"The mask is {mask.shape[0]} x {mask.shape[1]} (height x width) and the original image "
                f"{self.original_size[0]} x {self.original_size[1]}; give one mask value per pixel of the original."
            )
        if not mask.any():
            raise SpanError("The mask is empty: no pixel is set. Give a mask with at least one True.")
        covered = self.vertical.pixel_overlaps() @ mask.astype(np.float64) @ self.horizontal.pixel_overlaps().T
        outside = _outside_share(float(covered.sum()), float(mask.sum()))
        if outside == 1.0:
            raise SpanError(
                "The mask lies wholly outside what the model sees, which is "
                f"{_format_box(self.visible_box)} (x0, y0, x1, y1) of the original image."
            )
        return self._shares(covered), outside

    def _shares(self, covered: Float[np.ndarray, "row col"]) -> Float[np.ndarray, "row col"]:
        areas = np.outer(np.diff(self.vertical.edges), np.diff(self.horizontal.edges))
        shares = np.divide(covered, areas, out=np.zeros_like(areas), where=areas > 0)
        return np.minimum(shares, 1.0)  # rounding can lift a fully covered patch a hair over 1


def checked_box(box: BoxLike) -> Box:
    """The box as four numbers; raises `SpanError` unless it is (x0, y0, x1, y1) with an area.

    >>> checked_box([0, 0, 4, 2])
    (0.0, 0.0, 4.0, 2.0)
    """
    edges = tuple(float(edge) for edge in box)
    if len(edges) != 4:
        raise SpanError(f"A box has four numbers (x0, y0, x1, y1); {len(edges)} were given: {edges}.")
    x0, y0, x1, y1 = edges
    if not (x0 < x1 and y0 < y1 and np.isfinite([x0, y0, x1, y1]).all()):
        raise SpanError(
            f"{_format_box(edges)} is not a box with an area; expected (x0, y0, x1, y1) with x0 < x1 and y0 < y1, "
            "in pixels of the original image (not x, y, width, height)."
        )
    return edges


def _format_box(box: Box) -> str:
    return "(" + ", ".join(f"{edge:.5g}" for edge in box) + ")"


def _outside_share(seen: float, total: float) -> float:
    share = 1.0 - seen / total
    return 0.0 if share < 1e-9 else share  # a box that is seen whole is seen whole, whatever the rounding


def _pad_to_square(image_processor: Any, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left) padding and (height, width) after it; LLaVA's own image processor may pad before it resizes."""
    if not (getattr(image_processor, "do_pad", None) and hasattr(image_processor, "pad_to_square")):
        return (0, 0), (height, width)
    side = max(height, width)
    return ((side - height) // 2, (side - width) // 2), (side, side)


def _resized_size(image_processor: Any, height: int, width: int) -> tuple[int, int]:
    if not image_processor.do_resize:
        return height, width
    size = image_processor.size
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if shortest and longest:
        return get_size_with_aspect_ratio((height, width), shortest, longest)
    if shortest:
        # Hugging Face multiplies first and cuts the fraction off; any other order differs by a pixel now and then.
        longer = int(shortest * max(height, width) / min(height, width))
        return (longer, shortest) if width <= height else (shortest, longer)
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    raise ConfigError(
        f"The image processor resizes to {dict(size)}; expected the keys 'shortest_edge', or 'height' and 'width'. "
        "Patch geometry is known for CLIP-style processors only."
    )


def _center_crop(image_processor: Any, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left) of the crop in the resized image, and its (height, width)."""
    if not image_processor.do_center_crop:
        return (0, 0), (height, width)
    crop = image_processor.crop_size["height"], image_processor.crop_size["width"]
    # A crop larger than the image is padded: the odd pixel goes before the image with the PIL backend and
    # after it with torchvision's.
    pads_before = getattr(image_processor, "backend", "pil") == "torchvision"
    offsets = [
        -((wanted - length) // 2) if pads_before and length < wanted else (length - wanted) // 2
        for length, wanted in zip((height, width), crop, strict=True)
    ]
    return (offsets[0], offsets[1]), crop


def _appended_size(image_processor: Any, height: int, width: int) -> tuple[int, int]:
    """(height, width) after the zeros that a CLIP processor may append at the bottom and at the right."""
    pad_size = getattr(image_processor, "pad_size", None)
    if not getattr(image_processor, "do_pad", None) or hasattr(image_processor, "pad_to_square") or not pad_size:
        return height, width
    return pad_size["height"], pad_size["width"]
