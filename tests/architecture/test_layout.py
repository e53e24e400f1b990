"""Layouts built by hand and by rule: features, pixels, boxes, masks, drawings, files."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_llava.architecture import Cell, Grid, GridAxis, ImageLayout, llava_layout
from hooked_llava.errors import ConfigError, InputError, SpanError
from tests.architecture.processors import REMAINDER_TILE, TILE, make_layout
from tests.layouts import axis, by_hand

SHAPES = st.tuples(st.integers(8, 90), st.integers(8, 90))
KINDS = st.sampled_from(["next", "onevision", "several"])
TILES = st.sampled_from([TILE, REMAINDER_TILE])


# Which feature is which


def test_features_by_hand() -> None:
    layout = by_hand()
    assert layout.n_features == 1 + (6 + 1) + (4 + 2)
    assert layout.n_cells == 10
    assert layout.first_features == {"base": 1, "fine": 8}
    assert layout.cell_features("base").tolist() == [[1, 2, 3], [4, 5, 6]]
    assert layout.cell_features("fine").tolist() == [[8, 9], [11, 12]]
    assert layout.newline_features().tolist() == [7, 10, 13]
    assert layout.object_features().tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 11, 12]
    assert layout.labels("img1") == [
        "img1[cls]", *(f"img1.base[{r},{c}]" for r in range(2) for c in range(3)), "img1.base[newline]",
        "img1.fine[0,0]", "img1.fine[0,1]", "img1.fine[0,newline]", "img1.fine[1,0]", "img1.fine[1,1]", "img1.fine[1,newline]",
    ]  # fmt: skip
    assert layout.n_tiles == 3


@given(kind=KINDS, shape=SHAPES, tile=TILES)
@settings(max_examples=25)
def test_every_feature_is_one_thing(kind: str, shape: tuple[int, int], tile: int) -> None:
    layout = make_layout(kind, *shape, tile)
    cells, newlines = layout.object_features(), layout.newline_features()
    assert sorted([*cells, *newlines]) == list(range(layout.n_features))
    labels = layout.labels()
    assert len(set(labels)) == layout.n_features
    for feature in cells.tolist():
        grid, row, col = layout.cell_at(feature)
        assert layout.feature_of(row, col, grid) == layout.cell_features(grid)[row, col] == feature
        assert labels[feature].endswith(f"[{row},{col}]")
    for feature in newlines.tolist():
        with pytest.raises(SpanError, match=rf"{feature} is a newline"):
            layout.cell_at(feature)
        assert labels[feature].endswith("newline]")


def test_what_is_no_cell_is_refused() -> None:
    layout = by_hand()
    with pytest.raises(SpanError, match="Feature 0.*class token"):
        layout.cell_at(0)
    for feature in (-1, 14):
        with pytest.raises(SpanError, match=rf"no feature {feature}.*0 to 13"):
            layout.cell_at(feature)
    with pytest.raises(SpanError, match=r"\(2, 0\).*base grid of 2 x 3"):
        layout.feature_of(2, 0)
    with pytest.raises(SpanError, match=r"\(0, 2\).*fine grid of 2 x 2"):
        layout.feature_of(0, 2, "fine")
    for ask in (layout.object_features, layout.cell_features, layout.grid, layout.cut, layout.visible_box):
        with pytest.raises(SpanError, match=r"'fien'.*base, fine.*mean: fine"):
            ask("fien")


@pytest.mark.parametrize("make", [np.arange, torch.arange])
def test_unfolded_values_stand_where_their_cells_are(make: Any) -> None:
    layout = by_hand()
    values = make(2 * 17).reshape(2, 17)  # three positions more than this image has: they fill up a batch
    for name, cells in layout.unfold(values).items():
        expected = np.stack([layout.cell_features(name), layout.cell_features(name) + 17])
        assert type(cells) is type(values)
        assert np.array_equal(np.asarray(cells), expected)
    with pytest.raises(InputError, match="13 numbers for 14 features"):
        layout.unfold(values[:, :13])


# Pixels, boxes and masks


def test_boxes_and_weights_by_hand() -> None:
    layout = by_hand()
    assert layout.cell_box(1, 2) == (16, 8, 24, 16)
    # Cell (0, 0) of the fine grid is the mean of patches in rows 0 and 1 and in columns 1 and 2 of the canvas.
    assert layout.cell_box(0, 0, "fine") == (4, 0, 12, 8)
    patches, weights = layout.grid("fine").patches()
    assert patches[1, 0].tolist() == [[2, 0, 1], [2, 0, 2], [2, 1, 1], [2, 1, 2]]  # rows 2 and 3 lie on the second tile
    assert weights.tolist() == [[[0.25] * 4] * 2] * 2
    assert layout.pixel_to_cells(5, 9) == {Cell("base", 1, 0): 1.0, Cell("fine", 1, 0): 0.25}
    assert layout.pixel_to_cells(3.9, 9) == {Cell("base", 1, 0): 1.0}  # the unpadding cut it away
    assert layout.pixel_to_cells(3.9, 9, grid="fine") == {}
    assert layout.pixel_to_cell(5, 9) == layout.pixel_to_cell(5, 9, "fine") == (1, 0)
    with pytest.raises(SpanError, match=r"\(3.9, 9\) is cut away.*\(4, 0, 20, 16\)"):
        layout.pixel_to_cell(3.9, 9, "fine")
    with pytest.raises(SpanError, match=r"\(24, 0\) is outside.*24 x 16"):
        layout.pixel_to_cells(24, 0)


def test_what_unpadding_cuts_is_reported() -> None:
    layout = by_hand()
    assert layout.cut() == layout.cut("base") == 0.0
    assert layout.cut("fine") == pytest.approx(8 / 24)
    assert layout.cut_boxes("fine") == [(0, 0, 4, 16), (20, 0, 24, 16)]
    assert layout.cut_boxes() == []
    assert layout.visible_box("fine") == (4, 0, 20, 16)
    assert layout.visible_box() == (0, 0, 24, 16)


def test_the_strip_of_each_tile_that_no_patch_sees_is_reported() -> None:
    # As SigLIP's 384 pixels in patches of 14: here a tile of 60, of which patches see 56.
    several = make_layout("several", 60, 60, REMAINDER_TILE)
    assert several.cut_boxes() == [(56, 0, 60, 56), (0, 56, 60, 60)]
    assert several.cut() == pytest.approx(1 - (56 / 60) ** 2)
    assert several.pixel_to_cells(57, 3) == {}
    both = make_layout("next", 120, 120, REMAINDER_TILE)
    assert both.pixel_to_cells(57, 3) == {Cell("base", 0, 2): 1.0}  # between the tiles
    assert both.pixel_to_cells(114, 3) == {Cell("fine", 0, 7): 1.0}  # in the base grid's own strip
    pixels = np.arange(120)
    strip, between = pixels >= 112, pixels % 60 >= 56  # what the base grid misses, and what the fine one does
    missed = (strip[:, None] | strip) & (between[:, None] | between)
    painted = np.zeros((120, 120), dtype=int)
    for x0, y0, x1, y1 in both.cut_boxes():
        painted[round(y0) : round(y1), round(x0) : round(x1)] += 1
    assert np.array_equal(painted, missed)
    assert both.cut() == pytest.approx(missed.mean())


def test_shares_and_selections_by_hand() -> None:
    layout = by_hand()
    shares = layout.box_shares((0, 0, 8, 4))
    assert shares["base"].tolist() == [[0.5, 0, 0], [0, 0, 0]]
    assert shares["fine"].tolist() == [[0.25, 0], [0, 0]]
    assert layout.box_to_features((0, 0, 8, 4)).features.tolist() == [1]
    assert layout.box_to_features((0, 0, 8, 4), coverage=0.25).features.tolist() == [1, 8]
    assert layout.box_to_features((0, 0, 8, 4), coverage=0, grid="fine") == (np.array([8]), 0.5)
    mask = np.zeros((16, 24), dtype=bool)
    mask[:, 4:12] = True
    features, outside = layout.mask_to_features(mask, coverage=1)
    assert features.tolist() == [8, 11]
    assert outside == 0.0
    with pytest.raises(SpanError, match=r"mask.*of 1.*is 0\.5"):
        layout.mask_to_features(mask, coverage=1, grid="base")
    with pytest.raises(SpanError, match=r"\(0, 0, 3, 3\) lies wholly outside.*\(4, 0, 20, 16\)"):
        layout.box_to_features((0, 0, 3, 3), grid="fine")
    with pytest.raises(SpanError, match=r"coverage=1\.5"):
        layout.box_to_features((0, 0, 3, 3), coverage=1.5)


@given(data=st.data(), kind=KINDS, shape=SHAPES, tile=TILES, grid=st.sampled_from(["all", "base"]))
@settings(max_examples=25)
def test_a_box_and_the_same_box_as_a_mask_agree(
    data: st.DataObject, kind: str, shape: tuple[int, int], tile: int, grid: str
) -> None:
    layout = make_layout(kind, *shape, tile)
    y0, x0 = (data.draw(st.integers(0, length - 1)) for length in shape)
    y1, x1 = (data.draw(st.integers(start + 1, length)) for start, length in ((y0, shape[0]), (x0, shape[1])))
    box, mask = (x0, y0, x1, y1), np.zeros(shape, dtype=bool)
    mask[y0:y1, x0:x1] = True
    if layout.outside(box, grid) == 1.0:
        for ask in (lambda: layout.box_shares(box, grid), lambda: layout.mask_shares(mask, grid)):
            with pytest.raises(SpanError, match="wholly outside"):
                ask()
        return
    shares, outside = layout.mask_shares(mask, grid)
    assert outside == pytest.approx(layout.outside(box, grid), abs=1e-8)
    for name, expected in layout.box_shares(box, grid).items():
        np.testing.assert_allclose(shares[name], expected, atol=1e-9)


@given(data=st.data(), kind=KINDS, shape=SHAPES, tile=TILES)
@settings(max_examples=40)
def test_a_pixel_lies_in_the_boxes_of_its_cells_and_else_in_a_box_that_is_cut(
    data: st.DataObject, kind: str, shape: tuple[int, int], tile: int
) -> None:
    layout = make_layout(kind, *shape, tile)
    y, x = (data.draw(st.floats(0, length, exclude_max=True)) for length in shape)
    cells = layout.pixel_to_cells(x, y)
    for (name, row, col), weight in cells.items():
        x0, y0, x1, y1 = layout.cell_box(row, col, name)
        assert x0 <= x < x1
        assert y0 <= y < y1
        assert 0 < weight <= 1
    for name in ("all", *layout.names):
        shown = any(name in ("all", cell.grid) for cell in cells)
        cut = any(x0 < x < x1 and y0 < y < y1 for x0, y0, x1, y1 in layout.cut_boxes(name))
        assert not (shown and cut)
        area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in layout.cut_boxes(name))
        assert layout.cut(name) == pytest.approx(area / (shape[0] * shape[1]), abs=1e-8)


# Drawing


def test_a_drawing_by_hand() -> None:
    layout = by_hand()
    values = np.zeros(14)
    values[layout.cell_features("base")] = [[1, 2, 3], [4, 5, 6]]
    values[layout.cell_features("fine")] = [[10, 20], [30, 40]]
    values[[0, *layout.newline_features()]] = 1e9  # they show nothing
    base = np.kron([[1, 2, 3], [4, 5, 6]], np.ones((8, 8)))
    fine = np.full((16, 24), np.nan)
    fine[:, 4:20] = np.kron([[10, 20], [30, 40]], np.ones((8, 8)))
    np.testing.assert_allclose(layout.draw(values, grid="base"), base)
    np.testing.assert_allclose(layout.draw(values, grid="fine"), fine)
    np.testing.assert_allclose(layout.draw(values), np.nanmean([base, fine], axis=0))
    values[1] = np.nan
    assert np.isnan(layout.draw(values)[0, 0])
    assert layout.draw(np.stack([values, values])).shape == (2, 16, 24)


@given(kind=KINDS, shape=SHAPES, tile=TILES, seed=st.integers(0, 9))
@settings(max_examples=25)
def test_drawings_keep_constants_and_stay_within_the_cells_that_show_a_pixel(
    kind: str, shape: tuple[int, int], tile: int, seed: int
) -> None:
    layout = make_layout(kind, *shape, tile)
    flat = layout.draw(np.full(layout.n_features, 2.5))
    np.testing.assert_allclose(flat[~np.isnan(flat)], 2.5)
    values = np.random.default_rng(seed).random(layout.n_features)
    y, x = shape[0] // 2, shape[1] // 3
    corners = [(x + dx, y + dy) for dx in (0, 0.25, 0.5, 0.75, 0.999) for dy in (0, 0.25, 0.5, 0.75, 0.999)]
    for grid in layout.grids:
        showing = [
            values[layout.feature_of(c.row, c.col, c.grid)]
            for p in corners
            for c in layout.pixel_to_cells(*p, grid.name)
        ]
        drawn = layout.draw(values, grid.name)[y, x]
        if showing:
            assert min(showing) - 1e-9 <= drawn <= max(showing) + 1e-9


# Originals that are not known, files, mistakes


def test_positions_are_known_without_the_original() -> None:
    layout = llava_layout(3, 4, class_token=True)
    assert layout.n_features == 13
    assert layout.feature_of(1, 0) == 5
    assert layout.labels()[:3] == ["img[cls]", "img[0,0]", "img[0,1]"]
    assert layout.unfold(np.zeros(13))["base"].shape == (3, 4)
    assert layout.original_size is None
    mask = np.ones((5, 5), dtype=bool)
    for ask in (
        lambda: layout.cell_box(0, 0),
        lambda: layout.pixel_to_cells(0, 0),
        lambda: layout.pixel_to_cell(0, 0),
        lambda: layout.box_shares((0, 0, 1, 1)),
        lambda: layout.outside((0, 0, 1, 1)),
        lambda: layout.mask_shares(mask),
        lambda: layout.box_to_features((0, 0, 1, 1)),
        lambda: layout.mask_to_features(mask),
        lambda: layout.draw(np.zeros(13)),
        layout.cut,
        layout.cut_boxes,
        layout.visible_box,
        lambda: layout.patch_footprint((0, 0, 1, 1)),
        lambda: layout.footprint((0, 0, 1, 1)),
    ):
        with pytest.raises(SpanError, match=r"not known.*pixel_values.*prepare\("):
            ask()


@given(kind=KINDS, shape=SHAPES)
@settings(max_examples=20)
def test_json_round_trip(kind: str, shape: tuple[int, int]) -> None:
    for layout in (make_layout(kind, *shape), by_hand(), llava_layout(2, 3, class_token=True, resample="bilinear")):
        again = ImageLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
        assert again == layout
        assert hash(again) == hash(layout)
        assert again.labels() == layout.labels()
    assert make_layout(kind, *shape) != make_layout(kind, shape[0] + 1, shape[1])


def test_what_is_no_stored_layout_is_refused() -> None:
    good = by_hand().to_dict()
    for bad in ({}, {**good, "grid": 3}, {**good, "grids": []}, {"grids": [{"name": "base"}]}):
        with pytest.raises(InputError, match=r"image layout \(.*ImageLayout\.to_dict\(\)"):
            ImageLayout.from_dict(bad)


def test_layouts_that_contradict_themselves_are_refused() -> None:
    base = by_hand().grid("base")
    with pytest.raises(ConfigError, match="different names"):
        ImageLayout(grids=(base, base))
    other = Grid(name="fine", rows=GridAxis.of(axis(17, 8)), columns=GridAxis.of(axis(24, 12)))
    with pytest.raises(ConfigError, match=r"different sizes.*17"):
        ImageLayout(grids=(base, other))
    with pytest.raises(ConfigError, match="one axis"):
        Grid(name="base", rows=GridAxis.of(3), columns=GridAxis.of(axis(24, 12)))
    with pytest.raises(ConfigError, match=r"cells=5.*kept=4"):
        GridAxis.of(4, cells=5)
    with pytest.raises(ConfigError, match=r"first=2, kept=3.*4 patches"):
        GridAxis.of(4, first=2, kept=3)
    with pytest.raises(ConfigError, match=r"n_tiles=2.*1 and 2"):
        GridAxis(n_tiles=2, patches_per_tile=1, kept=2, cells=2, image=axis(16, 8))
    with pytest.raises(ConfigError, match=re.escape("ImageAxis(crop=0)")):
        axis(16, 8, canvas=0)
    with pytest.raises(ConfigError, match="canvas of 8 pixels.*3 tiles"):
        axis(16, 8, tiles=3)


def test_an_image_so_thin_that_unpadding_leaves_no_cell_of_the_fine_grid() -> None:
    layout = make_layout("next", 3, 300)
    rows, columns = layout.grid("fine").shape
    assert rows == 0
    assert layout.n_features == 16
    assert layout.unfold(np.zeros(16))["fine"].shape == (0, columns)
    assert layout.cut("fine") == 1.0
    assert layout.cut() == 0.0
    assert layout.cut_boxes("fine") == [(0, 0, 300, 3)]
    assert layout.draw(np.ones(16)).tolist() == np.ones((3, 300)).tolist()
    assert layout.box_to_features((0, 0, 300, 3)).features.tolist() == list(range(16))
    assert not layout.footprint((0, 0, 1, 1))["fine"].any()
