"""What images of the embedded worlds hold: colored shapes, their names, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

PATCH_SIZE = 8
OBJECT_SIZE = 16
"""Pixels along the square in which a shape of `tiny-shapes` is drawn."""
SMALL_SIZE = 8
"""The same for a small shape of `tiny-shapes-next`."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart", "arrow", "moon")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (35, 160, 55),
    "blue": (45, 75, 220),
    "yellow": (235, 220, 50),
    "purple": (140, 50, 185),
    "orange": (245, 140, 30),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
COLOR_NAMES = tuple(COLORS)
PATTERNS = ("solid", "striped")


Box = tuple[int, int, int, int]
Look = tuple[str, str, str]
"""Shape, color and pattern of an object."""


@dataclass(frozen=True)
class SceneObject:
    """One shape in an image.

    Attributes:
        shape (str): Name of the shape.
        color (str): Name of the color.
        pattern (str): "solid" or "striped".
        box (Box): (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
        mask (bool [height, width]): The pixels of the image that it covers.
        small (bool): Whether it is drawn in a square of 8 pixels.
    """

    shape: str
    color: str
    pattern: str
    box: Box
    mask: NDArray[np.bool_] = field(repr=False, compare=False)
    small: bool = field(default=False, repr=False)

    @property
    def center(self) -> tuple[float, float]:
        """The middle of the box, (x, y) in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


def draw_object(
    canvas: NDArray[np.float32],
    rng: np.random.Generator,
    look: tuple[int, int, int],
    corner: tuple[int, int],
    size: int = OBJECT_SIZE,
) -> SceneObject:
    """Stamps one object onto the canvas (in place) and describes it; `look` are indices of shape, color and pattern."""
    (shape, color, pattern), (x, y) = look, corner
    stamp = stamps(size)[shape]
    tint = np.array(COLORS[COLOR_NAMES[color]], dtype=np.float32) + rng.standard_normal(3, dtype=np.float32) * 7
    region = canvas[y : y + size, x : x + size]
    if pattern == 1:
        on = stamp & (np.arange(size) % 4 < 2)[:, None]
        off = stamp & ~on
        region[on] = tint
        region[off] = 0.35 * tint + 0.65 * region[off]  # between two stripes the background shows through
    else:
        region[stamp] = tint
    mask = np.zeros(canvas.shape[:2], dtype=bool)
    mask[y : y + size, x : x + size] = stamp
    left, top, right, bottom = stamp_boxes(size)[shape]
    box = (x + left, y + top, x + right, y + bottom)
    return SceneObject(SHAPES[shape], COLOR_NAMES[color], PATTERNS[pattern], box, mask, size == SMALL_SIZE)


@lru_cache
def stamps(size: int) -> NDArray[np.bool_]:
    """Every shape drawn in its square, bool [shape, size, size], in the order of SHAPES."""
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, axis)  # both in (-1, 1), y downwards
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    ax, ay = abs(x), abs(y)
    ray = np.cos(angle * 5) * 0.5 + 0.5  # 1 on the star's five points, 0 between them
    drawn = {
        "circle": radius < 0.97,
        "square": (ax < 0.86) & (ay < 0.86),
        "triangle": (ax < (y + 1) / 2) & (y < 0.9),
        "star": radius < 0.38 + 0.66 * ray**1.6,
        "cross": (np.minimum(ax, ay) < 0.3),
        "diamond": ax + ay < 1.02,
        "ring": (radius < 0.99) & (radius > 0.55),
        "heart": (x**2 + (-y * 1.15 + 0.15 - 0.62 * np.sqrt(ax)) ** 2) < 0.92**2 - 0.1,
        "arrow": ((y < 0.1) & (ax < (y + 1) * 0.9)) | ((y >= 0.1) & (ax < 0.27)),
        "moon": (radius < 0.99) & (np.hypot(x - 0.5, y) > 0.75),
    }
    return np.stack([drawn[name] for name in SHAPES])


@lru_cache
def stamp_boxes(size: int) -> list[Box]:
    """The tight box of every shape inside its square."""
    boxes = []
    for stamp in stamps(size):
        rows, columns = np.flatnonzero(stamp.any(axis=1)), np.flatnonzero(stamp.any(axis=0))
        boxes.append((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    return boxes
