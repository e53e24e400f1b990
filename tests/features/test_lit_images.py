"""What is not in the region becomes dark, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hooked_llava.errors import InputError
from hooked_llava.features.lit_images import lit_image


def test_pixels_one_by_one() -> None:
    rng = np.random.default_rng(0)
    pixels, region = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), rng.random((5, 7)) < 0.5
    lit = np.asarray(lit_image(Image.fromarray(pixels), region))
    for y in range(5):
        for x in range(7):
            blended = pixels[y, x] if region[y, x] else [round(float(v) * 31 / 255) for v in pixels[y, x]]
            assert lit[y, x].tolist() == list(blended)


def test_as_pil_blends_a_black_layer() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image, region = Image.fromarray(pixels), np.eye(8, dtype=bool)
    layer = Image.fromarray(np.dstack([np.zeros((8, 8, 3)), np.where(region, 0, 224)]).astype(np.uint8), "RGBA")
    blended = np.asarray(Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB"))
    assert np.abs(np.asarray(lit_image(image, region)).astype(int) - blended).max() <= 1


def test_all_and_nothing() -> None:
    image = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    everywhere = np.ones((4, 4), dtype=bool)
    assert (np.asarray(lit_image(image, everywhere)) == 200).all()
    assert (np.asarray(lit_image(image, ~everywhere, dimmed=1)) == 0).all()
    assert (np.asarray(lit_image(image, ~everywhere, dimmed=0)) == 200).all()


def test_other_modes_are_made_rgb() -> None:
    assert lit_image(Image.new("L", (3, 2), 9), np.ones((2, 3), dtype=bool)).mode == "RGB"


def test_bad_input() -> None:
    image = Image.new("RGB", (4, 6))
    with pytest.raises(InputError, match=r"6 x 4.*4 x 6"):
        lit_image(image, np.ones((4, 6), dtype=bool))
    with pytest.raises(InputError, match=r"dimmed=1\.5.*0 to 1"):
        lit_image(image, np.ones((6, 4), dtype=bool), dimmed=1.5)
    with pytest.raises(InputError, match=r"dimmed=-1"):
        lit_image(image, np.ones((6, 4), dtype=bool), dimmed=-1)
