"""Curves of probes and lenses: their numbers, names and notes."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.errors import InputError
from hooked_llava.viz import lens_curves, probe_curves
from tests.pairs import as_users_run


def probed() -> xr.Dataset:
    accuracy = [[0.5, 0.7], [1.0, 0.8], [1.0, 1.0]]
    control = [[0.4, 0.4], [0.5, 0.3], [0.2, 0.4]]
    about = {"analysis": "probe_linear", "n_prompts": 10, "tokens": "last", "pool": "mean", "model": "tiny"}
    return xr.Dataset(
        {
            "accuracy": (("layer", "fold"), accuracy),
            "control": (("layer", "fold"), control),
            "majority": ("fold", [0.4, 0.6]),
        },
        coords={"layer": [0, 1, 2], "layer_name": ("layer", ["0", "1", "final"])},
        attrs=about,
    )


def test_a_probe_is_drawn_with_its_control_and_the_share_of_the_most_frequent_label() -> None:
    (axes,) = probe_curves(probed()).axes
    majority, labels, control = axes.lines
    for line, expected in ((majority, [0.5, 0.5]), (labels, [0.6, 0.9, 1.0]), (control, [0.4, 0.4, 0.3])):
        np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), expected)
    bands = [np.asarray(band.get_paths()[0].vertices)[:, 1] for band in axes.collections]
    assert [(band.min(), band.max()) for band in bands] == [(0.5, 1.0), (0.2, 0.5)]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "final"]
    assert axes.get_title(loc="left") == "Linear probe of 10 prompts at 'last'"


def test_a_lens_that_is_the_model_is_drawn_at_the_least_value() -> None:
    far = xr.DataArray(
        [[3.0, 2.0, 1.0], [2.0, 1.0, 0.0], [0.5, 0.1, 0.0]],
        {"norm": ["none", "final", "tuned"], "layer": [0, 1, 2], "layer_name": ("layer", ["0", "1", "final"])},
        dims=("norm", "layer"),
        name="kl",
        attrs={"analysis": "lens_kl"},
    )
    (axes,) = lens_curves(far).axes
    assert [line.get_label() for line in axes.lines] == ["raw", "final norm", "tuned"]
    assert np.asarray(axes.lines[2].get_ydata()).tolist() == [0.5, 0.1, 1e-4]
    assert axes.get_yscale() == "log"
    assert axes.get_title(loc="left") == "What a lens reads against what the model says"


def test_other_results_are_refused_and_the_right_figure_is_named() -> None:
    with as_users_run(), pytest.raises(InputError, match=r"probe_curves.*probe_linear.*viz\.lens_curves"):
        probe_curves(xr.Dataset(attrs={"analysis": "lens_kl"}))
    with as_users_run(), pytest.raises(InputError, match=r"lens_curves.*lens_kl.*viz\.probe_curves"):
        lens_curves(probed())  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="'kl'.*norm, layer"):
        lens_curves(xr.DataArray([1.0], dims="layer", name="kl"))
