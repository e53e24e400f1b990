"""Numbers by position of the images: axes, coordinates and filling, by hand and on any layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings

from hooked_llava import results
from hooked_llava.architecture import llava_layout
from hooked_llava.errors import InputError
from hooked_llava.results.image_axes import ImageAxes, image_dims, patches_of_cells, take, take_each
from tests.layouts import DRAWN, by_hand, inputs_of, made

NAN = float("nan")
CLASS, NEWLINES = [0], [7, 10, 13]  # of the layout built by hand
BASE, FINE = [1, 2, 3, 4, 5, 6], [8, 9, 11, 12]


def test_images_of_one_grid_have_rows_and_columns() -> None:
    inputs = inputs_of([llava_layout(2, 3)], [llava_layout(2, 3, class_token=True)])
    axes = ImageAxes.of(inputs)
    assert (axes.grid, axes.dims, axes.shape) == ((2, 3), ("patch_row", "patch_col"), (2, 3))
    assert axes.positions_of_all(inputs).tolist() == [[[1, 2, 3, 4, 5, 6]], [[2, 3, 4, 5, 6, 7]]]
    found = axes.labelled(np.arange(12.0).reshape(2, 1, 6), ("prompt", "image"), name="value")
    assert found.dims == ("prompt", "image", "patch_row", "patch_col")
    assert not found.coords
    assert found[1, 0, 1].values.tolist() == [9, 10, 11]


@pytest.mark.parametrize("images", [[by_hand()], [llava_layout(2, 3), llava_layout(3, 2)]])
def test_all_other_images_have_features(images: list[Any]) -> None:
    axes = ImageAxes.of(inputs_of(images))
    assert (axes.grid, axes.dims) == (None, ("feature",))
    assert axes.shape == (max(layout.n_features for layout in images),)


def test_shorter_images_are_filled_up_and_labels_say_what_is_where() -> None:
    inputs = inputs_of([llava_layout(2, 2), by_hand()])
    axes = ImageAxes.of(inputs)
    assert axes.positions(inputs.token_map)[0].tolist() == [1, 2, 3, 4, *[-1] * 10]
    values = torch.arange(float(inputs.shape[1]))
    found = axes.labelled(take(values, axes.positions(inputs.token_map)).numpy(), ("image",))
    assert found.dims == ("image", "feature")
    np.testing.assert_array_equal(found[0], [1, 2, 3, 4, *[NAN] * 10])
    np.testing.assert_array_equal(found[1], np.arange(14) + inputs.token_map.image_starts[1])
    assert found.label.dims == ("image", "feature")
    assert found.label[0, 3:5].values.tolist() == ["img[1,1]", ""]
    assert found.label[1].values.tolist() == by_hand().labels()
    assert "row" not in found.coords
    one = found.isel(image=1)
    assert one.label.values.tolist() == by_hand().labels()


def test_where_one_layout_serves_grid_row_and_column_say_it_too(tmp_path: Any) -> None:
    axes = ImageAxes((by_hand(), by_hand()))
    values = np.arange(28.0).reshape(2, 1, 14)
    found = axes.labelled(values, ("prompt", "image"), name="value", attrs={"target": "red"})
    assert found.label.values.tolist() == by_hand().labels()
    assert found.grid.values.tolist() == [""] + ["base"] * 7 + ["fine"] * 6
    assert found.row[BASE].values.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.col[FINE].values.tolist() == [0, 1, 0, 1]
    assert set(found.row[[*CLASS, *NEWLINES]].values.tolist()) == {-1}
    results.save(found, tmp_path / "map.safetensors")
    xr.testing.assert_identical(results.load(tmp_path / "map.safetensors"), found)
    mixed = ImageAxes((by_hand(), llava_layout(2, 2))).labelled(values, ("image", "layer"))
    results.save(mixed, tmp_path / "mixed.safetensors")
    xr.testing.assert_identical(results.load(tmp_path / "mixed.safetensors"), mixed)


def test_results_of_several_prompts_keep_their_own_labels() -> None:
    layouts = by_hand(), llava_layout(2, 2)
    axes = ImageAxes(layouts)
    parts = [axes.labelled(np.zeros((1, layout.n_features)), ("layer",), layouts=[layout]) for layout in layouts]
    assert np.isnan(parts[1].values[0, 4:]).all()
    both = results.stack(parts, "prompt")
    assert both.label.dims == ("prompt", "feature")
    assert both.label[1, :5].values.tolist() == ["img[0,0]", "img[0,1]", "img[1,0]", "img[1,1]", ""]
    assert image_dims(both) == ["feature"]


def test_numbers_by_patch_become_the_weighted_mean_of_a_cells_patches() -> None:
    layout = by_hand()
    rows, columns = layout.grids[0].rows.patches_per_tile, layout.grids[1].columns.patches_per_tile
    assert (rows, columns, layout.n_tiles) == (2, 6, 3)
    patches = np.random.default_rng(0).random((3, 2, 6))
    fine = np.concatenate([patches[1], patches[2]])[:, 1:5]  # the canvas of 4 x 6 patches without its outer columns
    found = ImageAxes((layout,)).of_patches(torch.from_numpy(patches))[0].numpy()
    pooled = fine.reshape(2, 2, 2, 2).mean((1, 3))
    np.testing.assert_allclose(found[FINE], pooled.ravel())
    assert np.isnan(found[[*CLASS, *NEWLINES]]).all()


@given(of=DRAWN)
@settings(max_examples=15)
def test_cells_know_their_patches(of: Any) -> None:
    layout = made(of)
    found = patches_of_cells(layout)
    assert sorted(found) == sorted(layout.object_features().tolist())
    for grid in layout.grids:
        patches, weights = grid.patches()
        for row, col in np.ndindex(grid.shape):
            own = found[layout.feature_of(row, col, grid.name)]
            expected = {
                (int(t), int(r) * grid.columns.patches_per_tile + int(c))
                for (t, r, c), weight in zip(patches[row, col], weights[row, col], strict=True)
                if weight > 0
            }
            assert {(tile, patch) for tile, several in own.items() for patch in several} == expected


@given(of=DRAWN)
@settings(max_examples=15)
def test_folding_is_the_reverse_of_unfolding(of: Any) -> None:
    layout = made(of)
    values = np.random.default_rng(0).random((2, layout.n_features))
    folded = layout.fold(layout.unfold(values))
    cells = layout.object_features()
    np.testing.assert_array_equal(folded[:, cells], values[:, cells])
    assert np.isnan(np.delete(folded, cells, axis=1)).all()


def test_ranking_leaves_out_what_is_nan_and_newlines() -> None:
    axes = ImageAxes((by_hand(), llava_layout(1, 2)))
    values = np.full((2, 14), NAN)
    values[0, [3, 7, 9]] = [0.5, 9.0, 0.7]
    values[1, :2] = [0.6, 0.5]
    assert axes.ranked(values).tolist() == [[0, 9], [1, 0], [0, 3], [1, 1]]
    assert axes.ranked(values, cells_only=False).tolist() == [[0, 7], [0, 9], [1, 0], [0, 3], [1, 1]]
    assert axes.ranked(values[:1], axes.layouts[:1]).tolist() == [[0, 9], [0, 3]]


def test_places_that_are_not_there_are_nan() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    where = torch.tensor([[[2, -1]], [[0, 1]]])
    np.testing.assert_array_equal(take_each(values, where), [[[3, NAN]], [[4, 5]]])
    np.testing.assert_array_equal(take(values, where[0]), [[[3, NAN]], [[6, NAN]]])


def test_images_are_needed() -> None:
    with pytest.raises(InputError, match=r"an image.*none.*images=..."):
        ImageAxes.of(inputs_of([]))
    inputs = inputs_of([by_hand()], [])
    with pytest.raises(InputError, match=r"images.*prompts have 1, 0"):
        ImageAxes.of(inputs).positions_of_all(inputs)
