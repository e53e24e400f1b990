from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hooked_llava.analysis import (
    attention_knockout,
    heads_by_attention,
    logit_attribution,
    logit_lens,
    position_scores,
)
from hooked_llava.architecture import llava_layout
from hooked_llava.editing import EditRequest, multedit
from hooked_llava.errors import InputError, SpanError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import as_inputs, prepare
from hooked_llava.replay import Intervention, Replay
from tests.builders import IMAGE_TOKEN_ID
from tests.fixtures_processor import make_config, make_processor
from tests.layouts import IMAGE_ID, by_hand, inputs_of
from tests.messages import says
from tests.pairs import as_users_run, pair

CONFIG, PROCESSOR = make_config(), make_processor()
RED, BLUE, GREEN = (Image.new("RGB", (20, 30), color) for color in ("red", "blue", "green"))


def make_inputs(**settings: Any) -> Inputs:
    settings = {"config": CONFIG, "processor": PROCESSOR, "template": "llava-1.5", **settings}
    questions = ["Is it a red star?", "What is it?", "Is the star in the image?"]
    return prepare(questions, [RED, None, [BLUE, GREEN]], **settings)


def test_stands_where_tokens_stand() -> None:
    inputs = make_inputs()
    assert inputs.shape == inputs.input_ids.shape
    assert inputs.ndim == 2
    assert len(inputs) == 3
    assert inputs.device == torch.device("cpu")
    assert inputs.n_images == 3
    assert inputs.images_per_prompt == (1, 0, 2)
    assert repr(inputs) == f"Inputs(batch=3, positions={inputs.shape[1]}, images_per_prompt=(1, 0, 2))"


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_and_last(side: str) -> None:
    inputs = make_inputs(padding_side=side)
    assert torch.equal(inputs.image_mask, inputs.input_ids == IMAGE_TOKEN_ID)
    for row in range(3):
        assert inputs.last[row] == inputs.attention_mask[row].nonzero()[-1]
    assert bool(inputs.attention_mask[:, -1].all()) == (side == "left")


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        *((0, [0]), (2, [2]), (-1, [2]), (slice(1, 3), [1, 2])),
        *((slice(None, None, 2), [0, 2]), (slice(None, None, -1), [2, 1, 0])),
        *((torch.tensor([2, 0]), [2, 0]), ([1, -1, 1], [1, 2, 1]), (np.array([1]), [1])),
    ],
)
def test_slices_take_their_images_along(index: Any, rows: list[int]) -> None:
    inputs = make_inputs()
    part = inputs[index]
    images = [[0], [], [1, 2]]
    kept = [image for row in rows for image in images[row]]
    assert torch.equal(part.input_ids, inputs.input_ids[rows])
    assert torch.equal(part.attention_mask, inputs.attention_mask[rows])
    assert part.token_maps == tuple(inputs.token_maps[row] for row in rows)
    assert part.prompts == tuple(inputs.prompts[row] for row in rows)
    if kept:
        assert torch.equal(part.pixel_values, inputs.pixel_values[kept])
        assert part.images == tuple((RED, BLUE, GREEN)[image] for image in kept)
    else:
        assert part.pixel_values is None


def test_iterates_over_prompts() -> None:
    assert [len(one) for one in make_inputs()] == [1, 1, 1]
    assert [one.images_per_prompt for one in make_inputs()] == [(1,), (0,), (2,)]


def test_slicing_errors() -> None:
    inputs = make_inputs()
    for index in (3, -4):
        with says(f"prompt {index}.*0 to 2"):
            inputs[index]
    with says("prompt 3.*0 to 2"):
        inputs[[0, 3]]
    with says("3:None.*3 prompts"):
        inputs[3:]
    with says(r"prompts.*0\.\.2"):
        inputs[[]]
    with says(r"prompts.*whole numbers"), as_users_run():
        inputs[torch.tensor([True, False, True])]
    with says(r"by prompt only.*\(0, 1\)"), as_users_run():
        inputs[0, 1]


def test_token_map_of_the_only_prompt() -> None:
    inputs = make_inputs()
    assert inputs[1].token_map is inputs.token_maps[1]
    with says(r"3 prompts.*token.*inputs\.token_maps\[i\].*inputs\[i\]\.token_map"):
        inputs.token_map  # noqa: B018


def test_to() -> None:
    inputs = make_inputs()
    half = inputs.to("cpu", torch.bfloat16)
    assert half.pixel_values is not None
    assert half.pixel_values.dtype == torch.bfloat16
    assert half.input_ids.dtype == torch.int64
    assert inputs.pixel_values is not None
    assert inputs.pixel_values.dtype == torch.float32
    assert inputs.to("cpu", torch.float32) is inputs
    assert inputs.to() is inputs
    moved = inputs.to("meta")
    assert moved.device.type == "meta"
    assert moved.attention_mask.device.type == "meta"


def test_padded_left() -> None:
    left, right = make_inputs(padding_side="left"), make_inputs(padding_side="right")
    moved = right.padded_left()
    assert torch.equal(moved.input_ids, left.input_ids)
    assert torch.equal(moved.attention_mask, left.attention_mask)
    assert torch.equal(moved.image_mask, left.image_mask)
    assert torch.equal(moved.last, left.last)
    assert [m.spans for m in moved.token_maps] == [m.spans for m in left.token_maps]
    ids = {"input_ids": [[1, 7, 8]], "attention_mask": [[1, 1, 0]], "position_ids": [[4, 5, 0]]}
    moved = as_inputs(ids, config=CONFIG).padded_left()
    assert moved.position_ids is not None
    assert moved.position_ids.tolist() == [[0, 4, 5]]


def test_with_spans() -> None:
    inputs = make_inputs()
    words = inputs.with_spans(verb=["Is", "is", "Is"], mark="?")
    for row, verb in enumerate(["Is", "is", "Is"]):
        assert words.token_maps[row]["verb"] == inputs.token_maps[row].find(verb)
        assert words.token_maps[row]["mark"] == inputs.token_maps[row].find("?")
    assert inputs[0].with_spans(mine=[inputs[0].token_map.real[1]]).token_map["mine"]
    each = [[m.real[1], m.real[2]] for m in inputs.token_maps]
    own = inputs.with_spans(mine=each, first=[[m.real[0]] for m in inputs.token_maps])
    assert [m["mine"].tolist() for m in own.token_maps] == each
    assert [m["first"].tolist() for m in own.token_maps] == [[m.real[0]] for m in inputs.token_maps]
    with says("'verb'.*2 entries.*3 prompts.*words.*entry.*prompt"):
        inputs.with_spans(verb=["Is", "is"])
    with says("'mine'.*1 entry.*3 prompts.*words.*entry.*prompt"):
        inputs.with_spans(mine=[4, 5])
    with pytest.raises(SpanError, match="'red'.*prompt"):
        inputs.with_spans(color="red")


def test_with_boxes() -> None:
    inputs = make_inputs()
    left, low, everything = (0, 0, 4, 15), (0, 16, 12, 20), (0, 0, 200, 300)
    found = inputs.with_boxes(object=[[left], [], [left, low]], whole=[[everything], [], [everything]])
    for row, boxes in ((0, [left]), (2, [left, low])):
        token_map = inputs.token_maps[row]
        expected = token_map.box_to_patches(boxes[0], coverage=0)
        for box in boxes[1:]:
            expected = expected | token_map.box_to_patches(box, coverage=0)
        assert found.token_maps[row]["object"] == expected
        assert found.token_maps[row]["whole"] == token_map.patches()
    assert "object" not in found.token_maps[1]
    touched = inputs[0].with_boxes(object=[(0, 6, 1, 7)])
    assert touched.token_map["object"] == [inputs[0].token_map.patch_to_position(0, 0)]
    with pytest.raises(SpanError, match="patch.*image 0"):
        inputs[0].with_boxes(coverage=0.9, object=[(0, 6, 1, 7)])
    with says(r"boxes.*'object'.*2 lists.*3 prompts.*list.*boxes \(x0, y0, x1, y1\)"):
        inputs.with_boxes(object=[[left], [low]])


def test_prints_its_prompts() -> None:
    text = str(make_inputs())
    assert text.startswith(
        f"3 prompts, {make_inputs().shape[1]} positions, 3 images of 2 x 2 patches (float32), on cpu\n"
    )
    assert "\nprompt 2\n" in text
    assert "<image> x4" in text
    assert "image 1" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "prompt 0" not in str(make_inputs()[0])
    assert str(make_inputs()[1]).startswith(f"1 prompt, {make_inputs().shape[1]} positions, no image, on cpu\n")
    many = prepare(["What is it?"] * 10, config=CONFIG, processor=PROCESSOR)
    assert str(many).endswith("and 2 more prompts: print(inputs[8:])")


# ---------------------------------------------------------------------- errors of one prompt among several


MODEL = HookedLLaVA.from_hf(pair().hf, processor=make_processor())
ASKED = ["Who made the star?", "What color is the red circle, the blue square and the green star in this image?"]
SHOWN = "What color is the red circle, the blue square and the gre..."


@pytest.mark.parametrize(
    ("use", "row"),
    [
        (lambda inputs: inputs.with_spans(thing="made"), 1),
        (lambda inputs: inputs.with_spans(thing=["star", [900]]), 1),
        (lambda inputs: inputs.with_boxes(thing=[[], [(0, 0, 1, 1)]]), 1),
        (lambda inputs: MODEL.run_with_cache(inputs, positions="made"), 0),
        (lambda inputs: Replay(MODEL, inputs).run([[Intervention(("resid_pre", 1), positions="made", zero=True)]]), 0),
        (lambda inputs: logit_lens(MODEL, inputs, positions=[900]), 0),
        (lambda inputs: logit_attribution(MODEL, inputs, position="made"), 0),
        (lambda inputs: position_scores(MODEL, inputs, positions="made"), 0),
        (lambda inputs: heads_by_attention(MODEL, inputs, "made"), 0),
        (lambda inputs: attention_knockout(MODEL, inputs, "object->last"), 0),
        (lambda inputs: MODEL.prepare(ASKED, options=[["star"], ["two"]]), 1),
        (lambda inputs: MODEL.prepare([ASKED[0], "Is it <image>?"]), 1),
        (
            lambda inputs: multedit(
                MODEL, EditRequest(ASKED, "red", constraint="made"), layer=1, position="constraint"
            ),
            1,
        ),
    ],
)
def test_errors_name_the_prompt_by_number_and_words(use: Any, row: int) -> None:
    inputs = MODEL.prepare(ASKED, padding_side="right")
    with pytest.raises((InputError, SpanError), match=rf"^Prompt {row} \('") as caught:
        use(inputs)
    assert str(caught.value).count("Prompt ") == 1
    if row == 0:
        assert repr(ASKED[0]) in str(caught.value)
    elif "<image>" not in str(caught.value):
        assert repr(SHOWN) in str(caught.value)
    assert str(caught.value) == str(caught.value.args[0])


def test_a_single_prompt_is_not_numbered() -> None:
    inputs = MODEL.prepare(ASKED[0])
    for use in (lambda: inputs.with_spans(thing="red"), lambda: logit_lens(MODEL, inputs, positions="red")):
        with pytest.raises(SpanError) as caught:
            use()
        assert "Prompt 0" not in str(caught.value)


def test_prompts_without_words_are_named_by_number() -> None:
    given = pair().prompt(batch=2)
    with pytest.raises(SpanError, match=r"^Prompt 1: .*\[900\]"):
        pair().ours.as_inputs(given).with_spans(thing=[[3], [900]])


def test_each_gives_what_the_function_makes_of_every_entry() -> None:
    inputs = MODEL.prepare(ASKED)
    assert inputs.each(lambda prompt, name: (len(prompt), name), inputs, "ab") == [(1, "a"), (1, "b")]


# Images of unequal layouts in one batch


def test_a_batch_of_images_with_different_layouts() -> None:
    inputs = inputs_of([by_hand(), llava_layout(2, 2)], [], [llava_layout(1, 3)])
    assert torch.equal(inputs.image_mask, inputs.input_ids == IMAGE_ID)
    assert inputs.image_mask.sum(1).tolist() == [18, 0, 3]
    assert "3 images of 2 x 3 + 2 x 2 or 2 x 2 or 1 x 3 patches" in str(inputs)
    left = inputs.padded_left()
    assert torch.equal(left.image_mask, left.input_ids == IMAGE_ID)
    for row in range(3):
        by = inputs.shape[1] - inputs.token_maps[row].real.stop
        assert left.token_maps[row]["text"] == [p + by for p in inputs.token_maps[row]["text"]]
        for image, layout in enumerate(inputs.token_maps[row].layouts):
            assert left[row].token_map.layout(image) is layout
            assert left[row].token_map.patches(image) == [p + by for p in inputs.token_maps[row].patches(image)]
    boxes = inputs[0].with_boxes(object=[(0, 0, 8, 8)])
    assert boxes.token_map["object"] == boxes.token_map.box_to_patches((0, 0, 8, 8), coverage=0)
    assert [boxes.token_map.cell_at(p)[1].grid for p in boxes.token_map["object"]] == ["base", "fine"]
