"""Filling a feature store: prompts through the model, activations through the autoencoder, shard after shard to disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import hooked_llava
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.checks import whole_number
from hooked_llava.datasets.forwards import PLACES, Chunk, ModelSource, checked_hooks
from hooked_llava.datasets.prompts import DataOptions, Progress, PromptSource
from hooked_llava.errors import InputError
from hooked_llava.features.shards import ImageRecord, Sums, write_entries, write_images
from hooked_llava.model.attached_sae import encoded_in_parts, place_of_sae
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import weights_hash
from hooked_llava.replay.progress import progress_bar
from hooked_llava.results.provenance import image_hashes
from hooked_llava.sae.autoencoder import Features, SparseAutoencoder
from hooked_llava.sae.shards import ShardIndex
from hooked_llava.storage import written_whole

FORMAT = "hooked_llava.features.v1"
SHARD_SIZE = 2**22
"""Activations of one shard, about: it ends with a forward pass."""
STORED_IMAGES = "images"
"""The folder of the images that the data held themselves."""


@dataclass(frozen=True)
class BuildSettings:
    """How a store is filled, as `FeatureStore.build` says.

    Attributes:
        tokens (str): Whose features.
        batch_size (int): Prompts in one forward pass.
        prefetch (int): Batches of prompts prepared ahead.
        any_model (bool): Whether the model's name may be another than the autoencoder's.
        shard_size (int): Activations in one shard, about.
        progress (bool): Whether a progress bar is shown.
    """

    tokens: str
    batch_size: int
    prefetch: int
    any_model: bool
    shard_size: int
    progress: bool

    def __post_init__(self) -> None:
        whole_number(self.batch_size, "batch_size", least=1)
        whole_number(self.shard_size, "shard_size", least=1)


def build(
    model: HookedLLaVA,
    sae: SparseAutoencoder,
    data: Any,
    folder: str | os.PathLike[str],
    hook: Any,
    of_data: DataOptions,
    settings: BuildSettings,
    options: Mapping[str, Any],
) -> None:
    """Run what the folder does not hold yet; see `FeatureStore.build`."""
    name = place_of_sae(sae, hook, model.hooks_table, None if settings.any_model else model.config.model_name)
    (name,) = checked_hooks(model, [name], settings.tokens)
    if model.hooks_table[name].by_tile:
        raise InputError(
            f"hook={name!r} has the positions of vision tiles; expected a hook with those of the prompt, such as "
            "'blocks.3.hook_resid_post', or 'hook_image_embed'."
        )
    prompts = PromptSource(data, of_data, seed=0, epochs=1)
    source = ModelSource(model, [name], prompts, settings.tokens, settings.batch_size, settings.prefetch, options)
    about = {
        "model": model.config.model_name,
        "weights": weights_hash(model),
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "hook": name,
        "sae": weights_hash(dict(sae.state_dict())),
        "n_features": sae.cfg.d_sae,
        "tokens": settings.tokens,
        "prompt": of_data.prompt,
        "options": {key: str(value) for key, value in sorted(options.items())},
        "n_rows": prompts.n_rows,
        "first_prompt": prompts.first_digest(),
    }
    writer = StoreWriter(folder, about, {"sae_config": asdict(sae.cfg)}, shard_size=settings.shard_size)
    if not writer.index.complete:
        writer.fill(lambda after: source.chunks(after, shuffled=False), sae, progress=settings.progress)


class StoreWriter:
    """Writes a store shard by shard.

    Args:
        folder: where it is, or will be; made if it is not there.
        about: what decides the activations, in plain values; a folder of others is refused.
        more: what is to be known besides.
        shard_size: how many activations a shard holds, at least.

    Raises `InputError` for a folder that holds other activations.
    """

    def __init__(
        self, folder: str | os.PathLike[str], about: dict[str, Any], more: dict[str, Any], *, shard_size: int
    ) -> None:
        self.folder, self.shard_size = Path(folder).expanduser(), shard_size
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"folder={str(self.folder)!r} is a file; give a folder, or a name that is not taken.")
        held = ShardIndex.read(self.folder, FORMAT)
        if held is None:
            held = ShardIndex(self.folder, FORMAT, {**about, **more, "version": hooked_llava.__version__})
        held.check_about(about, "folder", "other features")
        self.index, self._shard = held, _Waiting()

    def fill(
        self, chunks_after: Callable[[Progress], Generator[Chunk]], sae: SparseAutoencoder, *, progress: bool
    ) -> None:
        """Run the prompts that follow the last shard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self.index.shards[-1]["index_after"] if self.index.shards else 0
        after = Progress(0, done)
        with (
            closing(chunks_after(after)) as chunks,
            progress_bar(None, "prompt", shown=progress, done=done, desc="features") as bar,
        ):
            for chunk in chunks:
                after = chunk.after
                self._shard.add(chunk, encoded(sae, chunk.rows[self.index.about["hook"]], chunk), self.folder)
                bar.update(len(chunk.prompts))
                if self._shard.n_entries >= self.shard_size:
                    self.write(after)
        self.write(after)
        if not self.index.shards:
            raise InputError("tokens= names no position in any prompt of the data, so there are no features to store.")
        self.index.complete = True
        self.index.write()

    def write(self, after: Progress) -> None:
        """The shard that is waiting as files, and only then in the index."""
        shard, number = self._shard, len(self.index.shards)
        self._shard = _Waiting()
        if not shard.places:
            return
        values, features, tokens = (torch.cat(parts) for parts in zip(*shard.entries, strict=True))
        places, n = torch.cat(shard.places), self.index.about["n_features"]
        names = {kind: f"{kind}-{number:05d}.safetensors" for kind in ("entries", "images")}
        write_entries(self.folder / names["entries"], values, features, tokens, range(n))
        before = self.index.shards[-1]["images"] if number else None
        sums = Sums.empty(n) if before is None else Sums.read(self.folder / before)
        write_images(self.folder / names["images"], shard.images, [*shard.layouts], places, sums.plus(values, features))
        record = {"images": names["images"], "entries": [(names["entries"], 0, n)], "index_after": after.index}
        counts = {"n_images": len(shard.images), "n_tokens": len(places), "n_entries": len(values)}
        self.index.shards.append(record | counts)
        self.index.write()


class _Waiting:
    """What the next shard will hold."""

    def __init__(self) -> None:
        self.entries: list[tuple[Tensor, Tensor, Tensor]] = []
        self.places: list[Tensor] = []
        self.images: list[ImageRecord] = []
        self.layouts: dict[ImageLayout, int] = {}
        self.n_entries = self.n_tokens = 0

    def add(self, chunk: Chunk, entries: Iterator[tuple[Tensor, Tensor, Tensor]], folder: Path) -> None:
        """The activations of one forward pass, and its images."""
        first = self.n_tokens
        for values, features, tokens in entries:
            self.entries.append((values, features, tokens + first))
            self.n_entries += len(values)
        places = chunk.rows[PLACES]
        self.places.append(places)
        self.n_tokens += len(places)
        self.images += self._records(chunk, places, first, folder)

    def _records(self, chunk: Chunk, places: Tensor, first: int, folder: Path) -> Iterator[ImageRecord]:
        """The images of which some position is stored, in order."""
        assert chunk.inputs is not None
        hashes, number = image_hashes(chunk.inputs), 0
        words = chunk.inputs.prompts or [""] * len(chunk.prompts)
        for prompt, text, token_map in zip(chunk.prompts, words, chunk.inputs.token_maps, strict=True):
            for image, (here, layout) in enumerate(zip(token_map.image_ranges, token_map.layouts, strict=True)):
                stored = ((places[:, 0] == prompt.row) & (places[:, 1] == image)).nonzero()[:, 0]
                if len(stored):
                    pixels = None if chunk.inputs.images is None else chunk.inputs.images[number]
                    yield ImageRecord(
                        row=prompt.row,
                        prompt=prompt.question or text,
                        layout=self.layouts.setdefault(layout, len(self.layouts)),
                        start=here.start - token_map.real.start,
                        first_token=first + int(stored[0]),
                        n_tokens=len(stored),
                        hash=hashes[number],
                        file=stored_file(prompt.files[image] if prompt.files else None, pixels, hashes[number], folder),
                    )
                number += 1


def encoded(sae: SparseAutoencoder, acts: Tensor, chunk: Chunk) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Values, features and tokens of all that is active, some vectors at a time, on the CPU.

    Raises `InputError` for activations that are not finite, naming the rows of the data.
    """
    if not bool(acts.isfinite().all()):
        rows = [prompt.row for prompt in chunk.prompts]
        raise InputError(f"Rows {rows} of data: activations are not finite; run the model in float32 or bfloat16.")
    first = 0
    for values, indices in map(Features._make, encoded_in_parts(sae, acts.to(sae.b_dec.device))):
        active = values > 0
        tokens = active.nonzero()[:, 0] + first
        yield values[active].cpu(), indices[active].int().cpu(), tokens.int().cpu()
        first += len(values)


def stored_file(file: Path | None, pixels: Image.Image | None, image_hash: str, folder: Path) -> str | None:
    """Where an image is to be found; one that has no file is written into the store, once."""
    if file is not None:
        return str(file.expanduser().resolve())
    if pixels is None:
        return None
    stored = folder / STORED_IMAGES / f"{image_hash}.png"
    if not stored.exists():
        stored.parent.mkdir(exist_ok=True)
        with written_whole(stored) as partial:
            pixels.save(partial, format="PNG")
    return str(stored.relative_to(folder))
