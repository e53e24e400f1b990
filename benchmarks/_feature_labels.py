"""How well one unit tells what a patch shows, and which unit that is: chosen on some images, measured on others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.features.labels import label_scores
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.sae.autoencoder import SAEConfig, SparseAutoencoder
from hooked_llava.toy import feature_tables
from hooked_llava.toy.evaluate import Example, prepare_examples
from hooked_llava.toy.scenes import COLOR_NAMES, SHAPES, Scene

HOOK = "blocks.0.hook_resid_pre"
NEURONS = "blocks.0.mlp.hook_post"
LABELS = (*COLOR_NAMES, *SHAPES)
COVERAGE = 0.2  # share of a patch that an object covers where the patch has the object's labels
_BATCH = 50


@dataclass(frozen=True)
class Patches:
    """Activations at every patch of some images, and what each patch shows.

    Attributes:
        resid (Tensor): At the autoencoder's hook, [patch, d_model].
        neurons (Tensor): The first MLP's neurons, [patch, d_mlp].
        labels (np.ndarray): Whether the patch shows that color or shape, bool [patch, label].
    """

    resid: Tensor
    neurons: Tensor
    labels: np.ndarray


def patches(model: HookedLLaVA, examples: list[Example]) -> Patches:
    """The activations at all patches of the examples' images."""
    found: dict[str, list[Tensor]] = {HOOK: [], NEURONS: []}
    labels: list[np.ndarray] = []
    for first in range(0, len(examples), _BATCH):
        inputs = prepare_examples(model, examples[first : first + _BATCH])
        _, cache = model.run_with_cache(inputs, names_filter=[HOOK, NEURONS])
        for row, token_map in enumerate(inputs.token_maps):
            at = list(token_map.patches())
            for name, rows in found.items():
                rows.append(cache[name][row, at])
            scene = examples[first + row].scene
            assert scene is not None
            labels.append(patch_labels(scene, token_map.layout()))
    return Patches(torch.cat(found[HOOK]), torch.cat(found[NEURONS]), np.concatenate(labels))


def patch_labels(scene: Scene, layout: ImageLayout) -> np.ndarray:
    """Which colors and shapes each patch shows, of all grids, [patch, label]."""
    return feature_tables.patch_labels(scene, layout, coverage=COVERAGE)[:, : len(LABELS)]


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average precision of each unit for each label, [unit, label]; equal scores share a threshold.

    >>> average_precisions(np.array([[0.1], [0.4], [0.35], [0.8]]), np.array([[0], [0], [1], [1]])).round(3).tolist()
    [[0.833]]
    """
    item, unit = np.nonzero(scores) if (scores >= 0).all() else map(np.ravel, np.indices(scores.shape))
    values = scores[item, unit].astype(np.float64)
    found = label_scores(values, unit, item, labels.astype(np.bool_), n_features=scores.shape[1])
    return np.nan_to_num(found.average_precision)


def best_units(chosen_on: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each label the unit with the highest average precision."""
    return average_precisions(chosen_on, labels).argmax(0)


def selected_precision(selection: Patches, test: Patches, units: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """For each label the best unit on the first images, and its average precision on the others."""
    best = best_units(units[0], selection.labels)
    precision = average_precisions(units[1][:, best], test.labels)
    return best, np.diagonal(precision).copy()


def acts(sae: SparseAutoencoder, resid: Tensor) -> np.ndarray:
    """All features of each patch, [patch, feature]."""
    return sae.dense(sae.encode(resid)).numpy()


def contestants(selection: Patches, test: Patches, width: int, k: int, seed: int) -> dict[str, list[np.ndarray]]:
    """Units that are no trained features, on both sets of images: [patch, unit], those with a sign in both signs."""
    mean = selection.resid.mean(0)
    components = torch.pca_lowrank(selection.resid - mean, q=min(selection.resid.shape), niter=4)[2]
    random = random_dictionary(mean, width, k, seed)
    both: Any = (selection, test)
    return {
        "neurons": [one.neurons.numpy() for one in both],
        "raw dimensions": [signed(one.resid - mean) for one in both],
        "PCA": [signed((one.resid - mean) @ components) for one in both],
        "random dictionary": [acts(random, one.resid) for one in both],
    }


def random_dictionary(mean: Tensor, width: int, k: int, seed: int) -> SparseAutoencoder:
    """An autoencoder of the same size with random directions, around the mean."""
    cfg = SAEConfig(d_in=len(mean), d_sae=width, k=k, hook=HOOK)
    random = SparseAutoencoder(cfg).reset(seed).requires_grad_(False)
    random.b_dec.copy_(mean)
    return random


def signed(values: Tensor) -> np.ndarray:
    """Each dimension in both directions."""
    return torch.cat([values, -values], dim=1).numpy()


def unexplained(sae: SparseAutoencoder, resid: Tensor) -> float:
    """The share of variance that the reconstruction leaves."""
    return float((resid - sae(resid)).pow(2).sum() / (resid - resid.mean(0)).pow(2).sum())
