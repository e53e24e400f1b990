"""Cases of figures and pages."""

# Cases pass what does not fit too, and know which of several types they get.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks._baseline_cases import Made, on, once
from benchmarks._baseline_editing import request
from benchmarks._baseline_names import Answer, color_scale, edit_sweep, flow_study, gqa_rows, logit_difference
from benchmarks._baseline_subjects import SOME, Subject, subject, with_boxes
from hooked_llava import analysis, viz
from hooked_llava.datasets import by_kind
from hooked_llava.editing import Probe, multedit

_QUICK = ["grouped-float64"]
_PAGES = ["seed1-float64", "seed1-float32", "direct-float64", "grouped-float64"]


@on(SOME, quick=_QUICK)
def figures_of_reading(s: Subject) -> Made:
    model, one = s.model, s.one
    lens = analysis.logit_lens(model, one, answers=list(s.answers))
    rows = analysis.logit_lens(model, one, positions="question", k=2)
    heads = analysis.head_scores(model, one)
    parts = {
        by: analysis.logit_attribution(model, one, by=by) for by in ("component", "layer", "head", "source", "patch")
    }
    attention = analysis.image_attention(model, one)
    return {
        "lens": lambda: viz.lens_table(lens),
        "lens of several": lambda: viz.lens_table(rows, title="Several"),
        "curve": lambda: viz.answer_curve(lens),
        "heads": lambda: viz.layer_head_map(heads),
        "top": lambda: viz.top_bars(analysis.logit_attribution(model, one, by="neuron"), top=5),
        "bars": lambda: viz.contribution_bars(parts["component"]),
        "probabilities": lambda: viz.probability_curves(analysis.answer_probability(model, one)),
        "overlays": lambda: viz.patch_overlays(one, attention.isel(layer=1, image=0)),
        **{f"by {by}": lambda part=part: viz.plot_contributions(part, one) for by, part in parts.items()},
    }


@on(SOME, quick=_QUICK)
def figures_of_images(s: Subject) -> Made:
    importance = analysis.patch_importance(s.model, s.one)
    processor = getattr(s.model.processor, "image_processor", None)
    return {
        "overlay": lambda: viz.patch_overlay(s.one, importance),
        "signed": lambda: viz.patch_overlay(s.images[0], np.linspace(-1, 2, 12).reshape(3, 4)),
        "view": lambda: viz.as_the_model_sees_it(s.one, processor),
        "pixels": lambda: viz.model_view(s.one, processor)[::5, ::5],
    }


@on(SOME, quick=_QUICK)
def figures_of_patching(s: Subject) -> Made:
    model, pair = s.model, (s.one, s.other)
    metric = logit_difference(*(Answer.of(model, answer) for answer in s.answers))
    mlp = analysis.activation_patching(model, *pair, positions="question", metric=metric)
    heads = analysis.activation_patching(model, *pair, hook="z", positions="last", metric=metric)
    image = analysis.activation_patching(model, *pair, layers=[0], positions="image", metric=metric)
    estimate = analysis.attribution_patching(model, *pair, metric=metric)
    return {
        "positions": lambda: viz.plot_patching(mlp, s.one),
        "heads": lambda: viz.plot_patching(heads),
        "image": lambda: viz.plot_patching(image, s.one, unfold=True),
        "by patch": lambda: viz.by_patch(image, s.one),
        "estimates": lambda: viz.plot_patching(estimate, s.one, share=False),
        "edges": lambda: viz.edge_map(analysis.edge_attribution(model, *pair, metric=metric)),
        "cells": lambda: viz.cell_map(heads.isel(position=0) if "position" in heads.dims else heads, "layer", "head"),
        "collapsed": lambda: viz.layer_position_map(estimate["resid_pre"], s.one, collapse="sum"),
        "together": lambda: viz.layer_position_maps({n: estimate[n] for n in ("attn_out", "mlp_out")}, s.one),
    }


@on(SOME, quick=_QUICK)
def figures_of_flow(s: Subject) -> Made:
    flow = analysis.attention_knockout(s.model, with_boxes(s.one), ["image->last", "question->last", "object->last"], 1)
    trace = analysis.causal_trace(s.model, s.one, s.constraint, corruption=s.instead)
    return {
        "knockout": lambda: viz.knockout_curves(flow),
        "chosen": lambda: viz.knockout_curves(flow, edges=["image->last"], title="One"),
        "trace": lambda: viz.trace_maps(trace, s.one),
        "direct": lambda: viz.trace_maps(trace, value="restored"),
        "roles": lambda: viz.role_curves(analysis.by_role(trace)),
        "contributions": lambda: viz.contribution_maps(analysis.attention_contribution(s.model, s.one, s.constraint)),
    }


@once(quick=True)
def scales() -> Made:
    values = {"signed": [-1.0, 3.0], "positive": [0.25, 0.5], "nothing": [0.0], "unknown": [np.nan, 1.0]}
    made = {name: color_scale(np.array(v)) for name, v in values.items()}
    return {name: [repr(scale), np.array([scale.rgba(x) for x in (0.0, 0.3, 1.0)])] for name, scale in made.items()}


# ---------------------------------------------------------------------- pages


@on(_PAGES)
def report(s: Subject) -> Made:
    return {
        "image": lambda: viz.explain(s.model, s.one, max_new_tokens=2),
        "text": lambda: viz.explain(s.model, s.text, answer=s.answers[0], baseline=s.answers[1], max_new_tokens=1, k=3),
        "gradient": lambda: viz.explain(s.model, s.one, patches="grad_x_input", occlusion=False, max_new_tokens=1),
    }


@on(_PAGES)
def patching_report(s: Subject) -> Made:
    followed: dict[str, Any] = {"answer": s.answers[0], "baseline": s.answers[1], "max_new_tokens": 1}
    return {
        "denoise": lambda: viz.patching_report(s.model, s.one, s.other, **followed, max_runs=200),
        "noise": lambda: viz.patching_report(s.model, s.one, s.other, **followed, direction="noise", max_runs=0),
    }


@on(_PAGES)
def trace_page(s: Subject) -> Made:
    return {
        "image": lambda: viz.trace_page(s.model, s.one, s.constraint, corruption=s.instead, max_new_tokens=2),
        "text": lambda: viz.trace_page(s.model, s.text, [4], window=2, max_new_tokens=1),
    }


@on(_PAGES)
def knockout_page(s: Subject) -> Made:
    return {
        "default": lambda: viz.knockout_page(s.model, with_boxes(s.one), max_new_tokens=2),
        "text": lambda: viz.knockout_page(
            s.model, s.text, ["question->last"], 1, metric="probability", max_new_tokens=1
        ),
    }


@on(["seed1-float64", "seed1-float32"])
def study_page(s: Subject) -> Made:
    flow = flow_study(s.model, gqa_rows(2, kinds=["ChooseAttr", "QueryAttr"]), progress=False)
    return {
        "page": lambda: viz.study_page(flow, title="Two kinds", n_boot=50),
        "curves": lambda: viz.knockout_curves(by_kind(flow, n_boot=50)),
    }


@on([*_PAGES[:2], "grouped-float64", "grouped-float32"])
def edit_page(s: Subject) -> Made:
    model, asked = s.model, request(s)
    edit = multedit(model, asked, layer=s.model.cfg.n_layers - 2, position="last")
    probes = [Probe("other", "specificity", s.other), Probe("words", "generalisation", s.text, s.answers[1])]
    trace = analysis.causal_trace(model, s.one, s.constraint, corruption=s.instead, kinds=("mlp",))
    sweep = edit_sweep(model, asked, probes, positions=["last"], trace=trace)
    page = viz.edit_page(model, s.one, edit, probes=probes, sweep=sweep, max_new_tokens=2)
    return {
        "page": page,
        "alone": lambda: viz.edit_page(model, s.one, edit, max_new_tokens=1),
        "sweep": sweep,
        "layers": lambda: viz.edit_by_layer(sweep),
        "shift": lambda: viz.answer_shift(page.results["answers"]),
        "bars": lambda: viz.probe_bars(page.results["probes"]),
    }


@once(quick=True, dtype="float32")
def unsuited() -> Made:
    """What is said of results that a figure cannot draw."""
    s = subject("grouped-float32")
    heads = analysis.head_scores(s.model, s.one)
    return {
        "lens": lambda: viz.lens_table(heads),
        "bars": lambda: viz.contribution_bars(heads),
        "knockout": lambda: viz.knockout_curves(heads),
        "trace": lambda: viz.trace_maps(heads),
        "overlay": lambda: viz.patch_overlay(s.one, np.ones((3, 3))),
    }
