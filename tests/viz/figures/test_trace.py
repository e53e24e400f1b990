"""Figures of a causal trace."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

from hooked_llava.analysis.attention_contribution import attention_contribution
from hooked_llava.analysis.causal_trace import by_role, causal_trace
from hooked_llava.analysis.studies.trace import average_traces
from hooked_llava.errors import InputError
from hooked_llava.options.trace_kinds import TRACE_KINDS
from hooked_llava.viz.figures.trace import contribution_maps, role_curves, trace_maps
from hooked_llava.viz.style import ORANGE


@pytest.fixture(scope="module")
def trace(model, inputs) -> xr.Dataset:
    return causal_trace(model, inputs, "the star", corruption="a circle")


def test_a_panel_for_each_kind_with_the_constraint_in_orange(trace):
    figure = trace_maps(trace)
    titles = [axes.get_title(loc="left") for axes in figure.axes[:3]]
    assert titles == [f"{kind.title} restored" for kind in TRACE_KINDS.values()]
    labels = figure.axes[2].get_xticklabels()
    orange = [label.get_text() for label in labels if to_hex(label.get_color()) == ORANGE]
    assert orange == ["the", "star"]
    assert figure.axes[3].get_ylabel() == "probability"


def test_patches_stand_side_by_side_under_one_name(model, inputs):
    whole = causal_trace(model, inputs, "star", corruption="circle", kinds=["mlp"], positions=range(inputs.shape[1]))
    axes = trace_maps(whole, inputs).axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert "image (16 patches, row by row)" in labels
    assert len(labels) == inputs.shape[1] - 15
    np.testing.assert_allclose(axes.collections[0].get_array(), whole.indirect_effect[0])
    assert [label.get_text() for label in axes.get_xticklabels() if to_hex(label.get_color()) == ORANGE] == ["star"]


def test_curves_by_role_with_bands_for_many_questions(trace):
    one = role_curves(by_role(trace))
    assert [axes.get_title(loc="left") for axes in one.axes] == ["MLP output", "attention output", "residual stream"]
    assert not one.axes[0].collections
    lowered = trace.assign(lowered_by=0.5)
    many = role_curves(average_traces([lowered, lowered]))
    drawn = [label.get_text() for label in many.legends[0].get_texts()]
    assert len(many.axes[0].collections) == len(drawn) > 0
    assert "before" not in drawn  # its effect is 0


def test_a_table_has_a_row_of_panels_for_each_kind_that_was_lowered():
    effects = np.arange(3 * 3 * 2 * 4 * 2, dtype=float).reshape(3, 3, 2, 4, 2)  # [kind, statistic, output, layer, role]
    effects[2] = np.nan
    coords = {"kind": ["A", "all", "B"], "statistic": ["mean", "low", "high"], "output": ["mlp", "resid"]}
    coords |= {"layer": [0, 1, 2, 3], "role": ["constraint last", "last"]}
    means = xr.Dataset({"indirect_effect": (("kind", "statistic", "output", "layer", "role"), effects)}, coords)
    figure = role_curves(means)
    panels = np.array(figure.axes).reshape(2, 2)
    assert [axes.get_ylabel() for axes in panels[:, 0]] == ["all", "A"], "nothing of B was lowered"
    assert [axes.get_title(loc="left") for axes in panels[0]] == ["MLP output", "residual stream"]
    for row, kind in zip(panels, ("all", "A"), strict=True):
        for axes, output in zip(row, ("mlp", "resid"), strict=True):
            one = means.indirect_effect.sel(kind=kind, output=output, role="last")
            np.testing.assert_array_equal(axes.lines[-1].get_ydata(), one.sel(statistic="mean"))
            band = axes.collections[-1].get_paths()[0].vertices[:, 1]
            assert {band.min(), band.max()} == {
                float(one.sel(statistic="low").min()),
                float(one.sel(statistic="high").max()),
            }
    assert len(role_curves(means.sel(kind=["A"])).axes) == 2
    with pytest.raises(InputError, match=r"lowered.*corrupt"):
        role_curves(means.sel(kind=["B"]))
    with pytest.raises(InputError, match="output, layer, role.*trace_means"):
        role_curves(means.isel(layer=0))


def test_contributions_of_heads_are_added_up(model, inputs):
    found = attention_contribution(model, inputs, "the star", by_head=True)
    drawn = contribution_maps(found).axes[0].collections[0].get_array()
    np.testing.assert_allclose(drawn, found.constraint_to_last.sum("head"))


def test_other_results_are_refused(trace):
    with pytest.raises(InputError, match="indirect_effect.*layer"):
        role_curves(trace)
    with pytest.raises(InputError, match="trace_maps draws 'indirect_effect'"):
        trace_maps(trace.drop_vars("indirect_effect"))
    with pytest.raises(InputError, match="contribution_maps.*'constraint_to_last'.*attention_contribution"):
        contribution_maps(trace)
