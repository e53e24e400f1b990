"""Titles and notes tell what the attributes say."""

from __future__ import annotations

import pytest
import xarray as xr

from hooked_llava.analysis import (
    activation_patching,
    answer_probability,
    attention_knockout,
    attribution_patching,
    causal_trace,
    edge_attribution,
    head_scores,
    image_attention,
    logit_attribution,
    logit_lens,
    patch_importance,
)
from hooked_llava.analysis.causal_trace import by_role
from hooked_llava.readout.metrics import logit_difference
from hooked_llava.results.arrays import load, save
from hooked_llava.viz import (
    answer_curve,
    knockout_curves,
    layer_head_map,
    lens_table,
    patch_overlay,
    patch_overlays,
    plot_patching,
    probability_curves,
    role_curves,
    trace_maps,
)
from hooked_llava.viz.titles import note_of, shown_title, title_of

QUESTION = "What color is the star?"


@pytest.fixture(scope="module")
def other(model, wide_image):
    return model.prepare(QUESTION, wide_image[::-1])


@pytest.fixture(scope="module")
def metric(model):
    return logit_difference(*(model.to_single_token(word) for word in ("red", "blue")))


def note(figure) -> str:
    """The line below a figure, as one line."""
    return " ".join(figure.get_supxlabel().split())


def test_a_patching_figure_says_metric_prompts_positions_and_model(model, inputs, other, metric, tmp_path):
    made = activation_patching(model, inputs, other, hook="z", positions="last", metric=metric, direction="noise")
    save(made, tmp_path / "result")
    for result in (made, load(tmp_path / "result")):
        figure = plot_patching(result, inputs)
        assert figure.axes[0].get_title(loc="left") == "z, corrupted into the clean run"
        said = note(figure)
        for part in ("logit difference, 'red' minus 'blue'", QUESTION, "about two images", "positions last", "llava"):
            assert part in said
    assert not note(plot_patching(made, inputs, title=""))
    assert note(plot_patching(made, inputs, title="Mine")) == note(plot_patching(made, inputs))


def test_a_figure_saved_tight_keeps_its_note(model, inputs, other, metric):
    figure = plot_patching(activation_patching(model, inputs, other, hook="z", positions="last", metric=metric))
    figure.draw_without_rendering()
    kept = figure.get_tightbbox()
    below = figure._supxlabel.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    assert kept.y0 <= below.y0 + 1e-6
    assert below.y1 < figure.axes[0].get_tightbbox().y0 / figure.dpi
    assert plot_patching(attribution_patching(model, inputs, other, metric=metric), title="").get_tightbbox().height > 0


def test_both_prompts_of_a_pair_are_said(model, metric):
    pair = [model.prepare(f"What color is the {shape}?") for shape in ("star", "circle")]
    said = note(plot_patching(attribution_patching(model, *pair, metric=metric)))
    assert "star" in said.split("against")[0]
    assert "circle" in said.split("against")[1]
    edges = plot_patching(edge_attribution(model, *pair, metric=metric))
    assert edges.axes[0].get_title(loc="left") == "Edges, clean into the corrupted run"
    assert "against" in note(edges)


def test_every_figure_of_one_prompt_names_it(model, inputs):
    trace = causal_trace(model, inputs, "star", corruption="circle", window=2)
    lens = logit_lens(model, inputs, answers=["red"], norm="none")
    figures = {
        "lens": lens_table(lens),
        "curve": answer_curve(lens),
        "knockout": knockout_curves(attention_knockout(model, inputs, ["image->last"], 3, answer="red")),
        "probability": probability_curves(answer_probability(model, inputs, "red")),
        "trace": trace_maps(trace, inputs),
        "roles": role_curves(by_role(trace)),
        "heads": layer_head_map(head_scores(model, inputs, "red")),
        "patches": patch_overlay(inputs, patch_importance(model, inputs, "red", method="occlusion", window=2)),
        "attention": patch_overlays(inputs, image_attention(model, inputs).isel(image=0).mean("head", keep_attrs=True)),
        "bars": plot_patching(logit_attribution(model, inputs, "red")),
    }
    for name, figure in figures.items():
        assert QUESTION in note(figure), name
        figure.to_svg()
    assert "windows of 3 layers" in note(figures["knockout"])
    assert "windows of 2 layers" in note(figures["trace"])
    assert "layers" not in note(figures["patches"]), "its window is of patches"
    assert "replaced by 'circle'" in note(figures["roles"])
    assert figures["knockout"].get_suptitle() == "Attention knockout"
    assert figures["probability"].get_suptitle() == "Answer probability"
    assert "without the final norm" in figures["lens"].axes[0].get_title(loc="left")
    assert figures["heads"].axes[0].get_title(loc="left") == "Head score for 'red'"


def test_edges_that_are_given_a_weight_are_not_called_blocked(model, inputs, tmp_path):
    save(attention_knockout(model, inputs, ["image->last"], 3, factor=0.3), tmp_path / "result")
    result = load(tmp_path / "result")
    assert isinstance(result, xr.Dataset)
    figure = knockout_curves(result)
    assert figure.get_suptitle() == "Attention weighted by 0.3"
    assert "edges weighted by 0.3" in note(figure)
    assert "weighted" not in note(knockout_curves(attention_knockout(model, inputs, ["image->last"], 3)))


def test_what_says_nothing_gets_no_note():
    bare = xr.DataArray([[1.0]], dims=("layer", "head"), name="score")
    assert not note(layer_head_map(bare))
    assert (title_of(bare), shown_title(bare, None), shown_title(bare, "x")) == ("Score", "", "x")


def test_many_prompts_are_counted_and_long_ones_cut():
    assert note_of({"prompt": ["a", "b", "c"], "answer": ["x", "y", "z"]}) == "3 prompts"
    assert len(note_of({"prompt": "word " * 100})) < 70
