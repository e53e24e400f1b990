"""Images of the embedded world that come with the package: drawn once, each from a fixed seed.

`python -m hooked_llava.toy.images` draws them again. Each image has a scene, which says what is where and in which color.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np

from hooked_llava.checks import one_of
from hooked_llava.toy.scenes import Scene, recolor, sample_scene
from hooked_llava.toy.wide_scenes import sample_wide_scene

SEEDS: dict[str, tuple[int, int]] = {
    "demo": (51, 4),
    "one-shape": (50, 1),
    "two-shapes": (25, 2),
    "five-shapes": (30, 5),
}
"""Name of an image -> seed and number of shapes of its scene."""
WIDE_SEEDS: dict[str, tuple[int, int]] = {"wide": (5163, 8)}
"""The same for images of the world of `tiny-shapes-next`."""
RECOLORED: dict[str, tuple[str, str, str]] = {"demo-blue-star": ("demo", "star", "blue")}
"""Name of an image -> the one that it is but for the color of one shape, that shape, and its color."""
NAMES = (*SEEDS, *RECOLORED, *WIDE_SEEDS)
"""All bundled images."""


def image_path(name: str) -> Path:
    """The file of a bundled image; raises `InputError` with a suggestion for an unknown name.

    >>> image_path("demo").name
    'demo.png'
    """
    return Path(str(files("hooked_llava.toy.images").joinpath(f"{_known(name)}.png")))


def image_scene(name: str) -> Scene:
    """The scene that a bundled image shows: its shapes, colors, boxes and masks; raises `InputError` as above.

    >>> image_scene("demo").find("star") is not None
    True
    """
    if _known(name) in RECOLORED:
        other, shape, color = RECOLORED[name]
        return recolor(image_scene(other), shape, color)
    if name in WIDE_SEEDS:
        seed, n_objects = WIDE_SEEDS[name]
        return sample_wide_scene(np.random.default_rng(seed), n_objects)
    seed, n_objects = SEEDS[name]
    return sample_scene(np.random.default_rng(seed), n_objects)


def draw(folder: Path | None = None) -> list[Path]:
    """Write every image as PNG, into the package itself unless a folder is given; returns the files."""
    written = []
    for name in NAMES:
        path = image_path(name) if folder is None else folder / f"{name}.png"
        image_scene(name).render().save(path, optimize=True)
        written.append(path)
    return written


def _known(name: str) -> str:
    return one_of(name, NAMES, "name", says=f"No bundled image is called {name!r}.")
