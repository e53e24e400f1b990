"""The toy world's pictures: what is drawn is what is said to be there."""

from functools import lru_cache

import numpy as np
import pytest

from hooked_llava.toy.scenes import (
    COLOR_NAMES,
    COLORS,
    IMAGE_SIZE,
    OBJECT_SIZE,
    PATTERNS,
    SHAPES,
    Scene,
    imagine_scene,
    sample_scene,
)


@lru_cache(maxsize=1)
def scene_pool() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(200)]


def scenes(n: int) -> list[Scene]:
    return scene_pool()[:n]


def test_the_same_generator_draws_the_same_picture() -> None:
    first, second = sample_scene(np.random.default_rng(3)), sample_scene(np.random.default_rng(3))
    assert first == second
    assert np.array_equal(first.pixels, second.pixels)


def test_shapes_are_distinct_and_every_attribute_occurs() -> None:
    drawn = scenes(200)
    assert {len(s.objects) for s in drawn} == {2, 3, 4, 5}
    for scene in drawn:
        assert len({o.shape for o in scene.objects}) == len(scene.objects)
    objects = [o for s in drawn for o in s.objects]
    assert {o.shape for o in objects} == set(SHAPES)
    assert {o.color for o in objects} == set(COLOR_NAMES)
    assert {o.pattern for o in objects} == set(PATTERNS)


def test_masks_do_not_overlap_and_boxes_are_tight() -> None:
    for scene in scenes(100):
        assert scene.masks.shape == (len(scene.objects), IMAGE_SIZE, IMAGE_SIZE)
        assert scene.masks.sum(axis=0).max() == 1
        for o in scene.objects:
            ys, xs = np.nonzero(o.mask)
            assert o.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert 8 <= o.box[2] - o.box[0] <= OBJECT_SIZE


def test_the_pixels_have_the_stated_colour_and_pattern() -> None:
    names = list(COLORS)
    palette = np.array([COLORS[c] for c in names], dtype=float)
    for scene in scenes(100):
        assert scene.pixels.dtype == np.uint8
        for o in scene.objects:
            pixels = scene.pixels[o.mask].astype(float)
            nearest = ((pixels[:, None] - palette) ** 2).sum(-1).argmin(-1)
            rows = np.nonzero(o.mask)[0]
            plain = pixels if o.pattern == "solid" else pixels[(rows - (rows.min() // 4) * 4) % 4 < 2]
            mean = ((plain.mean(0) - palette) ** 2).sum(-1).argmin()
            assert names[mean] == o.color
            if o.pattern == "solid":
                assert np.mean(nearest == names.index(o.color)) > 0.9


def test_no_two_shapes_look_alike() -> None:
    rng = np.random.default_rng(0)
    masks: dict[str, np.ndarray] = {}
    while len(masks) < len(SHAPES):
        (o,) = sample_scene(rng, 1).objects
        ys, xs = np.nonzero(o.mask)
        centred = np.zeros((OBJECT_SIZE, OBJECT_SIZE), bool)
        centred[ys - ys.min(), xs - xs.min()] = True
        masks[o.shape] = centred
    for a in SHAPES:
        for b in SHAPES:
            if a < b:
                both, either = (masks[a] & masks[b]).sum(), (masks[a] | masks[b]).sum()
                assert both / either < 0.9, (a, b)


def test_patch_labels_follow_coverage() -> None:
    for scene in scenes(50):
        labels = scene.patch_labels(0.2)
        for i in range(8):
            for j in range(8):
                cover = scene.masks[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].mean(axis=(1, 2))
                assert labels[i, j] == (cover.argmax() if cover.max() >= 0.2 else -1)
        assert set(range(len(scene.objects))) <= set(labels.flat)


def test_render_is_an_rgb_image_of_the_pixels() -> None:
    (scene,) = scenes(1)
    image = scene.render()
    assert (image.mode, image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    assert np.array_equal(np.asarray(image), scene.pixels)


def test_a_told_scene_has_no_picture() -> None:
    scene = imagine_scene(np.random.default_rng(0), 4)
    assert len(scene.objects) == 4
    assert not scene.masks.any()


@pytest.mark.parametrize("n", [0, 6])
def test_a_wrong_number_of_objects_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 5"):
        sample_scene(np.random.default_rng(0), n)
