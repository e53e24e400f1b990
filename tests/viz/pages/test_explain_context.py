from __future__ import annotations

import numpy as np
import xarray as xr
from PIL import Image

from hooked_llava.viz.pages.explain_context import looking_heads, picture_uri, prompt_tokens


def test_prompt_tokens_name_their_span_and_the_picture_is_one_of_them(inputs):
    tokens = prompt_tokens(inputs.token_map)
    assert [token["span"] for token in tokens if token["text"].startswith("picture")] == ["image"]
    assert {"text": "picture, 16 positions", "span": "image"} in tokens
    assert {"text": "star", "span": "question"} in tokens
    assert tokens[-1]["span"] == "last"
    assert len(tokens) == inputs.shape[1] - 16 + 1


def test_padding_is_no_part_of_the_prompt(model):
    batch = model.prepare(["Who made the star?", "Who?"])
    assert [token["text"] for token in prompt_tokens(batch.token_maps[1])][:3] == ["<s>", "USER:", "Who"]


def test_looking_heads_are_those_with_the_largest_share():
    attention = xr.DataArray(np.zeros((2, 3, 2, 2)), dims=("layer", "head", "patch_row", "patch_col"))
    attention = attention.assign_coords(layer=range(2), head=range(3))
    attention[1, 2, 0, 1], attention[0, 1] = 0.9, 0.1
    best = looking_heads(attention, 2)
    assert best["panel"].values.tolist() == ["layer 1, head 2: 90%", "layer 0, head 1: 40%"]
    assert np.array_equal(best.values, np.stack([attention.values[1, 2], attention.values[0, 1]]))


def test_large_pictures_are_made_smaller():
    assert len(picture_uri(Image.effect_noise((2000, 1000), 60).convert("RGB"))) < 700_000
