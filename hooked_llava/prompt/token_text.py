"""The text of one tokenized prompt, and which characters each token spells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from hooked_llava.errors import SpanError, counted
from hooked_llava.prompt.processor import Tokenizer

# Scripts that write words without spaces between them: there a word has no border that could be looked for.
_UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"  # Thai, Lao, Tibetan, Burmese, Khmer, Japanese, Chinese
)
_LETTER = f"[^\\W{_UNSPACED}]"
_CONTEXT = 20  # characters shown on each side of an occurrence in an error
_T = TypeVar("_T")
_Offsets = tuple[tuple[int, int], ...]


def visible_token(token: object, *, signs: bool = False) -> str:
    r"""A token as it is shown in tables and figures: no blanks around it, and something to see for a line break or a blank.

    Line breaks and the like are spelled out, and a blank is quoted; with `signs` these are ↵, ⇥ and ␣.

    >>> visible_token(" red"), visible_token("\n"), visible_token(" "), visible_token(" ", signs=True)
    ('red', '\\n', "' '", '␣')
    """
    text = str(token)  # NumPy's words have a repr of their own
    shown = text.strip(" ") or ("␣" * max(1, len(text)) if signs else repr(text))
    if signs:
        shown = shown.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenText:
    """What the tokens of one prompt spell; decoded only when asked, so that a forward pass costs nothing.

    Attributes:
        token_ids (tuple[int, ...]): Token id at every position, padding included.
        tokenizer (Tokenizer): A Hugging Face tokenizer.
        image_token_id (int): Token id of the image positions; all positions of one image count as one image token in
            the text.
        images (tuple[range, ...]): The positions of each image.
        real (range): The positions that are not padding.
        prompt (str | None): The text that was tokenized, one image token per image; None if only ids are known.
        prompt_offsets (_Offsets | None): For every position the first character in `prompt` and the one after the last,
            (0, 0) for added tokens.
        parts (Mapping[str, tuple[int, int]]): Characters of the template's parts (system, question, tail,
            answer_prefix).
        answer_separator (str | None): What the template puts between the prompt and its answer; None where it is not
            known.
    """

    token_ids: tuple[int, ...]
    tokenizer: Tokenizer
    image_token_id: int
    images: tuple[range, ...]
    real: range
    prompt: str | None = None
    prompt_offsets: _Offsets | None = None
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    answer_separator: str | None = None

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Each position's token as text."""
        names = {token_id: self.tokenizer.decode([token_id]) for token_id in set(self.token_ids)}
        return tuple(names[token_id] for token_id in self.token_ids)

    @property
    def text(self) -> str:
        """The prompt, or what the token ids decode to where they are all that was given."""
        return self.prompt if self.prompt_offsets is not None and self.prompt is not None else self._decoded[0]

    @property
    def offsets(self) -> _Offsets:
        """For every position its characters (first, one after the last) in `text`."""
        return self.prompt_offsets if self.prompt_offsets is not None else self._decoded[1]

    def find(
        self,
        words: str,
        *,
        occurrence: int | None = None,
        within: str | None = None,
        whole_words: bool = True,
        advice: str | None = None,
    ) -> tuple[int, int]:
        """Characters of some words in `text`: the first one and the one after the last; as `TokenMap.find`.

        `advice` is what errors tell the user of another function to do about words that stand several times, or only inside
        others; by default what this function's options can do.
        """
        first, stop = self._part(within)
        matches = _pattern(words, whole_words).finditer(self.text)
        places = [match.span() for match in matches if first <= match.start() and match.end() <= stop]
        if not places:
            raise SpanError(self._missing(words, first, stop, within, advice))
        if occurrence is None and len(places) > 1:
            listed = "\n".join(f"  occurrence={i}: {self._context(*place)}" for i, place in enumerate(places))
            narrower = ", or look only within='question'" if within is None and "question" in self.parts else ""
            raise SpanError(
                f"{words!r} occurs {len(places)} times in {_called(within)}; "
                f"{advice or f'choose one with occurrence={narrower}'}:\n{listed}"
            )
        if not 0 <= (occurrence or 0) < len(places):
            raise SpanError(
                f"occurrence={occurrence}, but {words!r} occurs {counted(len(places), 'time')} "
                f"in {_called(within)}; expected 0 to {len(places) - 1}."
            )
        return places[occurrence or 0]

    def shifted(self, by: int) -> TokenText:
        """The same text with every token `by` positions further right; as `TokenMap.shifted`."""
        return replace(
            self,
            token_ids=roll(self.token_ids, by),
            images=tuple(range(image.start + by, image.stop + by) for image in self.images),
            real=range(self.real.start + by, self.real.stop + by),
            prompt_offsets=None if self.prompt_offsets is None else roll(self.prompt_offsets, by),
        )

    def _part(self, within: str | None) -> tuple[int, int]:
        if within is None:
            return 0, len(self.text)
        if within not in self.parts:
            raise SpanError(
                f"within={within!r} is not a part of this prompt; known: {', '.join(self.parts) or 'none'}."
            )
        return self.parts[within]

    def _missing(self, words: str, first: int, stop: int, within: str | None, advice: str | None) -> str:
        text = self.text[first:stop]
        where = _called(within)
        inside = re.search(rf"\w*{re.escape(words)}\w*", text) if words.strip() else None
        if inside:
            return (
                f"{words!r} occurs in {where} only inside {inside.group()!r}; give the whole word, or "
                f"{advice or 'set whole_words=False'}."
            )
        return f"{words!r} does not occur in {where} {text!r}; give words as they stand there, capitals included."

    def _context(self, start: int, stop: int) -> str:
        before, after = self.text[max(0, start - _CONTEXT) : start], self.text[stop : stop + _CONTEXT]
        line = f"...{before}[{self.text[start:stop]}]{after}..."
        return line.replace("\n", "\\n")

    @cached_property
    def _decoded(self) -> tuple[str, _Offsets]:
        """Text and offsets rebuilt from the ids, token by token, each decoded after its neighbor for the spaces."""
        text, offsets, previous = "", [(0, 0)] * len(self.token_ids), None
        inside = {position for image in self.images for position in image[1:]}
        for position in self.real:
            if position in inside:
                offsets[position] = offsets[position - 1]
                continue
            token_id = self.token_ids[position]
            piece = _piece(self.tokenizer, previous, token_id)
            spaces = len(piece) - len(piece.lstrip()) if piece.strip() else 0
            offsets[position] = (len(text) + spaces, len(text) + len(piece))
            text, previous = text + piece, token_id
        return text, tuple(offsets)


def repeat_image_tokens(prompt: str, image_token: str, sizes: Sequence[int]) -> str:
    """A prompt with the image token of each image written as many times as the image has positions; further ones once.

    >>> repeat_image_tokens("a<i>b<i>", "<i>", [2, 1])
    'a<i><i>b<i>'
    """
    left = iter(sizes)
    return re.sub(re.escape(image_token), lambda found: found[0] * next(left, 1), prompt)


def prompt_offsets(offsets: Sequence[tuple[int, int]], prompt: str, image_token: str, sizes: Sequence[int]) -> _Offsets:
    """Character offsets in the text with repeated image tokens (see `repeat_image_tokens`) -> offsets in the prompt.

    >>> prompt_offsets([(0, 1), (1, 4), (4, 7), (7, 9)], "a<i>bc", "<i>", [2])
    ((0, 1), (1, 4), (1, 4), (4, 6))
    """
    length = len(image_token)
    images = [match.start() for match in re.finditer(re.escape(image_token), prompt)]
    mapped, image, grown = [], 0, 0  # grown: characters by which the images before here are longer in the long text
    for start, stop in offsets:
        while image < len(images) and start >= images[image] + grown + length * sizes[image]:
            grown += length * (sizes[image] - 1)
            image += 1
        inside = image < len(images) and stop > start >= images[image] + grown
        if stop <= start:  # a token that the tokenizer added, or padding
            mapped.append((0, 0))
        elif inside:
            mapped.append((images[image], images[image] + length))
        else:
            mapped.append((start - grown, stop - grown))
    return tuple(mapped)


def begins_with_bos(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text has its beginning-of-text token written out, so that the tokenizer should not add another.

    >>> from hooked_llava.toy.processor import build_tokenizer
    >>> begins_with_bos(build_tokenizer(), "<s>USER: Why?"), begins_with_bos(build_tokenizer(), "USER: Why?")
    (True, False)
    """
    bos = getattr(tokenizer, "bos_token", None)
    return bool(bos) and text.startswith(bos)


def roll(row: tuple[_T, ...], by: int) -> tuple[_T, ...]:
    """A row with everything `by` places further right, and what falls off at one end put on at the other.

    >>> roll((1, 2, 3), 1)
    (3, 1, 2)
    """
    return row[-by:] + row[:-by] if by else row


def _piece(tokenizer: Tokenizer, previous: int | None, token_id: int) -> str:
    """What a token adds to the text; only in context does a tokenizer say whether a space comes before a word."""
    alone = tokenizer.decode([token_id])
    if previous is None:
        return alone
    before = tokenizer.decode([previous])
    both = tokenizer.decode([previous, token_id])
    return both[len(before) :] if both.startswith(before) else alone


def _called(within: str | None) -> str:
    return f"the {within}" if within else "the prompt"


def _pattern(words: str, whole_words: bool) -> re.Pattern[str]:
    if not words.strip():
        raise SpanError("An empty string was given to find; expected words of the prompt.")
    before, after = word_borders(words) if whole_words else ("", "")
    return re.compile(before + re.escape(words) + after)


def word_borders(words: str) -> tuple[str, str]:
    """Regular expressions for what must stand before and after words so that they are no part of longer ones.

    Scripts without spaces between words (Chinese, Japanese, Thai, ...) have no such borders.

    >>> before, after = word_borders("red")
    >>> [bool(re.search(f"{before}red{after}", text)) for text in ("a red star", "redder", "这red星")]
    [True, False, True]
    """
    before = f"(?<!{_LETTER})" if re.match(_LETTER, words) else ""
    after = f"(?!{_LETTER})" if re.match(_LETTER, words[-1:]) else ""
    return before, after
