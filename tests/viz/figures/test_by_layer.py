from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis import (
    ablate_heads,
    heads_by_layer,
    information_storage,
    layer_scores,
    nested_sets,
    neuron_scores,
    random_heads,
    top_neurons,
)
from hooked_llava.errors import InputError
from hooked_llava.readout.metrics import probability
from hooked_llava.viz import ablation_curves, contribution_bars, neuron_bars, storage_curves


def test_storage_is_averaged_over_positions(model, inputs):
    stored = information_storage(model, inputs, "red", "blue", positions="image")
    top, below = storage_curves(stored, space="embed").axes
    chosen = stored.sel(space="embed")
    assert np.allclose(top.lines[0].get_ydata(), chosen.logit_difference.mean("position"))
    for line, word in zip(below.lines, ("correct", "distractor"), strict=True):
        assert np.allclose(line.get_ydata(), (1 / chosen["rank"].sel(word=word)).mean("position"))
        assert line.get_label() == f"{stored.attrs[word]!r}, {word}"
    assert below.get_xticklabels()[-1].get_text() == "final"
    assert not top.collections, "one prompt has no interval"


def test_several_prompts_have_bands(model, wide_image):
    two = model.prepare(["What color is the star?", "Who made the star?"], images=[wide_image] * 2)
    stored = information_storage(model, two, "red", "blue", positions="image")
    top, _ = storage_curves(stored).axes
    assert np.allclose(
        top.lines[0].get_ydata(), stored.logit_difference.sel(space="unembed").mean(["prompt", "position"])
    )
    assert len(top.collections) == 1
    with pytest.raises(InputError, match="space='cosine'.*unembed"):
        storage_curves(stored, space="cosine")


def test_sets_by_layer_are_a_curve_over_layers(model, inputs):
    lost = ablate_heads(model, inputs, heads_by_layer(model), replace="zero")
    axes = ablation_curves(lost).axes[0]
    before, curve = axes.lines
    assert np.asarray(before.get_ydata())[0] == pytest.approx(lost.log_probability.values[0, 0])
    assert np.allclose(curve.get_ydata(), lost.log_probability.values[1:, 0])
    assert axes.get_xlabel() == "layer"
    assert axes.get_xticklabels()[0].get_text() == "0"


def test_rankings_are_curves_by_number_of_heads(model, inputs):
    ranking = random_heads(model, 0)
    sets = nested_sets("first", ranking, (4, 1)) | nested_sets("last", ranking[::-1], (1, 4))
    lost = ablate_heads(model, inputs, sets, replace="zero", metric=probability(7))
    figure = ablation_curves(lost, value="metric")
    axes = figure.axes[0]
    by_name = {line.get_label(): line for line in axes.lines[1:]}
    for name in ("first", "last"):
        assert by_name[name].get_xdata().tolist() == [1, 4]
        expected = lost.metric.sel(set=[f"{name} 1", f"{name} 4"]).values[:, 0]
        assert np.allclose(by_name[name].get_ydata(), expected)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("heads taken away", "probability")
    named = ablate_heads(model, inputs, {"mine": [(0, 1)], "yours": [(1, 1)]}, replace="zero")
    assert [t.get_text() for t in ablation_curves(named).axes[0].get_xticklabels()] == ["mine", "yours"]
    with pytest.raises(InputError, match=r"'metric'.*ablate_heads"):
        ablation_curves(named, value="metric")


def test_layer_scores_are_bars_that_end_at_the_log_probability(model, inputs):
    scores = layer_scores(model, inputs)
    axes = contribution_bars(scores).axes[0]
    _, attention, mlp = axes.containers
    assert [bar.get_height() for bar in attention] == pytest.approx(scores.sel(component="attn").values.tolist())
    assert [bar.get_height() for bar in mlp] == pytest.approx(scores.sel(component="mlp").values.tolist())
    line = np.asarray(axes.lines[0].get_ydata())
    assert line[0] == pytest.approx(scores.log_probability_of_embedding)
    assert line[-1] == pytest.approx(scores.log_probability, abs=1e-3)


def test_neurons_are_bars_with_the_words_they_write(model, inputs):
    scores = neuron_scores(model, inputs, top=3, k=2)
    axes = neuron_bars(scores, n=3).axes[0]
    best = top_neurons(scores, 3)
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"L{layer} N{neuron}" for layer, neuron in best]
    for bar, text, (layer, neuron) in zip(axes.containers[0], axes.texts, best, strict=True):
        row = scores.sel(layer=layer)
        rank = row.neuron.values.tolist().index(neuron)
        assert bar.get_width() == pytest.approx(float(row.score[rank]))
        assert text.get_text().count(",") >= 1
    with pytest.raises(InputError, match="neuron_bars.*'neuron'"):
        neuron_bars(xr.Dataset())
    with pytest.raises(InputError, match="k=0"):
        neuron_bars(scores, n=0)
