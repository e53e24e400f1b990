from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.viz import layer_position_map, layer_position_maps
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor
from tests.pairs import as_users_run


def by_position(inputs, n_layers: int = 3) -> xr.DataArray:
    n = inputs.shape[1]
    values = np.random.default_rng(0).random((n_layers, n))
    return xr.DataArray(values, dims=("layer", "position"), coords={"position": range(n)}, name="attention")


@pytest.mark.parametrize(
    ("collapse", "reduce"),
    [
        ("mean", lambda block: block.mean(1)),
        ("sum", lambda block: block.sum(1)),
        ("max", lambda block: block.max(1)),
    ],
)
def test_layer_position_map_gives_the_image_one_column(inputs, collapse, reduce):
    result = by_position(inputs)
    axes = layer_position_map(result, inputs, collapse=collapse).axes[0]
    token_map = inputs.token_map
    image, text = token_map["image"], token_map["text"]
    drawn = axes.collections[0].get_array()
    assert drawn.shape == (3, len(text) + 1)
    column = image[0]
    assert np.allclose(drawn[:, column], reduce(result.values[:, image.tolist()]))
    assert np.array_equal(drawn[:, column + 1 :], result.values[:, image[-1] + 1 :])
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[column] == f"image ({collapse} of {len(image)})"
    assert labels[column + 1 : column + 3] == ["What", "color"]


def test_layer_position_map_of_some_positions_only(inputs):
    question = inputs.token_map["question"].tolist()
    axes = layer_position_map(by_position(inputs).isel(position=question), inputs).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["What", "color", "is", "the", "star", "?"]


def test_layer_position_map_without_inputs_uses_the_labels_of_the_result(inputs):
    result = by_position(inputs).isel(position=[0, 1]).assign_coords(label=("position", ["<s>", "USER:"]))
    axes = layer_position_map(result).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["<s>", "USER:"]


def test_layer_position_map_refuses_the_wrong_inputs_and_an_unknown_collapse(inputs, text_inputs):
    with pytest.raises(InputError, match=r"position \d+.*prompt \d+ positions.*inputs"):
        layer_position_map(by_position(inputs), text_inputs)
    with as_users_run(), pytest.raises(InputError, match=r"collapse='median'; expected None, 'mean', 'sum' or 'max'"):
        layer_position_map(by_position(inputs), inputs, collapse="median")  # type: ignore[arg-type]


def test_patches_stand_side_by_side_in_narrow_columns(inputs):
    """Nothing is averaged unless that is asked for: every value is drawn, under its token or its image."""
    result = by_position(inputs)
    axes = layer_position_map(result, inputs).axes[0]
    np.testing.assert_array_equal(axes.collections[0].get_array(), result.values)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels.count("image (16 patches, row by row)") == 1
    assert len(labels) == len(inputs.token_map["text"]) + 1
    some = [*inputs.token_map["image"].tolist()[3:5], inputs.token_map["last"][0]]
    labels = [
        label.get_text() for label in layer_position_map(result.isel(position=some), inputs).axes[0].get_xticklabels()
    ]
    assert labels[0] == "image (2 of 16 patches, row by row)"


def test_large_images_take_no_more_room_than_text():
    processor = make_processor(image_size=336, patch_size=14)
    model = HookedLLaVA.from_hf(
        make_hf_model(image_size=336, patch_size=14, text={"max_position_embeddings": 1024}), processor
    )
    prompt = model.prepare("What is it?", np.zeros((336, 336, 3), np.uint8))
    result = by_position(prompt)
    axes = layer_position_map(result, prompt).axes[0]
    np.testing.assert_array_equal(axes.collections[0].get_array(), result.values)
    edges = axes.collections[0].get_coordinates()[0, :, 0]
    image = prompt.token_map["image"].tolist()
    assert edges[image[-1] + 1] - edges[image[0]] == pytest.approx(24)
    np.testing.assert_allclose(np.diff(edges)[image[-1] + 1 :], 1.0)


def test_tokens_that_look_like_formulas_are_drawn_as_they_are(inputs):
    result = (
        by_position(inputs).isel(position=[0, 1]).assign_coords(label=("position", ["$x$", "a very long token indeed"]))
    )
    figure = layer_position_map(result)
    figure.to_svg()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [r"\$x\$", "a very long t…"]


def test_position_maps_below_each_other_write_the_tokens_once(inputs):
    parts = {"attn_out": by_position(inputs), "mlp_out": 2 * by_position(inputs)}
    figure = layer_position_maps(parts, inputs)
    limits = [axes.collections[0].get_clim() for axes in figure.axes[:2]]
    assert limits[0] == limits[1]
    shown = [[label.get_visible() and label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes[:2]]
    assert "What" not in shown[0]
    assert "What" in shown[1]
    with pytest.raises(InputError, match="different positions.*layer_position_map"):
        layer_position_maps({"a": parts["attn_out"], "b": parts["mlp_out"].isel(position=[0])}, inputs)


def test_positions_patched_together_stand_under_the_name_of_their_span(inputs):
    image = inputs.token_map["image"]
    coords = {
        "position": [image[0], 18],
        "label": ("position", ["image", "What"]),
        "n_positions": ("position", [16, 1]),
    }
    result = xr.DataArray([[1.0, 2.0]], dims=("layer", "position"), coords=coords)
    axes = layer_position_map(result, inputs).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["image", "What"]
    assert axes.collections[0].get_array().tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(("collapse", "expected"), [("sum", 0.5), ("max", 0.25), ("mean", 1 - 0.5 / 16)])
def test_images_are_collapsed_from_what_does_nothing(inputs, collapse, expected):
    image = inputs.token_map["image"].tolist()
    values = np.ones((1, len(image)))
    values[0, :2] = 0.25, 1.25
    result = xr.DataArray(values, dims=("layer", "position"), coords={"position": image}, attrs={"neutral": 1.0})
    drawn = layer_position_map(result, inputs, collapse=collapse).axes[0].collections[0].get_array()
    assert drawn.tolist() == [[pytest.approx(expected)]]
