"""What the authors' notebook printed for LLaVA-1.5-7B (Yu & Ananiadou, arXiv 2411.10950), found again by our code.

Needs the real weights and the image; skipped unless both are named:

    HOOKED_LLAVA_MODEL   llava-hf/llava-1.5-7b-hf, or a folder that holds it
    HOOKED_LLAVA_IMAGE COCO val2017 000000219578.jpg, a dog
    HOOKED_LLAVA_DEVICE  "cuda" with 30 GB for float32, in which the numbers were printed; "cpu" by default
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import pytest
import torch

from hooked_llava import HookedLLaVA
from hooked_llava.analysis.head_readings import head_readings
from hooked_llava.analysis.head_scores import head_scores, position_scores, top_heads
from hooked_llava.analysis.next_tokens import next_tokens
from hooked_llava.analysis.patch_importance import patch_importance
from hooked_llava.prompt.inputs import Inputs

pytestmark = pytest.mark.requires_weights

PROMPT = "USER: <image>\nWhat is the color of the dog?\nASSISTANT: The color of the dog is"
NEXT_TOKENS = (17354, 4628, 263, 24841, 10345, 6501, 4796, 367, 2654, 3578)  # brown black a orange tan dark white ...
HEAD_SCORES = {
    (22, 27): 1.0399,
    (19, 6): 1.0166,
    (22, 17): 0.6654,
    (15, 19): 0.3564,
    (24, 3): 0.3344,
    (21, 28): 0.2939,
    (18, 31): 0.2697,
    (16, 5): 0.1993,
    (20, 20): 0.1847,
    (21, 9): 0.1476,
    (14, 27): 0.1475,
    (15, 22): 0.1456,
}
# What head 22.27 reads, the best first: position, score, attention.
POSITIONS = (
    (229, 0.1699, 0.1189),
    (276, 0.1476, 0.0902),
    (251, 0.1298, 0.0746),
    (285, 0.0875, 0.0733),
    (246, 0.0690, 0.0532),
    (256, 0.0489, 0.0467),
)
LAYER_INPUT = ("dog", "ish", "colored", "Dog", "dogs")  # what is in the stream at 229, where the head looks
BEST = (22, 27)
CLOSE = 0.02  # the notebook's transformers resized images by another implementation


class Golden(NamedTuple):
    model: HookedLLaVA
    inputs: Inputs


@pytest.fixture(scope="module")
def golden() -> Golden:
    name, image = os.environ.get("HOOKED_LLAVA_MODEL"), os.environ.get("HOOKED_LLAVA_IMAGE")
    if not name or not image:
        pytest.skip("needs LLaVA-1.5-7B and an image: set HOOKED_LLAVA_MODEL and HOOKED_LLAVA_IMAGE")
    device = os.environ.get("HOOKED_LLAVA_DEVICE", "cpu")
    model = HookedLLaVA.from_pretrained(name, dtype=torch.float32, device=device)
    if (model.cfg.n_layers, model.cfg.n_heads) != (32, 32):
        pytest.skip(f"{name} is not LLaVA-1.5-7B")
    return Golden(model, model.prepare(PROMPT, image, template=None))


def test_the_ten_most_probable_next_tokens(golden):
    found = next_tokens(golden.model, golden.inputs, k=len(NEXT_TOKENS)).token_id.values[0]
    assert found.tolist() == list(NEXT_TOKENS)


def test_head_scores(golden):
    scores = head_scores(golden.model, golden.inputs)
    best = top_heads(scores, len(HEAD_SCORES))
    assert best[:9] == list(HEAD_SCORES)[:9]
    assert set(best) == set(HEAD_SCORES)  # the last three lie within 0.002 of each other
    for (layer, head), expected in HEAD_SCORES.items():
        assert float(scores[layer, head]) == pytest.approx(expected, abs=CLOSE)


def test_positions_that_the_best_head_reads(golden):
    """Positions are compared among each other, for it is not printed whether they count from the prompt or the image."""
    read = position_scores(golden.model, golden.inputs, heads=[BEST], positions="image")
    order = np.argsort(-read.score.values[0])[: len(POSITIONS)]
    places, scores, attention = (np.array(column) for column in zip(*POSITIONS, strict=True))
    found = read.position.values[order]
    assert (found - found[0]).tolist() == (places - places[0]).tolist()
    assert read.score.values[0][order] == pytest.approx(scores, abs=CLOSE)
    assert read.attention.values[0][order] == pytest.approx(attention, abs=CLOSE)


def test_what_the_best_head_takes_from_there_is_the_color(golden):
    words = head_readings(golden.model, golden.inputs, *BEST, top=3, k=3).token
    taken = words.sel(reading="value_output").values
    assert all(word.strip().lower().startswith("brow") for word in taken.ravel())


def test_where_the_best_head_looks_most_the_stream_names_the_animal(golden):
    words = head_readings(golden.model, golden.inputs, *BEST, top=1, k=len(LAYER_INPUT)).token
    read = words.sel(reading="layer_input").values[0]
    assert [word.strip() for word in read] == list(LAYER_INPUT)


def test_the_map_is_that_heads(golden):
    importance = patch_importance(golden.model, golden.inputs)
    assert importance.heads == ["22.27"]
    assert importance.sizes["patch_row"] == importance.sizes["patch_col"] == 24
