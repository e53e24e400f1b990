"""Corruptions change what they say and nothing else, the same way for the same seed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.experiments.pairs import (
    blank_image,
    check_pair,
    gaussian_noise,
    mean_embedding,
    other_image,
    other_question,
    prompt_pairs,
    swapped_objects,
    without_object,
)
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.directions import check_direction
from hooked_llava.replay import Replay
from tests.fixtures_processor import make_processor
from tests.pairs import pair
from tests.tiled import SQUARE, WIDE, drawn, with_processor

QUESTION = "What color is the star?"


@functools.cache
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(pair().hf, processor=make_processor())


def image(seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def prompt(seed: int = 0) -> Any:
    return model().prepare(QUESTION, images=image(seed))


def test_other_image_is_drawn_by_seed_and_never_the_same() -> None:
    clean, pool = prompt(0), [image(seed, size=16 + 4 * seed) for seed in range(4)]
    drawn = [other_image(model(), clean, pool, seed=seed) for seed in range(8)]
    for corrupted in drawn:
        check_pair(clean, corrupted)
        assert not torch.equal(corrupted.pixel_values, clean.pixel_values)
        assert torch.equal(corrupted.input_ids, clean.input_ids)
        assert corrupted.token_map.layout().original_size[1] == corrupted.images[0].width
    assert len({float(corrupted.pixel_values.sum()) for corrupted in drawn}) > 1
    again = other_image(model(), clean, pool, seed=3)
    assert torch.equal(again.pixel_values, drawn[3].pixel_values)
    direct = model().prepare(QUESTION, images=again.images[0])
    torch.testing.assert_close(direct.pixel_values, again.pixel_values)


def test_other_image_from_inputs_and_its_refusals() -> None:
    bare = pair().ours
    clean, other = (bare.as_inputs(pair().prompt(seed=seed)) for seed in (1, 2))
    assert torch.equal(other_image(bare, clean, other).pixel_values, other.pixel_values)
    with pytest.raises(InputError, match="none that differs"):
        other_image(bare, clean, clean)
    with pytest.raises(InputError, match=r"pool=images.*processor=.*from_hf"):
        other_image(bare, clean, [image(0)])
    with pytest.raises(InputError, match="an image.*images="):
        other_image(model(), model().prepare(QUESTION), [image(0)])


def test_blank_image_is_the_mean_pixel() -> None:
    clean = prompt()
    blank = blank_image(model(), clean)
    check_pair(clean, blank)
    expected = clean.pixel_values.flatten(2).mean(-1)[..., None, None].expand(-1, -1, 16, 16)
    torch.testing.assert_close(blank.pixel_values, expected)
    assert len(blank.images[0].getcolors()) == 1
    assert blank.token_map.layout() == clean.token_map.layout()


def test_other_question_fits_position_by_position() -> None:
    clean = prompt()
    pool = [QUESTION, "Is it red?", "What shape is the circle?", "What color is the square?"]
    found = {other_question(model(), clean, pool, seed=seed).prompts[0] for seed in range(6)}
    assert len(found) == 2
    assert all("shape" in text or "square" in text for text in found)
    check_pair(clean, other_question(model(), clean, pool))
    counts = r"13 tokens.*\n  13 tokens: What .*\n  11 tokens: Is "
    with pytest.raises(InputError, match=rf"(?s)None of the 2 questions.*{counts}.*clean:.*position"):
        other_question(model(), clean, pool[:2])
    with pytest.raises(InputError, match="takes one prompt, got 2"):
        other_question(model(), model().prepare([QUESTION, QUESTION]), pool)
    with pytest.raises(InputError, match="other_question.*original image"):
        other_question(pair().ours, pair().ours.as_inputs(pair().prompt()), pool)


def test_gaussian_noise_falls_on_the_chosen_positions() -> None:
    clean = prompt()
    noise = gaussian_noise(model(), clean, "question", seed=5)
    assert noise == gaussian_noise(model(), clean, "question", seed=5)
    assert noise != gaussian_noise(model(), clean, "question", seed=6)
    assert list(noise.positions) == list(clean.token_map["question"])
    ratio = float(noise.add.std() / model().W_E.std())
    assert 2.5 < ratio < 3.5
    with pytest.raises(InputError, match="gaussian_noise takes one prompt, got 2"):
        gaussian_noise(model(), model().prepare([QUESTION] * 2), "last")
    everywhere = gaussian_noise(model(), clean, None, std=0.1)
    assert len(everywhere.add) == clean.shape[1]
    replay = Replay(model(), clean)
    embedded = model().embed(clean)
    embedded[:, list(noise.positions)] += noise.add
    expected = model().language(embedded, model().context(embedded))
    torch.testing.assert_close(
        replay.run([[noise]])[0], model().language.to_logits(expected)[0, -1], rtol=1e-4, atol=1e-4
    )


def test_mean_embedding_over_the_positions_or_a_reference() -> None:
    clean = prompt()
    at_image = list(clean.token_map["image"])
    embedded = model().embed(clean)[0, at_image]
    own = mean_embedding(model(), "image")
    explicit = mean_embedding(model(), "image", reference=clean)
    torch.testing.assert_close(explicit.value, embedded.mean(0))
    found = Replay(model(), clean).run([[own], [explicit]])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    several = mean_embedding(model(), "image", reference=model().prepare([QUESTION] * 2, images=[image(1), image(2)]))
    each = [model().embed(prompt(seed))[0, at_image].mean(0) for seed in (1, 2)]
    torch.testing.assert_close(several.value, (each[0] + each[1]) / 2)


def test_pairs_are_matched_one_by_one() -> None:
    batch = model().prepare([QUESTION] * 2, images=[image(1), image(2)])
    pairs, several = prompt_pairs(model(), batch, [prompt(3), prompt(4)])
    assert several
    assert len(pairs) == 2
    assert pairs[1][2] is None
    assert not prompt_pairs(model(), prompt(1), prompt(2))[1]
    texts, _ = prompt_pairs(model(), ["USER: a star", "USER: a circle"], ["USER: a circle", "USER: a star"])
    assert len(texts) == 2
    with pytest.raises(InputError, match="2 clean and 1 corrupted"):
        prompt_pairs(model(), batch, prompt(3))
    with pytest.raises(InputError, match="1 metrics for 2 pairs"):
        prompt_pairs(model(), batch, batch, [lambda logits: logits[..., 0]])
    with pytest.raises(InputError, match="got 2 and 2"):
        check_pair(batch, batch)
    with pytest.raises(InputError, match="'denoise'"):
        check_direction("sideways")


def test_without_object_paints_over_a_box_and_nothing_else() -> None:
    clean = prompt()
    without = without_object(model(), clean, (2, 4, 8, 10))
    check_pair(clean, without)
    before, after = (np.asarray(inputs.images[0]).astype(int) for inputs in (clean, without))
    outside = np.ones(before.shape[:2], dtype=bool)
    outside[4:10, 2:8] = False
    assert (after[outside] == before[outside]).all()
    np.testing.assert_allclose(after[4:10, 2:8], np.broadcast_to(before[outside].mean(0), (6, 6, 3)), atol=0.51)
    direct = model().prepare(QUESTION, images=without.images[0])
    torch.testing.assert_close(direct.pixel_values, without.pixel_values)
    assert without.token_map.layout() == clean.token_map.layout()


def test_swapped_objects_change_places() -> None:
    clean = prompt()
    boxes = (0, 0, 6, 6), (9, 8, 15, 14)
    swapped = swapped_objects(model(), clean, *boxes)
    check_pair(clean, swapped)
    before, after = (np.asarray(inputs.images[0]) for inputs in (clean, swapped))
    assert (after[0:6, 0:6] == before[8:14, 9:15]).all()
    assert (after[8:14, 9:15] == before[0:6, 0:6]).all()
    assert (after[6:8] == before[6:8]).all()
    again = swapped_objects(model(), swapped, *boxes)
    assert torch.equal(again.pixel_values, clean.pixel_values)


def test_one_of_several_images_is_repainted() -> None:
    clean = model().prepare("<image> or <image> ?", images=[image(1), image(2)])
    without = without_object(model(), clean, (0, 0, 8, 8), image=1)
    assert torch.equal(without.pixel_values[0], clean.pixel_values[0])
    assert not torch.equal(without.pixel_values[1], clean.pixel_values[1])


def test_boxes_that_do_not_fit_are_refused() -> None:
    clean, flat = prompt(), model().prepare(QUESTION, images=np.full((16, 16, 3), 9, dtype=np.uint8))
    with pytest.raises(InputError, match="image of 16 x 16 pixels"):
        without_object(model(), clean, (4, 4, 20, 8))
    with pytest.raises(InputError, match="use blank_image"):
        without_object(model(), clean, (0, 0, 16, 16))
    with pytest.raises(InputError, match="same image.*boxes"):
        without_object(model(), flat, (0, 0, 4, 4))
    with pytest.raises(InputError, match="4 x 4 and 6 x 4 pixels.*size"):
        swapped_objects(model(), clean, (0, 0, 4, 4), (8, 8, 14, 12))
    with pytest.raises(InputError, match=r"boxes \(.*\) and \(.*overlap"):
        swapped_objects(model(), clean, (0, 0, 4, 4), (2, 2, 6, 6))
    with pytest.raises(InputError, match="image=1.*prompt has 1 images"):
        without_object(model(), clean, (0, 0, 4, 4), image=1)
    with pytest.raises(InputError, match=r"without_object.*original image.*images="):
        without_object(pair().ours, pair().ours.as_inputs(pair().prompt()), (0, 0, 4, 4))


def test_images_that_take_other_numbers_of_positions_are_named() -> None:
    model = with_processor("next")
    first, other = (model.prepare(QUESTION, images=drawn(size)) for size in (WIDE, SQUARE))
    n = [len(inputs.token_map["image"]) for inputs in (first, other)]
    with pytest.raises(InputError, match=rf"\[{n[0]}\] and \[{n[1]}\] positions.*same sizes"):
        check_pair(first, other)
