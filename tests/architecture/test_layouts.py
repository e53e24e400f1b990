from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from hooked_llava.architecture import ImageAxis, ImageLayout, llava_layout, processor_axes
from hooked_llava.errors import ConfigError, InputError, SpanError

SIDES = st.integers(1, 400)
# (image processor, patch size): CLIP's shortest edge and center crop in two sizes, squeezed to a rectangle, a crop that
# is larger than the image, no crop, no resize, zeros appended, and LLaVA's own padding to a square.
PROCESSORS: dict[str, tuple[Any, int]] = {
    "tiny": (CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}), 8),
    "llava-1.5": (CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}), 14),
    "rectangle": (CLIPImageProcessorPil(size={"height": 40, "width": 56}, do_center_crop=False), 8),
    "padded crop": (CLIPImageProcessorPil(size={"shortest_edge": 29}, crop_size={"height": 48, "width": 48}), 8),
    "remainder": (CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}), 8),
    "longest edge": (
        CLIPImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 60}, crop_size={"height": 48, "width": 48}),
        8,
    ),
    "not resized": (CLIPImageProcessorPil(do_resize=False, crop_size={"height": 64, "width": 64}), 16),
    "zeros appended": (
        CLIPImageProcessorPil(
            size={"shortest_edge": 40},
            crop_size={"height": 40, "width": 40},
            do_pad=True,
            pad_size={"height": 56, "width": 48},
        ),
        8,
    ),
    "padded to a square": (
        LlavaImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, do_pad=True),
        8,
    ),
}
EVERY = pytest.mark.parametrize("name", PROCESSORS)


def make_layout(name: str, height: int, width: int) -> ImageLayout:
    processor, patch_size = PROCESSORS[name]
    return llava_layout(*processor_axes(processor, height=height, width=width, patch_size=patch_size))


def axes(layout: ImageLayout) -> tuple[ImageAxis, ImageAxis]:
    return layout.grids[0].rows.pixels, layout.grids[0].columns.pixels


def sizes(layout: ImageLayout, length: str) -> tuple[int, int]:
    rows, columns = axes(layout)
    return getattr(rows, length), getattr(columns, length)


def process(name: str, image: Image.Image) -> np.ndarray:
    """What the real processor makes of it, before normalisation, [height, width] of one channel."""
    processor, _ = PROCESSORS[name]
    return processor(image, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0][0]


def drawn_layout(name: str, height: int, width: int) -> ImageLayout:
    """For a size that hypothesis drew; slivers only make large images, and with a longest edge nothing at all."""
    assume(max(height, width) <= 12 * min(height, width))
    return make_layout(name, height, width)


def patches_with_area(layout: ImageLayout) -> list[tuple[int, int]]:
    rows, columns = layout.grids[0].rows.lengths, layout.grids[0].columns.lengths
    return [(int(r), int(c)) for r in np.flatnonzero(rows) for c in np.flatnonzero(columns)]


@EVERY
@given(height=SIDES, width=SIDES)
@settings(max_examples=6)
def test_sizes_are_those_of_the_real_processor(name: str, height: int, width: int) -> None:
    layout = drawn_layout(name, height, width)
    assert process(name, Image.new("RGB", (width, height))).shape == sizes(layout, "canvas")


@EVERY
@given(data=st.data(), height=SIDES, width=SIDES)
@settings(max_examples=20)
def test_the_box_of_a_pixels_patch_contains_the_pixel(name: str, data: st.DataObject, height: int, width: int) -> None:
    layout = drawn_layout(name, height, width)
    left, top, right, bottom = layout.visible_box()
    assume(left < right and top < bottom)
    x = data.draw(st.floats(left, right, exclude_max=True))
    y = data.draw(st.floats(top, bottom, exclude_max=True))
    row, col = layout.pixel_to_cell(x, y)
    x0, y0, x1, y1 = layout.cell_box(row, col)
    assert x0 <= x < x1
    assert y0 <= y < y1


@EVERY
@given(height=SIDES, width=SIDES)
@settings(max_examples=12)
def test_boxes_tile_what_the_model_sees(name: str, height: int, width: int) -> None:
    layout = drawn_layout(name, height, width)
    boxes = {patch: layout.cell_box(*patch) for patch in patches_with_area(layout)}
    for (row, col), (x0, y0, x1, y1) in boxes.items():
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        if (row, col + 1) in boxes:
            assert boxes[row, col + 1][0] == x1
        if (row + 1, col) in boxes:
            assert boxes[row + 1, col][1] == y1
    left, top, right, bottom = layout.visible_box()
    area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes.values())
    assert area == pytest.approx((right - left) * (bottom - top))
    assert layout.outside((0, 0, width, height)) == pytest.approx(1 - area / (width * height), abs=1e-8)


@EVERY
@pytest.mark.parametrize(("height", "width"), [(197, 333), (331, 205), (150, 150)])
def test_a_colored_block_lights_up_the_patch_that_the_layout_says(name: str, height: int, width: int) -> None:
    layout = make_layout(name, height, width)
    _, patch_size = PROCESSORS[name]
    rows, columns = layout.grids[0].shape
    for row, col in patches_with_area(layout)[3::11]:
        x0, y0, x1, y1 = layout.cell_box(row, col)
        if (x1 - x0) < 3 or (y1 - y0) < 3:  # a sliver at the border: bicubic resizing spreads it over its neighbor
            continue
        image = np.zeros((height, width, 3), dtype=np.uint8)
        image[int(np.ceil(y0)) : int(y1), int(np.ceil(x0)) : int(x1)] = 255
        seen = process(name, Image.fromarray(image)).astype(float)[: rows * patch_size, : columns * patch_size]
        if name == "padded to a square":  # its padding has the mean's color
            seen -= process(name, Image.fromarray(np.zeros_like(image)))[: seen.shape[0], : seen.shape[1]]
        light = seen.reshape(rows, patch_size, columns, patch_size).sum(axis=(1, 3))
        assert np.unravel_index(light.argmax(), light.shape) == (row, col)
        assert light[row, col] > 0.6 * light.sum()


def test_the_center_of_a_block_is_where_the_layout_says_to_a_tenth_of_a_pixel() -> None:
    layout = make_layout("llava-1.5", 427, 640)
    image = np.zeros((427, 640, 3), dtype=np.uint8)
    image[200:240, 300:360] = 255
    light = np.clip(process("llava-1.5", Image.fromarray(image)).astype(float), 0, None)
    center_y = (light.sum(1) * (np.arange(336) + 0.5)).sum() / light.sum()
    center_x = (light.sum(0) * (np.arange(336) + 0.5)).sum() / light.sum()
    assert axes(layout)[0].to_canvas(220) == pytest.approx(center_y, abs=0.1)
    assert axes(layout)[1].to_canvas(330) == pytest.approx(center_x, abs=0.1)


def test_llavas_layout_by_hand() -> None:
    layout = make_layout("llava-1.5", 480, 640)
    assert layout.original_size == (480, 640)
    assert sizes(layout, "resized") == (336, 448)
    assert sizes(layout, "offset") == (0, 56)
    assert layout.grids[0].shape == (24, 24)
    assert layout.visible_box() == pytest.approx((80, 0, 560, 480))
    assert layout.cell_box(0, 0) == pytest.approx((80, 0, 100, 20))
    assert layout.cell_box(23, 23) == pytest.approx((540, 460, 560, 480))
    assert layout.pixel_to_cell(319.5, 239.5) == (11, 11)


def test_longer_edge_is_cut_off_not_rounded() -> None:
    # 64 * 51 / 31 = 105.29; 64 * 50 / 30 = 106.67
    assert sizes(make_layout("tiny", 31, 51), "resized") == (64, 105)
    assert sizes(make_layout("tiny", 50, 30), "resized") == (106, 64)


def test_odd_padding_goes_before_with_pil_and_after_with_torchvision() -> None:
    class Torchvision:
        backend = "torchvision"
        do_resize, do_center_crop, do_pad = False, True, None
        crop_size = {"height": 8, "width": 8}  # noqa: RUF012

    class Pil(Torchvision):
        backend = "pil"

    both = [processor_axes(kind(), height=5, width=11, patch_size=4) for kind in (Torchvision, Pil)]
    offsets = [(rows.offset, columns.offset) for rows, columns in both]
    assert offsets == [(-1, 1), (-2, 1)]


def test_padding_patches_have_no_box() -> None:
    layout = make_layout("zeros appended", 40, 40)
    assert layout.cell_box(4, 4) == (32, 32, 40, 40)
    with pytest.raises(SpanError, match=r"Patch \(5, 0\).*padding.*image.*box_to_patches\(\(0, 0, 40, 40\)\)"):
        layout.cell_box(5, 0)
    assert layout.box_shares((0, 0, 40, 40))["base"][:5, :5].min() == 1.0
    assert layout.box_shares((0, 0, 40, 40))["base"][5:].max() == 0.0


def test_box_shares_by_hand() -> None:
    layout = make_layout("tiny", 64, 64)
    shares = layout.box_shares((4, 8, 16, 12))["base"]
    assert shares.sum() == pytest.approx(0.25 + 0.5)
    assert shares[1, 0] == pytest.approx(0.25)
    assert shares[1, 1] == pytest.approx(0.5)


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """The area that two boxes share."""
    x, y = (max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in range(2))
    return x * y


@EVERY
@given(data=st.data(), height=st.integers(1, 300), width=st.integers(1, 300))
@settings(max_examples=20)
def test_shares_of_a_box_are_areas_of_overlap(name: str, data: st.DataObject, height: int, width: int) -> None:
    layout = drawn_layout(name, height, width)
    x0, y0 = data.draw(st.floats(-10, width)), data.draw(st.floats(-10, height))
    box = x0, y0, x0 + data.draw(st.floats(0.5, width)), y0 + data.draw(st.floats(0.5, height))
    cells = {patch: layout.cell_box(*patch) for patch in patches_with_area(layout)}
    shared = {patch: overlap(cell, box) for patch, cell in cells.items()}
    assert layout.outside(box) == pytest.approx(1 - sum(shared.values()) / overlap(box, box), abs=1e-6)
    assume(layout.outside(box) < 1)
    shares = np.zeros(layout.grids[0].shape)
    for patch, area in shared.items():
        shares[patch] = area / overlap(cells[patch], cells[patch])
    np.testing.assert_allclose(layout.box_shares(box)["base"], shares, atol=1e-6)


@EVERY
@given(
    height=st.integers(1, 24), width=st.integers(1, 24), seed=st.integers(0, 99), density=st.sampled_from([0.02, 0.5])
)
@settings(max_examples=8)
def test_shares_of_a_mask_add_up_over_its_pixels(name: str, height: int, width: int, seed: int, density: float) -> None:
    layout = drawn_layout(name, height, width)
    mask = np.random.default_rng(seed).random((height, width)) < density
    pixels = [(x, y, x + 1, y + 1) for y, x in np.argwhere(mask).tolist()]
    cells = {patch: layout.cell_box(*patch) for patch in patches_with_area(layout)}
    shared = {patch: sum(overlap(cell, pixel) for pixel in pixels) for patch, cell in cells.items()}
    assume(sum(shared.values()) > 1e-6)
    shares, outside = layout.mask_shares(mask)
    assert outside == pytest.approx(1 - sum(shared.values()) / len(pixels), abs=1e-6)
    for patch, area in shared.items():
        assert shares["base"][patch] == pytest.approx(area / overlap(cells[patch], cells[patch]), abs=1e-6)


@EVERY
@given(data=st.data(), height=st.integers(1, 60), width=st.integers(1, 60))
@settings(max_examples=12)
def test_a_box_and_the_same_box_as_a_mask_agree(name: str, data: st.DataObject, height: int, width: int) -> None:
    layout = drawn_layout(name, height, width)
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    outside = layout.outside((x0, y0, x1, y1))
    assume(outside < 1)
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    shares, mask_outside = layout.mask_shares(mask)
    np.testing.assert_allclose(shares["base"], layout.box_shares((x0, y0, x1, y1))["base"], atol=1e-9)
    assert mask_outside == pytest.approx(outside, abs=1e-8)


def test_what_a_center_crop_cuts_away() -> None:
    layout = make_layout("tiny", 100, 200)  # sees x from 50 to 150
    assert layout.outside((40, 0, 60, 10)) == pytest.approx(0.5)
    assert layout.outside((60, 0, 70, 10)) == 0.0
    assert layout.outside((-10, -10, 0, 0)) == 1.0
    with pytest.raises(
        SpanError,
        match=r"Pixel \(10, 20\).*model.*image.*box \(50, 0, 150, 100\) of 200 x 100 pixels",
    ):
        layout.pixel_to_cell(10, 20)
    message = r"box \(0, 0, 50, 100\).*\(50, 0, 150, 100\).*200 x 100 pixels.*\(x0, y0, x1, y1\) in pixels"
    with pytest.raises(SpanError, match=message):
        layout.box_shares((0, 0, 50, 100))["base"]
    mask = np.zeros((100, 200), dtype=bool)
    mask[:, :40] = True
    with pytest.raises(SpanError, match=r"mask.*model.*\(50, 0"):
        layout.mask_shares(mask)


def test_other_errors_say_what_to_do() -> None:
    layout = make_layout("tiny", 100, 200)
    with pytest.raises(
        SpanError,
        match=r"Pixel \(200, 5\).*image of 200 x 100.*pixels",
    ):
        layout.pixel_to_cell(200, 5)
    with pytest.raises(
        SpanError,
        match=r"Patch \(8, 0\).*grid of 8 x 8 patches.*rows.*from 0 to 7.*columns from 0 to 7",
    ):
        layout.cell_box(8, 0)
    for box in [(5, 5, 5, 9), (5, 9, 7, 9), (9, 0, 5, 5), (0, 0, float("inf"), 5), (float("nan"), 0, 1, 1)]:
        with pytest.raises(
            SpanError,
            match=r"box.*\(x0, y0, x1, y1\).*x0 < x1.*y0 < y1.*pixels.*image",
        ):
            layout.box_shares(box)
    with pytest.raises(
        SpanError,
        match="mask is 5 x 6.*image 100 x 200.*mask.*pixel",
    ):
        layout.mask_shares(np.ones((5, 6), dtype=bool))
    with pytest.raises(SpanError, match="mask.*pixel.*mask"):
        layout.mask_shares(np.zeros((100, 200), dtype=bool))


def test_an_unknown_way_of_resizing_is_refused() -> None:
    processor = CLIPImageProcessorPil(size={"max_height": 30, "max_width": 40})
    with pytest.raises(
        ConfigError,
        match="image processor.*'max_height'.*30.*keys 'shortest_edge'.*'height'.*'width'.*Patch",
    ):
        processor_axes(processor, height=30, width=30, patch_size=8)


def test_a_image_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(InputError, match=r"image of 175 x 1 \(width x height\).*image processor"):
        make_layout("longest edge", 1, 175)


def test_axis_maps_are_inverse() -> None:
    axis = ImageAxis(original=97, padded=97, before=0, resized=64, offset=-3, crop=70, canvas=70, patch_size=8)
    for x in (0.0, 13.7, 97.0):
        assert axis.to_original(axis.to_canvas(x)) == pytest.approx(x)
    assert axis.patch_of(-0.1) is None
    assert axis.n_patches == 8
