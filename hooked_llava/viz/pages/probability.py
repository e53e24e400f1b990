"""Pages of the answer's probability by layer: one question, or a table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from hooked_llava.analysis.answer_probability import (
    FORMS,
    answer_probability,
    probability_summary,
    with_released_norm,
)
from hooked_llava.analysis.next_tokens import next_tokens
from hooked_llava.datasets.study import as_kinds, by_kind
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.question import question_text
from hooked_llava.results.provenance import forward_passes
from hooked_llava.viz.figures.knockout import kinds_in_order, probability_curves
from hooked_llava.viz.kinds import check_dataset, described
from hooked_llava.viz.pages.page import Page, make_page, run_footer, steps_reported
from hooked_llava.viz.pages.parts import answered, prompt_tokens
from hooked_llava.viz.pages.studies import question_counts, study_footer, study_heading

STEPS = ("answering", "answer by layer", "drawing")
"""The parts of the work, as progress is reported."""


@dataclass(frozen=True, kw_only=True)
class ProbabilityPage(Page):
    """The answer's probability by layer as a page; `page.results` hold answer_probability, summary (and next_tokens).

    Of a table of questions `page.question` says how many there are, and `page.answer` is empty.
    """


def probability_page(
    model: HookedLLaVA,
    inputs: InputsLike,
    answer: str | None = None,
    false_option: str | None = None,
    *,
    max_new_tokens: int = 20,
    on_step: Callable[[str], None] | None = None,
) -> ProbabilityPage:
    """Ask, follow the answer through the layers, and put it on one page.

    Args:
        model: the model, with a tokenizer.
        inputs: one prompt, anything `model.as_inputs` takes.
        answer: as for `answer_probability`; by default the model's own.
        false_option: likewise, a second word to follow.
        max_new_tokens: length of the answer at most.
        on_step: called with the name of each part of the work (`STEPS`) as it begins.

    Raises `InputError` for several prompts, and as `answer_probability` does.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> page = probability_page(model, model.prepare("Who made the star?"))
    >>> page.answer, page.html.startswith("<!doctype html>")
    ('Clara', True)
    """
    prompt = model.as_inputs(inputs).single("probability_page")
    with steps_reported(STEPS, on_step, "following the answer") as begin:
        begin("answer by layer")  # first, since it finds whatever does not fit
        probability = answer_probability(model, prompt, answer, false_option)
        begin("answering")
        said, _ = answered(model, prompt, max_new_tokens)
        begin("drawing")
        shown = {
            **_shown(probability),
            "kicker": f"When the answer appears in {model.cfg.model_name or 'the model'}",
            "prompt": prompt_tokens(prompt.token_map),
            "images": prompt.images or (),
            "counts": [],
        }
        results = {"answer_probability": probability, "summary": probability_summary(probability)}
        results["next_tokens"] = next_tokens(model, prompt, k=min(5, model.cfg.d_vocab))
        cost = f"{forward_passes(probability.attrs):.0f} forward pass, {probability.seconds:.1f} s"
        words = {"question": question_text(prompt), "answer": said}
        return make_page(ProbabilityPage, "probability", shown, run_footer(model, prompt, cost), results, **words)


def probability_study_page(result: xr.Dataset, *, title: str | None = None, n_boot: int = 1000) -> ProbabilityPage:
    """A page of a finished study, averaged by kind of question.

    Args:
        result: what `probability_study` or `flow_study` gives, or `results.load` read back.
        title: the page's heading; by default how many questions there are.
        n_boot: samples of the bootstrap.

    Raises `InputError` for another result.

    >>> from hooked_llava.analysis import probability_study
    >>> from hooked_llava.datasets import StudyRow
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> row = StudyRow(id="1", question="Who made the star?", answer="Clara", kind="fact")
    >>> probability_study_page(probability_study(model, [row]), n_boot=10).question
    'The answer by layer, over 1 question'
    """
    check_dataset(result, ("answer_probability",), "probability_study_page", "probability_study or flow_study")
    if "question" not in result.dims or "form" not in result["answer_probability"].dims:
        raise InputError(
            f"probability_study_page shows answer_probability by question, layer and form; got {described(result)}. Make it "
            "with probability_study or flow_study; of one prompt probability_page makes a page."
        )
    means = by_kind(result[["answer_probability"]].assign_attrs(result.attrs), n_boot=n_boot)
    probability = means["answer_probability"]
    shown = {
        **_shown(probability),
        "kicker": f"When answers appear in {result.attrs.get('model') or 'the model'}",
        "prompt": [],
        "images": (),
        "counts": question_counts(result, means),
    }
    heading = title or study_heading(result, "The answer by layer, over")
    footer = study_footer(result, means, f"{forward_passes(result.attrs):.1f} forward passes")
    results = {"answer_probability": probability, "summary": probability_summary(probability)}
    return make_page(ProbabilityPage, "probability", shown, footer, results, question=heading, answer="")


def _shown(probability: xr.DataArray) -> dict[str, Any]:
    """Figures and table of the curves, by kind or not."""
    each = as_kinds(probability)
    kinds, summary = kinds_in_order(each), probability_summary(each)
    forms = [form for form in FORMS if bool(summary["peak"].sel(form=form).notnull().any())]
    readings = with_released_norm(probability)
    rows = []
    for kind in kinds:
        own = summary.sel(kind=kind, norm="none")
        cells = [_cell(own.sel(form=form)) for form in forms]
        rows.append({"kind": kind, "cells": cells, "overtakes": _layer(own["overtakes"])})
    return {
        **{f"norm_{norm}": probability_curves(readings, norm=norm, title="") for norm in ("none", "final", "released")},
        "forms": forms,
        "rows": rows,
        "has_false": any(form.startswith("false") for form in forms),
    }


def _cell(summary: xr.Dataset) -> dict[str, str]:
    """One variant of the answer: how probable it becomes, where, and where half of that is reached."""
    if not np.isfinite(float(summary["peak"])):
        return {"peak": "–", "at": "", "half": ""}
    peak, at, half = (summary[name] for name in ("peak", "peak_layer", "half_layer"))
    return {"peak": f"{float(peak):.3f}", "at": _layer(at), "half": _layer(half)}


def _layer(layer: xr.DataArray) -> str:
    return "–" if not np.isfinite(float(layer)) else f"{float(layer):.0f}"
