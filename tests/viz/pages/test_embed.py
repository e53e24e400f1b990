from __future__ import annotations

from PIL import Image

from hooked_llava.viz.pages.embed import is_small, uri
from hooked_llava.viz.style import plot


def test_large_images_are_made_smaller():
    assert len(uri(Image.effect_noise((2000, 1000), 60).convert("RGB"))) < 700_000


def test_figures_are_vectors():
    with plot(2.0, 1.0) as figure:
        figure.add_subplot().imshow(Image.effect_noise((400, 200), 60).convert("RGB"))
    assert uri(figure).startswith("data:image/svg+xml;base64,")


def test_images_of_few_pixels_are_shown_as_squares():
    assert is_small(Image.new("RGB", (160, 20)))
    assert not is_small(Image.new("RGB", (161, 20)))
