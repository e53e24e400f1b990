"""Where is it? One object per prompt: named spans, substrings, image patches and pixels, all as positions.

The named spans of a prompt (padding belongs to none):

| span | positions |
|---|---|
| `system` | text before the first picture, or before the question where there is no picture, that is in no other span |
| `image` | all pictures; `token_map["image", 1]` or `token_map.image(1)` is the second one |
| `question` | the question as asked, its options included |
| `options` | the answer options named in the question, a part of it |
| `rest` | every other text: template, instruction tail, answer prefix; without it knocked-out edges leak |
| `last` | the last position, from which the answer's first token is predicted; in no other span but `text` [1] |
| `text` | everything that is not image |

[1] Where a prompt ends with a picture, `last` is the picture's last position, and so part of `image` instead.

An answer appended to the prompt (`metrics.teacher_forced`) is its span `answer` and in none of these: `last` stays the
prompt's own last position. `predicting` are the positions that predict the answer's tokens, from `last` on.

Otherwise `system`, `image`, `question`, `rest` and `last` are disjoint, and together they cover the prompt. Tokens that
reach across the border of a span (a word piece with the question's first letter and the space before it) belong to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, SupportsFloat

import numpy as np
from torch import Tensor

from hooked_llava.errors import SpanError, did_you_mean
from hooked_llava.prompt.geometry import Box, BoxLike, ImageGeometry, Number
from hooked_llava.prompt.positions import PatchPositions, Positions, format_runs
from hooked_llava.prompt.spans import is_joined, span
from hooked_llava.prompt.token_table import format_token_map
from hooked_llava.prompt.token_text import TokenText, roll

SPANS = ("system", "image", "question", "options", "rest", "text", "last")
"""The names of the spans, as in the table above."""
_SETTABLE = ("question", "options")
GIVE_POSITIONS = "give positions instead, from token_map.find(words, occurrence=..., whole_words=...)"
"""Advice about words that are not found once, for functions that take positions as well as words."""
_NOT_GIVEN = {
    "image": "the prompt has no picture. Give one with prepare(..., images=...)",
    "question": "where the question stands in the prompt was not given. Use prepare(question, template=...), or name "
    "it yourself: token_map.with_spans(question='...')",
    "options": "no answer options were named. Use prepare(..., options=['red', 'blue']), or name them yourself: "
    "token_map.with_spans(options=token_map.find('red') | token_map.find('blue'))",
}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TokenMap:
    """The positions of one prompt of a batch, padding counted, by name, by words, by patch and by pixel.

    >>> token_map = TokenMap(token_ids=(1, 7, 9, 9, 9, 9, 5, 6), real=range(1, 8), image_starts=(2,), grid=(2, 2))
    >>> token_map["image"], token_map["system"], token_map["last"]
    (Positions(2..5), Positions(1), Positions(7))
    >>> token_map["text"] - token_map["last"], token_map["text-last"], token_map["system|image"]
    (Positions(1, 6), Positions(1, 6), Positions(1..5))
    >>> token_map.patch_to_position(1, 0), token_map.position_to_patch(4)
    (4, (0, 1, 0))
    """

    token_ids: tuple[int, ...]
    """Token id at every position, padding included."""
    real: range
    """The positions that are not padding."""
    image_starts: tuple[int, ...] = ()
    """First position of each picture."""
    grid: tuple[int, int]
    """Rows and columns of patches in a picture."""
    has_class_token: bool = False
    """Whether each picture's positions begin with the class token (select strategy "full"), which is no patch."""
    words: TokenText | None = None
    """Text of the tokens and their characters, if a tokenizer is there."""
    named: Mapping[str, Positions] = field(default_factory=dict)
    """`question` and `options` where they are known, and the user's own spans."""
    geometries: tuple[ImageGeometry, ...] | None = None
    """For each picture its way through the processor, if the original pictures are known."""
    n_answer: int = 0
    """How many of the last positions hold an answer put behind the prompt, which belongs to none of the built-in spans."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, name: str | tuple[str, int]) -> Positions:
        """The positions of a span, or of spans joined by | & and - ("question|last"); `token_map["image", i]` for picture i.

        Raises `SpanError` for an unknown name, and for a span that this prompt does not have.
        """
        if isinstance(name, tuple):
            if name[0] != "image":
                raise SpanError(f"token_map[{name[0]!r}, {name[1]}]: only 'image' takes a number; drop the {name[1]}.")
            return self.image(name[1])
        if name not in (*SPANS, *self.named):
            if is_joined(name):
                return span(self, name)
            raise SpanError(self._unknown(name))
        positions = self._positions(name)
        if not positions and name in _NOT_GIVEN:
            raise SpanError(f"This prompt has no span {name!r}: {_NOT_GIVEN[name]}.")
        return positions

    def _unknown(self, name: str) -> str:
        known = (*SPANS, *(own for own in self.named if own not in SPANS))
        text = "" if self.words is None else self.words.text
        if name.strip() and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text):
            own = name if name.isidentifier() else "this"
            return (
                f"There is no span {name!r}; it is in the prompt's text. Words are not spans until they are given a name: "
                f"inputs.with_spans({own}={name!r}), and then positions={own!r}; token_map.find({name!r}) gives their "
                f"positions. Known spans: {', '.join(known)}."
            )
        return (
            f"There is no span {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}. Words of the prompt become one "
            "by inputs.with_spans(name='words'); token_map.find('words') gives their positions."
        )

    def __contains__(self, name: object) -> bool:
        return name in self.spans

    @property
    def spans(self) -> dict[str, Positions]:
        """Every span that this prompt has and that is not empty, the user's own included."""
        names = (*SPANS, *(own for own in self.named if own not in SPANS))
        return {name: positions for name in names if (positions := self._positions(name))}

    @property
    def own(self) -> range:
        """The prompt's own positions: real ones, without an appended answer."""
        return self.real[: len(self.real) - self.n_answer]

    @property
    def n_images(self) -> int:
        """Number of pictures in the prompt."""
        return len(self.image_starts)

    @property
    def n_features(self) -> int:
        """Positions per picture: its patches, and the class token where it is kept."""
        return self.grid[0] * self.grid[1] + self.has_class_token

    def image(self, image: int = 0) -> Positions:
        """All positions of one picture, the class token included where it is kept; raises `SpanError` out of range."""
        start = self._image_start(image)
        return Positions(range(start, start + self.n_features))

    def patches(self, image: int = 0) -> Positions:
        """The positions of one picture's patches, row by row, without a class token."""
        return self.image(image)[int(self.has_class_token) :]

    def with_spans(self, **spans: str | Iterable[int]) -> TokenMap:
        """A copy with further named spans, each a substring that occurs once or positions; the original stays as it is.

        `question` and `options` may be set, also anew. Raises `SpanError` for the other built-in names, for
        positions outside the prompt and for what `find` refuses.

        >>> token_map = TokenMap(token_ids=(1, 7, 8, 5), real=range(4), grid=(2, 2))
        >>> token_map.with_spans(subject=[1, 2])["subject"]
        Positions(1..2)
        """
        named = dict(self.named)
        for name, where in spans.items():
            if name in SPANS and name not in _SETTABLE:
                raise SpanError(f"The span {name!r} follows from the prompt and cannot be set; choose another name.")
            positions = self.find(where, advice=GIVE_POSITIONS) if isinstance(where, str) else Positions(where)
            named[name] = self._checked(name, positions)
        return replace(self, named=named)

    def find(
        self,
        words: str,
        *,
        occurrence: int | None = None,
        within: str | None = None,
        whole_words: bool = True,
        advice: str | None = None,
    ) -> Positions:
        """The positions of the tokens that spell some words of the prompt.

        `occurrence` chooses (from 0 on) where the words stand several times; `within` looks only inside one part of
        the prompt ("system", "question", "tail" or "answer_prefix", as the template wrote it); unless `whole_words`
        is off, "red" is not found in "redder" (scripts without spaces between words have no such borders). `advice` is
        what an error suggests instead of these options, for callers that do not have them. Raises `SpanError` for words
        that are not there or stand there several times, with the list of places.
        """
        if self.words is None:
            raise SpanError(
                f"Cannot look for {words!r}: the prompt was given as token ids and the model has no tokenizer. "
                "Pass processor= to from_hf, or name positions yourself: token_map.with_spans(...)."
            )
        start, stop = self.words.find(
            words, occurrence=occurrence, within=within, whole_words=whole_words, advice=advice
        )
        return self.locate(start, stop)

    def locate(self, start: int, stop: int) -> Positions:
        """The positions of the tokens that overlap characters start to stop (exclusive) of the prompt's text."""
        if self.words is None:
            raise SpanError("The prompt's characters are not known: it was given as token ids, without a tokenizer.")
        offsets = self.words.offsets
        return Positions(p for p in self.real if offsets[p][0] < stop and offsets[p][1] > max(start, offsets[p][0]))

    @property
    def labels(self) -> list[str]:
        """What stands at every position: the token's text, or "img[row,col]" (with several pictures "img1[row,col]").

        Without a tokenizer the token id stands for the text.
        """
        labels = list(self.words.tokens) if self.words else [str(token_id) for token_id in self.token_ids]
        rows, columns = self.grid
        for image in range(self.n_images):
            name = f"img{image}" if self.n_images > 1 else "img"
            patches = [f"{name}[{row},{col}]" for row in range(rows) for col in range(columns)]
            start = self._image_start(image)
            labels[start : start + self.n_features] = [f"{name}[cls]"] * self.has_class_token + patches
        return labels

    def patch_to_position(self, row: int, col: int, image: int = 0) -> int:
        """The position of a patch; raises `SpanError` outside the grid or for a picture that is not there."""
        rows, columns = self.grid
        if not (0 <= row < rows and 0 <= col < columns):
            raise SpanError(
                f"Patch ({row}, {col}) is outside the grid of {rows} x {columns} patches; "
                f"rows go from 0 to {rows - 1} and columns from 0 to {columns - 1}."
            )
        return self._image_start(image) + self.has_class_token + row * columns + col

    def position_to_patch(self, position: int) -> tuple[int, int, int]:
        """The (image, row, col) at a position; raises `SpanError` for text, padding and a class token."""
        for image, start in enumerate(self.image_starts):
            index = position - start - self.has_class_token
            if 0 <= index < self.grid[0] * self.grid[1]:
                return image, *divmod(index, self.grid[1])
            if index == -1 and self.has_class_token:
                raise SpanError(f"Position {position} is the class token of image {image}, which is no patch.")
        where = f"images are at {format_runs(self._positions('image'))}" if self.n_images else "the prompt has no image"
        raise SpanError(f"Position {position} is not an image patch; {where}.")

    def patch_box(self, row: int, col: int, image: int = 0) -> Box:
        """The part (x0, y0, x1, y1) of the original picture, in its pixels, that a patch shows.

        Raises `SpanError` outside the grid, for a patch of nothing but padding, and if the originals are not known.
        """
        return self.geometry(image).patch_box(row, col)

    def pixel_to_patch(self, x: SupportsFloat, y: SupportsFloat, image: int = 0) -> tuple[int, int]:
        """The (row, col) of the patch that shows the point (x, y) of the original picture.

        Raises `SpanError` for a point outside the picture or cut away by the processor's crop.
        """
        return self.geometry(image).pixel_to_patch(x, y)

    def box_to_patches(self, box: BoxLike, *, coverage: Number = 0.5, image: int = 0) -> PatchPositions:
        """The patches of which a box (x0, y0, x1, y1) in original pixels covers at least the share `coverage`.

        0 takes every patch that the box touches. The result's `outside` says which share of the box no patch shows.
        Raises `SpanError` for a box wholly outside what the model sees, and if no patch is covered enough.
        """
        geometry, box = self.geometry(image), tuple(box)
        return self._select(geometry.box_shares(box), coverage, image, geometry.outside(box), "box")

    def mask_to_patches(self, mask: np.ndarray | Tensor, *, coverage: Number = 0.5, image: int = 0) -> PatchPositions:
        """The patches of which a mask over the original picture covers at least the share `coverage`.

        The mask is [height, width], bool or 0 and 1. Otherwise as `box_to_patches`.
        """
        shares, outside = self.geometry(image).mask_shares(_bool_mask(mask))
        return self._select(shares, coverage, image, outside, "mask")

    def outside(self, box: BoxLike, image: int = 0) -> float:
        """Share (0 to 1) of a box's area that lies outside the picture or is cut away by the processor's crop."""
        return self.geometry(image).outside(box)

    def geometry(self, image: int = 0) -> ImageGeometry:
        """How one picture came from its original to the patches; raises `SpanError` if the originals are not known."""
        self._image_start(image)
        if self.geometries is None:
            raise SpanError(
                "The original pictures are not known, since pixel_values were given; pixels and boxes need "
                "prepare(question, images=...), which follows the processor's resizing and cropping."
            )
        return self.geometries[image]

    def shifted(self, by: int) -> TokenMap:
        """The map of the same prompt with its padding moved: every token stands `by` positions further right.

        Raises `SpanError` if a token would leave the row.

        >>> TokenMap(token_ids=(7, 8, 0), real=range(2), grid=(2, 2)).shifted(1)["last"]
        Positions(2)
        """
        real = range(self.real.start + by, self.real.stop + by)
        if real.start < 0 or real.stop > len(self):
            raise SpanError(
                f"Shifted by {by}, the tokens would be at {real.start} to {real.stop - 1} of {len(self)} positions; "
                f"expected a shift from {-self.real.start} to {len(self) - self.real.stop}."
            )
        return replace(
            self,
            token_ids=roll(self.token_ids, by),
            real=real,
            image_starts=tuple(start + by for start in self.image_starts),
            words=None if self.words is None else self.words.shifted(by),
            named={name: Positions(p + by for p in positions) for name, positions in self.named.items()},
        )

    def __repr__(self) -> str:
        spans = ", ".join(f"{name}: {format_runs(positions)}" for name, positions in self.spans.items())
        return f"TokenMap({len(self)} positions; {spans})"

    def __str__(self) -> str:
        return format_token_map(self)

    @cached_property
    def _partition(self) -> dict[str, Positions]:
        """All built-in spans, empty where the prompt does not have them."""
        prompt = self.own
        last = Positions(prompt[-1:])
        image = Positions(p for start in self.image_starts for p in range(start, start + self.n_features))
        text = Positions(prompt) - image
        question = (self.named.get("question", Positions()) & text) - last
        options = (self.named.get("options", Positions()) & text) - last
        begin = self.image_starts[0] if image else next(iter(question), self.real.start)
        other = text - question - last
        system = other & range(self.real.start, begin)
        spans = (system, image, question, options, other - system, text, last)
        return dict(zip(SPANS, spans, strict=True))

    def _positions(self, name: str) -> Positions:
        return self._partition[name] if name in SPANS else self.named[name]

    def _image_start(self, image: int) -> int:
        if not 0 <= image < self.n_images:
            pictures = f"{self.n_images} picture{'' if self.n_images == 1 else 's'}"
            raise SpanError(f"There is no image {image}: the prompt has {pictures}, counted from 0.")
        return self.image_starts[image]

    def _checked(self, name: str, positions: Positions) -> Positions:
        if not positions or positions - self.real:
            raise SpanError(
                f"The span {name!r} is given as positions {positions.tolist()}; expected at least one, all from "
                f"{self.real.start} to {self.real.stop - 1}, where this prompt's tokens are."
            )
        return positions

    def _select(
        self, shares: np.ndarray, coverage: Number, image: int, outside: float, what: Literal["box", "mask"]
    ) -> PatchPositions:
        if not 0 <= coverage <= 1:
            raise SpanError(f"coverage={coverage} is not a share of a patch's area; expected 0 to 1.")
        # Full coverage must survive rounding; 0 means any overlap at all.
        chosen = np.flatnonzero((shares > 0) & (shares >= coverage - 1e-9))
        if not len(chosen):
            raise SpanError(
                f"No patch of image {image} is covered by the {what} to a share of {coverage:g}; the most is "
                f"{shares.max():.2g}. Lower coverage= (0 takes every patch that it touches)."
            )
        first = self._image_start(image) + self.has_class_token
        return PatchPositions((first + int(index) for index in chosen), outside=outside)


def _bool_mask(mask: np.ndarray | Tensor) -> np.ndarray:
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask
    if array.ndim != 2 or (array.dtype != np.bool_ and not np.isin(array, (0, 1)).all()):
        raise SpanError(
            f"The mask is of shape {array.shape} and type {array.dtype}; expected [height, width] of the original "
            "picture, bool or only 0 and 1 (mask > threshold makes one)."
        )
    return array.astype(np.bool_)
