"""What the real image processors change in pixel_values is what the layout says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hooked_llava.architecture import ImageLayout, llava_layout, processor_axes
from hooked_llava.architecture.resampling import filter_of
from tests.architecture.processors import REMAINDER_TILE, TILE, changed_patches, make_layout, predicted_tiles, process
from tests.architecture.test_layouts import EVERY, PROCESSORS

KINDS = pytest.mark.parametrize(
    ("kind", "tile"),
    [
        ("next", TILE),
        ("onevision", TILE),
        ("several", TILE),
        ("onevision", REMAINDER_TILE),
        ("several", REMAINDER_TILE),
    ],
)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int]:
    """(height, width) from 1:1 to 1:8, smaller and larger than the tiles."""
    short = draw(st.integers(5, 150))
    long = draw(st.integers(short, min(8 * short, 400)))
    return (short, long) if draw(st.booleans()) else (long, short)


def squares(height: int, width: int, data: st.DataObject) -> tuple[int, int, int, int]:
    side = data.draw(st.integers(1, 4))
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    return x, y, min(x + side, width), min(y + side, height)


def paintings(height: int, width: int, box: tuple[int, int, int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images with and without a small square painted over: flat, striped, chequered and at random."""
    x0, y0, x1, y1 = box
    pairs = []
    rows, columns = np.arange(y1 - y0)[:, None], np.arange(x1 - x0)[None]
    random = np.random.default_rng(height + width).integers(0, 2, (y1 - y0, x1 - x0))
    for light in (0 * (rows + columns), 0 * columns + rows % 2, 0 * rows + columns % 2, (rows + columns) % 2, random):
        before = np.full((height, width, 3), 128, dtype=np.uint8)
        after = before.copy()
        after[y0:y1, x0:x1] = np.where(light, 0, 255)[..., None]
        pairs.append((before, after))
    return pairs


def check_footprint(layout: ImageLayout, box: tuple[int, int, int, int], changed: list[np.ndarray]) -> None:
    footprint = layout.patch_footprint(box)
    seen = np.any(changed, axis=0)
    assert not (seen & (footprint == 0)).any()  # nothing changes that the layout does not name
    # And what it names does change, unless 8-bit rounding hides it: half a level of the 127 painted over, twice.
    assert (seen | (footprint < 0.03)).all()


@KINDS
@given(shape=shapes(), seed=st.integers(0, 99))
@settings(max_examples=12)
def test_the_axes_predict_every_pixel_of_every_tile(kind: str, tile: int, shape: tuple[int, int], seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    layout, tiles = make_layout(kind, *shape, tile), process(kind, image, tile)
    background = np.array([122, 116, 104])  # int(mean * 255)
    assert len(tiles) == layout.n_tiles
    for grid in layout.grids:
        predicted = predicted_tiles(grid, image, background if kind == "several" else np.zeros(3))
        actual = tiles[grid.first_tile : grid.first_tile + grid.n_tiles]
        assert any(np.array_equal(either, actual) for either in predicted)


@KINDS
@given(shape=shapes(), data=st.data())
@settings(max_examples=20)
def test_the_patches_that_a_small_square_changes_are_those_named(
    kind: str, tile: int, shape: tuple[int, int], data: st.DataObject
) -> None:
    layout, box = make_layout(kind, *shape, tile), squares(*shape, data)
    pairs = [[process(kind, image, tile) for image in pair] for pair in paintings(*shape, box)]
    changed = [changed_patches(before, after) for before, after in pairs]
    check_footprint(layout, box, changed)
    # Cells: those with a changed patch among theirs; and every cell that shows the square's middle is reached.
    seen, reached = np.any(changed, axis=0), layout.footprint(box)
    for grid in layout.grids:
        patches, weights = grid.patches()
        of_cells = (seen[tuple(np.moveaxis(patches, -1, 0))] & (weights > 0)).any(-1)
        assert not (of_cells & ~reached[grid.name]).any()
    for cell in layout.pixel_to_cells((box[0] + box[2]) / 2, (box[1] + box[3]) / 2):
        assert reached[cell.grid][cell.row, cell.col]


@EVERY
@given(shape=shapes(), data=st.data())
@settings(max_examples=8)
def test_the_patches_of_llava_that_a_small_square_changes(
    name: str, shape: tuple[int, int], data: st.DataObject
) -> None:
    processor, patch_size = PROCESSORS[name]
    if name == "longest edge" and max(shape) > 7 * min(shape):
        shape = (min(shape), 7 * min(shape))
    axes = processor_axes(processor, height=shape[0], width=shape[1], patch_size=patch_size)
    layout, box = llava_layout(*axes, resample=filter_of(processor.resample)), squares(*shape, data)

    def processed(image: np.ndarray) -> np.ndarray:
        out = processor(Image.fromarray(image), do_normalize=False, do_rescale=False, return_tensors="np")
        return np.moveaxis(out["pixel_values"], 1, -1)

    pairs = [[processed(image) for image in pair] for pair in paintings(*shape, box)]
    check_footprint(layout, box, [changed_patches(before, after, patch_size) for before, after in pairs])
