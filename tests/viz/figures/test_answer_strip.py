"""The strip of an answer: which map stands where, and under which word."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from hooked_llava.analysis import answer_maps, patch_importance
from hooked_llava.errors import InputError
from hooked_llava.viz import answer_strip
from tests.pairs import as_users_run
from tests.tiled import drawn, with_processor


def test_every_token_has_a_panel_with_its_map_on_one_scale(model, inputs):
    maps = answer_maps(model, inputs, "red star red")
    figure = answer_strip(inputs, maps)
    panels = [axes for axes in figure.axes if axes.collections and axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["red", "star", "red"]
    scales = set()
    for axes, own in zip(panels, maps.isel(image=0), strict=True):
        mesh = axes.collections[0]
        np.testing.assert_allclose(np.asarray(mesh.get_array()).ravel(), own.values.ravel())
        scales.add((mesh.norm.vmin, mesh.norm.vmax))
    assert len(scales) == 1
    assert figure._suptitle.get_text() == "Log-probability increase for 'red star red'"


def test_images_of_several_grids_have_a_strip_too():
    model = with_processor("next")
    prompt = model.prepare("What color is the star?", drawn((24, 100)))
    figure = answer_strip(prompt, answer_maps(model, prompt, "red star", method="attention"))
    assert [axes.get_title() for axes in figure.axes if axes.images and axes.get_title()] == ["red", "star"]


def test_what_is_no_strip_is_refused(model, inputs):
    with pytest.raises(InputError, match="image, patch_row.*token"):
        answer_strip(inputs, patch_importance(model, inputs))
    wrong: Any = xr.Dataset({"a": ("token", [1.0])})
    with as_users_run(), pytest.raises(InputError, match="answer_strip.*dataset"):
        answer_strip(Image.new("RGB", (8, 8)), wrong)
