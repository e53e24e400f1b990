"""Shares and drawings of grids against loops over cells, patches and pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_llava.architecture import Grid, GridAxis, ImageLayout
from tests.architecture.processors import REMAINDER_TILE, TILE, make_layout

KINDS = st.sampled_from(["next", "onevision", "several"])
TILES = st.sampled_from([TILE, REMAINDER_TILE])


def taps(axis: GridAxis, cell: int) -> list[tuple[int, float]]:
    patches, weights = axis.taps
    return list(zip(patches[cell].tolist(), weights[cell].tolist(), strict=True))


def naive_shares(layout: ImageLayout, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Cell by cell, patch by patch: pixels of the mask over pixels shown, weighted as pooled."""
    found = {}
    for grid in layout.grids:
        rows, columns = grid.rows.pixels, grid.columns.pixels
        shares = np.zeros(grid.shape)
        for row, col in itertools.product(*map(range, grid.shape)):
            covered = area = 0.0
            for (r, wr), (c, wc) in itertools.product(taps(grid.rows, row), taps(grid.columns, col)):
                y0, y1, x0, x1 = rows.starts[r], rows.stops[r], columns.starts[c], columns.stops[c]
                area += wr * wc * (y1 - y0) * (x1 - x0)
                for y, x in itertools.product(range(int(y0), int(np.ceil(y1))), range(int(x0), int(np.ceil(x1)))):
                    part = (min(y1, y + 1) - max(y0, y)) * (min(x1, x + 1) - max(x0, x))
                    covered += wr * wc * part * mask[y, x]
            shares[row, col] = covered / area if area else 0.0
        found[grid.name] = shares
    return found


@given(kind=KINDS, shape=st.tuples(st.integers(6, 30), st.integers(6, 30)), tile=TILES, seed=st.integers(0, 99))
@settings(max_examples=12)
def test_shares_of_masks_cell_by_cell(kind: str, shape: tuple[int, int], tile: int, seed: int) -> None:
    layout = make_layout(kind, *shape, tile)
    mask = np.random.default_rng(seed).random(shape) < 0.4
    mask[shape[0] // 2, shape[1] // 2] = True
    shares, outside = layout.mask_shares(mask)
    for name, expected in naive_shares(layout, mask).items():
        np.testing.assert_allclose(shares[name], expected, atol=1e-9)
    within = (0.1, 0.5, 0.9)
    points = [(x + dx, y + dy) for y, x in np.argwhere(mask) for dx in within for dy in within]
    assert outside == pytest.approx(np.mean([not layout.pixel_to_cells(x, y) for x, y in points]), abs=0.15)


def naive_drawing(grid: Grid, values: np.ndarray) -> np.ndarray:
    """Pixel by pixel, cell by cell, patch by patch: the mean by area shown, weighted as pooled."""
    rows, columns = grid.rows.pixels, grid.columns.pixels
    total, area = np.zeros((2, rows.original, columns.original))
    for row, col in itertools.product(*map(range, grid.shape)):
        for (r, wr), (c, wc) in itertools.product(taps(grid.rows, row), taps(grid.columns, col)):
            y0, y1, x0, x1 = rows.starts[r], rows.stops[r], columns.starts[c], columns.stops[c]
            for y, x in itertools.product(range(int(y0), int(np.ceil(y1))), range(int(x0), int(np.ceil(x1)))):
                part = wr * wc * (min(y1, y + 1) - max(y0, y)) * (min(x1, x + 1) - max(x0, x))
                total[y, x] += part * values[row, col]
                area[y, x] += part
    return np.divide(total, area, out=np.full(area.shape, np.nan), where=area > 0)


@given(kind=KINDS, shape=st.tuples(st.integers(6, 30), st.integers(6, 30)), tile=TILES, seed=st.integers(0, 99))
@settings(max_examples=12)
def test_drawings_pixel_by_pixel(kind: str, shape: tuple[int, int], tile: int, seed: int) -> None:
    layout = make_layout(kind, *shape, tile)
    values = np.random.default_rng(seed).random(layout.n_features)
    drawn = [naive_drawing(grid, values[layout.cell_features(grid.name)]) for grid in layout.grids]
    for name, expected in zip(layout.names, drawn, strict=True):
        np.testing.assert_allclose(layout.draw(values, name), expected, atol=1e-9)
    mean = np.where(np.isnan(drawn).all(0), np.nan, np.nansum(drawn, axis=0) / np.maximum((~np.isnan(drawn)).sum(0), 1))
    np.testing.assert_allclose(layout.draw(values), mean, atol=1e-9)
