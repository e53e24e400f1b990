"""Does a map lie on the object? Numbers for maps whose truth is known.

A map gives one score to every patch, a mask says how much of each patch the object covers. All scores depend on the order
of the patches only, so maps in different units can be compared; ties count half.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from hooked_llava.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

MEASURES = ("auc", "average_precision", "pointing", "iou", "specificity")


def map_quality(maps: Any, coverage: Any, others: Any = None, *, threshold: float = 0.2) -> xr.Dataset:
    """Every measure of every map, each [prompt].

    `auc`: chance that a patch of the object scores higher than one that is not. `average_precision`: of the patches in
    the order of their scores. `pointing`: whether the highest patch lies on the object. `iou`: intersection over union of
    the object with as many highest patches as it has. `specificity`: `auc` against patches of other objects only.

    Args:
        maps: [..., patch_row, patch_col], such as `patch_importance` gives for images one per prompt; or a labelled array
            [..., feature], where what is NaN in the map or in the coverage (newlines) is left out.
        coverage: the share of each patch that the object covers, or booleans, of the same shape; by feature
            `layout.fold(layout.box_shares(box))`.
        others: likewise for all other objects together, for `specificity`.
        threshold: share from which on a patch counts as the object's.

    A measure is NaN where it means nothing: an object without patches, or no other objects. Raises `InputError` for
    different shapes.

    >>> coverage = np.zeros((1, 2, 2))
    >>> coverage[0, 0, 1] = 1.0
    >>> quality = map_quality(np.array([[[0.1, 0.9], [0.3, 0.2]]]), coverage)
    >>> quality["auc"].item(), quality["pointing"].item()
    (1.0, 1.0)
    """
    import xarray as xr

    by_feature = "feature" in getattr(maps, "dims", ())
    scores, covered = (_flat(values, 1 if by_feature else 2) for values in (maps, coverage))
    if scores.shape != covered.shape:
        raise InputError(
            f"The maps have the shape {np.shape(maps)} and the coverage {np.shape(coverage)}; give one share for each patch."
        )
    is_object = covered >= threshold
    counted = ~np.isnan(scores) & ~np.isnan(covered) if by_feature else np.ones_like(is_object)
    found = {name: measure(scores, is_object, among=counted) for name, measure in _MEASURES.items()}
    if others is not None:
        is_other = _flat(others, 1 if by_feature else 2) >= threshold
        found["specificity"] = roc_auc(scores, is_object, among=counted & (is_object | is_other))
    return xr.Dataset({name: ("prompt", values) for name, values in found.items()}, attrs={"threshold": threshold})


def roc_auc(
    scores: Float[np.ndarray, "row item"],
    positive: Bool[np.ndarray, "row item"],
    *,
    among: Bool[np.ndarray, "row item"] | None = None,
) -> Float[np.ndarray, " row"]:
    """Area under the ROC curve of every row, by ranks (Mann & Whitney); NaN for a row of one kind.

    In this and the other measures `among` are the items that count, by default all.

    >>> roc_auc(np.array([[0.1, 0.4, 0.35, 0.8]]), np.array([[False, False, True, True]])).tolist()
    [0.75]
    """
    from scipy.stats import rankdata

    def one(values: np.ndarray, is_one: np.ndarray) -> float:
        n, n_others = int(is_one.sum()), int((~is_one).sum())
        if not n_others:
            return float("nan")
        wins = rankdata(values)[is_one].sum() - n * (n + 1) / 2  # of pairs, where the positive item scores higher
        return wins / (n * n_others)

    return _each(one, scores, positive, among)


def average_precision(
    scores: Float[np.ndarray, "row item"],
    positive: Bool[np.ndarray, "row item"],
    *,
    among: Bool[np.ndarray, "row item"] | None = None,
) -> Float[np.ndarray, " row"]:
    """Sum over thresholds of the gain in recall times the precision there; equal scores share a threshold.

    >>> average_precision(np.array([[0.1, 0.4, 0.35, 0.8]]), np.array([[False, False, True, True]])).round(3).tolist()
    [0.833]
    """
    from sklearn.metrics import average_precision_score

    return _each(lambda values, is_one: average_precision_score(is_one, values), scores, positive, among)


def pointing(
    scores: Float[np.ndarray, "row item"],
    positive: Bool[np.ndarray, "row item"],
    *,
    among: Bool[np.ndarray, "row item"] | None = None,
) -> Float[np.ndarray, " row"]:
    """Whether the highest item is positive (the pointing game, Zhang et al. 2018); of several highest ones, the share.

    >>> pointing(np.array([[0.1, 0.8, 0.8]]), np.array([[False, True, False]])).tolist()
    [0.5]
    """
    return _each(lambda values, is_one: is_one[values == values.max()].mean(), scores, positive, among)


def iou_at_size(
    scores: Float[np.ndarray, "row item"],
    positive: Bool[np.ndarray, "row item"],
    *,
    among: Bool[np.ndarray, "row item"] | None = None,
) -> Float[np.ndarray, " row"]:
    """Intersection over union of the positive items with as many highest ones; equal ones at the edge count in part.

    >>> iou_at_size(np.array([[0.9, 0.8, 0.1, 0.2]]), np.array([[True, False, False, True]])).round(3).tolist()
    [0.333]
    """

    def one(values: np.ndarray, is_one: np.ndarray) -> float:
        n = int(is_one.sum())
        edge = np.sort(values)[-n]
        above, at_edge = values > edge, values == edge
        share = (n - above.sum()) / at_edge.sum()
        both = is_one[above].sum() + share * is_one[at_edge].sum()
        return both / (2 * n - both)

    return _each(one, scores, positive, among)


def auroc(sign: Sequence[float] | np.ndarray, wrong: Sequence[bool] | np.ndarray) -> float:
    """How well a number tells wrong answers from right ones, where more of it is to mean wrong; NaN if all are alike.

    >>> auroc([0.9, 0.2, 0.4], [True, False, False])
    1.0
    """
    return float(roc_auc(np.asarray(sign, dtype=np.float64)[None], np.asarray(wrong, dtype=bool)[None])[0])


def rank_correlation(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation; equal values share their mean rank, and NaN where one side is constant.

    >>> rank_correlation([1.0, 5.0, 9.0], [0.0, 1.0, 30.0])
    1.0
    """
    from scipy.stats import spearmanr

    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def bootstrap(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] | None = None,
    *,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A statistic (the mean by default) and the ends of its percentile bootstrap interval; NaN values are left out.

    `values` has the cases on its first axis. Pairs are compared by the interval of their differences.

    >>> mean, low, high = bootstrap([1.0, 2.0, 3.0])
    >>> low < mean == 2.0 < high
    True
    """
    array = np.asarray(values, dtype=np.float64)
    whole = ~np.isnan(array.reshape(len(array), -1)).any(-1)
    array = array[whole]
    if not len(array):
        return np.nan, np.nan, np.nan
    if statistic is None:
        mean, low, high = mean_intervals(array, n=n, level=level, seed=seed).tolist()
        return mean, low, high
    value = float(statistic(array))
    if len(array) == 1:
        return value, value, value
    from scipy import stats

    def of_cases(cases: np.ndarray) -> float:
        return statistic(array[cases])

    how: dict[str, Any] = {"n_resamples": n, "vectorized": False, "method": "percentile"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # samples without the statistic are left out below
        found = stats.bootstrap((np.arange(len(array)),), of_cases, rng=np.random.default_rng(seed), **how)
    drawn = found.bootstrap_distribution
    if np.isnan(drawn).all():
        return value, float("nan"), float("nan")
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return value, float(low), float(high)


def mean_intervals(
    values: Float[np.ndarray, "case ..."], *, n: int = 1000, level: float = 0.95, seed: int = 0
) -> Float[np.ndarray, "3 ..."]:
    """Means over the first axis and the ends of their percentile bootstrap intervals; NaN counts for nothing.

    >>> mean_intervals(np.array([[1.0, np.nan], [3.0, 5.0]])).round(1).tolist()
    [[2.0, 5.0], [1.0, 5.0], [3.0, 5.0]]
    """
    n_cases = len(values)
    flat = values.reshape(n_cases, -1)
    valid = np.isfinite(flat)
    drawn = np.random.default_rng(seed).multinomial(n_cases, np.full(n_cases, 1 / n_cases), size=n)
    weights = np.concatenate([np.ones((1, n_cases)), drawn])  # the sample itself first
    weight = weights @ valid
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ np.where(valid, flat, 0)) / weight  # NaN where nothing that counts was drawn
    return percentile_interval(means, level).reshape(3, *values.shape[1:])


def percentile_interval(samples: Float[np.ndarray, "sample ..."], level: float = 0.95) -> Float[np.ndarray, "3 ..."]:
    """The first sample, and the ends between which so large a share of the others lies; NaN counts for nothing.

    >>> percentile_interval(np.array([2.0, 1.0, 2.0, 3.0]), 1.0).tolist()
    [2.0, 1.0, 3.0]
    """
    empty = ~np.isfinite(samples[1:]).any(axis=0)
    ends = np.nanquantile(np.where(empty, 0.0, samples[1:]), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.stack([samples[0], *np.where(empty, np.nan, ends)])


def shares(maps: Float[np.ndarray, "..."], *, n_axes: int = 2) -> Float[np.ndarray, "..."]:
    """A map as non-negative shares that sum to 1: less its smallest value, over the sum (method (g) of arXiv 2411.10950).

    The last `n_axes` are a map's own, [patch_row, patch_col] by default. A constant map has equal shares; NaN stays.

    >>> shares(np.array([[1.0, 2.0], [1.0, 4.0]])).tolist()
    [[0.0, 0.25], [0.0, 0.75]]
    """
    axes = tuple(range(-n_axes, 0))
    lifted = maps - np.nanmin(maps, axes, keepdims=True)
    total = np.nansum(lifted, axes, keepdims=True)
    even = np.where(np.isnan(maps), np.nan, 1 / (~np.isnan(maps)).sum(axes, keepdims=True))
    return np.where(total > 0, lifted / np.where(total > 0, total, 1), even)


_MEASURES = {"auc": roc_auc, "average_precision": average_precision, "pointing": pointing, "iou": iou_at_size}


def _flat(maps: Any, n_axes: int) -> Float[np.ndarray, "prompt place"]:
    """[..., patch_row, patch_col], or [..., feature], as float64."""
    array = np.asarray(getattr(maps, "values", maps), dtype=np.float64)
    if array.ndim < n_axes:
        raise InputError(f"A map has the shape {array.shape}; expected [..., patch_row, patch_col].")
    return array.reshape(-1, math.prod(array.shape[-n_axes:]))


def _each(
    one: Callable[[np.ndarray, np.ndarray], float],
    scores: np.ndarray,
    positive: np.ndarray,
    among: np.ndarray | None = None,
) -> Float[np.ndarray, " row"]:
    """A measure of each row, [row]; NaN for a row without a positive item or with a score that is NaN."""

    def measured(values: np.ndarray, is_one: np.ndarray) -> float:
        if np.isnan(values).any() or not is_one.any():
            return float("nan")
        return float(one(np.nan_to_num(values), is_one))  # infinite scores as the largest numbers, which sklearn takes

    if among is None:
        among = np.ones_like(positive)
    return np.array([measured(*(part[a] for part in row)) for *row, a in zip(scores, positive, among, strict=True)])
