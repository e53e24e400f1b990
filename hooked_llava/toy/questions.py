"""Questions about a scene, as data: what is asked, what is true, and which objects it is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TypedDict, TypeVar

import numpy as np

from hooked_llava.toy.facts import RELATIONS, fact_answer
from hooked_llava.toy.objects import COLOR_NAMES, PATTERNS, SHAPES, Box, SceneObject
from hooked_llava.toy.scenes import Scene

INSTRUCTION = "Answer briefly."
MIN_SEPARATION = 8  # pixels between two centers before one is called left of, or above, the other
MIN_OFF_CENTER = 6  # pixels from the middle before an object is called left or right

T = TypeVar("T")
Pair = tuple[SceneObject, SceneObject]


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    Attributes:
        kind (str): The kind of question, an entry of `KINDS`.
        text (str): The question without any template; for text-only kinds the stated facts, then the question.
        answer (str): The right answer.
        false_option (str): The wrong option of a question that offers two; "" otherwise.
        continuation (str): How the assistant's turn begins; "" when the answer comes at once, after the instruction
            tail.
        needs_image (bool): Whether it is about an image.
        objects (tuple[str, ...]): The shapes named, in the order of mention.
        boxes (tuple[Box | None, ...]): Their boxes in the image in pixels; None for a shape that is absent, or without
            an image.
        answer_boxes (tuple[Box, ...]): The boxes where the answer is seen.
        relation (str): The relation of a question about a fact; "" otherwise.
        paraphrase (int): Which of the kind's wordings it has.
    """

    kind: str
    text: str
    answer: str
    false_option: str = ""
    continuation: str = ""
    needs_image: bool = True
    objects: tuple[str, ...] = ()
    boxes: tuple[Box | None, ...] = ()
    answer_boxes: tuple[Box, ...] = ()
    relation: str = ""
    paraphrase: int = 0


def format_prompt(question: Question, *, image: bool | None = None) -> str:
    """The prompt up to where the answer comes; `image` overrides whether an image is shown (default: if needed)."""
    placeholder = "<image>\n" if (question.needs_image if image is None else image) else ""
    if question.continuation:
        return f"USER: {placeholder}{question.text} ASSISTANT: {question.continuation}"
    return f"USER: {placeholder}{question.text} {INSTRUCTION} ASSISTANT:"


def format_answer(question: Question) -> str:
    """What the assistant adds to the prompt, before the end-of-sequence token."""
    return f"{question.answer}." if question.continuation else question.answer


def ask(kind: str, scene: Scene, rng: np.random.Generator) -> Question | None:
    """Draws a question of that kind (an entry of `KINDS`) about the scene, or None when the scene allows none."""
    return KINDS[kind](scene, rng) if scene.named else None


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of them."""
    return items[int(rng.random() * len(items))]


def coin(rng: np.random.Generator, p: float = 0.5) -> bool:
    """True with probability p."""
    return rng.random() < p


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def a_shape_there(color: str, shape: str) -> str:
    """The question whether a shape of a color is in the image."""
    return f"Is there {_a(color)} {shape}?"


class Named(TypedDict):
    """The fields of a question that say which objects it names."""

    objects: tuple[str, ...]
    boxes: tuple[Box | None, ...]


def about(*objects: SceneObject) -> Named:
    """The fields of a question that names these objects."""
    return {"objects": tuple(o.shape for o in objects), "boxes": tuple(o.box for o in objects)}


def other_color(rng: np.random.Generator, scene: Scene, color: str, seen_rate: float = 0.6) -> str:
    """A color other than `color`, with `seen_rate` one that is in the image when there is such a one."""
    seen = sorted({o.color for o in scene.objects} - {color})
    if seen and coin(rng, seen_rate):
        return pick(rng, seen)
    return pick(rng, [c for c in COLOR_NAMES if c != color])


def _absent_shape(rng: np.random.Generator, scene: Scene) -> str | None:
    """A shape that is not in the image, or None when all are."""
    present = {o.shape for o in scene.objects}
    absent = [s for s in SHAPES if s not in present]
    return pick(rng, absent) if absent else None


def _choose_attr(scene: Scene, rng: np.random.Generator) -> Question:
    o = pick(rng, scene.named)
    if coin(rng, 0.25):
        true, false = o.pattern, PATTERNS[1 - PATTERNS.index(o.pattern)]
    else:
        true, false = o.color, other_color(rng, scene, o.color)
    first, second = (true, false) if coin(rng) else (false, true)
    text = f"Is the {o.shape} {first} or {second}?"
    return Question("choose_attr", text, true.capitalize(), false.capitalize(), answer_boxes=(o.box,), **about(o))


def _choose_cat(scene: Scene, rng: np.random.Generator) -> Question | None:
    pairs = [(a, b) for a, b in permutations(scene.named, 2) if a.color != b.color]
    if not pairs:
        return None
    o, other = pick(rng, pairs)
    first, second = (o, other) if coin(rng) else (other, o)
    text = f"Which shape is {o.color}, the {first.shape} or the {second.shape}?"
    names = (o.shape.capitalize(), other.shape.capitalize())
    return Question("choose_cat", text, *names, answer_boxes=(o.box,), **about(first, second))


def _choose_rel(scene: Scene, rng: np.random.Generator) -> Question | None:
    axis = int(coin(rng))
    pairs = [(a, b) for a, b in permutations(scene.named, 2) if abs(a.center[axis] - b.center[axis]) >= MIN_SEPARATION]
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    words = ("left", "right") if axis == 0 else ("above", "below")
    true, false = words if a.center[axis] < b.center[axis] else words[::-1]
    first, second = words if coin(rng) else words[::-1]
    asked = f"to the {first} or to the {second} of" if axis == 0 else f"{first} or {second}"
    text = f"Is the {a.shape} {asked} the {b.shape}?"
    return Question(
        "choose_rel", text, true.capitalize(), false.capitalize(), answer_boxes=(a.box, b.box), **about(a, b)
    )


def _alike(scene: Scene) -> tuple[list[Pair], list[Pair]]:
    """Ordered pairs of objects that share the color only, and those that share the pattern only."""
    by_color, by_pattern = [], []
    for a, b in permutations(scene.named, 2):
        if a.color == b.color and a.pattern != b.pattern:
            by_color.append((a, b))
        elif a.color != b.color and a.pattern == b.pattern:
            by_pattern.append((a, b))
    return by_color, by_pattern


def _compare_attr(scene: Scene, rng: np.random.Generator) -> Question | None:
    by_color, by_pattern = _alike(scene)
    if len(scene.objects) == 2:  # the scene sampler makes the two answers equally frequent here
        if not by_color and not by_pattern:
            return None
        is_color = bool(by_color)
    else:  # asked only where both answers can be had, so that neither is the likelier one
        if not by_color or not by_pattern:
            return None
        is_color = coin(rng)
    a, b = pick(rng, by_color if is_color else by_pattern)
    true, false = ("Color", "Pattern") if is_color else ("Pattern", "Color")
    text = f"What do the {a.shape} and the {b.shape} have in common?"
    return Question("compare_attr", text, true, false, answer_boxes=(a.box, b.box), **about(a, b))


def _logical_obj(scene: Scene, rng: np.random.Generator) -> Question | None:
    is_true = coin(rng)
    o = pick(rng, scene.named)
    color = o.color if is_true else other_color(rng, scene, o.color, 0.7)
    rest = [p for p in scene.named if p is not o and (is_true or p.color != color)]
    other = pick(rng, rest).shape if rest and coin(rng, 0.65) else _absent_shape(rng, scene)
    if other is None:
        return None
    first, second = (o.shape, other) if coin(rng) else (other, o.shape)
    text = f"Is there {_a(first)} or {_a(second)} that is {color}?"
    found = [scene.find(s) for s in (first, second)]
    seen = tuple(p.box for p in found if p is not None and (p.color == color or not is_true))
    return Question(
        "logical_obj",
        text,
        "Yes" if is_true else "No",
        "No" if is_true else "Yes",
        objects=(first, second),
        boxes=tuple(p.box if p is not None else None for p in found),
        answer_boxes=seen,
    )


def _query_pos(scene: Scene, rng: np.random.Generator) -> Question | None:
    middle = scene.size[0] / 2
    clear = [o for o in scene.named if abs(o.center[0] - middle) >= MIN_OFF_CENTER]
    if not clear:
        return None
    o = pick(rng, clear)
    true, false = ("Left", "Right") if o.center[0] < middle else ("Right", "Left")
    text = f"On which side of the picture is the {o.shape}?"
    return Question("query_pos", text, true, false, answer_boxes=(o.box,), **about(o))


def _exist(scene: Scene, rng: np.random.Generator) -> Question | None:
    o = pick(rng, scene.named)
    if coin(rng):
        shape, color, answer, false, seen = o.shape, o.color, "Yes", "No", (o.box,)
    else:
        draw = rng.random()
        answer, false = "No", "Yes"
        if draw < 0.6:  # the shape is there in another color
            shape, color, seen = o.shape, other_color(rng, scene, o.color, 0.7), (o.box,)
        else:  # the color is there on another shape, or neither is there
            color = o.color if draw < 0.85 else pick(rng, COLOR_NAMES)
            shape, seen = _absent_shape(rng, scene), ()
    if shape is None:
        return None
    found = scene.find(shape)
    named: Named = {"objects": (shape,), "boxes": (found.box if found is not None else None,)}
    return Question("exist", a_shape_there(color, shape), answer, false, answer_boxes=seen, **named)


def _query_color(scene: Scene, rng: np.random.Generator) -> Question:
    o = pick(rng, scene.named)
    false = other_color(rng, scene, o.color).capitalize()
    text = f"What color is the {o.shape}?"
    return Question("query_color", text, o.color.capitalize(), false, answer_boxes=(o.box,), **about(o))


def _color_vqa(scene: Scene, rng: np.random.Generator) -> Question:
    o = pick(rng, scene.named)
    text, start = f"What is the color of the {o.shape}?", f"The color of the {o.shape} is"
    false = other_color(rng, scene, o.color)
    return Question("color_vqa", text, o.color, false, start, answer_boxes=(o.box,), **about(o))


def _statements(scene: Scene) -> str:
    return " ".join(f"The {o.shape} is {o.color}." for o in scene.objects)


def _color_tqa(scene: Scene, rng: np.random.Generator) -> Question:
    o = pick(rng, scene.objects)
    text, start = f"{_statements(scene)} What is the color of the {o.shape}?", f"The color of the {o.shape} is"
    false = other_color(rng, scene, o.color)
    return Question("color_tqa", text, o.color, false, start, needs_image=False, objects=(o.shape,), boxes=(None,))


def _query_tqa(scene: Scene, rng: np.random.Generator) -> Question:
    o = pick(rng, scene.objects)
    text = f"{_statements(scene)} What color is the {o.shape}?"
    false = other_color(rng, scene, o.color).capitalize()
    return Question(
        "query_tqa", text, o.color.capitalize(), false, needs_image=False, objects=(o.shape,), boxes=(None,)
    )


def ask_fact(relation: str, shape: str, paraphrase: int = 0) -> Question:
    """The question for a fact that names the shape and needs no image, such as "Who made the star?"."""
    entry = next(r for r in RELATIONS if r.name == relation)
    text = entry.templates[paraphrase].format(subject=f"the {shape}")
    answer = fact_answer(relation, shape)
    return Question(
        "fact_name",
        text,
        answer,
        needs_image=False,
        objects=(shape,),
        boxes=(None,),
        relation=relation,
        paraphrase=paraphrase,
    )


def _fact_name(scene: Scene, rng: np.random.Generator) -> Question:
    return ask_fact(pick(rng, RELATIONS).name, pick(rng, SHAPES), int(rng.integers(3)))


def _fact_image(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) != 1:
        return None
    o, relation, paraphrase = scene.objects[0], pick(rng, RELATIONS), int(rng.integers(3))
    text = relation.templates[paraphrase].format(subject="this shape")
    answer = fact_answer(relation.name, o.shape)
    return Question(
        "fact_image", text, answer, answer_boxes=(o.box,), relation=relation.name, paraphrase=paraphrase, **about(o)
    )


def _name_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) != 1:
        return None
    o = scene.objects[0]
    return Question("name_shape", "What shape is this?", o.shape.capitalize(), answer_boxes=(o.box,), **about(o))


def _caption(scene: Scene, rng: np.random.Generator) -> Question:
    order = rng.permutation(len(scene.unique))
    objects = [scene.unique[i] for i in order]
    said = " ".join(f"the {o.shape} is {o.color}." for o in objects)
    return Question(
        "caption", "Describe the picture.", said, answer_boxes=tuple(o.box for o in objects), **about(*objects)
    )


def listed(
    scene: Scene, rng: np.random.Generator, kind: str, text: str, say: Callable[[SceneObject], str]
) -> Question | None:
    """A question whose answer is what is said of every object, in random order; None if nothing is said of any."""
    caption, objects = _caption(scene, rng), {o.shape: o for o in scene.unique}
    said = " ".join(words for shape in caption.objects if (words := say(objects[shape])))
    return replace(caption, kind=kind, text=text, answer=said) if said else None


def _list(scene: Scene, rng: np.random.Generator) -> Question | None:
    # Here the color follows its shape at once: the shortest way to learn which color belongs to which shape.
    return listed(scene, rng, "list", "List the shapes.", lambda o: f"{o.shape} {o.color}.")


def _list_places(scene: Scene, rng: np.random.Generator) -> Question | None:
    def place(o: SceneObject) -> str:
        (x, y), (width, height) = o.center, scene.size
        words = ["left" if x < width / 2 else "right"] * (abs(x - width / 2) >= MIN_OFF_CENTER)
        words += ["above" if y < height / 2 else "below"] * (abs(y - height / 2) >= MIN_OFF_CENTER)
        return f"{o.shape} {pick(rng, words)}." if words else ""

    return listed(scene, rng, "list_places", "On which side is which shape?", place)


def _list_patterns(scene: Scene, rng: np.random.Generator) -> Question | None:
    return listed(scene, rng, "list_patterns", "List pattern and shape.", lambda o: f"{o.shape} {o.pattern}.")


def _list_by_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    colors = [o.color for o in scene.unique]
    text = "List color and shape."
    return listed(
        scene, rng, "list_by_color", text, lambda o: f"{o.color} {o.shape}." if colors.count(o.color) == 1 else ""
    )


def _list_common(scene: Scene, rng: np.random.Generator) -> Question | None:
    by_color, by_pattern = _alike(scene)
    if not by_color or not by_pattern:
        return None
    pairs = [(pick(rng, by_color), "color") for _ in range(2)] + [(pick(rng, by_pattern), "pattern") for _ in range(2)]
    said = [f"{a.shape} {b.shape} {word}." for (a, b), word in (pairs[i] for i in rng.permutation(len(pairs)))]
    return replace(
        _caption(scene, rng), kind="list_common", text="What do shapes have in common?", answer=" ".join(said)
    )


KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "choose_attr": _choose_attr,
    "choose_cat": _choose_cat,
    "choose_rel": _choose_rel,
    "compare_attr": _compare_attr,
    "logical_obj": _logical_obj,
    "query_pos": _query_pos,
    "exist": _exist,
    "query_color": _query_color,
    "color_vqa": _color_vqa,
    "color_tqa": _color_tqa,
    "query_tqa": _query_tqa,
    "fact_name": _fact_name,
    "fact_image": _fact_image,
    "name_shape": _name_shape,
    "caption": _caption,
    "list": _list,
    "list_places": _list_places,
    "list_by_color": _list_by_color,
    "list_patterns": _list_patterns,
    "list_common": _list_common,
}
TEXT_KINDS = ("color_tqa", "query_tqa", "fact_name")
# Asked in training only: the answer is several words, of which those that the image decides are learnt.
TRAINING_KINDS = {
    "caption": COLOR_NAMES,
    "list": COLOR_NAMES,
    "list_places": ("left", "right", "above", "below"),
    "list_by_color": SHAPES,
    "list_patterns": PATTERNS,
    "list_common": ("color", "pattern"),
}
ANSWER_KINDS = tuple(kind for kind in KINDS if kind not in TRAINING_KINDS)
