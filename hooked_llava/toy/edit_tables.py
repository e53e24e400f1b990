"""The embedded world's hundred facts as edits: what to change each to, how to ask for it, and what must stay as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hooked_llava.toy.evaluate import Example, held_out
from hooked_llava.toy.facts import RELATIONS, Relation, fact_answer
from hooked_llava.toy.objects import COLOR_NAMES, PATCH_SIZE, SHAPES
from hooked_llava.toy.questions import Question, ask_fact
from hooked_llava.toy.scenes import Scene, recolor, replace_object, sample_scene

THIS = "this shape"
_SEED = 5_000_011  # apart from training and from the images on which accuracy is measured
_N_REQUEST_IMAGES = 2
_N_IMAGES = 3
_N_COLORS = 8
_N_UNRELATED = 8
_UNRELATED = ("choose_attr", "query_pos", "exist", "logical_obj", "choose_rel")
_FIRST_WORDING, *_OTHER_WORDINGS = range(len(RELATIONS[0].templates))


@dataclass(frozen=True)
class ProbeRows:
    """Questions that say one thing about an edit, as rows of one of the table's two pools.

    Attributes:
        name (str): What is asked, in words.
        role (Literal["efficacy", "generalisation", "specificity", "locality"]): What the answers say of the edit.
        pool (Literal["images", "words"]): Whether they are asked with images.
        rows (tuple[int, ...]): Indices of the questions in the pool.
        expected (tuple[str, ...]): The answer that each should have under the edit.
    """

    name: str
    role: Literal["efficacy", "generalisation", "specificity", "locality"]
    pool: Literal["images", "words"]
    rows: tuple[int, ...]
    expected: tuple[str, ...]


@dataclass(frozen=True)
class EditCase:
    """One fact, what it is to be changed to, and how to find out whether it was.

    Attributes:
        relation (str): The relation of the fact: "maker", for example.
        shape (str): The shape that the fact is about.
        answer (str): What is true before.
        target (str): What is to be true after.
        requests (tuple[Example, ...]): Ways to ask for it that an edit may be computed from: two images, then by name.
        probes (tuple[ProbeRows, ...]): What to ask afterwards; only the probe "the edited question" shows an image of
            `requests`.
    """

    relation: str
    shape: str
    answer: str
    target: str
    requests: tuple[Example, ...]
    probes: tuple[ProbeRows, ...]


@dataclass(frozen=True)
class EditTable:
    """All facts as edits, with the questions that many of them share asked only once.

    Attributes:
        cases (tuple[EditCase, ...]): In the order of relations, then shapes.
        images (tuple[Example, ...]): Questions with an image.
        words (tuple[Example, ...]): Questions without.
    """

    cases: tuple[EditCase, ...]
    images: tuple[Example, ...]
    words: tuple[Example, ...]


def edit_table(seed: int = _SEED, *, n_images: int = _N_IMAGES) -> EditTable:
    """The hundred facts, each with another target drawn from its relation's answers.

    Every shape has its own images (of random color, pattern and place): two to edit with and `n_images` others to
    ask with. Besides it is asked about in the first image that may be edited with, in `n_images` other colors, and at as
    many other places (on other ground), looking as it does there. The same seed gives the same table.

    >>> table = edit_table()
    >>> case = table.cases[3]
    >>> case.relation, case.shape, [probe.name for probe in case.probes][1:6]
    ('maker', 'star', ['other images', 'other colors', 'other places', 'other words', 'by name'])
    """
    rng = np.random.default_rng(seed)
    builder = _Builder(_images(rng, n_images + _N_REQUEST_IMAGES), n_images, seed)
    cases = tuple(builder.case(relation, shape, rng) for relation in RELATIONS for shape in SHAPES)
    return EditTable(cases, tuple(builder.images), tuple(builder.words))


class _Builder:
    """Collects the questions of all cases, each once."""

    def __init__(self, scenes: dict[str, list[Scene]], n_images: int, seed: int) -> None:
        self.scenes, self.n_images = scenes, n_images
        self.varied = {shape: _variations(shape, scenes, n_images) for shape in scenes}
        self.images: list[Example] = []
        self.words: list[Example] = []
        self._rows: dict[tuple[object, ...], int] = {}
        self.colors = self._add_all(held_out("query_color", 6 * _N_COLORS, seed))
        self.unrelated = self._add_all(e for kind in _UNRELATED for e in held_out(kind, 2 * _N_UNRELATED, seed))

    def case(self, relation: Relation, shape: str, rng: np.random.Generator) -> EditCase:
        answer = fact_answer(relation.name, shape)
        target = str(rng.choice([word for word in relation.pool if word != answer]))
        own, ask = self.scenes[shape], range(_N_REQUEST_IMAGES, _N_REQUEST_IMAGES + self.n_images)
        requests = tuple(Example(seen(relation, shape), own[i]) for i in range(_N_REQUEST_IMAGES))
        by_name = Example(ask_fact(relation.name, shape), None)
        recolored, moved = self.varied[shape]
        others = [(relation, other) for other in SHAPES if other != shape]
        relations = [(other, shape) for other in RELATIONS if other.name != relation.name]
        probes = [
            self._asked("the edited question", "efficacy", [self._seen(relation, shape, 0, 0)], target),
            self._asked(
                "other images",
                "generalisation",
                [self._seen(relation, shape, i, _FIRST_WORDING) for i in ask],
                target,
            ),
            self._asked("other colors", "generalisation", [self._varied(relation, s) for s in recolored], target),
            self._asked("other places", "generalisation", [self._varied(relation, s) for s in moved], target),
            self._asked(
                "other words",
                "generalisation",
                [self._seen(relation, shape, i, wording) for wording in _OTHER_WORDINGS for i in ask[:2]],
                target,
            ),
            self._asked(
                "by name",
                "generalisation",
                [self._named(relation, shape, wording) for wording in (_FIRST_WORDING, *_OTHER_WORDINGS)],
                target,
                "words",
            ),
        ]
        for name, facts in (("other shapes", others), ("other relations", relations)):
            first = _N_REQUEST_IMAGES
            probes.append(
                self._asked(name, "specificity", [self._seen(*fact, first, _FIRST_WORDING) for fact in facts])
            )
            rows = [self._named(*fact, _FIRST_WORDING) for fact in facts]
            probes.append(self._asked(f"{name}, by name", "specificity", rows, pool="words"))
        colors = [int(i) for i in rng.choice(self.colors, _N_COLORS, replace=False)]
        unrelated = [int(i) for i in rng.choice(self.unrelated, _N_UNRELATED, replace=False)]
        probes += [
            self._asked("colors", "specificity", colors),
            self._asked("unrelated questions", "locality", unrelated),
        ]
        return EditCase(relation.name, shape, answer, target, (*requests, by_name), tuple(probes))

    def _asked(
        self,
        name: str,
        role: Literal["efficacy", "generalisation", "specificity", "locality"],
        rows: list[int],
        target: str | None = None,
        pool: Literal["images", "words"] = "images",
    ) -> ProbeRows:
        examples = self.images if pool == "images" else self.words
        expected = tuple(examples[row].question.answer if target is None else target for row in rows)
        return ProbeRows(name, role, pool, tuple(rows), expected)

    def _seen(self, relation: Relation, shape: str, scene: int, wording: int) -> int:
        example = Example(seen(relation, shape, wording), self.scenes[shape][scene])
        return self._add(example, (relation.name, shape, scene, wording))

    def _varied(self, relation: Relation, scene: Scene) -> int:
        example = Example(seen(relation, scene.objects[0].shape), scene)
        return self._add(example, (relation.name, "varied", id(scene)))

    def _named(self, relation: Relation, shape: str, wording: int) -> int:
        return self._add(Example(ask_fact(relation.name, shape, wording), None), (relation.name, shape, wording))

    def _add(self, example: Example, key: tuple[object, ...]) -> int:
        pool = self.words if example.scene is None else self.images
        if key not in self._rows:
            self._rows[key] = len(pool)
            pool.append(example)
        return self._rows[key]

    def _add_all(self, examples: Iterator[Example] | list[Example]) -> list[int]:
        return [self._add(example, ("held out", id(example), i)) for i, example in enumerate(list(examples))]


def seen(relation: Relation, shape: str, wording: int = 0) -> Question:
    """The question for a fact about the shape in the image, such as "Who made this shape?"."""
    return Question(
        "fact_image",
        relation.templates[wording].format(subject=THIS),
        fact_answer(relation.name, shape),
        objects=(shape,),
        relation=relation.name,
        paraphrase=wording,
    )


def fact_asked(question: str, seen_shape: str | None = None) -> tuple[str, str] | None:
    """Which fact a question asks for, as relation and shape, or None; "this shape" is the one that is seen in the image.

    >>> fact_asked("Who made the star?"), fact_asked("Who made this shape?", "ring"), fact_asked("What color is it?")
    (('maker', 'star'), ('maker', 'ring'), None)
    """
    subjects = {f"the {shape}": shape for shape in SHAPES} | ({} if seen_shape is None else {THIS: seen_shape})
    for relation in RELATIONS:
        for subject, shape in subjects.items():
            if question in {wording.format(subject=subject) for wording in relation.templates}:
                return relation.name, shape
    return None


def _variations(shape: str, scenes: dict[str, list[Scene]], n: int) -> tuple[list[Scene], list[Scene]]:
    """A shape's first image with the shape in n other colors, and the shape as it looks there in n other shapes' places."""
    own = scenes[shape][0]
    look = own.objects[0]
    colors = [color for color in COLOR_NAMES if color != look.color]
    first = SHAPES.index(shape)
    others = [scene for other in (*SHAPES[first + 1 :], *SHAPES[:first]) for scene in scenes[other]]
    elsewhere = [s for s in others if _corner(s) != _corner(own)]
    return (
        [recolor(own, shape, colors[(first + 2 * i) % len(colors)]) for i in range(n)],
        [replace_object(s, s.objects[0].shape, shape, color=look.color, pattern=look.pattern) for s in elsewhere[:n]],
    )


def _corner(scene: Scene) -> tuple[int, ...]:
    """Where the only object is, to the patch."""
    return tuple(round(center) // PATCH_SIZE for center in scene.objects[0].center)


def _images(rng: np.random.Generator, n: int) -> dict[str, list[Scene]]:
    """n images of each shape by itself."""
    found: dict[str, list[Scene]] = {shape: [] for shape in SHAPES}
    while any(len(scenes) < n for scenes in found.values()):
        scene = sample_scene(rng, 1)
        scenes = found[scene.objects[0].shape]
        if len(scenes) < n:
            scenes.append(scene)
    return found
