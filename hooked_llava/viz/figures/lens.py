"""What the logit lens reads: words by layer, and an answer's probability by layer."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from hooked_llava.errors import InputError
from hooked_llava.viz.figures.maps import draw_cells, names_along
from hooked_llava.viz.kinds import check_axes, check_dataset
from hooked_llava.viz.lines import apart, draw_curve, name_layers
from hooked_llava.viz.style import (
    PAGE_WIDTH,
    SEQUENTIAL,
    SERIES,
    ColorScale,
    add_color_bar,
    legend_below,
    plot,
    token_label,
    value_lines,
)
from hooked_llava.viz.titles import add_note, title_of

_PROBABILITY = ColorScale(SEQUENTIAL, 0.0, 1.0)
_shown = partial(token_label, longest=12)


def lens_table(result: xr.Dataset, *, title: str | None = None) -> Figure:
    """The words that `logit_lens` reads, a row for each layer, shaded by probability.

    For one position the columns are its most probable words by rank, for several positions the best word of each.
    Raises `InputError` for a dataset without `token` and `probability` by layer, position and rank.

    >>> dims = ("layer", "position", "rank")
    >>> read = xr.Dataset({"token": (dims, [[["Red"]]]), "probability": (dims, [[[0.9]]])})
    >>> [text.get_text() for text in lens_table(read).axes[0].texts]
    ['Red']
    """
    words, probability, columns, label = _cells(
        check_dataset(result, ("token", "probability"), "lens_table", "logit_lens or patchscope")
    )
    n_layers, n_columns = words.shape
    with plot(max(4.2, 1.7 + 0.86 * n_columns), max(2.4, 0.9 + 0.27 * n_layers)) as figure:
        axes = figure.add_subplot()
        draw_cells(axes, probability, _PROBABILITY)
        for (row, column), word in np.ndenumerate(words):
            color = _PROBABILITY.ink(float(probability[row, column]))
            axes.text(column + 0.5, row + 0.5, _shown(word), ha="center", va="center", fontsize=7.5, color=color)
        axes.set_xticks(np.arange(n_columns) + 0.5, columns, rotation=90 if label == "position" else 0)
        axes.set_yticks(np.arange(n_layers) + 0.5, names_along(result, "layer"))
        axes.tick_params(length=0)
        axes.set_xlabel(label)
        axes.set_ylabel(_axis(result))
        axes.set_title(f"{lens_title(result)}: most probable words by {label}" if title is None else title)
        add_note(figure, result.attrs, title)
        add_color_bar(figure, axes, _PROBABILITY, "probability", probability)
    return figure


def answer_curve(result: xr.Dataset, *, title: str | None = None) -> Figure:
    """The probability that the logit lens gives each answer, by layer; a line for each answer, at one position.

    Raises `InputError` for a dataset without `answer_probability` (`logit_lens(..., answers=[...])` makes one), or with
    several positions.

    >>> dims = ("layer", "position", "answer")
    >>> read = xr.Dataset({"answer_probability": (dims, [[[0.1]], [[0.9]]])}, coords={"answer": ["Red"]})
    >>> answer_curve(read).axes[0].lines[0].get_ydata().tolist()
    [0.1, 0.9]
    """
    check_dataset(result, ("answer_probability",), "answer_curve", "logit_lens(..., answers=[...])")
    if result.sizes.get("position", 1) != 1:
        raise InputError(
            "answer_curve draws answer_probability at one position; make it with "
            "logit_lens(model, inputs, positions='last', answers=[...]), or choose one with result.isel(position=[-1])."
        )
    curves = result["answer_probability"].isel(position=0).transpose("answer", "layer").sortby("layer")
    layers, words = curves["layer"].values, [_shown(name) for name in curves["answer"].values]
    with plot(PAGE_WIDTH, 2.5) as figure:
        axes = figure.add_subplot()
        by_word = dict(zip(_different(words), curves.values, strict=True))
        for curve in apart(by_word):
            index = list(by_word).index(curve.first)
            draw_curve(axes, layers, by_word[curve.first], curve, SERIES[index % len(SERIES)], index)
        name_layers(axes, layers, names_along(curves, "layer"))
        axes.margins(x=0.03)
        axes.set_ylim(-0.02, 1.04)
        axes.set_xlabel(_axis(result))
        axes.set_ylabel("probability")
        value_lines(axes, "y")
        axes.set_title(f"{lens_title(result)}: probability of answers by layer" if title is None else title)
        add_note(figure, result.attrs, title)
        legend_below(figure, axes)
    return figure


def _axis(result: xr.Dataset) -> str:
    """What the lens read by layer: the residual stream, or another hook."""
    hook = result.attrs.get("hook")
    return f"{hook}, layer" if hook else "residual stream entering layer"


def lens_title(result: xr.Dataset) -> str:
    """The lens and what it is held to, how it reads where that is not the final norm."""
    if result.attrs.get("analysis") == "patchscope":
        return title_of(result)
    hook, norm = result.attrs.get("hook"), result.attrs.get("norm", "final")
    ways = {"frozen": " with the final norm's scale held", "none": " without the final norm", "tuned": ", tuned"}
    how = ways.get(str(norm), "")
    return title_of(xr.Dataset(attrs={"analysis": "logit_lens"})) + (f" of {hook}" if hook else "") + how


def _different(words: list[str]) -> list[str]:
    """Words as names of curves: one that occurs twice, as words cut short do, is numbered."""
    return [word if words.count(word) == 1 else f"{word} ({words[:i].count(word) + 1})" for i, word in enumerate(words)]


def _cells(result: xr.Dataset) -> tuple[np.ndarray, np.ndarray, list[str], str]:
    """Words and probabilities [layer, column], the columns' names, and what they are."""
    for name in ("token", "probability"):
        check_axes(result[name], "layer", "position", "rank", advice=" Take one prompt with result.isel(prompt=0).")
    ordered = result[["token", "probability"]].transpose("layer", "position", "rank")
    if result.sizes["position"] == 1:
        one = ordered.isel(position=0)
        return one["token"].values, one["probability"].values, [str(r + 1) for r in range(result.sizes["rank"])], "rank"
    best = ordered.isel(rank=0)
    names = best["label"].values if "label" in best.coords else best["position"].values
    return best["token"].values, best["probability"].values, [_shown(str(name)) for name in names], "position"
