"""Regions and bars as paths of an SVG."""

from __future__ import annotations

import re

import numpy as np

from hooked_llava.viz.pages.vectors import BARS_HEIGHT, bars_path, outside_path, rectangles


def test_rectangles_cover_a_region_and_nothing_else_and_do_not_overlap():
    rng = np.random.default_rng(0)
    for region in [*(rng.random((20, 7, 5)) > 0.5), np.zeros((3, 4), bool), np.ones((3, 4), bool)]:
        times = np.zeros(region.shape, int)
        for x, y, width, height in rectangles(region):
            times[y : y + height, x : x + width] += 1
        np.testing.assert_array_equal(times, region.astype(int))


def test_a_block_of_pixels_is_one_rectangle():
    region = np.zeros((64, 64), bool)
    region[8:24, 16:32] = True
    assert list(rectangles(region)) == [(16, 8, 16, 16)]
    assert outside_path(region) == "M0 0h64v64h-64zM16 8h16v16h-16z"


def test_bars_are_as_high_as_their_counts():
    heights = [int(height) for height in re.findall(r"v-(\d+)", bars_path([46, 23, 1, 0]))]
    assert heights == [BARS_HEIGHT - 1, round((BARS_HEIGHT - 1) / 2), 1]
    assert bars_path([0, 0]) == ""
