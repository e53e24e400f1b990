from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_llava.errors import SpanError
from hooked_llava.prompt.token_text import TokenText, prompt_offsets, repeat_image_tokens, roll, visible_token
from tests.fixtures_processor import make_processor

PROMPT = "USER: <image>\nWhat color is the red star? A redder star. ASSISTANT:"
N_FEATURES = 4


def make_text(prompt: str = PROMPT, *, metaspace: bool = False, known: bool = True) -> TokenText:
    processor = make_processor(metaspace=metaspace)
    n_images = prompt.count("<image>")
    encoded = processor(
        text=[prompt],
        images=[Image.new("RGB", (20, 20))] * n_images or None,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    ids = tuple(encoded["input_ids"][0].tolist())
    image = [p for p, token in enumerate(ids) if token == processor.image_token_id]
    offsets = [(start, stop) for start, stop in encoded["offset_mapping"][0].tolist()]
    return TokenText(
        token_ids=ids,
        tokenizer=processor.tokenizer,
        image_token_id=processor.image_token_id,
        images=tuple(range(first, first + N_FEATURES) for first in image[::N_FEATURES]),
        real=range(len(ids)),
        prompt=prompt if known else None,
        prompt_offsets=prompt_offsets(offsets, prompt, "<image>", [N_FEATURES] * n_images) if known else None,
        parts={"question": (prompt.find("What"), prompt.find("?") + 1)} if known else {},
    )


@pytest.mark.parametrize("metaspace", [False, True])
def test_every_token_spells_its_characters(metaspace: bool) -> None:
    words = make_text("Is <image> <image> a star? USER: <image>\nWhat color is it? ASSISTANT:", metaspace=metaspace)
    for token, (start, stop) in zip(words.tokens, words.offsets, strict=True):
        spelt = words.text[start:stop]
        assert token in ("<s>", "<unk>") or spelt.strip() == token.strip()
    assert words.offsets[0] == (0, 0)


@pytest.mark.parametrize("metaspace", [False, True])
def test_text_is_rebuilt_from_ids(metaspace: bool) -> None:
    words = make_text(metaspace=metaspace, known=False)
    assert " ".join(words.text.split()) == "<s> " * True + PROMPT.replace("\n", " ") if not metaspace else words.text
    start, stop = words.find("What color is the red star?")
    assert words.text[start:stop] == "What color is the red star?"
    image = [words.offsets[p] for p in words.images[0]]
    assert len(set(image)) == 1
    assert words.text[slice(*image[0])].strip() == "<image>"


def test_find() -> None:
    words = make_text()
    assert words.text[slice(*words.find("color is"))] == "color is"
    assert words.find("star", occurrence=0) == (PROMPT.find("star"), PROMPT.find("star") + 4)
    assert words.find("star", occurrence=1)[0] == PROMPT.rfind("star")
    assert words.find("star", within="question") == words.find("star", occurrence=0)
    assert words.find("red") == (PROMPT.find("red"), PROMPT.find("red") + 3)  # not in "redder"
    assert words.find("?") == (PROMPT.find("?"), PROMPT.find("?") + 1)
    assert words.find("dder", whole_words=False)[0] == PROMPT.find("dder")
    assert words.find("<image>\nWhat")[0] == 6


def test_find_errors() -> None:
    words = make_text()
    with pytest.raises(SpanError, match="'star' occurs 2.*prompt.*occurrence=.*within='question'") as caught:
        words.find("star")
    assert str(caught.value).splitlines()[1:] == [
        "  occurrence=0: ...at color is the red [star]? A redder star. ASS...",
        "  occurrence=1: ... red star? A redder [star]. ASSISTANT:...",
    ]
    for occurrence in (2, -1):
        with pytest.raises(
            SpanError,
            match=f"occurrence={occurrence}.*'star' occurs 2.*prompt.*expected 0 to 1",
        ):
            words.find("star", occurrence=occurrence)
    with pytest.raises(SpanError, match="occurrence=1.*'color' occurs 1.*prompt.*expected 0 to 0"):
        words.find("color", occurrence=1)
    with pytest.raises(
        SpanError,
        match=r"'moon'.*prompt 'USER: <image>\\nWhat color is the red star\? A redder star\. ASSISTANT:'",
    ):
        words.find("moon")
    with pytest.raises(SpanError, match="'redder'.*question 'What color is the red star"):
        words.find("redder", within="question")
    with pytest.raises(
        SpanError,
        match="'colo'.*prompt.*'color'.*whole_words=False",
    ):
        words.find("colo")
    with pytest.raises(SpanError, match="within='tail'.*prompt.*question"):
        words.find("star", within="tail")
    with pytest.raises(SpanError, match="within='question'.*prompt"):
        make_text(known=False).find("star", within="question")
    with pytest.raises(SpanError, match="empty string.*find.*words.*prompt"):
        words.find(" ")


def plain(prompt: str) -> TokenText:
    tokenizer = make_processor().tokenizer
    return TokenText(
        token_ids=(),
        tokenizer=tokenizer,
        image_token_id=5,
        images=(),
        real=range(0),
        prompt=prompt,
        prompt_offsets=(),
        parts={"question": (0, len(prompt))},
    )


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("这个形状是什么颜色?", "形"),
        ("这个形状是什么颜色?", "形状"),
        ("この形は何色ですか。", "形"),
        ("このスターは赤いですか", "スター"),
        ("รูปร่างนี้สีอะไร", "สี"),
        ("这个star是红色吗", "star"),
        ("形star", "star"),
        ("是red吗? redder", "red"),
        ("The 星 is red", "星"),
    ],
)
def test_words_of_scripts_without_spaces(prompt: str, words: str) -> None:
    assert plain(prompt).find(words) == (prompt.index(words), prompt.index(words) + len(words))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("Is it redder?", "red"), ("별은 red", "별"), ("Красный?", "Крас"), ("naïveté", "naïv"), ("star_3", "star")],
)
def test_words_of_scripts_with_spaces_are_whole(prompt: str, words: str) -> None:
    with pytest.raises(SpanError, match="only inside"):
        plain(prompt).find(words)
    assert plain(prompt).find(words, whole_words=False) == (prompt.index(words), prompt.index(words) + len(words))


def test_advice_is_the_callers() -> None:
    words = make_text()
    with pytest.raises(SpanError, match=r"'star' occurs 2 .*prompt; ask someone:\n  occurrence=0: "):
        words.find("star", advice="ask someone")
    with pytest.raises(SpanError, match=r"'color'.*whole word, or ask someone\."):
        words.find("colo", advice="ask someone")
    # What is looked for in the question already is not sent there.
    twice = plain("Is the star a star?")
    with pytest.raises(SpanError, match=r"'star' occurs 2 .*question.*occurrence=:\n"):
        twice.find("star", within="question")
    with pytest.raises(SpanError, match=r"occurrence=:\n"):
        make_text(known=False).find("star")


PIECES = st.lists(st.tuples(st.sampled_from(["<image>", "a", "bc", " ", "<s>"]), st.integers(1, 5)), max_size=12)


@given(pieces=PIECES)
def test_offsets_in_the_long_text_lead_back_to_the_prompt(pieces: list[tuple[str, int]]) -> None:
    """Images may have different numbers of positions."""
    prompt = "".join(piece for piece, _ in pieces)
    sizes = [n for piece, n in pieces if piece == "<image>"]
    offsets, expected, long, short = [(0, 0)], [(0, 0)], "", 0
    for piece, n in pieces:
        for _ in range(n if piece == "<image>" else 1):
            offsets.append((len(long), len(long) + len(piece)))
            expected.append((short, short + len(piece)))
            long += piece
        short += len(piece)
    assert repeat_image_tokens(prompt, "<image>", sizes) == long
    assert prompt_offsets(offsets, prompt, "<image>", sizes) == tuple(expected)


@given(row=st.lists(st.integers(), max_size=6).map(tuple), by=st.integers(-6, 6))
def test_roll(row: tuple[int, ...], by: int) -> None:
    if abs(by) <= len(row):
        assert roll(roll(row, by), -by) == row
        assert len(roll(row, by)) == len(row)


@pytest.mark.parametrize(
    ("token", "shown", "with_signs"),
    [
        (" red ", "red", "red"),
        ("", "''", "␣"),
        ("  ", "'  '", "␣␣"),
        ("\n", r"\n", "↵"),
        (" \t\r", r"\t\r", r"⇥\r"),
        ("a\x1b[0m", r"a\x1b[0m", r"a\x1b[0m"),
        (np.str_(" "), "' '", "␣"),
    ],
)
def test_every_token_can_be_seen(token, shown, with_signs):
    assert (visible_token(token), visible_token(token, signs=True)) == (shown, with_signs)
