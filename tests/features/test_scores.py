"""Scores of explanations against plain computations, and against what is known of the embedded world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from hooked_llava.errors import InputError
from hooked_llava.features.explain import explain_features
from hooked_llava.features.explanations import Explanation
from hooked_llava.features.prompts import DETECT_PROMPT, filled
from hooked_llava.features.scores import active_and_not, intersection_over_union, iou_of, score_features, score_table
from hooked_llava.options.feature_scores import FEATURE_SCORES
from hooked_llava.toy.oracle import OracleExplainer, OracleSegmenter
from tests.features.scenes_store import SCENES, active_features, scene_of, scenes_store
from tests.oracles.plain_scores import plain_balanced_accuracy, plain_iou, plain_region

INDEX = {scene.pixels.tobytes(): i for i, scene in enumerate(SCENES)}
SEGMENTER, ORACLE = OracleSegmenter(SCENES), OracleExplainer(SCENES)


@pytest.fixture(scope="module")
def explanations() -> list[Explanation]:
    return explain_features(scenes_store(), ORACLE, active_features(12), progress=False)


def brightness(images: Sequence[Image.Image], phrase: str) -> list[float]:
    return [float(np.asarray(image).mean()) + len(phrase) for image in images]


def plain_mean_iou(one: Explanation, images: Sequence[int], threshold: float = 0.0) -> float:
    store = scenes_store()
    regions = [plain_region(store.activations(one.feature, i), store.layout(i), threshold) for i in images]
    masks = [SEGMENTER(store.image(i), one.phrase) for i in images]
    return float(np.mean([plain_iou(*both) for both in zip(regions, masks, strict=True)]))


def test_iou_of_masks() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 1.0):
        one, other = rng.random((5, 7)) < share, rng.random((5, 7)) < 0.5
        assert intersection_over_union(one, other) == pytest.approx(plain_iou(one, other))
    nothing = np.zeros((2, 2), dtype=bool)
    assert intersection_over_union(nothing, nothing) == 0.0
    with pytest.raises(InputError, match=r"\(2, 2\).*\(2, 3\)"):
        intersection_over_union(nothing, np.zeros((2, 3), dtype=bool))


def test_iou_is_that_of_region_and_mask(explanations: list[Explanation]) -> None:
    for threshold in (0.0, 0.3):
        scores = score_features(scenes_store(), explanations, segmenter=SEGMENTER, n_random=0, threshold=threshold)
        for one, score in zip(explanations, scores.iou.values, strict=True):
            if one.found:
                assert score == pytest.approx(plain_mean_iou(one, one.images, threshold))
            else:
                assert np.isnan(score)


def test_a_phrase_that_is_not_found_counts_0(explanations: list[Explanation]) -> None:
    one = explanations[0]
    assert iou_of(scenes_store(), one, lambda image, phrase: np.zeros((64, 64), dtype=bool), one.images) == 0.0


def test_a_region_that_is_the_mask_counts_1() -> None:
    store = scenes_store()
    (one,) = [
        Explanation(feature, (store.top_images(feature, 1)[0].image,), "it", "it") for feature in active_features(1)
    ]
    known = plain_region(store.activations(one.feature, one.images[0]), store.layout(one.images[0]), 0.0)
    assert iou_of(store, one, lambda image, phrase: known, one.images) == 1.0


def test_similarity_is_the_mean_over_the_explanations_images(explanations: list[Explanation]) -> None:
    scores = score_features(scenes_store(), explanations, similarity=brightness, n_random=3)
    assert set(scores.data_vars) == {"clip_score", "clip_score_random"}
    assert "clip_score" in FEATURE_SCORES  # and so on pages and in the shell
    for one, score in zip(explanations, scores.clip_score.values, strict=True):
        expected = np.mean([scene_of(i).pixels.mean() + len(one.phrase) for i in one.images]) if one.found else np.nan
        assert score == pytest.approx(expected, nan_ok=True)


def test_the_baseline_is_of_random_images_of_the_same_number(explanations: list[Explanation]) -> None:
    seen: list[tuple[int, ...]] = []

    def similarity(images: Sequence[Image.Image], phrase: str) -> list[float]:
        seen.append(tuple(INDEX[np.asarray(image).tobytes()] for image in images))
        return [float(i) for i in seen[-1]]

    found = [one for one in explanations if one.found][:4]
    scores = score_features(scenes_store(), found, similarity=similarity, n_random=40)
    assert [len(images) for images in seen] == [len(one.images) for one in found] * 41
    runs = seen[len(found) :]
    assert len(set(runs)) > 0.9 * len(runs)
    expected = np.reshape([np.mean(images) for images in runs], (40, len(found)))
    np.testing.assert_allclose(scores.clip_score_random.values, expected)
    chance = np.mean([i % len(SCENES) for i in range(25)])
    assert abs(scores.clip_score_random.values.mean() - chance) < 1.5
    again = score_features(scenes_store(), found, similarity=similarity, n_random=40)
    xr.testing.assert_identical(scores, again)
    other = score_features(scenes_store(), found, similarity=similarity, n_random=40, seed=1)
    assert (other.clip_score_random.values != scores.clip_score_random.values).any()


def test_regions_of_explained_features_lie_on_what_is_said_more_than_by_chance(explanations: list[Explanation]) -> None:
    scores = score_features(scenes_store(), explanations, segmenter=SEGMENTER, n_random=5)
    assert float(scores.iou.mean()) > 2 * float(scores.iou_random.mean())


def test_detection_is_balanced_accuracy_on_other_images(explanations: list[Explanation]) -> None:
    store, said = scenes_store(), {}

    def explainer(images: Sequence[Image.Image], prompt: str) -> str:
        index = INDEX[np.asarray(images[0]).tobytes()]
        reply = ("yes", "No.", "perhaps", "Yes")[(index * 7 + len(prompt)) % 4]
        said.setdefault(prompt, {})[index] = {"yes": True, "Yes": True, "No.": False}.get(reply)
        return reply

    scores = score_features(store, explanations, explainer=explainer, n_detected=4)
    by_phrase = [one for one in explanations if one.found]
    by_phrase = [one for one in by_phrase if [o.phrase for o in by_phrase].count(one.phrase) == 1]
    assert by_phrase
    for one in by_phrase:
        answers = said[filled(DETECT_PROMPT, one.phrase)]
        shown = {i % len(SCENES) for i in one.images}
        assert not shown & set(answers)
        truth = {i: bool((np.nan_to_num(store.activations(one.feature, i)) > 0).any()) for i in answers}
        score = scores.detection.sel(feature=one.feature).item()
        if len(set(truth.values())) == 2:
            assert list(truth.values()).count(True) <= 4
            assert score == plain_balanced_accuracy([answers[i] for i in truth], list(truth.values()))
        else:
            assert np.isnan(score)
    assert np.isnan(scores.detection.values[[not one.found for one in explanations]]).all()


def test_images_that_look_the_same_are_asked_about_once() -> None:
    store = scenes_store()
    for feature in active_features(8):
        one = Explanation(feature, (0,), "it", "it")
        active, others = active_and_not(store, one, 100)
        both = [*active, *others]
        assert len(both) == len(set(both)) == len(SCENES) - 1
        assert not {0, len(SCENES)} & set(both), "the first image's twin is the first image"
        assert all((np.nan_to_num(store.activations(feature, i)) > 0).any() for i in active)
        assert not any((np.nan_to_num(store.activations(feature, i)) > 0).any() for i in others)


def test_the_oracle_detects_what_it_explained() -> None:
    """A phrase that is true of exactly the active images scores 1, its opposite 0."""
    store = scenes_store()
    feature = active_features(5)[2]
    one = Explanation(feature, (store.top_images(feature, 1)[0].image,), "it", "it")
    active, _ = active_and_not(store, one, 100)
    pixels = [scene_of(i).pixels.tobytes() for i in active]

    def right(images: Sequence[Image.Image], prompt: str) -> str:
        return "yes" if np.asarray(images[0]).tobytes() in pixels else "no"

    def wrong(images: Sequence[Image.Image], prompt: str) -> str:
        return "no" if right(images, prompt) == "yes" else "yes"

    assert score_features(store, [one], explainer=right).detection.item() == 1.0
    assert score_features(store, [one], explainer=wrong).detection.item() == 0.0


def test_the_table_is_by_concept_and_in_total() -> None:
    phrases = ["star", "moon", "red", "", "x"]
    concepts = ["object", "object", "color", "", ""]
    scores = xr.Dataset(
        {
            "iou": ("feature", [0.2, 0.4, 0.9, np.nan, 0.1]),
            "iou_random": (("run", "feature"), [[0.0, 0.2, 0.3, np.nan, 0.1], [0.2, 0.2, 0.5, np.nan, 0.1]]),
        },
        {"phrase": ("feature", phrases), "concept": ("feature", concepts)},
    )
    table = score_table(scores)
    assert table.concept.values.tolist() == ["object", "color", "total"]
    assert table.n.values.tolist() == [2, 1, 4]
    assert table["mean"].sel(score="iou").values == pytest.approx([0.3, 0.9, 0.4])
    assert table["mean"].sel(score="iou_random").values == pytest.approx([0.15, 0.4, 0.2])
    total = table.sel(concept="total", score="iou")
    assert 0.1 <= total.low < total["mean"] < total.high <= 0.9
    narrower = score_table(scores, level=0.5).sel(concept="total", score="iou")
    assert narrower.high - narrower.low < total.high - total.low
    alone = table.sel(concept="color", score="iou")
    assert alone.low == alone.high == 0.9


def test_a_table_of_nothing() -> None:
    scores = score_features(scenes_store(), [Explanation(3, ())], segmenter=SEGMENTER, explainer=ORACLE, n_random=2)
    table = score_table(scores)
    assert table.n.values.tolist() == [0]
    assert np.isnan(table["mean"].values).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, r"segmenter=.*similarity=.*explainer="),
        ({"segmenter": SEGMENTER, "n_random": -1}, r"n_random=-1"),
        ({"segmenter": SEGMENTER, "n_detected": 0}, r"n_detected=0"),
    ],
)
def test_bad_input(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        score_features(scenes_store(), [Explanation(0, (0,), "it", "it")], **options)


def test_a_segmenter_of_another_size_is_refused(explanations: list[Explanation]) -> None:
    with pytest.raises(InputError, match=r"\(64, 64\).*\(2, 2\)"):
        score_features(scenes_store(), explanations, segmenter=lambda image, phrase: np.zeros((2, 2), dtype=bool))
