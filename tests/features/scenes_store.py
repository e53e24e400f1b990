"""A feature store of the embedded model and its autoencoder over images whose scenes are known."""

from __future__ import annotations

import functools
import tempfile

import numpy as np

from hooked_llava.features.store import FeatureStore
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.sae.files import load_sae
from hooked_llava.toy.scenes import Scene, sample_scene

_RNG = np.random.default_rng(5)
SCENES = [sample_scene(_RNG) for _ in range(24)]


@functools.cache
def scenes_store() -> FeatureStore:
    """24 images, and the first of them once more: read it, do not change it."""
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    data = [(scene.render(), "What is there?") for scene in [*SCENES, SCENES[0]]]
    folder = tempfile.mkdtemp(prefix="scenes-store-")
    return FeatureStore.build(model, load_sae("tiny-shapes"), data, folder, progress=False)


def scene_of(image: int) -> Scene:
    """What an image of the store shows."""
    return SCENES[image % len(SCENES)]


def active_features(n: int) -> list[int]:
    """Features that are active somewhere, some of them often and some not."""
    active = np.flatnonzero(scenes_store().frequency)
    return active[np.linspace(0, len(active) - 1, n).astype(int)].tolist()
