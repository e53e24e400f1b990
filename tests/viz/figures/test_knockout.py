from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.errors import InputError
from hooked_llava.results.arrays import resid_coords
from hooked_llava.viz import answer_curve, lens_table, role_curves, trace_maps
from hooked_llava.viz.figures.knockout import knockout_curves, probability_curves, shown_edge
from tests.pairs import as_users_run

EDGES = [
    "image->last",
    "image->question|rest",
    "question->last",
    "last->last",
    "rest->last",
    "object->question",
    "a->b",
]


def by_kind_result(kinds: list[str]) -> xr.Dataset:
    values = -np.random.default_rng(0).uniform(0, 90, (len(kinds), 3, len(EDGES), 5))
    values.sort(axis=1)
    values = values[:, [1, 0, 2]]
    coords = {"kind": kinds, "statistic": ["mean", "low", "high"], "edge": EDGES, "layer": range(5)}
    effect = xr.DataArray(values, coords, ("kind", "statistic", "edge", "layer"), attrs={"units": "% of it"})
    return xr.Dataset({"effect": effect}, attrs={"window": 3})


def test_a_panel_for_each_kind_and_a_line_for_each_edge():
    result = by_kind_result(["p", "q", "r", "s"])
    figure = knockout_curves(result, title="Flow")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["p", "q", "r", "s"]
    for axes, kind in zip(figure.axes, "pqrs", strict=True):
        lines = axes.lines[1:]  # the first is the line at 0
        assert [line.get_label() for line in lines] == [shown_edge(edge) for edge in EDGES]
        for line, edge in zip(lines, EDGES, strict=True):
            mean, low, high = result.effect.sel(kind=kind, edge=edge).values
            np.testing.assert_array_equal(line.get_ydata(), mean)
            band = axes.collections[EDGES.index(edge)].get_paths()[0].get_extents()
            assert (band.y0, band.y1) == pytest.approx((low.min(), high.max()))
        assert axes.get_xlabel() == "layer (middle of 3)"
    styles = {(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in figure.axes[0].lines[1:]}
    assert len(styles) == len(EDGES)
    assert len(figure.legends) == 1
    assert figure.get_supylabel() == "change, % of it"
    assert figure.get_suptitle() == "Flow"
    assert b"PNG" in figure._repr_png_()[:8]


def test_a_factor_is_written_below():
    effect = xr.DataArray([[0.0, -5.0]], coords={"edge": ["image->last"]}, dims=("edge", "layer"))
    about = {"analysis": "attention_knockout", "window": 3, "factor": 0.5}
    figure = knockout_curves(effect.to_dataset(name="effect").assign_attrs(about))
    assert "windows of 3 layers · edges weighted by 0.5" in [text.get_text() for text in figure.texts]


def test_one_prompt_is_one_panel_on_an_axis_where_little_looks_little():
    effect = xr.DataArray(
        [[0.0, -0.2]], coords={"edge": ["image->last"]}, dims=("edge", "layer"), attrs={"units": "% p"}
    )
    figure = knockout_curves(effect.to_dataset(name="effect"))
    assert figure.axes[0].get_ylim()[0] == -10
    assert len(figure.legends) == 1
    assert figure.axes[0].get_ylabel() == "change, % p"
    logits = knockout_curves(effect.assign_attrs(units="logits").to_dataset(name="effect"))
    assert logits.axes[0].get_ylim()[0] > -1


def test_edges_can_be_chosen():
    figure = knockout_curves(by_kind_result(["p"]), edges=["a->b"])
    assert [line.get_label() for line in figure.axes[0].lines[1:]] == ["a → b"]


def test_probabilities_by_form():
    values = np.random.default_rng(0).uniform(size=(2, 4, 4))
    values[:, :, 3] = np.nan
    forms = ["lower", "capitalised", "false lower", "false capitalised"]
    result = xr.DataArray(
        values,
        coords={"norm": ["none", "final"], "form": forms, **resid_coords(3, "resid")},
        dims=("norm", "resid", "form"),
        name="p",
    )
    for norm in ("none", "final"):
        axes = probability_curves(result, norm=norm).axes[0]
        assert [line.get_label() for line in axes.lines] == forms[:3]
        np.testing.assert_array_equal(axes.lines[2].get_ydata(), result.sel(norm=norm, form="false lower"))
        assert axes.get_xticklabels()[-1].get_text() == "final"
    assert axes.lines[0].get_color() == axes.lines[2].get_color() != axes.lines[1].get_color()
    assert axes.lines[0].get_linestyle() != axes.lines[2].get_linestyle()


def test_what_does_not_fit_is_said():
    result = by_kind_result(["p"])
    with pytest.raises(InputError, match=r"knockout_curves.*'effect'.*\[kind.*edge, layer\]"):
        knockout_curves(result.rename(effect="other"))
    with pytest.raises(InputError, match=r"result.isel\(prompt=0\).*by_kind"):
        knockout_curves(result.expand_dims("prompt"))
    with pytest.raises(InputError, match="expected norm, layer, form"):
        probability_curves(xr.DataArray(np.zeros((2, 2)), dims=("norm", "layer")))


def test_chosen_streams_keep_their_names():
    result = xr.DataArray(
        np.arange(5.0)[None, :, None] / 5,
        coords={"norm": ["none"], "form": ["lower"], **resid_coords(4)},
        dims=("norm", "layer", "form"),
        name="p",
    )
    axes = probability_curves(result.isel(layer=[1, 3])).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "3"]
    assert axes.lines[0].get_xdata().tolist() == [1, 3]
    assert probability_curves(result.isel(layer=[2, 4])).axes[0].get_xticklabels()[-1].get_text() == "final"


def curves_of(**values: list[float]) -> xr.Dataset:
    edges = [name.replace("_", "->") for name in values]
    effect = xr.DataArray(list(values.values()), coords={"edge": edges}, dims=("edge", "layer"), attrs={"units": "% p"})
    return xr.Dataset({"effect": effect})


def test_curves_that_coincide_are_told_apart():
    result = curves_of(a_b=[0, -50, -90.0], c_b=[0, -50, -90.0], d_b=[0, -50, -90.01], e_b=[0, -50, 0], f_b=[0, -5, -7])
    lines = knockout_curves(result).axes[0].lines[1:]
    assert [line.get_label().replace("\n", " ") for line in lines] == ["a → b = c → b ≈ d → b", "e → b", "f → b"]
    assert lines[0].get_linewidth() > lines[1].get_linewidth(), "the covered one stands out below the other"
    assert len({line.get_marker() for line in lines}) == 3
    panels = xr.concat(
        [result, curves_of(a_b=[0, 0, 0], c_b=[0, -9, 0], d_b=[0, 0, 0], e_b=[0, 0, 0], f_b=[0, 0, 0])], "kind"
    )
    lines = knockout_curves(panels.assign_coords(kind=["p", "q"])).axes[0].lines[1:]
    assert [line.get_label().replace("\n", " ") for line in lines][:2] == ["a → b ≈ d → b", "c → b"], (
        "in one panel they differ"
    )


@pytest.mark.parametrize(
    "draw", [knockout_curves, probability_curves, lens_table, answer_curve, role_curves, trace_maps]
)
def test_results_of_another_kind_are_refused_by_name(draw):
    for result in (xr.DataArray([1.0], dims="x", name="y"), xr.Dataset({"y": ("x", [1.0])}), {"y": 1}):
        with as_users_run(), pytest.raises(InputError, match=rf"{draw.__name__}|expected norm, layer, form"):
            draw(result)
    made = xr.Dataset({"y": ("x", [1.0])}, attrs={"analysis": "attribution_patching"})
    with as_users_run(), pytest.raises(InputError, match=r"viz\.plot_patching"):
        draw(made)
