"""How the residual stream, and the neurons that write to it, add up to a logit or a log probability."""

from __future__ import annotations

import re

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from hooked_llava.analysis.neuron_scores import top_neurons
from hooked_llava.checks import whole_number
from hooked_llava.viz.kinds import check_dataset
from hooked_llava.viz.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PAGE_WIDTH,
    legend_below,
    name_bars,
    plot,
    require_dims,
    tick_every,
    token_label,
    unit_of,
    value_lines,
)
from hooked_llava.viz.titles import add_note, title_of

_OF_LAYER = re.compile(r"(\d+)_(attn|mlp)")
_EMBEDDING = "log_probability_of_embedding"
_COLORS = {"attn": BLUE, "mlp": ORANGE}
_NAMES = {"attn": "attention", "mlp": "MLP"}


def contribution_bars(result: xr.DataArray, *, title: str | None = None) -> Figure:
    """Direct contributions, [component], a bar each: attention and MLP of a layer side by side, the rest to the left.

    Takes what `logit_attribution(by="component")` gives, or `layer_scores` [layer, component]. The thin line is the sum of
    everything up to and including a layer; it ends at the total: the logit, or the answer's log probability. Of chosen
    components only these are drawn and added up, each at its own layer. Raises `InputError` for a result without the axis
    `component`.

    >>> parts = xr.DataArray([1.0, 2.0, -0.5], dims="component", coords={"component": ["embed", "0_attn", "0_mlp"]})
    >>> figure = contribution_bars(parts)
    >>> [float(bar.get_height()) for bars in figure.axes[0].containers for bar in bars]
    [1.0, 2.0, -0.5]
    """
    result = require_dims(_as_components(result), "component")
    values = dict(zip((str(name) for name in result["component"].values), result.values.tolist(), strict=True))
    others = [name for name in values if not _OF_LAYER.fullmatch(name)]
    layers = sorted({int(m[1]) for name in values if (m := _OF_LAYER.fullmatch(name))})
    before = list(range(layers[0] - len(others), layers[0]) if layers else range(len(others)))
    with plot(PAGE_WIDTH, 2.9) as figure:
        axes = figure.add_subplot()
        if others:
            axes.bar(before, [values[name] for name in others], 0.5, color=MUTED)
        for side, kind in ((-1, "attn"), (1, "mlp")):
            there = [layer for layer in layers if f"{layer}_{kind}" in values]
            heights = [values[f"{layer}_{kind}"] for layer in there]
            axes.bar(np.array(there) + side * 0.2, heights, 0.36, color=_COLORS[kind], label=_NAMES[kind])
        sums = _running_sum(values, others, layers)
        whole = _is_whole(values, layers)
        label = "sum so far" if whole else "sum of these bars so far"
        axes.plot([*before, *layers], sums, color=INK, linewidth=1.0, marker=".", markersize=4, label=label)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        named = layers[:: tick_every(len(layers))] if layers else []
        axes.set_xticks([*before, *named], [*others, *map(str, named)])
        axes.set_xlabel("layer")
        axes.set_ylabel(unit_of(result))
        value_lines(axes, "y")
        axes.set_title(title_of(result) if title is None else title)
        legend_below(figure, axes)
        add_note(figure, result.attrs, title)
    return figure


def top_bars(result: xr.DataArray, *, top: int = 20, title: str | None = None) -> Figure:
    """The largest contributions of neurons, [layer, neuron], whichever sign they have: a bar each, the most positive on top.

    Raises `InputError` for a result with other axes longer than one, and for a `top` below 1.

    >>> figure = top_bars(xr.DataArray([[0.5, -2.0, 0.1]], dims=("layer", "neuron"), name="logit"), top=2)
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['L0 N0', 'L0 N1']
    """
    whole_number(top, "top", least=1, expected="at least 1 bar")
    result = require_dims(result, "layer", "neuron")
    flat = result.values.ravel()
    largest = np.argsort(-np.abs(flat), kind="stable")[:top]
    order = largest[np.argsort(-flat[largest], kind="stable")]
    places = [np.unravel_index(index, result.shape) for index in order]
    names = [f"L{result['layer'].values[row]} N{result['neuron'].values[column]}" for row, column in places]
    with plot(5.2, 1.1 + 0.2 * len(order)) as figure:
        axes = figure.add_subplot()
        axes.barh(range(len(order)), flat[order], 0.7, color=[BLUE if flat[i] >= 0 else ORANGE for i in order])
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks(range(len(order)), names)
        axes.invert_yaxis()
        axes.set_xlabel(unit_of(result))
        value_lines(axes, "x")
        shown = f"{len(order)} of {flat.size} neurons"
        axes.set_title(f"{title_of(result) if title is None else title}\n{shown}")
        add_note(figure, result.attrs, title)
    return figure


def neuron_bars(scores: xr.Dataset, *, n: int = 12, n_words: int = 3, title: str | None = None) -> Figure:
    """The neurons with the largest scores, a bar each, the best on top, and the first words of what each writes.

    Args:
        scores: what `neuron_scores` gives for one prompt; some layers of it by `scores.sel(layer=[...])`.
        n: how many neurons, at most as many as it has of each layer.
        n_words: how many words.
        title: instead of the result's own; "" for none.

    Raises `InputError` for another result, and more neurons than it has of each layer.

    >>> dims = ("layer", "rank")
    >>> scores = {"neuron": (dims, [[7]]), "score": (dims, [[0.5]]), "token": ((*dims, "word"), [[["Red", "red"]]])}
    >>> axes = neuron_bars(xr.Dataset(scores, coords={"layer": [3]}), n=1).axes[0]
    >>> axes.get_yticklabels()[0].get_text(), axes.texts[0].get_text()
    ('L3 N7', 'Red, red')
    """
    check_dataset(scores, ("neuron", "score", "token"), "neuron_bars", "neuron_scores")
    best = top_neurons(scores, min(n, scores.sizes["rank"]) if n > 0 else n)
    rows = [scores.sel(layer=layer).isel(rank=_rank_of(scores, layer, neuron)) for layer, neuron in best]
    values = [float(row["score"]) for row in rows]
    with plot(PAGE_WIDTH, 1.1 + 0.2 * len(rows)) as figure:
        axes = figure.add_subplot()
        axes.barh(range(len(rows)), values, 0.7, color=ORANGE)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for place, row in enumerate(rows):
            words = ", ".join(token_label(word, longest=12) for word in row["token"].values[:n_words])
            axes.annotate(
                words, (max(values[place], 0.0), place), (4, 0), textcoords="offset points", va="center", fontsize=7
            )
        axes.set_xlim(min(0.0, *values), 2.0 * max(1e-9, *values))  # room for the words
        name_bars(axes, [f"L{layer} N{neuron}" for layer, neuron in best])
        axes.set_xlabel(str(scores.attrs.get("units", "log-probability increase (nats)")))
        value_lines(axes, "x")
        axes.set_title(f"{title_of(scores)} and the words they write" if title is None else title)
        add_note(figure, scores.attrs, title)
    return figure


def _rank_of(scores: xr.Dataset, layer: int, neuron: int) -> int:
    return scores["neuron"].sel(layer=layer).values.tolist().index(neuron)


def _as_components(result: xr.DataArray) -> xr.DataArray:
    """`layer_scores` as components, after what the embedding alone gives."""
    if not isinstance(result, xr.DataArray) or not {"layer", "component"} <= set(result.dims):
        return result
    one = require_dims(result, "layer", "component")
    start = {"embed": one.attrs[_EMBEDDING]} if _EMBEDDING in one.attrs else {}
    parts = {
        f"{layer}_{part}": float(one.sel(layer=layer, component=part))
        for layer in one["layer"].values
        for part in _COLORS
    }
    values = {**start, **parts}
    return xr.DataArray(
        list(values.values()), dims="component", coords={"component": list(values)}, name=one.name, attrs=one.attrs
    )


def _running_sum(values: dict[str, float], others: list[str], layers: list[int]) -> list[float]:
    """The sum so far, after each bar that is of no layer and after each layer."""
    by_layer = [values.get(f"{layer}_attn", 0.0) + values.get(f"{layer}_mlp", 0.0) for layer in layers]
    return np.cumsum([*(values[name] for name in others), *by_layer]).tolist()


def _is_whole(values: dict[str, float], layers: list[int]) -> bool:
    """Whether every layer from 0 on has both its bars, and the embedding its own."""
    both = all(f"{layer}_{kind}" in values for layer in layers for kind in _COLORS)
    return both and "embed" in values and layers == list(range(len(layers)))
