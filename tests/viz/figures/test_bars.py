from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis import logit_attribution
from hooked_llava.errors import InputError
from hooked_llava.viz import contribution_bars, top_bars


def test_bars_are_the_contributions_and_the_line_ends_at_the_logit(model, inputs):
    parts = logit_attribution(model, inputs, "red")
    axes = contribution_bars(parts).axes[0]
    heights = {}
    for bars, kind in zip(axes.containers, ("embed", "attn", "mlp"), strict=True):
        heights[kind] = [bar.get_height() for bar in bars]
    assert heights["embed"] == pytest.approx([float(parts.sel(component="embed"))])
    for kind in ("attn", "mlp"):
        expected = [float(parts.sel(component=f"{i}_{kind}")) for i in range(model.cfg.n_layers)]
        assert heights[kind] == pytest.approx(expected)
    line = axes.lines[0].get_ydata()
    assert line[0] == pytest.approx(heights["embed"][0])
    assert line[-1] == pytest.approx(parts.attrs["logit"], abs=1e-4)
    assert axes.get_title(loc="left") == "Direct contribution to the logit of 'red'"
    assert axes.get_ylabel() == "logits"


def test_many_layers_fit():
    names = ["embed", *(f"{i}_{kind}" for i in range(32) for kind in ("attn", "mlp"))]
    parts = xr.DataArray(np.ones(65), dims="component", coords={"component": names})
    figure = contribution_bars(parts)
    assert figure.get_size_inches()[0] <= 11
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][:3] == ["embed", "0", "2"]


def test_another_axis_is_refused():
    with pytest.raises(InputError, match="axes layer; expected component"):
        contribution_bars(xr.DataArray([1.0, 2.0], dims="layer"))


def test_the_neurons_that_contribute_most_either_way(model, inputs):
    parts = logit_attribution(model, inputs, "red", by="neuron")
    figure = top_bars(parts, top=5)
    axes = figure.axes[0]
    widths = [bar.get_width() for bar in axes.containers[0]]
    assert widths == sorted(widths, reverse=True)
    assert sorted(map(abs, widths), reverse=True) == pytest.approx(sorted(abs(parts.values.ravel()), reverse=True)[:5])
    layer, neuron = (int(word[1:]) for word in axes.get_yticklabels()[0].get_text().split())
    assert float(parts.sel(layer=layer, neuron=neuron)) == pytest.approx(widths[0])
    assert axes.get_title(loc="left").endswith(f"5 of {parts.size} neurons")
    with pytest.raises(InputError, match="top=0; expected at least 1"):
        top_bars(parts, top=0)


def test_chosen_components_are_drawn_at_their_layers_and_nothing_is_made_up(model, inputs):
    parts = logit_attribution(model, inputs, "red").sel(component=["1_attn", "2_attn", "2_mlp"])
    axes = contribution_bars(parts).axes[0]
    bars = {round(bar.get_x() + bar.get_width() / 2, 1): bar.get_height() for c in axes.containers for bar in c}
    expected = dict(zip([0.8, 1.8, 2.2], parts.values.tolist(), strict=True))
    assert bars == pytest.approx(expected)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
    assert axes.lines[0].get_label() == "sum of these bars so far"
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([float(parts[0]), float(parts.sum())])
