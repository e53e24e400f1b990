"""The models of `tests.compiled` and what is true of them, for tests of every analysis.

What is expected is stated here by hand for each variant, in terms of the spans `word`, `object` and `last`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from hooked_llava.prompt.inputs import Inputs
from tests.compiled import CompiledLLaVA, compiled

OBJECTS = {(0, 3): "red star", (2, 1): "blue ring", (4, 4): "green cross"}
RECOLORED = {**OBJECTS, (2, 1): "red ring"}
LOGIT = 10.0  # of the answer, where all other words have 0
# Where, by layer, what differs between the prompts of a pair stands in the stream that enters the layer.
ROUTES = {
    ("direct", "shape"): ("word", "word", "last", "last", "last"),
    ("direct", "color"): ("object", "object", "object", "object", "last"),
    ("two_hops", "shape"): ("word", "word", "word", "word", "last"),
    ("two_hops", "color"): ("object", "object", "word", "word", "last"),
}
# The heads whose output differs between the prompts, and where: (layer, head, position).
DIFFERING_HEADS = {
    ("direct", "shape"): [(1, 2, "last"), (3, 0, "last")],
    ("direct", "color"): [(3, 0, "last")],
    ("two_hops", "shape"): [(1, 1, "word"), (3, 3, "last")],
    ("two_hops", "color"): [(1, 1, "word"), (3, 3, "last")],
}
ANSWERING = {"direct": (3, 0), "two_hops": (3, 3)}
VARIANTS = sorted(ANSWERING)
ROUTED = sorted(ROUTES)


@cache
def model_of(variant: str) -> CompiledLLaVA:
    """Read it, do not change it."""
    return compiled(variant)


def places(model: CompiledLLaVA) -> dict[str, int]:
    """Positions of the spans in every prompt of this file."""
    token_map = model.ask(OBJECTS, "ring").token_map
    return {name: token_map[name][0] for name in ("word", "object", "last")}


def pair_of(model: CompiledLLaVA, datum: str) -> tuple[Inputs, Inputs]:
    """Two prompts with the answers Blue and Red: other shapes about one image, or one shape about other images."""
    if datum == "color":
        return model.ask(OBJECTS, "ring"), model.ask(RECOLORED, "ring")
    ring, star = model.ask(OBJECTS, "ring"), model.ask(OBJECTS, "star")
    same_spans = replace(star, token_maps=(replace(star.token_map, named=ring.token_map.named),))
    return ring, same_spans
