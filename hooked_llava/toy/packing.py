"""Training batches: many independent questions about one image share one copy of it.

A row holds the prefix `<s> USER: <image> ...` once and then one segment per question. A segment sees the prefix and
itself, its positions go on where the prefix ends, and so it is computed exactly as if its prompt stood alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hooked_llava.toy.processor import BOS, EOS, IMAGE, PAD, split_words
from hooked_llava.toy.questions import Question, format_answer, format_prompt
from hooked_llava.toy.scenes import MAX_OBJECTS, Scene, imagine_scene, normalize
from hooked_llava.toy.views import View
from hooked_llava.toy.worlds import World

LEAD = 2  # <s> USER:
_END_WEIGHT = 0.1  # what follows the answer is the same every time
_CAPTION_WEIGHT = 0.5
_MOST_PER_ROW = 40


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
    """Packed rows [row, position]; the first rows hold images, seen in views [view, 3, size, size], the rest text only."""

    ids: Tensor
    positions: Tensor
    segments: Tensor  # 0: prefix, seen by the whole row; > 0: a question; -1: padding
    pixels: Tensor
    scenes: list[Scene]
    views: list[list[View]]
    targets: list[Target]

    def mask(self) -> Tensor:
        """Who may look at whom, bool [row, 1, query, key]."""
        n = self.ids.shape[1]
        same = (self.segments[:, :, None] == self.segments[:, None, :]) | (self.segments[:, None, :] == 0)
        return (same & torch.ones(n, n, dtype=torch.bool).tril()).unsqueeze(1)


def encode(world: World, text: str) -> list[int]:
    """Token ids without `<s>`; the same as the tokenizer's (a test compares them)."""
    return [world.vocabulary[w] for w in split_words(text)]


def encode_question(world: World, question: Question) -> tuple[list[int], list[tuple[int, float, str]]]:
    """Ids of prompt and answer without prefix, and what to supervise: (index of the token, weight, kind)."""
    prompt = format_prompt(question, image=False).removeprefix("USER: ")
    start = encode(world, prompt)
    answer = [*encode(world, format_answer(question)), world.vocabulary[EOS]]
    ids, first, learnt = start + answer, len(start), world.learnt.get(question.kind)
    if learnt is not None:
        return ids, [(i, _CAPTION_WEIGHT, question.kind) for i in range(first, len(ids)) if ids[i] in learnt]
    return ids, [(first, 1.0, question.kind)] + [(i, _END_WEIGHT, "") for i in range(first + 1, len(ids))]


@dataclass
class KindSampler:
    """Draws kinds of question by how often the model still gets them wrong."""

    kinds: tuple[str, ...]
    floor: float = 0.08
    decay: float = 0.995
    errors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.errors = dict.fromkeys(self.kinds, 0.7) | self.errors

    def observe(self, kind: str, wrong: float) -> None:
        """Updates the running error rate of one kind with one answer."""
        self.errors[kind] = self.decay * self.errors[kind] + (1 - self.decay) * wrong

    def draw(self, rng: np.random.Generator, kinds: tuple[str, ...], n: int) -> list[str]:
        """n kinds, each with a probability that grows with its error rate."""
        weights = np.array([self.floor + self.errors[k] for k in kinds])
        return [kinds[i] for i in rng.choice(len(kinds), size=n, p=weights / weights.sum())]


@dataclass(frozen=True)
class BatchShape:
    """How much goes into a batch: image rows (one in six of a single shape), text rows, tokens per row."""

    image_rows: int = 10
    text_rows: int = 3
    row_length: int = 288


def sample_batch(
    rng: np.random.Generator,
    world: World,
    sampler: KindSampler,
    shape: BatchShape,
    max_objects: int,
    without: tuple[str, ...] = (),
) -> Batch:
    """Draws images of up to `max_objects` shapes and fills every row with questions, none of a kind in `without`."""
    vocab = world.vocabulary
    rows = shape.image_rows + shape.text_rows
    ids = np.full((rows, shape.row_length), vocab[PAD], dtype=np.int64)
    positions = np.zeros_like(ids)
    segments = np.full_like(ids, -1)
    scenes: list[Scene] = []
    targets: list[Target] = []
    for row in range(rows):
        scene, prefix = None, 0
        if row < shape.image_rows:
            scene = world.sample(rng, 1 if row < -(-shape.image_rows // 6) else None, max_objects)
            scenes.append(scene)
            n = world.n_features(scene)
            prefix = LEAD + n
            ids[row, :prefix] = [vocab[BOS], vocab["USER:"], *[vocab[IMAGE]] * n]
            positions[row, :prefix], segments[row, :prefix] = np.arange(prefix), 0
        end = prefix
        for segment, question in enumerate(_draw_questions(rng, world, sampler, scene, max_objects, without), start=1):
            lead = [] if scene is not None else [vocab[BOS], vocab["USER:"]]
            tokens, supervised = encode_question(world, question)
            tokens, start, end = lead + tokens, end, end + len(lead) + len(tokens)
            if end > shape.row_length:
                break
            ids[row, start:end], segments[row, start:end] = tokens, segment
            positions[row, start:end] = np.arange(len(tokens)) + prefix
            first = start + len(lead)
            targets += [Target(row, first + i - 1, int(ids[row, first + i]), w, k) for i, w, k in supervised]
    ids, positions, segments = map(torch.from_numpy, (ids, positions, segments))
    views = [world.views(scene) for scene in scenes]
    return Batch(ids, positions, segments, pixels_of(views), scenes, views, targets)


def pixels_of(views: Sequence[Sequence[View]]) -> Tensor:
    """What the vision tower gets, [view, 3, size, size]."""
    return torch.from_numpy(normalize(np.stack([view.pixels for its_views in views for view in its_views])))


def _draw_questions(
    rng: np.random.Generator,
    world: World,
    sampler: KindSampler,
    scene: Scene | None,
    max_objects: int,
    without: tuple[str, ...],
) -> Iterator[Question]:
    """More questions than a row holds: about the scene, or, without one, text-only, each about a world of its own."""
    kinds = tuple(k for k in (world.image_kinds if scene is not None else world.text_kinds) if k not in without)
    for kind in sampler.draw(rng, kinds, _MOST_PER_ROW):
        about = (
            scene if scene is not None else imagine_scene(rng, int(rng.integers(2, min(max_objects, MAX_OBJECTS) + 1)))
        )
        question = world.ask(kind, about, rng)
        if question is not None:
            yield question
