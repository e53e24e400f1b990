from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.architecture import llava_layout
from hooked_llava.errors import InputError
from hooked_llava.prompt import validation as check
from tests.builders import D_VOCAB, IMAGE_TOKEN_ID
from tests.fixtures_processor import make_config

CONFIG = make_config()  # 16 x 16 pixels, 2 x 2 patches
IDS = torch.tensor([[1, 7, 8, 9]])
IMAGE = [IMAGE_TOKEN_ID] * 4


def says(message: str) -> Any:
    return pytest.raises(InputError, match=re.escape(message))


def test_keys() -> None:
    given = check.check_keys({"input_ids": 1, "attention_mask": None, "token_type_ids": 3, "mm_token_type_ids": 4})
    assert given == {"input_ids": 1}
    with says(
        "Unknown input 'pixel_value'. Did you mean: pixel_values? Expected input_ids, attention_mask, pixel_values, "
    ):
        check.check_keys({"pixel_value": 1, "input_ids": 1})
    with says(
        "pixel_values are given without input_ids; expected token ids [batch, position], with <image> tokens for the "
    ):
        check.check_keys({"pixel_values": 1})
    with says("There are no input_ids; expected token ids [batch, position]"):
        check.check_keys({"input_ids": None})


def test_as_tensor() -> None:
    assert check.as_tensor([[1, 2]], "input_ids").tolist() == [[1, 2]]
    assert check.as_tensor(np.array([1.5]), "pixel_values").tolist() == [1.5]
    assert check.as_tensor(IDS, "input_ids") is IDS
    with pytest.raises(
        InputError,
        match='input_ids.*tensor.*rows.*processor.*return_tensors="pt".*padding=True',
    ):
        check.as_tensor([[1, 2], [1]], "input_ids")
    with pytest.raises(InputError, match="input_ids.*tensor"):
        check.as_tensor("abc", "input_ids")


def test_token_ids() -> None:
    assert check.check_token_ids(IDS[0].int(), CONFIG).tolist() == IDS.tolist()
    assert check.check_token_ids(IDS[0].int(), CONFIG).dtype == torch.int64
    for wrong in (IDS.float(), IDS.bool(), IDS.to(torch.complex64)):
        with says(f"input_ids are {str(wrong.dtype).removeprefix('torch.')}; expected integers (token ids)."):
            check.check_token_ids(wrong, CONFIG)
    for wrong in (IDS[None], torch.zeros(1, 0, dtype=torch.int64), torch.tensor(3)):
        with says(f"input_ids have shape {list(wrong.shape)}; expected [position] or [batch, position], not empty."):
            check.check_token_ids(wrong, CONFIG)
    for wrong, low, high in (([1, -1], -1, 1), ([1, D_VOCAB], 1, D_VOCAB)):
        with says(
            f"input_ids go from {low} to {high}; expected 0 to 98, the model's vocabulary. Use the tokenizer of this "
        ):
            check.check_token_ids(torch.tensor(wrong), CONFIG)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("row", [[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0]])
def test_masks_of_zeros_and_ones(dtype: torch.dtype, row: list[int]) -> None:
    mask = check.check_mask(torch.tensor([row], dtype=dtype), IDS)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [row]
    assert check.check_mask(torch.tensor(row, dtype=dtype), IDS).shape == IDS.shape


def test_masks() -> None:
    assert check.check_mask(None, IDS).all()
    with says("attention_mask is float32; expected bool, or integers 0 and 1 (1 for real tokens)."):
        check.check_mask(torch.ones(1, 4), IDS)
    with says("attention_mask has shape [1, 3] and input_ids [1, 4]; expected the same."):
        check.check_mask(torch.ones(1, 3, dtype=torch.int64), IDS)
    with says("attention_mask has values from 1 to 2; expected 1 for real tokens and 0 for padding."):
        check.check_mask(torch.tensor([[1, 2, 1, 1]]), IDS)
    with says("attention_mask of prompt 1 has no real token; drop the row."):
        check.check_mask(torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), IDS.expand(2, 4))
    with says(
        "attention_mask of prompt 0 has padding between real tokens; expected padding on the left or on the right "
        "only. To cut an attention edge, use an intervention."
    ):
        check.check_mask(torch.tensor([[1, 0, 1, 1]]), IDS)


def test_padding_on_both_sides_is_a_single_stretch_of_text() -> None:
    assert check.check_mask(torch.tensor([[0, 1, 1, 0]]), IDS).tolist() == [[False, True, True, False]]


def test_length_counts_real_tokens() -> None:
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[:, :100] = False
    check.check_length(mask, CONFIG)
    mask[1] = True
    with says(
        "Prompt 1 has 300 tokens, image tokens included; the model was made for at most 256. Shorten the prompt or "
    ):
        check.check_length(mask, CONFIG)


@pytest.mark.parametrize(
    ("row", "starts"),
    [
        ([1, 7, 8], ()),
        ([1, *IMAGE, 7], (1,)),
        ([*IMAGE, *IMAGE, 7], (0, 4)),
        ([1, *IMAGE, 7, *IMAGE], (1, 6)),
    ],
)
def test_images_are_found(row: list[int], starts: tuple[int, ...]) -> None:
    ids = torch.tensor([row])
    assert check.find_images(ids, torch.ones_like(ids, dtype=torch.bool), CONFIG) == [starts]


def test_image_tokens_come_in_whole_images() -> None:
    for row, message in (
        (
            [1, *IMAGE[:3], 7],
            "Prompt 0 has 3 <image> tokens in a row from position 1, which is 0 images and 3 tokens; ",
        ),
        (
            [1, *IMAGE, *IMAGE[:2]],
            "Prompt 0 has 6 <image> tokens in a row from position 1, which is 1 image and 2 tokens; ",
        ),
        (
            [*IMAGE[:2], 7, *IMAGE[:2]],
            "Prompt 0 has 2 <image> tokens in a row from position 0, which is 0 images and 2 ",
        ),
    ):
        ids = torch.tensor([row])
        with says(message):
            check.find_images(ids, torch.ones_like(ids, dtype=torch.bool), CONFIG)
    full = make_config(select_strategy="full")
    ids = torch.tensor([[1, *IMAGE]])
    with says(
        "expected 5 per image. A processor writes as many if you set "
        "processor.patch_size = 8; processor.num_additional_image_tokens = 1; "
        "processor.vision_feature_select_strategy = 'full'; do not cut prompts short."
    ):
        check.find_images(ids, torch.ones_like(ids, dtype=torch.bool), full)


def test_image_tokens_are_not_padding() -> None:
    ids = torch.tensor([[1, 7, 7, 7, 7], [*IMAGE, 7]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :2] = False
    with says("Prompt 1 has image tokens that attention_mask marks as padding; expected them unmasked."):
        check.find_images(ids, mask, CONFIG)


def test_pixels() -> None:
    pixels = torch.rand(2, 3, 16, 16)
    assert check.check_pixels(pixels, CONFIG) is pixels
    with says(
        "pixel_values are uint8; expected floats, normalised by the image processor. For raw images use prepare("
    ):
        check.check_pixels(pixels.to(torch.uint8), CONFIG)
    for wrong in (pixels[0], pixels[:, :1], torch.rand(2, 3, 16, 17), torch.rand(2, 16, 16, 3)):
        with says(
            f"pixel_values have shape {list(wrong.shape)}; expected [image, 3, 16, 16] (image, channel, height, "
        ):
            check.check_pixels(wrong, CONFIG)
    for bad in (float("nan"), float("inf")):
        broken = pixels.clone()
        broken[1, 0, 3, 3] = bad
        with says("pixel_values of image 1 are not all finite (NaN or infinity)."):
            check.check_pixels(broken, CONFIG)


def test_images_match() -> None:
    check.check_images([1, 0, 2], 3)
    check.check_images([0], None)
    with says("input_ids show 2 images but no pixel_values are given: image tokens without images would run as text."):
        check.check_images([2], None)
    with says(
        "input_ids show 1 image (per prompt: [1, 0]) and pixel_values hold 2; expected as many. Give one image per "
    ):
        check.check_images([1, 0], 2)
    with says("input_ids show 0 images (per prompt: [0]) and pixel_values hold 1; expected as many."):
        check.check_images([0], 1)


def test_position_ids() -> None:
    assert check.check_position_ids(None, IDS) is None
    positions = check.check_position_ids(torch.arange(4).int(), IDS)
    assert positions is not None
    assert positions.tolist() == [[0, 1, 2, 3]]
    with says("position_ids are float32; expected integers."):
        check.check_position_ids(torch.rand(1, 4), IDS)
    with says("position_ids have shape [1, 3] and input_ids [1, 4]; expected the same."):
        check.check_position_ids(torch.arange(3), IDS)
    with says("position_ids go down to -1; expected 0 and above."):
        check.check_position_ids(torch.arange(4) - 1, IDS)


def test_layouts() -> None:
    check.check_layouts([], CONFIG)
    check.check_layouts([llava_layout(2, 2)] * 2, CONFIG)
    with says(
        "These inputs were prepared for a model with 9 positions per image; this one has 4. Call prepare(...) of the "
    ):
        check.check_layouts([llava_layout(2, 2), llava_layout(3, 3)], CONFIG)
