from __future__ import annotations

from PIL import Image

from hooked_llava.prompt.prepare import prepare
from hooked_llava.prompt.token_map import TokenMap
from tests.fixtures_processor import make_config, make_processor

IMAGE = Image.new("RGB", (20, 20))


def make_map(question: str, *, n_images: int = 1, metaspace: bool = False, **settings: str) -> TokenMap:
    processor = make_processor(metaspace=metaspace)
    inputs = prepare(
        question, [IMAGE] * n_images, config=make_config(), processor=processor, template="llava-1.5", **settings
    )
    return inputs.token_map


def test_one_image() -> None:
    token_map = make_map("Is the star red or blue?").with_spans(options=[9, 11])
    expected = """\
  0       1      2..5       6         7    8     9        10  11       12  13
  <s>     USER:  <image> x4  Is        the  star  red      or  blue     ?   ASSISTANT:
  system───────  image─────  question─────────────────────────────────────  last──────
                                                  options      options"""
    lines = [line.split() for line in str(token_map).splitlines()]
    assert lines == [line.split() for line in expected.splitlines()]
    assert str(token_map).splitlines()[2] == expected.splitlines()[2]


def test_columns_stand_above_each_other() -> None:
    lines = str(make_map("Is the star red or blue?")).splitlines()
    heads, tokens, spans = lines
    for head, token in (("2..5", "<image> x4"), ("8", "star"), ("13", "ASSISTANT:")):
        assert heads.index(head) == tokens.index(token)
    assert spans.index("question") == tokens.index("Is")
    assert spans.index("last") == tokens.index("ASSISTANT:")


def test_long_prompts_wrap() -> None:
    token_map = make_map("What is the color of the star in the image ? " * 3, tail="Answer briefly.")
    text = token_map.format(width=60)
    assert all(len(line) <= 60 for line in text.splitlines())
    assert len(text.split("\n\n")) > 3
    assert text.replace("\n", " ").split().count("star") == 3


def test_two_images_line_breaks_and_overlapping_spans() -> None:
    token_map = make_map("Is it?", n_images=2, metaspace=True)
    question = token_map["question"]
    text = str(token_map.with_spans(first=question[:2], second=question[1:]))
    assert "image 0" in text
    assert "image 1" in text
    assert "\\n" in text
    assert text.splitlines()[3].strip().startswith("first")
    assert text.splitlines()[4].strip().startswith("second")


def test_padding_is_collapsed_and_ids_stand_for_missing_text() -> None:
    token_map = TokenMap(token_ids=(0, 0, 0, 7, 8, 0), real=range(3, 5))
    assert str(token_map).splitlines()[:2] == ["  0..2  3     4     5", "  0 x3  7     8     0"]
