"""A page of what a model says to questions whether an object is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from hooked_llava.datasets.pope import pope_scores
from hooked_llava.results.provenance import forward_passes
from hooked_llava.viz.figures.knockout import kinds_in_order
from hooked_llava.viz.figures.pope import POPE_LABELS, POPE_SCORES, pope_bars
from hooked_llava.viz.kinds import check_dataset
from hooked_llava.viz.pages.page import Page, make_page
from hooked_llava.viz.pages.parts import rounded
from hooked_llava.viz.pages.studies import question_counts, study_footer, study_heading


@dataclass(frozen=True, kw_only=True)
class PopePage(Page):
    """POPE's scores as a page; `page.results` hold scores.

    `page.question` says how many questions there are, and `page.answer` is empty.
    """


def pope_page(result: xr.Dataset, *, title: str | None = None, n_boot: int = 1000) -> PopePage:
    """A page of a finished study of questions whether an object is there.

    Args:
        result: what `pope_study` gives, or `results.load` read back.
        title: the page's heading; by default how many questions there are.
        n_boot: samples of the bootstrap.

    Raises `InputError` for another result, and as `pope_scores` does.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.analysis import pope_study
    >>> from hooked_llava.toy.pope_tables import pope_rows
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> pope_page(pope_study(model, pope_rows(2, kinds=["random"])), n_boot=10).question
    'Is the object there? Asked 2 questions'
    """
    check_dataset(result, ("log_odds",), "pope_page", "pope_study")
    scores = pope_scores(result, n_boot=n_boot)
    columns = {**POPE_SCORES, **{label: f"log odds: {where}" for label, where in POPE_LABELS.items()}}
    shown = {
        "kicker": f"What {result.attrs.get('model') or 'the model'} says is there",
        "counts": question_counts(result, scores),
        "bars": pope_bars(scores, title=""),
        "names": list(columns.values()),
        "rows": [{"kind": kind, "cells": _cells(scores.sel(kind=kind))} for kind in kinds_in_order(scores)],
    }
    heading = title or study_heading(result, "Is the object there? Asked")
    footer = study_footer(result, scores, f"{forward_passes(result.attrs):.0f} forward passes beside those that answer")
    return make_page(PopePage, "pope", shown, footer, {"scores": scores}, question=heading, answer="")


def _cells(scores: xr.Dataset) -> list[Mapping[str, str]]:
    """Of one kind of question every score, and the log odds where the object is there and where it is not."""
    odds = [_cell(scores["log_odds"].sel(label=label), 1) for label in POPE_LABELS]
    return [*(_cell(scores[name], 2) for name in POPE_SCORES), *odds]


def _cell(score: xr.DataArray, digits: int) -> Mapping[str, str]:
    """A score and its interval; a dash for a share of nothing."""
    if not np.isfinite(float(score.sel(statistic="mean"))):
        return {"mean": "–", "interval": ""}
    mean, low, high = (rounded(score.sel(statistic=end), digits) for end in ("mean", "low", "high"))
    return {"mean": mean, "interval": f"{low} to {high}"}
