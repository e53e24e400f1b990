"""The explainer and the segmenter that know what images hold: every answer is read off the scenes here."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hooked_llava.errors import InputError
from hooked_llava.options.explainers import UNABLE
from hooked_llava.toy.descriptions import Description
from hooked_llava.toy.oracle import KnownScenes, OracleExplainer, OracleSegmenter, concept_of
from hooked_llava.toy.scenes import Scene, sample_scene
from hooked_llava.toy.wide_scenes import sample_wide_scene

EXPLAIN = "Please begin with [EXPLANATION]: and then say it."
RNG = np.random.default_rng(0)
SCENES = [sample_scene(RNG) for _ in range(60)] + [sample_wide_scene(RNG) for _ in range(10)]


def lit(scene: Scene, region: np.ndarray, kept: float = 31 / 255) -> Image.Image:
    return Image.fromarray(np.where(region[..., None], scene.pixels, np.round(scene.pixels * kept)).astype(np.uint8))


def with_color(color: str, n: int = 5) -> list[Image.Image]:
    found = [(scene, one) for scene in SCENES for one in scene.objects if one.color == color]
    return [lit(scene, one.mask) for scene, one in found[:n]]


@pytest.mark.parametrize("index", range(0, 70, 7))
def test_a_region_is_found_in_its_scene(index: int) -> None:
    scene = SCENES[index]
    for region in (scene.objects[0].mask, ~scene.masks.max(axis=0)):
        found, seen = KnownScenes(SCENES).find_lit(lit(scene, region))
        assert found is scene
        assert not (seen & ~region).any()
        assert seen.sum() > 0.97 * region.sum(), "pixels that are black anyway cannot be told"


def test_nothing_lit_is_an_empty_region() -> None:
    scene, region = KnownScenes(SCENES).find_lit(lit(SCENES[0], np.zeros((64, 64), dtype=bool)))
    assert scene is SCENES[0]
    assert not region.any()


def test_what_is_common_is_said_and_nothing_else() -> None:
    oracle = OracleExplainer(SCENES, agreement=1.0)
    for color in ("red", "white", "green"):
        assert oracle(with_color(color), EXPLAIN).startswith("[EXPLANATION]: ")
        words = Description.parse(oracle(with_color(color, 12), EXPLAIN)).words
        assert words["color"] == color
        assert "shape" not in words


def test_unable_where_nothing_is_common() -> None:
    one_each = [scene.objects[0] for scene in SCENES[:60]]
    images = [lit(scene, one.mask) for scene, one in zip(SCENES, one_each, strict=False)]
    assert OracleExplainer(SCENES, agreement=1.0)([images[0], *images], EXPLAIN) == "[EXPLANATION]: object"
    ground = [lit(scene, ~scene.masks.max(axis=0)) for scene in SCENES]
    assert OracleExplainer(SCENES)(ground, EXPLAIN) == "[EXPLANATION]: background"
    mixed = [images[0], ground[1]]
    assert OracleExplainer(SCENES)(mixed, EXPLAIN) == f"[EXPLANATION]: {UNABLE}"


def test_agreement_lets_one_image_differ() -> None:
    images = [*with_color("red", 4), *with_color("blue", 1)]
    assert "red" in OracleExplainer(SCENES, agreement=0.8)(images, EXPLAIN)
    assert "red" not in OracleExplainer(SCENES, agreement=0.9)(images, EXPLAIN)


def test_yes_or_no_is_what_the_scene_says() -> None:
    oracle = OracleExplainer(SCENES)
    for scene in SCENES[:20]:
        for color in ("red", "black"):
            there = any(one.color == color for one in scene.objects)
            said = oracle([scene.render()], f'Is there "the {color} object"? Answer yes or no.')
            assert said == ("yes" if there else "no")


def test_noun_phrases_and_concepts() -> None:
    oracle = OracleExplainer(SCENES)
    assert oracle([], "Answer with [ANSWER].\n[Description]\nred star\n") == "[ANSWER] red star"
    assert oracle([], f"Answer with [ANSWER].\n[Description]\n{UNABLE}\n") == UNABLE
    assert oracle([], "Choose one of scene, object.\n\nstriped object\n\nANSWER:\n") == "texture"


@pytest.mark.parametrize(
    ("phrase", "concept"),
    [
        ("background", "scene"),
        ("background at the top", "scene"),
        ("anything at the left", "scene"),
        ("small object", "object"),
        ("object", "object"),
        ("star", "object"),
        ("red object at the top", "color"),
        ("striped object", "texture"),
        ("striped red object", "color"),
    ],
)
def test_concepts(phrase: str, concept: str) -> None:
    assert concept_of(Description.parse(phrase)) == concept


def test_masks_are_the_scenes() -> None:
    segmenter = OracleSegmenter(SCENES)
    for scene in SCENES[::5]:
        one = scene.objects[0]
        same = [o.mask for o in scene.objects if (o.color, o.shape) == (one.color, one.shape)]
        assert (segmenter(scene.render(), f"the {one.color} {one.shape}") == np.any(same, axis=0)).all()
        assert not segmenter(scene.render(), "tablecloth").any()


def test_images_of_other_scenes_are_refused() -> None:
    other = sample_scene(np.random.default_rng(99))
    with pytest.raises(InputError, match=r"70 scenes.*64 x 64"):
        OracleSegmenter(SCENES)(other.render(), "star")
    with pytest.raises(InputError, match="70 scenes"):
        OracleExplainer(SCENES)([lit(other, other.objects[0].mask)], EXPLAIN)
    with pytest.raises(InputError, match=r"double quotes"):
        OracleExplainer(SCENES)([other.render()], "Answer yes or no.")
    with pytest.raises(InputError, match=r"agreement='most'"):
        OracleExplainer(SCENES, agreement="most")  # type: ignore[arg-type]
