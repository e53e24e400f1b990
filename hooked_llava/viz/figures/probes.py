"""What can be read from each layer by what was fitted to it: accuracy of linear probes, and divergence of lenses."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from hooked_llava.viz.figures.maps import names_along
from hooked_llava.viz.kinds import check_array, check_axes, check_dataset
from hooked_llava.viz.lines import apart, draw_curve, name_layers
from hooked_llava.viz.style import MUTED, PAGE_WIDTH, SERIES, legend_below, plot, value_lines
from hooked_llava.viz.titles import add_note, title_of

_LENSES = {"none": "raw", "final": "final norm", "tuned": "tuned"}
_LEAST = 1e-4  # nats: less is drawn as that


def probe_curves(probed: xr.Dataset, *, title: str | None = None) -> Figure:
    """How well a linear probe reads its labels by layer, beside the same probe of labels that say nothing.

    Lines are means over folds, bands reach from the lowest fold to the highest; the thin line is the share of the most frequent
    label. Takes the `result` of the `LinearProbe` that `probe_linear` gives; raises `InputError` for another result.

    >>> both = {name: (("layer", "fold"), [[0.4, 0.6], [1.0, 1.0]]) for name in ("accuracy", "control")}
    >>> probed = xr.Dataset({**both, "majority": ("fold", [0.5, 0.5])}, coords={"layer": [0, 1]})
    >>> probe_curves(probed).axes[0].lines[1].get_ydata().tolist()
    [0.5, 1.0]
    """
    check_dataset(probed, ("accuracy", "control", "majority"), "probe_curves", "probe_linear")
    ordered = probed.sortby("layer")
    layers = ordered["layer"].values
    rows = {
        name: check_axes(ordered[name], "layer", "fold").transpose("fold", "layer") for name in ("accuracy", "control")
    }
    shown = {"accuracy": "labels", "control": "control labels"}
    with plot(PAGE_WIDTH, 2.6) as figure:
        axes = figure.add_subplot()
        axes.axhline(float(ordered["majority"].mean()), color=MUTED, linewidth=0.8, label="most frequent label")
        means = {name: values.mean("fold").values for name, values in rows.items()}
        for curve in apart(means, shown=shown):
            index, values = list(rows).index(curve.first), rows[curve.first]
            band = (values.min("fold"), values.max("fold"))
            draw_curve(axes, layers, means[curve.first], curve, SERIES[index], index, band=band)
        name_layers(axes, layers, names_along(ordered["accuracy"], "layer"))
        axes.set_ylim(-0.02, 1.04)
        axes.set_xlabel(_read(probed))
        axes.set_ylabel("accuracy on held-out prompts")
        value_lines(axes, "y")
        axes.set_title(_probe_title(probed) if title is None else title)
        legend_below(figure, axes)
        add_note(figure, probed.attrs, title)
    return figure


def lens_curves(kl: xr.DataArray, *, title: str | None = None) -> Figure:
    """How far what each lens reads by layer is from what the model says: KL in nats, on a logarithmic axis.

    Takes what `lens_kl` gives; less than 0.0001 nats is drawn as that. Raises `InputError` for another result.

    >>> far = xr.DataArray([[2.0, 1.0], [0.5, 0.0]], {"norm": ["none", "tuned"]}, dims=("norm", "layer"), name="kl")
    >>> [line.get_ydata().tolist() for line in lens_curves(far).axes[0].lines]
    [[2.0, 1.0], [0.5, 0.0001]]
    """
    values = check_axes(check_array(kl, "lens_curves", "lens_kl"), "norm", "layer").transpose("norm", "layer")
    values = values if "layer" in values.coords else values.assign_coords(layer=np.arange(values.sizes["layer"]))
    layers = values["layer"].values
    rows = {str(name): np.maximum(values.sel(norm=name).values, _LEAST) for name in values["norm"].values}
    logarithms = {name: np.log(row) for name, row in rows.items()}
    with plot(PAGE_WIDTH, 2.6) as figure:
        axes = figure.add_subplot()
        axes.set_yscale("log")
        for curve in apart(logarithms, shown={name: _LENSES.get(name, name) for name in rows}):
            index = list(rows).index(curve.first)
            draw_curve(axes, layers, rows[curve.first], curve, SERIES[index % len(SERIES)], index)
        name_layers(axes, layers, names_along(values, "layer"))
        axes.set_xlabel("residual stream entering layer")
        axes.set_ylabel("KL(model || lens), nats")
        value_lines(axes, "y")
        axes.set_title(
            (title_of(xr.Dataset(attrs=kl.attrs)) if "analysis" in kl.attrs else "") if title is None else title
        )
        legend_below(figure, axes)
        add_note(figure, kl.attrs, title)
    return figure


def _read(probed: xr.Dataset) -> str:
    """What was read by layer: the residual stream, or another hook."""
    hook = probed.attrs.get("hook")
    return f"{hook}, layer" if hook else "residual stream entering layer"


def _probe_title(probed: xr.Dataset) -> str:
    """The analysis, where it read, and of how many prompts."""
    about = probed.attrs
    if "analysis" not in about:
        return ""
    pooled = "the last of " if about.get("pool") == "last" else ""
    return f"{title_of(probed)} of {about['n_prompts']} prompts at {pooled}{about['tokens']!r}"
