"""Are explanations right? Against a segmenter, against CLIP, and by what the explainer can tell from them; beside chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsFloat, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool
from PIL import Image

from hooked_llava.architecture.layout import ALL
from hooked_llava.checks import finite_number, whole_number
from hooked_llava.errors import InputError
from hooked_llava.features.asking import Explainer, concurrency_of, each_answered
from hooked_llava.features.explanations import Explanation
from hooked_llava.features.prompts import DETECT_PROMPT, Concept, filled, read_yes_or_no
from hooked_llava.features.store import FeatureStore
from hooked_llava.results.map_quality import bootstrap

if TYPE_CHECKING:
    import xarray as xr

Segmenter: TypeAlias = Callable[[Image.Image, str], Bool[np.ndarray, "height width"]]
"""The pixels of an image that a phrase names."""
Similarity: TypeAlias = Callable[[Sequence[Image.Image], str], Sequence[float]]
"""How well each image fits a phrase."""
TOTAL = "total"
_Measure: TypeAlias = Callable[[Explanation, Sequence[int]], float]


class _Where(NamedTuple):
    """What counts as active."""

    threshold: float
    grid: str


def score_features(
    store: FeatureStore,
    explanations: Sequence[Explanation],
    *,
    segmenter: Segmenter | None = None,
    similarity: Similarity | None = None,
    explainer: Explainer | None = None,
    n_random: int = 10,
    n_detected: int = 10,
    threshold: SupportsFloat = 0.0,
    grid: str = ALL,
    seed: int = 0,
) -> xr.Dataset:
    """Every explanation against what can judge it, beside the same phrases on random images (Zhang et al. 2411.14982, section 4).

    Args:
        store: the features and their images.
        explanations: what `explain_features` gave; those without a phrase have no scores.
        segmenter: (image, phrase) -> mask, for `iou`: intersection over union of the mask with the cells where the feature is
            active, the mean over the explanation's images. A phrase that the segmenter does not find counts 0.
        similarity: (images, phrase) -> scores, for `clip_score`: such as `ClipSimilarity`; the mean over the images.
        explainer: (images, prompt) -> text, for `detection`: asked whether the phrase is shown by each of `n_detected` images in
            which the feature is active, other than the explanation's, and as many in which it is not. The score is balanced
            accuracy, the mean of the shares of right answers among both; neither yes nor no is wrong.
        n_random: runs of the baseline: as many random images for each feature as its explanation has.
        n_detected: images of each kind that are asked about, at most; drawn at random.
        threshold: activation above which a cell is active.
        grid: whose cells.
        seed: of what is drawn.

    Returns `iou`, `clip_score` and `detection` [feature], `iou_random` and `clip_score_random` [run, feature], with `phrase`
    and `concept` at each feature. Scores are NaN where there is no phrase, and detection where there are no images of one kind.
    Raises `InputError` if there is nothing to judge by.
    """
    import xarray as xr

    if segmenter is similarity is explainer is None:
        raise InputError("score_features has nothing to judge by; give segmenter=, similarity= or explainer=.")
    where = _Where(finite_number(threshold, "threshold", least=0.0), grid)
    n_random, n_detected = (
        whole_number(n, name, least=least)
        for n, name, least in ((n_random, "n_random", 0), (n_detected, "n_detected", 1))
    )
    found: dict[str, Any] = {}
    for name, measure in _measures(store, segmenter, similarity, where).items():
        found |= _beside_random(name, store, explanations, measure, n_random, seed)
    if explainer is not None:
        found["detection"] = "feature", _detected(store, explanations, explainer, n_detected, where, seed)
    about = {"hook": store.hook, "n_images": store.n_images, "seed": seed, "n_detected": n_detected, **where._asdict()}
    return xr.Dataset(found, _coordinates(explanations), {"analysis": "score_features", **about})


def chance(scores: xr.Dataset, name: str) -> xr.DataArray | None:
    """A score of `score_features` on random images, the mean over the runs for each feature; None for one without runs."""
    random = f"{name}_random"
    return scores[random].mean("run") if random in scores else None


def score_table(scores: xr.Dataset, *, level: float = 0.99) -> xr.Dataset:
    """The mean of every score by concept and in total, with intervals, beside chance: Table 1 of Zhang et al. (2411.14982).

    `mean`, `low` and `high` [concept, score] are over features (a percentile bootstrap at `level`); the scores that end in
    "_random" over runs, of their means over the features. `n` [concept] counts features with a phrase.

    >>> import xarray as xr
    >>> scores = xr.Dataset(
    ...     {"iou": ("feature", [0.2, 0.4, np.nan])},
    ...     {"phrase": ("feature", ["star", "red", ""]), "concept": ("feature", ["object", "color", ""])},
    ... )
    >>> score_table(scores)["mean"].sel(concept="total").item(), score_table(scores).n.values.tolist()
    (0.30000000000000004, [1, 1, 2])
    """
    import xarray as xr

    explained = scores.phrase.values != ""
    groups = {name: explained & (scores.concept.values == name) for name in get_args(Concept)}
    groups = {name: among for name, among in groups.items() if among.any()} | {TOTAL: explained}
    names = list(map(str, scores.data_vars))
    cells = np.full((len(groups), len(names), 3), np.nan)
    for row, among in enumerate(groups.values()):
        for column, name in enumerate(names):
            values = scores[name].values[..., among]
            if values.ndim == 2 and values.size:
                values = np.nanmean(values, axis=1) if not np.isnan(values).all() else np.array([])
            if values.size:
                cells[row, column] = bootstrap(values, level=level)
    coords = {"concept": list(groups), "score": names}
    parts = {name: (("concept", "score"), cells[..., i]) for i, name in enumerate(("mean", "low", "high"))}
    return xr.Dataset(parts | {"n": ("concept", [int(a.sum()) for a in groups.values()])}, coords, {"level": level})


def iou_of(
    store: FeatureStore,
    explanation: Explanation,
    segmenter: Segmenter,
    images: Sequence[int],
    threshold: float = 0.0,
    grid: str = ALL,
) -> float:
    """Intersection over union of a phrase's mask and the feature's region, the mean over some images of the store."""
    found = []
    for i in images:
        region = store.mask(explanation.feature, i, threshold, grid=grid)
        found.append(intersection_over_union(region, segmenter(store.image(i), explanation.phrase)))
    return float(np.mean(found))


def intersection_over_union(one: Bool[np.ndarray, "height width"], other: Bool[np.ndarray, "y x"]) -> float:
    """The share of pixels of either mask that are in both; 0 where both are empty. Raises `InputError` for other sizes.

    >>> intersection_over_union(np.array([[True, True]]), np.array([[False, True]]))
    0.5
    """
    if one.shape != other.shape:
        raise InputError(f"The masks have the shapes {one.shape} and {other.shape}; expected one value for each pixel.")
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 0.0


def _measures(
    store: FeatureStore, segmenter: Segmenter | None, similarity: Similarity | None, where: _Where
) -> dict[str, _Measure]:
    """What is measured of an explanation on some images, by name."""
    found: dict[str, _Measure] = {}
    if segmenter is not None:
        found["iou"] = lambda one, images: iou_of(store, one, segmenter, images, *where)
    if similarity is not None:
        shown = store.image
        found["clip_score"] = lambda one, images: float(np.mean(similarity([shown(i) for i in images], one.phrase)))
    return found


def _beside_random(
    name: str, store: FeatureStore, explanations: Sequence[Explanation], measure: _Measure, n_random: int, seed: int
) -> dict[str, Any]:
    """A measure on the explanations' own images, and on random ones in each run."""
    own = _each(explanations, lambda one: measure(one, one.images))
    runs = [_each(explanations, _at_random(store, measure, [seed, run])) for run in range(n_random)]
    return {
        name: ("feature", own),
        f"{name}_random": (("run", "feature"), np.reshape(runs, (n_random, len(explanations)))),
    }


def _coordinates(explanations: Sequence[Explanation]) -> dict[str, Any]:
    return {
        "feature": [one.feature for one in explanations],
        "phrase": ("feature", [one.phrase for one in explanations]),
        "concept": ("feature", [one.concept or "" for one in explanations]),
    }


def _each(explanations: Sequence[Explanation], measure: Callable[[Explanation], float]) -> np.ndarray:
    """A number for every explanation that has a phrase, NaN for the others."""
    return np.array([measure(one) if one.found else np.nan for one in explanations])


def _at_random(store: FeatureStore, measure: _Measure, seed: Sequence[int]) -> Callable[[Explanation], float]:
    """The measure on random images in place of an explanation's."""

    def of(one: Explanation) -> float:
        rng = np.random.default_rng([*seed, one.feature])
        return measure(one, rng.choice(store.n_images, len(one.images), replace=False).tolist())

    return of


def _detected(
    store: FeatureStore,
    explanations: Sequence[Explanation],
    explainer: Explainer,
    n: int,
    where: _Where,
    seed: int,
) -> np.ndarray:
    """Balanced accuracy of the explainer's yes and no, for every explanation."""

    def jobs() -> Iterator[tuple[int, bool, Image.Image]]:
        for number, one in enumerate(explanations):
            if one.found:
                both = active_and_not(store, one, n, seed=seed, **where._asdict())
                for is_active, images in zip((True, False), both, strict=True):
                    yield from ((number, is_active, store.image(i)) for i in images)

    def answer(job: tuple[int, bool, Image.Image]) -> bool:
        number, is_active, image = job
        said = read_yes_or_no(explainer([image], filled(DETECT_PROMPT, explanations[number].phrase)))
        return said is is_active

    right: list[dict[bool, list[bool]]] = [{True: [], False: []} for _ in explanations]
    for (number, is_active, _), is_right in each_answered(jobs(), answer, concurrency_of(explainer)):
        right[number][is_active].append(is_right)
    shares = [[float(np.mean(of[kind])) if of[kind] else np.nan for kind in (True, False)] for of in right]
    return np.reshape(shares, (-1, 2)).mean(axis=1)


def active_and_not(
    store: FeatureStore, explanation: Explanation, n: int, *, grid: str = ALL, threshold: float = 0.0, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Up to n random images in which a feature is active, without those of the explanation, and n in which it is not.

    Images that look the same count once.
    """
    rng = np.random.default_rng([seed, explanation.feature])
    everywhere = store.top_images(explanation.feature, store.n_images, by="max", grid=grid, distinct=False)
    active = {one.image for one in everywhere if one.score > threshold}
    shown = {store.record(i).hash for i in explanation.images}
    found: tuple[list[int], list[int]] = ([], [])
    for i in rng.permutation(store.n_images).tolist():
        same = found[0] if i in active else found[1]
        if len(same) < n and store.record(i).hash not in shown:
            same.append(i)
            shown.add(store.record(i).hash)
        if min(map(len, found)) == n:
            break
    return found
