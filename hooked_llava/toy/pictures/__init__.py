"""Pictures of the embedded world that come with the package: drawn once, each from a fixed seed.

`python -m hooked_llava.toy.pictures` draws them anew. The scene behind each says what is where and in which colour.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np

from hooked_llava.errors import InputError, did_you_mean
from hooked_llava.toy.scenes import Scene, sample_scene

SEEDS: dict[str, tuple[int, int]] = {
    "demo": (51, 4),
    "one-shape": (50, 1),
    "two-shapes": (25, 2),
    "five-shapes": (30, 5),
}
"""Name of a picture -> seed and number of shapes of its scene."""


def picture_path(name: str) -> Path:
    """The file of a bundled picture; raises `InputError` with a suggestion for an unknown name.

    >>> picture_path("demo").name
    'demo.png'
    """
    return Path(str(files("hooked_llava.toy.pictures").joinpath(f"{_known(name)}.png")))


def picture_scene(name: str) -> Scene:
    """The scene that a bundled picture shows: its shapes, colours, boxes and masks; raises `InputError` as above.

    >>> picture_scene("demo").find("star") is not None
    True
    """
    seed, n_objects = SEEDS[_known(name)]
    return sample_scene(np.random.default_rng(seed), n_objects)


def draw(folder: Path | None = None) -> list[Path]:
    """Write every picture as PNG, into the package itself unless a folder is given; returns the files."""
    written = []
    for name in SEEDS:
        path = picture_path(name) if folder is None else folder / f"{name}.png"
        picture_scene(name).render().save(path, optimize=True)
        written.append(path)
    return written


def _known(name: str) -> str:
    if name not in SEEDS:
        raise InputError(
            f"No bundled picture is called {name!r}.{did_you_mean(name, SEEDS)} Known: {', '.join(SEEDS)}."
        )
    return name
