"""The world of `tiny-shapes-next`: images from 1:1 to 1:3 of three to twelve objects, some of them small.

Objects lie in cells of 24 x 24 pixels, so that one is to the left of another or it is not. Normal objects are drawn in 20
pixels; small ones in 8, the width of a patch of the fine grid, which in the base grid, that shows the whole image in 48 x 48
pixels, is too few to tell their shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hooked_llava.toy.objects import (
    COLOR_NAMES,
    PATTERNS,
    SHAPES,
    SMALL_SIZE,
    Look,
    SceneObject,
    draw_object,
)
from hooked_llava.toy.scenes import Draw, Scene, background, with_noise

CELL, NORMAL_SIZE = 24, 20
IMAGE_SIZES = (
    (96, 96), (96, 80), (80, 96), (96, 48), (48, 96), (128, 48), (48, 128), (144, 48), (48, 144),
)  # fmt: skip
"""Width and height in pixels. Each fits into a whole number of tiles at its own size, with whole patches of padding."""
MIN_OBJECTS, MAX_OBJECTS = 3, 12
_SMALL_RATE = 0.4
_SHARED_COLOR_RATE = 0.6
"""How often two to four objects are made to share a color."""
# Within a cell: normal objects lie in its middle, small ones fill a patch.
_OFFSETS = {NORMAL_SIZE: (2,), SMALL_SIZE: (0, 8)}
_NEXT_TO = 36
_SAME_ROW = 12


def sample_wide_scene(rng: np.random.Generator, n_objects: int | None = None, *, at_most: int = MAX_OBJECTS) -> Scene:
    """Draws an image of random size with `n_objects` shapes, by default 3 to `at_most`.

    An image holds at most three quarters as many objects as it has cells. With ten objects or fewer all shapes differ.

    >>> scene = sample_wide_scene(np.random.default_rng(0), 6)
    >>> len(scene.objects), scene.size
    (6, (144, 48))
    """
    size = IMAGE_SIZES[int(rng.integers(len(IMAGE_SIZES)))]
    most = min(at_most, _n_cells(size) * 3 // 4)
    n = int(rng.integers(MIN_OBJECTS, most + 1)) if n_objects is None else min(n_objects, most)
    return _sample(rng, size, n)


def beside(scene: Scene, one: SceneObject, side: str) -> SceneObject | None:
    """The object in the cell to the "left" or "right" of one, or None. Small objects have no neighbors and are none.

    That is the one whose middle lies at most 12 pixels higher or lower and at most 36 to that side.
    """
    (x, y), sign = one.center, {"left": -1, "right": 1}[side]
    for other in scene.objects:
        if one.small or other.small:
            continue
        if 0 < sign * (other.center[0] - x) <= _NEXT_TO and abs(other.center[1] - y) <= _SAME_ROW:
            return other
    return None


def _n_cells(size: tuple[int, int]) -> int:
    return (size[0] // CELL) * (size[1] // CELL)


def _sample(rng: np.random.Generator, size: tuple[int, int], n: int, looks: Sequence[Look] | None = None) -> Scene:
    """Draws an image; with `looks` the objects, in the order of drawing, look like that.

    What is drawn from the generator does not depend on how the objects look.
    """
    bits = rng.bit_generator
    state = bits.state
    sizes = np.where(rng.random(n) < _SMALL_RATE, SMALL_SIZE, NORMAL_SIZE).tolist()
    drawn = _random_looks(rng, sizes)
    if looks is not None:
        drawn = [(SHAPES.index(s), COLOR_NAMES.index(c), PATTERNS.index(p)) for s, c, p in looks]
    corners = _corners(rng, size, sizes)
    canvas = background(rng, *size)
    placed = zip(drawn, corners, sizes, strict=True)
    objects = tuple(draw_object(canvas, rng, look, corner, pixels) for look, corner, pixels in placed)
    pixels = with_noise(canvas, rng)

    def again(rng: np.random.Generator, looks: Sequence[Look]) -> Scene:
        return _sample(rng, size, n, looks)

    return Scene(objects, pixels, Draw(type(bits), state, tuple(range(n)), again))


def _random_looks(rng: np.random.Generator, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Shape, color and pattern of objects of these sizes, as indices; small ones are solid."""
    n = len(sizes)
    shapes = np.concatenate([rng.permutation(len(SHAPES)), rng.integers(len(SHAPES), size=MAX_OBJECTS)])[:n]
    colors = rng.integers(len(COLOR_NAMES), size=n)
    patterns = np.where(np.array(sizes) == SMALL_SIZE, 0, rng.integers(len(PATTERNS), size=n))
    shared = rng.permutation(n)[: int(rng.integers(2, 5))]
    if rng.random() < _SHARED_COLOR_RATE:
        colors[shared] = colors[shared[0]]
    return list(zip(shapes.tolist(), colors.tolist(), patterns.tolist(), strict=True))


def _corners(rng: np.random.Generator, size: tuple[int, int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Upper left corners of objects of these sizes, each in a cell of its own."""
    columns, rows = (pixels // CELL for pixels in size)
    cells = rng.permutation(columns * rows)[: len(sizes)]
    corners = []
    for cell, pixels in zip(cells.tolist(), sizes, strict=True):
        dx, dy = rng.choice(_OFFSETS[pixels], size=2).tolist()
        corners.append((CELL * (cell % columns) + dx, CELL * (cell // columns) + dy))
    return corners
