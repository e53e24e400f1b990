"""Edges between spans of a prompt, by name: "image->last", "question|rest->last", "object->question"."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from hooked_llava.errors import InputError, SpanError, did_you_mean
from hooked_llava.interventions.intervention import SCORES, Intervention, Where
from hooked_llava.positions import Positions
from hooked_llava.token_map import SPANS

if TYPE_CHECKING:
    from hooked_llava.inputs import Inputs
    from hooked_llava.token_map import TokenMap

Edges = Sequence[str] | Mapping[str, tuple[Where, Where]]
"""Names "source->target", or names with their source and target."""
_OPERATORS: dict[str, Callable[[Positions, Positions], Positions]] = {
    "|": Positions.__or__,
    "&": Positions.__and__,
    "-": Positions.__sub__,
}
STANDARD = (*SPANS, "object", "other", "random", "constraint")
"""Spans that a prompt has or has not: where one is missing an edge may be left out. Any other name must be known."""


@dataclass(frozen=True)
class Edge:
    """From the positions that are attended to (source) to those that attend (target)."""

    name: str
    """What a result calls it."""
    source: Where
    """Spans joined by |, & and -, or positions."""
    target: Where
    """Likewise."""

    @classmethod
    def of(cls, edge: str) -> Edge:
        """The edge of a name "source->target"; raises `InputError`.

        >>> Edge.of("question|rest->last").source
        'question|rest'
        """
        source, arrow, target = edge.partition("->")
        if not arrow or not source.strip() or not target.strip():
            raise InputError(
                f"{edge!r} is no edge; expected 'source->target' with spans of the token map, such as 'image->last'."
            )
        return cls(edge, source.strip(), target.strip())

    @property
    def ends(self) -> tuple[str, str]:
        """Names under which `marked` puts source and target into the token maps."""
        return f"source of {self.name}", f"target of {self.name}"

    def blocked(self, layers: Iterable[int]) -> list[Intervention]:
        """Interventions on marked prompts that keep every target from attending to any source, in some layers."""
        return [Intervention(f"blocks.{layer}.{SCORES}", block=self.ends) for layer in layers]


def edges_of(edges: Edges) -> list[Edge]:
    """The edges that names, or a mapping of names to (source, target), stand for; raises `InputError`.

    >>> [edge.target for edge in edges_of({"mine": ("image", [7])})]
    [[7]]
    """
    if isinstance(edges, str):
        raise InputError(f"edges={edges!r}; expected a list of edges, [{edges!r}] for a single one.")
    if isinstance(edges, Mapping):
        return [Edge(name, *ends) for name, ends in edges.items()]
    if repeated := [edge for i, edge in enumerate(edges) if edge in list(edges)[:i]]:
        raise InputError(f"The edge {repeated[0]!r} is given twice.")
    return [Edge.of(edge) for edge in edges]


def study_edges(edges: Edges) -> list[Edge]:
    """The edges of a study, which must mean the same in every question of its table.

    Raises `SpanError` for names that no question can have, and `InputError` for positions by number.

    >>> [edge.source for edge in study_edges(["image->last"])]
    ['image']
    """
    named = edges_of(edges)
    for edge in named:
        if numbered := [where for where in (edge.source, edge.target) if not isinstance(where, str | None)]:
            raise InputError(
                f"The edge {edge.name!r} names positions by number ({numbered[0]}), which stand for other tokens in every "
                "question; name spans, such as 'image->last', or take attention_knockout prompt by prompt."
            )
    _check_names(named, STANDARD)
    return named


def span(token_map: TokenMap, expression: str, *, seed: int = 0) -> Positions:
    """Positions of spans joined from left to right by |, & and -.

    Besides the token map's own spans there are `other`, the pictures' patches that are not in the user's span `object`,
    and `random`, as many of those as the object has, drawn at random. Raises `SpanError` for spans that the prompt does
    not have.

    >>> from hooked_llava.token_map import TokenMap
    >>> token_map = TokenMap(token_ids=(1, 9, 9, 9, 9, 5), real=range(6), image_starts=(1,), grid=(2, 2))
    >>> span(token_map.with_spans(object=[2]), "other|last")
    Positions(1, 3..5)
    """
    first, *rest = _split(expression)
    found = _one_span(token_map, first, seed)
    for operator, name in zip(rest[::2], rest[1::2], strict=True):
        found = _OPERATORS[operator](found, _one_span(token_map, name, seed))
    return found


def marked(
    prompts: Inputs, edges: Sequence[Edge], *, missing: Literal["raise", "skip"] = "raise", seed: int = 0
) -> tuple[Inputs, np.ndarray]:
    """The prompts with both ends of every edge as spans of their token maps, and which edges [prompt, edge] they have.

    With missing="skip" an edge whose spans a prompt does not have is empty there, and blocks nothing. Raises `SpanError`
    for it otherwise, and always for a span that is none of the standard ones and that no prompt has; and `InputError` for
    edges from later to earlier positions, which attention does not have.
    """
    if missing not in ("raise", "skip"):
        raise InputError(f"missing={missing!r}; expected 'raise' or 'skip'.")
    if missing == "skip":
        _check_names(edges, dict.fromkeys([*STANDARD, *(name for m in prompts.token_maps for name in m.named)]))
    token_maps, present = [], np.ones((len(prompts), len(edges)), dtype=bool)
    for row, token_map in enumerate(prompts.token_maps):
        ends: dict[str, Positions] = {}
        for column, edge in enumerate(edges):
            try:
                source, target = (_positions(token_map, where, seed) for where in (edge.source, edge.target))
            except SpanError:
                if missing == "raise":
                    raise
                source = target = Positions()
                present[row, column] = False
            _check_causal(edge.name, source, target)
            ends |= dict(zip(edge.ends, (source, target), strict=True))
        token_maps.append(replace(token_map, named={**token_map.named, **ends}))
    return replace(prompts, token_maps=tuple(token_maps)), present


def _split(expression: str) -> list[str]:
    """Names and the operators between them."""
    return re.split(r"\s*([|&-])\s*", expression.strip())


def _check_names(edges: Sequence[Edge], known: Iterable[str]) -> None:
    known = list(known)
    for edge in edges:
        for where in (edge.source, edge.target):
            for name in _split(where)[::2] if isinstance(where, str) else ():
                if name not in known:
                    raise SpanError(
                        f"The edge {edge.name!r} names the span {name!r}, which no prompt has.{did_you_mean(name, known)} "
                        f"Known: {', '.join(known)}."
                    )


def _one_span(token_map: TokenMap, name: str, seed: int) -> Positions:
    if name in token_map.named or name not in ("other", "random", "object"):
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


def _positions(token_map: TokenMap, where: Where, seed: int) -> Positions:
    if isinstance(where, str):
        return span(token_map, where, seed=seed)
    if where is None:
        return Positions(token_map.real)
    given = Positions([where] if isinstance(where, int) else where)
    if outside := given - token_map.real:
        raise InputError(
            f"Positions {outside.tolist()} lie outside the prompt, whose tokens are at {token_map.real.start} to "
            f"{token_map.real.stop - 1}."
        )
    return given


def _check_causal(name: str, source: Positions, target: Positions) -> None:
    if source and target and source[0] > target[-1]:
        raise InputError(
            f"The edge {name!r} does not exist: every source lies behind every target, and attention looks back only. "
            "The source is what is attended to, the target what attends."
        )
