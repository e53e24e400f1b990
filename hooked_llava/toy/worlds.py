"""The embedded worlds: what is drawn, what is asked, and the model that learns it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration
from transformers.processing_utils import ProcessorMixin

from hooked_llava.toy.alignment import ToyModel
from hooked_llava.toy.init import build_model
from hooked_llava.toy.neighbors import Neighbor
from hooked_llava.toy.objects import COLOR_NAMES, PATCH_SIZE, SHAPES, SceneObject
from hooked_llava.toy.processor import build_processor, vocabulary
from hooked_llava.toy.questions import KINDS, TEXT_KINDS, TRAINING_KINDS, Question, ask
from hooked_llava.toy.scenes import MAX_OBJECTS, Scene, sample_scene
from hooked_llava.toy.views import View, tiled_views, whole_view
from hooked_llava.toy.wide_model import (
    TILE,
    build_wide_model,
    build_wide_processor,
    canvas_of,
    layout_of,
    wide_vocabulary,
)
from hooked_llava.toy.wide_questions import NUMBERS, WIDE_KINDS, WIDE_TRAINING_KINDS
from hooked_llava.toy.wide_scenes import MAX_OBJECTS as MAX_WIDE_OBJECTS
from hooked_llava.toy.wide_scenes import MIN_OBJECTS, beside, sample_wide_scene

_LISTS = ("list_places", "list_by_color", "list_patterns", "list_common")
_IMAGE_KINDS = (*(kind for kind in KINDS if kind not in TEXT_KINDS + _LISTS), "fact_name", *_LISTS)


@dataclass(frozen=True)
class World:
    """A world of images and questions.

    Attributes:
        name (str): The name of the model that learns it.
        few_objects (int): How many objects an image holds at most when training begins.
        max_objects (int): How many at the end.
        vocabulary (Mapping[str, int]): Token ids by word.
        image_kinds (tuple[str, ...]): Kinds of question asked about an image in training.
        learnt_words (Mapping[str, Sequence[str]]): For kinds whose answer is several words, asked in training only, the
            words that the image decides and that are learnt.
        sample (Callable): Draws a scene from a generator, of so many objects or, with None, of up to the second number.
        ask (Callable): Asks a question of a kind about a scene, with a generator; None where the scene allows none.
        views (Callable): What the vision tower is shown of a scene.
        n_features (Callable): How many tokens a scene takes in a prompt.
        pack (Callable): From the model, the embeddings of views [view, patch, d_model] and the scenes to what stands in
            the prompt for each, [feature, d_model].
        build_model (Callable): A new model with that seed.
        build_processor (Callable): Its processor.
        neighbors (Callable): Which object has which to its left, for the read-out that is trained beside the answers.
    """

    name: str
    few_objects: int
    max_objects: int
    vocabulary: Mapping[str, int]
    image_kinds: tuple[str, ...]
    learnt_words: Mapping[str, Sequence[str]]
    sample: Callable[[np.random.Generator, int | None, int], Scene]
    ask: Callable[[str, Scene, np.random.Generator], Question | None]
    views: Callable[[Scene], list[View]]
    n_features: Callable[[Scene], int]
    pack: Callable[[ToyModel, Tensor, Sequence[Scene]], list[Tensor]]
    build_model: Callable[[int], ToyModel]
    build_processor: Callable[[], ProcessorMixin]
    neighbors: Callable[[Scene], list[Neighbor]] = field(default=lambda _scene: [])
    text_kinds: tuple[str, ...] = TEXT_KINDS

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind of question."""
        return tuple(dict.fromkeys((*self.image_kinds, *self.text_kinds)))

    @cached_property
    def learnt(self) -> dict[str, frozenset[int]]:
        """The ids of `learnt_words`."""
        return {kind: frozenset(self.vocabulary[w] for w in words) for kind, words in self.learnt_words.items()}


def _sample_square(rng: np.random.Generator, n: int | None, at_most: int) -> Scene:
    return sample_scene(rng, int(rng.integers(2, at_most + 1)) if n is None else n)


def _sample_wide(rng: np.random.Generator, n: int | None, at_most: int) -> Scene:
    return sample_wide_scene(rng, n, at_most=at_most)


def _n_square_features(scene: Scene) -> int:
    width, height = scene.size
    return (width // PATCH_SIZE) * (height // PATCH_SIZE)


def _pack_square(_model: ToyModel, embeddings: Tensor, _scenes: Sequence[Scene]) -> list[Tensor]:
    return list(embeddings)


def _pack_wide(model: ToyModel, embeddings: Tensor, scenes: Sequence[Scene]) -> list[Tensor]:
    assert isinstance(model, LlavaNextForConditionalGeneration)
    counts = [layout_of(scene.size).n_tiles for scene in scenes]
    sizes = [scene.size[::-1] for scene in scenes]
    views = list(embeddings.split(counts))
    return model.model.pack_image_features(views, sizes, "default", model.model.image_newline)[0]


def _wide_neighbors(scene: Scene) -> list[Neighbor]:
    layout = layout_of(scene.size)

    def feature(o: SceneObject) -> int:
        return layout.feature_of(*layout.pixel_to_cell(*o.center, grid="fine"), grid="fine")

    return [Neighbor(feature(o), beside(scene, o, "left")) for o in scene.objects if not o.small]


_ASKED_OF_WIDE = WIDE_KINDS | WIDE_TRAINING_KINDS


def _ask_wide(kind: str, scene: Scene, rng: np.random.Generator) -> Question | None:
    own = _ASKED_OF_WIDE.get(kind)
    return ask(kind, scene, rng) if own is None else own(scene, rng)


_SQUARE = World(
    name="tiny-shapes",
    few_objects=2,
    max_objects=MAX_OBJECTS,
    vocabulary=vocabulary(),
    image_kinds=_IMAGE_KINDS,
    learnt_words=TRAINING_KINDS,
    sample=_sample_square,
    ask=ask,
    views=lambda scene: [whole_view(scene)],
    n_features=_n_square_features,
    pack=_pack_square,
    build_model=build_model,
    build_processor=build_processor,
)
_TILED = World(
    name="tiny-shapes-next",
    few_objects=MIN_OBJECTS,
    max_objects=MAX_WIDE_OBJECTS,
    vocabulary=wide_vocabulary(),
    image_kinds=(*_IMAGE_KINDS, *WIDE_KINDS, *WIDE_TRAINING_KINDS),
    learnt_words=TRAINING_KINDS
    | {
        "list_beside": COLOR_NAMES,
        "list_same": tuple(shape.capitalize() for shape in SHAPES),
        "list_counts": NUMBERS,
    },
    sample=_sample_wide,
    ask=_ask_wide,
    views=lambda scene: tiled_views(scene, canvas_of(scene.size), TILE),
    n_features=lambda scene: layout_of(scene.size).n_features,
    pack=_pack_wide,
    build_model=build_wide_model,
    build_processor=build_wide_processor,
    neighbors=_wide_neighbors,
)
WORLDS = {world.name: world for world in (_SQUARE, _TILED)}
"""The worlds by the name of their model."""
