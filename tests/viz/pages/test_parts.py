from __future__ import annotations

import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.viz.pages.parts import answer_text, prompt_tokens, shown_images


def test_prompt_tokens_name_their_span_and_the_image_is_one_of_them(inputs):
    tokens = prompt_tokens(inputs.token_map)
    assert [token["span"] for token in tokens if token["text"].startswith("image")] == ["image"]
    assert {"text": "image, 16 positions", "span": "image"} in tokens
    assert {"text": "star", "span": "question"} in tokens
    assert tokens[-1]["span"] == "last"
    assert len(tokens) == inputs.shape[1] - 16 + 1


def test_padding_is_no_part_of_the_prompt(model):
    batch = model.prepare(["Who made the star?", "Who?"])
    assert [token["text"] for token in prompt_tokens(batch.token_maps[1])][:3] == ["<s>", "USER:", "Who"]


def test_answers_end_where_the_model_ended_them(model):
    end = model.config.eos_token_ids[0]
    red, blue = (model.to_single_token(word) for word in ("red", "blue"))
    assert answer_text(model, torch.tensor([[red, blue, end, red]])) == model.tokenizer.decode([red, blue])


def test_a_page_is_of_one_prompt(model, inputs):
    assert model.as_inputs(inputs).single("this_page") is inputs
    with pytest.raises(InputError, match="this_page.*prompt, got 2"):
        model.prepare(["Who?", "What?"]).single("this_page")


def test_without_originals_the_model_s_view_is_shown(model, inputs, tensor_inputs):
    assert [image.size for image in shown_images(model, inputs)] == [(200, 100)]
    assert [image.size for image in shown_images(model, tensor_inputs)] == [(32, 32)]
