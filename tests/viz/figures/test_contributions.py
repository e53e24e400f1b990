"""Each way to divide a logit has its figure."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_llava.analysis import logit_attribution
from hooked_llava.errors import InputError
from hooked_llava.viz import plot_contributions, plot_patching


def drawn(figure, panel: int = 0) -> np.ndarray:
    return np.asarray(figure.axes[panel].collections[0].get_array())


def title(figure) -> str:
    return figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize("by", ["component", "layer", "head", "neuron", "source", "patch"])
def test_plot_patching_draws_it_too(model, inputs, by):
    parts = logit_attribution(model, inputs, "red", by=by)
    figure = plot_patching(parts, inputs)
    heading = figure.get_suptitle() or title(figure)
    assert heading.startswith("Direct contribution to the logit of 'red'")


def test_sources_are_summed_over_heads_and_images(model, inputs):
    parts = logit_attribution(model, inputs, "red", by="source")
    by_layer = parts.sum("head")
    np.testing.assert_allclose(drawn(plot_contributions(parts)), by_layer, atol=1e-6)
    figure = plot_contributions(parts, inputs)
    image = inputs.token_map["image"].tolist()
    np.testing.assert_allclose(drawn(figure)[:, image[0]], by_layer.sel(source=image).sum("source"), atol=1e-6)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[image[0]] == "image (sum of 16)"
    assert labels[image[0] + 1] == "What"


def test_patches_lie_on_the_image_layer_by_layer(model, inputs):
    parts = logit_attribution(model, inputs, "red", by="patch")
    figure = plot_contributions(parts, inputs)
    np.testing.assert_allclose(drawn(figure, 1), parts.sum("head")[1], atol=1e-6)
    with pytest.raises(InputError, match="by patch.*image.*inputs"):
        plot_contributions(parts)


def test_layers_are_a_row_and_heads_are_cells(model, inputs):
    layers, heads = (logit_attribution(model, inputs, "red", by=by) for by in ("layer", "head"))
    np.testing.assert_allclose(drawn(plot_contributions(layers)), layers.values[None])
    np.testing.assert_allclose(drawn(plot_contributions(heads, title="Mine")), heads)
    assert title(plot_contributions(heads, title="Mine")) == "Mine"


def test_several_prompts_are_refused(model, inputs):
    both = model.prepare(["Is it red?", "Is it blue?"])
    with pytest.raises(InputError, match=r"axes .*; expected .*result\.mean\("):
        plot_contributions(logit_attribution(model, both, "red", by="neuron"))
