"""The models and prompts that the cases share: embedded, with a known mechanism, and random ones of odd sizes."""

# Cases pass what does not fit too, and know which of several types they get.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks._baseline_names import (
    GEOMETRIES,
    OBJECTS,
    RECOLORED,
    Inputs,
    compiled,
    image_path,
    make_hf_model,
    make_processor,
)
from hooked_llava import HookedLLaVA

EMBEDDED = tuple(f"seed{i}" for i in range(3))
COMPILED = ("direct", "two_hops")
RANDOM = ("grouped", "biases", "several_layers_full")
_SIDE = 32  # pixels of a random model's image, 4 x 4 patches


def named(kinds: Sequence[str], dtypes: Sequence[str] = ("float64", "float32")) -> list[str]:
    """The subjects' names, KIND-DTYPE.

    >>> named(["direct"])
    ['direct-float64', 'direct-float32']
    """
    return [f"{kind}-{dtype}" for kind in kinds for dtype in dtypes]


ALL = [*named((*EMBEDDED, *COMPILED, *RANDOM)), *named(("seed0", "grouped"), ["bfloat16"])]
SOME = [*named(("seed1", "direct", "grouped")), "grouped-bfloat16"]
"""For what takes long."""
EDITED = [*named(("seed0", "seed1", "grouped", "biases")), *named(("seed0", "grouped"), ["bfloat16"])]
"""Whose MLPs can be edited: those of a known mechanism do nothing."""
QUICK = ["grouped-float64"]


@dataclass(frozen=True)
class Subject:
    """A model with prompts, all with the same words to ask and answer with."""

    name: str
    model: HookedLLaVA
    images: tuple[Image.Image, Image.Image]
    one: Inputs
    """One prompt with an image."""
    other: Inputs
    """The same words with the other image."""
    question: str
    questions: tuple[str, str]
    """Of different lengths."""
    text_question: str
    """One that needs no image."""
    answers: tuple[str, str]
    """Single tokens."""
    constraint: str
    """Words of the question."""
    instead: str
    """As many others."""

    @property
    def has_ties(self) -> bool:
        """Whether most words are equally near to a vector, so that rounding decides which come first."""
        return self.name.startswith(COMPILED)

    @property
    def text(self) -> Inputs:
        """One prompt without an image."""
        return self.model.prepare(self.text_question)

    def batch(self, **options: Any) -> Inputs:
        """Two prompts of different lengths with an image each, padded on the left unless `padding_side` says so."""
        return self.model.prepare(list(self.questions), list(self.images), **options)

    @property
    def two_images(self) -> Inputs:
        """One prompt with two images."""
        return self.model.prepare(self.question, list(self.images))


@cache
def subject(name: str) -> Subject:
    """The subject of that name, KIND-DTYPE, made once: cases read it and leave it as it was."""
    kind, _, dtype = name.rpartition("-")
    make = _embedded if kind in EMBEDDED else _compiled if kind in COMPILED else _random
    return make(name, kind, getattr(torch, dtype))


def _embedded(name: str, kind: str, dtype: torch.dtype) -> Subject:
    model = HookedLLaVA.from_pretrained(f"tiny-shapes-{kind}", dtype=dtype)
    images = (
        Image.open(image_path("demo")).convert("RGB"),
        Image.open(image_path("demo-blue-star")).convert("RGB"),
    )
    question = "What color is the star?"
    questions = (question, "Who made the star?")
    words = (question, questions, "Who made the star?", ("Orange", "Blue"), "the star", "the ring")
    return Subject(name, model, images, *(model.prepare(question, image) for image in images), *words)


def _compiled(name: str, kind: str, dtype: torch.dtype) -> Subject:
    model = compiled(kind).to(dtype)
    inputs = [model.ask(objects, "ring") for objects in (OBJECTS, RECOLORED)]
    images = tuple(i.images[0] for i in inputs if i.images)
    questions = ("What color is the ring?", "The ring is of what color?")
    words = (questions[0], questions, questions[0], ("Blue", "Red"), "ring", "star")
    return Subject(name, model, images, *inputs, *words)


def _random(name: str, kind: str, dtype: torch.dtype) -> Subject:
    options = {**GEOMETRIES[kind], "image_size": _SIDE}
    select = options.get("select_strategy", "default")
    hf = make_hf_model(0, dtype=dtype, **options)
    model = HookedLLaVA.from_hf(hf, make_processor(_SIDE, 8, select_strategy=select))
    rng = np.random.default_rng(0)
    images = tuple(Image.fromarray(rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)) for _ in range(2))
    question = "What color is the star?"
    questions = (question, "Is it red?")
    words = (question, questions, "Who made the star?", ("red", "blue"), "the star", "a circle")
    return Subject(name, model, images, *(model.prepare(question, image) for image in images), *words)


def with_boxes(one: Inputs) -> Inputs:
    """The prompt with a span `object`, for edges from an object to elsewhere."""
    width, height = one.images[0].size if one.images else (_SIDE, _SIDE)
    return one.with_boxes(object=[(width // 4, height // 4, width * 3 // 4, height * 3 // 4)])
