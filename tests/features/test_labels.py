"""Average precision and F1 from what is active alone equal scikit-learn's on all activations."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score

from hooked_llava.architecture.layouts import llava_layout
from hooked_llava.errors import InputError
from hooked_llava.features.labels import label_scores, match_labels
from hooked_llava.toy.feature_tables import PATCH_LABELS, patch_labels
from hooked_llava.toy.images import image_scene
from tests.features.made import Given, filled
from tests.layouts import by_hand
from tests.pairs import as_users_run


def f1_by_hand(has: np.ndarray, told: np.ndarray) -> float:
    return float(f1_score(has, told)) if (has & told).any() else 0.0


def dense_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and best F1 of every column for every label, over the thresholds that are above 0."""
    precision, f1 = (np.zeros((scores.shape[1], labels.shape[1])) for _ in range(2))
    for column, values in enumerate(scores.T):
        for label, has in enumerate(labels.T):
            precision[column, label] = average_precision_score(has, values) if has.any() else np.nan
            tried = [f1_by_hand(has, values >= t) for t in np.unique(values[values > 0])]
            f1[column, label] = max(tried, default=0.0)
    return precision, f1


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 999), st.booleans())
def test_scores_of_sparse_entries(n_items, n_features, n_labels, seed, all_listed):
    rng = np.random.default_rng(seed)
    scores = np.maximum(rng.integers(-3, 4, (n_items, n_features)), 0).astype(float)
    labels = rng.random((n_items, n_labels)) < 0.4
    item, feature = np.indices(scores.shape) if all_listed else np.nonzero(scores)
    item, feature = item.ravel(), feature.ravel()
    shuffled = rng.permutation(len(item))
    item, feature = item[shuffled], feature[shuffled]
    found = label_scores(scores[item, feature], feature, item, labels, n_features=n_features)
    precision, f1 = dense_scores(scores, labels)
    np.testing.assert_allclose(found.average_precision, precision)
    np.testing.assert_allclose(found.f1, f1, atol=1e-12)
    for column, label in np.argwhere(f1 > 0):
        told = scores[:, column] >= found.threshold[column, label]
        assert f1_score(labels[:, label], told) == pytest.approx(f1[column, label])


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from(["all", "base", "fine"]), st.sampled_from(["mean", "max"]))
def test_labels_of_cells_and_of_images(seed, grid, by):
    layouts = [[by_hand()], [by_hand(), by_hand()], [by_hand()]]
    source = Given(layouts, [*range(4)], 3, seed=seed)
    rng, chosen = np.random.default_rng(seed), [2, 0, 3]
    plain = [source.plain()[number] for number in chosen]
    with TemporaryDirectory() as folder:
        store = filled(source, Path(folder), shard_size=20)
        assert len(store.shards) > 1
        cells = [image.acts[image.positions(grid)] for image in plain]
        labels = [rng.random((len(one), 2)) < 0.4 for one in cells]
        found = match_labels(store, labels, ["a", "b"], grid=grid, images=chosen)
        together = match_labels(store, np.concatenate(labels), ["a", "b"], grid=grid, images=chosen)
        of_images = rng.random((3, 2)) < 0.6
        pooled = np.stack([getattr(one, by)(0) for one in cells])
        whole = match_labels(store, of_images, ["a", "b"], of="image", by=by, grid=grid, images=chosen)
    precision, f1 = dense_scores(np.concatenate(cells), np.concatenate(labels))
    np.testing.assert_allclose(found.average_precision, precision)
    np.testing.assert_allclose(found.f1, f1, atol=1e-12)
    assert found.identical(together)
    assert found.n_positive.values.tolist() == np.concatenate(labels).sum(0).tolist()
    precision, f1 = dense_scores(pooled, of_images)
    np.testing.assert_allclose(whole.average_precision, precision)
    np.testing.assert_allclose(whole.f1, f1, atol=1e-12)


def test_what_a_patch_shows(tiny_shapes):
    scene = image_scene("two-shapes")
    layout = tiny_shapes.prepare("What?", images=scene.render()).token_map.layout()
    found = dict(zip(PATCH_LABELS, patch_labels(scene, layout).T.reshape(-1, 8, 8), strict=True))
    for one in scene.objects:
        assert (found[one.color] & found[one.shape]).any()
        assert not (found["background"] & found[one.shape]).any()
    assert found["left"][:, :4].all()
    assert not found["left"][:, 4:].any()
    assert found["bottom"][4:].all()
    assert (found["top"] ^ found["bottom"]).all()
    assert sum(found[name].any() for name in PATCH_LABELS[:18]) == len({o.color for o in scene.objects}) + 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"labels": np.zeros((5, 2), bool)}, r"\(5, 2\).*\(6, 2\)"),
        ({"labels": np.zeros((6, 3), bool)}, r"\(6, 3\).*\(6, 2\)"),
        ({"labels": np.full((6, 2), 2)}, r"int64.*bool"),
        ({"labels": [np.zeros((4, 2), bool)]}, r"\[4\].*\[6\]"),
        ({"labels": np.zeros((6, 2), bool), "of": "patch"}, "of='patch'.*cell.*image"),
        ({"labels": np.zeros((6, 2), bool), "by": "sum"}, "by='sum'.*mean"),
        ({"labels": np.zeros((6, 2), bool), "images": [0, 0]}, r"\[0, 0\].*twice"),
    ],
)
def test_bad_labels(tmp_path, wrong, message):
    store = filled(Given([[llava_layout(2, 3)]], [0], 3), tmp_path)
    with as_users_run(), pytest.raises(InputError, match=message):
        match_labels(store, wrong.pop("labels"), ["a", "b"], **wrong)


def test_a_store_of_a_part_of_the_cells_is_refused(tmp_path):
    store = filled(Given([[llava_layout(2, 3)]], [0], 3, tokens="text"), tmp_path / "text")
    with pytest.raises(InputError):
        match_labels(store, np.zeros((6, 2), bool), ["a", "b"])
