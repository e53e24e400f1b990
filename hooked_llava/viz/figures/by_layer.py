"""What changes from layer to layer: words that are stored, and answers that are lost without heads."""

from __future__ import annotations

import re

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from hooked_llava.checks import one_of
from hooked_llava.results.map_quality import mean_intervals
from hooked_llava.viz.figures.maps import names_along
from hooked_llava.viz.kinds import check_axes, check_dataset
from hooked_llava.viz.lines import apart, draw_curve, name_layers
from hooked_llava.viz.style import MUTED, PAGE_WIDTH, SERIES, add_heading, legend_below, plot, value_lines
from hooked_llava.viz.titles import add_note, title_of

_NUMBERED = re.compile(r"(.+) (\d+)")
_VALUES = {"log_probability": "log P(answer), nats", "correct": "share of answers kept", "metric": "metric"}


def storage_curves(stored: xr.Dataset, *, space: str = "unembed", title: str | None = None) -> Figure:
    """How plainly a correct word and a distractor are read by layer: their logit difference, and 1 / rank of each.

    Lines are means over positions and prompts, of several prompts with 95% intervals as bands: what `information_storage` found
    in the residual stream. A word that can be read is not thereby used.

    Args:
        stored: what `information_storage` gives.
        space: which of its spaces.
        title: instead of the result's own; "" for none.

    Raises `InputError` for another result, and a space that was not read.

    >>> difference = (("space", "layer", "position"), [[[0.0], [2.0]]])
    >>> rank = (("space", "layer", "position", "word"), [[[[4, 4]], [[1, 4]]]])
    >>> words = {"space": ["unembed"], "layer": [0, 1], "word": ["correct", "distractor"]}
    >>> stored = xr.Dataset({"logit_difference": difference, "rank": rank}, coords=words)
    >>> [line.get_ydata().tolist() for line in storage_curves(stored).axes[1].lines]
    [[0.25, 1.0], [0.25, 0.25]]
    """
    check_dataset(stored, ("logit_difference", "rank"), "storage_curves", "information_storage")
    one_of(space, [str(name) for name in stored["space"].values], "space")
    chosen = stored.sel(space=space).sortby("layer")
    rows = {"logit difference": chosen["logit_difference"], "reciprocal rank": 1 / chosen["rank"]}
    called = {word: str(stored.attrs.get(word, word)) for word in ("correct", "distractor")}
    with plot(PAGE_WIDTH, 4.2) as figure:
        panels = figure.subplots(2, 1, sharex=True)
        for axes, (label, values) in zip(panels, rows.items(), strict=True):
            by_name = {called["correct"]: values}
            if "word" in values.dims:
                by_name = {f"{name!r}, {word}": values.sel(word=word) for word, name in called.items()}
            summed = {name: _over_prompts(one) for name, one in by_name.items()}
            for curve in apart({name: mean for name, (mean, *_) in summed.items()}):
                index, (mean, low, high) = list(summed).index(curve.first), summed[curve.first]
                band = (low, high) if "prompt" in values.dims else None
                draw_curve(axes, values["layer"].values, mean, curve, SERIES[index], index, band=band)
            axes.set_ylabel(label)
            value_lines(axes, "y")
        panels[0].axhline(0, color=MUTED, linewidth=0.8)
        name_layers(panels[1], chosen["layer"].values, names_along(chosen["rank"], "layer"))
        panels[1].set_xlabel("residual stream entering layer")
        legend_below(figure, panels[1])
        versus = f"{title_of(stored)}: {called['correct']!r} against {called['distractor']!r}"
        add_heading(figure, versus if title is None else title)
        add_note(figure, stored.attrs, title)
    return figure


def ablation_curves(lost: xr.Dataset, *, value: str = "log_probability", title: str | None = None) -> Figure:
    """What the answer loses without each set of heads: a curve for each name that is followed by a number, along the numbers.

    Sets of `heads_by_layer` so become a curve by layer, those of `nested_sets` one by the number of heads for each ranking; other
    sets stand beside each other. The thin line is the run with all heads. Means over prompts, with 95% intervals as bands.

    Args:
        lost: what `ablate_heads` gives.
        value: "log_probability", "correct", or "metric".
        title: instead of the result's own; "" for none.

    Raises `InputError` for another result, and for a value that it does not have.

    >>> sets = ["none", "layer 0", "layer 1"]
    >>> lost = xr.Dataset({"log_probability": (("set", "prompt"), [[0.0], [-2.0], [-1.0]])}, coords={"set": sets})
    >>> ablation_curves(lost).axes[0].lines[1].get_ydata().tolist()
    [-2.0, -1.0]
    """
    one_of(value, _VALUES, "value")
    values = check_dataset(lost, (value,), "ablation_curves", "ablate_heads")[value].astype(float)
    check_axes(values, "set", "prompt")
    names = [str(name) for name in values["set"].values if name != "none"]
    curves, ticks, label = _along(names)
    with plot(PAGE_WIDTH, 2.7) as figure:
        axes = figure.add_subplot()
        axes.axhline(float(values.sel(set="none").mean()), color=MUTED, linewidth=0.8)
        summed = {
            name: mean_intervals(values.sel(set=list(own.values())).transpose("prompt", "set").values)
            for name, own in curves.items()
        }
        for index, (name, (mean, low, high)) in enumerate(summed.items()):
            (curve,) = apart({name: mean})
            band = (low, high) if values.sizes["prompt"] > 1 else None
            draw_curve(axes, np.array(list(curves[name])), mean, curve, SERIES[index % len(SERIES)], index, band=band)
        name_layers(axes, np.array(list(ticks)), list(ticks.values()))
        axes.set_xlabel(label)
        axes.set_ylabel(
            str(lost.attrs.get("metric", "metric")).replace("_", " ") if value == "metric" else _VALUES[value]
        )
        value_lines(axes, "y")
        axes.set_title(title_of(lost) if title is None else title)
        if len(curves) > 1:
            legend_below(figure, axes)
        add_note(figure, lost.attrs, title)
    return figure


def _over_prompts(values: xr.DataArray) -> np.ndarray:
    """Means over positions and prompts by layer, and the ends of their intervals: [3, layer]."""
    by_prompt = values.mean("position").expand_dims([] if "prompt" in values.dims else ["prompt"])
    return mean_intervals(by_prompt.transpose("prompt", "layer").values)


def _along(names: list[str]) -> tuple[dict[str, dict[int, str]], dict[int, str], str]:
    """Curves by name, each from the place along the axis to the set; what stands at the places; and the axis's label."""
    found = [_NUMBERED.fullmatch(name) for name in names]
    if not names or not all(found):
        return {"set": dict(enumerate(names))}, dict(enumerate(names)), "set of heads"
    curves: dict[str, dict[int, str]] = {}
    for name, match in zip(names, found, strict=True):
        assert match is not None
        curves.setdefault(match[1], {})[int(match[2])] = name
    places = sorted({place for own in curves.values() for place in own})
    ordered = {name: dict(sorted(own.items())) for name, own in curves.items()}
    return (
        ordered,
        {place: str(place) for place in places},
        "layer" if list(curves) == ["layer"] else "heads taken away",
    )
