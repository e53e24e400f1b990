"""Spans joined: "question|last", "image - object", by one small language that every `positions=` and every edge speaks."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.errors import InputError, SpanError, did_you_mean
from hooked_llava.prompt.positions import Positions

_OPERATORS: dict[str, Callable[[Positions, Positions], Positions]] = {
    "|": Positions.__or__,
    "&": Positions.__and__,
    "-": Positions.__sub__,
}
NOT_GIVEN = {
    "image": "the prompt has no image. Give one with prepare(..., images=...)",
    "question": "where the question stands in the prompt was not given. Use prepare(question, template=...), or name "
    "it yourself: token_map.with_spans(question='...')",
    "options": "no answer options were named. Use prepare(..., options=['red', 'blue']), or name them yourself: "
    "token_map.with_spans(options=token_map.find('red') | token_map.find('blue'))",
}
"""What an error says of a span that a prompt does not have."""
BY_WORDS = ("true_option", "false_option", "object_word")
"""Words of a table's question that `datasets.prepare_rows` finds and names: its options, and its objects."""
BY_OBJECT = ("object", "other", "random")
"""The user's span `object`, the images' patches outside it, and as many of those drawn at random."""


def join_spans(expression: str, find: Callable[[str], Positions]) -> Positions:
    """The spans of an expression joined from left to right, each found by its name.

    >>> join_spans("image - object", {"image": Positions(range(4)), "object": Positions([2])}.__getitem__)
    Positions(0..1, 3)
    """
    first, *rest = split_expression(expression)
    found = find(first)
    for operator, name in zip(rest[::2], rest[1::2], strict=True):
        found = _OPERATORS[operator](found, find(name))
    return found


def split_expression(expression: str) -> list[str]:
    """Names and the operators between them.

    >>> split_expression("question | rest-last")
    ['question', '|', 'rest', '-', 'last']
    """
    return re.split(r"\s*([|&-])\s*", expression.strip())


def split_edge(edge: str) -> tuple[str, str]:
    """Source and target of "source->target"; raises `InputError` for what has no arrow, or nothing on one side of it.

    >>> split_edge("question|rest -> last")
    ('question|rest', 'last')
    """
    source, arrow, target = edge.partition("->")
    if not arrow or not source.strip() or not target.strip():
        raise InputError(
            f"{edge!r} is no edge; expected 'source->target' with spans of the token map, such as 'image->last'."
        )
    return source.strip(), target.strip()


def is_joined(expression: str) -> bool:
    """Whether it stands for several spans, or for one that follows from the object."""
    return len(split_expression(expression)) > 1 or expression in BY_OBJECT


def span_by_object(
    name: str, wanted: Positions | None, patches: Positions, token_ids: Sequence[int], *, start: int, seed: int
) -> Positions:
    """The span `other` or `random` of a prompt: the images' patches outside the object, or some of them.

    `token_ids` are the prompt's own, from position `start` on. Raises `SpanError` without an object, and where too few
    patches are left.
    """
    if wanted is None:
        raise SpanError(
            f"This prompt has no span 'object'{'' if name == 'object' else f', which {name!r} needs'}. Say where the object "
            "is: inputs.with_boxes(object=[(x0, y0, x1, y1)]) or inputs.with_spans(object=positions)."
        )
    others = patches - wanted
    if name == "other":
        return others
    if len(others) < len(wanted):
        raise SpanError(
            f"The object covers {len(wanted)} patches and leaves {len(others)}: too few for as many others."
        )
    # The same patches however the prompt is padded or batched, and others for another prompt or object.
    about = [list(token_ids), [p - start for p in wanted]]
    drawn = np.random.default_rng([seed, zlib.crc32(repr(about).encode())])
    return Positions(drawn.choice(others.tolist(), len(wanted), replace=False).tolist())


NEWLINES = "newlines"
"""The newline positions of images, where they have such."""


def positions_within_images(starts: Sequence[int], layouts: Sequence[ImageLayout]) -> dict[str, Positions]:
    """The spans that images have within them: each grid where there are several, its newlines included; and newlines.

    >>> from hooked_llava.architecture import Grid, GridAxis
    >>> base = Grid(name="base", rows=GridAxis.of(1), columns=GridAxis.of(2))
    >>> fine = Grid(name="fine", rows=GridAxis.of(1), columns=GridAxis.of(2), newline="row", first_tile=1)
    >>> positions_within_images([5], [ImageLayout(grids=(base, fine))])
    {'base': Positions(5..6), 'fine': Positions(7..9), 'newlines': Positions(9)}
    """
    found: dict[str, Positions] = {}

    def add(name: str, positions: Iterable[int]) -> None:
        if own := Positions(positions):
            found[name] = found.get(name, Positions()) | own

    for start, layout in zip(starts, layouts, strict=True):
        for grid in layout.grids if len(layout.grids) > 1 else ():
            first = start + layout.first_features[grid.name]
            add(grid.name, range(first, first + grid.n_features))
        add(NEWLINES, (layout.newline_features() + start).tolist())
    return found


def image_parts(starts: Sequence[int], layouts: Sequence[ImageLayout]) -> list[tuple[str, range]]:
    """The positions of every image under its name; where it has several grids, those of each apart.

    >>> from hooked_llava.architecture.layouts import llava_layout
    >>> image_parts([1, 6], [llava_layout(2, 2), llava_layout(1, 2)])
    [('image 0', range(1, 5)), ('image 1', range(6, 8))]
    """
    parts = []
    for number, (start, layout) in enumerate(zip(starts, layouts, strict=True)):
        name = "image" if len(layouts) == 1 else f"image {number}"
        stops = [*(layout.first_features[grid] for grid in layout.names[1:]), layout.n_features]
        for grid, first, stop in zip(layout.names, [0, *stops[:-1]], stops, strict=True):
            parts.append((name if len(stops) == 1 else f"{name}, {grid}", range(start + first, start + stop)))
    return parts


def unknown_span(name: str, known: Sequence[str], text: str) -> str:
    """What an error says of a name that is no span; `text` is the prompt's, in which it may stand."""
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
