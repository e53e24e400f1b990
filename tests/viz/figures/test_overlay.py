from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import Rectangle
from PIL import Image

from hooked_llava.architecture import Grid, GridAxis, ImageLayout, llava_layout, processor_axes
from hooked_llava.errors import InputError, SpanError
from hooked_llava.viz import patch_overlay, patch_overlays
from tests.fixtures_processor import make_processor
from tests.layouts import DRAWN, axis, by_hand, inputs_of, made
from tests.pairs import as_users_run


def extents(mesh) -> np.ndarray:
    """(x0, y0, x1, y1) of every drawn cell, [row, col, 4]."""
    corners = mesh.get_coordinates()
    return np.concatenate([corners[:-1, :-1], corners[1:, 1:]], axis=-1)


def test_each_patch_is_drawn_where_the_token_map_says(inputs):
    values = np.arange(16.0).reshape(4, 4)
    axes = patch_overlay(inputs, values).axes[0]
    drawn = extents(axes.collections[0])
    for row in range(4):
        for col in range(4):
            assert tuple(drawn[row, col]) == pytest.approx(inputs.token_map.patch_box(row, col))
    assert np.array_equal(axes.collections[0].get_array(), values)
    assert tuple(drawn[0, 0][:2]) == (50.0, 0.0)  # an image of 200 x 100: the crop begins a quarter from the left


def test_the_image_keeps_its_own_coordinates_and_the_rest_is_dimmed(inputs):
    axes = patch_overlay(inputs, np.ones((4, 4))).axes[0]
    assert axes.images[0].get_extent() == [0, 200, 100, 0]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 200), (100, 0))
    boxes = [patch.get_bbox().extents.tolist() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert sorted(boxes) == sorted([[0, 0, 50, 100], [150, 0, 200, 100], [50, 0, 150, 100]])
    assert [patch.get_label() for patch in axes.patches][-1] == "seen"


def test_nothing_is_marked_where_nothing_is_cut_away(model):
    square = model.prepare("What is it?", np.zeros((60, 60, 3), np.uint8))
    assert not patch_overlay(square, np.ones((4, 4))).axes[0].patches


def test_large_grids_and_real_processors_fit():
    processor = make_processor(image_size=336, patch_size=14).image_processor
    layout = llava_layout(*processor_axes(processor, height=480, width=640, patch_size=14))
    image = np.zeros((480, 640, 3), np.uint8)
    axes = patch_overlay(image, np.random.default_rng(0).random((24, 24)), layout=layout).axes[0]
    assert np.allclose(extents(axes.collections[0])[5, 7], layout.cell_box(5, 7))


def test_patches_without_a_layout_divide_the_image_evenly(wide_image):
    drawn = extents(patch_overlay(wide_image, np.ones((2, 4))).axes[0].collections[0])
    assert drawn[1, 3].tolist() == [150, 50, 200, 100]


def test_opacity_grows_with_the_value_and_is_0_at_0(inputs):
    values = np.zeros((4, 4))
    values[1, 2], values[3, 3] = 1.0, 0.25
    alpha = patch_overlay(inputs, values).axes[0].collections[0].get_alpha()
    assert alpha[0, 0] == 0
    assert alpha[1, 2] > alpha[3, 3] > 0


def test_signed_values_diverge(inputs):
    values = np.linspace(-1, 2, 16).reshape(4, 4)
    assert patch_overlay(inputs, values).axes[0].collections[0].get_clim() == (-2, 2)


def test_small_multiples_share_one_scale(inputs):
    maps = xr.DataArray(
        np.random.default_rng(0).random((5, 4, 4)), dims=("layer", "patch_row", "patch_col"), name="attention"
    )
    figure = patch_overlays(inputs, maps)
    panels = [axes for axes in figure.axes if axes.collections and axes.images]
    assert [axes.get_title() for axes in panels] == [f"layer {i}" for i in range(5)]
    assert {axes.collections[0].get_clim() for axes in panels} == {(0.0, float(maps.max()))}
    for axes, values in zip(panels, maps.values, strict=True):
        assert np.array_equal(axes.collections[0].get_array(), values)
    assert figure.axes[-1].get_ylabel() == "share of attention"


def test_tensors_and_labelled_arrays_are_grids_too(inputs):
    assert patch_overlay(inputs, torch.ones(4, 4)).axes[0].get_title() == ""
    grid = xr.DataArray(np.ones((1, 4, 4)), dims=("image", "patch_col", "patch_row"), name="attention")
    assert patch_overlay(inputs, grid).axes[0].get_title(loc="left") == "Attention"


def test_errors_say_what_does_not_fit(inputs, tensor_inputs):
    with pytest.raises(InputError, match="are 3 x 3.*image has 4 x 4 patches"):
        patch_overlay(inputs, np.ones((3, 3)))
    with pytest.raises(InputError, match=r"shape \(2, 4, 4\).*patch"):
        patch_overlay(inputs, np.ones((2, 4, 4)))
    with pytest.raises(InputError, match="image 0"):
        patch_overlay(tensor_inputs, np.ones((4, 4)))
    with pytest.raises(InputError, match="image 3.*are 1"):
        patch_overlay(inputs, np.ones((4, 4)), image=3)
    with pytest.raises(InputError, match="layer, head, patch_row, patch_col"):
        patch_overlays(inputs, xr.DataArray(np.ones((2, 2, 4, 4)), dims=("layer", "head", "patch_row", "patch_col")))


def test_patches_that_do_nothing_or_are_unknown_are_clear(inputs):
    values = np.ones((4, 4))
    values[0, 0], values[0, 1], values[1, 0] = 0.0, 1.5, np.nan
    share = xr.DataArray(values, dims=("patch_row", "patch_col"), name="recovered", attrs={"neutral": 1.0})
    opacity = patch_overlay(inputs, share).axes[0].collections[0].get_alpha()
    assert opacity[0, 0] > opacity[0, 1] > 0.3
    assert np.count_nonzero(opacity) == 2


def test_the_image_below_is_grey_unless_asked(inputs):
    """A red object must not look like a large value."""
    red = np.zeros((32, 32, 3), np.uint8)
    red[8:16, 8:16] = 255, 0, 0
    maps = xr.DataArray(np.zeros((2, 4, 4)), dims=("layer", "patch_row", "patch_col"))
    for figure in (
        patch_overlay(red, np.zeros((4, 4))),
        patch_overlays(red, maps),
        patch_overlay(inputs, np.ones((4, 4))),
    ):
        shown = np.asarray(figure.axes[0].images[0].get_array())
        assert (shown == shown[..., :1]).all()
    shown = np.asarray(patch_overlay(red, np.zeros((4, 4)), underlay="color").axes[0].images[0].get_array())
    assert not (shown == shown[..., :1]).all()
    with as_users_run(), pytest.raises(InputError, match=r"underlay='red'; expected 'grey' or 'color'"):
        patch_overlay(red, np.zeros((4, 4)), underlay="red")  # type: ignore[arg-type]


# Images of several grids


def drawn(figure) -> np.ndarray:
    """The values laid over the image, NaN where there are none."""
    [image] = [image for image in figure.axes[0].images if np.asarray(image.get_array()).ndim == 2]
    assert image.get_extent() == [0, 24, 16, 0]
    return np.ma.filled(np.ma.masked_invalid(image.get_array()).astype(float), np.nan)


def test_every_grid_is_drawn_by_the_area_that_its_cells_show():
    layout, image = by_hand(), np.zeros((16, 24, 3), np.uint8)
    values = np.random.default_rng(0).random(layout.n_features)
    figure = patch_overlay(image, values, layout=layout)
    np.testing.assert_allclose(drawn(figure), layout.draw(values))
    values[[0, *layout.newline_features()]] = 1e9  # they show nothing
    np.testing.assert_allclose(drawn(patch_overlay(image, values, layout=layout)), layout.draw(values))
    # The fine grid alone: the base grid's cells have no value.
    fine = np.full(layout.n_features, np.nan)
    fine[layout.object_features("fine")] = [1, 2, 3, 4]
    seen = drawn(patch_overlay(image, fine, layout=layout))
    assert np.isnan(seen[:, :4]).all()
    assert seen[0, 4] == 1
    assert seen[15, 19] == 4
    assert not figure.axes[0].patches  # the base grid shows all of the image


def test_the_layouts_of_inputs_are_drawn(inputs):
    """Unequal images of one prompt, each by its own layout; and small multiples by position."""
    images = (Image.new("RGB", (24, 16)), Image.new("RGB", (24, 16)))
    prompt = replace(inputs_of([llava_layout(2, 2), by_hand()]), images=images)
    values = np.arange(14.0)
    np.testing.assert_allclose(drawn(patch_overlay(prompt, values, image=1)), by_hand().draw(values))
    assert extents(patch_overlay(prompt, np.ones((2, 2))).axes[0].collections[0])[1, 1].tolist() == [12, 8, 24, 16]
    maps = xr.DataArray(np.stack([values, -values]), dims=("layer", "feature"))
    panels = patch_overlays(prompt, maps, image=1)
    np.testing.assert_allclose(drawn(panels), by_hand().draw(values))
    assert [axes.get_title() for axes in panels.axes[:2]] == ["layer 0", "layer 1"]


def test_a_single_pooled_grid_is_drawn_by_area_too():
    columns = GridAxis.of(axis(24, 24, canvas=24), first=1, kept=4, cells=3)
    layout = ImageLayout(grids=(Grid(name="base", rows=GridAxis.of(axis(16, 8)), columns=columns, newline="row"),))
    values = np.array([[1.0, 2, 3], [4, 5, 6]])
    figure = patch_overlay(np.zeros((16, 24, 3), np.uint8), values, layout=layout)
    by_feature = np.array([1.0, 2, 3, 0, 4, 5, 6, 0])
    np.testing.assert_allclose(drawn(figure), layout.draw(by_feature))
    boxes = [patch.get_bbox().extents.tolist() for patch in figure.axes[0].patches]
    assert boxes == [
        [0, 0, 4, 16],
        [20, 0, 24, 16],
        [4, 0, 20, 16],
    ]  # cut away, cut away, and the frame around the rest


def test_one_grid_is_drawn_by_itself_or_each_beside_the_other():
    layout, image = by_hand(), np.zeros((16, 24, 3), np.uint8)
    values = np.random.default_rng(0).random(layout.n_features)
    for name in layout.names:
        figure = patch_overlay(image, values, layout=layout, grid=name)
        np.testing.assert_allclose(drawn(figure), layout.draw(values, name))
    assert len(figure.axes[0].patches) == 3  # what the fine grid does not show: two strips, and the frame
    panels = [axes for axes in patch_overlay(image, values, layout=layout, grid="each").axes if len(axes.images) == 2]
    assert [axes.get_title() for axes in panels] == ["base", "fine"]
    for name, axes in zip(layout.names, panels, strict=True):
        seen = np.ma.filled(np.ma.masked_invalid(axes.images[1].get_array()).astype(float), np.nan)
        np.testing.assert_allclose(seen, layout.draw(values, name))
    with pytest.raises(SpanError, match="no grid 'bas'.*base, fine"):
        patch_overlay(image, values, layout=layout, grid="bas")
    maps = xr.DataArray(np.stack([values, -values]), dims=("layer", "feature"))
    figure = patch_overlays(image, maps, layout=layout, grid="each", columns=3)
    assert [axes.get_title() for axes in figure.axes[:4]] == [
        f"layer {i}\n{name}" for i in range(2) for name in layout.names
    ]


def test_what_fills_up_shorter_images_is_not_drawn(inputs):
    layout, image = by_hand(), np.zeros((16, 24, 3), np.uint8)
    values = np.full(20, np.nan)
    values[:14] = np.arange(14)
    np.testing.assert_allclose(drawn(patch_overlay(image, values, layout=layout)), layout.draw(values[:14]))
    values[-1] = 1.0
    with pytest.raises(InputError, match="20 by position"):
        patch_overlay(image, values, layout=layout)


def test_values_that_do_not_fit_several_grids(inputs):
    image = np.zeros((16, 24, 3), np.uint8)
    with pytest.raises(InputError, match=r"2 x 3.*2 x 3 \+ 2 x 2 patches.*grids, 14 positions"):
        patch_overlay(image, np.ones((2, 3)), layout=by_hand())
    with pytest.raises(InputError, match="13.*position.*14 positions.*position"):
        patch_overlay(image, np.ones(13), layout=by_hand())
    with pytest.raises(InputError, match="need its layout"):
        patch_overlay(image, np.ones(14))


@given(of=DRAWN, seed=st.integers(0, 9))
@settings(max_examples=10)
def test_any_layout_is_drawn(of, seed):
    layout = made(of)
    height, width = layout.original_size
    values = np.random.default_rng(seed).random(layout.n_features)
    axes = patch_overlay(np.zeros((height, width, 3), np.uint8), values, layout=layout).axes[0]
    seen = np.ma.filled(np.ma.masked_invalid(axes.images[1].get_array()).astype(float), np.nan)
    np.testing.assert_allclose(seen, layout.draw(values))
    dimmed = sum(patch.get_width() * patch.get_height() for patch in axes.patches if patch.get_label() != "seen")
    assert dimmed == pytest.approx(layout.cut() * height * width, abs=1e-6)


def test_names_wider_than_their_panel_are_wrapped_and_have_room():
    maps = xr.DataArray(np.ones((4, 2, 2)), dims=("head", "patch_row", "patch_col"))
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    short, long = (
        maps.assign_coords(head=[f"{name} {i}" for i in range(4)]) for name in ("head", "layer 2, head 5: 100%,")
    )
    narrow, wide = patch_overlays(pixels, short), patch_overlays(pixels, long)
    assert [axes.get_title().count("\n") for axes in (narrow.axes[0], wide.axes[0])] == [0, 1]
    assert wide.get_size_inches()[1] >= narrow.get_size_inches()[1]
    wide.draw_without_rendering()
    ends = [axes.title.get_window_extent() for axes in wide.axes[:4]]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(ends))
