"""Edges between spans of a prompt, by name: "image->last", "question|rest->last", "object->question".

As an end of an edge, `last` is where the answer is read: as a rule the prompt's last position. Where an answer is appended to
the prompt (`metrics.teacher_forced`), it is the span `predicting`: every position that predicts one of the answer's tokens,
since an edge into the first of them alone would leave the others open. `token_map["last"]` stays the prompt's last position;
give it as positions, {"image->prompt's last": ("image", token_map["last"])}, to block that one alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from hooked_llava.architecture.layouts import BASE, FINE
from hooked_llava.checks import one_of
from hooked_llava.errors import InputError, SpanError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.positions import Positions
from hooked_llava.prompt.spans import BY_OBJECT, BY_WORDS, NEWLINES, split_edge, split_expression
from hooked_llava.prompt.token_map import SPANS, TokenMap
from hooked_llava.prompt.where import Where, positions_of
from hooked_llava.replay.intervention import Intervention

OneEdge = str | tuple[Where, Where]
"""A name "source->target", or the pair (source, target)."""
Edges = OneEdge | Sequence[OneEdge] | Mapping[str, OneEdge]
"""One edge, several, or several by names of one's own."""
Missing = Literal["raise", "skip"]
STANDARD = (*SPANS, BASE, FINE, NEWLINES, *BY_OBJECT, *BY_WORDS, "constraint")
"""Spans that a prompt has or has not: where one is missing an edge may be left out. Any other name must be known."""


@dataclass(frozen=True)
class Edge:
    """From the positions that are attended to (source) to those that attend (target).

    Attributes:
        name (str): What a result calls it.
        source (Where): Spans joined by |, & and -, or positions.
        target (Where): Likewise.
    """

    name: str
    source: Where
    target: Where

    @classmethod
    def of(cls, edge: OneEdge, name: str | None = None) -> Edge:
        """The edge of a name "source->target" or a pair (source, target), under a name of one's own; raises `InputError`.

        >>> Edge.of("question|rest->last").source, Edge.of(("image", [7])).name
        ('question|rest', 'image->[7]')
        """
        if isinstance(edge, str):
            return cls(name or edge, *split_edge(edge))
        if not isinstance(edge, Sequence) or len(edge) != 2:
            raise InputError(f"{edge!r} is no edge; expected 'source->target', or a pair such as ('image', 'last').")
        return cls(name or "->".join(map(_named, edge)), *edge)

    @property
    def ends(self) -> tuple[str, str]:
        """Names under which `marked` puts source and target into the token maps."""
        return f"source of {self.name}", f"target of {self.name}"

    def weighted(self, layers: Iterable[int], factor: float = 0.0) -> list[Intervention]:
        """Interventions on marked prompts that multiply the attention of every target to the sources, in some layers.

        By default no target may attend to any source.
        """
        if factor == 0:
            return [Intervention(("attn_scores", layer), block=self.ends) for layer in layers]
        return [Intervention(("attn_scores", layer), reweight=self.ends, factor=factor) for layer in layers]


def edges_of(edges: Edges) -> list[Edge]:
    """The edges that are meant: one or several, each a name or a pair, or a mapping to them; raises `InputError`.

    >>> [edge.target for edge in edges_of({"mine": ("image", [7]), "other": "image->last"})]
    [[7], 'last']
    >>> edges_of(("image", "last")) == edges_of("image->last") == edges_of(["image->last"])
    True
    """
    if not isinstance(edges, str) and not edges:
        raise InputError(f"edges={edges!r} names no edge; expected at least one, such as 'image->last'.")
    if isinstance(edges, Mapping):
        return [Edge.of(edge, name) for name, edge in edges.items()]
    found = [Edge.of(edge) for edge in ([edges] if _is_one(edges) else edges)]  # type: ignore[list-item] (told apart)
    names = [edge.name for edge in found]
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise InputError(f"The edge {repeated[0]!r} is given twice; name each edge once.")
    return found


def edge_change(factor: float = 0.0) -> str:
    """What is done to edges whose attention is multiplied by this factor, in words.

    >>> edge_change(), edge_change(0.3)
    ('blocked', 'weighted by 0.3')
    """
    return f"weighted by {factor:g}" if factor else "blocked"


def _is_one(edges: OneEdge | Sequence[OneEdge]) -> bool:
    """Whether this is one edge: a name, or a pair whose entries are no edges themselves."""
    if isinstance(edges, str):
        return True
    return isinstance(edges, tuple) and len(edges) == 2 and not any(_is_edge(entry) for entry in edges)


def _is_edge(entry: object) -> bool:
    if isinstance(entry, str):
        return "->" in entry
    return isinstance(entry, tuple) and len(entry) == 2 and not all(hasattr(end, "__index__") for end in entry)


def edge_names(edges: Edges) -> list[str]:
    """What results call these edges; a string may also be a name of one's own.

    >>> edge_names([("image", "last"), "mine"])
    ['image->last', 'mine']
    """
    if isinstance(edges, Mapping):
        return list(edges)
    listed = [edges] if _is_one(edges) else edges
    return [edge if isinstance(edge, str) else Edge.of(edge).name for edge in listed]  # type: ignore[arg-type]


def _named(where: Where) -> str:
    """An end of an edge in words."""
    if isinstance(where, str) or where is None:
        return where or "all"
    return str(list(where) if isinstance(where, Iterable) else where)


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


def marked(
    prompts: Inputs, edges: Sequence[Edge], *, missing: Missing = "raise", seed: int = 0
) -> tuple[Inputs, np.ndarray]:
    """The prompts with both ends of every edge as spans of their token maps, and which edges [prompt, edge] they have.

    With missing="skip" an edge whose spans a prompt does not have is empty there, and blocks nothing. Raises `SpanError`
    for it otherwise, and always for a span that is none of the standard ones and that no prompt has; and `InputError` for
    edges from later to earlier positions, which attention does not have.
    """
    one_of(missing, get_args(Missing), "missing")
    if missing == "skip":
        _check_names(edges, dict.fromkeys([*STANDARD, *(name for m in prompts.token_maps for name in m.named)]))
    token_maps, present = [], np.ones((len(prompts), len(edges)), dtype=bool)
    for row, token_map in enumerate(prompts.token_maps):
        ends: dict[str, Positions] = {}
        for column, edge in enumerate(edges):
            with prompts.naming(row):
                found = _both_ends(token_map, edge, seed, missing)
            present[row, column] = found is not None
            ends |= dict(zip(edge.ends, found or (Positions(), Positions()), strict=True))
        token_maps.append(replace(token_map, named={**token_map.named, **ends}))
    return replace(prompts, token_maps=tuple(token_maps)), present


def _both_ends(token_map: TokenMap, edge: Edge, seed: int, missing: Missing) -> tuple[Positions, Positions] | None:
    """Source and target of an edge in one prompt; None for spans that it does not have, where that is allowed."""
    try:
        source, target = (_positions(token_map, where, seed) for where in (edge.source, edge.target))
        if not source or not target:
            raise SpanError(f"The edge {edge.name!r} does not exist: one of its ends has no positions. Give both some.")
    except SpanError:
        if missing == "raise":
            raise
        return None
    _check_causal(edge.name, source, target)
    return source, target


def _check_names(edges: Sequence[Edge], known: Iterable[str]) -> None:
    known = list(known)
    for edge in edges:
        for where in (edge.source, edge.target):
            for name in split_expression(where)[::2] if isinstance(where, str) else ():
                says = f"The edge {edge.name!r} names the span {name!r}, which no prompt has."
                one_of(name, known, "edges", says=says, error=SpanError)


def _positions(token_map: TokenMap, where: Where, seed: int) -> Positions:
    given = Positions(positions_of(token_map.edge_end(where), token_map, len(token_map), seed=seed))
    if outside := given - token_map.real:
        raise InputError(
            f"Positions {outside.tolist()} lie outside the prompt, whose tokens are at {token_map.real.start} to "
            f"{token_map.real.stop - 1}."
        )
    return given


def _check_causal(name: str, source: Positions, target: Positions) -> None:
    if source[0] > target[-1]:
        raise InputError(
            f"The edge {name!r} does not exist: every source comes after every target, and attention looks back only. "
            "The source is what is attended to, the target what attends."
        )
