"""Pixels of the tiles that show what cells show, by hand and pixel by pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hooked_llava.architecture import ImageLayout, llava_layout, llava_next_layout
from hooked_llava.architecture.shown_pixels import shown_pixels
from hooked_llava.errors import SpanError
from tests.architecture.processors import PATCH
from tests.layouts import DRAWN, made

# An image of 4 x 8 pixels: squeezed onto one tile of 4 x 4, and laid as it is on two.
NEXT = llava_next_layout((4, 8), tile_size=4, patch_size=2, pinpoints=[[4, 8]])


def found(features: list[int], layout: ImageLayout = NEXT, grid: str = "all") -> set[tuple[int, int, int]]:
    shown = shown_pixels(layout, features, tile_size=(4, 4), patch_size=2, grid=grid)
    return set(map(tuple, np.argwhere(shown).tolist()))


def pixels(tile: int, rows: range, columns: range) -> set[tuple[int, int, int]]:
    return {(tile, row, column) for row in rows for column in columns}


def test_a_cell_of_the_base_grid_is_shown_by_the_fine_grid_too() -> None:
    own, fine = pixels(0, range(2), range(2)), pixels(1, range(2), range(4))
    assert found([0]) == own | fine
    assert found([0], grid="base") == own
    assert found([0], grid="fine") == fine


def test_a_cell_of_the_fine_grid_takes_the_pixels_of_the_base_grid_whose_center_it_shows() -> None:
    of_fine = NEXT.feature_of(0, 1, "fine")
    assert found([of_fine]) == pixels(1, range(2), range(2, 4)) | pixels(0, range(2), range(1, 2))
    second_tile = NEXT.feature_of(1, 3, "fine")
    assert found([second_tile]) == pixels(2, range(2, 4), range(2, 4)) | pixels(0, range(2, 4), range(3, 4))


def test_cells_together_are_their_union_and_newlines_show_nothing() -> None:
    newline = NEXT.newline_features().tolist()
    assert not found(newline)
    assert found([0, 5, *newline]) == found([0]) | found([5])
    assert len(found(list(range(NEXT.n_features)))) == 3 * 16


def test_images_of_one_grid_need_no_original() -> None:
    layout = llava_layout(2, 2, class_token=True)
    assert not found([0], layout)  # the class token
    assert found([2], layout) == pixels(0, range(2), range(2, 4))
    with pytest.raises(SpanError, match="no grid 'fine'"):
        found([2], layout, grid="fine")


@given(of=DRAWN, seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_pixel_by_pixel(of: Any, seed: int) -> None:
    assume(of[0] != "by hand")  # its tiles have different sizes
    layout = made(of)
    height, width, size = (16, 24, 4) if of[0] == "llava" else (of[3], of[3], PATCH)
    feature = int(np.random.default_rng(seed).choice(layout.object_features()))
    grid, row, col = layout.cell_at(feature)
    shown = shown_pixels(layout, [feature], tile_size=(height, width), patch_size=size)
    expected = np.zeros(shown.shape, dtype=bool)
    patches, weights = layout.grid(grid).patches()
    for (tile, y, x), weight in zip(patches[row, col].tolist(), weights[row, col].tolist(), strict=True):
        expected[tile, y * size : (y + 1) * size, x * size : (x + 1) * size] |= weight > 0
    x0, y0, x1, y1 = layout.grid(grid).boxes[row, col]
    for other in (one for one in layout.grids if one.name != grid):
        for v in range(other.rows.n_tiles * height):
            for u in range(other.columns.n_tiles * width):
                y, x = other.rows.pixels.to_original(v + 0.5), other.columns.pixels.to_original(u + 0.5)
                if y0 <= y < y1 and x0 <= x < x1:
                    tile = other.first_tile + (v // height) * other.columns.n_tiles + u // width
                    expected[tile, v % height, u % width] = True
    np.testing.assert_array_equal(shown, expected)
