"""A world small enough to be read by hand: every patch of an image is blank or holds one shape in one color.

It is what `tests.compiled` is asked about. Its images have hard edges and no noise, so that a model whose
weights are set by hand reads them without error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np
from jaxtyping import Bool
from PIL import Image

from hooked_llava.errors import InputError, did_you_mean
from hooked_llava.toy.processor import SPECIAL_TOKENS, split_words
from hooked_llava.toy.questions import INSTRUCTION, Question

GRID = 5
PATCH_SIZE = 8
IMAGE_SIZE = GRID * PATCH_SIZE
GROUND = 128
"""The grey of blank patches."""

# The corners of the RGB cube: as far from the ground and from each other as colors can be.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
_DRAWN = """
star      circle    square    cross     ring      triangle
...##...  ..####..  ........  ...##...  ..####..  ...#....
...##...  .######.  .######.  ...##...  .######.  ...#....
########  ########  .######.  ...##...  ###..###  ..###...
.######.  ########  .######.  ########  ##....##  ..###...
..####..  ########  .######.  ########  ##....##  .#####..
.######.  ########  .######.  ...##...  ###..###  .#####..
.##..##.  .######.  .######.  ...##...  .######.  #######.
#......#  ..####..  ........  ...##...  ..####..  ........
"""
SHAPES = tuple(_DRAWN.split("\n")[1].split())
UNKNOWN = "Unknown"
"""The answer about a shape that is not in the image."""
PHRASINGS = ("What color is the {shape}?", "The {shape} is of what color?")
"""Ways to ask, with the shape's word in different places."""

Place = tuple[int, int]
"""Row and column of a patch."""
Objects = Mapping[Place, str]
"""What an image shows: {(0, 3): "red star", (2, 1): "blue ring"}; no shape twice."""


@lru_cache(maxsize=1)
def stamps() -> Bool[np.ndarray, "shape row column"]:
    """Each shape as it fills a patch, in the order of `SHAPES`; independent of each other and of a uniform patch."""
    rows = [line.split() for line in _DRAWN.strip().split("\n")[1:]]
    return np.array([[[pixel == "#" for pixel in row[i]] for row in rows] for i in range(len(SHAPES))])


def image(objects: Objects) -> Image.Image:
    """The image that shows these objects, each in its patch.

    Raises `InputError` for an unknown color or shape, a place outside the image, or a shape that is there twice.

    >>> image({(0, 3): "red star", (2, 1): "blue ring"}).size == (IMAGE_SIZE, IMAGE_SIZE)
    True
    """
    pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), GROUND, dtype=np.uint8)
    for (row, column), (color, shape) in checked(objects).items():
        top, left = row * PATCH_SIZE, column * PATCH_SIZE
        patch = pixels[top : top + PATCH_SIZE, left : left + PATCH_SIZE]
        patch[stamps()[SHAPES.index(shape)]] = COLORS[color]
    return Image.fromarray(pixels)


def questions(objects: Objects, shapes: Iterable[str] = SHAPES) -> list[Question]:
    """Every question about these shapes, in every phrasing, with the true answer and the box of the object asked about.

    >>> [(q.text, q.answer) for q in questions({(0, 3): "red star"}, shapes=["star"])]
    [('What color is the star?', 'Red'), ('The star is of what color?', 'Red')]
    >>> questions({(0, 3): "red star"}, shapes=["ring"])[0].answer
    'Unknown'
    """
    seen = {shape: (place, color) for place, (color, shape) in checked(objects).items()}
    return [_question(shape, phrasing, *seen.get(shape, (None, UNKNOWN))) for shape in shapes for phrasing in PHRASINGS]


def _question(shape: str, phrasing: str, place: Place | None, answer: str) -> Question:
    box = None if place is None else box_of(place)
    return Question(
        "query_color",
        phrasing.format(shape=shape),
        answer.capitalize(),
        objects=(shape,),
        boxes=(box,),
        answer_boxes=() if box is None else (box,),
    )


def sample_objects(rng: np.random.Generator, n: int | None = None) -> dict[Place, str]:
    """Draws n objects (1 to all shapes, when None) in different places, no shape twice.

    >>> len(sample_objects(np.random.default_rng(0), 4))
    4
    """
    n = int(rng.integers(1, len(SHAPES) + 1)) if n is None else n
    places = rng.permutation(GRID**2)[:n].tolist()
    shapes = rng.permutation(len(SHAPES))[:n].tolist()
    colors = rng.integers(len(COLORS), size=n).tolist()
    names = [f"{tuple(COLORS)[color]} {SHAPES[shape]}" for color, shape in zip(colors, shapes, strict=True)]
    return {divmod(place, GRID): name for place, name in zip(places, names, strict=True)}


def box_of(place: Place) -> tuple[int, int, int, int]:
    """The pixels of a patch: (x0, y0, x1, y1), x1 and y1 exclusive.

    >>> box_of((0, 3))
    (24, 0, 32, 8)
    """
    row, column = place
    x, y = column * PATCH_SIZE, row * PATCH_SIZE
    return x, y, x + PATCH_SIZE, y + PATCH_SIZE


def vocabulary() -> dict[str, int]:
    """Every word of this world with its token id; special tokens first."""
    texts = ["USER:", "ASSISTANT:", INSTRUCTION, UNKNOWN, *(p.replace("{shape}", "") for p in PHRASINGS)]
    cased = [spelling for color in COLORS for spelling in (color, color.capitalize())]
    words = [*SPECIAL_TOKENS, *(word for text in texts for word in split_words(text)), *SHAPES, *cased]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def checked(objects: Objects) -> dict[Place, tuple[str, str]]:
    """The objects as place -> (color, shape); raises `InputError` for what is not of this world."""
    found: dict[Place, tuple[str, str]] = {}
    for place, name in objects.items():
        words = name.split()
        if len(words) != 2 or words[0] not in COLORS or words[1] not in SHAPES:
            known = (*COLORS, *SHAPES)
            wrong = next((word for word in words if word not in known), name)
            raise InputError(
                f"{name!r} is no object of this world; expected a color ({', '.join(COLORS)}) and a shape "
                f"({', '.join(SHAPES)}), such as 'red star'.{did_you_mean(wrong, known)}"
            )
        if not (0 <= place[0] < GRID and 0 <= place[1] < GRID):
            raise InputError(f"{name!r} is at {place}; expected a row and a column from 0 to {GRID - 1}.")
        found[place] = (words[0], words[1])
    shapes = [shape for _, shape in found.values()]
    if twice := sorted({shape for shape in shapes if shapes.count(shape) > 1}):
        raise InputError(f"The image holds more than one {twice[0]}; expected each shape at most once.")
    return found
