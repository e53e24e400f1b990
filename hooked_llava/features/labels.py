"""Which feature tells a label best: average precision and F1 of every feature for every label, from what is active alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_llava.architecture.layout import ALL
from hooked_llava.checks import as_indices, one_of
from hooked_llava.errors import InputError
from hooked_llava.features.ranking import Pooling, pooled
from hooked_llava.features.shards import Entries
from hooked_llava.features.store import FeatureStore

if TYPE_CHECKING:
    import xarray as xr

Labelled: TypeAlias = Literal["cell", "image"]
"""What carries a label: each cell of each image, or each image."""


class LabelScores(NamedTuple):
    """How well features tell labels, as `label_scores` returns it.

    >>> LabelScores(*np.array([[[1.0]], [[0.8]], [[0.5]]])).f1
    array([[0.8]])

    Attributes:
        average_precision (Float[np.ndarray, "feature label"]): Sum over thresholds of the gain in recall times the precision;
            NaN for a label that nothing has.
        f1 (Float[np.ndarray, "feature label"]): The best F1 over all thresholds above 0.
        threshold (Float[np.ndarray, "feature label"]): Where that is: the label is told from this activation on.
    """

    average_precision: Float[np.ndarray, "feature label"]
    f1: Float[np.ndarray, "feature label"]
    threshold: Float[np.ndarray, "feature label"]


def match_labels(
    store: FeatureStore,
    labels: Bool[np.ndarray, "item label"] | Sequence[Bool[np.ndarray, "cell label"]],
    names: Sequence[str],
    *,
    of: Labelled = "cell",
    by: Pooling = "mean",
    grid: str = ALL,
    images: Any = None,
) -> xr.Dataset:
    """How well every feature of a store tells every label: `average_precision`, `f1`, `threshold`, each [sae_feature, label].

    Chosen and measured on the same images the best feature's numbers are too good: choose on some (`images=`).

    Args:
        store: what is active where.
        labels: which labels hold. For `of="cell"` a row for each cell, image after image, the cells of an image in the order
            of `layout.object_features(grid)`; or a list of such arrays, one for each image. For `of="image"` a row for each.
        names: of the labels.
        of: what carries the labels.
        by: of labels of images, how the activations of an image become one: their "mean" over cells, or "max".
        grid: whose cells, or "all".
        images: which images of the store the labels are of, in order; all by default.

    Equal activations share a threshold, and where a feature is not active it is 0. `n_positive` says how often a label holds.
    Raises `InputError` for labels that are not one for each cell or image.

    >>> import tempfile
    >>> from hooked_llava.model.llava import HookedLLaVA
    >>> from hooked_llava.sae.files import load_sae
    >>> from hooked_llava.toy.images import image_path, image_scene
    >>> model, sae = HookedLLaVA.from_pretrained("tiny-shapes"), load_sae("tiny-shapes")
    >>> scene = image_scene("demo")
    >>> shown = scene.patch_coverage.reshape(len(scene.objects), -1).T > 0.2  # [cell, object]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = FeatureStore.build(model, sae, [(image_path("demo"), "What?")], folder, progress=False)
    ...     found = match_labels(store, shown, [one.color for one in scene.objects])
    >>> dict(found.f1.sizes), bool((found.n_positive == shown.sum(0)).all())
    ({'sae_feature': 128, 'label': 4}, True)
    """
    of, by = one_of(of, get_args(Labelled), "of"), one_of(by, get_args(Pooling), "by")
    chosen = list(range(store.n_images)) if images is None else as_indices(images, store.n_images, "images")
    if len(set(chosen)) != len(chosen):
        raise InputError(f"images={chosen} names some image twice; expected each once.")
    sizes = _sizes(store, chosen, grid)
    table = _checked(labels, names, sizes, of)
    first = np.full(store.n_images, -1)
    first[chosen] = np.cumsum([0, *sizes[:-1]]) if of == "cell" else np.arange(len(chosen))
    found = [np.full((store.n_features, len(names)), np.nan) for _ in LabelScores._fields]
    for features, parts in store.blocks():
        values, of_feature, items = _of_items(store, parts, first, of, by, grid)
        scores = label_scores(values, of_feature - features.start, items, table, n_features=len(features))
        for whole, part in zip(found, scores, strict=True):
            whole[features.start : features.stop] = part
    about = {"of": of, "grid": grid, "n_images": len(chosen)}
    return _dataset(LabelScores(*found), names, table.sum(0), {**about, **_source(store)})


def label_scores(
    values: Float[np.ndarray, " entry"],
    features: Int[np.ndarray, " entry"],
    items: Int[np.ndarray, " entry"],
    labels: Bool[np.ndarray, "item label"],
    *,
    n_features: int,
) -> LabelScores:
    """Average precision and best F1 of features for labels, from the items at which each feature is active.

    Items that a feature does not list come last, together.

    >>> found = label_scores(np.array([0.8, 0.4, 0.35]), np.zeros(3, int), np.array([3, 1, 2]),
    ...                      np.array([[False], [False], [True], [True]]), n_features=1)
    >>> round(float(found.average_precision[0, 0]), 3), float(found.f1[0, 0]), float(found.threshold[0, 0])
    (0.833, 0.8, 0.35)
    """
    order = np.lexsort((-values, features))
    runs = _Runs.of(values[order], features[order])
    columns = [_one_label(runs, labels[:, label], items[order], n_features) for label in range(labels.shape[1])]
    return LabelScores(*(np.stack(column, axis=1) for column in zip(*columns, strict=True)))


class _Runs(NamedTuple):
    """Entries sorted by feature and then from the highest value down, where equal values are one threshold.

    Attributes:
        feature (Int[np.ndarray, " active"]): The features that have any.
        first (Int[np.ndarray, " active"]): The first threshold of each.
        end (Int[np.ndarray, " threshold"]): The last entry of each threshold.
        begin (Int[np.ndarray, " threshold"]): The first entry of its feature.
        value (Float[np.ndarray, " threshold"]): The value.
    """

    feature: Int[np.ndarray, " active"]
    first: Int[np.ndarray, " active"]
    end: Int[np.ndarray, " threshold"]
    begin: Int[np.ndarray, " threshold"]
    value: Float[np.ndarray, " threshold"]

    @classmethod
    def of(cls, values: Float[np.ndarray, " entry"], features: Int[np.ndarray, " entry"]) -> _Runs:
        """Of sorted entries."""
        is_last = (np.diff(features, append=-1) != 0) | (np.diff(values, append=np.inf) != 0)
        end = np.flatnonzero(is_last)
        active, first = np.unique(features[end], return_index=True)
        return cls(active, first, end, np.searchsorted(features, features[end]), values[end])


def _one_label(
    runs: _Runs, has: Bool[np.ndarray, " item"], items: Int[np.ndarray, " entry"], n_features: int
) -> tuple[Float[np.ndarray, " feature"], Float[np.ndarray, " feature"], Float[np.ndarray, " feature"]]:
    """Average precision, best F1 and its threshold of every feature for one label."""
    n_positive, n_found = int(has.sum()), np.zeros(n_features)
    precision, f1, threshold = np.zeros(n_features), np.zeros(n_features), np.zeros(n_features)
    if len(runs.end):
        total = np.append(0, np.cumsum(has[items], dtype=np.int64))
        hits, n = total[runs.end + 1] - total[runs.begin], runs.end + 1 - runs.begin
        gained = np.diff(hits, prepend=0)
        gained[runs.first] = hits[runs.first]
        precision[runs.feature] = np.add.reduceat(gained * hits / n, runs.first)
        told = 2 * hits / (n + n_positive) * (runs.value > 0)
        best = np.maximum.reduceat(told, runs.first)
        n_thresholds = np.diff(np.append(runs.first, len(runs.end)))
        is_best = told == np.repeat(best, n_thresholds)
        f1[runs.feature] = best
        threshold[runs.feature] = np.maximum.reduceat(np.where(is_best, runs.value, -np.inf), runs.first)
        n_found[runs.feature] = hits[runs.first + n_thresholds - 1]
    if not n_positive:
        return np.full(n_features, np.nan), f1, threshold
    rest = (n_positive - n_found) * n_positive / len(has)  # items that are not listed come last, together
    return (precision + rest) / n_positive, f1, threshold


def _dataset(
    scores: LabelScores, names: Sequence[str], n_positive: Int[np.ndarray, " label"], about: dict[str, Any]
) -> xr.Dataset:
    import xarray as xr

    variables = {name: (("sae_feature", "label"), array) for name, array in scores._asdict().items()}
    found = {**variables, "n_positive": ("label", n_positive)}
    return xr.Dataset(found, {"label": list(names)}, {"analysis": "match_labels", **about})


def _source(store: FeatureStore) -> dict[str, Any]:
    """What a store is of, for attributes."""
    return {name: store.about[name] for name in ("model", "hook", "sae") if store.about.get(name) is not None}


def _sizes(store: FeatureStore, chosen: Sequence[int], grid: str) -> list[int]:
    """How many cells each image has; raises `InputError` where the store leaves some out."""
    n_stored = np.concatenate([shard.cells(grid).n for shard in store.shards])
    for image in chosen:
        if n_stored[image] != len(store.layout(image).object_features(grid)):
            raise InputError(
                f"tokens={store.tokens!r} of the store leaves out cells of image {image}; build one with tokens='image'."
            )
    return n_stored[list(chosen)].tolist()


def _of_items(
    store: FeatureStore,
    parts: Sequence[Entries],
    first: Int[np.ndarray, " image"],
    of: Labelled,
    by: Pooling,
    grid: str,
) -> tuple[Float[np.ndarray, " entry"], Int[np.ndarray, " entry"], Int[np.ndarray, " entry"]]:
    """Values, features and items of the entries of some features, given by shard; `first` is -1 for images left out."""
    found = []
    for begin, shard, entries in zip(store.first_images.tolist(), store.shards, parts, strict=False):
        image, position = shard.located(entries.tokens)
        cells = shard.cells(grid)
        cell = cells.at(image, position)
        there = (cell >= 0) & (first[begin + np.maximum(image, 0)] >= 0)
        image, values, features = image[there], entries.values[there].astype(np.float64), entries.features[there]
        items = first[begin + image]
        if of == "cell":
            found.append((values, features, items + cell[there]))
            continue
        pair, group = np.unique(features * shard.n_images + image, return_inverse=True)
        feature, local = np.divmod(pair, max(shard.n_images, 1))
        found.append((pooled(group, values, cells.n[local], by), feature, first[begin + local]))
    values, features, items = (np.concatenate(column) for column in zip(*found, strict=True))
    return values, features, items


def _checked(labels: Any, names: Sequence[str], sizes: Sequence[int], of: Labelled) -> Bool[np.ndarray, "item label"]:
    """The labels as one array; raises `InputError` for another number of rows or columns than are named."""
    parts = [np.asarray(one) for one in labels] if isinstance(labels, (list, tuple)) and of == "cell" else None
    if parts is not None and [len(one) for one in parts] != list(sizes):
        raise InputError(
            f"labels has {[len(one) for one in parts]} rows for the images; expected {list(sizes)}, one for each cell."
        )
    table = np.asarray(labels) if parts is None else np.concatenate(parts)
    expected = (sum(sizes) if of == "cell" else len(sizes), len(names))
    if table.shape != expected or not np.isin(table, (0, 1)).all():
        raise InputError(
            f"labels is of shape {table.shape} and type {table.dtype}; expected bool {expected}: a row for each {of}, a column "
            f"for each of the {len(names)} names."
        )
    return table.astype(np.bool_)
