from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hooked_llava.architecture import Cell, llava_layout
from hooked_llava.errors import InputError, SpanError
from hooked_llava.prompt.positions import Positions
from hooked_llava.prompt.prepare import prepare
from hooked_llava.prompt.token_map import SPANS, TokenMap
from tests.fixtures_processor import make_config, make_processor
from tests.layouts import DRAWN, by_hand, made, map_of

QUESTION = "Is the star red or blue?"
PARTS = ("system", "image", "question", "rest", "last")
CONFIG, PROCESSOR = make_config(32), make_processor(32)  # 4 x 4 patches
METASPACE = make_processor(32, metaspace=True)
WIDE = Image.new("RGB", (100, 50))  # the crop sees x from 25 to 75


def make_map(question: str = QUESTION, images: Any = WIDE, **settings: Any) -> TokenMap:
    settings = {"processor": PROCESSOR, "config": CONFIG, "template": "tiny-shapes", **settings}
    return prepare(question, images, **settings).token_map


def spelt(token_map: TokenMap, positions: Positions) -> str:
    labels = token_map.labels
    return " ".join(labels[position] for position in positions)


def test_spans_by_name() -> None:
    token_map = make_map(options=["red", "blue"])
    assert spelt(token_map, token_map["system"]) == "<s> USER:"
    assert token_map["image"] == range(2, 18)
    assert spelt(token_map, token_map["question"]) == "Is the star red or blue ?"
    assert spelt(token_map, token_map["options"]) == "red blue"
    assert spelt(token_map, token_map["question"] - token_map["options"]) == "Is the star or ?"
    assert spelt(token_map, token_map["rest"]) == "Answer briefly ."
    assert spelt(token_map, token_map["last"]) == "ASSISTANT:"
    assert token_map["text"] == token_map["system"] | token_map["question"] | token_map["rest"] | token_map["last"]


def test_answer_prefix_is_rest_and_its_end_is_last() -> None:
    token_map = make_map("What color is the star?", answer_prefix="The color is", tail=None)
    assert spelt(token_map, token_map["rest"]) == "ASSISTANT: The color"
    assert spelt(token_map, token_map["last"]) == "is"


def test_a_question_that_ends_the_prompt_leaves_its_last_token_to_last() -> None:
    token_map = make_map(template="plain")
    assert spelt(token_map, token_map["question"]) == "Is the star red or blue"
    assert spelt(token_map, token_map["last"]) == "?"
    assert spelt(token_map, token_map["system"]) == "<s>"
    assert not token_map["rest"]


def test_text_only() -> None:
    token_map = make_map(images=None)
    assert spelt(token_map, token_map["system"]) == "<s> USER:"
    assert spelt(token_map, token_map["rest"]) == "Answer briefly ."
    assert "image" not in token_map
    assert "image" not in token_map.spans
    with pytest.raises(SpanError, match="prompt.*span 'image'.*prompt.*image"):
        token_map["image"]


def test_several_images() -> None:
    token_map = make_map("Is <image> and <image>?", [WIDE, WIDE])
    assert token_map.n_images == 2
    assert token_map.image() == token_map["image", 0] == range(3, 19)
    assert token_map["image", 1] == token_map.image(1) == range(20, 36)
    assert token_map["image"] == token_map.image(0) | token_map.image(1)
    assert spelt(token_map, token_map["question"]) == "Is and ?"
    assert token_map.labels[3] == "img0[0,0]"
    assert token_map.labels[35] == "img1[3,3]"
    for image in (2, -1):
        with pytest.raises(SpanError, match=f"image {image}.*prompt has 2 images.*from 0"):
            token_map.image(image)
    with pytest.raises(SpanError, match=r"token_map\['question', 1\].*'image'.*the 1"):
        token_map["question", 1]


WORDS = st.lists(
    st.sampled_from(["What", "color", "is", "the", "star", "red", "blue", "?", "<image>"]), min_size=1, max_size=8
)


@given(rows=st.lists(WORDS, min_size=1, max_size=3), side=st.sampled_from(["left", "right"]), data=st.data())
@settings(max_examples=25)
def test_parts_are_disjoint_and_cover_the_prompt_in_any_batch(
    rows: list[list[str]], side: Any, data: st.DataObject
) -> None:
    questions = [" ".join(words) for words in rows]
    images = [[WIDE] * words.count("<image>") for words in rows]
    settings = {
        "processor": data.draw(st.sampled_from([PROCESSOR, METASPACE])),
        "config": CONFIG,
        "template": data.draw(st.sampled_from(["llava-1.5", "vicuna-v1", "plain", "tiny-shapes", None])),
    }
    batch = prepare(questions, images, padding_side=side, **settings)
    for row, token_map in enumerate(batch.token_maps):
        real = batch.attention_mask[row].nonzero()[:, 0].tolist()
        spans = token_map.spans
        if real[-1] in spans.get("image", []):  # a prompt may end with an image
            assert spans["last"] == spans["image"][-1:]
            spans = {**spans, "image": spans["image"][:-1]}
        parts = [spans[name] for name in PARTS if name in spans]
        assert sorted(position for part in parts for position in part) == real
        assert token_map["text"] | token_map.spans.get("image", []) == real
        assert token_map.spans.get("image", Positions()) == batch.image_mask[row].nonzero()[:, 0].tolist()
        assert spans["last"] == [real[-1]] == [int(batch.last[row])]
        alone = prepare(questions[row], images[row], **settings).token_map.spans
        assert {name: [p - real[0] for p in span] for name, span in token_map.spans.items()} == alone


def test_metaspace_tokens_belong_to_the_word_they_hold() -> None:
    token_map = make_map(options=["red", "blue"], processor=METASPACE)
    labels = token_map.labels
    assert [labels[p].strip() for p in token_map["options"]] == ["red", "blue"]
    assert token_map.find("star") == [token_map.find("the star")[-1]]
    assert token_map.find("<image>") == token_map["image"]


def test_a_prompt_that_ends_with_a_image() -> None:
    token_map = make_map("Is it <image>", template="plain")
    assert token_map["last"] == token_map["image"][-1:]
    assert spelt(token_map, token_map["question"]) == "Is it"
    assert token_map["text"].isdisjoint(token_map["last"])


def test_find_and_locate() -> None:
    token_map = make_map("Is the red star left of the blue star?")
    assert spelt(token_map, token_map.find("red star")) == "red star"
    assert token_map.find("star", occurrence=1)[0] == token_map["question"][-2]
    assert token_map.find("Is the", within="question") == token_map["question"][:2]
    with pytest.raises(SpanError, match="'star' occurs 2.*prompt.*occurrence="):
        token_map.find("star")
    assert token_map.find("tar", occurrence=0, whole_words=False) == token_map.find("star", occurrence=0)
    assert token_map.words is not None
    start = token_map.words.text.find("left")
    assert spelt(token_map, token_map.locate(start + 1, start + 2)) == "left"
    assert token_map.locate(start, start) == []


def test_own_spans() -> None:
    token_map = make_map()
    more = token_map.with_spans(subject="star", first=token_map["question"][:1], options=token_map.find("red"))
    assert more["subject"] == token_map.find("star")
    assert more["options"] == token_map.find("red")
    assert set(more.spans) == {*SPANS, "subject", "first"}
    assert "subject" not in token_map
    prompt = make_map("USER: <image>\nIs it a star? ASSISTANT:", template=None)
    assert spelt(prompt, prompt["rest"]) == "Is it a star ?"
    with pytest.raises(
        SpanError,
        match=r"prompt.*span 'question'.*question.*prompt.*template=\.\.\.\)",
    ):
        prompt["question"]
    named = prompt.with_spans(question="Is it a star?")
    assert spelt(named, named["question"]) == "Is it a star ?"
    assert not named["rest"]


def test_own_spans_errors() -> None:
    token_map = make_map()
    with pytest.raises(SpanError, match="span 'last'.*prompt"):
        token_map.with_spans(last=[3])
    for positions in ([], [99]):
        with pytest.raises(
            SpanError,
            match=f"span 'mine'.*positions {re.escape(str(positions))}.*from 0 to 28.*tokens",
        ):
            token_map.with_spans(mine=positions)


def test_unknown_spans() -> None:
    token_map = make_map().with_spans(subject="star")
    known = "system, image, question, options, rest, text, last, subject"
    advice = r"inputs\.with_spans\(name='words'\).*token_map\.find\('words'\)"
    with pytest.raises(SpanError, match=rf"span 'questoin'.*: question, rest\?.*{known}.*{advice}"):
        token_map["questoin"]
    with pytest.raises(SpanError, match="prompt.*span 'options'.*answer options"):
        token_map["options"]


def test_without_a_tokenizer() -> None:
    token_map = TokenMap(
        token_ids=(1, 7, 9, 9, 9, 9, 6, 0), real=range(7), image_starts=(2,), layouts=(llava_layout(2, 2),)
    )
    assert token_map["system"] == [0, 1]
    assert token_map["last"] == [6]
    assert token_map.labels == ["1", "7", "img[0,0]", "img[0,1]", "img[1,0]", "img[1,1]", "6", "0"]
    with pytest.raises(
        SpanError,
        match="'star'.*prompt.*token.*model.*tokenizer.*processor=.*from_hf.*positions",
    ):
        token_map.find("star")
    with pytest.raises(SpanError, match="prompt's characters.*token ids.*tokenizer"):
        token_map.locate(0, 1)
    with pytest.raises(SpanError, match="images.*pixel_values"):
        token_map.patch_box(0, 0)


@pytest.mark.parametrize("class_token", [False, True])
def test_patches_and_positions(class_token: bool) -> None:
    size = 6 + class_token
    token_map = TokenMap(
        token_ids=(9,) * (2 * size + 1),
        real=range(2 * size + 1),
        image_starts=(0, size),
        layouts=(llava_layout(2, 3, class_token=class_token),) * 2,
    )
    seen = []
    for image in range(2):
        assert token_map.patches(image) == [
            token_map.patch_to_position(row, col, image) for row in range(2) for col in range(3)
        ]
        for row in range(2):
            for col in range(3):
                position = token_map.patch_to_position(row, col, image)
                assert token_map.position_to_patch(position) == (image, row, col)
                assert token_map.labels[position] == f"img{image}[{row},{col}]"
                seen.append(position)
    assert token_map["image"] - seen == ([0, size] if class_token else [])
    if class_token:
        assert token_map.labels[size] == "img1[cls]"
        with pytest.raises(SpanError, match="Position 7.*token.*image 1.*patch"):
            token_map.position_to_patch(7)


def test_patch_errors() -> None:
    token_map = make_map()
    with pytest.raises(SpanError, match=r"Patch \(4, 0\).*grid of 4 x 4 patches.*rows.*from 0 to 3"):
        token_map.patch_to_position(4, 0)
    with pytest.raises(SpanError, match=r"Position 1.*image patch.*images.*2\.\.17"):
        token_map.position_to_patch(1)
    with pytest.raises(SpanError, match="Position 1.*image patch.*prompt.*image"):
        make_map(images=None).position_to_patch(1)
    with pytest.raises(SpanError, match="image 1.*prompt has 1 image.*from 0"):
        token_map.patch_box(0, 0, image=1)


def test_pixels_and_boxes() -> None:
    token_map = make_map()
    assert token_map.patch_box(0, 0) == (25.0, 0.0, 37.5, 12.5)
    assert token_map.pixel_to_patch(26, 13) == (1, 0)
    left = token_map.box_to_patches((25, 0, 50, 50))
    assert left == [token_map.patch_to_position(row, col) for row in range(4) for col in range(2)]
    assert left.outside == token_map.outside((25, 0, 50, 50)) == 0
    assert token_map.box_to_patches([25, 0, 26, 50], coverage=0) == [2, 6, 10, 14]
    assert token_map.box_to_patches(np.array([0, 0, 50, 50])).outside == 0.5
    assert token_map["image"] - left == Positions(token_map["image"]) - left
    with pytest.raises(
        SpanError,
        match=r"patch.*image 0.*box.*of 0\.5.*0\.08.*coverage= \(0.*patch",
    ):
        token_map.box_to_patches((25, 0, 26, 50))
    with pytest.raises(SpanError, match="coverage=50.*expected 0 to 1"):
        token_map.box_to_patches((25, 0, 26, 50), coverage=50)
    with pytest.raises(SpanError, match=r"box \(.*outside.*model"):
        token_map.box_to_patches((0, 0, 20, 20))
    with pytest.raises(SpanError, match=r"box.*\(x0, y0, x1, y1\).*3.*\(0\.0, 0\.0, 1\.0\)"):
        token_map.box_to_patches((0, 0, 1))


def test_masks() -> None:
    token_map = make_map()
    mask = np.zeros((50, 100), dtype=bool)
    mask[:, :50] = True
    for given_mask in (mask, mask.astype(int), torch.from_numpy(mask)):
        patches = token_map.mask_to_patches(given_mask)
        assert patches == token_map.box_to_patches((25, 0, 50, 50))
        assert patches.outside == 0.5
    assert token_map.mask_to_patches(mask, coverage=1) == patches
    for wrong in (mask[0], mask * 255, mask[None], mask * 0.5):
        with pytest.raises(SpanError, match=r"mask.*shape.*\[height, width\]"):
            token_map.mask_to_patches(wrong)


def test_boxes_of_the_second_image() -> None:
    token_map = make_map(images=[WIDE, Image.new("RGB", (20, 40))])
    assert token_map.patch_box(0, 0, image=1) == (0, 10, 5, 15)
    assert token_map.box_to_patches((0, 10, 5, 15), image=1) == [token_map.patch_to_position(0, 0, image=1)]
    assert token_map.outside((0, 0, 20, 20), image=1) == 0.5


def test_class_token_is_no_patch_of_a_box() -> None:
    config, processor = make_config(32, select_strategy="full"), make_processor(32, select_strategy="full")
    token_map = make_map(config=config, processor=processor)
    assert len(token_map["image"]) == 17
    assert token_map.box_to_patches((0, 0, 100, 50)) == token_map.patches() == token_map["image"][1:]


def test_shifted() -> None:
    left = prepare(["What is it?", QUESTION], [WIDE, WIDE], config=CONFIG, processor=PROCESSOR, padding_side="left")
    right = prepare(["What is it?", QUESTION], [WIDE, WIDE], config=CONFIG, processor=PROCESSOR, padding_side="right")
    shift = len(right.token_maps[0]) - right.token_maps[0].real.stop
    assert shift > 0
    moved = right.token_maps[0].shifted(shift)
    assert moved.spans == left.token_maps[0].spans
    assert moved.token_ids == left.token_maps[0].token_ids
    assert moved.find("What is") == left.token_maps[0].find("What is")
    assert moved.labels == left.token_maps[0].labels
    with pytest.raises(SpanError, match=f"by 9.*tokens.*from 0 to {shift}"):
        right.token_maps[0].shifted(9)


def test_shows_its_spans() -> None:
    assert repr(make_map(images=None)) == (
        "TokenMap(13 positions; system: 0..1, question: 2..8, rest: 9..11, text: 0..12, last: 12)"
    )
    assert len(make_map()) == 29


def test_an_answer_behind_the_prompt_is_in_no_built_in_span() -> None:
    ids = (0, 1, 9, 9, 9, 9, 5, 6, 7, 8)
    prompt = {"token_ids": ids, "image_starts": (2,), "layouts": (llava_layout(2, 2),)}
    alone = TokenMap(**prompt, real=range(1, 8))
    longer = TokenMap(**prompt, real=range(1, 10), n_answer=2)
    assert longer.spans == alone.spans
    assert longer["last"] == [7]
    assert TokenMap(**prompt, real=range(1, 9), n_answer=1).shifted(1)["last"] == [8]


@pytest.mark.parametrize(("words", "name"), [("star", "star"), ("red star", "this"), ("What", "What")])
def test_a_word_of_the_prompt_is_no_span_but_can_become_one(words: str, name: str) -> None:
    token_map = make_map("What is the red star?")
    with pytest.raises(SpanError, match=rf"with_spans\({name}='{words}'\).*find\('{words}'\)"):
        token_map[words]
    named = token_map.with_spans(**{name: words})
    assert named[name] == token_map.find(words)


@pytest.mark.parametrize("part", ["sta", "tar", "Star", "star red", "", " "])
def test_parts_of_words_and_other_words_are_just_unknown(part: str) -> None:
    token_map = make_map("What is the red star?")
    with pytest.raises(SpanError, match=r"Known: .*with_spans\(name='words'\)"):
        token_map[part]


# Images of several grids, of unequal length, with newlines and pooled cells


def test_an_image_of_several_grids_by_hand() -> None:
    token_map = map_of([by_hand(), llava_layout(2, 2)])  # of 14 and of 4 positions
    assert token_map.image_ranges == (range(1, 15), range(17, 21))
    assert token_map["image"] == [*range(1, 15), *range(17, 21)]
    assert token_map["text"] == [0, 15, 16, 21, 22]
    assert token_map.patches(0) == [2, 3, 4, 5, 6, 7, 9, 10, 12, 13]
    assert token_map.patches(0, "fine") == [9, 10, 12, 13]
    assert token_map.patches(1) == [17, 18, 19, 20]
    assert token_map.patch_to_position(1, 0) == 5
    assert token_map.patch_to_position(1, 0, grid="fine") == 12
    assert token_map.patch_to_position(1, 0, image=1) == 19
    assert token_map.position_to_patch(5) == (0, 1, 0)
    assert token_map.position_to_patch(12, grid="fine") == (0, 1, 0)
    assert token_map.position_to_patch(19) == (1, 1, 0)
    assert token_map.cell_at(12) == (0, Cell("fine", 1, 0))
    assert token_map.patch_box(0, 0) == (0, 0, 8, 8)
    assert token_map.patch_box(0, 0, grid="fine") == (4, 0, 12, 8)
    assert token_map.pixel_to_patch(5, 9) == token_map.pixel_to_patch(5, 9, grid="fine") == (1, 0)
    assert token_map.box_to_patches((0, 0, 8, 4), coverage=0.25) == [2, 9]
    assert token_map.box_to_patches((0, 0, 8, 4), coverage=0, grid="fine") == [9]
    assert token_map.box_to_patches((0, 0, 8, 4), coverage=0, grid="fine").outside == 0.5
    assert token_map.outside((0, 0, 4, 4)) == 0
    assert token_map.outside((0, 0, 4, 4), grid="fine") == 1
    assert [token_map.labels[p] for p in (1, 8, 9, 11, 17)] == [
        "img0[cls]",
        "img0.base[newline]",
        "img0.fine[0,0]",
        "img0.fine[0,newline]",
        "img1[0,0]",
    ]
    assert str(token_map).splitlines()[1].split()[:3] == ["1", "5", "x14"]


def test_what_is_no_patch_of_a_grid_is_refused() -> None:
    token_map = map_of([by_hand(), llava_layout(2, 2)])
    for position, what in ((1, "the class token"), (8, "a newline"), (11, "a newline")):
        with pytest.raises(SpanError, match=f"Position {position}.*{what}.*image 0.*patch"):
            token_map.position_to_patch(position)
    with pytest.raises(SpanError, match="Position 12.*patch.*fine grid.*base grid.*grid='fine'"):
        token_map.position_to_patch(12)
    with pytest.raises(SpanError, match="no grid 'fine'; it has base"):
        token_map.position_to_patch(19, grid="fine")
    with pytest.raises(SpanError, match="images are at 1..14, 17..20"):
        token_map.cell_at(15)
    with pytest.raises(SpanError, match=r"Patch \(0, 2\).*fine grid of 2 x 2 patches"):
        token_map.patch_to_position(0, 2, grid="fine")
    with pytest.raises(SpanError, match="patch.*image 0.*box"):
        token_map.box_to_patches((0, 0, 1, 1))
    with pytest.raises(SpanError, match=r"original images.*pixel_values.*images="):
        token_map.box_to_patches((0, 0, 1, 1), image=1)
    with pytest.raises(InputError, match="1 image_starts and 0 layouts"):
        TokenMap(token_ids=(1, 2), real=range(2), image_starts=(0,))


@given(drawn=st.lists(DRAWN, min_size=1, max_size=3), before=st.integers(0, 3), after=st.integers(0, 3))
@settings(max_examples=40)
def test_every_position_is_text_padding_or_one_thing_of_one_image(drawn: list[Any], before: int, after: int) -> None:
    images = [made(one) for one in drawn]
    token_map = map_of(images, before=before, after=after)
    labels, seen = token_map.labels, []
    for image, layout in enumerate(images):
        here = token_map.image(image)
        assert len(here) == layout.n_features
        patches = token_map.patches(image)
        assert patches - here == []
        for name in layout.names:
            for row, col in np.ndindex(layout.grid(name).shape):
                position = token_map.patch_to_position(row, col, image, grid=name)
                assert token_map.position_to_patch(position, grid=name) == (image, row, col)
                assert token_map.cell_at(position) == (image, Cell(name, row, col))
                assert position in token_map.patches(image, name)
                assert re.fullmatch(rf"img.*\[{row},{col}\]", labels[position])
                seen.append(position)
        for position in here - patches:
            with pytest.raises(SpanError, match=r"Position \d+ .*of image \d+.*no patch"):
                token_map.cell_at(position)
            assert labels[position].endswith(("newline]", "[cls]"))
    assert len(set(seen)) == len(seen)
    assert len({labels[p] for p in token_map["image"]}) == len(token_map["image"])
    assert token_map["image"] | token_map["text"] == token_map.real
    assert token_map["image"].isdisjoint(token_map["text"])
    for position in [*range(before), *token_map["text"], *range(len(token_map) - after, len(token_map))]:
        with pytest.raises(SpanError, match=f"Position {position}.*image patch"):
            token_map.position_to_patch(position)


@given(drawn=DRAWN, data=st.data())
@settings(max_examples=40)
def test_boxes_masks_and_pixels_find_the_positions_of_every_grid_that_shows_them(
    drawn: Any, data: st.DataObject
) -> None:
    image = made(drawn)
    token_map = map_of([llava_layout(1, 1), image])
    height, width = image.original_size or (0, 0)
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box, mask = (x, y, x + 1, y + 1), np.zeros((height, width), dtype=bool)
    mask[y, x] = True
    inside = (x + data.draw(st.floats(0.1, 0.9)), y + data.draw(st.floats(0.1, 0.9)))
    expected = [token_map.patch_to_position(c.row, c.col, 1, grid=c.grid) for c in image.pixel_to_cells(*inside)]
    if token_map.outside(box, image=1) == 1.0:
        assert not expected
        for find in (lambda: token_map.box_to_patches(box, image=1), lambda: token_map.mask_to_patches(mask, image=1)):
            with pytest.raises(SpanError, match="wholly outside"):
                find()
        return
    found = token_map.box_to_patches(box, coverage=0, image=1)
    assert found == token_map.mask_to_patches(mask, coverage=0, image=1)
    assert found - token_map.patches(1) == []
    assert Positions(expected) - found == []
    by_grid = Positions()
    for name in image.names:
        if token_map.outside(box, image=1, grid=name) < 1:
            by_grid |= token_map.box_to_patches(box, coverage=0, image=1, grid=name)
    assert by_grid == found
    for position in found:
        _, cell = token_map.cell_at(position)
        x0, y0, x1, y1 = token_map.patch_box(cell.row, cell.col, 1, grid=cell.grid)
        assert x0 < x + 1
        assert x < x1
        assert y0 < y + 1
        assert y < y1
