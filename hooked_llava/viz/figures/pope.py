"""Bars of what a model says to questions whether an object is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_llava.datasets.study import OF_ALL, as_kinds
from hooked_llava.viz.figures.knockout import kinds_in_order
from hooked_llava.viz.kinds import check_axes, check_dataset
from hooked_llava.viz.style import INK, MUTED, PAGE_WIDTH, PAPER, SERIES, add_heading, legend_below, plot, value_lines
from hooked_llava.viz.titles import add_note, shown_title

POPE_SCORES = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "yes_share": "share of yes",
}
"""What the scores are called, by their names in the result of `pope_scores`."""
POPE_LABELS = {"Yes": "there", "No": "not there"}
"""What the right answers say of the object, by the labels of its log odds."""
_ALL_BARS = 0.8  # of the distance between two groups


def pope_bars(scores: xr.Dataset, *, title: str | None = None) -> Figure:
    """Scores by kind of question, and the mean log odds of Yes where the object is there and where it is not.

    A group of bars for each score, in it a bar for each kind. The line across the share of yes is the share of questions whose
    object is there: a bar above it says that objects are made up. Thin lines are intervals, where there are any; a dash is a
    share of nothing.

    Args:
        scores: what `pope_scores` gives; with `n_boot=` it has intervals.
        title: instead of the result's own; "" for none.

    Raises `InputError` for another result.

    >>> values = {name: ("kind", [0.5]) for name in ("accuracy", "precision", "recall", "f1", "yes_share", "true_share", "n")}
    >>> figure = pope_bars(xr.Dataset(values, coords={"kind": ["random"]}))
    >>> [float(bar.get_height()) for bar in figure.axes[0].patches]
    [0.5, 0.5, 0.5, 0.5, 0.5]
    """
    check_dataset(scores, (*POPE_SCORES, "true_share", "n"), "pope_bars", "pope_scores")
    check_axes(scores["accuracy"], "kind", optional=("statistic",))
    each = as_kinds(scores)
    kinds = kinds_in_order(each)
    others = iter(SERIES)
    colors = {kind: MUTED if kind == OF_ALL else next(others) for kind in kinds}
    has_odds = "log_odds" in scores
    with plot(PAGE_WIDTH, 4.4 if has_odds else 2.6) as figure:
        upper, *lower = figure.subplots(2 if has_odds else 1, 1, squeeze=False)[:, 0]
        values = xr.concat([each[name] for name in POPE_SCORES], "score")
        _draw(upper, values, list(POPE_SCORES.values()), colors, {k: int(each["n"].sel(kind=k).max()) for k in kinds})
        _mark_truth(upper, each["true_share"], kinds)
        upper.set_ylim(0, 1.04)
        upper.set_ylabel("share")
        for axes in lower:
            labels = [str(label) for label in each["label"].values]
            _draw(
                axes,
                each["log_odds"].rename(label="score"),
                [f"object is {POPE_LABELS[label]}" for label in labels],
                colors,
            )
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.set_ylabel("log odds of Yes,\nnats", multialignment="center")
        legend_below(figure, upper)
        add_heading(figure, shown_title(scores, title))
        add_note(figure, scores.attrs, title)
    return figure


def _draw(
    axes: Axes,
    values: xr.DataArray,
    names: Sequence[str],
    colors: Mapping[str, str],
    counts: Mapping[str, int] | None = None,
) -> None:
    """A group of bars for each score, in it one for each kind, with its interval; `counts` name the kinds in a legend."""
    for kind, color in colors.items():
        own = values.sel(kind=kind)
        means, at = own.sel(statistic="mean").values, _places(list(colors), kind, len(names))
        label = None if counts is None else f"{kind} ({counts[kind]})"
        axes.bar(at, means, 0.92 * _ALL_BARS / len(colors), color=color, label=label)
        if own.sizes["statistic"] > 1:
            ends = own.sel(statistic="low").values, own.sel(statistic="high").values
            for color_, width in ((PAPER, 2.4), (INK, 1.0)):  # seen on dark bars too
                axes.vlines(at, *ends, color=color_, linewidth=width)
        for x in at[np.isnan(means)]:
            axes.text(x, 0, "–", ha="center", va="bottom", fontsize=8, color=color)
    axes.set_xticks(range(len(names)), names)
    axes.tick_params("x", length=0)
    value_lines(axes, "y")


def _mark_truth(axes: Axes, shares: xr.DataArray, kinds: Sequence[str]) -> None:
    """A line across the bars of the share of yes: how many questions have an object that is there."""
    half = _ALL_BARS / len(kinds) / 2
    for kind in kinds:
        at, share = _places(kinds, kind, len(POPE_SCORES))[-1], float(shares.sel(kind=kind).max())
        label = "true share of yes" if kind == kinds[0] else ""
        axes.hlines(share, at - half, at + half, color=INK, linewidth=1.6, label=label)


def _places(kinds: Sequence[str], kind: str, n: int) -> np.ndarray:
    """Where the bars of a kind stand: one in each of n groups, which are 1 apart."""
    return np.arange(n) + _ALL_BARS * ((list(kinds).index(kind) + 0.5) / len(kinds) - 0.5)
