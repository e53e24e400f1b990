"""What pages of a finished study share: how many questions there are of each kind, and the footer."""

from __future__ import annotations

from typing import Any

import xarray as xr

from hooked_llava.datasets.study import count_unseen
from hooked_llava.errors import counted
from hooked_llava.viz.pages.page import made_with


def study_heading(result: xr.Dataset, what: str) -> str:
    """A heading, of how many questions it is.

    >>> study_heading(xr.Dataset({"p": ("question", [0.5])}), "Information flow over")
    'Information flow over 1 question'
    """
    return f"{what} {counted(result.sizes['question'], 'question')}"


def question_counts(result: xr.Dataset, means: xr.Dataset) -> list[dict[str, Any]]:
    """A row for each kind of question: asked, answered correctly, measured; `means` are those of `by_kind`."""
    asked, correct = (result.attrs.get(name, {}) for name in ("asked", "correct"))
    return [
        {"kind": kind, "asked": asked[kind], "correct": correct.get(kind, 0), "measured": int(measured)}
        for kind, measured in zip(means["kind"].values.tolist(), means["n"].values, strict=True)
        if kind in asked
    ]


def study_footer(
    result: xr.Dataset, means: xr.Dataset, cost: str, each: str = "a batch of questions"
) -> dict[str, str]:
    """What a page of a study says below: model, questions, intervals, what it cost, and with which packages it was made.

    `cost` counts forward passes, and `each` says of what one is.
    """
    asked, correct = (sum(result.attrs.get(name, {}).values()) for name in ("asked", "correct"))
    unseen, attrs = count_unseen(result), means.attrs
    return {
        "Model": result.attrs.get("model") or "unnamed",
        "Questions": f"{asked} asked, {correct} answered correctly, {result.sizes['question']} measured"
        + (f"; {unseen} with an object that the model does not see (cut away, or too small)" if unseen else ""),
        "Intervals": f"{attrs['confidence']:.0%}, bootstrap over questions within each kind ({attrs['n_boot']} samples)",
        "Cost": f"{cost}, each of {each}, {result.attrs.get('seconds', 0.0):.0f} s",
        "Made": made_with(),
    }
