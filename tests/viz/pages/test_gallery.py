"""The gallery of explained features, and the card of one: what stands on them is what was measured."""

from __future__ import annotations

import json
import re
from html import unescape

import numpy as np
import pytest
import xarray as xr

from hooked_llava.errors import InputError
from hooked_llava.features import Explanation, FeatureStore, explain_features, score_features
from hooked_llava.options.feature_scores import FEATURE_SCORES, markdown_table
from hooked_llava.toy import OracleExplainer, OracleSegmenter
from hooked_llava.viz import FeaturePage, feature_page, gallery_page
from tests.features.scenes_store import SCENES, active_features, scenes_store
from tests.registries import put_back
from tests.viz.browser import Page, check_self_contained


@pytest.fixture(scope="module")
def store() -> FeatureStore:
    return scenes_store()


@pytest.fixture(scope="module")
def explained(store) -> list[Explanation]:
    return explain_features(store, OracleExplainer(SCENES), active_features(6), progress=False)


@pytest.fixture(scope="module")
def scores(store, explained) -> xr.Dataset:
    return score_features(store, explained, segmenter=OracleSegmenter(SCENES), n_random=2)


@pytest.fixture(scope="module")
def words(explained) -> xr.Dataset:
    numbers = [one.feature for one in explained]
    text = [[f"word<{n}>", " b"] for n in numbers]
    found = {"word": (("feature", "rank"), text), "probability": (("feature", "rank"), np.full((len(numbers), 2), 0.5))}
    return xr.Dataset(found, {"feature": numbers})


@pytest.fixture(scope="module")
def steered(explained) -> xr.Dataset:
    """The first feature changes an answer, a random direction none."""
    numbers = [one.feature for one in explained]
    steered = [["Green"], *([["Red"]] * (len(numbers) - 1))]
    found = {
        "unsteered": ("question", ["Red"]),
        "steered": (("feature", "question"), steered),
        "random_direction": (("feature", "question"), [["Red"]] * len(numbers)),
        "value": ("feature", np.full(len(numbers), 1.25)),
    }
    return xr.Dataset(found, {"feature": numbers, "question": ["What color is it?"]})


@pytest.fixture(scope="module")
def page(store, explained, scores, words, steered) -> FeaturePage:
    return gallery_page(store, explained, scores, words=words, steered=steered)


def cards(html: str) -> dict[int, str]:
    found = re.findall(r'<article class="card.*?" id="feature-(\d+)"(.*?)</article>', html, flags=re.DOTALL)
    return {int(number): unescape(text) for number, text in found}


def test_a_gallery_is_one_file_that_asks_no_server(page):
    check_self_contained(page.html, 200_000, scripts=2)
    assert page.html.count("aria-label=") > 12


def test_every_feature_has_a_card_with_its_numbers(page, store, explained, scores):
    found = cards(page.html)
    assert list(found) == [one.feature for one in explained]
    for one in explained:
        text = found[one.feature]
        assert f"word<{one.feature}>" in text
        assert f"{100 * store.frequency[one.feature]:.2g} % of tokens, up to {store.largest[one.feature]:.3g}" in text
        assert (one.phrase if one.found else "not explained") in text
        iou = float(scores.iou.sel(feature=one.feature))
        assert (f'data-iou="{iou:.4f}"' in text) is one.found
    n = sum(one.found for one in explained)
    assert n > 0
    assert page.question == f"6 features of tiny-shapes, {n} explained"


def test_every_image_stands_once_and_is_dark_where_the_feature_is_not_active(page, store, explained):
    images = json.loads(re.search(r'id="images">(.*?)</script>', page.html, re.DOTALL)[1])  # type: ignore[index]
    shown = [image for one in explained for image in one.images]
    assert len(images) == len({store.record(image).hash for image in shown}) < len(shown)
    assert all(image["src"].startswith("data:image/webp;base64,") for image in images)
    one = next(one for one in explained if one.images)
    paths = re.findall(r'data-outside="(.*?)"', cards(page.html)[one.feature])
    for path, image in zip(paths, one.images, strict=True):
        drawn = np.zeros((64, 64), int)
        for x, y, width, height in np.array(re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)", path), int):
            drawn[y : y + height, x : x + width] += 1
        np.testing.assert_array_equal(drawn == 2, store.mask(one.feature, image))


def test_cards_are_found_by_their_words_and_by_answers_that_change(page, explained):
    found = cards(page.html)
    searched = [re.search(r'data-search="(.*?)"', text, re.DOTALL)[1] for text in found.values()]  # type: ignore[index]
    assert ["green" in text.split() for text in searched] == [
        n == 0 or "green" in one.phrase for n, one in enumerate(explained)
    ]
    assert all(str(feature) in text.split() for feature, text in zip(found, searched, strict=True))
    assert "at 1 of 6 features; a random direction at 0" in page.html


def test_a_gallery_of_explanations_alone(store, explained):
    page = gallery_page(store, explained, title="Mine")
    check_self_contained(page.html, 200_000, scripts=2)
    assert page.question == "Mine"
    assert "chance" not in page.html.split("<noscript>")[1]
    with pytest.raises(InputError, match=r"explanations=\[\]"):
        gallery_page(store, [])


def test_the_card_of_a_feature_as_a_page(store, explained, scores, words, steered):
    one = explained[0]
    page = feature_page(store, one, scores, words=words, steered=steered)
    check_self_contained(page.html)
    found = Page(page.html)
    assert found.sections == ["images", "activations", "explanation", "words", "steering"]
    assert len(found.texts_instead) == len(one.images) + 1
    assert page.answer == (one.phrase or "not explained")
    assert "<b>Green</b>" in page.html
    assert "set to 1.25" in page.html


def test_a_feature_that_is_active_nowhere_has_a_card(store):
    silent = int(np.flatnonzero(store.frequency == 0)[0])
    for page in (feature_page(store, Explanation(silent, ())), gallery_page(store, [Explanation(silent, ())])):
        assert "not explained" in page.html
        assert "Unable to produce descriptions" in page.html


def test_what_a_score_says_comes_from_the_table_of_scores(store, explained, scores):
    with put_back(FEATURE_SCORES) as table:
        table["iou"] = table["iou"]._replace(title="Overlap", meaning="what a test says")
        assert "<b>Overlap</b>" in gallery_page(store, explained, scores).html
        assert "what a test says" in markdown_table()
