"""Where is it? One object per prompt: named spans, substrings, image patches and pixels, all as positions.

The named spans of a prompt (padding belongs to none):

| span | positions |
|---|---|
| `system` | text before the first image, or before the question where there is no image, that is in no other span |
| `image` | all images; `token_map["image", 1]` or `token_map.image(1)` is the second one |
| `base`, `fine`, `newlines` | parts of `image` cut into tiles: the whole at once; its tiles with their newlines; these alone |
| `question` | the question as asked, its options included |
| `options` | the answer options named in the question, a part of it |
| `rest` | every other text: template, instruction tail, answer prefix; if left open, a knockout leaks through it |
| `last` | the last position, from which the answer's first token is predicted; in no other span but `text` [1] |
| `text` | everything that is not image |

[1] Where a prompt ends with an image, `last` is the image's last position, and so part of `image` instead.

An answer appended to the prompt (`metrics.teacher_forced`) is its span `answer` and in none of these: `last` stays the
prompt's own last position. `predicting` are the positions that predict the answer's tokens, from `last` on.

Otherwise `system`, `image`, `question`, `rest` and `last` are disjoint, and together they cover the prompt. Tokens that
reach across the border of a span (a word piece with the question's first letter and the space before it) belong to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, SupportsFloat

import numpy as np
from torch import Tensor

from hooked_llava.architecture.boxes import Box, BoxLike, checked_mask
from hooked_llava.architecture.grid import Cell
from hooked_llava.architecture.image_axis import Number
from hooked_llava.architecture.layout import ALL, ImageLayout, Selection
from hooked_llava.errors import InputError, SpanError, counted
from hooked_llava.prompt import spans as of_spans
from hooked_llava.prompt.positions import PatchPositions, Positions, format_runs
from hooked_llava.prompt.requirements import WORDS_UNKNOWN
from hooked_llava.prompt.token_table import format_table
from hooked_llava.prompt.token_text import TokenText, roll

SPANS = ("system", "image", "question", "options", "rest", "text", "last")
"""The names of the spans, as in the table above."""
_SETTABLE = ("question", "options")
GIVE_POSITIONS = "give positions instead, from token_map.find(words, occurrence=..., whole_words=...)"
"""Advice about words that are not found once, for functions that take positions as well as words."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TokenMap:
    """The positions of one prompt of a batch, padding counted, by name, by words, by patch and by pixel.

    Where an image's layout has several grids, `grid=` chooses one: by default the first for one patch, all for sets.

    >>> from hooked_llava.architecture.layouts import llava_layout
    >>> token_map = TokenMap(
    ...     token_ids=(1, 7, 9, 9, 9, 9, 5, 6), real=range(1, 8), image_starts=(2,), layouts=(llava_layout(2, 2),)
    ... )
    >>> token_map["image"], token_map["system"], token_map["last"]
    (Positions(2..5), Positions(1), Positions(7))
    >>> token_map["text"] - token_map["last"], token_map["text-last"], token_map["system|image"]
    (Positions(1, 6), Positions(1, 6), Positions(1..5))
    >>> token_map.patch_to_position(1, 0), token_map.position_to_patch(4)
    (4, (0, 1, 0))

    Attributes:
        token_ids (tuple[int, ...]): Token id at every position, padding included.
        real (range): The positions that are not padding.
        image_starts (tuple[int, ...]): First position of each image.
        layouts (tuple[ImageLayout, ...]): For each image how its patches become positions.
        words (TokenText | None): Text of the tokens and their characters, if a tokenizer is there.
        named (Mapping[str, Positions]): `question` and `options` where they are known, and the user's own spans.
        n_answer (int): How many of the last positions hold an appended answer, which is in no built-in span.
    """

    token_ids: tuple[int, ...]
    real: range
    image_starts: tuple[int, ...] = ()
    layouts: tuple[ImageLayout, ...] = ()
    words: TokenText | None = None
    named: Mapping[str, Positions] = field(default_factory=dict)
    n_answer: int = 0

    def __post_init__(self) -> None:
        if len(self.layouts) != len(self.image_starts):
            raise InputError(
                f"TokenMap: {len(self.image_starts)} image_starts and {len(self.layouts)} layouts; expected as many."
            )

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, name: str | tuple[str, int]) -> Positions:
        """The positions of a span, or of spans joined by | & and - ("question|last"); `token_map["image", i]` for image i.

        Raises `SpanError` for an unknown name, and for a span that this prompt does not have.
        """
        if isinstance(name, tuple):
            if name[0] != "image":
                raise SpanError(f"token_map[{name[0]!r}, {name[1]}]: only 'image' takes a number; drop the {name[1]}.")
            return self.image(name[1])
        if name not in self._names:
            if of_spans.is_joined(name):
                return self.span(name)
            raise SpanError(of_spans.unknown_span(name, self._names, "" if self.words is None else self.words.text))
        positions = self._positions(name)
        if not positions and name in of_spans.NOT_GIVEN:
            raise SpanError(f"This prompt has no span {name!r}: {of_spans.NOT_GIVEN[name]}.")
        return positions

    def span(self, expression: str, *, seed: int = 0) -> Positions:
        """Positions of spans joined from left to right by | (union), & (intersection) and - (difference).

        Besides the token map's own spans there are `other`, the images' patches that are not in the user's span `object`,
        and `random`, as many of those as the object has, drawn at random. A name that is a span as it stands is never taken
        apart. Raises `SpanError` for spans that the prompt does not have.

        >>> from hooked_llava.architecture.layouts import llava_layout
        >>> token_map = TokenMap(
        ...     token_ids=(1, 9, 9, 9, 9, 5), real=range(6), image_starts=(1,), layouts=(llava_layout(2, 2),)
        ... )
        >>> token_map.with_spans(object=[2]).span("other|last")
        Positions(1, 3..5)
        """
        if expression in self.named:
            return self[expression]
        return of_spans.join_spans(expression, lambda name: self._one_span(name, seed))

    def edge_end(self, where: Any) -> Any:
        """An end of an edge, where `last` is where the answer is read: with an appended answer all positions that predict it.

        >>> TokenMap(token_ids=(1, 7, 8, 5), real=range(4), n_answer=2).edge_end("rest|last")
        'rest|predicting'
        """
        if not isinstance(where, str) or not self.n_answer or where in self.named:
            return where
        return "".join("predicting" if part == "last" else part for part in of_spans.split_expression(where))

    def _one_span(self, name: str, seed: int) -> Positions:
        if name in self.named or name not in of_spans.BY_OBJECT:
            return self[name]
        patches = Positions(p for image in range(self.n_images) for p in self.patches(image))
        ids = [self.token_ids[p] for p in self.real]
        return of_spans.span_by_object(name, self.named.get("object"), patches, ids, start=self.real.start, seed=seed)

    def __contains__(self, name: object) -> bool:
        return name in self.spans

    @property
    def spans(self) -> dict[str, Positions]:
        """Every span that this prompt has and that is not empty, the user's own included."""
        return {name: positions for name in self._names if (positions := self._positions(name))}

    @property
    def own(self) -> range:
        """The prompt's own positions: real ones, without an appended answer."""
        return self.real[: len(self.real) - self.n_answer]

    @property
    def n_images(self) -> int:
        """Number of images in the prompt."""
        return len(self.image_starts)

    @cached_property
    def image_ranges(self) -> tuple[range, ...]:
        """The positions of each image."""
        both = zip(self.image_starts, self.layouts, strict=True)
        return tuple(range(start, start + layout.n_features) for start, layout in both)

    def image(self, image: int = 0) -> Positions:
        """All positions of one image, class token and newlines included; raises `SpanError` out of range."""
        self.layout(image)
        return Positions(self.image_ranges[image])

    def patches(self, image: int = 0, grid: str = ALL) -> Positions:
        """The positions of one image's patches, row by row, without class token and newlines."""
        return self._at(image, self.layout(image).object_features(grid))

    def layout(self, image: int = 0) -> ImageLayout:
        """How one image's patches become positions; raises `SpanError` for an image that is not there."""
        if not 0 <= image < self.n_images:
            images = counted(self.n_images, "image")
            raise SpanError(f"There is no image {image}: the prompt has {images}, counted from 0.")
        return self.layouts[image]

    def with_spans(self, **spans: str | Iterable[int]) -> TokenMap:
        """A copy with further named spans, each a substring that occurs once or positions; the original stays as it is.

        `question` and `options` may be set, also anew. Raises `SpanError` for the other built-in names, for
        positions outside the prompt and for what `find` refuses.

        >>> token_map = TokenMap(token_ids=(1, 7, 8, 5), real=range(4))
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

        `occurrence` (from 0 on) chooses one of several; `within` searches one part of the prompt ("system", "question",
        "tail" or "answer_prefix"). With `whole_words`, "red" is not found in "redder" (scripts without spaces between
        words have no such borders). `advice` is what an error suggests to callers that do not have these options. Raises
        `SpanError` for words that do not occur, or occur several times, with the list of places.
        """
        if self.words is None:
            raise SpanError(f"Cannot look for {words!r}: {WORDS_UNKNOWN}")
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
        """What stands at every position: the token's text, or "img[row,col]" (with several images "img1[row,col]").

        Without a tokenizer the token id stands for the text.
        """
        labels = list(self.words.tokens) if self.words else [str(token_id) for token_id in self.token_ids]
        for image, (here, layout) in enumerate(zip(self.image_ranges, self.layouts, strict=True)):
            labels[here.start : here.stop] = layout.labels(f"img{image}" if self.n_images > 1 else "img")
        return labels

    def patch_to_position(self, row: int, col: int, image: int = 0, grid: str | None = None) -> int:
        """The position of a patch; raises `SpanError` outside the grid or for an image that is not there."""
        return self.layout(image).feature_of(row, col, grid) + self.image_starts[image]

    def position_to_patch(self, position: int, grid: str | None = None) -> tuple[int, int, int]:
        """The (image, row, col) at a position; raises `SpanError` for what is no patch of that grid (see `cell_at`)."""
        image, cell = self.cell_at(position)
        wanted = self.layouts[image].names[0] if grid is None else self.layouts[image].grid(grid).name
        if cell.grid != wanted:
            raise SpanError(
                f"Position {position} is a patch of the {cell.grid} grid of image {image} and not of the {wanted} grid; "
                f"give grid={cell.grid!r}."
            )
        return image, cell.row, cell.col

    def cell_at(self, position: int) -> tuple[int, Cell]:
        """The image at a position, and its cell; raises `SpanError` for text, padding, class tokens and newlines."""
        for image, (here, layout) in enumerate(zip(self.image_ranges, self.layouts, strict=True)):
            if position in here:
                try:
                    return image, layout.cell_at(position - here.start)
                except SpanError:
                    what = "the class token" if layout.class_token and position == here.start else "a newline"
                    raise SpanError(f"Position {position} is {what} of image {image}, which is no patch.") from None
        where = f"images are at {format_runs(self._positions('image'))}" if self.n_images else "the prompt has no image"
        raise SpanError(f"Position {position} is not an image patch; {where}.")

    def patch_box(self, row: int, col: int, image: int = 0, grid: str | None = None) -> Box:
        """The part (x0, y0, x1, y1) of the original image, in its pixels, that a patch shows.

        Raises `SpanError` outside the grid, for a patch of nothing but padding, and if the originals are not known.
        """
        return self.layout(image).cell_box(row, col, grid)

    def pixel_to_patch(
        self, x: SupportsFloat, y: SupportsFloat, image: int = 0, grid: str | None = None
    ) -> tuple[int, int]:
        """The (row, col) of the patch that shows the point (x, y) of the original image.

        Raises `SpanError` for a point outside the image or cut away before the model sees it.
        """
        return self.layout(image).pixel_to_cell(x, y, grid)

    def box_to_patches(
        self, box: BoxLike, *, coverage: Number = 0.5, image: int = 0, grid: str = ALL
    ) -> PatchPositions:
        """The patches of which a box (x0, y0, x1, y1) in original pixels covers at least the share `coverage`.

        0 takes every patch that the box touches. The result's `outside` says which share of the box no patch shows.
        Raises `SpanError` for a box wholly outside what the model sees, and if no patch is covered enough.
        """
        layout = self.layout(image)
        return self._selected(image, layout.box_to_features(box, coverage=coverage, grid=grid, called=f"image {image}"))

    def mask_to_patches(
        self, mask: np.ndarray | Tensor, *, coverage: Number = 0.5, image: int = 0, grid: str = ALL
    ) -> PatchPositions:
        """The patches of which a mask over the original image covers at least the share `coverage`.

        The mask is [height, width], bool or 0 and 1. Otherwise as `box_to_patches`.
        """
        layout, mask = self.layout(image), checked_mask(mask)
        return self._selected(
            image, layout.mask_to_features(mask, coverage=coverage, grid=grid, called=f"image {image}")
        )

    def outside(self, box: BoxLike, image: int = 0, grid: str = ALL) -> float:
        """Share (0 to 1) of a box's area that no patch shows: outside the image, or cut away."""
        return self.layout(image).outside(box, grid)

    def shifted(self, by: int) -> TokenMap:
        """The map of the same prompt with its padding moved: every token stands `by` positions further right.

        Raises `SpanError` if a token would leave the row.

        >>> TokenMap(token_ids=(7, 8, 0), real=range(2)).shifted(1)["last"]
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
        return self.format()

    def format(self, width: int = 100) -> str:
        """Positions, tokens and the spans below them, in lines of at most `width` characters; images and padding collapsed.

        A line is longer only where a single token is.
        """
        tokens = self.words.tokens if self.words is not None else [str(token_id) for token_id in self.token_ids]
        spans = {name: p for name, p in self.spans.items() if name not in self._within_images or name in self.named}
        return format_table(tokens, self.real, self.image_ranges, spans, width)

    @cached_property
    def _partition(self) -> dict[str, Positions]:
        """All built-in spans, empty where the prompt does not have them."""
        prompt = self.own
        last = Positions(prompt[-1:])
        image = Positions(p for here in self.image_ranges for p in here)
        text = Positions(prompt) - image
        question = (self.named.get("question", Positions()) & text) - last
        options = (self.named.get("options", Positions()) & text) - last
        begin = self.image_starts[0] if self.n_images else next(iter(question), self.real.start)
        other = text - question - last
        system = other & range(self.real.start, begin)
        spans = (system, image, question, options, other - system, text, last)
        return dict(zip(SPANS, spans, strict=True))

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*SPANS, *self._within_images, *self.named)))

    @cached_property
    def _within_images(self) -> dict[str, Positions]:
        """The spans within images, such as `base`; the user's own of that name goes before."""
        return of_spans.positions_within_images(self.image_starts, self.layouts)

    def _positions(self, name: str) -> Positions:
        return self._partition[name] if name in SPANS else (self._within_images | dict(self.named))[name]

    def _at(self, image: int, features: np.ndarray) -> Positions:
        return Positions((features + self.image_starts[image]).tolist())

    def _selected(self, image: int, selection: Selection) -> PatchPositions:
        features = selection.features + self.image_starts[image]
        return PatchPositions(features.tolist(), outside=selection.outside)

    def _checked(self, name: str, positions: Positions) -> Positions:
        if not positions or positions - self.real:
            raise SpanError(
                f"The span {name!r} is given as positions {positions.tolist()}; expected at least one, all from "
                f"{self.real.start} to {self.real.stop - 1}, where this prompt's tokens are."
            )
        return positions
