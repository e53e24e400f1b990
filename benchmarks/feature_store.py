"""What a store of features costs to build, and to ask as it grows: `python -m benchmarks.feature_store`.

Building is compared with the same prompts through the model up to the same layer and through the autoencoder, nothing kept; the
weights are hashed once in each build, and that is shown by itself. Peak memory is that of two builds, one of four times as many
prompts. Questions are asked of stores of random activations: the first of a freshly opened store, and another feature after it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._measure import Summary, alternate, arguments, markdown, peak_bytes, reset_peak, start, summarise, write
from benchmarks._models import POSITIONS, hf_config, random_hf_model, random_prompt, sizes
from hooked_llava.architecture.image_axis import ImageAxis
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.layouts import llava_layout
from hooked_llava.features.build import FORMAT
from hooked_llava.features.shards import ImageRecord, Sums, write_entries, write_images
from hooked_llava.features.store import FeatureStore
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import weights_hash
from hooked_llava.sae.autoencoder import SAEConfig, SparseAutoencoder
from hooked_llava.sae.shards import ShardIndex

PLAIN, BUILD, HASH = "forwards, encoded", "build", "hash of the weights"
QUESTIONS = ("top images", "top images, again", "mask", "of an image", "histogram")
_EXPANSION, _K = 8, 32
_PROMPTS, _QUICK_PROMPTS = 8, 2
_SHARD = 2**20  # activations in a shard of the stores that are asked
_SIDE, _WIDTH = 8, 4096  # of the layouts and the autoencoder of those stores
_IMAGES, _QUICK_IMAGES = (200, 2_000, 20_000), (10, 20)
_MB = 2**20

Measured = dict[str, Any]


def autoencoder(model: HookedLLaVA) -> SparseAutoencoder:
    """A random one, after half of the blocks."""
    hook = f"blocks.{model.cfg.n_layers // 2 - 1}.hook_resid_post"
    cfg = SAEConfig(
        d_in=model.cfg.d_model, d_sae=_EXPANSION * model.cfg.d_model, k=min(_K, model.cfg.d_model), hook=hook
    )
    return SparseAutoencoder(cfg).reset(0).requires_grad_(False)


def building(geometry: str, n: int, repetitions: int) -> dict[str, Summary]:
    """Seconds for n prompts, and ratios to the forward passes and encoding alone."""
    model = HookedLLaVA.from_hf(random_hf_model(hf_config(geometry)))
    sae, given = autoencoder(model), random_prompt(hf_config(geometry), POSITIONS[geometry])
    hook = sae.cfg.hook
    assert hook is not None

    def plain() -> None:
        for _ in range(n):
            inputs = model.as_inputs(given)
            stop = model.hooks_table.stop_after([hook])
            _, cache = model.run_with_cache(inputs, names_filter=hook, stop_at_layer=stop, return_type=None)
            sae.encode(cache[hook][0, list(inputs.token_map["image"])])

    def build() -> None:
        with tempfile.TemporaryDirectory() as folder:
            FeatureStore.build(model, sae, [given] * n, folder, progress=False)

    works = {PLAIN: plain, BUILD: build, HASH: lambda: (weights_hash(model), weights_hash(dict(sae.state_dict())))}
    return summarise(alternate(works, repetitions), PLAIN)


def memory(geometry: str, n: int) -> Measured:
    """Peak bytes that building adds, in shards of a few prompts."""
    model = HookedLLaVA.from_hf(random_hf_model(hf_config(geometry)))
    sae, given = autoencoder(model), random_prompt(hf_config(geometry), POSITIONS[geometry])
    shard, added = 2 * POSITIONS[geometry] * (sae.cfg.k or 1), {}
    for n_prompts in (n, n, 4 * n):  # the first makes what is made once
        reset_peak()
        before = peak_bytes()
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore.build(model, sae, [given] * n_prompts, folder, shard_size=shard, progress=False)
            added[n_prompts] = {
                "peak_bytes": peak_bytes() - before,
                "entries": store.n_entries,
                "shards": len(store.shards),
            }
    return {str(n_prompts): found for n_prompts, found in added.items()}


def square() -> ImageLayout:
    """The layout of an image of 64 x 64 pixels."""
    length = _SIDE * 8
    axis = ImageAxis(
        original=length, padded=length, before=0, resized=length, offset=0, crop=length, canvas=length, patch_size=8
    )
    return llava_layout(axis, axis)


def random_store(folder: Path, n_images: int) -> FeatureStore:
    """A store of random activations, k at each token."""
    rng, layout, n_tokens = np.random.default_rng(0), square(), _SIDE**2
    each = _SHARD // (n_tokens * _K)
    index = ShardIndex(folder, FORMAT, {"hook": "random", "n_features": _WIDTH, "tokens": "image"}, complete=True)
    sums = Sums.empty(_WIDTH)
    for first in range(0, n_images, each):
        n = min(each, n_images - first)
        tokens = torch.arange(n * n_tokens, dtype=torch.int32).repeat_interleave(_K)
        features = torch.from_numpy(rng.integers(0, _WIDTH, len(tokens)).astype(np.int32))
        values = torch.from_numpy(rng.random(len(tokens), dtype=np.float32))
        places = torch.zeros(n * n_tokens, 6, dtype=torch.int32)
        records = [ImageRecord(first + i, "", 0, 0, i * n_tokens, n_tokens, f"{first + i}", None) for i in range(n)]
        names = [f"{kind}-{first:05d}.safetensors" for kind in ("entries", "images")]
        sums = sums.plus(values, features)
        write_entries(folder / names[0], values, features, tokens, range(_WIDTH))
        write_images(folder / names[1], records, [layout], places, sums)
        counts = {"n_images": n, "n_tokens": n * n_tokens, "n_entries": len(values)}
        index.shards.append(
            {"images": names[1], "entries": [(names[0], 0, _WIDTH)], "index_after": first + n, **counts}
        )
    index.write()
    return FeatureStore.open(folder)


def asking(n_images: int, repetitions: int) -> Measured:
    """Median seconds of every question."""
    seconds: dict[str, list[float]] = {name: [] for name in QUESTIONS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = random_store(folder, n_images)
        for repetition in range(repetitions):
            store = FeatureStore.open(folder)
            asked = {
                "top images": lambda s=store, f=repetition: s.top_images(f),
                "top images, again": lambda s=store, f=repetition: s.top_images(_WIDTH - 1 - f),
                "mask": lambda s=store, f=repetition: s.mask(f, n_images // 2),
                "of an image": lambda s=store: s.of_image(n_images // 2),
                "histogram": lambda s=store, f=repetition: s.histogram(f),
            }
            for question, ask in asked.items():
                began = time.perf_counter()
                ask()
                seconds[question].append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in folder.iterdir())
        about = {"entries": store.n_entries, "shards": len(store.shards), "bytes": size}
    return {**about, **{question: float(np.median(found)) for question, found in seconds.items()}}


def table(report: Measured) -> str:
    """Ratios of building, peak memory, and milliseconds of questions."""
    rows = {}
    for geometry, found in report["geometries"].items():
        costs = found["rows"]
        rows[geometry] = [
            f"1.00 ({costs[PLAIN]['median_s']:.3g} s)",
            *(f"{costs[n]['ratio']:.2f}" for n in (BUILD, HASH)),
        ]
    built = markdown([PLAIN, BUILD, HASH], rows, f"{report['prompts']} prompts")
    kept = {
        f"{n} prompts": [str(found["entries"]), str(found["shards"]), f"{found['peak_bytes'] / _MB:.1f}"]
        for n, found in report["memory"].items()
    }
    peaks = markdown(["activations", "shards", "peak, MiB"], kept, "memory of a build")
    asked = {
        f"{n} images": [
            f"{found['entries']:,}",
            f"{found['bytes'] / _MB:.0f}",
            *(f"{1e3 * found[q]:.1f}" for q in QUESTIONS),
        ]
        for n, found in report["questions"].items()
    }
    return "\n\n".join([built, peaks, markdown(["activations", "MiB", *QUESTIONS], asked, "milliseconds of")])


def main(argv: list[str] | None = None) -> None:
    options = start(arguments(__doc__), argv)
    n = _QUICK_PROMPTS if options.quick else _PROMPTS
    geometries = {
        geometry: {
            "sizes": sizes(hf_config(geometry), POSITIONS[geometry]),
            "rows": building(geometry, n, options.repetitions),
        }
        for geometry in options.geometry
    }
    images = _QUICK_IMAGES if options.quick else _IMAGES
    report = {
        "prompts": n,
        "geometries": geometries,
        "memory": memory(options.geometry[0], n),
        "questions": {str(n_images): asking(n_images, options.repetitions) for n_images in images},
    }
    print(table(report))
    write("feature_store", options, k=_K, width=_WIDTH, **report)


if __name__ == "__main__":
    main()
