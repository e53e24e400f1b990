from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_rgb

from hooked_llava.errors import InputError
from hooked_llava.viz.style import (
    DIVERGING,
    SEQUENTIAL,
    SERIES,
    ColorScale,
    Plot,
    add_color_bar,
    color_scale,
    format_small,
    legend_below,
    plot,
    require_dims,
    scale_of,
    unit_of,
)
from hooked_llava.viz.titles import title_of

# From linear RGB to Oklab: Björn Ottosson 2020, https://bottosson.github.io/posts/oklab
_TO_LMS = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
_TO_LAB = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]


def test_signed_values_diverge_symmetrically_and_others_grow_from_zero():
    signed = color_scale(np.array([0.1, -2.0, 1.0]))
    growing = color_scale(np.array([0.1, 2.0]))
    assert (signed.low, signed.high, growing.low, growing.high) == (-2.0, 2.0, 0.0, 2.0)
    assert signed.rgba(0.0)[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.01)


def test_a_legend_below_keeps_its_words_within_the_figure():
    with plot(4.0, 2.0) as figure:
        axes = figure.add_subplot()
        for i in range(7):
            axes.plot([0, 1], label=f"question → last, number {i}" + ("\nand others" if i == 3 else ""))
        legend_below(figure, axes)
    figure.canvas.draw()
    box, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert axes.get_window_extent().height > 0.6 * 2.0 * figure.dpi


def test_the_label_of_a_color_bar_is_no_longer_than_the_figure_is_high():
    values = np.array([0.0, 1.0])
    with plot(4.0, 2.0) as figure:
        add_color_bar(figure, figure.subplots(), color_scale(values), "log-probability increase (nats)", values)
    figure.draw_without_rendering()
    label = figure.axes[1].yaxis.label
    assert label.get_text().split() == ["log-probability", "increase", "(nats)"]
    assert label.get_window_extent().height < figure.bbox.height


def test_contributions_diverge_even_if_none_is_negative():
    assert scale_of(xr.DataArray([1.0, 2.0], dims="x", name="logit")).low == -2.0
    assert scale_of(xr.DataArray([1.0, 2.0], dims="x", name="attention")).low == 0.0


def test_scale_of_nothing_but_zeros_or_nan_is_still_a_scale():
    assert color_scale(np.zeros(3)).high == 1.0
    assert color_scale(np.array([np.nan, 0.5])).high == 0.5


def test_sequential_map_begins_as_paper_and_darkens_evenly():
    colors = np.array([ColorScale(SEQUENTIAL, 0.0, 1.0).rgba(x)[:3] for x in np.linspace(0, 1, 21)])
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    lightness = (np.cbrt(linear @ np.array(_TO_LMS).T) @ np.array(_TO_LAB).T)[:, 0]  # Oklab's
    assert lightness[0] > 0.97
    assert np.diff(lightness) == pytest.approx(np.full(20, (lightness[-1] - lightness[0]) / 20), abs=0.016)


def test_text_on_a_cell_is_dark_on_light_and_light_on_dark():
    scale = ColorScale(SEQUENTIAL, 0.0, 1.0)
    assert scale.ink(0.0) != scale.ink(1.0)
    assert scale.ink(1.0) == "#ffffff"


def test_a_plot_shows_itself_as_png_and_svg():
    with plot(2.0, 1.0) as figure:
        figure.add_subplot().plot([0, 1])
    assert isinstance(figure, Plot)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "<svg" in figure.to_svg()


def test_subjects_and_units_follow_from_name_and_attributes():
    result = xr.DataArray([1.0], dims="x", name="logit", attrs={"answer": "Red", "baseline": "Blue"})
    assert title_of(result) == "Direct contribution to the logit of 'Red' minus that of 'Blue'"
    assert unit_of(result) == "logits"
    assert unit_of(result.assign_attrs(units="nats")) == "nats"
    assert title_of(xr.DataArray([1.0], dims="x", name="answer_probability")) == "Answer probability"


def test_only_refuses_missing_and_surplus_axes():
    result = xr.DataArray(np.zeros((2, 3)), dims=("image", "layer"))
    with pytest.raises(InputError, match="image, layer.*layer, head"):
        require_dims(result, "layer", "head")
    with pytest.raises(InputError, match="Choose or average"):
        require_dims(result, "layer")
    assert require_dims(result[:1], "layer").dims == ("layer",)


def test_small_numbers():
    assert [format_small(x) for x in (8.0246, 0.25, 0.001, 0.00012, 1e-5, -2e-8)] == [
        "8",
        "0.25",
        "0.001",
        "1e-4",
        "1e-5",
        "< 1e-6",
    ]


def test_another_value_than_zero_may_stand_for_nothing():
    share = xr.DataArray([1.0, 0.25], dims="x", name="recovered", attrs={"neutral": 1.0})
    assert scale_of(share) == ColorScale(DIVERGING, 0.25, 1.75)
    assert scale_of(share).neutral == 1.0
    growing = color_scale(np.array([1.0, 3.0]), neutral=1.0)
    assert growing == ColorScale(SEQUENTIAL, 1.0, 3.0)
    assert growing.neutral == 1.0


_CONES = {  # severe color blindness, Machado et al. 2009
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", list(_CONES))
def test_color_blind_readers_tell_the_lines_apart(kind):
    rgb = np.array([to_rgb(color) for color in SERIES])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(_CONES[kind]).T, 0, 1)
    oklab = np.cbrt(seen @ np.array(_TO_LMS).T) @ np.array(_TO_LAB).T
    apart = np.linalg.norm(oklab[:, None] - oklab[None], axis=-1)[np.triu_indices(len(SERIES), 1)]
    assert apart.min() > 0.075
