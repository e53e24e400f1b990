from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.errors import InputError
from hooked_llava.viz import cell_map, cell_maps, layer_head_map


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
    with pytest.raises(InputError, match="image, layer, head.*layer, head"):
        layer_head_map(heads(2, 2).expand_dims(image=2))


def test_color_bars_show_what_occurs():
    for values, ends in (([[-1.0, 3.0]], (-1, 3)), ([[0.25, 0.5]], (0.25, 0.5)), ([[np.nan, -2.0, -5.0]], (-5, -2))):
        figure = cell_map(xr.DataArray(values, dims=("layer", "head")), "layer", "head")
        assert figure.axes[1].get_ylim() == pytest.approx(ends)
        shown = [label.get_text().replace("\u2212", "-") for label in figure.axes[1].get_yticklabels()]
        assert (float(shown[0]), float(shown[-1])) == pytest.approx(ends)
    same = cell_map(xr.DataArray([[2.5, 2.5]], dims=("layer", "head"), name="x"), "layer", "head").axes[1]
    assert [label.get_text() for label in same.get_yticklabels()] == ["2.5"]
    assert same.get_ylabel() == "x (the same everywhere)"


def test_colors_on_the_bar_are_those_of_the_cells():
    result = xr.DataArray([[-1.0, 3.0, 1.0]], dims=("layer", "head"))
    figure = cell_map(result, "layer", "head")
    mesh, bar = figure.axes[0].collections[0], figure.axes[1].collections[-1]
    for value in (-1.0, 1.0, 3.0):
        np.testing.assert_allclose(bar.cmap(bar.norm(value)), mesh.cmap(mesh.norm(value)), atol=0.02)


def test_chosen_layers_and_heads_keep_their_names():
    result = heads(6, 8).isel(layer=[1, 4], head=[7, 2])
    axes = layer_head_map(result).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "4"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["7", "2"]


def test_key_value_heads_are_called_so():
    assert layer_head_map(heads(2, 3).rename(head="kv_head")).axes[0].get_xlabel() == "key-value head"


def test_any_two_axes_make_a_map():
    result = xr.DataArray([[1.0, np.nan]], dims=("layer", "receiver"), coords={"receiver": ["logits", "L1 mlp"]})
    axes = cell_map(result, "receiver", "layer", title="Paths").axes[0]
    assert axes.collections[0].get_array().shape == (2, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["logits", "L1 mlp"]
    assert axes.get_title(loc="left") == "Paths"
    assert [text.get_text() for text in axes.texts] == ["1.0"]


def test_maps_below_each_other_share_a_scale():
    first, second = heads(2, 3), 4 * heads(2, 3)
    figure = cell_maps({"q": first, "k": second}, "layer", "head")
    limits = [axes.collections[0].get_clim() for axes in figure.axes[:2]]
    assert limits[0] == limits[1] == (-np.abs(second).max(), np.abs(second).max())
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["q", "k"]


def test_numbers_near_what_does_nothing_are_left_out():
    share = xr.DataArray(
        [[1.0, 0.0, 0.99]], dims=("layer", "head"), name="recovered", attrs={"neutral": 1.0, "units": "share recovered"}
    )
    figure = layer_head_map(share)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.0"]
    assert figure.axes[1].get_ylabel() == "share recovered"
