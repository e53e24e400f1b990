"""The hand-readable world: images show what they are said to show, and questions have true answers."""

import numpy as np
import pytest

from hooked_llava.errors import InputError
from hooked_llava.toy.processor import UNK, split_words
from tests.patch_world import (
    COLORS,
    GRID,
    GROUND,
    PATCH_SIZE,
    PHRASINGS,
    SHAPES,
    UNKNOWN,
    box_of,
    image,
    questions,
    sample_objects,
    stamps,
    vocabulary,
)


def test_stamps_are_independent_of_each_other_and_of_a_uniform_patch():
    drawn = stamps()
    assert drawn.shape == (len(SHAPES), PATCH_SIZE, PATCH_SIZE)
    uniform = np.ones((1, PATCH_SIZE**2))
    assert np.linalg.matrix_rank(np.concatenate([drawn.reshape(len(SHAPES), -1), uniform])) == len(SHAPES) + 1


def test_a_image_shows_each_object_in_its_patch_and_nothing_else():
    pixels = np.asarray(image({(0, 3): "red star", (4, 1): "white ring"})).astype(int)
    left, top, right, bottom = box_of((0, 3))
    star = stamps()[SHAPES.index("star")]
    assert (pixels[top:bottom, left:right][star] == COLORS["red"]).all()
    assert (pixels[top:bottom, left:right][~star] == GROUND).all()
    changed = (pixels != GROUND).any(-1).reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).any((1, 3))
    assert np.argwhere(changed).tolist() == [[0, 3], [4, 1]]


def test_every_shape_is_asked_about_in_every_phrasing():
    asked = questions({(0, 3): "red star", (4, 1): "white ring"})
    assert len(asked) == len(SHAPES) * len(PHRASINGS)
    answers = {q.objects[0]: q.answer for q in asked}
    assert answers == {shape: {"star": "Red", "ring": "White"}.get(shape, UNKNOWN) for shape in SHAPES}
    ring = next(q for q in asked if q.objects == ("ring",))
    assert ring.boxes == ring.answer_boxes == (box_of((4, 1)),)
    absent = next(q for q in asked if q.objects == ("cross",))
    assert (absent.boxes, absent.answer_boxes) == ((None,), ())


def test_every_word_that_is_asked_or_answered_is_a_token():
    words = vocabulary()
    for question in questions({(0, 3): "red star"}):
        assert {*split_words(question.text), question.answer} <= set(words)
    assert {*COLORS, *(color.capitalize() for color in COLORS), UNK} <= set(words)
    assert sorted(words.values()) == list(range(len(words)))


@pytest.mark.parametrize("seed", range(5))
def test_drawn_objects_are_of_different_shapes(seed):
    objects = sample_objects(np.random.default_rng(seed))
    shapes = [name.split()[1] for name in objects.values()]
    assert len(set(shapes)) == len(shapes) > 0
    image(objects)
    assert objects == sample_objects(np.random.default_rng(seed))


def test_what_is_not_of_this_world_is_refused():
    with pytest.raises(InputError, match="'red stra'.*object"):
        image({(0, 0): "red stra"})
    with pytest.raises(InputError, match="'star'.*object.*color"):
        questions({(0, 0): "star"})
    with pytest.raises(InputError, match=r"'red star'.*\(0, 5\).*row.*column from 0 to 4"):
        image({(0, 5): "red star"})
    with pytest.raises(InputError, match="one star.*shape.*once"):
        image({(0, 0): "red star", (0, 1): "blue star"})
