"""Words about regions of images: read, written, found true or not, and turned into pixels, against scenes drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_llava.toy.descriptions import WORDS, Description, in_common, shown_in
from hooked_llava.toy.scenes import Scene, sample_scene
from hooked_llava.toy.wide_scenes import sample_wide_scene


@pytest.fixture
def scene() -> Scene:
    return sample_scene(np.random.default_rng(3), 4)


@pytest.mark.parametrize(
    "words",
    [
        {"color": "red"},
        {"shape": "star"},
        {"pattern": "striped", "color": "white", "shape": "moon", "row": "top", "column": "right"},
        {"size": "small", "shape": "ring"},
        {"row": "middle", "column": "center"},
        {"what": "background"},
        {"what": "background", "column": "left"},
        {"what": "object"},
    ],
)
def test_what_is_written_is_read(words: dict[str, str]) -> None:
    read = dict(Description.parse(str(Description(words))).words)
    extra = {"what": "object"} if "shape" not in words and words.keys() & {"color", "pattern", "size"} else {}
    assert read == words | extra


def test_plurals_articles_and_unknown_words() -> None:
    assert Description.parse("The striped stars, on the tablecloth.").words == {"pattern": "striped", "shape": "star"}
    assert Description.parse("a cross").words == {"shape": "cross"}
    assert Description.parse("Unable to produce descriptions").words == {}


def test_no_word_is_of_two_kinds() -> None:
    words = [word for words in WORDS.values() for word in words]
    assert len(set(words)) == len(words)


def test_an_object_is_seen_in_its_own_mask(scene: Scene) -> None:
    for one in scene.objects:
        shown = shown_in(scene, one.mask)
        assert (shown["color"], shown["shape"], shown["pattern"]) == (one.color, one.shape, one.pattern)
        for kind in ("color", "shape", "pattern"):
            assert Description({kind: shown[kind]}).is_true_of(scene, one.mask)
        assert not Description({"what": "background"}).is_true_of(scene, one.mask)


def test_the_background_is_what_no_object_covers(scene: Scene) -> None:
    ground = ~scene.masks.max(axis=0)
    assert shown_in(scene, ground) == {"what": "background"}
    assert (Description({"what": "background"}).mask(scene) == ground).all()


def test_two_objects_have_in_common_what_both_have() -> None:
    scene = sample_scene(np.random.default_rng(0), 5)
    both = scene.objects[0].mask | scene.objects[1].mask
    for kind in ("color", "shape", "pattern"):
        same = getattr(scene.objects[0], kind) == getattr(scene.objects[1], kind)
        assert (kind in shown_in(scene, both)) == same


@pytest.mark.parametrize(("row", "column"), [("top", "left"), ("middle", "center"), ("bottom", "right")])
def test_the_place_of_a_region(scene: Scene, row: str, column: str) -> None:
    thirds = {"top": 8, "middle": 31, "bottom": 56, "left": 8, "center": 31, "right": 56}
    region = np.zeros((64, 64), dtype=bool)
    region[thirds[row] - 2 : thirds[row] + 2, thirds[column] - 2 : thirds[column] + 2] = True
    shown = shown_in(scene, region)
    assert (shown["row"], shown["column"]) == (row, column)
    named = Description({"row": row, "column": column}).mask(scene)
    assert named[region].all()
    assert named.sum() in (21 * 21, 21 * 22, 22 * 22)


def test_an_empty_region_shows_nothing_and_nothing_is_true_of_it(scene: Scene) -> None:
    nothing = np.zeros((64, 64), dtype=bool)
    assert shown_in(scene, nothing) == {}
    assert not Description({"what": "background"}).is_true_of(scene, nothing)
    assert not Description({}).is_true_of(scene, ~nothing)
    assert not Description({}).mask(scene).any()


def test_masks_are_of_the_objects_that_fit() -> None:
    for seed in range(8):
        scene = sample_wide_scene(np.random.default_rng(seed))
        for phrase in ("red object", "small object", "striped object", "star", "white moon"):
            words = Description.parse(phrase).words
            expected = np.zeros(scene.pixels.shape[:2], dtype=bool)
            for one in scene.objects:
                has = {"color": one.color, "shape": one.shape, "pattern": one.pattern, "size": "small" * one.small}
                if all(has[kind] == word for kind, word in words.items() if kind != "what"):
                    expected |= one.mask
            assert (Description.parse(phrase).mask(scene) == expected).all(), phrase


def test_what_regions_have_in_common() -> None:
    shown = [{"color": "red", "shape": "star"}] * 4 + [{"color": "red", "shape": "moon"}]
    assert str(in_common(shown)) == "red object"
    assert str(in_common(shown, 0.8)) == "red star"
    assert in_common([]).words == in_common([{"color": "red"}, {"color": "blue"}]).words == {}
