"""What a part of an image of the embedded worlds shows, in words, and where an image shows what words say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from hooked_llava.toy.objects import COLOR_NAMES, PATTERNS, SHAPES, SceneObject
from hooked_llava.toy.scenes import SEEN, Scene

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
"""Thirds of an image."""
OBJECT, BACKGROUND = "object", "background"
WORDS: dict[str, tuple[str, ...]] = {
    "what": (OBJECT, BACKGROUND),
    "size": ("small",),
    "pattern": PATTERNS,
    "color": COLOR_NAMES,
    "shape": SHAPES,
    "row": ROWS,
    "column": COLUMNS,
}
"""What can be said, by kind; no word is of two kinds."""
OF_OBJECTS = ("size", "pattern", "color", "shape")
_KIND_OF = {word: kind for kind, words in WORDS.items() for word in words}
_MOSTLY = 0.8
"""Share of a region that something must be true of."""
_HARDLY = 0.05
"""Share of a region that objects may cover where it shows the background."""


@dataclass(frozen=True)
class Description:
    """Words about a part of an image, at most one of each kind of `WORDS`.

    >>> Description.parse("the striped red star at the top left").words
    {'pattern': 'striped', 'color': 'red', 'shape': 'star', 'row': 'top', 'column': 'left'}
    >>> str(Description({"color": "red", "row": "top"})), str(Description({"what": "background"}))
    ('red object at the top', 'background')

    Attributes:
        words (Mapping[str, str]): The word of each kind that is said; empty if nothing is.
    """

    words: Mapping[str, str]

    @classmethod
    def parse(cls, phrase: str) -> Description:
        """The words of a phrase that the embedded worlds know, in singular or plural; others are left out."""
        found: dict[str, str] = {}
        for written in phrase.lower().replace(",", " ").replace(".", " ").split():
            word = written if written in _KIND_OF else written.removesuffix("s")
            if word in _KIND_OF:
                found.setdefault(_KIND_OF[word], word)
        return cls({kind: found[kind] for kind in WORDS if kind in found})

    def __str__(self) -> str:
        said = self.words
        is_background = said.get("what") == BACKGROUND
        named = [said[kind] for kind in OF_OBJECTS if kind in said and not is_background]
        if is_background:
            named = [BACKGROUND]
        elif "shape" not in said and (named or "what" in said):
            named.append(OBJECT)
        place = [said[kind] for kind in ("row", "column") if kind in said]
        return " ".join((named or ["anything"] if place else named) + (["at the", *place] if place else []))

    def is_true_of(self, scene: Scene, region: Bool[np.ndarray, "height width"]) -> bool:
        """Whether every word is true of a region, and there is a word."""
        shown = shown_in(scene, region)
        return bool(self.words) and all(shown.get(kind) == word for kind, word in self.words.items())

    def fits(self, one: SceneObject) -> bool:
        """Whether the words about objects are true of one, wherever it lies."""
        has = _words_of(one)
        return all(has[kind] == self.words[kind] for kind in OF_OBJECTS if kind in self.words)

    def mask(self, scene: Scene) -> Bool[np.ndarray, "height width"]:
        """The pixels that the words name: objects, or the background, or either, within the place that is named."""
        height, width = scene.pixels.shape[:2]
        objects = [one for one in scene.objects if self.fits(one)]
        covered = np.zeros((height, width), dtype=np.bool_)
        for one in scene.objects if self.words.get("what") == BACKGROUND else objects:
            covered |= one.mask
        if not self.words:
            return np.zeros((height, width), dtype=np.bool_)
        if self.words.get("what") == BACKGROUND:
            covered = ~covered
        elif not self.words.keys() - {"row", "column"}:
            covered = np.ones((height, width), dtype=np.bool_)
        return covered & _place(self.words, height, width)


def shown_in(scene: Scene, region: Bool[np.ndarray, "height width"]) -> dict[str, str]:
    """What is true of four fifths of a region, by kind of word; nothing of an empty one.

    A region shows an object if objects cover a fifth of it, and the background if they cover less than a twentieth. Color,
    shape, pattern and size are those of the part that objects cover.

    >>> from hooked_llava.toy.images import image_scene
    >>> scene = image_scene("demo")
    >>> shown_in(scene, scene.find("star").mask)["color"] == scene.find("star").color
    True
    """
    if not region.any():
        return {}
    said = _place_of(region)
    on = np.array([(one.mask & region).sum() for one in scene.objects], dtype=np.float64)
    share = on.sum() / region.sum()
    if share < _HARDLY:
        return {"what": BACKGROUND} | said
    if share < SEEN:
        return said
    for kind in OF_OBJECTS:
        word = _most([_words_of(one)[kind] for one in scene.objects], on)
        said |= {kind: word} if word else {}
    return {"what": OBJECT} | said


def in_common(shown: Sequence[Mapping[str, str]], agreement: float = 1.0) -> Description:
    """The words that hold in a share `agreement` of several regions.

    >>> str(in_common([{"color": "red", "shape": "star"}, {"color": "red", "shape": "moon"}]))
    'red object'
    """
    found: dict[str, str] = {}
    for kind in WORDS:
        words = [one.get(kind, "") for one in shown]
        word = _most(words, np.ones(len(words)), agreement) if words else ""
        found |= {kind: word} if word else {}
    return Description(found)


def _words_of(one: SceneObject) -> dict[str, str]:
    return {"size": "small" if one.small else "", "pattern": one.pattern, "color": one.color, "shape": one.shape}


def _most(words: Sequence[str], weights: Float[np.ndarray, " word"], least: float = _MOSTLY) -> str:
    """The word that has a share `least` of the weight, or ""."""
    by_word: dict[str, float] = {}
    for word, weight in zip(words, weights.tolist(), strict=True):
        by_word[word] = by_word.get(word, 0.0) + weight
    best = max(by_word, key=by_word.__getitem__)
    return best if by_word[best] >= least * weights.sum() - 1e-9 else ""


def _place_of(region: Bool[np.ndarray, "height width"]) -> dict[str, str]:
    """The third of the rows and the third of the columns that hold most of a region, if one does."""
    height, width = region.shape
    found: dict[str, str] = {}
    for kind, words in (("row", ROWS), ("column", COLUMNS)):
        counts = np.array([(region & _place({kind: word}, height, width)).sum() for word in words], dtype=np.float64)
        word = _most(words, counts)
        found |= {kind: word} if word else {}
    return found


def _place(words: Mapping[str, str], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """The pixels in the thirds that are named, by the middles of pixels."""
    row = _thirds(height, ROWS.index(words["row"])) if "row" in words else np.ones(height, np.bool_)
    column = _thirds(width, COLUMNS.index(words["column"])) if "column" in words else np.ones(width, np.bool_)
    return np.outer(row, column)


def _thirds(length: int, which: int) -> Bool[np.ndarray, " pixel"]:
    return (np.arange(length) + 0.5) * 3 // length == which
