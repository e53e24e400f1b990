"""The world of `tiny-shapes`: 64 x 64 images of one to five colored shapes on a noisy background."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hooked_llava.checks import one_of, whole_numbers
from hooked_llava.errors import InputError, did_you_mean
from hooked_llava.toy.objects import (
    COLOR_NAMES,
    OBJECT_SIZE,
    PATCH_SIZE,
    PATTERNS,
    SHAPES,
    Look,
    SceneObject,
    draw_object,
)

IMAGE_SIZE = 64
PATCH_GRID = IMAGE_SIZE // PATCH_SIZE
MAX_OBJECTS = 5
SEEN = 0.2
"""The share of a patch that an object covers before the patch shows it."""

# The means and deviations with which CLIP's own image processor normalises.
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

# Objects lie on a grid of 4 pixels, 13 x 13 places: each covers 4 to 9 patches in one of four alignments. With free
# positions the vision tower needs many times the training to tell shapes apart.
_PLACE_STEP = 4
_N_TEXTURES = 48
# How often two objects are made to share a color and differ in pattern, by number of objects: at these rates
# "what do they have in common" is answered by color as often as by pattern.
_SHARED_COLOR_RATE = {1: 0.0, 2: 0.27, 3: 0.7, 4: 0.7, 5: 0.7}


@dataclass(frozen=True)
class Draw:
    """What an image was drawn from, so that it can be drawn again with another object in the same place.

    Attributes:
        generator (type[numpy.random.BitGenerator]): The kind of generator.
        state (Mapping[str, Any]): The generator's state, once the number of objects was known.
        order (tuple[int, ...]): For each of the scene's objects, which one it was in drawing.
        again (Callable): Draws a scene from a generator and the looks of its objects, in the order of drawing.
    """

    generator: type[np.random.BitGenerator]
    state: Mapping[str, Any]
    order: tuple[int, ...]
    again: Callable[[np.random.Generator, Sequence[Look]], Scene]


@dataclass(frozen=True)
class Scene:
    """An image and everything that is true of it.

    Attributes:
        objects (tuple[SceneObject, ...]): Its shapes.
        pixels (uint8 [height, width, 3]): The image.
        draw (Draw | None): How to draw it again (`recolor`, `replace_object`); None if it is only described.
    """

    objects: tuple[SceneObject, ...]
    pixels: NDArray[np.uint8] = field(repr=False, compare=False)
    draw: Draw | None = field(default=None, repr=False, compare=False)

    def render(self) -> Image.Image:
        """The image as an RGB image."""
        return Image.fromarray(self.pixels)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def unique(self) -> tuple[SceneObject, ...]:
        """The objects whose shape occurs once: what a question can name."""
        shapes = [o.shape for o in self.objects]
        return tuple(o for o in self.objects if shapes.count(o.shape) == 1)

    @property
    def named(self) -> tuple[SceneObject, ...]:
        """Those of `unique` that are not small."""
        return tuple(o for o in self.unique if not o.small)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """Which pixels each object covers, bool [object, height, width]."""
        return np.stack([o.mask for o in self.objects])

    @property
    def patch_coverage(self) -> NDArray[np.float64]:
        """The share of each patch of 8 x 8 pixels that each object covers, [object, height / 8, width / 8]."""
        return patch_coverage(self.masks)

    def patch_labels(self, threshold: float = SEEN) -> NDArray[np.int64]:
        """The index of the object that covers most of each patch, -1 where none covers `threshold` of it."""
        return shown_object(self.patch_coverage, threshold)

    def find(self, shape: str) -> SceneObject | None:
        """The first object of that shape, or None. An image of `tiny-shapes` never holds the same shape twice."""
        return next((o for o in self.objects if o.shape == shape), None)


def patch_coverage(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The share of each patch of 8 x 8 pixels that each mask covers: [object, height, width] -> [object, row, col]."""
    n, height, width = masks.shape
    shape = (n, height // PATCH_SIZE, PATCH_SIZE, width // PATCH_SIZE, PATCH_SIZE)
    return masks.reshape(shape).mean(axis=(2, 4))


def shown_object(coverage: NDArray[np.floating], threshold: float = SEEN) -> NDArray[np.int64]:
    """Which object covers most of each patch, -1 where none covers `threshold` of it: [object, ...] -> [...]."""
    return np.where(coverage.max(axis=0) >= threshold, coverage.argmax(axis=0), -1)


def sample_scene(rng: np.random.Generator, n_objects: int | None = None) -> Scene:
    """Draws an image with `n_objects` shapes (2 to 5 when None), all of different shape, none overlapping."""
    n = int(rng.integers(2, MAX_OBJECTS + 1)) if n_objects is None else n_objects
    if not 1 <= n <= MAX_OBJECTS:
        raise ValueError(f"n_objects must be between 1 and {MAX_OBJECTS}, got {n_objects}")
    return _sample(rng, n)


def draw_scene(objects: Sequence[Sequence[Any]], *, seed: int = 0) -> Image.Image:
    """An image of one to five objects of your own, on a noisy ground as in training.

    Args:
        objects: for each its shape, its color, the upper left corner (x, y) of its 16 x 16 pixels (multiples of 4, 0 to
            48, objects more than 16 pixels apart in x or in y), and if you like its pattern, "solid" by default.
        seed: seed of the ground and the noise.

    Raises `InputError` for what does not occur in training: an unknown word, a shape twice, a corner off the grid, objects
    that are too close.

    >>> draw_scene([("square", "red", (8, 16)), ("star", "blue", (36, 40), "striped")]).size
    (64, 64)
    """
    if not 1 <= len(objects) <= MAX_OBJECTS:
        raise InputError(f"objects has {len(objects)} entries; expected 1 to {MAX_OBJECTS}.")
    looks, corners = zip(*(_look_and_corner(given, f"objects[{i}]") for i, given in enumerate(objects)), strict=True)
    for i, (look, corner) in enumerate(zip(looks, corners, strict=True)):
        if any(look[0] == other[0] for other in looks[:i]):
            raise InputError(f"objects[{i}] is a second {SHAPES[look[0]]}; expected different shapes.")
        for other in corners[:i]:
            if _too_close(corner, other):
                raise InputError(
                    f"objects[{i}] at {corner} is too close to the one at {other}; expected more than {OBJECT_SIZE} pixels "
                    "between their corners in x or in y."
                )
    rng = np.random.default_rng(seed)
    return Image.fromarray(_paint(background(rng), rng, looks, corners)[1])


def recolor(scene: Scene, shape: str, color: str) -> Scene:
    """The same image with one object in another color: no pixel outside the object's mask differs.

    Pattern, place, background and noise stay. Raises `InputError` for a shape that is not in the image, and for a
    color that is unknown or the object's own.

    >>> scene = sample_scene(np.random.default_rng(0))
    >>> changed = recolor(scene, scene.objects[0].shape, "white")
    >>> differs = (changed.pixels != scene.pixels).any(-1)
    >>> bool((differs <= scene.objects[0].mask).all()), changed.objects[0].color
    (True, 'white')
    """
    index, old = _located(scene, shape)
    if _known(color, COLOR_NAMES, "color") == old.color:
        raise InputError(f"The {shape} is {color} already; expected another color.")
    return _changed(scene, index, (old.shape, color, old.pattern))


def replace_object(scene: Scene, shape: str, by: str, *, color: str | None = None, pattern: str | None = None) -> Scene:
    """The same image with another shape in the place of one: no pixel outside the two shapes' masks differs.

    Args:
        scene: the image.
        shape: the object that goes.
        by: the shape that comes; one that the image does not hold yet.
        color: its color, by default that of the object that goes.
        pattern: its pattern, likewise.

    Raises `InputError` for a shape that is not in the image, and for one to come that is, or is unknown.

    >>> scene = sample_scene(np.random.default_rng(0))
    >>> swapped = replace_object(scene, scene.objects[0].shape, "moon", color="blue")
    >>> swapped.objects[0].shape, swapped.objects[0].color, swapped.objects[1:] == scene.objects[1:]
    ('moon', 'blue', True)
    """
    index, old = _located(scene, shape)
    if scene.find(_known(by, SHAPES, "shape")) is not None:
        raise InputError(f"There is a {by} in the image already, and no shape may occur twice; expected another.")
    look = (
        by,
        old.color if color is None else _known(color, COLOR_NAMES, "color"),
        old.pattern if pattern is None else _known(pattern, PATTERNS, "pattern"),
    )
    return _changed(scene, index, look)


def imagine_scene(rng: np.random.Generator, n_objects: int) -> Scene:
    """A scene that is only described, not drawn: shapes, colors and patterns with empty boxes, masks and pixels."""
    shapes = rng.permutation(len(SHAPES))[:n_objects]
    colors = rng.integers(len(COLOR_NAMES), size=n_objects)
    patterns = rng.integers(len(PATTERNS), size=n_objects)
    blank, nothing = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    named = zip(shapes, colors, patterns, strict=True)
    return Scene(
        tuple(SceneObject(SHAPES[s], COLOR_NAMES[c], PATTERNS[p], (0, 0, 0, 0), nothing) for s, c, p in named), blank
    )


def normalize(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the image processor makes of images of the right size: uint8 [..., h, w, 3] -> float [..., 3, h, w]."""
    scaled = (pixels.astype(np.float32) * np.float32(1 / 255) - CLIP_MEAN) / CLIP_STD
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))


def _located(scene: Scene, shape: str) -> tuple[int, SceneObject]:
    shapes = [o.shape for o in scene.objects]
    if shape not in shapes:
        raise InputError(f"There is no {shape} in the image.{did_you_mean(shape, shapes)} It has: {', '.join(shapes)}.")
    return shapes.index(shape), scene.objects[shapes.index(shape)]


def _look_and_corner(given: Any, name: str) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """One object of `draw_scene`, as indices of shape, color and pattern, and its corner."""
    if isinstance(given, str) or len(given) not in (3, 4) or np.shape(given[2]) != (2,):
        raise InputError(f'{name} is {given!r}; expected (shape, color, (x, y)), such as ("square", "red", (8, 16)).')
    shape, color, place, pattern = *given, *PATTERNS[: 4 - len(given)]
    words = ((shape, SHAPES, "shape"), (color, COLOR_NAMES, "color"), (pattern, PATTERNS, "pattern"))
    shape, color, pattern = (known.index(_known(word, known, what)) for word, known, what in words)
    x, y = whole_numbers(place, f"the corner of {name}", "two whole numbers, (x, y)")
    last = IMAGE_SIZE - OBJECT_SIZE
    near = tuple(min(max(round(at / _PLACE_STEP) * _PLACE_STEP, 0), last) for at in (x, y))
    if near != (x, y):
        raise InputError(
            f"{name} is at {(x, y)}; expected multiples of {_PLACE_STEP} from 0 to {last}. The nearest is {near}."
        )
    return (shape, color, pattern), (x, y)


def _known(word: str, words: Sequence[str], what: str) -> str:
    return one_of(word, words, what, says=f"There is no {what} {word!r}.")


def _changed(scene: Scene, index: int, look: Look) -> Scene:
    """The scene drawn again from the same random numbers, one object looking otherwise."""
    if scene.draw is None:
        shape, color, pattern = look
        described = replace(scene.objects[index], shape=shape, color=color, pattern=pattern)
        return replace(scene, objects=(*scene.objects[:index], described, *scene.objects[index + 1 :]))
    looks = [(o.shape, o.color, o.pattern) for o in scene.objects]
    looks[index] = look
    bits = scene.draw.generator()
    bits.state = scene.draw.state
    drawn = [looks[scene.draw.order.index(i)] for i in range(len(looks))]
    return scene.draw.again(np.random.Generator(bits), drawn)


def _sample(rng: np.random.Generator, n: int, looks: Sequence[Look] | None = None) -> Scene:
    """Draws an image; with `looks` the objects, in the order of drawing, look like that.

    What is drawn from the generator does not depend on how the objects look.
    """
    bits = rng.bit_generator
    state = bits.state
    shapes = rng.permutation(len(SHAPES))[:n]
    colors = rng.integers(len(COLOR_NAMES), size=n)
    patterns = rng.integers(len(PATTERNS), size=n)
    if rng.random() < _SHARED_COLOR_RATE[n]:
        colors[1], patterns[1] = colors[0], 1 - patterns[0]
    if looks is not None:
        shapes = [SHAPES.index(shape) for shape, _, _ in looks]
        colors = [COLOR_NAMES.index(color) for _, color, _ in looks]
        patterns = [PATTERNS.index(pattern) for _, _, pattern in looks]
    canvas = background(rng)
    looks_drawn = [(int(s), int(c), int(p)) for s, c, p in zip(shapes, colors, patterns, strict=True)]
    objects, pixels = _paint(canvas, rng, looks_drawn, _place(rng, n))
    order = rng.permutation(n)  # so that the forced color pair is not always objects 0 and 1
    return Scene(tuple(objects[i] for i in order), pixels, Draw(type(bits), state, tuple(order.tolist()), _draw_again))


def _draw_again(rng: np.random.Generator, looks: Sequence[Look]) -> Scene:
    return _sample(rng, len(looks), looks)


def _paint(
    canvas: NDArray[np.float32],
    rng: np.random.Generator,
    looks: Sequence[tuple[int, int, int]],
    corners: Sequence[tuple[int, int]],
) -> tuple[list[SceneObject], NDArray[np.uint8]]:
    """The objects on the canvas (in place), then noise over everything."""
    placed = zip(looks, corners, strict=True)
    objects = [draw_object(canvas, rng, look, corner) for look, corner in placed]
    return objects, with_noise(canvas, rng)


def with_noise(canvas: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The canvas (changed in place) with noise over everything, as pixels."""
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * 6
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _place(rng: np.random.Generator, n: int) -> list[tuple[int, int]]:
    """Upper left corners of n squares that keep apart; starts over when a draw leaves no room."""
    n_places = (IMAGE_SIZE - OBJECT_SIZE) // _PLACE_STEP + 1
    while True:
        placed: list[tuple[int, int]] = []
        for x, y in (rng.integers(n_places, size=(48, 2)) * _PLACE_STEP).tolist():
            if not any(_too_close((x, y), other) for other in placed):
                placed.append((x, y))
                if len(placed) == n:
                    return placed


def _too_close(corner: tuple[int, int], other: tuple[int, int]) -> bool:
    return all(abs(a - b) <= OBJECT_SIZE for a, b in zip(corner, other, strict=True))


def background(rng: np.random.Generator, width: int = IMAGE_SIZE, height: int = IMAGE_SIZE) -> NDArray[np.float32]:
    """A grey ground with a faint tint and a smooth texture, float [height, width, 3]."""
    base = 128 + rng.standard_normal(3, dtype=np.float32) * 8
    texture = _textures(width, height)[rng.integers(_N_TEXTURES)]
    flip = texture[:: int(rng.choice((-1, 1))), :: int(rng.choice((-1, 1)))]
    return (base + flip[..., None] * np.float32(rng.uniform(3, 10))).astype(np.float32)


@lru_cache
def _textures(width: int, height: int) -> NDArray[np.float32]:
    """Smooth random fields with unit deviation, [48, height, width]; the same in every process."""
    n_rows, n_columns = (round(10 * pixels / IMAGE_SIZE) for pixels in (height, width))
    coarse = np.random.default_rng(20240611).standard_normal((_N_TEXTURES, n_rows, n_columns))
    (above, down), (left, right) = _between(n_rows, height), _between(n_columns, width)
    rows = coarse[:, above] * (1 - down)[:, None] + coarse[:, above + 1] * down[:, None]
    return (rows[:, :, left] * (1 - right) + rows[:, :, left + 1] * right).astype(np.float32)


def _between(n_coarse: int, n_fine: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each fine position the coarse one before it, and how far on it lies towards the next."""
    grid = np.linspace(0, n_coarse - 1.001, n_fine)
    return grid.astype(int), grid - grid.astype(int)
