"""Interventions on tiles and on images of different lengths: Replay equals the whole run with functions on the same rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.replay import Intervention, Replay
from tests.tiled import KINDS, SQUARE, TALL, WIDE, both, make_prompts

EVERY = pytest.mark.parametrize("kind", KINDS)
# (hook, image, tile, patches): what is named; image and tile None for all
CHANGES = [
    ("vision.blocks.0.hook_resid_pre", 0, 1, [0, 3]),
    ("vision.blocks.1.hook_mlp_out", None, 0, [2]),
    ("vision.hook_out", 1, None, None),
    ("projector.hook_pre", None, 2, [1]),
    ("hook_image_embed", 0, None, [0, 5, -1]),
    ("hook_image_embed", 1, None, None),
]


def by_hand(ours: Any, inputs: Any, change: tuple[Any, ...]) -> Any:
    """A function that scales the named rows and positions, found from the layouts one by one."""
    hook, image, tile, patches = change
    rows: list[tuple[int, list[int]]] = []
    first_tile = number = 0
    for n in inputs.images_per_prompt:
        for i in range(n):
            layout = inputs.layouts[number]
            named = image is None or i == image
            if hook == "hook_image_embed":
                cells = [f for g in layout.names for f in layout.cell_features(g).ravel().tolist()]
                at = list(range(layout.n_features)) if patches is None else [cells[p] for p in patches]
                rows += [(number, at)] * named
            else:
                class_token = ours.config.vision.class_token and not hook.startswith(("vision.hook_out", "projector"))
                n_positions = ours.config.vision.n_patches + class_token
                at = list(range(n_positions)) if patches is None else [p + class_token for p in patches]
                rows += [(first_tile + t, at) for t in range(layout.n_tiles) if named and (tile is None or t == tile)]
            first_tile, number = first_tile + layout.n_tiles, number + 1

    def scale(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        tensor = tensor.clone()
        for row, at in rows:
            tensor[row, at] *= 3.0
        return tensor

    return hook, scale


@EVERY
def test_replay_and_attached_interventions_equal_the_whole_run(kind: str) -> None:
    ours, _ = both(kind)
    inputs = ours.as_inputs(make_prompts(kind, [TALL, SQUARE], [], [WIDE]))
    if kind == "onevision":  # several images have a base grid each
        inputs = ours.as_inputs(make_prompts(kind, [TALL], [], [WIDE, SQUARE]))
    replay, plain = Replay(ours, inputs), ours(inputs)[:, -1]
    runs = [[Intervention(h, image=i, tile=t, positions=p, scale=3.0)] for h, i, t, p in CHANGES]
    found = replay.run(runs)
    for run, change, logits in zip(runs, CHANGES, found, strict=True):
        expected = ours.run_with_hooks(inputs, fwd_hooks=[by_hand(ours, inputs, change)])[:, -1]
        scale = expected.abs().max()
        assert (logits - expected).abs().max() <= 1e-5 * scale, change
        assert (ours.run_with_hooks(inputs, fwd_hooks=run)[:, -1] - expected).abs().max() <= 1e-5 * scale, change
        assert (expected - plain).abs().max() > 1e-3 * scale, change


@EVERY
def test_tiles_that_are_not_there(kind: str) -> None:
    ours, _ = both(kind)
    inputs = ours.as_inputs(make_prompts(kind, [WIDE]))
    with pytest.raises(InputError, match=r"tile=9.*'vision\.hook_out'.*range"):
        Replay(ours, inputs).run([[Intervention("vision.hook_out", tile=9, zero=True)]])
    with pytest.raises(InputError, match="tile=.*vision tower.*projector.*'hook_image_embed'"):
        Replay(ours, inputs).run([[Intervention("hook_image_embed", tile=0, zero=True)]])


@EVERY
def test_a_mean_over_images_of_different_lengths_leaves_the_filling_out(kind: str) -> None:
    ours, _ = both(kind)
    inputs = ours.as_inputs(make_prompts(kind, [TALL], [SQUARE]))
    _, cache = ours.run_with_cache(inputs, names_filter="hook_image_embed")
    embed = cache["hook_image_embed"]
    real = torch.cat([embed[i, : layout.n_features] for i, layout in enumerate(inputs.layouts)])
    replay = Replay(ours, inputs)
    mean = replay.run(
        [[Intervention("hook_image_embed", mean_of=inputs)], [Intervention("hook_image_embed", mean_of=cache)]]
    )
    expected = replay.run([[Intervention("hook_image_embed", value=real.mean(0))]])
    torch.testing.assert_close(mean, expected.expand_as(mean), rtol=1e-4, atol=1e-4)
