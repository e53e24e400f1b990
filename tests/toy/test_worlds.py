"""The world of `tiny-shapes-next`: what is drawn and asked is true, and training sees what the processor makes of it."""

import re
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaNextProcessor

from hooked_llava.toy.neighbors import Neighbor, NeighborHeads
from hooked_llava.toy.objects import COLOR_NAMES, PATCH_SIZE, SHAPES, SMALL_SIZE, SceneObject
from hooked_llava.toy.packing import pixels_of
from hooked_llava.toy.processor import vocabulary
from hooked_llava.toy.questions import Question
from hooked_llava.toy.scenes import Scene, recolor, replace_object
from hooked_llava.toy.wide_model import TILE, canvas_of, wide_vocabulary
from hooked_llava.toy.wide_questions import NUMBERS, WIDE_KINDS, WIDE_TRAINING_KINDS
from hooked_llava.toy.wide_scenes import CELL, IMAGE_SIZES, MAX_OBJECTS, MIN_OBJECTS, beside, sample_wide_scene
from hooked_llava.toy.worlds import WORLDS

WORLD = WORLDS["tiny-shapes-next"]


@lru_cache(maxsize=1)
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_wide_scene(rng) for _ in range(300)]


def asked(kind: str) -> list[tuple[Scene, Question]]:
    rng = np.random.default_rng(1)
    drawn = [(scene, WORLD.ask(kind, scene, rng)) for scene in scenes()]
    return [(scene, question) for scene, question in drawn if question is not None]


def test_images_have_every_size_and_number_of_objects_that_they_may_have() -> None:
    assert {s.size for s in scenes()} == set(IMAGE_SIZES)
    assert all(1 <= max(size) / min(size) <= 3 for size in IMAGE_SIZES)
    counts = Counter(len(s.objects) for s in scenes())
    assert (min(counts), max(counts)) == (MIN_OBJECTS, MAX_OBJECTS)
    share = np.mean([o.small for s in scenes() for o in s.objects])
    assert 0.35 < share < 0.45
    assert all(len(s.unique) == len(s.objects) for s in scenes() if len(s.objects) <= len(SHAPES))


def test_masks_do_not_overlap_and_boxes_are_tight() -> None:
    for scene in scenes():
        width, height = scene.size
        assert scene.masks.shape == (len(scene.objects), height, width)
        assert scene.masks.sum(axis=0).max() == 1
        for o in scene.objects:
            ys, xs = np.nonzero(o.mask)
            assert o.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert o.small == (o.box[3] - o.box[1] <= SMALL_SIZE)


def test_a_scene_is_drawn_again_with_another_object_in_the_same_place() -> None:
    for scene in scenes()[:20]:
        one = scene.unique[0] if scene.unique else scene.objects[0]
        color = next(c for c in COLOR_NAMES if c != one.color)
        changed = recolor(scene, one.shape, color)
        differs = (changed.pixels != scene.pixels).any(-1)
        assert differs.any()
        assert (differs <= scene.find(one.shape).mask).all()  # pyright: ignore[reportOptionalMemberAccess]
        absent = [shape for shape in SHAPES if scene.find(shape) is None]
        if absent:
            swapped = replace_object(scene, one.shape, absent[0])
            assert Counter(o.shape for o in swapped.objects)[absent[0]] == 1


def test_neighbors_are_those_of_the_next_cell() -> None:
    """Counted by cells, which the rule in pixels must agree with."""

    def cell(scene: Scene, o: SceneObject) -> tuple[int, int]:
        x, y = ((first + last) / 2 for first, last in zip(o.box[:2], o.box[2:], strict=True))
        firsts = [min(p.box[axis] for p in scene.objects) for axis in (0, 1)]
        rests = [pixels % CELL for pixels in scene.size]
        # the first cell begins at 0 or after what is left over
        starts = [rest if first >= rest else 0 for first, rest in zip(firsts, rests, strict=True)]
        return int((x - starts[0]) // CELL), int((y - starts[1]) // CELL)

    found = 0
    for scene in scenes():
        if any(pixels % CELL for pixels in scene.size):
            continue
        cells = {cell(scene, o): o for o in scene.objects}
        assert len(cells) == len(scene.objects)
        for (column, row), o in cells.items():
            for side, step in (("left", -1), ("right", 1)):
                other = cells.get((column + step, row))
                normal = other is not None and not other.small and not o.small
                assert beside(scene, o, side) is (other if normal else None)
                found += normal
    assert found > 100


@pytest.mark.parametrize("kind", WIDE_KINDS)
def test_answers_are_true(kind: str) -> None:
    drawn = asked(kind)
    assert len(drawn) > 80
    for scene, question in drawn:
        (named,) = [o for o in scene.objects if o.shape in question.text] or [None]
        if kind == "query_small":
            assert named is not None
            assert named.small
            truth = named.color
        elif kind == "query_beside":
            assert named is not None
            sign = -1 if "left" in question.text else 1
            row = [o for o in scene.objects if abs(o.center[1] - named.center[1]) < CELL / 2]
            truth = min(
                (o for o in row if sign * (o.center[0] - named.center[0]) > 0),
                key=lambda o: abs(o.center[0] - named.center[0]),
            ).color
        elif kind == "query_same":
            assert named is not None
            (other,) = [o for o in scene.objects if o.color == named.color and o is not named]
            truth = other.shape
        else:
            color = question.text.removeprefix("How many shapes are ").removesuffix("?")
            truth = NUMBERS[sum(o.color == color for o in scene.objects) - 1]
        assert question.answer == truth.capitalize() != question.false_option


def test_each_number_is_the_answer_about_as_often() -> None:
    rng = np.random.default_rng(3)
    answers = Counter[str]()
    for _ in range(4):
        for scene in scenes():
            question = WIDE_KINDS["count_color"](scene, rng)
            answers.update([question.answer] if question else [])
    assert max(answers.values()) < 1.6 * min(answers.values())
    assert len(answers) == len(NUMBERS)


@pytest.mark.parametrize("kind", WIDE_TRAINING_KINDS)
def test_what_is_listed_in_training_is_true(kind: str) -> None:
    for scene, question in asked(kind):
        for statement in question.answer.rstrip(".").split(". "):
            words = statement.split()
            if kind == "list_counts":
                assert NUMBERS[sum(o.color == words[0] for o in scene.objects) - 1] == words[1]
            elif kind == "list_same":
                one, other = (scene.find(word.lower()) for word in words)
                assert one is not None
                assert other is not None
                assert [o for o in scene.objects if o.color == one.color and o is not one] == [other]
            else:
                side, shape, color = words
                (o,) = [o for o in scene.objects if o.shape == shape]
                other = beside(scene, o, side)
                assert other is not None
                assert other.color == color


@pytest.fixture(scope="module")
def processor() -> LlavaNextProcessor:
    built = WORLD.build_processor()
    assert isinstance(built, LlavaNextProcessor)
    return built


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_views_and_tokens_are_those_of_the_processor(size: tuple[int, int], processor: LlavaNextProcessor) -> None:
    scene = next(s for s in scenes() if s.size == size)
    inputs = processor(images=scene.render(), text="<image>", return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"][0], pixels_of([WORLD.views(scene)]), atol=1e-5, rtol=0)
    assert (inputs["input_ids"] == vocabulary()["<image>"]).sum() == WORLD.n_features(scene) <= 200


def test_views_say_where_objects_are() -> None:
    """Every object has its middle in one patch of one tile, and a patch says where in the image it lies."""
    for scene in scenes()[:60]:
        (base, *tiles), (width, height) = WORLD.views(scene), scene.size
        canvas = canvas_of(scene.size)
        assert len(tiles) == canvas[0] * canvas[1] // TILE**2
        assert sum(int(t.middles.sum()) for t in tiles) == len(scene.objects)
        assert not base.middles.any()
        assert {int(i) for t in tiles for i in t.labels} - {-1} == set(range(len(scene.objects)))
        shown = {int(i) for i in base.labels} - {-1}
        assert all(not scene.objects[i].small for i in shown)
        assert base.silhouette.mean() == pytest.approx(scene.masks.any(axis=0).mean(), abs=1e-5)
        assert not any(t.places.any() for t in tiles)
        for (x, y), label in zip(base.places, base.labels, strict=True):
            if label >= 0:
                x0, y0, x1, y1 = scene.objects[label].box
                assert x0 - width / 12 <= (x + 1) / 2 * width <= x1 + width / 12
                assert y0 - height / 12 <= (y + 1) / 2 * height <= y1 + height / 12


def test_the_middle_of_an_object_with_a_neighbor_lies_three_features_after_the_neighbors() -> None:
    found = 0
    for scene in scenes()[:60]:
        at = {id(o): n.feature for n, o in in_order(scene)}
        for neighbor, o in in_order(scene):
            assert neighbor.left is beside(scene, o, "left")
            if neighbor.left is not None:
                assert neighbor.feature - at[id(neighbor.left)] == CELL // PATCH_SIZE
                found += 1
    assert found > 30


def in_order(scene: Scene) -> list[tuple[Neighbor, SceneObject]]:
    return list(zip(WORLD.neighbors(scene), [o for o in scene.objects if not o.small], strict=True))


def test_the_read_out_of_neighbors_is_a_mean_of_cross_entropies() -> None:
    some, width = scenes()[:3], 16
    heads, resid = NeighborHeads(width, 0), torch.randn(3, 300, width, generator=torch.Generator().manual_seed(0))
    neighbors = [WORLD.neighbors(scene) for scene in some]
    each = []
    for row, its in zip(resid, neighbors, strict=True):
        for n in its:
            color, shape = (head(row[n.feature]).log_softmax(-1) for head in (heads.color, heads.shape))
            said = (-1, -1) if n.left is None else (COLOR_NAMES.index(n.left.color), SHAPES.index(n.left.shape))
            each.append(-color[said[0]] - shape[said[1]])
    torch.testing.assert_close(heads(resid, neighbors), torch.stack(each).mean())
    assert heads(resid, [[], [], []]).item() == 0.0


def test_the_new_words_come_after_the_old_ones_with_their_ids() -> None:
    old, new = vocabulary(), wide_vocabulary()
    assert list(new)[: len(old)] == list(old)
    assert all(new[word] == i for word, i in old.items())
    words = {w for kind in WIDE_KINDS for _, q in asked(kind)[:30] for w in re.findall(r"\w+", f"{q.text} {q.answer}")}
    assert words <= set(new)


def test_the_processor_survives_a_round_trip(processor: LlavaNextProcessor, tmp_path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    image, text = scenes()[0].render(), "USER: <image>\nHow many shapes are red? Answer briefly. ASSISTANT:"
    before, after = (one(images=image, text=text, return_tensors="pt") for one in (processor, loaded))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.tokenizer.unk_token_id not in before["input_ids"]


def test_a_model_begins_with_the_weights_of_tiny_shapes() -> None:
    first, second = WORLD.build_model(0), WORLD.build_model(0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = dict(WORLD.build_model(1).named_parameters())
    differ = {n for n, p in first.named_parameters() if not torch.equal(p, other[n])}
    assert differ == {"model.image_newline", "model.language_model.embed_tokens.weight", "lm_head.weight"}
