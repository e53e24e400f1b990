from __future__ import annotations

import numpy as np
import pytest

from hooked_llava.errors import InputError
from hooked_llava.viz import as_the_model_sees_it, model_view


def test_the_models_view_undoes_the_normalisation(model):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    inputs = model.prepare("What is it?", image)
    seen = model_view(inputs, model.processor.image_processor)
    assert np.abs(seen * 255 - image).max() < 0.6


def test_without_an_image_processor_the_view_is_stretched_to_its_range(inputs):
    seen = model_view(inputs)
    assert (seen.min(), seen.max()) == (0.0, 1.0)


def test_the_original_stands_beside_the_view_where_they_differ(model, inputs):
    figure = as_the_model_sees_it(inputs, model.processor.image_processor)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "original, 200 x 100 pixels",
        "32 x 32 pixels, 4 x 4 patches",
    ]
    same = model.prepare("What is it?", np.zeros((32, 32, 3), np.uint8))
    assert len(as_the_model_sees_it(same).axes) == 1


def test_a_image_that_is_not_there_has_no_view(inputs, text_inputs):
    with pytest.raises(InputError, match="image 1.*hold 1.*from 0"):
        model_view(inputs, image=1)
    with pytest.raises(InputError, match="image 0.*hold 0"):
        as_the_model_sees_it(text_inputs)


def test_every_grid_of_tiles_is_shown():
    from tests.tiled import drawn, with_processor

    model = with_processor("next")
    inputs = model.prepare("What is it?", drawn((24, 100)))
    seen = model_view(inputs, model.processor.image_processor, grid="fine")
    assert seen.shape == (56, 112, 3)
    half = model_view(inputs, model.processor.image_processor)
    assert half.shape == (56, 56, 3)
    np.testing.assert_allclose(seen[14:42, :56].mean(), half[:, :28].mean(), atol=0.02)  # the image lies in the middle
    figure = as_the_model_sees_it(inputs, model.processor.image_processor)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "original,\n100 x 24 pixels",
        "base: 56 x 56 pixels,\n4 x 4 patches",
        "fine: 112 x 56 pixels in 2 tiles,\n2 x 8 patches",
    ]
