from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hooked_llava.errors import InputError
from hooked_llava.toy.images import NAMES, draw, image_path, image_scene


@pytest.mark.parametrize("name", NAMES)
def test_bundled_images_are_what_their_scenes_say(name):
    with Image.open(image_path(name)) as image:
        assert np.array_equal(np.asarray(image), image_scene(name).pixels)


def test_every_image_has_a_star_of_its_own_color():
    for name in NAMES:
        scene = image_scene(name)
        star = scene.find("star")
        assert star is not None
        assert [o.color for o in scene.objects].count(star.color) == 1


def test_drawing_writes_them_all(tmp_path):
    assert {path.name for path in draw(tmp_path)} == {f"{name}.png" for name in NAMES}
    assert all(path.is_file() for path in tmp_path.iterdir())


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(InputError, match=r"'dmo'\. Did you mean: demo\? Known: demo, "):
        image_path("dmo")


def test_a_recolored_image_differs_in_one_shape_only():
    scene, other = image_scene("demo"), image_scene("demo-blue-star")
    differs = (scene.pixels != other.pixels).any(-1)
    assert differs.any()
    assert not differs[~scene.find("star").mask].any()
    assert other.find("star").color == "blue"
