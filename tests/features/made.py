"""Feature stores of activations that a test gives, through the same writer that a model fills."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.datasets.forwards import PLACES, Chunk
from hooked_llava.datasets.places import places_of
from hooked_llava.datasets.prompts import Progress, PromptRow
from hooked_llava.features.build import StoreWriter
from hooked_llava.features.store import FeatureStore
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.sae.autoencoder import SAEConfig, SparseAutoencoder
from tests.layouts import map_of
from tests.oracles.plain_features import PlainImage

HOOK = "hook"


@dataclass
class Given:
    """Prompts of images with activations drawn at random; each prompt is a forward pass of its own.

    Attributes:
        layouts: of the images of each prompt.
        contents: one number for each image; the same number is the same image.
        n_features: of the autoencoder.
        tokens: the span that is stored.
        seed: of the activations.
        stop_before: the prompt at which the source fails, once.
    """

    layouts: list[list[ImageLayout]]
    contents: list[int]
    n_features: int
    tokens: str = "image"
    seed: int = 0
    stop_before: int | None = None

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.maps = [map_of(layouts, before=i % 3, after=i % 2) for i, layouts in enumerate(self.layouts)]
        shapes = [(len(token_map), self.n_features) for token_map in self.maps]
        # Whole numbers, so that equal scores are equal in any order of adding; most are zero or below.
        self.acts = [rng.integers(-9, 4, shape).astype(np.float32) for shape in shapes]

    def chunks(self, start: Progress) -> Generator[Chunk]:
        for row in range(start.index, len(self.layouts)):
            if row == self.stop_before:
                raise KeyboardInterrupt
            yield self._chunk(row)

    def _chunk(self, row: int) -> Chunk:
        token_map = self.maps[row]
        first = sum(map(len, self.layouts[:row]))
        images = tuple(picture(content) for content in self.contents[first : first + len(self.layouts[row])])
        inputs = Inputs(
            input_ids=torch.tensor([token_map.token_ids]),
            attention_mask=torch.ones(1, len(token_map), dtype=torch.bool),
            pixel_values=None,
            images_per_prompt=(len(images),),
            token_maps=(token_map,),
            prompts=("",),
            images=images,
        )
        at = self.kept(row)
        rows = {HOOK: torch.from_numpy(self.acts[row])[at], PLACES: places_of(token_map, row, at)}
        prompt = PromptRow(row, f"question {row}", [*images], files=[None] * len(images))
        return Chunk(rows, Progress(0, row + 1), inputs, (prompt,))

    def kept(self, row: int) -> list[int]:
        token_map = self.maps[row]
        return list(token_map.real) if self.tokens == "all" else token_map.span(self.tokens).tolist()

    def plain(self) -> list[PlainImage]:
        """The images for the oracle."""
        found = []
        for row, (token_map, layouts) in enumerate(zip(self.maps, self.layouts, strict=True)):
            dense = np.full(self.acts[row].shape, np.nan)
            dense[self.kept(row)] = np.maximum(self.acts[row][self.kept(row)], 0)
            for here, layout in zip(token_map.image_ranges, layouts, strict=True):
                cells = {name: layout.cell_features(name).ravel().tolist() for name in layout.names}
                found.append(PlainImage(dense[here.start : here.stop], cells, str(self.contents[len(found)])))
        return found

    def dense(self) -> np.ndarray:
        """All stored activations, [token, feature]."""
        return np.concatenate([np.maximum(acts[self.kept(row)], 0) for row, acts in enumerate(self.acts)])


def picture(content: int) -> Image.Image:
    return Image.new("RGB", (5, 4), (content, 10, 20))


def reader(n_features: int) -> SparseAutoencoder:
    """An autoencoder whose features are the activations themselves, where they are above zero."""
    sae = SparseAutoencoder(SAEConfig(d_in=n_features, d_sae=n_features, kind="relu")).reset(0)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(n_features))
        sae.W_dec.copy_(torch.eye(n_features))
    return sae.requires_grad_(False)


def write(given: Given, folder: Path, shard_size: int = 40) -> None:
    about = {"hook": HOOK, "n_features": given.n_features, "tokens": given.tokens, "seed": given.seed}
    writer = StoreWriter(folder, about, {}, shard_size=shard_size)
    writer.fill(given.chunks, reader(given.n_features), progress=False)


def filled(given: Given, folder: Path, shard_size: int = 40) -> FeatureStore:
    write(given, folder, shard_size)
    return FeatureStore.open(folder)


def same_ranking(found: Sequence[tuple[int, float]], expected: Sequence[tuple[int, float]]) -> None:
    assert [number for number, _ in found] == [number for number, _ in expected]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], rtol=1e-9)
