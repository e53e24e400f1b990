"""The cache of activations that the pipeline of Zhang et al. (2411.14982) released: read into a feature store, and written.

`{module}/{start}_{stop - 1}.safetensors` holds `locations` [entry, 3] (the image's number, the token, the feature) and
`activations` [entry] of features start to stop - 1. The prompt is the image alone and its first token is left out, so that
token t is the image's feature t. The released writer leaves out the last feature of every file; this one does not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

import hooked_llava
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.checks import whole_number
from hooked_llava.datasets.places import places_of
from hooked_llava.errors import CheckpointError, InputError
from hooked_llava.features.build import FORMAT, stored_file
from hooked_llava.features.shards import ImageRecord, Sums, write_entries, write_images
from hooked_llava.features.store import FeatureStore
from hooked_llava.prompt.images import ImageLike, load_image
from hooked_llava.prompt.token_map import TokenMap
from hooked_llava.results.provenance import image_hash
from hooked_llava.sae.shards import ShardIndex
from hooked_llava.storage import TensorFile, write_safetensors

PROMPT = "<image>"
"""What the released pipeline asks: nothing."""
_NAME = re.compile(r"(\d+)_(\d+)\.safetensors")
_MODULE = re.compile(r"(?:.*\.)?layers\.(\d+)")
_BLOCK = 2**22  # activations read at once
_UNKNOWN = -1


class ReleasedPart(NamedTuple):
    """Some activations of one released file.

    Attributes:
        features (range): The features that the file's name says.
        locations (Int[Tensor, "entry 3"]): Image, token, feature.
        activations (Float[Tensor, " entry"]): How strongly.
    """

    features: range
    locations: Int[Tensor, "entry 3"]
    activations: Float[Tensor, " entry"]


def read_released(
    cache: str | os.PathLike[str],
    module: str,
    images: Sequence[ImageLike],
    layouts: Sequence[ImageLayout],
    folder: str | os.PathLike[str],
    *,
    hook: str | None = None,
) -> FeatureStore:
    """A feature store in `folder` with what a released cache holds, read some activations at a time.

    Args:
        cache: the folder in which the modules' folders are.
        module: which, such as "model.layers.24".
        images: the images that were run, in order; an image that has no file is stored as PNG.
        layouts: how each became positions, as `layout_of(model.config, model.processor.image_processor, height=, width=)` says.
        folder: where the store goes.
        hook: the hook; by default that of the module, "blocks.24.hook_resid_post".

    Features that the released writer left out are never active here. A query by image reads all of such a store. Raises
    `CheckpointError` for a folder without such files, and for activations at images or tokens that are not there.
    """
    source, place = Path(cache).expanduser() / module, Path(folder).expanduser()
    files = _files(source)
    if len(images) != len(layouts):
        raise InputError(f"There are {len(images)} images and {len(layouts)} layouts; expected one for each.")
    n_features = max(features.stop for features in files.values())
    about = {
        "model": None,
        "hook": _hook_of(module) if hook is None else hook,
        "n_features": n_features,
        "tokens": "image",
        "prompt": PROMPT,
        "n_rows": len(images),
        "released": module,
    }
    held = ShardIndex.read(place, FORMAT)
    if held is not None:
        held.check_about(about, "folder", "other features")
        return FeatureStore.open(place)
    place.mkdir(parents=True, exist_ok=True)
    records, places = _images(images, layouts, place)
    first = torch.tensor([record.first_token for record in records])
    n = torch.tensor([record.n_tokens for record in records])
    sums, names, n_entries = Sums.empty(n_features), [], 0
    for number, part in enumerate(parts_of(source)):
        tokens = _tokens(part, first, n, source)
        order = tokens.argsort(stable=True)
        values, features = part.activations[order], part.locations[order, 2]
        names.append((f"entries-{number:05d}.safetensors", part.features.start, part.features.stop))
        write_entries(place / names[-1][0], values, features, tokens[order].int(), part.features)
        sums, n_entries = sums.plus(values, features), n_entries + len(values)
    write_images(place / "images-00000.safetensors", records, [*dict.fromkeys(layouts)], places, sums)
    record = {"images": "images-00000.safetensors", "entries": names, "index_after": len(images)}
    counts = {"n_images": len(images), "n_tokens": len(places), "n_entries": n_entries}
    more = {"version": hooked_llava.__version__}
    ShardIndex(place, FORMAT, about | more, [record | counts], complete=True).write()
    return FeatureStore.open(place)


def parts_of(source: str | os.PathLike[str]) -> Iterator[ReleasedPart]:
    """What a module's released files hold, some activations at a time, from the first feature on.

    Raises `CheckpointError` for a folder without such files, and for activations that the file's name does not cover.
    """
    for path, features in _files(Path(source)).items():
        file = TensorFile(path, [None], writer="the released cache")
        for start in range(0, max(file.length("activations"), 1), _BLOCK):
            locations = file.part("locations", start, start + _BLOCK).long().reshape(-1, 3)
            found = locations[:, 2]
            if len(found) and not (int(found.min()) in features and int(found.max()) in features):
                raise CheckpointError(
                    f"{path} has activations of features {int(found.min())} to {int(found.max())}; expected {features.start} to "
                    f"{features.stop - 1}, as its name says."
                )
            yield ReleasedPart(features, locations, file.part("activations", start, start + _BLOCK))


def write_released(
    store: FeatureStore, cache: str | os.PathLike[str], module: str, *, n_splits: int = 128
) -> list[Path]:
    """Write a store's activations at images as the released pipeline reads them, every feature in its file.

    Args:
        store: what is written; of prompts with several images each image counts by itself.
        cache: the folder in which the module's folder is made.
        module: what the folder is called, such as "model.layers.24".
        n_splits: into how many files the features are divided, as the pipeline is told; one file is held at a time.

    Returns the files. Raises `InputError` for more files than features.
    """
    whole_number(n_splits, "n_splits", least=1, most=store.n_features)
    place = Path(cache).expanduser() / module
    place.mkdir(parents=True, exist_ok=True)
    edges = torch.linspace(0, store.n_features, steps=n_splits + 1).long().tolist()  # as the pipeline divides them
    written = []
    for start, stop in pairwise(edges):
        locations, activations = [np.zeros((0, 3), dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
        for first, shard in zip(store.first_images.tolist(), store.shards, strict=False):
            entries = shard.of_features(start, stop)
            image, position = shard.located(entries.tokens)
            columns = np.stack([image + first, position, entries.features], axis=1)[image >= 0]
            order = np.lexsort(columns.T[::-1])
            locations.append(columns[order])
            activations.append(entries.values[image >= 0][order])
        tensors = {"locations": np.concatenate(locations), "activations": np.concatenate(activations)}
        written.append(place / f"{start}_{stop - 1}.safetensors")
        write_safetensors(written[-1], {name: torch.from_numpy(array) for name, array in tensors.items()})
    return written


def _files(source: Path) -> dict[Path, range]:
    """A module's files and their features, from the first on."""
    named = {path: _NAME.fullmatch(path.name) for path in source.glob("*.safetensors")}
    files = {path: range(int(found[1]), int(found[2]) + 1) for path, found in named.items() if found is not None}
    if not files:
        raise CheckpointError(
            f"{source} holds no released cache, whose files are called START_END.safetensors; check folder and module."
        )
    return dict(sorted(files.items(), key=lambda item: item[1].start))


def _hook_of(module: str) -> str:
    found = _MODULE.fullmatch(module)
    if found is None:
        raise InputError(
            f"module={module!r} is no layer's output, such as 'model.layers.24'; name the hook with hook=."
        )
    return f"blocks.{found[1]}.hook_resid_post"


def _images(
    images: Sequence[ImageLike], layouts: Sequence[ImageLayout], folder: Path
) -> tuple[list[ImageRecord], Int[Tensor, "token column"]]:
    """The images' records, and the places of all their tokens: after one token that is not stored."""
    numbers = {layout: number for number, layout in enumerate(dict.fromkeys(layouts))}
    records, places, first = [], [torch.zeros(0, 6, dtype=torch.int32)], 0
    for row, (image, layout) in enumerate(zip(images, layouts, strict=True)):
        opened, n = load_image(image, f"images[{row}]"), layout.n_features
        if layout.original_size not in (None, (opened.height, opened.width)):
            raise InputError(
                f"images[{row}] is {opened.height} x {opened.width} (height x width), and its layout is of an image of "
                f"{layout.original_size}; give them in the same order."
            )
        token_map = TokenMap(token_ids=(_UNKNOWN,) * (n + 1), real=range(n + 1), image_starts=(1,), layouts=(layout,))
        places.append(places_of(token_map, row, range(1, n + 1)))
        records.append(
            ImageRecord(
                row=row,
                prompt=PROMPT,
                layout=numbers[layout],
                start=1,
                first_token=first,
                n_tokens=n,
                hash=image_hash(opened),
                file=_file(image, opened, folder),
            )
        )
        first += n
    return records, torch.cat(places)


def _file(image: ImageLike, opened: Image.Image, folder: Path) -> str | None:
    return stored_file(Path(image) if isinstance(image, (str, Path)) else None, opened, image_hash(opened), folder)


def _tokens(
    part: ReleasedPart, first: Int[Tensor, " image"], n: Int[Tensor, " image"], source: Path
) -> Int[Tensor, " entry"]:
    """The tokens of a part, counted over all images; raises `CheckpointError` for one that no image has."""
    image, token = part.locations[:, 0], part.locations[:, 1]
    if len(image) and not 0 <= int(image.max()) < len(first):
        raise CheckpointError(
            f"{source} has activations of image {int(image.max())}; {len(first)} images were given. Give all that were run."
        )
    if len(image) and bool((token >= n[image]).any()):
        wrong = int((token >= n[image]).nonzero()[0, 0])
        raise CheckpointError(
            f"{source} has an activation at token {int(token[wrong])} of image {int(image[wrong])}, whose layout has "
            f"{int(n[image[wrong]])} positions; give the layouts of the model that was run, without padding."
        )
    return first[image] + token
