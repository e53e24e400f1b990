"""Prompts about images of any size: counts of image tokens, pixels and spans, against transformers' processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.errors import InputError
from hooked_llava.loading.checkpoint import load_processor
from hooked_llava.loading.onevision import OnevisionProcessor
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.prepare import prepare
from tests.architecture.processors import MAX_TILES, onevision_processor
from tests.fixtures_processor import make_tokenizer
from tests.tiled import KINDS, SQUARE, TALL, TILES, WIDE, drawn, hf_config, make_hf, processor_of

QUESTION = "What color is the star?"


@pytest.mark.parametrize("sizes", [[WIDE], [TALL], [SQUARE, WIDE]])
def test_a_next_prompt_is_the_one_that_transformers_makes(sizes: list[tuple[int, int]]) -> None:
    processor, config = processor_of("next"), LLaVAConfig.from_hf(hf_config("next"))
    images = drawn(*sizes)
    inputs = prepare(QUESTION, images, config=config, processor=processor)
    theirs = processor(text=inputs.prompts[0], images=images, return_tensors="pt")
    assert torch.equal(inputs.input_ids, theirs["input_ids"])
    assert inputs.image_fields["image_sizes"].tolist() == theirs["image_sizes"].tolist()
    for own, tiles in zip(inputs.tiles, theirs["pixel_values"], strict=True):
        assert torch.equal(inputs.pixel_values[own.start : own.stop], tiles[: len(own)])
    assert [layout.original_size for layout in inputs.layouts] == sizes


@pytest.mark.parametrize("sizes", [[WIDE], [TALL], [(300, 310)], [SQUARE, WIDE]])
def test_onevision_takes_as_many_image_tokens_as_transformers_counts(sizes: list[tuple[int, int]]) -> None:
    processor, config = processor_of("onevision"), LLaVAConfig.from_hf(hf_config("onevision"))
    inputs = prepare(QUESTION, drawn(*sizes), config=config, processor=processor)

    class Theirs:
        """What LlavaOnevisionProcessor's methods ask of it; itself it cannot be made without torchvision."""

        num_image_tokens = config.vision.n_patches
        vision_feature_select_strategy, vision_aspect_ratio, image_token = "full", f"anyres_max_{MAX_TILES}", "<image>"
        image_processor = processor.image_processor
        _get_number_of_features = LlavaOnevisionProcessor._get_number_of_features
        _get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features

    made = processor.image_processor([drawn(*sizes)], return_tensors="pt")
    texts = [LlavaOnevisionProcessor.replace_image_token(Theirs(), made, i) for i in range(len(sizes))]
    assert [layout.n_features for layout in inputs.layouts] == [text.count("<image>") for text in texts]
    for own, tiles in zip(inputs.tiles, made["pixel_values"], strict=True):
        assert torch.equal(inputs.pixel_values[own.start : own.stop], tiles[: len(own)])
    assert inputs.image_fields["batch_num_images"].tolist() == made["batch_num_images"].tolist()


ONEVISION_CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_onevision_speaks_by_its_chat_template() -> None:
    config = LLaVAConfig.from_hf(hf_config("onevision"))
    processor = OnevisionProcessor(onevision_processor(TILES["onevision"]), make_tokenizer(), ONEVISION_CHAT)
    inputs = prepare([QUESTION, QUESTION], [drawn(WIDE), drawn(SQUARE, TALL)], config=config, processor=processor)
    assert inputs.prompts == tuple(
        f"<|im_start|>user {images}\n{QUESTION}<|im_end|><|im_start|>assistant\n"
        for images in ("<image>", "<image><image>")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_a_loaded_checkpoint(kind: str, tmp_path: Any) -> None:
    model = HookedLLaVA.from_hf(make_hf(kind), processor=processor_of(kind))
    model.save_pretrained(tmp_path / "saved")
    loaded = HookedLLaVA.from_pretrained(tmp_path / "saved")
    assert loaded.processor is not None, load_processor(tmp_path / "saved", loaded.config.model_type)[1]
    questions, images = [QUESTION, "Is this red?", "What shape?"], [drawn(WIDE), None, drawn(TALL, SQUARE)]
    inputs = loaded.prepare(questions, images)
    assert torch.equal(loaded(inputs), model(model.prepare(questions, images)))
    token_map = inputs.token_maps[0]
    assert len(token_map["image"]) == inputs.layouts[0].n_features
    assert [token_map.labels[p] for p in token_map["question"]] == ["What", "color", "is", "the", "star", "?"]
    assert token_map.labels[token_map["image"][0]] == "img.base[0,0]"


def test_a_processor_of_other_canvases_is_refused() -> None:
    config = LLaVAConfig.from_hf(hf_config("next", image_grid_pinpoints=[[56, 112]]))
    with pytest.raises(InputError, match="image_grid_pinpoints"):
        prepare(QUESTION, drawn(WIDE), config=config, processor=processor_of("next"))


def test_grids_of_an_image_are_spans_and_ends_of_edges() -> None:
    processor, config = processor_of("next"), LLaVAConfig.from_hf(hf_config("next"))
    inputs = prepare([QUESTION, QUESTION], [drawn(WIDE), None], config=config, processor=processor)
    token_map, without = inputs.token_maps
    assert token_map["base"] | token_map["fine"] == token_map["image"]
    assert token_map["base"].isdisjoint(token_map["fine"])
    assert len(token_map["base"]) == config.vision.n_patches
    assert token_map["image-base"] == token_map["fine"]
    newlines = {p for p in token_map["fine"] if "newline" in token_map.labels[p]}
    assert newlines
    assert set(token_map["newlines"]) == newlines
    assert token_map["fine-newlines"] == token_map.patches(grid="fine")
    assert "base" not in without
    assert token_map.with_spans(base=[3])["base"] == [3]
    assert "base" not in str(token_map)
