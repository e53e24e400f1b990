"""An explainer and a segmenter for the embedded worlds that know what every image holds.

They stand in for a large model and for GroundingDINO with SAM: `explain_features` and the scores call them the same way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from hooked_llava.checks import finite_number
from hooked_llava.errors import InputError, counted
from hooked_llava.options.explainers import DIMMED, UNABLE
from hooked_llava.toy.descriptions import BACKGROUND, Description, in_common, shown_in
from hooked_llava.toy.scenes import Scene

_QUOTED = re.compile(r'"([^"]*)"')
_SOME = 32
"""Pixels by which scenes are looked for first."""
_Pixels = UInt8[np.ndarray, "height width 3"]


class KnownScenes:
    """Scenes that are found by their images, whole or with all but a region blended to black.

    >>> from hooked_llava.toy.images import image_scene
    >>> scene = image_scene("demo")
    >>> KnownScenes([scene]).find(scene.render()) is scene
    True
    """

    def __init__(self, scenes: Sequence[Scene], *, dimmed: float = DIMMED) -> None:
        """`dimmed` is how far the rest was blended to black, 0 to 1."""
        self._kept = 1 - finite_number(dimmed, "dimmed", least=0.0)
        self._by_size: dict[tuple[int, int], list[Scene]] = {}
        for scene in scenes:
            self._by_size.setdefault(scene.size, []).append(scene)
        self._pixels = {size: np.stack([one.pixels for one in same]) for size, same in self._by_size.items()}
        self._by_pixels = {(one.size, one.pixels.tobytes()): one for one in reversed(scenes)}

    def find(self, image: Image.Image) -> Scene:
        """The scene of an image; raises `InputError` if none looks like that."""
        found = self._by_pixels.get((image.size, _pixels_of(image).tobytes()))
        return self._scene(image, np.array([], int)) if found is None else found

    def find_lit(self, image: Image.Image) -> tuple[Scene, Bool[np.ndarray, "height width"]]:
        """The scene of an image of which all but a region is dimmed, and that region; raises `InputError` as `find`."""
        given = _pixels_of(image)
        candidates = self._equal_where_lit(image, given)
        known = self._of_size(image)[candidates]
        dark = np.asarray((np.abs(known * self._kept - given) <= 1).all(-1))
        found = np.flatnonzero(((known == given).all(-1) | dark).all(axis=(1, 2)))
        return self._scene(image, candidates[found]), ~dark[found[0]]

    def _equal_where_lit(self, image: Image.Image, given: _Pixels) -> Int[np.ndarray, " scene"]:
        """The scenes that are the same at some pixels which are too bright to be dimmed."""
        row, column = np.nonzero(given.max(-1) > 255 * self._kept + 1)
        some = slice(None, None, max(1, len(row) // _SOME))
        known = self._of_size(image)[:, row[some], column[some]]
        return np.flatnonzero((known == given[row[some], column[some]]).all(axis=(1, 2)))

    def _of_size(self, image: Image.Image) -> UInt8[np.ndarray, "scene height width 3"]:
        return self._pixels.get(image.size, np.zeros((0, image.height, image.width, 3), np.uint8))

    def _scene(self, image: Image.Image, found: Int[np.ndarray, " scene"]) -> Scene:
        if not len(found):
            n = sum(map(len, self._by_size.values()))
            raise InputError(
                f"None of {counted(n, 'scene')} looks like this image of {image.width} x {image.height} pixels; give the "
                "scenes that the images were drawn from, and images as they were drawn."
            )
        return self._by_size[image.size][int(found[0])]


class OracleExplainer:
    """Says what the lit regions of images of the embedded worlds have in common, from what their scenes hold.

    A callable of images and a prompt, as `explain_features` takes it. Asked for a noun phrase or a concept it reads the
    description in the prompt's last lines; asked whether an image shows a quoted phrase it says yes or no.

    >>> from hooked_llava.toy.images import image_scene
    >>> scene = image_scene("demo")
    >>> oracle = OracleExplainer([scene])
    >>> star = scene.find("star")
    >>> lit = np.where(star.mask[..., None], scene.pixels, scene.pixels * (1 - 224 / 255)).astype(np.uint8)
    >>> oracle([Image.fromarray(lit)], "What do they show? Begin with [EXPLANATION]:")
    '[EXPLANATION]: solid orange star at the bottom center'
    >>> oracle([scene.render()], 'Does the image show "an orange star"? Answer yes or no.')
    'yes'
    """

    def __init__(self, scenes: Sequence[Scene], *, agreement: float = 0.8, dimmed: float = DIMMED) -> None:
        """`agreement` is the share of the images that a word must be true of to be said."""
        self.scenes = KnownScenes(scenes, dimmed=dimmed)
        self.agreement = finite_number(agreement, "agreement", least=0.0)

    def __call__(self, images: Sequence[Image.Image], prompt: str) -> str:
        """The answer to a prompt: an explanation, yes or no, a noun phrase, or a concept."""
        if "[EXPLANATION]" in prompt:
            return f"[EXPLANATION]: {self.common(images) or UNABLE}"
        if "yes or no" in prompt:
            return "yes" if self._is_shown(images, prompt) else "no"
        description = _last_description(prompt)
        if "[ANSWER]" in prompt:
            return description if description == UNABLE else f"[ANSWER] {description}"
        return concept_of(Description.parse(description))

    def common(self, images: Sequence[Image.Image]) -> str:
        """What the lit regions have in common, in words; "" if nothing."""
        found = [shown_in(*self.scenes.find_lit(image)) for image in images]
        return str(in_common(found, self.agreement))

    def _is_shown(self, images: Sequence[Image.Image], prompt: str) -> bool:
        quoted = _QUOTED.findall(prompt)
        if not quoted:
            raise InputError(
                f'The prompt {prompt!r} quotes no phrase; expected one in double quotes, as in "red star".'
            )
        description = Description.parse(quoted[-1])
        return all(description.mask(scene).any() for scene in map(self.scenes.find, images))


class OracleSegmenter:
    """The pixels that a phrase names in an image of the embedded worlds, from its scene; none for unknown words.

    A callable of an image and a phrase, as the scores take it.

    >>> from hooked_llava.toy.images import image_scene
    >>> scene = image_scene("demo")
    >>> mask = OracleSegmenter([scene])(scene.render(), "the star")
    >>> bool((mask == scene.find("star").mask).all())
    True
    """

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = KnownScenes(scenes)

    def __call__(self, image: Image.Image, phrase: str) -> Bool[np.ndarray, "height width"]:
        """The mask of what a phrase names in an image; raises `InputError` for an image of no scene."""
        return Description.parse(phrase).mask(self.scenes.find(image))


def concept_of(description: Description) -> str:
    """The class that Network Dissection would give: of an object, a texture, a color, or else a scene.

    >>> concept_of(Description.parse("red star")), concept_of(Description.parse("red object"))
    ('object', 'color')
    """
    words = description.words
    if words.get("what") == BACKGROUND or not words.keys() - {"row", "column"}:
        return "scene"
    if "shape" in words:
        return "object"
    return "color" if "color" in words else "texture" if "pattern" in words else "object"


def _last_description(prompt: str) -> str:
    """The last line that is not empty and is no heading, such as "ANSWER:"."""
    lines = [line.strip() for line in prompt.strip().splitlines()]
    said = [line for line in lines if line and line.strip("[]:").upper() not in ("ANSWER", "DESCRIPTION")]
    return said[-1] if said else ""


def _pixels_of(image: Image.Image) -> _Pixels:
    return np.asarray(image.convert("RGB"))
