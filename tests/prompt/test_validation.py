from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from hooked_llava.architecture import llava_layout
from hooked_llava.errors import InputError
from hooked_llava.prompt import validation as check
from tests.builders import D_VOCAB, IMAGE_TOKEN_ID
from tests.fixtures_processor import make_config
from tests.messages import says

CONFIG = make_config()  # 16 x 16 pixels, 2 x 2 patches
IDS = torch.tensor([[1, 7, 8, 9]])
IMAGE = [IMAGE_TOKEN_ID] * 4


def test_keys() -> None:
    given = check.check_keys({"input_ids": 1, "attention_mask": None, "token_type_ids": 3, "mm_token_type_ids": 4})
    assert given == {"input_ids": 1}
    with says(r"'pixel_value'.*pixel_values\?.*input_ids, attention_mask, pixel_values"):
        check.check_keys({"pixel_value": 1, "input_ids": 1})
    with says(r"pixel_values.*input_ids.*token.*\[batch, position\].*<image> tokens"):
        check.check_keys({"pixel_values": 1})
    with says(r"input_ids.*token.*\[batch, position\]"):
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
        with says(rf"input_ids.*{str(wrong.dtype).removeprefix('torch.')}.*integers \(token ids\)"):
            check.check_token_ids(wrong, CONFIG)
    for wrong in (IDS[None], torch.zeros(1, 0, dtype=torch.int64), torch.tensor(3)):
        with says(rf"input_ids.*{re.escape(str(list(wrong.shape)))}.*\[position\].*\[batch, position\].*empty"):
            check.check_token_ids(wrong, CONFIG)
    for wrong, low, high in (([1, -1], -1, 1), ([1, D_VOCAB], 1, D_VOCAB)):
        with says(f"input_ids.*{low} to {high}.*0 to 98.*vocabulary"):
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
    with says(r"attention_mask.*float32.*bool.*integers 0 and 1 \(1.*tokens\)"):
        check.check_mask(torch.ones(1, 4), IDS)
    with says(r"attention_mask.*\[1, 3\].*input_ids \[1, 4\]"):
        check.check_mask(torch.ones(1, 3, dtype=torch.int64), IDS)
    with says("attention_mask.*values.*1 to 2.*1.*tokens.*0.*padding"):
        check.check_mask(torch.tensor([[1, 2, 1, 1]]), IDS)
    with says("attention_mask.*prompt 1.*token"):
        check.check_mask(torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), IDS.expand(2, 4))
    with says("attention_mask.*prompt 0.*padding.*tokens.*padding"):
        check.check_mask(torch.tensor([[1, 0, 1, 1]]), IDS)


def test_padding_on_both_sides_is_a_single_stretch_of_text() -> None:
    assert check.check_mask(torch.tensor([[0, 1, 1, 0]]), IDS).tolist() == [[False, True, True, False]]


def test_length_counts_real_tokens() -> None:
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[:, :100] = False
    check.check_length(mask, CONFIG)
    mask[1] = True
    with says("Prompt 1.*300 tokens, image tokens.*model.*256.*prompt"):
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
            "Prompt 0.*3 <image> tokens.*position 1.*0 images and 3 tokens",
        ),
        (
            [1, *IMAGE, *IMAGE[:2]],
            "Prompt 0.*6 <image> tokens.*position 1.*1 image and 2 tokens",
        ),
        (
            [*IMAGE[:2], 7, *IMAGE[:2]],
            "Prompt 0.*2 <image> tokens.*position 0.*0 images and 2",
        ),
    ):
        ids = torch.tensor([row])
        with says(message):
            check.find_images(ids, torch.ones_like(ids, dtype=torch.bool), CONFIG)
    full = make_config(select_strategy="full")
    ids = torch.tensor([[1, *IMAGE]])
    with says(
        r"5 per image.*processor\.patch_size = 8; processor\.num_additional_image_tokens = 1; "
        r"processor\.vision_feature_select_strategy = 'full'"
    ):
        check.find_images(ids, torch.ones_like(ids, dtype=torch.bool), full)


def test_image_tokens_are_not_padding() -> None:
    ids = torch.tensor([[1, 7, 7, 7, 7], [*IMAGE, 7]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :2] = False
    with says("Prompt 1.*image tokens.*attention_mask.*padding"):
        check.find_images(ids, mask, CONFIG)


def test_pixels() -> None:
    pixels = torch.rand(2, 3, 16, 16)
    assert check.check_pixels(pixels, CONFIG) is pixels
    with says(r"pixel_values.*uint8.*floats.*image processor.*images.*prepare\("):
        check.check_pixels(pixels.to(torch.uint8), CONFIG)
    for wrong in (pixels[0], pixels[:, :1], torch.rand(2, 3, 16, 17), torch.rand(2, 16, 16, 3)):
        with says(rf"pixel_values.*{re.escape(str(list(wrong.shape)))}.*\[image, 3, 16, 16\] \(image.*height"):
            check.check_pixels(wrong, CONFIG)
    for bad in (float("nan"), float("inf")):
        broken = pixels.clone()
        broken[1, 0, 3, 3] = bad
        with says(r"pixel_values.*image 1.*finite \(NaN.*infinity\)"):
            check.check_pixels(broken, CONFIG)


def test_images_match() -> None:
    check.check_images([1, 0, 2], 3)
    check.check_images([0], None)
    with says("input_ids.*2 images.*pixel_values.*image tokens.*images.*text"):
        check.check_images([2], None)
    with says(r"input_ids.*1 image \(per prompt: \[1, 0\]\).*pixel_values.*2.*image"):
        check.check_images([1, 0], 2)
    with says(r"input_ids.*0 images \(per prompt: \[0\]\).*pixel_values.*1"):
        check.check_images([0], 1)


def test_position_ids() -> None:
    assert check.check_position_ids(None, IDS) is None
    positions = check.check_position_ids(torch.arange(4).int(), IDS)
    assert positions is not None
    assert positions.tolist() == [[0, 1, 2, 3]]
    with says("position_ids.*float32.*integers"):
        check.check_position_ids(torch.rand(1, 4), IDS)
    with says(r"position_ids.*\[1, 3\].*input_ids \[1, 4\]"):
        check.check_position_ids(torch.arange(3), IDS)
    with says("position_ids.*-1.*0"):
        check.check_position_ids(torch.arange(4) - 1, IDS)


def test_layouts() -> None:
    check.check_layouts([], CONFIG)
    check.check_layouts([llava_layout(2, 2)] * 2, CONFIG)
    with says(r"model.*9 positions.*image.*4.*prepare\(\.\.\.\)"):
        check.check_layouts([llava_layout(2, 2), llava_layout(3, 3)], CONFIG)
