"""A layout of LLaVA-1.5 answers bit for bit what the geometry of one grid answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hooked_llava.architecture import ImageLayout, llava_layout, processor_axes
from hooked_llava.errors import SpanError
from tests.architecture.test_layouts import EVERY, PROCESSORS
from tests.oracles.geometry import ImageGeometry


def both(name: str, height: int, width: int) -> tuple[ImageGeometry, ImageLayout]:
    processor, patch_size = PROCESSORS[name]
    sizes = {"height": height, "width": width, "patch_size": patch_size}
    geometry = ImageGeometry.from_processor(processor, **sizes)
    return geometry, llava_layout(*processor_axes(processor, **sizes))


def answer(ask: Callable[..., Any], *given: Any) -> Any:
    """What is answered, or how it is refused."""
    try:
        return ask(*given)
    except SpanError as error:
        return str(error)


SIDES = st.integers(1, 300)


@EVERY
@given(data=st.data(), height=SIDES, width=SIDES)
@settings(max_examples=20)
def test_boxes_and_pixels_are_the_same(name: str, data: st.DataObject, height: int, width: int) -> None:
    assume(max(height, width) <= 12 * min(height, width))  # slivers only make large images, or none at all
    geometry, layout = both(name, height, width)
    assert layout.grids[0].shape == geometry.grid
    assert layout.original_size == geometry.original_size
    if not (geometry.vertical.visible[0] == geometry.vertical.visible[1] or 0 in geometry.grid):
        assert layout.visible_box() == geometry.visible_box
    rows, columns = geometry.grid
    for row, col in [(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 3), (rows, 0), (0, -1)]:
        assert answer(layout.cell_box, row, col) == answer(geometry.patch_box, row, col)
    x, y = data.draw(st.floats(-1, width + 1)), data.draw(st.floats(-1, height + 1))
    assert answer(layout.pixel_to_cell, x, y) == answer(geometry.pixel_to_patch, x, y)
    assert np.array_equal(
        np.append(layout.grids[0].rows.starts, layout.grids[0].rows.stops[-1:]), geometry.vertical.edges
    )


@EVERY
@given(data=st.data(), height=SIDES, width=SIDES)
@settings(max_examples=20)
def test_shares_of_boxes_are_the_same(name: str, data: st.DataObject, height: int, width: int) -> None:
    assume(max(height, width) <= 12 * min(height, width))  # slivers only make large images, or none at all
    geometry, layout = both(name, height, width)
    x0, y0 = data.draw(st.floats(-10, width)), data.draw(st.floats(-10, height))
    box = x0, y0, x0 + data.draw(st.floats(0.5, width)), y0 + data.draw(st.floats(0.5, height))
    assert layout.outside(box) == geometry.outside(box)
    ours, theirs = answer(lambda: layout.box_shares(box)["base"]), answer(geometry.box_shares, box)
    assert np.array_equal(ours, theirs)


@EVERY
@given(height=SIDES, width=SIDES, seed=st.integers(0, 99), density=st.sampled_from([0.001, 0.1, 1.0]))
@settings(max_examples=10)
def test_shares_of_masks_are_the_same(name: str, height: int, width: int, seed: int, density: float) -> None:
    assume(max(height, width) <= 12 * min(height, width))  # slivers only make large images, or none at all
    geometry, layout = both(name, height, width)
    mask = np.random.default_rng(seed).random((height, width)) < density
    ours, theirs = answer(layout.mask_shares, mask), answer(geometry.mask_shares, mask)
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        assert np.array_equal(ours[0]["base"], theirs[0])
        assert ours[1] == theirs[1]


@EVERY
def test_what_is_no_box_or_mask_is_refused_alike(name: str) -> None:
    geometry, layout = both(name, 100, 200)
    for box in [(5, 5, 5, 9), (0, 0, float("inf"), 5), (1, 2, 3), (500, 500, 600, 600)]:
        assert answer(layout.box_shares, box) == answer(geometry.box_shares, box)
        with pytest.raises(SpanError):
            layout.box_shares(box)
    for mask in (np.ones((5, 6), dtype=bool), np.zeros((100, 200), dtype=bool)):
        assert answer(layout.mask_shares, mask) == answer(geometry.mask_shares, mask)
        with pytest.raises(SpanError):
            layout.mask_shares(mask)
