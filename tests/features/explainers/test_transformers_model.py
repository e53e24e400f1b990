"""A model of transformers as an explainer, on a tiny random checkpoint that is saved and loaded here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hooked_llava.errors import InputError
from hooked_llava.features.explainers.transformers_model import TransformersExplainer
from hooked_llava.loading.embedded import embedded_folder
from hooked_llava.toy.scenes import draw_scene
from tests.builders import make_hf_model

RNG = np.random.default_rng(0)
IMAGES = [Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's processor, and random weights that speak through it."""
    place = tmp_path_factory.mktemp("tiny")
    processor = AutoProcessor.from_pretrained(embedded_folder("tiny-shapes"))
    like = AutoModelForImageTextToText.from_pretrained(embedded_folder("tiny-shapes")).config
    model = make_hf_model(
        image_size=64,
        image_token_id=like.image_token_id,
        vision_feature_layer=like.vision_feature_layer,
        text={"vocab_size": like.text_config.vocab_size},
    )
    model.generation_config.eos_token_id = None
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_the_answer_is_the_most_probable_one_step_by_step(folder: Path, n_images: int) -> None:
    images = IMAGES[:n_images]
    said = TransformersExplainer.from_pretrained(folder, max_new_tokens=4)(images, "What is there?")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    text = "USER: " + n_images * "<image>\n" + "What is there? Answer briefly. ASSISTANT:"
    inputs = dict(processor(text=text, images=images or None, return_tensors="pt"))
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        for _ in range(4):
            best = model(**inputs).logits[:, -1].argmax(-1, keepdim=True)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], best], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert said == processor.decode(inputs["input_ids"][0, start:], skip_special_tokens=True).strip()


def test_images_change_the_answer_of_a_model_that_sees() -> None:
    explainer = TransformersExplainer.from_pretrained(embedded_folder("tiny-shapes"), max_new_tokens=1)
    colors = [
        explainer([draw_scene([("star", color, (24, 24))])], "What color is the star?") for color in ("red", "blue")
    ]
    assert colors == ["Red", "Blue"]


def test_dtype_and_length(folder: Path) -> None:
    explainer = TransformersExplainer.from_pretrained(folder, dtype=torch.float16, max_new_tokens=2)
    assert explainer.model.dtype == torch.float16
    assert not explainer.model.training
    assert isinstance(explainer(IMAGES[:1], "What?"), str)
    with pytest.raises(InputError, match=r"max_new_tokens=0"):
        TransformersExplainer(None, None, max_new_tokens=0)
