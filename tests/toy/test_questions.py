"""Answers are true of their scene (worked out again from the words of the question) and balanced."""

import re
from collections import Counter
from functools import cache

import numpy as np
import pytest

from hooked_llava.toy.facts import RELATIONS, fact_answer, fact_table
from hooked_llava.toy.objects import COLOR_NAMES, SHAPES, SceneObject
from hooked_llava.toy.questions import (
    ANSWER_KINDS,
    KINDS,
    TEXT_KINDS,
    TRAINING_KINDS,
    Question,
    ask,
    ask_fact,
    format_answer,
    format_prompt,
)
from hooked_llava.toy.scenes import Scene, sample_scene

N_ASKED = 600


@cache
def scene_pool(n_objects: int | None) -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng, n_objects) for _ in range(500 if n_objects is None else 50)]


@cache
def asked(kind: str) -> list[tuple[Scene, Question]]:
    rng = np.random.default_rng(sorted(KINDS).index(kind))
    pool = scene_pool(1 if kind in ("fact_image", "name_shape") else None)
    pairs: list[tuple[Scene, Question]] = []
    while len(pairs) < N_ASKED:
        scene = pool[rng.integers(len(pool))]
        question = ask(kind, scene, rng)
        if question is not None:
            pairs.append((scene, question))
    return pairs


def mentioned(scene: Scene, text: str) -> list[SceneObject]:
    found = {o.shape: o for o in scene.objects}
    return [found[w] for w in re.findall(r"\w+", text) if w in found]


def solve(scene: Scene, text: str) -> str:  # noqa: PLR0911
    """The right answer, from the question's words and the scene alone."""
    words = re.findall(r"\w+", text)
    if match := re.fullmatch(r"Is the (\w+) (\w+) or (\w+)\?", text):
        o = scene.find(match[1])
        assert o is not None
        return o.color if match[2] in COLOR_NAMES else o.pattern
    if match := re.match(r"Which shape is (\w+), the (\w+) or the (\w+)", text):
        (one,) = [o for o in mentioned(scene, text) if o.color == match[1]]
        return one.shape
    if "above" in words or "left" in words:
        a, b = mentioned(scene, text)
        axis = int("above" in words)
        assert abs(a.center[axis] - b.center[axis]) >= 8
        return (("left", "right"), ("above", "below"))[axis][int(a.center[axis] > b.center[axis])]
    if "common" in words:
        a, b = mentioned(scene, text)
        assert (a.color == b.color) != (a.pattern == b.pattern)
        return "color" if a.color == b.color else "pattern"
    if match := re.match(r"Is there an? (\w+) or an? (\w+) that is (\w+)", text):
        return "yes" if any(o.shape in match.groups()[:2] and o.color == match[3] for o in scene.objects) else "no"
    if match := re.match(r"Is there an? (\w+) (\w+)\?", text):
        return "yes" if any((o.color, o.shape) == match.groups() for o in scene.objects) else "no"
    if "side" in words:
        (o,) = mentioned(scene, text)
        assert abs(o.center[0] - 32) >= 6
        return "left" if o.center[0] < 32 else "right"
    if words[:3] == ["What", "shape", "is"]:
        return scene.objects[0].shape
    assert "color" in words
    (o,) = mentioned(scene, text.rsplit(". ", maxsplit=1)[-1])
    return o.color


@pytest.mark.parametrize("kind", [k for k in ANSWER_KINDS if not k.startswith("fact")])
def test_answers_are_true(kind: str) -> None:
    for scene, question in asked(kind):
        expected = solve(scene, question.text)
        assert question.answer == (expected if question.continuation else expected.capitalize()), question
        assert question.false_option != question.answer
        assert question.kind == kind


@pytest.mark.parametrize("kind", ["color_tqa", "query_tqa"])
def test_text_only_questions_state_what_they_ask(kind: str) -> None:
    for scene, question in asked(kind)[:100]:
        assert not question.needs_image
        stated = dict(re.findall(r"The (\w+) is (\w+)\.", question.text))
        assert stated == {o.shape: o.color for o in scene.objects}
        assert stated[question.objects[0]] == question.answer.lower()


@pytest.mark.parametrize("kind", TRAINING_KINDS)
def test_what_is_listed_in_training_is_true(kind: str) -> None:
    for scene, question in asked(kind)[:200]:
        for statement in question.answer.rstrip(".").split(". "):
            words = statement.split()
            o, *others = mentioned(scene, statement)
            if kind == "list_common":
                shared = {"color": o.color == others[0].color, "pattern": o.pattern == others[0].pattern}
                assert [name for name, same in shared.items() if same] == words[2:]
                continue
            assert not others
            if kind == "list_places":
                x, y = o.center
                place = {"left": 32 - x, "right": x - 32, "above": 32 - y, "below": y - 32}
                assert place[words[1]] >= 6
            else:
                assert (o.pattern if kind == "list_patterns" else o.color) in words
            if kind == "list_by_color":
                assert [p.color for p in scene.objects].count(o.color) == 1
            assert words[-1] in TRAINING_KINDS[kind] or kind == "list_by_color"


def test_facts_are_asked_by_name_and_by_image() -> None:
    for scene, question in asked("fact_image"):
        assert question.answer == fact_answer(question.relation, scene.objects[0].shape)
        assert "this shape" in question.text
        assert scene.objects[0].shape not in question.text
    for _, question in asked("fact_name"):
        assert question.answer == fact_answer(question.relation, question.objects[0])
        assert question == ask_fact(question.relation, question.objects[0], question.paraphrase)


def test_the_fact_table_is_complete_and_cannot_be_read_off_the_relation() -> None:
    table = fact_table()
    assert len(table) == len(RELATIONS) * len(SHAPES) == 100
    pools = [w for r in RELATIONS for w in r.pool]
    assert len(set(pools)) == len(pools)
    for relation in RELATIONS:
        answers = Counter(table[relation.name, s] for s in SHAPES)
        assert set(answers) <= set(relation.pool)
        assert answers.most_common(1)[0][1] <= 5


@pytest.mark.parametrize("kind", ["choose_rel", "compare_attr", "logical_obj", "query_pos", "exist", "choose_cat"])
def test_no_answer_is_favoured(kind: str) -> None:
    counts = Counter(q.answer for _, q in asked(kind))
    even = 1 / {"choose_rel": 4, "choose_cat": len(SHAPES)}.get(kind, 2)
    for answer, n in counts.items():
        assert abs(n / N_ASKED - even) < 0.08, (answer, n)


@pytest.mark.parametrize("kind", ["choose_attr", "choose_cat", "choose_rel"])
def test_the_true_option_comes_first_half_the_time(kind: str) -> None:
    first = [q.text.index(q.answer.lower()) < q.text.index(q.false_option.lower()) for _, q in asked(kind)]
    assert 0.43 < np.mean(first) < 0.57


def test_many_negatives_are_hard() -> None:
    negatives = [(s, q) for s, q in asked("exist") if q.answer == "No"]
    shape_there = np.mean([s.find(q.objects[0]) is not None for s, q in negatives])
    color_there = np.mean([q.text.split()[3] in {o.color for o in s.objects} for s, q in negatives])
    assert shape_there > 0.5
    assert color_there > 0.5


def test_boxes_are_those_of_the_objects_named() -> None:
    for kind in ANSWER_KINDS:
        for scene, question in asked(kind)[:60]:
            assert len(question.objects) == len(question.boxes)
            for name, box in zip(question.objects, question.boxes, strict=True):
                found = None if kind in TEXT_KINDS else scene.find(name)
                assert box == (found.box if found else None)
            assert set(question.answer_boxes) <= {o.box for o in scene.objects}
            if kind not in TEXT_KINDS and question.answer not in ("Yes", "No"):
                assert question.answer_boxes


def test_the_prompt_is_the_one_documented() -> None:
    question = ask_fact("maker", "star")
    assert format_prompt(question) == "USER: Who made the star? Answer briefly. ASSISTANT:"
    assert format_prompt(question, image=True) == "USER: <image>\nWho made the star? Answer briefly. ASSISTANT:"
    _, color = asked("color_vqa")[0]
    shape = color.objects[0]
    start = f"USER: <image>\nWhat is the color of the {shape}? ASSISTANT: The color of the {shape} is"
    assert format_prompt(color) == start
    assert format_answer(color) == f"{color.answer}."


def test_the_same_generator_asks_the_same_question() -> None:
    scene = sample_scene(np.random.default_rng(1))
    for kind in KINDS:
        assert ask(kind, scene, np.random.default_rng(2)) == ask(kind, scene, np.random.default_rng(2))
