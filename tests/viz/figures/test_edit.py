"""Figures of an edit show the numbers they are given."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

from hooked_llava.errors import InputError
from hooked_llava.viz.figures.edit import answer_shift, edit_by_layer, probe_bars, role_colors
from hooked_llava.viz.style import PURPLE

ROLES = ["efficacy", "generalisation", "specificity", "locality"]


@pytest.fixture
def answers() -> xr.DataArray:
    coords = {"state": ["before", "after"], "token": ["Clara", "Bo$is", " "]}
    return xr.DataArray([[0.9, 0.05, 0.01], [0.1, 0.8, 0.02]], dims=("state", "token"), coords=coords)


@pytest.fixture
def probes() -> xr.Dataset:
    values = {
        "accuracy_before": [0, 0, 1, 1],
        "accuracy": [1, 0.5, 0.75, 1],
        "kl": [8, 2, 0.01, 1e-9],
        "n": [1, 2, 4, 3],
    }
    coords = {"probe": ["own", "words", "others", "far"], "role": ("probe", ROLES)}
    return xr.Dataset({name: ("probe", np.array(x, dtype=float)) for name, x in values.items()}, coords=coords)


@pytest.fixture
def sweep() -> xr.Dataset:
    nan = float("nan")
    values = {
        "efficacy": [[0, 0, nan], [1, 0.5, 1]],
        "specificity": [[1, 1, nan], [0.2, 1, 1]],
        "indirect_effect": [[0.7, 0.1, nan], [-0.2, 0, 0.3]],
    }
    coords = {"position": ["constraint", "last"], "layer": range(3)}
    return xr.Dataset({name: (("position", "layer"), x) for name, x in values.items()}, coords=coords)


def test_two_bars_for_each_token(answers):
    axes = answer_shift(answers, title="Shift").axes[0]
    before, after = axes.containers
    assert [bar.get_width() for bar in before] == [0.9, 0.05, 0.01]
    assert [bar.get_width() for bar in after] == [0.1, 0.8, 0.02]
    assert [label.get_text() for label in axes.figure.legends[0].get_texts()] == ["before", "after"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Clara", r"Bo\$is", "' '"]
    assert {text.get_text() for text in axes.texts} >= {"0.900", "0.800"}
    assert axes.get_title(loc="left") == "Shift"


def test_other_answers_are_refused(answers):
    with pytest.raises(InputError, match=r"states.*\[.*expected before.*after.*edit_page"):
        answer_shift(answers.assign_coords(state=["clean", "corrupted"]))
    with pytest.raises(InputError, match="expected state, token"):
        answer_shift(answers.rename(token="word"))


def test_a_bar_for_each_probe_in_the_color_of_its_role(probes):
    figure = probe_bars(probes)
    axes = figure.axes[0]
    bars = axes.containers[0]
    assert [bar.get_width() for bar in bars] == [1, 0.5, 0.75, 1]
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [role_colors()[role] for role in ROLES]
    lines = axes.collections[0].get_segments()
    assert [line[0, 0] for line in lines] == [0, 0, 1, 1]
    assert [text.get_text() for text in axes.texts][:3] == ["n 1, KL 8", "n 2, KL 2", "n 4, KL 0.01"]
    assert axes.texts[3].get_text() == "n 3, KL < 1e-6"
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[0] == "before the edit"
    assert "specificity: to stay" in said
    with pytest.raises(InputError, match="evaluate_edit .* lacks 'kl'"):
        probe_bars(probes.drop_vars("kl"))


def test_a_panel_for_each_position_with_the_trace_dashed(sweep):
    figure = edit_by_layer(sweep, title="One fact")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["position: constraint", "position: last"]
    efficacy, specificity, effect = figure.axes[1].lines
    assert efficacy.get_ydata().tolist() == [1, 0.5, 1]
    assert specificity.get_ydata().tolist() == [0.2, 1, 1]
    assert effect.get_ydata().tolist() == [-0.2, 0, 0.3]
    assert (effect.get_color(), effect.get_linestyle()) == (PURPLE, "--")
    assert figure.axes[0].get_ylim()[0] < -0.2  # what is below zero is seen
    without = edit_by_layer(sweep.drop_vars("indirect_effect").sel(position=["last"]))
    assert len(without.axes) == 1
    assert len(without.axes[0].lines) == 2


def test_other_sweeps_are_refused(sweep):
    for wrong in (sweep.rename(layer="depth"), sweep[["indirect_effect"]], sweep.isel(position=0)):
        with pytest.raises(InputError, match="position, layer|lacks 'efficacy'"):
            edit_by_layer(wrong)
