"""Spans joined: "question|last", "image - object", by one small language that every `positions=` and every edge speaks."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_llava.errors import InputError, SpanError
from hooked_llava.prompt.positions import Positions

if TYPE_CHECKING:
    from hooked_llava.prompt.token_map import TokenMap

_OPERATORS: dict[str, Callable[[Positions, Positions], Positions]] = {
    "|": Positions.__or__,
    "&": Positions.__and__,
    "-": Positions.__sub__,
}
BY_OBJECT = ("object", "other", "random")
"""The user's span `object`, the images' patches outside it, and as many of those drawn at random."""


def span(token_map: TokenMap, expression: str, *, seed: int = 0) -> Positions:
    """Positions of spans joined from left to right by | (union), & (intersection) and - (difference).

    Besides the token map's own spans there are `other`, the images' patches that are not in the user's span `object`,
    and `random`, as many of those as the object has, drawn at random. A name that is a span as it stands is never taken
    apart. Raises `SpanError` for spans that the prompt does not have.

    >>> from hooked_llava.prompt.token_map import TokenMap
    >>> token_map = TokenMap(token_ids=(1, 9, 9, 9, 9, 5), real=range(6), image_starts=(1,), grid=(2, 2))
    >>> span(token_map.with_spans(object=[2]), "other|last")
    Positions(1, 3..5)
    """
    if expression in token_map.named:
        return token_map[expression]
    first, *rest = split_expression(expression)
    found = _one_span(token_map, first, seed)
    for operator, name in zip(rest[::2], rest[1::2], strict=True):
        found = _OPERATORS[operator](found, _one_span(token_map, name, seed))
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


def edge_end(where: Any, token_map: TokenMap) -> Any:
    """An end of an edge, where `last` is where the answer is read: with an appended answer all positions that predict it.

    >>> from hooked_llava.prompt.token_map import TokenMap
    >>> edge_end("rest|last", TokenMap(token_ids=(1, 7, 8, 5), real=range(4), grid=(2, 2), n_answer=2))
    'rest|predicting'
    """
    if not isinstance(where, str) or not token_map.n_answer or where in token_map.named:
        return where
    return "".join("predicting" if part == "last" else part for part in split_expression(where))


def is_joined(expression: str) -> bool:
    """Whether `span` has more to say of it than that it is unknown: several spans, or one that follows from the object."""
    return len(split_expression(expression)) > 1 or expression in BY_OBJECT


def _one_span(token_map: TokenMap, name: str, seed: int) -> Positions:
    if name in token_map.named or name not in BY_OBJECT:
        return token_map[name]
    if "object" not in token_map.named:
        raise SpanError(
            f"This prompt has no span 'object'{'' if name == 'object' else f', which {name!r} needs'}. Say where the object "
            "is: inputs.with_boxes(object=[(x0, y0, x1, y1)]) or inputs.with_spans(object=positions)."
        )
    wanted = token_map["object"]
    others = Positions(p for i in range(token_map.n_images) for p in token_map.patches(i)) - wanted
    if name == "other":
        return others
    if len(others) < len(wanted):
        raise SpanError(
            f"The object covers {len(wanted)} patches and leaves {len(others)}: too few for as many others."
        )
    # The same patches however the prompt is padded or batched, and others for another prompt or object.
    start = token_map.real.start
    about = [[token_map.token_ids[p] for p in token_map.real], [p - start for p in wanted]]
    drawn = np.random.default_rng([seed, zlib.crc32(repr(about).encode())])
    return Positions(drawn.choice(others.tolist(), len(wanted), replace=False).tolist())
