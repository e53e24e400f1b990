"""Directions: differences of means written out, and random ones of the same norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.steering import mean_difference, random_direction
from tests.replay.test_replay import model_of, prompts

MODEL = model_of(0)
HOOK = ("resid_post", 1)


def at(inputs, span):
    cache: Any = MODEL.run_with_cache(inputs, names_filter=HOOK)[1]
    return torch.cat([cache[HOOK][row, list(m[span])] for row, m in enumerate(inputs.token_maps)])


def test_over_prompts_images_and_positions():
    first, second = (
        prompts(MODEL, 0, batch=2, n_images=1, padding="left", unequal=True),
        prompts(MODEL, 0, batch=3, n_images=1, padding="none"),
    )
    found = mean_difference(MODEL, first, second, hook=HOOK, positions="text")
    torch.testing.assert_close(found, at(first, "text").mean(0) - at(second, "text").mean(0), rtol=1e-4, atol=1e-5)
    listed = mean_difference(MODEL, [first, second], second, hook=HOOK, positions="text")
    both = torch.cat([at(first, "text"), at(second, "text")]).mean(0) - at(second, "text").mean(0)
    torch.testing.assert_close(listed, both, rtol=1e-4, atol=1e-5)
    within = mean_difference(MODEL, first, hook=HOOK, positions="image", negative_positions="text")
    torch.testing.assert_close(within, at(first, "image").mean(0) - at(first, "text").mean(0), rtol=1e-4, atol=1e-5)
    one = mean_difference(MODEL, first[0], second[1], hook=HOOK, positions="last")
    torch.testing.assert_close(one, (at(first[0], "last") - at(second[1], "last"))[0], rtol=1e-4, atol=1e-5)
    heads = mean_difference(MODEL, first, second, hook=("z", 1), positions="last")
    assert heads.shape == (MODEL.cfg.n_heads, MODEL.cfg.d_head)
    with pytest.raises(InputError, match="negative_positions"):
        mean_difference(MODEL, first, hook=HOOK, positions="image")
    with pytest.raises(InputError, match="same"):
        mean_difference(MODEL, first, first, hook=HOOK, positions="image")


def test_random_directions_have_the_norm_and_are_drawn_by_the_seed():
    direction = torch.linspace(-1, 3, 48)
    drawn = [random_direction(direction, seed=seed) for seed in (0, 0, 1)]
    torch.testing.assert_close(drawn[0].norm(), direction.norm())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
