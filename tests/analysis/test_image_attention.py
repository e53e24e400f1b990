"""Attention to the image: the pattern itself, laid out as the patches lie."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_llava.analysis import image_attention
from hooked_llava.errors import InputError
from tests.pairs import pair


@pytest.mark.parametrize(
    ("geometry", "grid", "with_class_token"), [("grouped", 2, False), ("full", 2, True), ("odd", 3, False)]
)
@pytest.mark.parametrize("position", ["last", -3])
def test_maps_are_the_pattern_at_the_patches(
    geometry: str, grid: int, with_class_token: bool, position: int | str
) -> None:
    models = pair(geometry)
    prompt = models.prompt(n_images=2)
    maps = image_attention(models.ours, prompt, position=position)
    assert dict(maps.sizes) == {
        "image": 2, "layer": 3, "head": models.ours.cfg.n_heads, "patch_row": grid, "patch_col": grid,
    }  # fmt: skip
    _, cache = models.ours.run_with_cache(prompt, names_filter="pattern")
    row = -1 if position == "last" else position
    size = grid * grid + with_class_token
    for image, start in enumerate((1, 1 + size + 1)):  # one text token before and between
        for layer in range(3):
            pattern = cache["pattern", layer][0, :, row, start + with_class_token : start + size]
            np.testing.assert_allclose(maps[image, layer], pattern.reshape(-1, grid, grid), atol=1e-6)
    assert maps.attrs["n_forward"] == 1


def test_what_is_missing_went_to_text() -> None:
    models = pair()
    maps = image_attention(models.ours, models.prompt())
    total = maps.sum(["image", "patch_row", "patch_col"])
    assert bool((total > 0).all())
    assert bool((total < 1).all())


def test_what_does_not_fit_is_refused() -> None:
    models = pair()
    with pytest.raises(InputError, match="image_attention.*one prompt, got 2"):
        image_attention(models.ours, models.prompt(batch=2))
    with pytest.raises(InputError, match="image_attention.*images.*0"):
        image_attention(models.ours, models.prompt(n_images=0))
    with pytest.raises(InputError, match="position='image'.*4 positions.*'last'"):
        image_attention(models.ours, models.prompt(), position="image")
