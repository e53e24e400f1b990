"""The questions that only `tiny-shapes-next` is asked: about small objects, about neighbors, and how many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from hooked_llava.toy.objects import COLOR_NAMES, SceneObject
from hooked_llava.toy.questions import Question, about, coin, listed, other_color, pick
from hooked_llava.toy.scenes import Scene
from hooked_llava.toy.wide_scenes import beside

NUMBERS = ("one", "two", "three", "four")
WIDE_WORDS = (
    "How",
    "many",
    "are",
    "Count",
    "every",
    *NUMBERS,
    *(n.capitalize() for n in NUMBERS),
    "other",
    "has",
    "same",
)
"""The words of these questions that `tiny-shapes` does not know."""
_TRIED = (0.12, 0.18, 0.25, 0.45)
"""How often each number is tried: the more seldom images have that many of a color, the more often."""


def _query_small(scene: Scene, rng: np.random.Generator) -> Question | None:
    small = [o for o in scene.unique if o.small]
    if not small:
        return None
    o = pick(rng, small)
    text, false = f"What color is the {o.shape}?", other_color(rng, scene, o.color).capitalize()
    return Question("query_small", text, o.color.capitalize(), false, answer_boxes=(o.box,), **about(o))


def _query_beside(scene: Scene, rng: np.random.Generator) -> Question | None:
    """The answer is seen on another object than the one that is named; the wrong option is the color of that one."""
    side = "left" if coin(rng) else "right"
    pairs = [(o, p) for o in scene.named if (p := beside(scene, o, side)) is not None]
    if not pairs:
        return None
    o, answer = pick(rng, pairs)
    false = o.color if o.color != answer.color else other_color(rng, scene, answer.color)
    text = f"What color is the shape {side} of the {o.shape}?"
    words = (answer.color.capitalize(), false.capitalize())
    return Question("query_beside", text, *words, answer_boxes=(answer.box,), **about(o))


def _like(scene: Scene, o: SceneObject) -> SceneObject | None:
    """The one other object of the same color; None if there is none, or several, or its shape is there twice."""
    others = [p for p in scene.objects if p is not o and p.color == o.color]
    return others[0] if len(others) == 1 and others[0] in scene.unique else None


def _query_same(scene: Scene, rng: np.random.Generator) -> Question | None:
    """The color of the named object is found out first, and with it the object that is asked for."""
    pairs = [(o, p) for o in scene.named if (p := _like(scene, o)) is not None]
    if not pairs:
        return None
    o, answer = pick(rng, pairs)
    rest = [p.shape for p in scene.unique if p is not o and p is not answer]
    false = pick(rng, rest) if rest else o.shape
    text = f"Which other shape has the color of the {o.shape}?"
    words = (answer.shape.capitalize(), false.capitalize())
    return Question("query_same", text, *words, answer_boxes=(answer.box,), **about(o))


def _count_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Asked as often for each number, as far as the images allow."""
    n = int(rng.choice(len(NUMBERS), p=_TRIED)) + 1
    counts = Counter(o.color for o in scene.objects)
    colors = [color for color in COLOR_NAMES if counts[color] == n]
    if not colors:
        return None
    color, off = pick(rng, colors), 1 if n == 1 or (n < len(NUMBERS) and coin(rng)) else -1
    words = (NUMBERS[n - 1].capitalize(), NUMBERS[n - 1 + off].capitalize())
    seen = tuple(o.box for o in scene.objects if o.color == color)
    return Question("count_color", f"How many shapes are {color}?", *words, answer_boxes=seen)


def _list_beside(scene: Scene, rng: np.random.Generator) -> Question | None:
    side = "left" if coin(rng) else "right"

    def say(o: SceneObject) -> str:
        other = beside(scene, o, side)
        return "" if other is None else f"{side} {o.shape} {other.color}."

    return listed(scene, rng, "list_beside", "List left and right.", say)


def _list_same(scene: Scene, rng: np.random.Generator) -> Question | None:
    # The second shape begins with a capital: it alone is learnt.
    def say(o: SceneObject) -> str:
        other = _like(scene, o)
        return "" if other is None else f"{o.shape} {other.shape.capitalize()}."

    return listed(scene, rng, "list_same", "List shapes of the same color.", say)


def _list_counts(scene: Scene, rng: np.random.Generator) -> Question | None:
    counts = Counter(o.color for o in scene.objects)
    colors = [color for color in COLOR_NAMES if 1 <= counts[color] <= len(NUMBERS)]
    said = " ".join(f"{colors[i]} {NUMBERS[counts[colors[i]] - 1]}." for i in rng.permutation(len(colors)))
    return Question("list_counts", "Count every color.", said) if said else None


WIDE_KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "query_small": _query_small,
    "query_beside": _query_beside,
    "count_color": _count_color,
    "query_same": _query_same,
}
WIDE_TRAINING_KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "list_beside": _list_beside,
    "list_same": _list_same,
    "list_counts": _list_counts,
}
