from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.errors import InputError
from hooked_llava.viz import layer_head_map, layer_position_map


def heads(n_layers: int, n_heads: int) -> xr.DataArray:
    values = np.random.default_rng(0).normal(size=(n_layers, n_heads))
    coords = {"layer": range(n_layers), "head": range(n_heads)}
    return xr.DataArray(values, dims=("layer", "head"), coords=coords, name="logit", attrs={"answer": "Red"})


@pytest.mark.parametrize(("n_layers", "n_heads"), [(3, 4), (32, 32)])
def test_layer_head_map_draws_every_value_with_layer_0_on_top(n_layers, n_heads):
    result = heads(n_layers, n_heads)
    axes = layer_head_map(result).axes[0]
    assert np.array_equal(axes.collections[0].get_array(), result.values)
    low, high = axes.collections[0].get_clim()
    assert -low == high == np.abs(result.values).max()
    assert axes.yaxis_inverted()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert axes.get_title(loc="left") == "Direct contribution to the logit of 'Red'"


def test_color_bar_says_the_unit():
    assert layer_head_map(heads(2, 2)).axes[1].get_ylabel() == "logits"


def test_numbers_stand_in_small_maps_only():
    result = heads(3, 4).copy(data=np.full((3, 4), 0.25))
    assert [text.get_text() for text in layer_head_map(result).axes[0].texts] == ["0.25"] * 12
    assert not layer_head_map(heads(32, 32)).axes[0].texts


def test_axes_in_another_order_are_put_in_order():
    result = heads(2, 3)
    drawn = layer_head_map(result.transpose("head", "layer")).axes[0].collections[0].get_array()
    assert np.array_equal(drawn, result.values)


def test_layer_head_map_refuses_further_axes():
    with pytest.raises(InputError, match=r"has the axes image, layer, head; expected layer, head\. Choose or average"):
        layer_head_map(heads(2, 2).expand_dims(image=2))


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
def test_layer_position_map_gives_the_picture_one_column(inputs, collapse, reduce):
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
    assert labels[column] == f"picture ({collapse} of {len(image)})"
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
    with pytest.raises(InputError, match=r"give the inputs that the result was made from"):
        layer_position_map(by_position(inputs), text_inputs)
    with pytest.raises(InputError, match=r"collapse='median'; expected 'mean', 'sum' or 'max'"):
        layer_position_map(by_position(inputs), inputs, collapse="median")


def test_tokens_that_look_like_formulas_are_drawn_as_they_are(inputs):
    result = (
        by_position(inputs).isel(position=[0, 1]).assign_coords(label=("position", ["$x$", "a very long token indeed"]))
    )
    figure = layer_position_map(result)
    figure.to_svg()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [r"\$x\$", "a very long t…"]
