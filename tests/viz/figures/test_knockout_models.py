from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis import attention_knockout, knockout_study
from hooked_llava.datasets import StudyRow, by_kind
from hooked_llava.errors import InputError
from hooked_llava.results.arrays import save
from hooked_llava.viz import knockout_models


def drawn(effect: list[list[float]], edges: list[str]) -> xr.Dataset:
    """A result as attention_knockout gives it."""
    values = ("edge", "layer"), effect, {"units": "% of P(answer)"}
    return xr.Dataset({"effect": values}, coords={"edge": edges, "layer": range(len(effect[0]))})


def test_models_of_different_depth_lie_on_one_axis(tmp_path) -> None:
    small = drawn([[0.0, -8.0, -2.0], [0.0, 0.0, -1.0]], ["image->last", "question->last"])
    large = drawn([[-1.0, -2.0, -3.0, -4.0, 0.0]], ["image->last"])
    save(large, tmp_path / "large.safetensors")
    figure = knockout_models({"1.5": small, "NeXT": tmp_path / "large.safetensors"})
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "image → last"
    _, one, two = axes.lines
    assert (one.get_label(), two.get_label()) == ("1.5", "NeXT")
    np.testing.assert_allclose(np.asarray(one.get_xdata()), [0, 0.5, 1])
    np.testing.assert_allclose(np.asarray(two.get_xdata()), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(np.asarray(two.get_ydata()), large.effect.values[0])


def test_studies_are_averaged_by_kind_with_their_intervals(model) -> None:
    rows = [
        StudyRow(id=str(i), question=f"Who made the {s}?", answer="?", kind="fact")
        for i, s in enumerate(("star", "ring"))
    ]
    study = knockout_study(model, rows, ["question->last"], 1, only_correct=False)
    one = attention_knockout(model, model.prepare("Who made the star?"), ["question->last"], 1)
    axes = knockout_models({"study": study, "one": one}, kind="all").axes[0]
    expected = by_kind(study).effect.isel(kind=0).sel(statistic="mean", edge="question->last")
    np.testing.assert_allclose(np.asarray(axes.lines[1].get_ydata()), expected)
    assert len(axes.collections) == 1, "one prompt has no interval"


def test_edges_that_were_given_a_weight_are_called_so() -> None:
    weighted = drawn([[0.0, -8.0]], ["image->last"]).assign_attrs(factor=0.3)
    assert knockout_models({"a": weighted}).get_suptitle() == "Attention weighted by 0.3"
    assert knockout_models({"a": weighted}, title="Mine").get_suptitle() == "Mine"


def test_what_does_not_fit_together_is_refused() -> None:
    small, other = drawn([[0.0, -8.0]], ["image->last"]), drawn([[0.0, -8.0]], ["last->last"])
    with pytest.raises(InputError, match="'image->last'.*'last->last'"):
        knockout_models({"a": small, "b": other})
    with pytest.raises(InputError, match=r"'b' lacks \['image->last'\]"):
        knockout_models({"a": small, "b": other}, edges="image->last")
    nats = small.copy()
    nats["effect"] = small.effect.assign_attrs(units="nats")
    with pytest.raises(InputError, match="nats"):
        knockout_models({"a": small, "b": nats})
    with pytest.raises(InputError, match=r"factor \(0\.0, 0\.3\)"):
        knockout_models({"a": small, "b": small.assign_attrs(factor=0.3)})
    with pytest.raises(InputError, match=r"\{.*: its result"):
        knockout_models({})
