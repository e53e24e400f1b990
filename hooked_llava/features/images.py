"""The images of a feature store, and what the store is of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.checks import as_index
from hooked_llava.errors import InputError
from hooked_llava.features.shards import ImageRecord, Shard
from hooked_llava.prompt.images import load_image
from hooked_llava.results.provenance import image_hash
from hooked_llava.sae.shards import ShardIndex


class StoredImages:
    """What a store is of, its images, and how each became positions.

    Args:
        folder: where it is.
        index: what the folder holds.
    """

    def __init__(self, folder: Path, index: ShardIndex) -> None:
        self.folder, self.about, self.complete = folder, index.about, index.complete
        self.shards = [Shard(folder, record) for record in index.shards]
        self.first_images = np.cumsum([0, *(shard.n_images for shard in self.shards)])

    @property
    def hook(self) -> str:
        """The hook whose activations the features are of."""
        return self.about["hook"]

    @property
    def tokens(self) -> str:
        """The span whose tokens are stored."""
        return self.about["tokens"]

    @property
    def n_features(self) -> int:
        """Features of the autoencoder, those that are never active included."""
        return self.about["n_features"]

    @property
    def n_images(self) -> int:
        """Images in the store; one that occurs several times in the data is counted as often."""
        return int(self.first_images[-1])

    @property
    def n_tokens(self) -> int:
        """Tokens in the store."""
        return sum(shard.n_tokens for shard in self.shards)

    @property
    def n_entries(self) -> int:
        """Activations in the store, zeros left out."""
        return sum(int(shard.record["n_entries"]) for shard in self.shards)

    def image(self, i: int) -> Image.Image:
        """An image as the model got it; raises `InputError` where it is not known, or its file is not what it was."""
        record = self.record(i)
        if record.file is None:
            raise InputError(
                f"Image {i} of the store is known by its pixel values alone; give build() the image to see it."
            )
        found = load_image(self.folder / record.file, f"Image {i} of the store")
        if image_hash(found) != record.hash:
            raise InputError(f"Image {i} of the store, {record.file}, is another than when the store was built.")
        return found

    def layout(self, i: int) -> ImageLayout:
        """How an image became positions."""
        shard, local = self._find(i)
        return shard.layouts[shard.images[local].layout]

    def prompt(self, i: int) -> str:
        """What was asked about an image."""
        return self.record(i).prompt

    def record(self, i: int) -> ImageRecord:
        """What is known of an image: its row in the data, its file, its hash."""
        shard, local = self._find(i)
        return shard.images[local]

    def _find(self, image: int) -> tuple[Shard, int]:
        """The shard of an image, and its number there."""
        number = as_index(image, self.n_images, "image")
        shard = int(np.searchsorted(self.first_images, number, side="right")) - 1
        return self.shards[shard], number - int(self.first_images[shard])
