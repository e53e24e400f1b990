"""Explaining features: what the explainer is shown and asked, what becomes of its replies, and going on after a failure."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hooked_llava.errors import ExplainerError, InputError, SpanError
from hooked_llava.features.explain import explain_features, lit_images
from hooked_llava.features.explainers.server import ServerExplainer
from hooked_llava.features.explanations import Explanation, load_explanations
from hooked_llava.features.prompts import CONCEPT_PROMPT, EXPLAIN_PROMPT, REFINE_PROMPT, filled
from hooked_llava.options.explainers import UNABLE
from hooked_llava.toy.oracle import OracleExplainer
from tests.features.explainers.fake_server import Body, Reply, serving
from tests.features.made import Given
from tests.features.made import filled as store_of
from tests.features.scenes_store import SCENES, active_features, scene_of, scenes_store
from tests.layouts import by_hand
from tests.oracles.plain_scores import plain_region


class Asked:
    """An explainer that keeps what it was asked."""

    def __init__(self, reply: str = "[EXPLANATION]: it", fails_at: int | None = None, concurrency: int = 1) -> None:
        self.reply, self.fails_at, self.concurrency = reply, fails_at, concurrency
        self.images: list[list[Image.Image]] = []
        self.prompts: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, images: Sequence[Image.Image], prompt: str) -> str:
        with self.lock:
            if len(self.prompts) == self.fails_at:
                raise ExplainerError("no more")
            self.prompts.append(prompt)
            self.images.append(list(images))
        return self.reply


def explained(explainer: Any, features: Any, **options: Any) -> list[Explanation]:
    return explain_features(scenes_store(), explainer, features, progress=False, **options)


def test_it_is_shown_the_top_images_lit_where_the_feature_is_active() -> None:
    store = scenes_store()
    for feature in active_features(4):
        asked = Asked()
        (one,) = explained(asked, feature, n_images=3, refine=False, label=False)
        means = [np.nanmean(store.activations(feature, i)) for i in range(len(SCENES))]
        best = [i for i in np.argsort(means, kind="stable")[::-1].tolist() if means[i] > 0][:3]
        assert sorted(one.images, key=best.index) == list(one.images)
        assert set(one.images) == set(best)
        assert len(asked.images[0]) == len(one.images)
        for image, i in zip(asked.images[0], one.images, strict=True):
            region = plain_region(store.activations(feature, i), store.layout(i), 0.0)
            pixels = scene_of(i).pixels
            assert (np.asarray(image)[region] == pixels[region]).all()
            assert np.abs(np.asarray(image)[~region] - pixels[~region] * (31 / 255)).max() <= 0.5


def test_the_three_questions_follow_each_other() -> None:
    replies = iter(["hm [EXPLANATION]: The red thing that ...", "[ANSWER] red thing", "Color."])
    asked = Asked()

    def explainer(images: Sequence[Image.Image], prompt: str) -> str:
        asked(images, prompt)
        return next(replies)

    feature = active_features(1)[0]
    (one,) = explained(explainer, feature)
    assert (one.text, one.phrase, one.concept) == ("The red thing that ...", "red thing", "color")
    assert one.reply.startswith("hm ")
    assert asked.prompts == [
        EXPLAIN_PROMPT,
        filled(REFINE_PROMPT, "The red thing that ..."),
        filled(CONCEPT_PROMPT, "red thing"),
    ]
    assert [len(images) for images in asked.images[1:]] == [0, 0]


@pytest.mark.parametrize(
    ("reply", "text", "phrase"),
    [
        (f"[EXPLANATION]: {UNABLE}", UNABLE, ""),
        ("a train", "", ""),
        ("", "", ""),
        ("[EXPLANATION]: a train", "a train", "a train"),
    ],
)
def test_replies_without_an_explanation_ask_nothing_further(reply: str, text: str, phrase: str) -> None:
    further = Asked("nothing in brackets")
    (one,) = explained(Asked(reply), active_features(1), refine=further, label=further)
    assert (one.text, one.phrase, one.reply, one.concept) == (text, phrase, reply, None)
    assert len(further.prompts) == (2 if phrase else 0)


def test_a_refiner_may_find_that_there_is_nothing() -> None:
    (one,) = explained(Asked(), active_features(1), refine=Asked(UNABLE))
    assert (one.text, one.phrase, one.found) == ("it", "", False)


def test_other_models_refine_and_label() -> None:
    first, refiner, labeller = Asked(), Asked("[ANSWER] phrase"), Asked("part")
    (one,) = explained(first, active_features(1), refine=refiner, label=labeller)
    assert [len(a.prompts) for a in (first, refiner, labeller)] == [1, 1, 1]
    assert (one.phrase, one.concept) == ("phrase", "part")


def test_a_feature_that_is_never_active_is_not_asked_about(tmp_path: Path) -> None:
    never = Given([[by_hand()]] * 2, [0, 1], n_features=3)
    for acts in never.acts:
        acts[:, 1] = 0.0
    asked = Asked()
    (one,) = explain_features(store_of(never, tmp_path / "store"), asked, 1, progress=False)
    assert one == Explanation(1, ())
    assert asked.prompts == []


def test_by_default_all_active_features_are_asked_about() -> None:
    asked = Asked("[EXPLANATION]: it")
    found = explained(asked, None, n_images=1, refine=False, label=False)
    assert [one.feature for one in found] == np.flatnonzero(scenes_store().frequency).tolist()


@pytest.mark.parametrize("concurrency", [1, 3])
def test_what_was_answered_is_kept_and_not_asked_again(tmp_path: Path, concurrency: int) -> None:
    features, out = active_features(8), tmp_path / "said.json"
    options: dict[str, Any] = {"out": out, "refine": False, "label": False, "n_images": 2}
    with pytest.raises(ExplainerError, match="no more"):
        explained(Asked(fails_at=5, concurrency=concurrency), features, **options)
    kept = load_explanations(out)
    assert len(kept) == 5
    again = Asked(concurrency=concurrency)
    found = explained(again, features, **options)
    assert len(again.prompts) == 3
    assert found == explained(Asked(), features, **options | {"out": None})
    assert load_explanations(out) == sorted(found, key=lambda one: one.feature)
    nothing = Asked(fails_at=0)
    assert explained(nothing, features, **options) == found, "all of them are there"


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    features, out = active_features(2), tmp_path / "said.json"
    explained(Asked(), features, out=out)
    for option in (
        {"n_images": 2},
        {"by": "max"},
        {"threshold": 0.5},
        {"dimmed": 1.0},
        {"prompt": "?"},
        {"refine": False},
    ):
        with pytest.raises(InputError, match=rf"said\.json.*{next(iter(option))}="):
            explained(Asked(fails_at=0), features, out=out, **option)


def test_through_a_server_that_fails_and_talks_nonsense(tmp_path: Path) -> None:
    """Every third request fails; every answer is the oracle's, which the server computes from the images it is sent."""
    import base64
    import io

    oracle = OracleExplainer(SCENES)

    def reply(number: int, body: Body) -> Reply:
        if number % 3 == 2:
            return (Reply(status=500), Reply(raw="{"), Reply(status=429, headers={"Retry-After": "0"}))[number // 3 % 3]
        content = body["messages"][0]["content"]
        if isinstance(content, str):
            return Reply(oracle([], content))
        data = [part["image_url"]["url"].partition(",")[2] for part in content[1:]]
        return Reply(oracle([Image.open(io.BytesIO(base64.b64decode(one))) for one in data], content[0]["text"]))

    features = active_features(10)
    with serving(reply) as served:
        explainer = ServerExplainer("oracle", served.url, concurrency=4, first_wait=0.0, retries=20)
        found = explained(explainer, features, out=tmp_path / "said.json")
        assert explainer.n_requests == len(served.requests)
    assert found == explained(OracleExplainer(SCENES), features)
    assert any(one.found for one in found)


def test_a_limit_on_requests_stops_and_the_same_call_goes_on(tmp_path: Path) -> None:
    features, out = active_features(6), tmp_path / "said.json"
    options: dict[str, Any] = {"out": out, "refine": False, "label": False}
    with serving(lambda number, body: Reply("[EXPLANATION]: it")) as served:
        with pytest.raises(ExplainerError, match="max_requests=4"):
            explained(ServerExplainer("m", served.url, max_requests=4, concurrency=2), features, **options)
        assert len(load_explanations(out)) == 4
        explained(ServerExplainer("m", served.url, max_requests=4, concurrency=2), features, **options)
        assert len(served.requests) == 6


def test_lit_images_over_a_threshold() -> None:
    store, feature = scenes_store(), active_features(3)[1]
    i = store.top_images(feature, 1)[0].image
    most = float(np.nanmax(store.activations(feature, i)))
    pixels = scene_of(i).pixels
    for threshold in (0.0, most / 2, most):
        region = plain_region(store.activations(feature, i), store.layout(i), threshold)
        lit = np.asarray(lit_images(store, feature, [i], threshold, dimmed=1.0)[0])
        assert (lit == np.where(region[..., None], pixels, 0)).all()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"features": 9999}, InputError, r"9999.*features"),
        ({"features": 1.5}, InputError, r"features=1\.5"),
        ({"n_images": 0}, InputError, r"n_images=0"),
        ({"by": "median"}, InputError, r"by='median'"),
        ({"threshold": -1}, InputError, r"threshold=-1"),
        ({"refine": "yes"}, InputError, r"refine='yes'"),
        ({"label": None}, InputError, r"label=None"),
        ({"explainer": "gpt"}, InputError, r"explainer='gpt'"),
        ({"grid": "fine"}, SpanError, r"fine.*base"),
        ({"dimmed": 2}, InputError, r"dimmed=2"),
    ],
)
def test_bad_input_is_found_before_anything_is_asked(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    asked = Asked()
    given = {"explainer": asked, "features": active_features(1)} | options
    with pytest.raises(error, match=says):
        explained(given.pop("explainer"), given.pop("features"), **given)
    assert asked.prompts == []
