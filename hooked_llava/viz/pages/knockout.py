"""Pages of attention knockout: one question, or a table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np
import xarray as xr

from hooked_llava.analysis.answer_probability import answer_probability
from hooked_llava.analysis.knockout import (
    CLOSED_EDGES,
    OBJECT_EDGES,
    PAPER_EDGES,
    attention_knockout,
    flow_summary,
)
from hooked_llava.analysis.next_tokens import next_tokens
from hooked_llava.datasets.study import as_kinds, by_kind
from hooked_llava.errors import InputError
from hooked_llava.experiments.edges import Edges, edge_change
from hooked_llava.experiments.knockout_runs import Window
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.knockout_metrics import MetricName
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.question import question_text
from hooked_llava.results.provenance import forward_passes
from hooked_llava.viz.figures.knockout import kinds_in_order, knockout_curves, probability_curves, shown_edge
from hooked_llava.viz.kinds import check_dataset, described
from hooked_llava.viz.pages.page import Page, make_page, run_footer, steps_reported
from hooked_llava.viz.pages.parts import answered, prompt_tokens, rounded
from hooked_llava.viz.pages.studies import question_counts, study_footer, study_heading

STEPS = ("answering", "knocking out", "answer by layer", "drawing")
"""The parts of the work, as progress is reported."""


@dataclass(frozen=True, kw_only=True)
class KnockoutPage(Page):
    """Attention knockout as a page; `page.results` hold knockout, summary, answer_probability (and next_tokens).

    Of a table of questions `page.question` says how many there are, and `page.answer` is empty.
    """


def page_edges(inputs: Inputs) -> list[str]:
    """The edges that a page of one prompt shows: the paper's, as far as the prompt has them, and the closed ones.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> page_edges(model.prepare("Who made the star?"))
    ['question->last', 'last->last', 'question|rest->last']
    """
    token_map = inputs.token_map
    known = (*PAPER_EDGES, *(OBJECT_EDGES if "object" in token_map else ()), *CLOSED_EDGES)
    return [e for e in known if ("image" in token_map or not e.startswith("image")) and "question" in token_map]


def knockout_page(
    model: HookedLLaVA,
    inputs: InputsLike,
    edges: Edges | None = None,
    window: Window = None,
    *,
    metric: MetricName = "relative_change",
    factor: SupportsFloat = 0.0,
    max_new_tokens: int = 20,
    on_step: Callable[[str], None] | None = None,
) -> KnockoutPage:
    """Ask, block (or weight) every edge in every window of layers, and put it all on one page.

    Args:
        model: the model, with a tokenizer.
        inputs: one prompt, anything `model.as_inputs` takes; `inputs.with_boxes(object=[box])` adds the object's edges.
        edges: as for `attention_knockout`; by default the paper's and those that leave nothing open.
        window: as for `attention_knockout`.
        metric: likewise, one that needs no further word.
        factor: likewise; 0 blocks the edges.
        max_new_tokens: length of the answer at most.
        on_step: called with the name of each part of the work (`STEPS`) as it begins.

    Raises `InputError` for several prompts, and as `attention_knockout` does, `SpanError` included.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> page = knockout_page(model, model.prepare("Who made the star?"))
    >>> page.answer, page.html.startswith("<!doctype html>")
    ('Clara', True)
    """
    prompt = model.as_inputs(inputs).single("knockout_page")
    shown_edges = page_edges(prompt) if edges is None else edges
    with steps_reported(STEPS, on_step, "knocking out") as begin:
        begin("knocking out")  # first, since it finds whatever does not fit
        knockout = attention_knockout(model, prompt, shown_edges, window, metric=metric, factor=factor, total=True)
        begin("answering")
        answer, _ = answered(model, prompt, max_new_tokens)
        begin("answer by layer")
        results: dict[str, Any] = {"knockout": knockout, "summary": flow_summary(knockout)}
        results["answer_probability"] = answer_probability(model, prompt)
        results["next_tokens"] = next_tokens(model, prompt, k=min(5, model.cfg.d_vocab))
        begin("drawing")
        cost = f"{knockout.runs} runs for {forward_passes(knockout.attrs):.2f} forward passes, {knockout.seconds:.1f} s"
        shown = {
            **_shown(knockout, results["answer_probability"]),
            "kicker": f"How the answer travels through {model.cfg.model_name or 'the model'}",
            "prompt": prompt_tokens(prompt.token_map),
            "images": prompt.images or (),
            "counts": [],
        }
        said = {"question": question_text(prompt), "answer": answer}
        return make_page(KnockoutPage, "knockout", shown, run_footer(model, prompt, cost), results, **said)


def study_page(result: xr.Dataset, *, title: str | None = None, n_boot: int = 1000) -> KnockoutPage:
    """A page of a finished study, averaged by kind of question.

    Args:
        result: what `flow_study` or `knockout_study` gives, or `results.load` read back.
        title: the page's heading; by default how many questions there are.
        n_boot: samples of the bootstrap.

    Raises `InputError` for another result, and for a study without totals.

    >>> from hooked_llava.analysis import flow_study
    >>> from hooked_llava.datasets import StudyRow
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> row = StudyRow(id="1", question="Who made the star?", answer="Clara", kind="fact")
    >>> study_page(flow_study(model, [row], ["question->last"]), n_boot=10).question
    'Information flow over 1 question'
    """
    _check_study(result)
    means = by_kind(result, n_boot=n_boot)
    shown = {
        **_shown(means, means.get("answer_probability")),
        "kicker": f"How answers travel through {result.attrs.get('model') or 'the model'}",
        "prompt": [],
        "images": (),
        "counts": question_counts(result, means),
    }
    cost = f"{result.attrs.get('runs', 0)} runs for {forward_passes(result.attrs):.1f} forward passes"
    heading, footer = title or study_heading(result, "Information flow over"), study_footer(result, means, cost)
    results = {"knockout": means, "summary": flow_summary(means), "answer_probability": means.get("answer_probability")}
    return make_page(KnockoutPage, "knockout", shown, footer, results, question=heading, answer="")


def _check_study(result: xr.Dataset) -> None:
    """Raise `InputError` unless the page can be made from the result."""
    check_dataset(result, ("effect",), "study_page", "flow_study or knockout_study")
    if "question" not in result.dims or "layer" not in result["effect"].dims:
        raise InputError(
            f"study_page shows the effect by question, edge and layer; got {described(result)}. Make it with flow_study or "
            "knockout_study and a window of some layers, not window='all'; of one prompt knockout_page makes a page."
        )
    if "total_effect" not in result:
        raise InputError(
            "The study has no totals (total_effect), which the page's table shows; measure it again with total=True, as "
            "flow_study does."
        )


def _shown(knockout: xr.Dataset, probability: xr.DataArray | None) -> dict[str, Any]:
    """Figures and tables of a knockout, by kind or not."""
    each = as_kinds(knockout)
    kinds, edges = kinds_in_order(each), [str(edge) for edge in each["edge"].values]
    summary = flow_summary(each)
    units = str(knockout["effect"].attrs.get("units", "change of the metric"))
    digits, full = (1, 100.0) if units.startswith("%") else (3, float(abs(each["total_effect"]).max()) or 1.0)
    rows = []
    for edge in edges:
        at = [{"edge": edge, "kind": kind} for kind in kinds]
        rows.append({"edge": shown_edge(edge), "cells": [_cell(each.sel(p), summary.sel(p), digits, full) for p in at]})
    return {
        "curves": knockout_curves(knockout, title=""),
        "probabilities": None if probability is None else probability_curves(probability, title=""),
        "window": knockout.attrs.get("window"),
        "factor": knockout.attrs.get("factor"),
        "changed": edge_change(knockout.attrs.get("factor", 0.0)),
        "units": units,
        "kinds": kinds,
        "rows": rows,
        "has_object": any("object" in edge or "random" in edge for edge in edges),
        "has_itself": "last->last" in edges,
        "has_false": probability is not None and bool(probability.sel(form=["false lower"]).notnull().any()),
        "scored": None if "kind" in knockout.dims else knockout.attrs.get("answer"),
    }


def _cell(knockout: xr.Dataset, summary: xr.Dataset, digits: int, full: float) -> dict[str, str]:
    """Total effect with its interval, and the curve in numbers; `full` is the drop that is colored most."""
    total, kept = knockout["total_effect"], knockout["total_answer_kept"].sel(statistic="mean")
    mean, several = float(total.sel(statistic="mean")), total.sizes["statistic"] > 1
    if not np.isfinite(mean):
        return {"total": "–", "interval": "", "depth": "–", "peak": "", "deep": "0", "kept": ""}
    interval = " to ".join(rounded(total.sel(statistic=end), digits - 1) for end in ("low", "high")) if several else ""
    share = f"same answer {float(kept):.0%}" if several else "same answer" if kept else "another answer"
    depth, peak, width, stages = (float(summary[n]) for n in ("depth", "peak_layer", "half_width", "stages"))
    found = f"layer {peak:.0f}, {width:.0f} wide" + (f", {stages:.0f} stages" if stages > 1 else "")
    return {
        "total": rounded(mean, digits),
        "interval": interval,
        "depth": rounded(depth, digits),
        "peak": found if width else "",
        "kept": share,
        "deep": f"{100 * min(1.0, max(0.0, -mean / full)):.0f}",
    }
