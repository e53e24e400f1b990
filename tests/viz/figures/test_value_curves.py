from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from hooked_llava import Intervention, Replay
from hooked_llava.analysis import attention_knockout
from hooked_llava.errors import InputError
from hooked_llava.viz import value_curves


def test_an_edge_by_its_factor(model, inputs):
    factors, edges = [1.0, 0.01, 0.0], ["image->last", "question->last"]
    effects = [attention_knockout(model, inputs, edges, "all", factor=factor).effect for factor in factors]
    together = xr.concat(effects, pd.Index(factors, name="factor"), combine_attrs="drop_conflicts")
    axes = value_curves(together, "factor").axes[0]
    assert [line.get_label() for line in axes.lines] == ["image → last", "question → last"]
    for line, edge in zip(axes.lines, edges, strict=True):
        assert np.asarray(line.get_xdata()).tolist() == [0.0, 0.01, 1.0]
        np.testing.assert_allclose(np.asarray(line.get_ydata()), [float(e.sel(edge=edge)) for e in effects[::-1]])
    assert axes.get_xscale() == "symlog"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "0.01", "1"]
    assert "%" in axes.get_ylabel()


def test_heads_by_their_temperature(model, inputs):
    temperatures = [0.5, 1.0, 2.0]
    runs = [
        [Intervention(("attn_scores", layer), temperature=one) for layer in range(model.cfg.n_layers)]
        for one in temperatures
    ]
    p = Replay(model, inputs).run(runs).softmax(-1)[:, 7].numpy()
    axes = value_curves(xr.DataArray(p, {"temperature": temperatures}, name="probability"), "temperature").axes[0]
    (line,) = axes.lines
    np.testing.assert_allclose(np.asarray(line.get_ydata()), p)
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("linear", "temperature", "probability")
    by_layer = xr.DataArray([p, p + 1], {"layer": [4, 5], "temperature": temperatures})
    assert [line.get_label() for line in value_curves(by_layer, "temperature").axes[0].lines] == ["4", "5"]


def test_intervals_are_bands(model):
    values = np.array([[0.5, 0.4, 0.6], [0.2, 0.1, 0.4]])
    held = xr.DataArray(
        values[None],
        {"way": ["one"], "n_edits": [1, 50], "statistic": ["mean", "low", "high"]},
        ("way", "n_edits", "statistic"),
    )
    axes = value_curves(held, "n_edits").axes[0]
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == [0.5, 0.2]
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert (band[:, 1].min(), band[:, 1].max()) == (0.1, 0.6)
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "n edits"


def test_what_does_not_fit_is_refused():
    two = xr.DataArray(np.zeros((2, 2, 2)), {"factor": [0.0, 1.0]}, ("factor", "edge", "layer"))
    for values, along, match in (
        (two, "factor", "edge, layer"),
        (two[:, 0, 0], "temperature", "temperature"),
        (xr.DataArray([1.0], {"edge": ["a"]}, ("edge",)), "edge", r"'edge'.*\['a'\]"),
        (xr.DataArray([1.0], {"factor": [-1.0]}, ("factor",)), "factor", r"'factor'.*-1\.0.*0"),
        (xr.Dataset(), "factor", "value_curves"),
    ):
        with pytest.raises(InputError, match=match):
            value_curves(values, along)  # type: ignore[arg-type]
