"""CLIP's similarity on a tiny random CLIP that is saved and loaded here, against its towers and projections by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hooked_llava.features.clip_score import ClipSimilarity
from tests.oracles.plain_scores import plain_clip_scores

RNG = np.random.default_rng(0)
IMAGES = [Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((20, 30), (40, 20), (32, 32))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("clip")
    letters = [chr(i) for i in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (place / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"), model_max_length=12)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2, "pad_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": len(words), "max_position_embeddings": 12, **ends},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=10,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(place)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(place)
    return place


def test_it_is_100_times_the_cosine(folder: Path) -> None:
    clip = ClipSimilarity.from_pretrained(folder)
    for phrase in ("red star", "ring"):
        expected = plain_clip_scores(clip.model, clip.processor, IMAGES, phrase)
        found = clip(IMAGES, phrase)
        assert found == pytest.approx(expected, abs=1e-3)
        assert max(np.abs(found)) <= 100
    assert clip(IMAGES[:1], "red star") == pytest.approx(clip(IMAGES, "red star")[:1], abs=1e-4)
    assert clip(IMAGES, "red star") != pytest.approx(clip(IMAGES, "ring"), abs=1e-2)


def test_long_phrases_are_cut(folder: Path) -> None:
    clip = ClipSimilarity.from_pretrained(folder)
    assert np.isfinite(clip(IMAGES, "abcdefghijklmnopqrstuvwxyz " * 3)).all()


def test_other_modes_of_images(folder: Path) -> None:
    clip = ClipSimilarity.from_pretrained(folder)
    gray = Image.fromarray(RNG.integers(0, 256, (32, 32), dtype=np.uint8))
    assert clip([gray], "ring") == pytest.approx(clip([gray.convert("RGB")], "ring"))
