"""Words on patches: which word, where, and how dark, against the layout and the lens themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis import logit_lens
from hooked_llava.errors import InputError, SpanError
from hooked_llava.viz import patch_words
from hooked_llava.viz.style import token_label
from tests.known_mechanism import OBJECTS, model_of
from tests.tiled import drawn, with_processor


def words(axes) -> dict[Any, str]:
    """What is written, by the place of its middle in pixels of the original."""
    return {tuple(map(float, text.get_position())): text.get_text() for text in axes.texts}


def test_every_patch_has_its_word_in_its_middle(model, inputs):
    lens = logit_lens(model, inputs, positions="image", k=2)
    figure = patch_words(inputs, lens, layer=1)
    expected = {}
    for place, position in enumerate(inputs.token_map["image"]):
        _, row, column = inputs.token_map.position_to_patch(position)
        x0, y0, x1, y1 = inputs.token_map.patch_box(row, column)
        expected[(x0 + x1) / 2, (y0 + y1) / 2] = str(lens.token.sel(layer=1).values[place, 0])
    written = words(figure.axes[0])
    assert written.keys() == expected.keys()
    for middle, word in expected.items():
        assert token_label(word).startswith(written[middle].rstrip("…"))


def test_on_the_known_mechanism_no_word_is_read_although_the_answer_comes_from_a_patch():
    """Its patches hold colors in a slot that the unembedding does not read: what is not written there may still be there."""
    model = model_of("direct")
    inputs = model.ask(OBJECTS, "ring")
    lens = logit_lens(model, inputs, positions="image")
    certain = lens.probability.isel(rank=0).values
    assert certain.max() < 0.5, "no word is read at a patch, and the figure shades none"
    shown = np.asarray(patch_words(inputs, lens, layer=-1).axes[0].images[-1].get_array())
    assert float(np.nanmax(shown)) == pytest.approx(float(certain[-1].max()))


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_every_grid_has_a_panel_and_newlines_have_no_word(kind):
    model = with_processor(kind)
    (image,) = drawn((40, 70))
    inputs = model.prepare("What color is the star?", images=image)
    (layout,) = inputs.layouts
    assert len(layout.grids) > 1
    lens = logit_lens(model, inputs, positions="image", k=1)
    figure = patch_words(inputs, lens, layer=0)
    panels = [axes for axes in figure.axes if axes.texts]
    assert [axes.get_title() for axes in panels] == list(layout.names)
    token, probability = (lens[name].sel(layer=0).values[:, 0] for name in ("token", "probability"))
    for axes, name in zip(panels, layout.names, strict=True):
        features = layout.cell_features(name)
        boxes = layout.grid(name).boxes
        seen = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
        assert len(axes.texts) == seen.sum()
        for text, feature in zip(axes.texts, features[seen], strict=True):
            assert token_label(token[feature]).startswith(text.get_text().rstrip("…"))
        np.testing.assert_allclose(np.asarray(axes.images[-1].get_array()), layout.draw(probability, name), atol=1e-7)
    one = patch_words(inputs, lens, layer=0, grid="base")
    assert len([axes for axes in one.axes if axes.texts]) == 1
    with pytest.raises(SpanError, match="'coarse'"):
        patch_words(inputs, lens, layer=0, grid="coarse")


def test_some_positions_and_another_hook(model, inputs):
    some = inputs.token_map["image"][2:4]
    figure = patch_words(inputs, logit_lens(model, inputs, positions=list(some)), layer=2)
    assert len(figure.axes[0].texts) == 2
    embeds = logit_lens(model, inputs, positions="image", hook="hook_image_embed")
    assert len(patch_words(inputs, embeds).axes[0].texts) == 16


def test_what_does_not_fit_is_refused(model, inputs, tensor_inputs):
    lens = logit_lens(model, inputs, positions="image")
    with pytest.raises(InputError, match=r"layer=9.*0, 1, 2, 3"):
        patch_words(inputs, lens, layer=9)
    with pytest.raises(InputError, match=r"layer=None.*0, 1, 2, 3"):
        patch_words(inputs, lens)
    with pytest.raises(InputError, match=r"\d+ to \d+.*positions='image'"):
        patch_words(inputs, logit_lens(model, inputs), layer=1)
    with pytest.raises(InputError, match="original image 0"):
        patch_words(tensor_inputs, lens, layer=1)
    with pytest.raises(InputError, match="original image 1"):
        patch_words(inputs, lens, layer=1, image=1)
    with pytest.raises(InputError, match=r"patch_words draws 'token'"):
        patch_words(inputs, xr.Dataset(), layer=1)
    with pytest.raises(InputError, match="head"):
        patch_words(inputs, logit_lens(model, inputs, positions="image", hook="result"), layer=1)
