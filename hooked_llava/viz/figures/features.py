"""Features of a sparse autoencoder that argue for an answer, and where in the image; and what steering does by strength."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hooked_llava.architecture.layout import ALL
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.sae.attribution import feature_maps
from hooked_llava.viz.figures.overlay import Underlay, patch_overlays
from hooked_llava.viz.kinds import check_dataset
from hooked_llava.viz.lines import apart, draw_curve
from hooked_llava.viz.style import PAGE_WIDTH, SERIES, add_heading, legend_below, plot, value_lines
from hooked_llava.viz.titles import add_note, shown_title


def feature_overlays(
    inputs: Inputs,
    result: xr.Dataset,
    *,
    features: Sequence[int] | int = 6,
    image: int = 0,
    grid: str = ALL,
    underlay: Underlay = "grey",
    title: str | None = None,
) -> Figure:
    """Where in an image each of some features argues for the answer, a panel for each, with its sum over the images above.

    Args:
        inputs: the prompt.
        result: what `feature_attribution` gives for it.
        features: their numbers, or how many: those with the largest sum over the images by size.
        image: which image of the prompt.
        grid: as for `patch_overlay`.
        underlay: as for `patch_overlay`.
        title: instead of the result's own; "" for none.

    Raises `InputError` for another dataset, and as `patch_overlays`.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.sae import SAEConfig, SparseAutoencoder, feature_attribution
    >>> from hooked_llava.toy.images import image_path
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> inputs = model.prepare("What color is the star?", images=image_path("demo"))
    >>> sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=256, k=8, hook="hook_embed")).reset(seed=0)
    >>> figure = feature_overlays(inputs, feature_attribution(model, sae, inputs, "Orange"), features=[7, 9])
    >>> [axes.get_title().split(":")[0] for axes in figure.axes[:2]]
    ['feature 7', 'feature 9']
    """
    check_dataset(result, ("attribution", "activation"), "feature_overlays", "feature_attribution")
    maps = feature_maps(inputs, result, features)
    sums = maps.sum([dim for dim in maps.dims if dim != "sae_feature"])
    names = [f"feature {int(n)}: {float(total):+.3g}" for n, total in zip(maps.sae_feature, sums, strict=True)]
    drawn = maps.isel(image=image, drop=True).assign_coords(sae_feature=names)
    return patch_overlays(inputs, drawn, image=image, grid=grid, columns=3, underlay=underlay, title=title)


def dose_response(result: xr.Dataset, *, title: str | None = None) -> Figure:
    """The probability of the answer by strength of the steering, a line for it and for each control; and the side effects.

    Several prompts are averaged. Raises `InputError` for another dataset.

    >>> dims = ("steered_by", "strength")
    >>> sweep = xr.Dataset({"log_probability": (dims, [[-9.0, 0.0]])}, {"steered_by": ["steered"], "strength": [0.0, 1.0]})
    >>> dose_response(sweep).axes[0].lines[0].get_ydata().round(3).tolist()
    [0.0, 1.0]
    """
    check_dataset(result, ("log_probability",), "dose_response", "steering_sweep")
    shown = {"probability of the answer": np.exp(result.log_probability)}
    if "other_kl" in result:
        shown["KL on other questions (nats)"] = result.other_kl
    with plot(PAGE_WIDTH, 2.6) as figure:
        panels = figure.subplots(1, len(shown), squeeze=False)[0].tolist()
        for axes, (label, values) in zip(panels, shown.items(), strict=True):
            _draw(axes, values.mean([dim for dim in values.dims if dim not in ("steered_by", "strength")]), label)
        panels[0].set_ylim(-0.02, 1.04)
        legend_below(figure, panels[0])
        add_heading(figure, shown_title(result, title))
        add_note(figure, result.attrs, title)
    return figure


def _draw(axes: Axes, values: xr.DataArray, label: str) -> None:
    """A line for every way of steering; all panels have the same colors."""
    values = values.sortby("strength").transpose("steered_by", "strength")
    names = [str(name).replace("_", " ") for name in values.steered_by.values]
    by_name = dict(zip(names, values.values, strict=True))
    for curve in apart(by_name):
        index = names.index(curve.first)
        draw_curve(axes, values.strength.values, by_name[curve.first], curve, SERIES[index % len(SERIES)], index)
    axes.set_xlabel("strength")
    axes.set_ylabel(label)
    value_lines(axes, "y")
