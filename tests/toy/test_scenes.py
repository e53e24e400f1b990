"""The toy world's images: what is drawn is what is said to be there."""

import zlib
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_llava.errors import InputError
from hooked_llava.toy.objects import COLOR_NAMES, COLORS, OBJECT_SIZE, PATTERNS, SHAPES
from hooked_llava.toy.scenes import IMAGE_SIZE, Scene, draw_scene, imagine_scene, recolor, replace_object, sample_scene


@lru_cache(maxsize=1)
def scene_pool() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(200)]


def scenes(n: int) -> list[Scene]:
    return scene_pool()[:n]


def test_the_same_generator_draws_the_same_image() -> None:
    first, second = sample_scene(np.random.default_rng(3)), sample_scene(np.random.default_rng(3))
    assert first == second
    assert np.array_equal(first.pixels, second.pixels)


def test_a_seed_draws_what_it_always_drew() -> None:
    """The checkpoints were trained on these images, and figures in the documentation show them."""
    rng = np.random.default_rng(0)
    drawn = [sample_scene(rng) for _ in range(100)]
    assert zlib.crc32(repr([s.objects for s in drawn]).encode()) == 729809851
    assert zlib.crc32(b"".join(s.pixels.tobytes() for s in drawn)) == 852826378
    assert int(rng.integers(2**32)) == 3274441568


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


def test_the_pixels_have_the_stated_color_and_pattern() -> None:
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
        centered = np.zeros((OBJECT_SIZE, OBJECT_SIZE), bool)
        centered[ys - ys.min(), xs - xs.min()] = True
        masks[o.shape] = centered
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


def test_a_told_scene_has_no_image() -> None:
    scene = imagine_scene(np.random.default_rng(0), 4)
    assert len(scene.objects) == 4
    assert not scene.masks.any()


@pytest.mark.parametrize("n", [0, 6])
def test_a_wrong_number_of_objects_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 5"):
        sample_scene(np.random.default_rng(0), n)


def other(scene: Scene, index: int) -> str:
    """A shape that the scene does not hold."""
    absent = [s for s in SHAPES if scene.find(s) is None]
    return absent[index % len(absent)]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), which=st.integers(0, 4), color=st.sampled_from(COLOR_NAMES))
def test_recoloring_changes_only_the_color_of_one_object(seed: int, which: int, color: str) -> None:
    scene = sample_scene(np.random.default_rng(seed))
    old = scene.objects[which % len(scene.objects)]
    if color == old.color:
        with pytest.raises(InputError, match=f"{old.shape}.*{color}"):
            recolor(scene, old.shape, color)
        return
    changed = recolor(scene, old.shape, color)
    differs = (changed.pixels != scene.pixels).any(-1)
    assert not differs[~old.mask].any()
    assert differs[old.mask].mean() > 0.9
    for before, after in zip(scene.objects, changed.objects, strict=True):
        assert (after.shape, after.pattern, after.box) == (before.shape, before.pattern, before.box)
        assert np.array_equal(after.mask, before.mask)
        assert after.color == (color if before is old else before.color)
    back = recolor(changed, old.shape, old.color)
    assert back == scene
    assert np.array_equal(back.pixels, scene.pixels)


def test_a_recolored_object_has_the_pixels_of_its_new_color() -> None:
    for scene in scenes(30):
        o = next((o for o in scene.objects if o.pattern == "solid"), None)
        if o is None:
            continue
        color = next(c for c in COLOR_NAMES if c != o.color)
        mean = recolor(scene, o.shape, color).pixels[o.mask].mean(0)
        assert np.abs(mean - np.clip(COLORS[color], 10, 245)).max() < 30


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), which=st.integers(0, 4), chosen=st.integers(0, 9))
def test_replacing_changes_only_the_place_of_one_object(seed: int, which: int, chosen: int) -> None:
    scene = sample_scene(np.random.default_rng(seed))
    index = which % len(scene.objects)
    old = scene.objects[index]
    swapped = replace_object(scene, old.shape, other(scene, chosen))
    new = swapped.objects[index]
    assert (new.shape, new.color, new.pattern) == (other(scene, chosen), old.color, old.pattern)
    assert not (swapped.pixels != scene.pixels).any(-1)[~(old.mask | new.mask)].any()
    assert swapped.objects[:index] + swapped.objects[index + 1 :] == scene.objects[:index] + scene.objects[index + 1 :]
    # What both shapes leave free shows the same background under the same noise, whatever stood there before.
    third = replace_object(swapped, new.shape, next(s for s in SHAPES if not (scene.find(s) or swapped.find(s))))
    free = ~(new.mask | third.objects[index].mask)
    assert np.array_equal(third.pixels[free], swapped.pixels[free])
    back = replace_object(third, third.objects[index].shape, old.shape)
    assert np.array_equal(back.pixels, scene.pixels)
    assert back == scene


def test_a_replacement_takes_the_color_and_pattern_asked_for() -> None:
    (scene,) = scenes(1)
    old = scene.objects[0]
    by, pattern = other(scene, 0), PATTERNS[1 - PATTERNS.index(old.pattern)]
    new = replace_object(scene, old.shape, by, color="black", pattern=pattern).find(by)
    assert new is not None
    assert (new.color, new.pattern) == ("black", pattern)


def test_a_told_scene_is_told_otherwise() -> None:
    scene = imagine_scene(np.random.default_rng(0), 3)
    color = next(c for c in COLOR_NAMES if c != scene.objects[1].color)
    changed = recolor(scene, scene.objects[1].shape, color)
    assert [o.color for o in changed.objects] == [scene.objects[0].color, color, scene.objects[2].color]
    assert np.array_equal(changed.pixels, scene.pixels)


def test_what_cannot_be_changed_is_refused() -> None:
    (scene,) = scenes(1)
    here, absent = scene.objects[0].shape, other(scene, 0)
    with pytest.raises(InputError, match=f"{absent}.*image.*{here}"):
        recolor(scene, absent, "red")
    with pytest.raises(InputError, match="There is no color 'rde'. Did you mean: red"):
        recolor(scene, here, "rde")
    with pytest.raises(InputError, match="There is no shape 'bird'"):
        replace_object(scene, here, "bird")
    with pytest.raises(InputError, match="There is no pattern 'dotted'"):
        replace_object(scene, here, absent, pattern="dotted")
    with pytest.raises(InputError, match=f"{scene.objects[1].shape}.*image"):
        replace_object(scene, here, scene.objects[1].shape)


def test_a_drawn_scene_shows_what_was_asked_for_and_nothing_else():
    with_star = np.asarray(draw_scene([("square", "red", (8, 16)), ("star", "blue", (36, 40), "striped")], seed=3))
    without = np.asarray(draw_scene([("square", "red", (8, 16))], seed=3)).astype(int)
    assert with_star.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    square = with_star[18:30, 10:22].mean((0, 1))
    assert np.abs(square - COLORS["red"]).max() < 30
    star = with_star[46:50, 42:46].mean((0, 1))
    assert star.argmax() == 2
    assert np.abs(without[40:56, 36:52].mean((0, 1)) - 128).max() < 40
    assert np.array_equal(
        with_star, draw_scene([("square", "red", (8, 16)), ("star", "blue", (36, 40), "striped")], seed=3)
    )


@pytest.mark.parametrize(
    ("objects", "says"),
    [
        ([], "objects.*0.*1 to 5"),
        ([(shape, "red", (0, 0)) for shape in SHAPES[:6]], "objects.*6.*1 to 5"),
        ([("sqare", "red", (8, 16))], "shape 'sqare'.*square"),
        ([("square", "rde", (8, 16))], "color 'rde'.*red"),
        ([("square", "red", (8, 16), "dotted")], "pattern 'dotted'.*striped"),
        ([("square", "red", (9, 16))], r"objects\[0\].*\(9, 16\).*multiples of 4 from 0 to 48.*\(8, 16\)"),
        ([("square", "red", (80, -4))], r"\(80, -4\).*0 to 48.*\(48, 0\)"),
        ([("square", "red", (8, 8)), ("square", "blue", (40, 40))], r"objects\[1\].*second square"),
        ([("square", "red", (8, 8)), ("star", "blue", (24, 8))], r"objects\[1\].*\(24, 8\).*\(8, 8\).*16"),
        ([("square", "red")], r"objects\[0\].*'square'.*\(8, 16\)"),
        (["square"], r"objects\[0\].*'square'.*\(8, 16\)"),
        ([("square", "red", 8)], r"objects\[0\].*8.*\(8, 16\)"),
        ([("square", "red", (8.5, 16))], "8.5"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_what_can(objects, says):
    with pytest.raises(InputError, match=says):
        draw_scene(objects)
