"""Patch maps of held-out images by every method, computed in batches and kept in files, so that a run can go on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from hooked_llava import results
from hooked_llava.analysis import patch_importance
from hooked_llava.errors import CheckpointError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import weights_hash
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.toy.evaluate import Example, held_out
from hooked_llava.toy.scenes import Scene

T = TypeVar("T")

BATCH = 25
RANDOM = "random"
METHODS: dict[str, dict[str, Any]] = {
    "log increase, best head": {"method": "log_increase"},
    "log increase, best 4 heads": {"method": "log_increase", "heads": 4},
    "log increase, all heads": {"method": "log_increase", "heads": "all"},
    "attention, mean of all heads": {"method": "attention"},
    "attention, best head": {"method": "attention", "heads": 1},
    "rollout": {"method": "rollout"},
    "rollout, through the vision tower": {"method": "rollout", "vision": True},
    "relevancy": {"method": "relevancy"},
    "relevancy, through the vision tower": {"method": "relevancy", "vision": True},
    "Grad-CAM": {"method": "grad_cam"},
    "Grad-CAM, vision tower": {"method": "grad_cam", "vision": True},
    "token activation map": {"method": "tam"},
    "gradient x image embedding": {"method": "grad_x_input"},
    "gradient x pixels": {"method": "grad_x_input", "vision": True},
    "integrated gradients, image embeddings": {"method": "integrated_gradients", "steps": 8},
    "integrated gradients, pixels": {"method": "integrated_gradients", "steps": 8, "vision": True},
    "occlusion, 2 x 2 patches": {"method": "occlusion", "window": 2},
    "token ablation, 2 x 2 patches": {"method": "token_ablation", "window": 2},
    "occlusion, single patches": {"method": "occlusion"},
    "token ablation, single patches": {"method": "token_ablation"},
}
ONE_BY_ONE = ("occlusion", "token ablation")
COSTLY = ("integrated gradients", *ONE_BY_ONE)
SINGLE_PATCHES = "single patches"


@dataclass(frozen=True)
class Asked:
    """A question about an image."""

    example: Example

    @property
    def scene(self) -> Scene:
        assert self.example.scene is not None
        return self.example.scene


@dataclass(frozen=True)
class Case(Asked):
    """An image, a question about one of its objects, and what is true of the patches."""

    coverage: np.ndarray
    """Share of each patch that the queried object covers, [patch_row, patch_col]."""
    others: np.ndarray
    """The same for all other objects together."""
    other_question: str
    """The same question about another object of the image."""


def cases(kind: str, n: int) -> list[Case]:
    """The first n held-out questions of a kind; every image has at least two objects."""
    found = []
    for example in held_out(kind, n):
        assert example.scene is not None
        asked = example.question.objects[0]
        shapes = [o.shape for o in example.scene.objects]
        own = shapes.index(asked)
        coverage = example.scene.patch_coverage
        another = shapes[(own + 1) % len(shapes)]
        found.append(
            Case(
                example,
                coverage[own],
                np.delete(coverage, own, axis=0).max(0),
                example.prompt.replace(asked, another),
            )
        )
    return found


def prepared(model: HookedLLaVA, some: Sequence[Case], *, other: bool = False) -> Inputs:
    """The questions with their images, or the same images with the question about another object."""
    prompts = [case.other_question if other else case.example.prompt for case in some]
    return model.prepare(prompts, images=[case.scene.render() for case in some], template=None)


def batches(some: Sequence[T], size: int = BATCH) -> Iterator[Sequence[T]]:
    """One after the other, so many at once."""
    for first in range(0, len(some), size):
        yield some[first : first + size]


def maps_of(model: HookedLLaVA, some: Sequence[Case], name: str, file: Path, *, other: bool = False) -> xr.DataArray:
    """Maps [prompt, patch_row, patch_col] with attributes `forwards` (an image's) and `seconds` (all); kept in the file.

    A file of other weights, options or questions is made anew. Seconds are the method's alone, prompts and images ready.
    """
    about = identity(model, some, name, other=other)
    if file.is_file():
        try:
            kept = results.load(file)
        except CheckpointError:
            kept = None
        if isinstance(kept, xr.DataArray) and kept.attrs.get("about") == about:
            return kept
    parts, seconds, forwards, backwards = [], 0.0, 0.0, 0.0
    for batch in tqdm(list(batches(some)), desc=name, leave=False, delay=5):
        if name == RANDOM:
            drawn = np.random.default_rng(len(parts)).random((len(batch), *batch[0].coverage.shape))
            parts.append(drawn)
            continue
        inputs = prepared(model, batch, other=other)
        started = time.perf_counter()
        found = patch_importance(model, inputs, **METHODS[name])
        seconds += time.perf_counter() - started
        each = 1 if name.startswith(ONE_BY_ONE) else len(batch)  # their forwards are counted prompt by prompt
        forwards += found.n_forward * each
        backwards += found.n_backward * each
        parts.append(found.isel(image=0).values.reshape(len(batch), *batch[0].coverage.shape))
    result = xr.DataArray(
        np.concatenate(parts),
        dims=("prompt", "patch_row", "patch_col"),
        attrs={
            "forwards": forwards / len(some),
            "backwards": backwards / len(some),
            "seconds": seconds,
            "about": about,
        },
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    results.save(result, file)
    return result


def identity(model: HookedLLaVA, some: Sequence[Case], name: str, *, other: bool) -> dict[str, str]:
    """What maps are of: they are the same if all of this is."""
    asked = hashlib.sha256()
    for case in some:
        asked.update((case.other_question if other else case.example.prompt).encode())
        asked.update(case.scene.pixels.tobytes())
    options = json.dumps(METHODS.get(name, name), sort_keys=True)
    return {"weights": weights_hash(model), "options": options, "questions": asked.hexdigest()[:16]}


@torch.no_grad()
def answers(model: HookedLLaVA, inputs: Inputs) -> list[str]:
    """The model's next token for every prompt."""
    stream = model(inputs, stop_at_layer=model.cfg.n_layers)
    final = stream[torch.arange(len(inputs)), inputs.last]
    ids = model.unembed(model.ln_final.fused(final)).argmax(-1).tolist()
    return [str(model.tokenizer.convert_ids_to_tokens(i)) for i in ids]
