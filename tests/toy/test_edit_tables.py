"""The table of edits is true of its world, and never asks with what it edits with."""

from __future__ import annotations

import pytest

from hooked_llava.toy.edit_tables import EditTable, edit_table
from hooked_llava.toy.facts import RELATIONS, fact_answer
from hooked_llava.toy.objects import SHAPES


@pytest.fixture(scope="module")
def table() -> EditTable:
    return edit_table()


def asked(table, probe):
    pool = table.images if probe.pool == "images" else table.words
    return [pool[row] for row in probe.rows]


def test_every_fact_is_there_once_with_another_target(table):
    assert len({(case.relation, case.shape) for case in table.cases}) == len(table.cases) == 100
    pools = {relation.name: relation.pool for relation in RELATIONS}
    for case in table.cases:
        assert case.answer == fact_answer(case.relation, case.shape)
        assert case.target in pools[case.relation]
        assert case.target != case.answer


def test_probes_ask_what_they_say(table):
    for case in table.cases[::7]:
        by_name = {probe.name: probe for probe in case.probes}
        for name in (
            "the edited question", "other images", "other colors", "other places", "other words", "by name"
        ):  # fmt: skip
            assert set(by_name[name].expected) == {case.target}
            assert all(e.question.relation == case.relation for e in asked(table, by_name[name]))
            assert all(e.question.objects == (case.shape,) for e in asked(table, by_name[name]))
        for probe in case.probes:
            questions = asked(table, probe)
            if probe.role in ("specificity", "locality"):
                assert list(probe.expected) == [e.question.answer for e in questions]
                facts = {(e.question.relation, e.question.objects) for e in questions}
                assert (case.relation, (case.shape,)) not in facts
            assert all((e.scene is None) == (probe.pool == "words") for e in questions)
        assert {e.question.objects[0] for e in asked(table, by_name["other shapes"])} == set(SHAPES) - {case.shape}
        assert len({e.question.text for e in asked(table, by_name["other words"])}) == 2
        assert {e.question.relation for e in asked(table, by_name["other relations"])}.isdisjoint({case.relation})


def test_only_the_edited_question_shows_a_image_of_the_request(table):
    for case in table.cases[::7]:
        used = {id(example.scene) for example in case.requests if example.scene is not None}
        for probe in case.probes:
            shown = {id(e.scene) for e in asked(table, probe) if e.scene is not None}
            assert bool(shown & used) == (probe.name == "the edited question")


def test_images_show_the_shape_they_are_of(table):
    for example in table.images:
        if example.question.kind == "fact_image":
            assert [o.shape for o in example.scene.objects] == list(example.question.objects)


def test_the_same_seed_gives_the_same_table(table):
    again = edit_table()
    assert [case.target for case in again.cases] == [case.target for case in table.cases]
    assert (again.images[40].scene.pixels == table.images[40].scene.pixels).all()
    assert [case.target for case in edit_table(1).cases] != [case.target for case in table.cases]


def test_other_colors_and_other_places_differ_in_that(table):
    for case in table.cases[::7]:
        by_name = {probe.name: probe for probe in case.probes}
        own = case.requests[0].scene.objects[0]
        recolored, moved = ([e.scene for e in asked(table, by_name[name])] for name in ("other colors", "other places"))
        assert len({scene.objects[0].color for scene in recolored} - {own.color}) == len(recolored) == 3
        for scene in recolored:
            shown = scene.objects[0]
            assert (shown.shape, shown.pattern, shown.box) == (case.shape, own.pattern, own.box)
            differs = (scene.pixels != case.requests[0].scene.pixels).any(-1)
            assert differs.any()
            assert not differs[~own.mask].any()
        assert len(moved) == 3
        for scene in moved:
            shown = scene.objects[0]
            assert (shown.shape, shown.color, shown.pattern) == (case.shape, own.color, own.pattern)
            assert abs(shown.center[0] - own.center[0]) + abs(shown.center[1] - own.center[1]) >= 4
