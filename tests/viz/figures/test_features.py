from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.sae import SAEConfig, SparseAutoencoder, feature_attribution, feature_maps
from hooked_llava.steering import steering_sweep
from hooked_llava.viz import dose_response, feature_overlays


@pytest.fixture(scope="module")
def found(model, inputs):
    sae = SparseAutoencoder(SAEConfig(d_in=48, d_sae=96, k=6, hook="hook_embed")).reset(seed=0)
    return feature_attribution(model, sae, inputs, "red", "blue")


def test_a_panel_for_each_feature_on_the_image(inputs, found):
    figure = feature_overlays(inputs, found, features=4)
    maps = feature_maps(inputs, found, 4)
    numbers = maps.sae_feature.values.tolist()
    assert [axes.get_title().split(":")[0] for axes in figure.axes[:4]] == [f"feature {n}" for n in numbers]
    for axes, own in zip(figure.axes, maps, strict=False):
        assert axes.get_title().endswith(f"{float(own.sum()):+.3g}")
        np.testing.assert_allclose(np.asarray(axes.collections[0].get_array()), own.isel(image=0).values)
    chosen = feature_overlays(inputs, found, features=numbers[:1], title="")
    assert chosen.axes[0].get_title().startswith(f"feature {numbers[0]}:")
    assert "logit difference, 'red' minus 'blue'" in figure.get_supxlabel()
    with pytest.raises(InputError, match="feature_overlays.*activation"):
        feature_overlays(inputs, found[["attribution"]])


def test_a_line_for_each_way_of_steering(model, inputs, text_inputs):
    direction = torch.linspace(-3, 3, 48)
    sweep = steering_sweep(
        model, inputs, direction, [2.0, 0.0, 1.0], hook=("resid_post", 1), others=text_inputs, answer="red"
    )
    figure = dose_response(sweep)
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["steered", "random direction"]
    expected = np.exp(sweep.log_probability.sortby("strength"))
    for line, way in zip(lines, expected, strict=True):
        np.testing.assert_allclose(np.asarray(line.get_xdata()), [0.0, 1.0, 2.0])
        np.testing.assert_allclose(np.asarray(line.get_ydata()), way.values)
    assert "KL" in figure.axes[1].get_ylabel()
    assert figure.axes[1].lines[0].get_color() == lines[0].get_color()
    with pytest.raises(InputError, match="dose_response.*log_probability"):
        dose_response(sweep[["said"]])
