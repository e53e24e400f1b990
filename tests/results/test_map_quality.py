"""Numbers for maps, held against their definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_llava.errors import InputError
from hooked_llava.results.map_quality import (
    auroc,
    average_precision,
    bootstrap,
    iou_at_size,
    map_quality,
    pointing,
    roc_auc,
    shares,
)

CASES = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12)


def rows(case: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    scores, positive = zip(*case, strict=True)
    return np.array([scores], dtype=np.float64), np.array([positive])


@given(CASES)
@settings(max_examples=60)
def test_auc_is_the_chance_that_a_positive_wins_over_a_negative(case: list[tuple[int, bool]]) -> None:
    pairs = [(a, b) for a, up in case if up for b, down in case if not down]
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs) if pairs else math.nan
    assert roc_auc(*rows(case))[0] == pytest.approx(expected, nan_ok=True)
    assert auroc(*(column[0] for column in rows(case))) == pytest.approx(expected, nan_ok=True)


@given(CASES)
@settings(max_examples=60)
def test_average_precision_goes_through_all_thresholds(case: list[tuple[int, bool]]) -> None:
    n_positive = sum(up for _, up in case)
    expected, recall = 0.0, 0.0
    for threshold in sorted({score for score, _ in case}, reverse=True):
        chosen = [up for score, up in case if score >= threshold]
        new = sum(chosen) / n_positive if n_positive else math.nan
        expected += (new - recall) * sum(chosen) / len(chosen)
        recall = new
    assert average_precision(*rows(case))[0] == pytest.approx(expected, nan_ok=True)


@given(CASES, st.integers(0, 3))
@settings(max_examples=60)
def test_pointing_and_iou_are_expectations_over_random_orders_of_equals(
    case: list[tuple[int, bool]], seed: int
) -> None:
    scores, positive = rows(case)
    n = int(positive.sum())
    found = pointing(scores, positive)[0], iou_at_size(scores, positive)[0]
    if not n:
        assert np.isnan(found).all()
        return
    rng, hits, both = np.random.default_rng(seed), [], []
    for _ in range(400):
        order = np.argsort(-(scores[0] + rng.random(len(case)) * 1e-3))
        hits.append(positive[0, order[0]])
        both.append(positive[0, order[:n]].sum())
    assert found[0] == pytest.approx(np.mean(hits), abs=0.12)
    assert found[1] == pytest.approx(np.mean(both) / (2 * n - np.mean(both)), abs=0.12)


def test_without_ties_the_numbers_are_those_counted_by_hand() -> None:
    scores, positive = np.array([[0.9, 0.8, 0.7, 0.1]]), np.array([[False, True, True, False]])
    assert roc_auc(scores, positive)[0] == 0.5
    assert average_precision(scores, positive)[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert pointing(scores, positive)[0] == 0.0
    assert iou_at_size(scores, positive)[0] == pytest.approx(1 / 3)


def test_a_map_of_the_object_is_perfect_and_an_empty_map_is_chance() -> None:
    coverage, others = np.zeros((2, 4, 4)), np.zeros((2, 4, 4))
    coverage[:, 1, 1:3], others[:, 3, 3] = 0.6, 0.9
    perfect = map_quality(coverage, coverage, others)
    assert {name: float(values[0]) for name, values in perfect.items()} == dict.fromkeys(perfect, 1.0)
    nothing = map_quality(np.zeros((2, 4, 4)), coverage, others)
    assert nothing.auc[0] == nothing.specificity[0] == 0.5
    assert nothing.average_precision[0] == nothing.pointing[0] == 2 / 16
    both = map_quality(coverage + others, coverage, others)
    assert both.auc[0] < 1
    assert both.specificity[0] == 0.0, "the other object is higher"


def test_what_means_nothing_is_nan_and_what_does_not_fit_is_refused() -> None:
    coverage = np.zeros((1, 2, 2))
    assert all(np.isnan(values).all() for values in map_quality(np.eye(2)[None], coverage, coverage).values())
    with pytest.raises(InputError, match=r"maps.*shape \(.*coverage \(.*patch"):
        map_quality(np.zeros((1, 2, 2)), np.zeros((1, 2, 3)))
    with pytest.raises(InputError, match=r"expected \[..., patch_row, patch_col\]"):
        map_quality(np.zeros(4), np.zeros(4))


def test_the_bootstrap_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        mean, low, high = bootstrap(rng.normal(3.0, 1.0, size=50), n=400, seed=i)
        assert low <= mean <= high
        covered += low <= 3.0 <= high
    assert 0.88 <= covered / 200 <= 0.99
    assert bootstrap([1.0, float("nan"), 1.0]) == (1.0, 1.0, 1.0)
    assert np.isnan(bootstrap([float("nan")])).all()
    pairs = np.stack([np.arange(40.0), np.arange(40.0) > 20], 1)
    value, low, high = bootstrap(pairs, lambda rows: auroc(rows[:, 0], rows[:, 1] > 0), n=200)
    assert value == low == high == 1.0


def test_shares_sum_to_one() -> None:
    maps = np.random.default_rng(0).normal(size=(3, 4, 4))
    np.testing.assert_allclose(shares(maps).sum((1, 2)), 1)
    assert shares(maps).min() == 0
    np.testing.assert_allclose(shares(np.ones((2, 2))), 0.25)
