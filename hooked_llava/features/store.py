"""Which features are active where, over all images of some data: written once, read by feature, by image and by region."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_llava.architecture.boxes import BoxLike, checked_mask
from hooked_llava.architecture.image_axis import Number
from hooked_llava.architecture.layout import ALL
from hooked_llava.checks import as_index, one_of, whole_number
from hooked_llava.datasets.prompts import DataOptions
from hooked_llava.errors import CheckpointError, counted
from hooked_llava.features.build import FORMAT, SHARD_SIZE, BuildSettings, build
from hooked_llava.features.images import StoredImages
from hooked_llava.features.ranking import ActiveFeature, Pooling, TopImage, pooled, ranking
from hooked_llava.features.shards import Entries, Sums
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.sae.autoencoder import SparseAutoencoder
from hooked_llava.sae.shards import INDEX, ShardIndex

_BLOCK = 2**22  # activations read at once
_HALF = 0.5 - 1e-9  # of a pixel, whatever the rounding


class Placed(NamedTuple):
    """Everything a store holds of one feature.

    Attributes:
        values (Float[np.ndarray, " entry"]): How strongly it is active at each token, zeros left out.
        images (Int[np.ndarray, " entry"]): In which image of the store; -1 at text.
        places (Int[np.ndarray, "entry column"]): Where, as `PLACE_COLUMNS` says.
    """

    values: Float[np.ndarray, " entry"]
    images: Int[np.ndarray, " entry"]
    places: Int[np.ndarray, "entry column"]


class FeatureStore(StoredImages):
    """The active features of an autoencoder at every token of a data set, on disk; `build` fills one, `open` reads it.

    Only what is active is stored, no feature is left out, and a question about one feature reads that feature alone.

    Args:
        folder: where it is.
        index: what the folder holds.

    >>> import tempfile
    >>> from hooked_llava.sae import load_sae
    >>> from hooked_llava.toy.images import image_path
    >>> model, sae = HookedLLaVA.from_pretrained("tiny-shapes"), load_sae("tiny-shapes")
    >>> data = [(image_path(name), "What is there?") for name in ("demo", "one-shape")]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = FeatureStore.build(model, sae, data, folder, progress=False)
    ...     feature, score = store.of_image(0, n=1)[0]
    ...     store.mask(feature, 0).shape, score == store.top_images(feature, n=2, by="mean")[0].score
    ((64, 64), True)
    """

    @classmethod
    def build(
        cls,
        model: HookedLLaVA,
        sae: SparseAutoencoder,
        data: Any,
        folder: str | os.PathLike[str],
        hook: Any = None,
        *,
        tokens: str = "image",
        prompt: str | None = None,
        batch_size: int = 8,
        columns: tuple[str, str] = ("image", "question"),
        images: str | Path | None = None,
        any_model: bool = False,
        shard_size: int = SHARD_SIZE,
        prefetch: int = 2,
        progress: bool = True,
        **options: Any,
    ) -> FeatureStore:
        """Run images and prompts through a model, and store the active features of every token.

        Called again with the same arguments it goes on where it was stopped; one that is complete is only opened. Memory is
        bounded by the size of a shard.

        Args:
            model: the model; a forward pass stops at the hook.
            sae: the autoencoder.
            data: as for `activation_stream`: a table, rows, a data set with columns, a folder of images, or an iterable. Images
                that the data hold themselves are stored as PNG; those in files stay there.
            folder: where the store goes; made if it is not there.
            hook: the hook that the autoencoder reads; by default the one that it was trained on.
            tokens: whose features: "image", "text", "all", or any span.
            prompt: the question about every image, in place of the data's. The paper's (2411.14982) is "<image>" alone:
                `prompt="<image>", template=None`.
            batch_size: prompts in one forward pass.
            columns: names of the columns of image and question.
            images: folder of the images that the data name.
            any_model: do not compare the model's name with the autoencoder's.
            shard_size: activations in one shard, about.
            prefetch: batches of prompts prepared ahead in a thread; 0 for none.
            progress: show a progress bar.
            options: go to `model.prepare`.

        Raises `InputError` for a folder that holds other features, for an autoencoder that does not fit the hook, and as
        `activation_stream` for the data.
        """
        settings = BuildSettings(tokens, batch_size, prefetch, any_model, shard_size, progress)
        build(model, sae, data, folder, hook, DataOptions(prompt, columns, images), settings, options)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> FeatureStore:
        """Read a store, without the model; of one that is not complete what is there (`complete` says so).

        Raises `CheckpointError` for a folder that holds none.
        """
        place = Path(folder).expanduser()
        index = ShardIndex.read(place, FORMAT)
        if index is None:
            raise CheckpointError(f"{place} holds no feature store, which has an {INDEX}; build one there first.")
        return cls(place, index)

    def __repr__(self) -> str:
        size = f"{counted(self.n_images, 'image')}, {counted(self.n_features, 'feature')} of {self.hook}"
        return f"FeatureStore({str(self.folder)!r}, {size}{'' if self.complete else ', not complete'})"

    # By feature

    @property
    def frequency(self) -> Float[np.ndarray, " feature"]:
        """For every feature the share (0 to 1) of tokens at which it is active."""
        return self._sums.counts.numpy() / max(self.n_tokens, 1)

    @property
    def largest(self) -> Float[np.ndarray, " feature"]:
        """The largest activation of every feature; 0 for one that is never active."""
        return self._sums.largest.numpy()

    @property
    def mean(self) -> Float[np.ndarray, " feature"]:
        """The mean activation of every feature over the tokens at which it is active; 0 for one that never is."""
        return self._sums.totals.numpy() / np.maximum(self._sums.counts.numpy(), 1)

    def histogram(
        self, feature: int, bins: int | Sequence[float] = 20
    ) -> tuple[Int[np.ndarray, " bin"], Float[np.ndarray, " edge"]]:
        """How often a feature is active how strongly: counts by bin, zeros left out, and the edges of the bins.

        `bins` are so many between 0 and the largest activation, or the edges themselves.
        """
        feature = self._feature(feature)
        most = float(self.largest[feature]) or 1.0
        edges = (
            np.histogram_bin_edges(np.zeros(0), bins, (0.0, most)) if np.ndim(bins) == 0 else np.asarray(bins, float)
        )
        found = np.zeros(len(edges) - 1, dtype=np.int64)
        for shard in self.shards:
            found += np.histogram(shard.of_features(feature, feature + 1).values, edges)[0]
        return found, edges

    def top_images(
        self, feature: int, n: int = 5, *, by: Pooling = "mean", grid: str = ALL, distinct: bool = True
    ) -> list[TopImage]:
        """The images in which a feature is most active, over the cells of a grid (Zhang et al. 2411.14982, section 3.2).

        Args:
            feature: which feature.
            n: how many images, at most; those in which it is not active are left out.
            by: "mean" over the cells, or their "max".
            grid: whose cells: a grid's name ("base" for the paper's), or "all". Newlines and class tokens never count.
            distinct: leave out images whose pixels are those of one that is higher already.

        Raises `InputError` for a feature out of range, and `SpanError` for a grid that no image has.
        """
        feature, n = self._feature(feature), whole_number(n, "n", least=1)
        one_of(by, get_args(Pooling), "by")
        numbers, scores = [], []
        for first, shard in zip(self.first_images.tolist(), self.shards, strict=False):
            entries = shard.of_features(feature, feature + 1)
            image, position = shard.located(entries.tokens)
            there = shard.cells(grid).at(image, position) >= 0
            of_image = pooled(image[there], entries.values[there], shard.cells(grid).n, by)
            active = np.flatnonzero(of_image)
            numbers.append(active + first)
            scores.append(of_image[active])
        if not self.shards or not sum(map(len, numbers)):
            self._check_grid(grid)
            return []
        number, score = np.concatenate(numbers), np.concatenate(scores)
        ranked = ranking(number, score)
        return self._first(number[ranked].tolist(), score[ranked].tolist(), n, distinct=distinct)

    def activations(self, feature: int, image: int) -> Float[np.ndarray, " position"]:
        """A feature's activation at every position of an image; NaN at positions that are not stored.

        `store.layout(image).unfold(...)` has it by cell: for each grid [row, col].
        """
        feature = self._feature(feature)
        shard, local = self._find(image)
        values = np.full(self.layout(image).n_features, np.nan)
        values[shard.stored(local)] = 0.0
        entries = shard.of_features(feature, feature + 1)
        at, position = shard.located(entries.tokens)
        values[position[at == local]] = entries.values[at == local]
        return values

    def mask(
        self, feature: int, image: int, threshold: float = 0.0, *, grid: str = ALL
    ) -> Bool[np.ndarray, "height width"]:
        """The pixels of the original image that cells show at which a feature is above a threshold.

        A pixel that several cells of a grid show is in the mask if that holds for at least half of it; with several grids, if
        it is so in one of them. Raises `SpanError` where the original's size is not known.
        """
        layout = self.layout(image)
        cells = self.cell_mask(feature, image, threshold, grid=grid)
        lit = layout.fold({name: found.astype(np.float64) for name, found in cells.items()})
        drawn = np.stack([layout.draw(lit, grid=name) for name in cells])
        return np.any(np.nan_to_num(drawn) >= _HALF, axis=0)

    def cell_mask(
        self, feature: int, image: int, threshold: float = 0.0, *, grid: str = ALL
    ) -> dict[str, Bool[np.ndarray, "row col"]]:
        """For each grid the cells at which a feature is above a threshold."""
        layout = self.layout(image)
        by_cell = layout.unfold(self.activations(feature, image))
        names = layout.names if grid == ALL else (layout.grid(grid).name,)
        return {name: by_cell[name] > threshold for name in names}

    def placed(self, feature: int) -> Placed:
        """Everything that is stored of a feature, text included."""
        feature = self._feature(feature)
        values, images, places = [np.zeros(0, np.float32)], [np.zeros(0, int)], [np.zeros((0, 6), np.int32)]
        for first, shard in zip(self.first_images.tolist(), self.shards, strict=False):
            entries = shard.of_features(feature, feature + 1)
            image = shard.located(entries.tokens)[0]
            values.append(entries.values)
            images.append(np.where(image >= 0, image + first, -1))
            places.append(shard.table.part("places").numpy()[entries.tokens])
        return Placed(*map(np.concatenate, (values, images, places)))

    def blocks(self, size: int = _BLOCK) -> Iterator[tuple[range, list[Entries]]]:
        """All features in blocks of about so many activations, at least one feature each; their entries by shard."""
        ends = np.cumsum(self._sums.counts.numpy())
        start = 0
        while start < self.n_features:
            before = ends[start - 1] if start else 0
            stop = max(int(np.searchsorted(ends, before + size, side="right")), start + 1)
            yield range(start, stop), [shard.of_features(start, stop) for shard in self.shards]
            start = stop

    # By image and region

    def of_image(self, image: int, n: int = 10, *, by: Pooling = "mean", grid: str = ALL) -> list[ActiveFeature]:
        """The features that are most active in an image, over the cells of a grid; raises as `top_images`."""
        layout = self.layout(image)
        return self._most_active(image, layout.object_features(grid), n, by)

    def in_region(
        self,
        image: int,
        region: BoxLike | Bool[np.ndarray, "height width"] | Tensor,
        n: int = 10,
        *,
        by: Pooling = "mean",
        grid: str = ALL,
        coverage: Number = 0.5,
    ) -> list[ActiveFeature]:
        """The features that are most active in a part of an image: what is active here?

        Args:
            image: which image.
            region: a box (x0, y0, x1, y1) in pixels of the original, or a mask [height, width].
            n: how many features, at most.
            by: "mean" over the region's cells, or their "max".
            grid: whose cells.
            coverage: the share of a cell that the region must cover for the cell to belong to it.

        Raises `SpanError` for a region that is none, or that covers no cell enough.
        """
        layout, called = self.layout(image), f"image {image} of the store"
        if getattr(region, "ndim", 1) == 2:
            mask = checked_mask(region)  # type: ignore[arg-type]
            chosen = layout.mask_to_features(mask, coverage=coverage, grid=grid, called=called)
        else:
            chosen = layout.box_to_features(region, coverage=coverage, grid=grid, called=called)  # type: ignore[arg-type]
        return self._most_active(image, chosen.features, n, by)

    def _most_active(self, image: int, positions: Int[np.ndarray, " cell"], n: int, by: Pooling) -> list[ActiveFeature]:
        n, by = whole_number(n, "n", least=1), one_of(by, get_args(Pooling), "by")
        shard, local = self._find(image)
        record = shard.images[local]
        entries = shard.of_tokens(record.first_token, record.first_token + record.n_tokens)
        there = np.isin(shard.located(entries.tokens)[1], positions)
        features, index = np.unique(entries.features[there], return_inverse=True)
        n_cells = int(np.isin(shard.stored(local), positions).sum())
        score = pooled(index, entries.values[there], np.full(len(features), n_cells), by)
        ranked = ranking(features, score)[:n]
        return [ActiveFeature(int(features[i]), float(score[i])) for i in ranked]

    # Where things are

    @cached_property
    def _sums(self) -> Sums:
        return self.shards[-1].sums if self.shards else Sums.empty(self.n_features)

    def _feature(self, feature: int) -> int:
        return as_index(feature, self.n_features, "feature", from_end=False)

    def _check_grid(self, grid: str) -> None:
        """Raises `SpanError` for a grid that no image has."""
        if grid != ALL and self.shards and not any(shard.cells(grid).n.any() for shard in self.shards):
            self.layout(0).grid(grid)

    def _first(self, numbers: list[int], scores: list[float], n: int, *, distinct: bool) -> list[TopImage]:
        """The first n images, given in order; if `distinct`, of those that differ."""
        found: dict[Any, TopImage] = {}
        for image, score in zip(numbers, scores, strict=True):
            found.setdefault(self.record(image).hash if distinct else image, TopImage(image, score))
            if len(found) == n:
                break
        return list(found.values())
