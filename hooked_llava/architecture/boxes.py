"""Boxes and masks in pixels of the original image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import SupportsFloat, TypeAlias

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from hooked_llava.errors import SpanError

Box: TypeAlias = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels of the original image: left, top, right, bottom."""
BoxLike: TypeAlias = Iterable[SupportsFloat]
"""Four numbers in that order, in a tuple, list, array or tensor."""


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
            f"{format_box(edges)} is not a box with an area; expected (x0, y0, x1, y1) with x0 < x1 and y0 < y1, "
            "in pixels of the original image (not x, y, width, height)."
        )
    return edges


def checked_mask(mask: np.ndarray | Tensor) -> Bool[np.ndarray, "height width"]:
    """A mask over the original image as bool; raises `SpanError` unless it is [height, width] of bool, or 0 and 1."""
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask
    if array.ndim != 2 or (array.dtype != np.bool_ and not np.isin(array, (0, 1)).all()):
        raise SpanError(
            f"The mask is of shape {array.shape} and type {array.dtype}; expected [height, width] of the original "
            "image, bool or only 0 and 1 (mask > threshold makes one)."
        )
    return array.astype(np.bool_)


def format_box(box: Sequence[float | int]) -> str:
    """The box as an error shows it.

    >>> format_box((0, 1.5, 3, 4))
    '(0, 1.5, 3, 4)'
    """
    return "(" + ", ".join(f"{edge:.5g}" for edge in box) + ")"


def outside_share(seen: float, total: float) -> float:
    """Share (0 to 1) of an area that is not seen.

    >>> outside_share(3.0, 4.0)
    0.25
    """
    share = 1.0 - seen / total
    return 0.0 if share < 1e-9 else share  # a box that is seen whole is seen whole, whatever the rounding
