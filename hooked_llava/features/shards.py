"""The files of a feature store: a shard holds some images of the data, and which features are active at their tokens.

`images-00000.safetensors` says what the shard's images and tokens are; `entries-00000.safetensors` holds the activations,
sorted by feature, so that those of one feature are read without the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from hooked_llava.architecture.layout import ALL, ImageLayout
from hooked_llava.storage import TensorFile, write_tensors

ENTRIES, IMAGES = "hooked_llava.feature_entries.v1", "hooked_llava.feature_images.v1"
"""Formats of the two kinds of files."""
WRITER = "FeatureStore.build"
_POSITION = 4  # the column of `PLACE_COLUMNS`


class Entries(NamedTuple):
    """Activations without the zeros: one entry for each feature active at a token.

    Attributes:
        values (Float[np.ndarray, " entry"]): How strongly.
        features (Int[np.ndarray, " entry"]): Which feature.
        tokens (Int[np.ndarray, " entry"]): At which token, counted within the shard.
    """

    values: Float[np.ndarray, " entry"]
    features: Int[np.ndarray, " entry"]
    tokens: Int[np.ndarray, " entry"]


@dataclass(frozen=True)
class ImageRecord:
    """One image of a store, without its pixels.

    Attributes:
        row (int): The number of its prompt in the data.
        prompt (str): What was asked about it.
        layout (int): Its layout, among those of the shard.
        start (int): The position of its first feature in the prompt, padding not counted.
        first_token (int): Its first stored token, counted within the shard.
        n_tokens (int): How many of its positions are stored.
        hash (str): Of its pixels; the same for the same image.
        file (str | None): Where it is, perhaps within the store's folder; None where only pixel values were given.
    """

    row: int
    prompt: str
    layout: int
    start: int
    first_token: int
    n_tokens: int
    hash: str
    file: str | None


@dataclass(frozen=True)
class Sums:
    """What all activations of a store's first shards add up to, feature by feature.

    Attributes:
        counts (Int[Tensor, " feature"]): At how many tokens each feature is active.
        totals (Float[Tensor, " feature"]): The sum of its activations.
        largest (Float[Tensor, " feature"]): The largest of them; 0 where there is none.
    """

    counts: Int[Tensor, " feature"]
    totals: Float[Tensor, " feature"]
    largest: Float[Tensor, " feature"]

    @classmethod
    def empty(cls, n_features: int) -> Sums:
        """Of no activations."""
        zeros = torch.zeros(n_features, dtype=torch.float64)
        return cls(zeros.long(), zeros, zeros.float())

    @classmethod
    def read(cls, path: Path) -> Sums:
        """Of all shards up to the one whose file of images this is."""
        table = TensorFile(path, [IMAGES], writer=WRITER)
        return cls(*(table.part(name) for name in ("counts", "totals", "largest")))

    def plus(self, values: Float[Tensor, " entry"], features: Int[Tensor, " entry"]) -> Sums:
        """With more activations."""
        index, n = features.long(), len(self.counts)
        return Sums(
            self.counts + torch.bincount(index, minlength=n),
            self.totals + torch.bincount(index, values.double(), minlength=n),
            self.largest.scatter_reduce(0, index, values.float(), "amax"),
        )


def write_entries(
    path: Path,
    values: Float[Tensor, " entry"],
    features: Int[Tensor, " entry"],
    tokens: Int[Tensor, " entry"],
    among: range,
) -> None:
    """Write activations of features `among` all, given by ascending token, sorted by feature and then by token."""
    begins = np.append(True, np.diff(tokens.numpy()) != 0) if len(tokens) else np.zeros(0, dtype=np.bool_)
    ends = np.append(np.flatnonzero(begins), len(tokens)).astype(np.int32)  # of the entries of each token
    number = np.arange(len(values), dtype=np.int32)
    shape = (len(ends) - 1, len(among))
    by_feature = csr_array((number, features.numpy() - among.start, ends), shape=shape).tocsc()
    order = torch.from_numpy(by_feature.data).long()
    starts = torch.from_numpy(by_feature.indptr).long()
    write_tensors(path, {"values": values[order], "tokens": tokens[order].int(), "starts": starts}, {}, ENTRIES)


def write_images(
    path: Path,
    images: Sequence[ImageRecord],
    layouts: Sequence[ImageLayout],
    places: Int[Tensor, "token column"],
    sums: Sums,
) -> None:
    """Write what a shard's images and tokens are, and what all shards up to this one add up to."""
    metadata = {
        "images": json.dumps([asdict(image) for image in images]),
        "layouts": json.dumps([layout.to_dict() for layout in layouts]),
    }
    totals = {"counts": sums.counts, "totals": sums.totals, "largest": sums.largest}
    write_tensors(path, {"places": places.int(), **totals}, metadata, IMAGES)


@dataclass(frozen=True)
class EntryFile:
    """One file of activations, opened when it is read.

    Attributes:
        path (Path): Where it is.
        among (range): The features whose activations it may hold.
    """

    path: Path
    among: range

    @cached_property
    def file(self) -> TensorFile:
        """The file, open."""
        return TensorFile(self.path, [ENTRIES], writer=WRITER)

    def of_features(self, start: int, stop: int) -> Entries:
        """The activations of features `start` to `stop`, by feature and token."""
        start, stop = max(start, self.among.start), min(stop, self.among.stop)
        if start >= stop:
            return Entries(np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int32))
        starts = self.file.part("starts", start - self.among.start, stop - self.among.start + 1).numpy()
        first, last = int(starts[0]), int(starts[-1])
        values, tokens = self.file.part("values", first, last).float(), self.file.part("tokens", first, last)
        return Entries(values.numpy(), np.repeat(np.arange(start, stop), np.diff(starts)), tokens.numpy())

    def of_tokens(self, start: int, stop: int) -> Entries:
        """The activations at tokens `start` to `stop`; reads the whole file."""
        tokens = self.file.part("tokens").numpy()
        index = np.flatnonzero((tokens >= start) & (tokens < stop))
        features = np.searchsorted(self.file.part("starts").numpy(), index, side="right") - 1 + self.among.start
        values = self.file.part("values")[torch.from_numpy(index)].float()
        return Entries(values.numpy(), features, tokens[index])


class Shard:
    """A shard that is read as far as it is asked.

    Args:
        folder: the store's folder.
        record: what the store's index says of it.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        self.folder, self.record = folder, record
        self.n_images, self.n_tokens = int(record["n_images"]), int(record["n_tokens"])

    @cached_property
    def table(self) -> TensorFile:
        """The file of images and tokens."""
        return TensorFile(self.folder / self.record["images"], [IMAGES], writer=WRITER)

    @cached_property
    def files(self) -> list[EntryFile]:
        """The files of activations."""
        return [EntryFile(self.folder / name, range(start, stop)) for name, start, stop in self.record["entries"]]

    @cached_property
    def images(self) -> list[ImageRecord]:
        """Its images."""
        return [ImageRecord(**fields) for fields in json.loads(self.table.metadata["images"])]

    @cached_property
    def layouts(self) -> list[ImageLayout]:
        """The different layouts of its images."""
        return [ImageLayout.from_dict(stored) for stored in json.loads(self.table.metadata["layouts"])]

    @property
    def sums(self) -> Sums:
        """What all shards up to this one add up to."""
        return Sums.read(self.table.path)

    def of_features(self, start: int, stop: int) -> Entries:
        """The activations of features `start` to `stop`, by file, then by feature and token."""
        return _joined([file.of_features(start, stop) for file in self.files])

    def of_tokens(self, start: int, stop: int) -> Entries:
        """The activations at tokens `start` to `stop`."""
        return _joined([file.of_tokens(start, stop) for file in self.files])

    def located(self, tokens: Int[np.ndarray, " entry"]) -> tuple[Int[np.ndarray, " entry"], Int[np.ndarray, " entry"]]:
        """For tokens the image, counted within the shard, and the feature position in it; -1 and -1 for text."""
        if not self.images:
            return np.full(len(tokens), -1), np.full(len(tokens), -1)
        first, n = self._column("first_token"), self._column("n_tokens")
        image = np.maximum(np.searchsorted(first, tokens, side="right") - 1, 0)
        position = tokens - first[image]
        inside = (position >= 0) & (position < n[image])
        if not self._whole:
            position = self._positions[tokens] - self._column("start")[image]
        return np.where(inside, image, -1), np.where(inside, position, -1)

    def cells(self, grid: str) -> Cells:
        """Which of the images' features are cells of a grid."""
        if grid not in self._cells:
            self._cells[grid] = Cells.of(self, grid)
        return self._cells[grid]

    def stored(self, image: int) -> Int[np.ndarray, " stored"]:
        """The feature positions of an image that are stored."""
        record = self.images[image]
        tokens = np.arange(record.first_token, record.first_token + record.n_tokens)
        return self.located(tokens)[1]

    @cached_property
    def _cells(self) -> dict[str, Cells]:
        return {}

    @cached_property
    def _whole(self) -> bool:
        """Whether all positions of all images are stored."""
        return all(image.n_tokens == self.layouts[image.layout].n_features for image in self.images)

    @cached_property
    def _positions(self) -> Int[np.ndarray, " token"]:
        return self.table.part("places").numpy()[:, _POSITION]

    @lru_cache(maxsize=8)  # noqa: B019 (a shard lives as long as its store)
    def _column(self, name: str) -> Int[np.ndarray, " image"]:
        return np.array([getattr(image, name) for image in self.images])


class Cells(NamedTuple):
    """Which features of a shard's images are cells of a grid.

    Attributes:
        number (Int[np.ndarray, " position"]): For every feature position of every layout, one after the other, which cell it
            is; -1 for none.
        offset (Int[np.ndarray, " image"]): Where each image's layout begins there.
        n (Int[np.ndarray, " image"]): How many stored cells each image has; 0 where it has no such grid.
    """

    number: Int[np.ndarray, " position"]
    offset: Int[np.ndarray, " image"]
    n: Int[np.ndarray, " image"]

    @classmethod
    def of(cls, shard: Shard, grid: str) -> Cells:
        """Of one grid, or of all."""
        numbers = [cell_numbers(layout, grid) for layout in shard.layouts]
        begins = np.cumsum([0, *map(len, numbers)])
        layout_of = [image.layout for image in shard.images]
        counts = [int((numbers[layout][shard.stored(image)] >= 0).sum()) for image, layout in enumerate(layout_of)]
        number = np.concatenate(numbers) if numbers else np.zeros(0, int)
        return cls(number, begins[layout_of] if layout_of else np.zeros(0, int), np.array(counts, dtype=np.int64))

    def at(self, image: Int[np.ndarray, " entry"], position: Int[np.ndarray, " entry"]) -> Int[np.ndarray, " entry"]:
        """Which cell feature positions of images, as `Shard.located` gives them, are; -1 for none, and for text."""
        if not len(self.offset):
            return np.full(len(image), -1)
        return np.where(image >= 0, self.number[self.offset[image] + np.maximum(position, 0)], -1)


@lru_cache(maxsize=256)
def cell_numbers(layout: ImageLayout, grid: str = ALL) -> Int[np.ndarray, " position"]:
    """For every feature of a layout which cell of a grid it is, or of all in order; -1 for none, or without such a grid.

    >>> from hooked_llava.architecture.layouts import llava_next_layout
    >>> layout = llava_next_layout((2, 4), tile_size=2, patch_size=1, pinpoints=[[2, 4]])
    >>> cell_numbers(layout, "fine")
    array([-1, -1, -1, -1,  0,  1,  2,  3, -1,  4,  5,  6,  7, -1])
    """
    numbers = np.full(layout.n_features, -1)
    if grid == ALL or grid in layout.names:
        cells = layout.object_features(grid)
        numbers[cells] = np.arange(len(cells))
    return numbers


def _joined(parts: Sequence[Entries]) -> Entries:
    return parts[0] if len(parts) == 1 else Entries(*(np.concatenate(column) for column in zip(*parts, strict=True)))
