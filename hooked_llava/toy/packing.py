"""Training batches: many independent questions about one image share one copy of it.

A row holds the prefix `<s> USER: <image> x 64` once and then one segment per question. A segment sees the prefix and
itself, its positions go on where the prefix ends, and so it is computed exactly as if its prompt stood alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hooked_llava.toy.processor import BOS, EOS, IMAGE, PAD, split_words, vocabulary
from hooked_llava.toy.questions import (
    KINDS,
    TEXT_KINDS,
    TRAINING_KINDS,
    Question,
    ask,
    format_answer,
    format_prompt,
)
from hooked_llava.toy.scenes import PATCH_GRID, Scene, imagine_scene, normalize, sample_scene

N_PATCHES = PATCH_GRID**2
_PREFIX = 2 + N_PATCHES  # <s> USER: and the image
_END_WEIGHT = 0.1  # what follows the answer is the same every time
_CAPTION_WEIGHT = 0.5
_MOST_PER_ROW = 40
_VOCAB = vocabulary()
_LEARNT = {kind: frozenset(_VOCAB[w] for w in words) for kind, words in TRAINING_KINDS.items()}


@dataclass
class Target:
    """One supervised token: at `position` of `row` the model should predict `token`."""

    row: int
    position: int
    token: int
    weight: float
    kind: str  # "" for what follows an answer


@dataclass
class Batch:
    """Packed rows [row, position]; the first rows hold images [image, 3, 64, 64], the rest text only."""

    ids: Tensor
    positions: Tensor
    segments: Tensor  # 0: prefix, seen by the whole row; > 0: a question; -1: padding
    pixels: Tensor
    scenes: list[Scene]
    targets: list[Target]

    def mask(self) -> Tensor:
        """Who may look at whom, bool [row, 1, query, key]."""
        n = self.ids.shape[1]
        same = (self.segments[:, :, None] == self.segments[:, None, :]) | (self.segments[:, None, :] == 0)
        return (same & torch.ones(n, n, dtype=torch.bool).tril()).unsqueeze(1)


def encode(text: str) -> list[int]:
    """Token ids without `<s>`; the same as the tokenizer's (a test compares them)."""
    return [_VOCAB[w] for w in split_words(text)]


def encode_question(question: Question) -> tuple[list[int], list[tuple[int, float, str]]]:
    """Ids of prompt and answer without prefix, and what to supervise: (index of the token, weight, kind)."""
    prompt = format_prompt(question, image=False).removeprefix("USER: ")
    start, answer = encode(prompt), [*encode(format_answer(question)), _VOCAB[EOS]]
    ids = start + answer
    if question.kind in TRAINING_KINDS:
        return ids, [
            (i, _CAPTION_WEIGHT, question.kind) for i in range(len(start), len(ids)) if ids[i] in _LEARNT[question.kind]
        ]
    first = len(start)
    return ids, [(first, 1.0, question.kind)] + [(i, _END_WEIGHT, "") for i in range(first + 1, len(ids))]


@dataclass
class KindSampler:
    """Draws kinds of question by how often the model still gets them wrong."""

    floor: float = 0.08
    decay: float = 0.995
    errors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.7))

    def observe(self, kind: str, wrong: float) -> None:
        """Updates the running error rate of one kind with one answer."""
        self.errors[kind] = self.decay * self.errors[kind] + (1 - self.decay) * wrong

    def draw(self, rng: np.random.Generator, kinds: tuple[str, ...], n: int) -> list[str]:
        """n kinds, each with a probability that grows with its error rate."""
        weights = np.array([self.floor + self.errors[k] for k in kinds])
        return [kinds[i] for i in rng.choice(len(kinds), size=n, p=weights / weights.sum())]


_LISTS = ("list_places", "list_by_color", "list_patterns", "list_common")
_IMAGE_KINDS = (*(k for k in KINDS if k not in TEXT_KINDS + _LISTS), "fact_name", *_LISTS)


@dataclass(frozen=True)
class BatchShape:
    """How much goes into a batch: image rows (one in six of a single shape), text rows, tokens per row."""

    image_rows: int = 10
    text_rows: int = 3
    row_length: int = 288


def sample_batch(
    rng: np.random.Generator, sampler: KindSampler, shape: BatchShape, max_objects: int, without: tuple[str, ...] = ()
) -> Batch:
    """Draws images of up to `max_objects` shapes and fills every row with questions, none of a kind in `without`."""
    rows = shape.image_rows + shape.text_rows
    ids = np.full((rows, shape.row_length), _VOCAB[PAD], dtype=np.int64)
    positions = np.zeros_like(ids)
    segments = np.full_like(ids, -1)
    scenes: list[Scene] = []
    targets: list[Target] = []
    for row in range(rows):
        with_image = row < shape.image_rows
        scene = None
        if with_image:
            single = row < -(-shape.image_rows // 6)
            scene = sample_scene(rng, 1 if single else int(rng.integers(2, max_objects + 1)))
            scenes.append(scene)
            ids[row, :_PREFIX] = [_VOCAB[BOS], _VOCAB["USER:"], *[_VOCAB[IMAGE]] * N_PATCHES]
            positions[row, :_PREFIX], segments[row, :_PREFIX] = np.arange(_PREFIX), 0
        end = _PREFIX if with_image else 0
        for segment, question in enumerate(_draw_questions(rng, sampler, scene, max_objects, without), start=1):
            lead = [] if with_image else [_VOCAB[BOS], _VOCAB["USER:"]]
            tokens, supervised = encode_question(question)
            tokens, start, end = lead + tokens, end, end + len(lead) + len(tokens)
            if end > shape.row_length:
                break
            ids[row, start:end], segments[row, start:end] = tokens, segment
            positions[row, start:end] = np.arange(len(tokens)) + (_PREFIX if with_image else 0)
            first = start + len(lead)
            targets += [Target(row, first + i - 1, int(ids[row, first + i]), w, k) for i, w, k in supervised]
    pixels = torch.from_numpy(normalize(np.stack([s.pixels for s in scenes])))
    ids, positions, segments = map(torch.from_numpy, (ids, positions, segments))
    return Batch(ids, positions, segments, pixels, scenes, targets)


def _draw_questions(
    rng: np.random.Generator, sampler: KindSampler, scene: Scene | None, max_objects: int, without: tuple[str, ...]
) -> Iterator[Question]:
    """More questions than a row holds: about the scene, or, without one, text-only, each about a world of its own."""
    kinds = tuple(k for k in (_IMAGE_KINDS if scene is not None else TEXT_KINDS) if k not in without)
    for kind in sampler.draw(rng, kinds, _MOST_PER_ROW):
        about = scene if scene is not None else imagine_scene(rng, int(rng.integers(2, max_objects + 1)))
        question = ask(kind, about, rng)
        if question is not None:
            yield question
